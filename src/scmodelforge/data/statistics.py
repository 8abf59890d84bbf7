"""Statistics of genes and cells over any number of cells, in one or a few passes of several threads.

Nothing is held but sums, counts in bins and a few values at a time; results are those of numpy and scanpy on a matrix
in memory, and the same for any number of threads. Besides the tables of the medians (see `medians.py`), a pass takes
some blocks of cells, and 20 bytes a cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from scmodelforge.config import Preprocessing
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.medians import BinCounts, Scale, medians_of
from scmodelforge.data.passes import map_blocks
from scmodelforge.data.preprocess import Normalize, normalized
from scmodelforge.data.statistics_kernels import add_moments
from scmodelforge.data.store import CellStore
from scmodelforge.genes.vocab import GeneVocab

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class CellStatistics:
    """What a pass saw of the cells.

    Attributes
    ----------
    n_cells
        Cells looked at.
    empty_rows
        int64: global rows of the cells without a count on any vocabulary gene, ascending.
    genes_per_cell
        Quantiles of the number of vocabulary genes with a count ("min", "5%", …, "median", …, "max").
    library_size
        Quantiles of the library sizes, over all genes measured.
    """

    n_cells: int
    empty_rows: np.ndarray
    genes_per_cell: dict[str, float]
    library_size: dict[str, float]


@dataclass(frozen=True)
class Moments:
    """Over all cells, also those where the gene has no count.

    Attributes
    ----------
    n_cells
        int64 (n_genes): cells with a count of the gene.
    means, variances
        float64 (n_genes); the variance is the unbiased one (ddof = 1), 0 of a single cell.
    """

    n_cells: np.ndarray
    means: np.ndarray
    variances: np.ndarray


@dataclass(frozen=True)
class GeneStatistics:
    """What some cells tell about each gene of a vocabulary.

    Attributes
    ----------
    medians
        float64 (n_genes): see `gene_medians`.
    logged
        Moments of log(1 + value), where a value is normalized as the medians' are.
    counts
        Moments of the counts as measured.
    cells
        Empty cells, genes per cell, library sizes.
    """

    medians: np.ndarray
    logged: Moments
    counts: Moments
    cells: CellStatistics

    def table(self, vocab: GeneVocab) -> pd.DataFrame:
        """One row a gene of `vocab`: gene_id, n_cells, mean and variance (of log(1 + value)), median."""
        return pd.DataFrame(
            {
                "gene_id": vocab.gene_ids,
                "n_cells": self.logged.n_cells,
                "mean": self.logged.means,
                "variance": self.logged.variances,
                "median": self.medians,
            }
        )


def gene_statistics(
    store: CellStore, rows: np.ndarray, preprocessing: Preprocessing, threads: int = 2
) -> GeneStatistics:
    """Measure medians, means, variances and cells, in one pass and the few that exact medians take.

    Parameters
    ----------
    store, rows
        The cells to measure on (global rows).
    preprocessing
        `normalize` and `target_sum` are read.
    threads
        Blocks of cells worked on at once.
    """
    rows, n_genes = np.sort(np.asarray(rows, dtype=np.int64)), store.vocab.n_genes
    scale = Scale(preprocessing.target_sum, preprocessing.normalize)
    bins = BinCounts(n_genes, threads)

    def work(cells: CellBatch) -> tuple[_Facts, np.ndarray, np.ndarray]:
        bins.count(cells, scale)
        values = normalized(cells, scale.target_sum, scale.normalize)
        logged = _block_sums(n_genes, cells, np.log1p(values, out=values))
        return _facts(cells), logged, _block_sums(n_genes, cells, cells.counts.astype(np.float64))

    facts, logged, counts = [], np.zeros((n_genes, 3)), np.zeros((n_genes, 3))
    for fact, of_logged, of_counts in map_blocks(store, rows, threads, work):
        facts.append(fact)
        logged += of_logged
        counts += of_counts
    return GeneStatistics(
        medians_of(bins.total(), scale, partial(map_blocks, store, rows, threads), threads),
        _moments(logged, len(rows)),
        _moments(counts, len(rows)),
        _cell_statistics(rows, facts),
    )


def gene_medians(
    store: CellStore, rows: np.ndarray, target_sum: float, normalize: Normalize, threads: int = 2
) -> tuple[np.ndarray, CellStatistics]:
    """Return each gene's median over its positive values, as Geneformer scales by (Theodoris et al. 2023).

    Parameters
    ----------
    store, rows
        The cells to measure on (global rows).
    target_sum, normalize
        What a value is: count / library size × `target_sum`, or the count.
    threads
        Blocks of cells worked on at once.

    Returns
    -------
    medians
        float64 (n_genes): exact; NaN for genes without a positive value.
    statistics
        Empty cells, genes per cell, library sizes.
    """
    rows, scale = np.sort(np.asarray(rows, dtype=np.int64)), Scale(target_sum, normalize)
    bins = BinCounts(store.vocab.n_genes, threads)

    def work(cells: CellBatch) -> _Facts:
        bins.count(cells, scale)
        return _facts(cells)

    statistics = _cell_statistics(rows, list(map_blocks(store, rows, threads, work)))
    return medians_of(bins.total(), scale, partial(map_blocks, store, rows, threads), threads), statistics


def gene_moments(
    store: CellStore, rows: np.ndarray, values: Callable[[CellBatch], np.ndarray], threads: int = 2
) -> Moments:
    """Return mean and variance of each gene's values, in one pass.

    Parameters
    ----------
    store, rows
        The cells to measure on (global rows).
    values
        Gives the value of each count of a block: float32 or float64 (nnz); called from several threads.
    threads
        Blocks of cells worked on at once.
    """
    rows = np.sort(np.asarray(rows, dtype=np.int64))
    n_genes = store.vocab.n_genes
    sums = np.zeros((n_genes, 3))
    for block in map_blocks(store, rows, threads, lambda cells: _block_sums(n_genes, cells, values(cells))):
        sums += block
    return _moments(sums, len(rows))


_Facts = tuple[
    np.ndarray, np.ndarray
]  # of the cells of a block: int32 genes with a count, float32 library sizes


def _facts(cells: CellBatch) -> _Facts:
    return cells.n_genes_per_cell.astype(np.int32), cells.library_size


def _cell_statistics(rows: np.ndarray, facts: list[_Facts]) -> CellStatistics:
    lengths = np.concatenate([np.zeros(0, np.int32), *(length for length, _ in facts)])
    libraries = np.concatenate([np.zeros(0, np.float32), *(library for _, library in facts)])
    return CellStatistics(len(rows), rows[lengths == 0], quantiles(lengths), quantiles(libraries))


def quantiles(values: np.ndarray) -> dict[str, float]:
    """The `QUANTILES` of some values; 0 where there are none."""
    values = values.astype(np.float64)  # between two float32 numpy interpolates in float32
    return {name: float(np.quantile(values, q)) if len(values) else 0.0 for name, q in QUANTILES.items()}


def _block_sums(n_genes: int, cells: CellBatch, values: np.ndarray) -> np.ndarray:
    sums = np.zeros((n_genes, 3))
    add_moments(sums, cells.gene_ids, values)
    return sums


def _moments(sums: np.ndarray, n_cells: int) -> Moments:
    """From the sums of `add_moments`, by the formula that scanpy uses."""
    means = sums[:, 1] / max(n_cells, 1)
    variances = (sums[:, 2] / max(n_cells, 1) - means**2) * (n_cells / (n_cells - 1) if n_cells > 1 else 1.0)
    return Moments(sums[:, 0].astype(np.int64), means, variances)
