"""Which genes are perturbed in which cells: all of a cell one at a time, given ones, or random ones to compare with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scmodelforge.data.random import below
from scmodelforge.perturbation.variants import Layout, detected
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.gene_sequence import draw

RANDOM = int.from_bytes(b"pert", "big") << 32  # the purpose of a draw, as in `gene_sequence`


class Choice(NamedTuple):
    """Some perturbations of some cells.

    Attributes
    ----------
    cell
        int64 (n): row in the batch.
    genes
        int64 (n, k): tokens of the genes that are perturbed together.
    perturbation
        int64 (n): number of the perturbation: its place in the list, or the token of the gene if all are perturbed.
    """

    cell: np.ndarray
    genes: np.ndarray
    perturbation: np.ndarray


def all_genes(tokens: TokenBatch, layout: Layout, overexpressed: bool) -> Choice:
    """Each gene of each cell by itself; none that is at the top of its cell already, if they are overexpressed."""
    chosen = detected(tokens, layout)
    if not overexpressed:
        chosen &= chosen.sum(axis=1, keepdims=True) > 1  # of a cell with one gene nothing would be left
    elif layout.by_value:
        chosen[:, layout.n_before] = False
    else:
        values = np.where(chosen, tokens.values.numpy(), 0)
        chosen &= values < (values.max(axis=1, keepdims=True) if layout.highest is None else layout.highest)
    cell, place = np.nonzero(chosen)
    genes = tokens.input_ids.numpy()[cell, place]
    return Choice(cell, genes[:, None], genes)


def listed(tokens: TokenBatch, sets: np.ndarray, layout: Layout, overexpressed: bool) -> Choice:
    """Given perturbations (n_sets, k) in every cell that has other genes; to be deleted, it needs all of the set."""
    present = detected(tokens, layout)
    ids = tokens.input_ids.numpy()
    has = np.zeros((tokens.n_cells, int(max(ids.max(initial=0), sets.max())) + 1), dtype=bool)
    row, place = np.nonzero(present)
    has[row, ids[row, place]] = True
    n_there = has[:, sets].sum(axis=2)
    chosen = present.sum(axis=1, keepdims=True) > n_there
    if not overexpressed:
        chosen &= n_there == sets.shape[1]
    cell, number = np.nonzero(chosen)
    return Choice(cell, sets[number], number)


def random_sets(tokens: TokenBatch, k: int, n_per_cell: int, layout: Layout, seed: int) -> Choice:
    """k different genes of each cell, `n_per_cell` times, as (seed, cell) says; none of cells with k genes or fewer."""
    present = detected(tokens, layout)
    n_genes = present.sum(axis=1)
    cell = np.repeat(np.flatnonzero(n_genes > k), n_per_cell)
    number = np.arange(len(cell)) % n_per_cell
    rows, counter = tokens.cell_index.numpy()[cell, None], number[:, None] * k + np.arange(k)
    drawn = below(draw(RANDOM, seed, 0, rows, counter), n_genes[cell, None] - np.arange(k))
    for later in range(
        1, k
    ):  # the j-th draw is among what the earlier ones left: step over these, in ascending order
        earlier = np.sort(drawn[:, :later], axis=1)
        for column in range(later):
            drawn[:, later] += drawn[:, later] >= earlier[:, column]
    places = np.argsort(~present, axis=1, kind="stable")  # of the genes, then of all else
    return Choice(cell, tokens.input_ids.numpy()[cell[:, None], places[cell[:, None], drawn]], number)
