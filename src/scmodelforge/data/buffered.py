"""A shuffle for slow or remote cells: blocks of neighbours in random order, mixed within a buffer.

A global shuffle asks for single cells from everywhere, which costs one request each where reading is slow. Here the
cells are cut into blocks of neighbours; the blocks are permuted, cut into buffers, and within a buffer the cells are
permuted (as tf.data and WebDataset shuffle, but each place can be computed). A batch needs the blocks of one buffer,
seldom of two, and `CellStore.prefetch` can fetch those of the next. Neighbours stay within a buffer of each other, so
it mixes less than a global shuffle; the larger the buffer, the better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from scmodelforge.data.order import (
    FEISTEL_ROUNDS,
    Draws,
    draw_key,
    fill_round_keys,
    local_positions,
    permuted,
)

BLOCK = 256  # cells; some MB of a typical matrix, so that the request weighs less than what it brings
BLOCKS, CELLS = 1, 2  # third word of the counter: what is permuted


@numba.njit(nogil=True, cache=True)
def buffered_places(
    positions: np.ndarray,
    n: int,
    block: int,
    buffer: int,
    seed: int,
    epoch: int,
    out: np.ndarray,
) -> None:
    """Fill `out` (int64) with the cell, in [0, n), at each position of the buffered order.

    The full blocks of `block` cells are permuted, the rest of the cells come last; of each `buffer` cells of this
    sequence, a multiple of `block`, the order is permuted again.
    """
    of_blocks, of_cells = np.empty(FEISTEL_ROUNDS, np.uint64), np.empty(FEISTEL_ROUNDS, np.uint64)
    fill_round_keys(draw_key(seed, epoch, 0, BLOCKS), of_blocks)
    n_full, latest = n // block, -1
    for i in range(len(positions)):
        number = positions[i] // buffer
        start = number * buffer
        if number != latest:
            fill_round_keys(draw_key(seed, epoch, number, CELLS), of_cells)
            latest = number
        place = start + permuted(positions[i] - start, min(buffer, n - start), of_cells)
        home = place // block
        if home < n_full:
            home = permuted(home, n_full, of_blocks)
        out[i] = home * block + place % block


@dataclass(frozen=True)
class BufferedShuffle:
    """Every cell once an epoch, mixed within buffers.

    Each rank takes a stretch of the sequence, so that ranks read different blocks.

    Attributes
    ----------
    rows
        int64 (n), ascending: the cells.
    seed
        Decides the order, with the epoch.
    buffer
        Cells that are mixed, a multiple of `block`.
    block
        Cells that stay together on the way into a buffer.
    """

    rows: np.ndarray
    seed: int
    buffer: int
    block: int = BLOCK

    @property
    def n_draws(self) -> int:
        """All cells."""
        return len(self.rows)

    def batch(self, epoch: int, step: int, batch_size: int, rank: int, world: int) -> Draws:
        """See `Order`."""
        share = self.n_draws // world
        local = local_positions(self.n_draws, step, batch_size, world)
        return Draws(self._rows(rank * share + local, epoch))

    def buffer_of(self, step: int, batch_size: int, rank: int, world: int) -> int:
        """Return the number of the buffer that a batch ends in."""
        share = self.n_draws // world
        return (rank * share + min((step + 1) * batch_size, share) - 1) // self.buffer

    def buffer_rows(self, epoch: int, number: int, rank: int, world: int) -> np.ndarray:
        """Return what a rank needs of a buffer: int64, ascending; empty where its share has ended."""
        share = self.n_draws // world
        begin = max(number * self.buffer, rank * share)
        end = min((number + 1) * self.buffer, (rank + 1) * share)
        positions = np.arange(begin, max(begin, end), dtype=np.int64)
        return np.sort(self._rows(positions, epoch))

    def _rows(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        places = np.empty_like(positions)
        buffered_places(positions, self.n_draws, self.block, self.buffer, self.seed, epoch, places)
        return self.rows[places]


def buffered_shuffle(rows: np.ndarray, seed: int, cells: int, block: int | None = None) -> BufferedShuffle:
    """Return the order with buffers of about `cells`, of whole blocks; `block`: as the source would have it."""
    block = block or min(BLOCK, cells)
    return BufferedShuffle(rows, seed, max(block, cells // block * block), block)
