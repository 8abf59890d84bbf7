"""`CellBatch`: some cells as they were measured, in the gene space of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REPEAT = 2**40  # above the rows of any store


class MeasuredGenes(NamedTuple):
    """Which genes of the vocabulary the files of some cells measured; of the others nothing is known, not even a zero.

    Attributes
    ----------
    sets
        bool (n_sets, n_genes): distinct sets of measured genes, shared by all batches of a store.
    of_cell
        int64 (n_cells): the set of each cell.
    """

    sets: np.ndarray
    of_cell: np.ndarray


ALL_MEASURED = MeasuredGenes(
    np.zeros((0, 0), dtype=bool), np.zeros(0, dtype=np.int64)
)  # None, for compiled code


@dataclass(frozen=True)
class CellBatch:
    """Cells as CSR over the genes of a vocabulary.

    Within a cell, genes ascend and occur once; counts are positive and finite (zeros are not stored).

    Attributes
    ----------
    indptr
        int64 (n_cells + 1): cell `i` holds the entries `indptr[i]:indptr[i + 1]`.
    gene_ids
        int32 (nnz): rows of the vocabulary's gene table (not token ids).
    counts
        float32 (nnz): as measured, not normalized.
    library_size
        float32 (n_cells): sum over **all** genes measured, also those outside the vocabulary.
    cell_index
        int64 (n_cells): what tells draws apart, so that random decisions about each differ: the global row of the
        cell in the store, and where weighted sampling repeats cells, 2**40 times the number of the repeat above it.
    obs
        int64 (n_cells, n_columns): category of each cell in each column of `GeneVocab.obs_categories`, counted
        from 1; 0 is unknown. None if the vocabulary has no such column.
    measured
        The genes that were measured; None if all files of the store measured the whole vocabulary.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    counts: np.ndarray
    library_size: np.ndarray
    cell_index: np.ndarray
    obs: np.ndarray | None = None
    measured: MeasuredGenes | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    @property
    def rows(self) -> np.ndarray:
        """int64 (n_cells): global row of each cell in the store."""
        return self.cell_index & (REPEAT - 1)

    @property
    def n_genes_per_cell(self) -> np.ndarray:
        """int64 (n_cells): vocabulary genes with a count in each cell."""
        return np.diff(self.indptr)
