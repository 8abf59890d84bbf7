"""Rank value encoding against a slow version that follows the published tokenizer cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scmodelforge.config import Preprocessing, TokenizerConfig
from tests.helpers import make_cells, make_vocab, rank_tokenizer

TARGET_SUM = 10_000


def slow_tokens(counts, library_size, medians, vocab, config) -> list[int]:
    """One cell, as the published h5ad path computes it: x · (1/n) · 10,000 · (1/median), stable on ties."""
    genes = [g for g in range(len(counts)) if counts[g] > 0 and not np.isnan(medians[g])]
    values = {
        g: float(counts[g]) * (1.0 / float(library_size)) * TARGET_SUM * (1.0 / medians[g]) for g in genes
    }
    ranked = sorted(genes, key=lambda g: (-values[g], g))
    room = config.max_genes - config.prepend_cls - config.append_eos
    tokens = [g + len(vocab.special_tokens) for g in ranked[:room]]
    tokens = [vocab.cls_id, *tokens] if config.prepend_cls else tokens
    return [*tokens, vocab.eos_id] if config.append_eos else tokens


@st.composite
def cells_and_config(draw):
    n_cells, n_genes = draw(st.integers(1, 6)), draw(st.integers(1, 30))
    few = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 7, 250])  # many zeros, many ties
    counts = draw(hnp.arrays(np.int64, (n_cells, n_genes), elements=few))
    medians = draw(
        hnp.arrays(np.float64, n_genes, elements=st.sampled_from([np.nan, 0.5, 1.0, 1.0, 2.0, 3.7]))
    )
    unmatched = draw(hnp.arrays(np.int64, n_cells, elements=st.integers(0, 500)))
    layout = draw(st.sampled_from(["geneformer_v1", "geneformer_v2"]))
    v2 = layout == "geneformer_v2"
    config = TokenizerConfig(
        max_genes=draw(st.integers(4, 40)),
        prepend_cls=v2 and draw(st.booleans()),
        append_eos=v2 and draw(st.booleans()),
        vocab_layout=layout,
    )
    return counts, unmatched, medians, config


@given(cells_and_config())
@settings(max_examples=200, deadline=None)
def test_tokens_are_those_of_the_slow_version(drawn) -> None:
    counts, unmatched, medians, config = drawn
    vocab = make_vocab(counts.shape[1], medians, config.vocab_layout)
    cells = make_cells(counts, unmatched)
    batch = rank_tokenizer(config, Preprocessing(), vocab)(cells)
    for i in range(len(counts)):
        expected = slow_tokens(counts[i], cells.library_size[i], medians, vocab, config)
        length = int(batch.lengths[i])
        assert batch.input_ids[i, :length].tolist() == expected
        assert (batch.input_ids[i, length:] == vocab.pad_id).all()
        assert (batch.values[i, length:] == 0).all()
    assert batch.has_padding == bool((batch.lengths < batch.input_ids.shape[1]).any())


@given(cells_and_config(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_a_cell_s_tokens_do_not_depend_on_its_company(drawn, random) -> None:
    counts, unmatched, medians, config = drawn
    tokenizer = rank_tokenizer(
        config, Preprocessing(), make_vocab(counts.shape[1], medians, config.vocab_layout)
    )
    together = tokenizer(make_cells(counts, unmatched))
    i = random.randrange(len(counts))
    alone = tokenizer(make_cells(counts[i : i + 1], unmatched[i : i + 1]))
    length = int(alone.lengths[0])
    assert together.lengths[i] == length
    assert together.input_ids[i, :length].tolist() == alone.input_ids[0, :length].tolist()
    assert together.values[i, :length].tolist() == alone.values[0, :length].tolist()


def test_values_are_normalized_counts_in_rank_order() -> None:
    counts = np.array([[4, 0, 1, 5]])
    config = TokenizerConfig(prepend_cls=True, append_eos=True)
    vocab = make_vocab(4, np.array([100.0, 1.0, 1.0, 1000.0]))
    plain = rank_tokenizer(config, Preprocessing(log1p=False), vocab)(make_cells(counts, np.array([10])))
    assert vocab.tokens_to_names(plain.input_ids[0].numpy()) == ["<cls>", "G2", "G0", "G3", "<eos>"]
    np.testing.assert_allclose(plain.values[0], [0, 500, 2000, 2500, 0])
    logged = rank_tokenizer(config, Preprocessing(), vocab)(make_cells(counts, np.array([10])))
    np.testing.assert_allclose(logged.values[0], np.log1p([0, 500, 2000, 2500, 0]), rtol=1e-6)
    assert logged.input_ids.tolist() == plain.input_ids.tolist()


def test_without_normalization_the_counts_themselves_are_ranked() -> None:
    tokenizer = rank_tokenizer(
        TokenizerConfig(prepend_cls=False), Preprocessing(normalize="none", log1p=False), make_vocab(3)
    )
    batch = tokenizer(make_cells(np.array([[2, 9, 4]])))
    assert batch.values[0].tolist() == [9, 4, 2]


def test_explain_shows_each_step() -> None:
    vocab = make_vocab(3, np.array([2.0, 1.0, np.nan]))
    tokenizer = rank_tokenizer(TokenizerConfig(), Preprocessing(), vocab)
    table = tokenizer.explain(make_cells(np.array([[6, 2, 5]]), np.array([7])))
    assert table["name"].tolist() == ["<cls>", "G0", "G1"]
    assert table["counts"].tolist()[1:] == [6, 2]
    assert table["normalized"].tolist()[1:] == pytest.approx([3000, 1000])
    assert table["scaled"].tolist()[1:] == pytest.approx([1500, 1000])
    assert np.isnan(table["scaled"][0])


@pytest.mark.parametrize("n_genes", [2046, 2047, 5000])
def test_long_cells_are_cut_to_the_input_length(n_genes: int) -> None:
    tokenizer = rank_tokenizer(
        TokenizerConfig(max_genes=2048, append_eos=True), Preprocessing(), make_vocab(n_genes)
    )
    batch = tokenizer(make_cells(np.ones((1, n_genes))))
    assert int(batch.lengths[0]) == batch.input_ids.shape[1] == 2048
    assert batch.input_ids[0, -1] == tokenizer.vocab.eos_id
