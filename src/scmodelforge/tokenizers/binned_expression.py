"""Genes with the bin of their value among the values of their cell (scGPT; Cui et al. 2024).

A cell's non-zero values v have the edges e₀ … e₍B₋₂₎, their quantiles at B - 1 equal steps from 0 to 1 (B = n_bins).
With R the number of edges below v and L the number not above it, the bin is one of R + 1 … L, each as likely; L where
R = L. So a value that few edges share is certain, and equal values spread over all bins they span. Zeros have bin 0.
Bins tell ranks within a cell: counts and log-normalized values have the same, up to rounding.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.explain import explain_tokens, of_first_cell
from scmodelforge.tokenizers.gene_sequence import TIES, expression, gene_tokens
from scmodelforge.tokenizers.kernels import bin_counts


class BinnedExpressionTokenizer:
    """Turns a `CellBatch` into genes with bins.

    Edges are those of all the cell's non-zero genes in the vocabulary, before any is left out. Genes without a count,
    if they are included, are drawn like all others where a cell is too long, as in scGPT.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        self.config = config.tokenizer
        self.preprocessing = config.data.preprocessing
        self.vocab = vocab

    def __call__(self, cells: CellBatch, seed: int = 0, epoch: int = VALIDATION_EPOCH) -> TokenBatch:
        """Tokenize cells; see `TokenBatch` for shapes. Cells without a gene keep their special tokens.

        With `bin_ties: numpy` the bins depend on numpy's global generator, and so on all that drew from it before.
        """
        if self.config.bin_ties == "numpy":
            edges, bins = self._bins_of_numpy(cells)
        else:
            edges, bins = self._bins(cells, seed, epoch)
        batch = gene_tokens(cells, cells.counts, bins, self.config, self.vocab, seed, epoch, zeros_last=False)
        return replace(batch, bin_edges=torch.from_numpy(edges.astype(np.float32)))

    def _bins(self, cells: CellBatch, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges float64 (n_cells, n_bins - 1) and bins float64 (nnz)."""
        edges = np.empty((cells.n_cells, self.config.n_bins - 1))
        bins = np.empty(len(cells.counts))
        scaled = self.preprocessing.normalize == "library_size"
        bin_counts(
            cells.indptr,
            cells.gene_ids,
            cells.counts,
            cells.library_size.astype(np.float64) if scaled else np.ones(cells.n_cells),
            self.preprocessing.target_sum if scaled else 1.0,
            self.preprocessing.log1p,
            np.linspace(0, 1, self.config.n_bins - 1),
            np.uint64(seed ^ TIES),
            np.uint64(epoch),
            cells.cell_index,
            edges,
            bins,
        )
        return edges, bins

    def _bins_of_numpy(self, cells: CellBatch) -> tuple[np.ndarray, np.ndarray]:
        """As `_bins`, with draws from numpy's global generator: one rand(n) for each cell is one for all."""
        values = expression(cells, self.preprocessing)
        edges = quantile_edges(values, cells.n_genes_per_cell, self.config.n_bins - 1)
        row = np.repeat(np.arange(cells.n_cells), cells.n_genes_per_cell)
        above, up_to = bin_range(values, edges, row)
        return edges, np.ceil(np.random.rand(len(values)) * (above - up_to) + up_to)  # noqa: NPY002

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token.

        Returns
        -------
        DataFrame as of `explain_tokens`, with value (what was binned) and bin.
        """
        batch = self(cells)
        values = of_first_cell(cells, expression(cells, self.preprocessing), self.vocab)
        table = explain_tokens(batch, cells, self.config, self.vocab, value=values)
        bins = np.full(len(table), np.nan)
        bins[len(table) - int(batch.lengths[0]) :] = batch.values[0, : int(batch.lengths[0])]
        return table.assign(bin=np.where(table["counts"].isna(), np.nan, bins))


def quantile_edges(values: np.ndarray, n_values: np.ndarray, n_edges: int) -> np.ndarray:
    """Quantiles of each cell's values, as `numpy.quantile` computes them (linear), to the last bit.

    Parameters
    ----------
    values
        float64 (nnz): cell after cell.
    n_values
        int64 (n_cells): how many each cell has.
    n_edges
        Quantiles from 0 to 1 in equal steps.

    Returns
    -------
    float64 (n_cells, n_edges), ascending; 0 for a cell without values.
    """
    n_cells = len(n_values)
    ascending = np.sort(_in_cell(np.repeat(np.arange(n_cells), n_values), values)).imag
    ascending = np.append(ascending, 0.0)  # what an empty last cell points at
    start = (np.cumsum(n_values) - n_values)[:, None]
    last = np.maximum(n_values - 1, 0)[:, None]
    place = last * np.linspace(0, 1, n_edges)
    before = np.floor(place).astype(np.int64)
    low, high = ascending[start + before], ascending[start + np.minimum(before + 1, last)]
    share, step = place - before, high - low
    edges = np.where(share < 0.5, low + step * share, high - step * (1 - share))
    return np.where(n_values[:, None] > 0, edges, 0.0)


def bin_range(values: np.ndarray, edges: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 (nnz) twice: edges of the value's cell that are below it, and that are not above it."""
    n_cells, n_edges = edges.shape
    searched = _in_cell(np.repeat(np.arange(n_cells), n_edges), edges.ravel())
    wanted = _in_cell(row, values)
    before = row * n_edges
    return (
        np.searchsorted(searched, wanted, side="left") - before,
        np.searchsorted(searched, wanted, side="right") - before,
    )


def _in_cell(row: np.ndarray, values: np.ndarray) -> np.ndarray:
    """complex128: numbers that sort by cell, then by value."""
    keys = np.empty(len(values), dtype=np.complex128)
    keys.real, keys.imag = row, values
    return keys


def values_of_bins(bins: torch.Tensor, bin_edges: torch.Tensor) -> torch.Tensor:
    """The values that bins stand for: the middle between the edges of the bin.

    Bin b holds e₍b₋₁₎ ≤ v < e₍b₎, so the value is known exactly where these two are equal, and in the last bin, which
    holds the cell's maximum. Between others it is off by at most half their distance.

    Parameters
    ----------
    bins
        (n_cells, length): bins, or predictions of them, which are rounded and clamped; 0 and less are value 0.
    bin_edges
        float32 (n_cells, n_bins - 1): `TokenBatch.bin_edges`.

    Returns
    -------
    float32 (n_cells, length): counts or normalized values, whichever were binned.
    """
    last = bin_edges.shape[1] - 1
    bins = bins.round().long()
    low = bin_edges.gather(1, (bins - 1).clamp(0, last))
    high = bin_edges.gather(1, bins.clamp(0, last))
    return torch.where(bins > 0, low + (high - low) / 2, 0.0)
