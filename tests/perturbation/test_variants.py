"""Perturbed cells are, token by token, what a slow and plain version makes of Geneformer's description."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config
from scmodelforge.inference_batches import some_cells
from scmodelforge.perturbation.choice import all_genes, listed, random_sets
from scmodelforge.perturbation.variants import Layout, delete, n_overflow, overexpress, shorten
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells, make_vocab

V1 = {"prepend_cls": False, "append_eos": False, "vocab_layout": "geneformer_v1"}
V2 = {"prepend_cls": True, "append_eos": True}
LAYOUTS = {"v1": V1, "v2": V2, "cls alone": V2 | {"append_eos": False}}


def tokenized(counts: np.ndarray, **tokenizer: object) -> tuple[TokenBatch, Layout]:
    """Cells of dense counts as tokens of a tokenizer."""
    config = Config.model_validate({"tokenizer": {"max_genes": 10} | tokenizer})
    vocab = make_vocab(counts.shape[1], layout=config.tokenizer.vocab_layout)
    return build_tokenizer(config, vocab)(make_cells(counts)), Layout.of(config, vocab)


def plain(tokens: TokenBatch) -> list[list[int]]:
    """The tokens of each cell."""
    pairs = zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


# --- the slow twins, on lists ---------------------------------------------------------------------


def deleted_slowly(ids: list[int], genes: list[int]) -> list[int]:
    return [token for token in ids if token not in genes]


def overexpressed_slowly(
    ids: list[int], genes: list[int], max_length: int, cls: bool, eos: bool
) -> tuple[list[int], list[int]]:
    """The perturbed cell, and the original to compare it with."""
    perturbed = deleted_slowly(ids, genes)
    at = 1 if cls else 0
    for gene in reversed(genes):
        perturbed.insert(at, gene)
    if len(perturbed) > max_length:
        perturbed = [*perturbed[: max_length - 1], ids[-1]] if eos else perturbed[:max_length]
    n_added = sum(gene not in ids for gene in genes)
    n_overflow = len(ids) + n_added - max_length
    if n_overflow <= 0:
        return perturbed, ids
    left = len(ids) - n_overflow
    return perturbed, [*ids[: left - 1], ids[-1]] if eos else ids[:left]


COUNTS = st.lists(
    st.lists(st.integers(0, 6), min_size=14, max_size=14).filter(any), min_size=1, max_size=4
).map(np.array)
GENES = st.lists(st.integers(0, 13), min_size=1, max_size=4, unique=True)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, genes=GENES)
def test_perturbed_cells_are_those_of_the_slow_twin(name: str, counts: np.ndarray, genes: list[int]) -> None:
    tokens, layout = tokenized(counts, **LAYOUTS[name])
    ids = np.array(genes) + layout.first_gene_token
    sets = np.tile(ids, (tokens.n_cells, 1))
    asked = list(map(int, ids))
    assert plain(delete(tokens, sets, layout)) == [deleted_slowly(cell, asked) for cell in plain(tokens)]
    expected = [
        overexpressed_slowly(cell, asked, 10, layout.n_before == 1, layout.n_after == 1)
        for cell in plain(tokens)
    ]
    found = overexpress(tokens, sets, layout)
    originals = shorten(tokens, n_overflow(tokens, sets, layout), layout)
    assert list(zip(plain(found), plain(originals), strict=True)) == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_full_cell_loses_in_the_original_what_it_loses_in_the_perturbed(name: str) -> None:
    tokens, layout = tokenized(np.array([[*range(14, 2, -1), 0, 0]]), **LAYOUTS[name])
    absent = np.array([[12, 13]]) + layout.first_gene_token
    perturbed, originals = (
        overexpress(tokens, absent, layout),
        shorten(tokens, n_overflow(tokens, absent, layout), layout),
    )
    assert tokens.lengths.tolist() == perturbed.lengths.tolist() == [10]
    assert originals.lengths.tolist() == [8]
    assert set(plain(perturbed)[0]) - set(plain(originals)[0]) == set(absent[0])


def test_the_order_of_the_list_is_kept_and_its_value_is_the_highest() -> None:
    tokens, layout = tokenized(np.array([[5, 4, 3, 2, 0]]), **V2)
    first = layout.first_gene_token
    found = overexpress(tokens, np.array([[first + 4, first + 2, first + 0]]), layout)
    assert plain(found)[0][1:-1] == [first + 4, first + 2, first + 0, first + 1, first + 3]
    values = found.values[0].tolist()
    assert values[0] == values[-1] == 0
    assert values[1] == values[2] == values[3] == tokens.values.max().item()


def test_binned_genes_get_the_highest_bin_in_their_place() -> None:
    counts = np.array([[4, 0, 2, 1, 7, 0]])
    tokens, layout = tokenized(counts, strategy="binned_expression", n_bins=7, vocab_layout="scgpt")
    first = layout.first_gene_token
    found = overexpress(tokens, np.array([[first + 2, first + 1]]), layout)
    assert plain(found) == [[tokens.input_ids[0, 0].item(), *(first + g for g in (1, 0, 2, 3, 4))]]
    before = dict(zip(tokens.input_ids[0].tolist(), tokens.values[0].tolist(), strict=True))
    after = dict(zip(found.input_ids[0].tolist(), found.values[0].tolist(), strict=True))
    assert after == before | {first + 2: 6.0, first + 1: 6.0}


def test_continuous_genes_get_the_maximum_of_their_cell() -> None:
    counts = np.array([[4, 0, 2, 1], [0, 3, 3, 1]])
    tokens, layout = tokenized(counts, strategy="continuous_projection", gene_order="value", max_genes=6)
    first = layout.first_gene_token
    found = overexpress(tokens, np.array([[first + 3], [first + 3]]), layout)
    assert [cell[1] for cell in plain(found)] == [first + 3, first + 3]
    torch.testing.assert_close(found.values[:, 1], tokens.values.max(dim=1).values)


def test_where_zeros_are_tokens_a_deleted_gene_is_a_zero() -> None:
    counts = np.array([[4, 0, 2, 1]])
    how = {"strategy": "continuous_projection", "include_zero_genes": True}
    tokens, layout = tokenized(counts, **how)
    knocked_out, _ = tokenized(np.array([[4, 0, 0, 1]]), **how)
    found = delete(tokens, np.array([[layout.first_gene_token + 2]]), layout)
    assert sorted(plain(found)[0]) == sorted(plain(knocked_out)[0])
    gene = (found.input_ids == layout.first_gene_token + 2).nonzero()[0]
    assert found.values[tuple(gene)] == 0
    assert (found.values > 0).sum() == 2


# --- which genes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "before", "after"), [("v1", 0, 0), ("v2", 1, 1)])
def test_all_are_all_genes_but_the_one_that_is_on_top(name: str, before: int, after: int) -> None:
    tokens, layout = tokenized(np.array([[5, 4, 3, 0], [0, 0, 1, 0]]), **LAYOUTS[name])
    first = plain(tokens)[0][before : len(plain(tokens)[0]) - after]
    removed = all_genes(tokens, layout, overexpressed=False)
    assert removed.cell.tolist() == [0, 0, 0], "of the second cell nothing would be left"
    assert removed.genes[:, 0].tolist() == removed.perturbation.tolist() == first
    raised = all_genes(tokens, layout, overexpressed=True)
    assert (raised.cell.tolist(), raised.perturbation.tolist()) == ([0, 0], first[1:])


def test_a_set_is_deleted_only_where_all_of_it_is() -> None:
    tokens, layout = tokenized(np.array([[5, 4, 3, 0], [0, 4, 1, 0], [3, 4, 0, 0]]), **V2)
    sets = np.array([[0, 1], [1, 2]]) + layout.first_gene_token
    removed = listed(tokens, sets, layout, overexpressed=False)
    assert removed.cell.tolist() == [0, 0], "the others would be empty, or lack a gene"
    assert removed.perturbation.tolist() == [0, 1]
    raised = listed(tokens, sets, layout, overexpressed=True)
    assert (raised.cell.tolist(), raised.perturbation.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 1])
    np.testing.assert_array_equal(raised.genes, sets[raised.perturbation])


def test_random_genes_are_of_the_cell_differ_and_do_not_depend_on_company() -> None:
    counts = np.random.default_rng(0).poisson(1.0, (6, 30))
    counts[2, 3:] = 0
    tokens, layout = tokenized(counts, max_genes=20, **V2)
    drawn = random_sets(tokens, 3, 200, layout, seed=1)
    assert set(drawn.cell) == {0, 1, 3, 4, 5}, "a cell with three genes has nothing beside them"
    assert len(drawn.cell) == 5 * 200
    for cell, genes in zip(drawn.cell, drawn.genes, strict=True):
        assert len(set(genes)) == 3
        assert set(genes) <= set(plain(tokens)[cell][1:-1])
    own = drawn.genes[drawn.cell == 4]
    share = np.bincount(own.ravel()).max() / len(own) * (len(plain(tokens)[4]) - 2) / 3
    assert 1 <= share < 1.5, "all genes of a cell are as likely"
    alone = some_cells(tokens, torch.tensor([4]))
    np.testing.assert_array_equal(random_sets(alone, 3, 200, layout, seed=1).genes, own)
    assert (random_sets(alone, 3, 200, layout, seed=2).genes != own).any()
    moved = replace(alone, cell_index=alone.cell_index + 1)
    assert (random_sets(moved, 3, 200, layout, seed=1).genes != own).any()
