"""A pass over many cells: blocks of them read by threads, results in the order of the cells.

Rows are read in ascending order, so that each chunk of a file is read once. What a pass returns does not depend on
the number of threads if its results are put together in the order they come, or do not depend on order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from scmodelforge.data.batch import CellBatch
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.store import CellStore

BLOCK_CELLS = 256

Result = TypeVar("Result")


def map_blocks(
    store: CellStore, rows: np.ndarray, threads: int, work: Callable[[CellBatch], Result]
) -> Iterator[Result]:
    """Call `work` on blocks of cells in several threads, and return its results block by block.

    Parameters
    ----------
    store, rows
        The cells (global rows, ascending, repeats allowed).
    threads
        Blocks worked on at once; twice as many results wait at most.
    work
        Gets a block of `BLOCK_CELLS` cells, the last one fewer.

    Raises
    ------
    DataError
        If a cell cannot be read or holds what is no count.
    """

    def make(epoch: int, step: int) -> Result:
        return work(store.read(rows[step * BLOCK_CELLS : (step + 1) * BLOCK_CELLS]))

    return iter(BatchLoader(make, -(-len(rows) // BLOCK_CELLS), threads))
