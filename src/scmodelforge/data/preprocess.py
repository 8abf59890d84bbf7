"""What the value of a gene in a cell is: its count, or its share of the cell's library."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from scmodelforge.data.batch import CellBatch

Normalize: TypeAlias = Literal["library_size", "none"]


def normalized(cells: CellBatch, target_sum: float, normalize: Normalize) -> np.ndarray:
    """Return counts / library size × `target_sum`, or the counts as they are: float64 (nnz)."""
    values = cells.counts.astype(np.float64)
    if normalize == "library_size":
        values /= np.repeat(cells.library_size.astype(np.float64), cells.n_genes_per_cell)
        values *= target_sum
    return values
