"""Blocks of rows kept in memory, for sources that cannot be read at random: the Census, zarr, remote files.

Rows are read in whole blocks, many blocks in one read, and the newest blocks stay. What comes next can be read
ahead in a thread (`prefetch`). What lies scattered over far more blocks than it fills is read by itself and not
kept; a pass in ascending order is read on beyond what was asked. The blocks in memory never hold more than
`capacity_cells` cells.

The blocks that were read, or asked for ahead, longest ago go first, not those used longest ago: of two shuffle
buffers in memory the one that is used up was touched last, and the next one not at all yet.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import numpy as np

from scmodelforge.data.matrix import Rows
from scmodelforge.errors import UserError

BLOCK_CELLS = 64  # small, so that a run of rows of the order that begins anywhere touches little beside it
READ_CELLS = 8192  # of one call of `read`
SCATTERED = 1 / 16  # of the cells of the blocks that hold them: fewer rows than that are read by themselves


class BlockCache:
    """Rows of a source by way of blocks; callable from several threads.

    Parameters
    ----------
    read
        Reads rows, int64, ascending and distinct, at most `read_cells` of them: whole blocks where they are kept.
        A reader of ranges becomes one by `by_runs`. Called from several threads.
    n_rows
        Rows of the source.
    block_cells
        Rows of a block.
    capacity_cells
        Most rows kept in memory, counted in whole blocks; at least one read fits whatever it is.
    read_cells
        Most rows of one call of `read`.

    Attributes
    ----------
    n_held, most_held
        Rows in memory or being read into it, now and at most so far.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Rows],
        n_rows: int,
        block_cells: int = BLOCK_CELLS,
        capacity_cells: int = 2 * READ_CELLS,
        read_cells: int = READ_CELLS,
    ) -> None:
        self.n_rows, self.block_cells = n_rows, block_cells
        self.capacity = max(1, capacity_cells // block_cells)  # in blocks, as all numbers below
        self.per_read = max(1, min(read_cells // block_cells, self.capacity))
        self._read = read
        self._changed = threading.Condition()  # guards everything below
        self._held: OrderedDict[int, Rows] = OrderedDict()  # oldest first
        self._loading: dict[int, Future[None]] = {}
        self._in_use: Counter[int] = Counter()
        self._ahead: deque[np.ndarray] = deque()
        self._thread: threading.Thread | None = None
        self.most_held = 0

    @property
    def n_held(self) -> int:
        return (len(self._held) + len(self._loading)) * self.block_cells

    def take(self, rows: np.ndarray) -> Rows:
        """Return the given rows in the given order, repeats allowed; what `read` raises is raised here."""
        rows = np.asarray(rows, dtype=np.int64)
        ascending = bool((np.diff(rows) >= 0).all())
        wanted, inverse = np.unique(rows, return_inverse=True)
        if not len(wanted):
            return self._read(wanted)
        lone = self._scattered(wanted)
        parts = [self._read(some) for some in _pieces(wanted[lone], self.per_read * self.block_cells)]
        kept = wanted[~lone]
        block_of = kept // self.block_cells
        for blocks in _pieces(np.unique(block_of), self.per_read):
            first, last = np.searchsorted(block_of, [blocks[0], blocks[-1] + 1])
            a_pass = ascending and last - first >= SCATTERED * self.block_cells * len(blocks)
            with self._using(blocks, read_on=a_pass) as held:
                starts = np.searchsorted(block_of, blocks)
                ends = np.r_[starts[1:], last]
                for block, part, start, end in zip(blocks.tolist(), held, starts, ends, strict=True):
                    parts.append(part.take(kept[start:end] - block * self.block_cells))
        place = np.argsort(
            np.r_[np.flatnonzero(lone), np.flatnonzero(~lone)]
        )  # of each wanted row in the parts
        return _concatenate(parts).take(place[inverse])

    def make_room_for(self, rows: np.ndarray) -> None:
        """Let twice the blocks of these rows stay from now on, and one read beside them, if that is more than now."""
        n_blocks = len(np.unique(np.asarray(rows, dtype=np.int64) // self.block_cells))
        with self._changed:
            self.capacity = max(self.capacity, 2 * n_blocks + self.per_read)

    def prefetch(self, rows: np.ndarray) -> None:
        """Start to read the blocks of these rows in a thread, as many as fit; errors are raised when they are taken."""
        blocks = np.unique(np.asarray(rows, dtype=np.int64) // self.block_cells)[: self.capacity]
        with self._changed:
            for block in blocks.tolist():
                if block in self._held:
                    self._held.move_to_end(block)
            self._ahead.extend(_pieces(blocks[self._absent(blocks)], self.per_read))
            if self._ahead and not (self._thread and self._thread.is_alive()):
                self._thread = threading.Thread(target=self._read_ahead, name="read ahead")
                self._thread.start()

    def close(self) -> None:
        """Read nothing more ahead, and wait for the read that is under way."""
        with self._changed:
            self._ahead.clear()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                if not self._ahead or not threading.main_thread().is_alive():
                    self._thread = None
                    return
                blocks = self._ahead.popleft()
            # An error is left to whoever takes these rows: they are read again then.
            with suppress(UserError, OSError), self._using(blocks):
                pass

    def _scattered(self, wanted: np.ndarray) -> np.ndarray:
        """bool: rows that are not worth the reading of their blocks."""
        none = np.zeros(len(wanted), dtype=bool)
        if self.n_rows <= self.capacity * self.block_cells:
            return none
        block_of = wanted // self.block_cells
        blocks = np.unique(block_of)
        with self._changed:
            coming = np.concatenate([blocks[:0], *self._ahead])
            absent = blocks[self._absent(blocks) & ~np.isin(blocks, coming)]
        lone = np.isin(block_of, absent)
        return lone if lone.sum() < SCATTERED * self.block_cells * len(absent) else none

    def _absent(self, blocks: np.ndarray) -> np.ndarray:
        """bool: blocks neither in memory nor being read."""
        known = self._held.keys() | self._loading.keys()
        return np.array([block not in known for block in blocks.tolist()], dtype=bool)

    @contextmanager
    def _using(self, blocks: np.ndarray, read_on: bool = False) -> Iterator[list[Rows]]:
        """The blocks, which stay in memory as long as the context does.

        A thread that waits for another's read or for room uses no block meanwhile, so that none waits for ever.
        """
        names = blocks.tolist()
        while True:
            waiting: Future[None] | None = None
            with self._changed:
                absent = blocks[self._absent(blocks)]
                waiting = next((self._loading[name] for name in names if name in self._loading), None)
                if len(absent):
                    if read_on:
                        absent = self._with_following(absent, self.per_read - len(blocks))
                    if not self._make_room(len(absent), set(names)):
                        self._changed.wait()
                        continue
                    reading: Future[None] = Future()
                    self._loading.update(dict.fromkeys(absent.tolist(), reading))
                    self.most_held = max(self.most_held, self.n_held)
                elif waiting is None:
                    held = [self._held[name] for name in names]
                    self._in_use.update(names)
                    break
            if len(absent):
                self._load(absent, reading)
            elif waiting is not None:
                waiting.result()
        try:
            yield held
        finally:
            with self._changed:
                self._in_use.subtract(names)
                self._changed.notify_all()

    def _load(self, blocks: np.ndarray, reading: Future[None]) -> None:
        """Read blocks that were announced in `_loading`; an error reaches all who wait for them."""
        rows = (blocks[:, None] * self.block_cells + np.arange(self.block_cells)).ravel()
        try:
            found = self._read(rows[rows < self.n_rows])
        except BaseException as error:
            with self._changed:
                for block in blocks.tolist():
                    del self._loading[block]
                self._changed.notify_all()
            reading.set_exception(error)
            raise
        with self._changed:
            for place, block in enumerate(blocks.tolist()):
                first = place * self.block_cells
                self._held[block] = _copied(
                    found, first, min(first + self.block_cells, len(found.indptr) - 1)
                )
                del self._loading[block]
            self._changed.notify_all()
        reading.set_result(None)

    def _with_following(self, absent: np.ndarray, n: int) -> np.ndarray:
        """Add up to `n` blocks that come next, until one that is here already."""
        n_blocks = -(-self.n_rows // self.block_cells)
        after = int(absent[-1]) + 1
        following = np.arange(after, min(after + n, n_blocks))
        here = np.flatnonzero(~self._absent(following))
        return np.r_[absent, following[: here[0]] if len(here) else following]

    def _make_room(self, n: int, needed: set[int]) -> bool:
        """Drop the oldest blocks that nobody uses until `n` more fit; whether they do."""
        too_many = len(self._held) + len(self._loading) + n - self.capacity
        unused = (b for b in self._held if not self._in_use[b] and b not in needed) if too_many > 0 else ()
        dropped = [block for block, _ in zip(unused, range(too_many), strict=False)]
        if len(dropped) < too_many:
            return False
        for block in dropped:
            del self._held[block]
            del self._in_use[block]
        return True


def by_runs(read: Callable[[int, int], Rows]) -> Callable[[np.ndarray], Rows]:
    """Make a reader of ascending rows from one of ranges (first, beyond the last): neighbours in one read."""

    def read_rows(rows: np.ndarray) -> Rows:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
        return _concatenate([read(int(run[0]), int(run[-1]) + 1) for run in runs] or [read(0, 0)])

    return read_rows


def _pieces(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _copied(rows: Rows, first: int, last: int) -> Rows:
    """Rows from `first` to before `last` in memory of their own, so that the read they came with can go."""
    span = slice(rows.indptr[first], rows.indptr[last])
    return Rows(
        rows.indptr[first : last + 1] - rows.indptr[first], rows.indices[span].copy(), rows.data[span].copy()
    )


def _concatenate(parts: list[Rows]) -> Rows:
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indices = np.concatenate([part.indices for part in parts])
    return Rows(np.r_[0, np.cumsum(lengths)], indices, np.concatenate([part.data for part in parts]))
