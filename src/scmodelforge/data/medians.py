"""Exact medians of each gene's positive values in bounded memory, whatever the number of cells.

A first pass counts each gene's values in coarse bins of the logarithm, further passes (one, or two for many cells)
look only into the bin where the middle value lies. It is a radix selection: the bits of a positive float ascend with
its value. Memory: 4 × `BINS` bytes a gene for each of at most `MAX_TABLES` tables, and 8 × `MAX_COLLECTED` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np

from scmodelforge.data import statistics_kernels as kernels
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.preprocess import Normalize
from scmodelforge.data.statistics_kernels import TOP

BINS = 256  # per gene; in the first pass 8 an octave from 2**-16 to 2**16, the outer two open
FIRST_SHIFT = 49
FIRST_EDGE = int(np.float64(2.0**-16).view(np.int64))
MAX_TABLES = 2  # more threads than tables take turns at counting, which is half of a pass
MAX_COLLECTED = 4_000_000  # values held at once by the last pass

Result = TypeVar("Result")


class Passes(Protocol):
    """Call `work` on block after block of the cells, in threads."""

    def __call__(self, work: Callable[[CellBatch], Result], /) -> Iterator[Result]: ...


@dataclass(frozen=True)
class Scale:
    """What makes a value of a count: `normalized` in the form that the kernels take."""

    target_sum: float
    normalize: Normalize

    def arguments(self, cells: CellBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        """What a kernel needs to compute the values of a block."""
        sizes, target_sum = cells.library_size.astype(np.float64), self.target_sum
        if self.normalize == "none":
            sizes, target_sum = np.ones(cells.n_cells), 1.0
        return cells.indptr, cells.gene_ids, cells.counts, sizes, target_sum


class BinCounts:
    """Values of each gene counted in bins, by several threads: whole numbers add up the same in any order."""

    def __init__(self, n_genes: int, threads: int) -> None:
        self._tables: SimpleQueue[np.ndarray] = SimpleQueue()
        self._n_tables = min(threads, MAX_TABLES)
        for _ in range(self._n_tables):
            self._tables.put(np.zeros((BINS, n_genes), dtype=np.uint32))

    def count(self, cells: CellBatch, scale: Scale) -> None:
        """Count values in the bins of the first pass."""
        self.add(kernels.count_clamped, *scale.arguments(cells), FIRST_EDGE, FIRST_SHIFT)

    def add(self, kernel: Callable[..., None], *arguments: Any) -> None:
        """Call a kernel with a table that no other thread uses."""
        table = self._tables.get()
        try:
            kernel(table, *arguments)
        finally:
            self._tables.put(table)

    def total(self) -> np.ndarray:
        """Return uint32 (BINS, n_genes), the sum of the tables; nothing can be counted after that."""
        total = self._tables.get()
        for _ in range(self._n_tables - 1):
            total += self._tables.get()
        return total


def medians_of(first: np.ndarray, scale: Scale, passes: Passes, threads: int) -> np.ndarray:
    """Return the median of each gene's values.

    Parameters
    ----------
    first
        uint32 (BINS, n_genes): `BinCounts.total` after all values were counted once.
    scale
        What they were counted with.
    passes
        Goes over the same cells again, each time it is called.
    threads
        Blocks that `passes` works on at once.

    Returns
    -------
    float64 (n_genes), equal to `np.median`; NaN for genes without a value.
    """
    n_values = first.sum(axis=0, dtype=np.int64)
    middle = _Middle.first(first, n_values)
    while middle.n_collected > MAX_COLLECTED:
        middle = middle.narrowed(scale, passes, threads)
    lower, upper = middle.select(scale, passes)
    return np.where(n_values > 0, (lower + np.where(n_values % 2, lower, upper)) / 2, np.nan)


@dataclass(frozen=True)
class _Middle:
    """For each gene, the interval of float bits that holds its middle value (of two, the lower one).

    All arrays are int64 (n_genes); `held` values lie in [low, high), the middle one is the `rank`-th of them.
    """

    low: np.ndarray
    high: np.ndarray
    rank: np.ndarray
    held: np.ndarray

    @classmethod
    def first(cls, counts: np.ndarray, n_values: np.ndarray) -> _Middle:
        """Start with the bin of the first pass."""
        rank = np.maximum(n_values - 1, 0) // 2
        bins, below, held = _bins_of_ranks(counts, rank)
        edge = FIRST_EDGE + (bins << FIRST_SHIFT)
        low, high = np.where(bins == 0, 0, edge), np.where(bins == BINS - 1, TOP, edge + (1 << FIRST_SHIFT))
        return cls(low, high, rank - below, held)

    @property
    def open(self) -> np.ndarray:
        """Genes whose middle value is not known yet: the interval holds more than one number."""
        return (self.held > 0) & (self.high - self.low > 1)

    @property
    def n_collected(self) -> int:
        """Number of values that `select` will hold."""
        return int(self.held[self.open].sum())

    def narrowed(self, scale: Scale, passes: Passes, threads: int) -> _Middle:
        """Divide the intervals into bins, and return those that hold the middle values."""
        shift = np.zeros_like(self.low)
        while (wide := (self.high - self.low - 1) >> shift >= BINS).any():
            shift += wide
        counts = BinCounts(len(self.low), threads)

        def count(cells: CellBatch) -> None:
            counts.add(kernels.count_within, *scale.arguments(cells), self.low, self.high, shift)

        for _ in passes(count):
            pass
        bins, below, held = _bins_of_ranks(counts.total(), self.rank)
        low = np.where(held > 0, self.low + (bins << shift), self.low)
        return _Middle(low, np.minimum(low + (1 << shift), self.high), self.rank - below, held)

    def select(self, scale: Scale, passes: Passes) -> tuple[np.ndarray, np.ndarray]:
        """Return each gene's middle value, and the value of the rank above it (NaN: none); float64 (n_genes)."""

        def pick(cells: CellBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            n, above = len(cells.counts), np.full_like(self.low, TOP)
            genes, keys = np.empty(n, np.int32), np.empty(n, np.int64)
            n = kernels.pick_within(*scale.arguments(cells), self.low, self.high, genes, keys, above)
            return genes[:n].copy(), keys[:n].copy(), above

        sizes = np.where(self.open, self.held, 0)
        starts = np.cumsum(sizes) - sizes
        ends, kept = starts.copy(), np.empty(int(sizes.sum()), dtype=np.int64)
        above = np.full_like(self.low, TOP)
        for genes, keys, smallest in passes(pick):
            kernels.place(kept, ends, genes, keys)
            np.minimum(above, smallest, out=above)
        kernels.sort_each(kept, starts, ends)

        middle, open_ = self.low.copy(), self.open
        middle[open_] = kept[(starts + self.rank)[open_]]
        following = np.where(self.rank + 1 < self.held, self.low, above)
        inside = open_ & (self.rank + 1 < self.held)
        following[inside] = kept[(starts + self.rank + 1)[inside]]
        return middle.view(np.float64), following.view(np.float64)


def _bins_of_ranks(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bins, below, held = (np.empty_like(ranks) for _ in range(3))
    kernels.bins_of_ranks(counts, ranks, bins, below, held)
    return bins, below, held
