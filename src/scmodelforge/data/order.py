"""Which cells come when: a pseudo-random permutation computed on the fly, and each rank's share of it.

A global shuffle usually stores an order as long as the data. Here the order is a keyed Feistel network over
the positions (cycle walking keeps it inside `range(n)`; Black & Rogaway 2002), so a billion cells shuffle in
O(1) memory, any position can be asked, and the batch of step `s` is a pure function of (seed, epoch, s).
Compiled, it costs about a tenth of a microsecond a position. `sampling` and `buffered` are made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np

from scmodelforge.data.random import WORD, philox_words

VALIDATION_EPOCH = 2**32 - 1  # the "epoch" of validation batches, so their masks never change
FEISTEL_ROUNDS = 8
ORDER_STREAM = 0x0D0E  # fourth word of the counter, so that no other use of the seed draws the same keys
MURMUR = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
SHIFT = np.uint64(33)
ONE = np.uint64(1)
LOW64 = 2**64 - 1


class Order(Protocol):
    """The order of the training cells.

    Attributes
    ----------
    n_draws
        Cells of an epoch, of all ranks together.
    """

    @property
    def n_draws(self) -> int: ...

    def batch(self, epoch: int, step: int, batch_size: int, rank: int, world: int) -> Draws:
        """Return the cells of a batch, at most `batch_size`, none past the end; a pure function of its arguments."""


@dataclass(frozen=True)
class Draws:
    """Cells that a batch is made of.

    Attributes
    ----------
    rows
        int64 (n): global rows.
    repeats
        int64 (n): tells several draws of one cell in an epoch apart; 0 where there is one only.
    """

    rows: np.ndarray
    repeats: np.ndarray | int = 0


@numba.njit(nogil=True, cache=True)
def draw_key(seed: int | np.uint64, c0: int, c1: int, c2: int) -> np.uint64:
    """Return a key for `permutation`: a function of the seed and three words."""
    high, low, _, _ = philox_words(
        np.uint64(seed), np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(ORDER_STREAM)
    )
    return (np.uint64(high) << WORD) | np.uint64(low)


@numba.njit(nogil=True, cache=True)
def fill_round_keys(key: np.uint64, out: np.ndarray) -> None:
    """Fill uint64 (FEISTEL_ROUNDS) with the keys of the rounds."""
    for i in range(FEISTEL_ROUNDS):
        out[i] = draw_key(key, i, 0, 0)


@numba.njit(nogil=True, cache=True)
def _mix(x: np.uint64, key: np.uint64) -> np.uint64:
    """Hash a uint64: key added, then the finalizer of MurmurHash3 (Appleby, public domain)."""
    x = x + key
    x = (x ^ (x >> SHIFT)) * MURMUR[0]
    x = (x ^ (x >> SHIFT)) * MURMUR[1]
    return x ^ (x >> SHIFT)


@numba.njit(nogil=True, cache=True)
def permuted(position: int, n: int, round_keys: np.ndarray) -> np.int64:
    """As `permutation` for one position, within compiled code; `round_keys` by `fill_round_keys`."""
    bits, end = np.uint64(2), np.uint64(n)
    while (ONE << bits) < end:  # the network permutes range(2**bits), less than twice n
        bits += ONE
    half = bits // np.uint64(2)
    low_mask, high_mask = (ONE << half) - ONE, (ONE << (bits - half)) - ONE
    x = np.uint64(position)
    while True:
        low, high = x & low_mask, x >> half
        for i in range(0, FEISTEL_ROUNDS, 2):
            low = low ^ (_mix(high, round_keys[i]) & low_mask)
            high = high ^ (_mix(low, round_keys[i + 1]) & high_mask)
        x = (high << half) | low
        if x < end:
            return np.int64(x)  # else: go on along the cycle until it comes back


@numba.njit(nogil=True, cache=True)
def _permute(positions: np.ndarray, n: int, key: np.uint64, out: np.ndarray) -> bool:
    """Fill `out`; False where a position lies outside of [0, n)."""
    round_keys = np.empty(FEISTEL_ROUNDS, np.uint64)
    fill_round_keys(key, round_keys)
    for i in range(len(positions)):
        if positions[i] < 0 or positions[i] >= n:
            return False
        out[i] = permuted(positions[i], n, round_keys)
    return True


def permutation(positions: np.ndarray, n: int, key: int | np.uint64) -> np.ndarray:
    """Return where the keyed permutation of `range(n)` sends each position.

    Parameters
    ----------
    positions
        Integers in [0, n), any shape; `np.arange(n)` gives the whole permutation.
    n
        Length of the permutation, up to 2**62.
    key
        The low 64 bits are used; another key gives another permutation.

    Returns
    -------
    int64 array of the shape of `positions`; distinct positions give distinct values.
    """
    positions = np.ascontiguousarray(positions, dtype=np.int64)
    out = np.empty(positions.shape, dtype=np.int64)
    if not _permute(positions.ravel(), n, np.uint64(int(key) & LOW64), out.reshape(-1)):
        raise IndexError(f"positions must lie in [0, {n})")
    return out


def n_steps(n_cells: int, batch_size: int, world: int = 1) -> int:
    """Return the number of batches of each rank in an epoch (the last one may be smaller)."""
    return -(-(n_cells // world) // batch_size)


def local_positions(n: int, step: int, batch_size: int, world: int) -> np.ndarray:
    """Return the places of a batch within the `n // world` cells of a rank: int64, empty past the end."""
    share = n // world
    return np.arange(min(step * batch_size, share), min((step + 1) * batch_size, share), dtype=np.int64)


def batch_rows(
    rows: np.ndarray,
    step: int,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    rank: int = 0,
    world: int = 1,
) -> np.ndarray:
    """Return the cells of one batch; a pure function of its arguments.

    Over an epoch (`step` from 0 to `n_steps(len(rows), batch_size, world) - 1`) the ranks together see every
    cell exactly once, but for up to `world - 1` cells that are left out so that all ranks get equally many.

    Parameters
    ----------
    rows
        int64 (n): the cells of the split.
    step
        Number of the batch within the epoch.
    batch_size
        Cells per batch and rank.
    seed, epoch
        Decide the order together, if `shuffle`; otherwise the order is that of `rows`.
    rank, world
        Number of this process and of all processes.

    Returns
    -------
    int64 (at most `batch_size`): values of `rows`; empty past the end of the epoch.
    """
    positions = local_positions(len(rows), step, batch_size, world) * world + rank
    if shuffle:
        positions = permutation(positions, len(rows), draw_key(seed, epoch, 0, 0))
    return np.asarray(rows)[positions]


class Batches(Protocol):
    """Which cells come in which batch: of equally many cells (`FixedSize`), or of a token budget (`budget`).

    Attributes
    ----------
    order
        Where the cells come from.
    n_steps
        Batches of each rank in an epoch.
    """

    @property
    def order(self) -> Order: ...

    @property
    def n_steps(self) -> int: ...

    def batch(self, epoch: int, step: int, rank: int) -> Draws:
        """Return the cells of a batch, none past the end; a pure function of its arguments."""


@dataclass(frozen=True)
class FixedSize:
    """Batches of equally many cells; the last one may be smaller.

    Attributes
    ----------
    order
        The order of the cells.
    batch_size
        Cells per batch and rank.
    world
        Number of ranks.
    """

    order: Order
    batch_size: int
    world: int = 1

    @property
    def n_steps(self) -> int:
        """See `Batches`."""
        return n_steps(self.order.n_draws, self.batch_size, self.world)

    def batch(self, epoch: int, step: int, rank: int) -> Draws:
        """See `Batches`."""
        return self.order.batch(epoch, step, self.batch_size, rank, self.world)


@dataclass(frozen=True)
class InOrder:
    """Every cell once, always in the order of `rows` (int64 (n)): validation."""

    rows: np.ndarray

    @property
    def n_draws(self) -> int:
        """All cells."""
        return len(self.rows)

    def batch(self, epoch: int, step: int, batch_size: int, rank: int, world: int) -> Draws:
        """See `Order`."""
        return Draws(batch_rows(self.rows, step, batch_size, 0, 0, False, rank, world))


@dataclass(frozen=True)
class GlobalShuffle:
    """Every cell once an epoch, in an order over all of them.

    Attributes
    ----------
    rows
        int64 (n): the cells.
    seed
        Decides the order, with the epoch.
    """

    rows: np.ndarray
    seed: int

    @property
    def n_draws(self) -> int:
        """All cells."""
        return len(self.rows)

    def batch(self, epoch: int, step: int, batch_size: int, rank: int, world: int) -> Draws:
        """See `Order`."""
        return Draws(batch_rows(self.rows, step, batch_size, self.seed, epoch, True, rank, world))
