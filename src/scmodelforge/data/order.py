"""Which cells come when: a pseudo-random permutation computed on the fly, and each rank's share of it.

A global shuffle usually stores an order as long as the data. Here the order is a keyed Feistel network over
the positions (cycle walking keeps it inside `range(n)`; Black & Rogaway 2002), so a billion cells shuffle in
O(1) memory, any position can be asked, and the batch of step `s` is a pure function of (seed, epoch, s).
"""

from __future__ import annotations

import numpy as np

from scmodelforge.data.random import philox

FEISTEL_ROUNDS = 8
ORDER_STREAM = 0x0D0E  # fourth word of the counter, so that no other use of the seed draws the same keys


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash uint64 words: key added, then the finalizer of MurmurHash3 (Appleby, public domain)."""
    x = x + key
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def permutation(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Return where the keyed permutation of `range(n)` sends each position.

    Parameters
    ----------
    positions
        Integers in [0, n), any shape; `np.arange(n)` gives the whole permutation.
    n
        Length of the permutation, up to 2**62.
    key
        64 bits; another key gives another permutation.

    Returns
    -------
    int64 array of the shape of `positions`; distinct positions give distinct values.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < n:
        raise IndexError(f"positions must lie in [0, {n})")
    bits = max(2, (n - 1).bit_length())  # the network permutes range(2**bits), less than twice n
    half = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    first, second, _, _ = philox(key, np.arange(FEISTEL_ROUNDS), c3=ORDER_STREAM)
    keys = (first.astype(np.uint64) << np.uint64(32)) | second

    out = positions.astype(np.uint64).ravel()
    walking = np.arange(out.size)
    while walking.size:
        x = out[walking]
        low, high = x & low_mask, x >> half
        for round_ in range(0, FEISTEL_ROUNDS, 2):
            low = low ^ (_mix(high, keys[round_]) & low_mask)
            high = high ^ (_mix(low, keys[round_ + 1]) & high_mask)
        x = (high << half) | low
        out[walking] = x
        walking = walking[x >= np.uint64(n)]  # outside: go on along the cycle until it comes back
    return out.astype(np.int64).reshape(positions.shape)


def n_steps(n_cells: int, batch_size: int, world: int = 1) -> int:
    """Return the number of batches of each rank in an epoch (the last one may be smaller)."""
    return -(-(n_cells // world) // batch_size)


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
    share = len(rows) // world
    local = np.arange(min(step * batch_size, share), min((step + 1) * batch_size, share), dtype=np.int64)
    positions = local * world + rank
    if shuffle:
        high, low, _, _ = philox(seed, epoch, c3=ORDER_STREAM)
        positions = permutation(positions, len(rows), (int(high) << 32) | int(low))
    return np.asarray(rows)[positions]
