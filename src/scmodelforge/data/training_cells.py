"""Which cells a model was trained on, kept as hashes, so that a benchmark can say which of its own are among them.

A cell is known by 64 bits of its content: the sum of a mixed word for each pair of gene and count, over the genes of
the vocabulary, so that its name, file and row do not matter. Cells with fewer than ten genes are left out, since such
ones are alike by chance; and a cell whose file was filtered to other genes in between is not recognised. Cells are
hashed as training reads them, in the threads of the loader, so that nothing is read twice and the first step waits for
nothing. That costs 8 bytes a cell; of more than a million training cells, every n-th is hashed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from scmodelforge.data.batch import CellBatch

if TYPE_CHECKING:
    import torch

MOST_CELLS = 2**20
FEWEST_GENES = 10
UNREAD, TOO_FEW_GENES = 0, 1  # in place of a hash
LEAST_HASH = np.uint64(2)


@numba.njit(inline="always")
def _mix(word: np.uint64) -> np.uint64:
    """SplitMix64 (Steele, Lea & Flood 2014): a bit more or less in the word changes every other bit half the time."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _hash_cells(
    indptr: np.ndarray, genes: np.ndarray, bits: np.ndarray, chosen: np.ndarray, n_genes: int, out: np.ndarray
) -> None:
    for place in range(len(chosen)):
        total, found = np.uint64(0), 0
        for entry in range(indptr[chosen[place]], indptr[chosen[place] + 1]):
            if genes[entry] < n_genes:
                total += _mix((np.uint64(genes[entry]) << np.uint64(32)) | np.uint64(bits[entry]))
                found += 1
        out[place] = (
            TOO_FEW_GENES  # by itself: mixed with a uint64, a plain integer would make a float64 of it
        )
        if found >= FEWEST_GENES:
            out[place] = max(_mix(total), LEAST_HASH)


def hash_cells(cells: CellBatch, n_genes: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """Hash cells by their counts on the first `n_genes` genes of the vocabulary.

    Parameters
    ----------
    chosen
        int64 (n): which cells of the batch; None: all.

    Returns
    -------
    numpy.ndarray
        uint64 (n); `TOO_FEW_GENES` for cells with fewer than ten such genes, never `UNREAD`.
    """
    chosen = np.arange(cells.n_cells) if chosen is None else chosen
    out = np.empty(len(chosen), np.uint64)
    _hash_cells(cells.indptr, cells.gene_ids, cells.counts.view(np.uint32), chosen, n_genes, out)
    return out


@dataclass(frozen=True)
class TrainingCells:
    """The cells of one training.

    Attributes
    ----------
    n_cells
        How many cells there were to train on.
    n_genes
        Genes of the vocabulary then; later training may have appended some.
    n_known
        How many of the cells are known by hash: fewer where not all were read yet, or there were very many.
    hashes
        uint64, ascending, distinct.
    """

    n_cells: int
    n_genes: int
    n_known: int
    hashes: np.ndarray

    def contain(self, cells: CellBatch) -> np.ndarray:
        """bool (n_cells): which cells of a batch, in the same vocabulary, are among these."""
        found = hash_cells(cells, self.n_genes)
        return np.isin(found, self.hashes)

    def to_plain(self) -> dict[str, Any]:
        """As plain numbers and one tensor, for a checkpoint."""
        return _plain(self.n_cells, self.n_genes, self.n_known, self.hashes)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> TrainingCells:
        """From what `to_plain` of this class or of `CellRecorder` gave."""
        hashes = _array(plain["hashes"])
        return cls(
            plain["n_cells"], plain["n_genes"], plain["n_known"], np.unique(hashes[hashes > TOO_FEW_GENES])
        )


def _plain(n_cells: int, n_genes: int, n_known: int, hashes: np.ndarray) -> dict[str, Any]:
    import torch

    tensor = torch.from_numpy(hashes.view(np.int64).copy())  # torch calculates with signed numbers
    return {"n_cells": n_cells, "n_genes": n_genes, "n_known": n_known, "hashes": tensor}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint64)


class CellRecorder:
    """Hashes the training cells that a store reads; see `CellStore.recorder`.

    Parameters
    ----------
    rows
        int64, ascending: the training cells in the store.
    n_genes
        Genes of the vocabulary.
    earlier
        What `to_plain` gave in an interrupted run on the same cells; None: nothing was recorded.
    """

    def __init__(self, rows: np.ndarray, n_genes: int, earlier: dict[str, Any] | None = None) -> None:
        self.n_cells, self.n_genes = len(rows), n_genes
        self.rows = rows[:: -(-len(rows) // MOST_CELLS)]
        self.hashes = np.full(len(self.rows), UNREAD, np.uint64)
        if earlier is not None:
            self.hashes[:] = _array(earlier["hashes"])

    def record(self, cells: CellBatch) -> None:
        """Hash those cells of a batch that train and are not known yet; callable from several threads."""
        places = np.minimum(np.searchsorted(self.rows, cells.rows), len(self.rows) - 1)
        new = np.flatnonzero((self.rows[places] == cells.rows) & (self.hashes[places] == UNREAD))
        if len(new):
            self.hashes[places[new]] = hash_cells(cells, self.n_genes, new)

    def to_plain(self) -> dict[str, Any]:
        """What is known so far, with the hashes in the order of the rows, for a checkpoint."""
        return _plain(self.n_cells, self.n_genes, int((self.hashes != UNREAD).sum()), self.hashes)
