"""Randomness as a pure function: the same key and counter give the same bits, in any order, on any worker.

Philox4x32-10 of Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
vectorised. There is no state to save: a draw for (seed, epoch, cell, token) is made where it is needed,
so batches do not depend on who computes them, and a resumed run draws what the interrupted one would have.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import ArrayLike

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the two halves of the key after each round
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def philox(
    key: int, c0: ArrayLike, c1: ArrayLike = 0, c2: ArrayLike = 0, c3: ArrayLike = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 128 random bits per counter, as four uint32 arrays.

    Parameters
    ----------
    key
        The low 64 bits are used; a seed, for instance.
    c0, c1, c2, c3
        The counter: integers in [0, 2**32), broadcast against each other.
    """
    words = (np.asarray(c).astype(np.uint64) & LOW for c in (c0, c1, c2, c3))
    x0, x1, x2, x3 = np.broadcast_arrays(*words)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(ROUNDS):
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> WORD) ^ x1 ^ np.uint64(k0),
            product1 & LOW,
            (product0 >> WORD) ^ x3 ^ np.uint64(k1),
            product0 & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return x0.astype(np.uint32), x1.astype(np.uint32), x2.astype(np.uint32), x3.astype(np.uint32)


@numba.njit(nogil=True, inline="always")
def _rounds(
    key: np.uint64, x0: np.uint64, x1: np.uint64, x2: np.uint64, x3: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """The rounds for one counter, its words in 64 bits each: so a loop over counters runs in vector registers."""
    k0, k1 = key & LOW, key >> WORD
    for _ in range(ROUNDS):
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> WORD) ^ x1 ^ k0,
            product1 & LOW,
            (product0 >> WORD) ^ x3 ^ k1,
            product0 & LOW,
        )
        k0, k1 = (k0 + np.uint64(WEYL[0])) & LOW, (k1 + np.uint64(WEYL[1])) & LOW
    return x0, x1, x2, x3


@numba.njit(nogil=True, cache=True)
def philox_words(
    key: np.uint64, c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """As `philox` for one counter, within compiled code; all are uint64, and but for the key below 2**32."""
    word0, word1, word2, word3 = _rounds(key, c0, c1, c2, c3)
    return np.uint32(word0), np.uint32(word1), np.uint32(word2), np.uint32(word3)


@numba.njit(nogil=True, cache=True)
def philox_fill(
    key: np.uint64, c0: np.uint64, c1: np.uint64, c2: np.ndarray, c3: np.uint64, out: np.ndarray
) -> None:
    """As `philox` within compiled code, for counters that differ in `c2`: about 2 ns each.

    Parameters
    ----------
    key, c0, c1, c3
        Numbers below 2**32 but for the key, as uint64.
    c2
        Integers (n) in [0, 2**32).
    out
        uint32 (1 to 4, at least n), filled: as many of the four words as it has rows.
    """
    n_words = len(out)
    for i in range(len(c2)):
        word0, word1, word2, word3 = _rounds(key, c0, c1, np.uint64(c2[i]), c3)
        out[0, i] = np.uint32(word0)
        if n_words == 4:
            out[1, i] = np.uint32(word1)
            out[2, i] = np.uint32(word2)
            out[3, i] = np.uint32(word3)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Turn uint32 bits into float64 in [0, 1), in steps of 2**-32."""
    return np.asarray(bits, dtype=np.float64) * 2.0**-32


def below(bits: np.ndarray, n: ArrayLike) -> np.ndarray:
    """Turn uint32 bits into int64 in [0, n), by multiply and shift; `n` (1 to 2**31) broadcasts.

    The bias is below n / 2**32 (Lemire 2019, without the rejection step).
    """
    return ((np.asarray(bits).astype(np.uint64) * np.asarray(n).astype(np.uint64)) >> WORD).astype(np.int64)
