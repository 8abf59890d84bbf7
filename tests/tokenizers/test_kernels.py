"""The compiled kernels against slow twins in numpy."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scmodelforge.config import Config
from scmodelforge.data.random import below, philox, philox_fill
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.binned_expression import BinnedExpressionTokenizer, bin_range, quantile_edges
from scmodelforge.tokenizers.gene_sequence import ORDER, SAMPLE, TIES, draw, expression
from tests.helpers import make_cells, make_vocab


@given(
    st.integers(0, 2**63),
    st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    hnp.arrays(np.uint32, st.integers(0, 20)),
    st.sampled_from([1, 4]),
)
@settings(max_examples=100, deadline=None)
def test_compiled_philox_is_philox(key: int, words: list[int], c2: np.ndarray, n_words: int) -> None:
    c0, c1, c3 = words
    filled = np.empty((n_words, len(c2)), np.uint32)
    philox_fill(np.uint64(key), np.uint64(c0), np.uint64(c1), c2, np.uint64(c3), filled)
    np.testing.assert_array_equal(filled, philox(key, c0, c1, c2, c3)[:n_words])


@st.composite
def counts(draw_):
    shape = draw_(st.integers(1, 5)), draw_(st.integers(1, 60))
    kind = draw_(st.sampled_from(["ties", "large", "fractions"]))
    elements = {
        "ties": st.sampled_from([0, 0, 1, 1, 1, 2, 3, 7]),
        "large": st.sampled_from([0, 0, 1, 255, 256, 4095, 4096, 100_000]),
        "fractions": st.sampled_from([0, 0.25, 0.5, 1, 1.5, 3.75]),
    }[kind]
    return draw_(hnp.arrays(np.float64, shape, elements=elements))


@numba.njit
def compiled_log1p(values: np.ndarray) -> np.ndarray:
    """numpy's own may differ from it in the last bit."""
    return np.log1p(values)


@given(counts(), st.booleans(), st.sampled_from(["none", "library_size"]), st.sampled_from([3, 5, 51]))
@settings(max_examples=150, deadline=None)
def test_bins_are_those_of_the_slow_version(
    counts: np.ndarray, log1p: bool, normalize: str, n_bins: int
) -> None:
    config = Config.model_validate(
        {
            "data": {"preprocessing": {"normalize": normalize, "log1p": log1p}},
            "tokenizer": {"strategy": "binned_expression", "n_bins": n_bins},
            "model": {"pretraining_task": "expression_reconstruction"},
        }
    )
    vocab, cells = make_vocab(counts.shape[1]), make_cells(counts, first_row=2**32 - 1)
    edges, bins = BinnedExpressionTokenizer(config, vocab)._bins(cells, seed=3, epoch=1)

    plain = config.data.preprocessing.model_copy(update={"log1p": False})
    values = expression(cells, plain)
    values = compiled_log1p(values) if log1p else values
    row = np.repeat(np.arange(cells.n_cells), cells.n_genes_per_cell)
    expected = quantile_edges(values, cells.n_genes_per_cell, n_bins - 1)
    np.testing.assert_array_equal(edges, expected)
    above, up_to = bin_range(values, expected, row)
    bits = draw(TIES, 3, 1, cells.cell_index[row], cells.gene_ids)
    np.testing.assert_array_equal(bins, up_to - below(bits, np.maximum(up_to - above, 1)))


@pytest.mark.parametrize("n", [1, 50, 3000])
def test_ranks_of_many_ties_are_stable(n: int) -> None:
    config = Config.model_validate({"tokenizer": {"max_genes": 4096, "gene_medians": "none"}})
    from scmodelforge.tokenizers.rank_value import RankValueTokenizer

    values = np.random.default_rng(0).integers(1, 3, (2, n))
    batch = RankValueTokenizer(config, make_vocab(n))(make_cells(values))
    for i in range(2):
        expected = np.argsort(-values[i], kind="stable") + 4
        np.testing.assert_array_equal(batch.input_ids[i, 1 : n + 1], expected)


def test_values_that_float32_cannot_tell_apart_are_ranked_in_float64() -> None:
    from scmodelforge.tokenizers.rank_value import RankValueTokenizer

    n = 40
    medians = 1.0 + np.random.default_rng(1).permutation(n) * 1e-12
    config = Config.model_validate({"tokenizer": {"max_genes": 64}})
    tokens = RankValueTokenizer(config, make_vocab(n, medians))(make_cells(np.ones((1, n)))).input_ids
    np.testing.assert_array_equal(tokens[0, 1:], np.argsort(medians, kind="stable") + 4)


@given(counts(), st.sampled_from(["column", "random", "value"]), st.sampled_from(["sample", "first"]))
@settings(max_examples=150, deadline=None)
def test_genes_are_chosen_by_their_draws(counts: np.ndarray, order: str, overlong: str) -> None:
    config = Config.model_validate(
        {
            "tokenizer": {
                "strategy": "continuous_projection",
                "gene_order": order,
                "overlong": overlong,
                "max_genes": 13,
            },
            "model": {"pretraining_task": "expression_reconstruction"},
        }
    )
    vocab, cells = make_vocab(counts.shape[1]), make_cells(counts, first_row=2**32 - 1)
    batch = build_tokenizer(config, vocab)(cells, 3, 1)
    for i in range(cells.n_cells):
        genes = cells.gene_ids[cells.indptr[i] : cells.indptr[i + 1]]
        cell = np.full(len(genes), cells.cell_index[i])
        chosen = np.arange(len(genes))
        if order == "random":
            chosen = np.lexsort((chosen, draw(ORDER, 3, 1, cell, genes)))[:12]
        elif overlong == "sample":
            chosen = np.sort(np.lexsort((chosen, draw(SAMPLE, 3, 1, cell, genes)))[:12])
        if order == "value":
            chosen = chosen[
                np.argsort(
                    -expression(cells, config.data.preprocessing)[cells.indptr[i] :][chosen], kind="stable"
                )
            ]
        chosen = chosen[:12]
        assert batch.lengths[i] == 1 + len(chosen)
        np.testing.assert_array_equal(batch.input_ids[i, 1 : 1 + len(chosen)], genes[chosen] + 4)
        assert (batch.input_ids[i, 1 + len(chosen) :] == vocab.pad_id).all()
        left = np.setdiff1d(genes, genes[chosen]) + 4
        if batch.left_out is not None:
            np.testing.assert_array_equal(batch.left_out[i][batch.left_out[i] != vocab.pad_id], left)
        else:
            assert not len(left)
