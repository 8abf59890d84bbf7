"""Softmax and exponential of scores in bfloat16, in place; compiled by numba, and without the GIL."""

from __future__ import annotations

import numba
import numpy as np

LOWEST = np.float32(-126)  # exponent of the smallest normal number
HIGHEST = np.float32(128)  # exponent of infinity
LOG2_E = np.float32(1.4426950408889634)
UNIT = np.float32(1)
HALF = np.float32(0.5)
MAGNITUDE = np.int32(0x7FFFFFFF)
SIGN, MANTISSA, LOWER = np.int32(31), np.uint32(23), np.uint32(16)  # bits
BELOW_HALF, ONE = np.uint32(0x7FFF), np.uint32(1)
# Taylor's series of 2^x, which is exact to 3e-6 up to 1/2: a thousandth of what bfloat16 rounds
C1, C2, C3, C4, C5 = (
    np.float32(c) for c in (0.693147181, 0.240226507, 0.0555041087, 0.00961812911, 0.00133335581)
)


FASTER = {"contract", "reassoc", "nsz"}  # what is no number stays so


@numba.njit(nogil=True, fastmath=FASTER)
def _to_float32(bits: np.uint16) -> np.float32:
    return np.uint32(np.uint32(bits) << LOWER).view(np.float32)


@numba.njit(nogil=True, fastmath=FASTER)
def _to_bf16(x: np.float32) -> np.uint16:
    """The bits of the nearest number in bfloat16, or the even one of two."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + BELOW_HALF + ((bits >> LOWER) & ONE)) >> LOWER)


@numba.njit(nogil=True, fastmath=FASTER)
def _power_of_two(x: np.float32) -> np.float32:
    """2^x, at least 2^-126."""
    x = min(max(x, LOWEST), HIGHEST)  # in this order what is no number stays so
    whole = np.floor(x + HALF)
    x -= whole
    power = UNIT + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * C5))))
    return np.uint32(np.float32(power).view(np.uint32) + (np.uint32(np.int32(whole)) << MANTISSA)).view(
        np.float32
    )


@numba.njit(nogil=True, cache=True, fastmath=FASTER)
def softmax(scores: np.ndarray, scale: float, log_sums: np.ndarray) -> None:
    """Replace scores by their softmax, row by row.

    Loops are written such that the compiler makes vectors of them: the largest score is found among integers that are
    ordered as the floats whose bits they have.

    Parameters
    ----------
    scores
        uint16 (rows, columns): the bits of bfloat16.
    scale
        What scores are multiplied with.
    log_sums
        float32 (rows), filled: log Σ exp(scale · score).
    """
    n_columns = scores.shape[1]
    factor = np.float32(scale) * LOG2_E
    weights = np.empty(n_columns, dtype=np.float32)
    for i in range(scores.shape[0]):
        row = scores[i]
        top = np.int32(-MAGNITUDE)
        for j in range(n_columns):
            bits = np.uint32(np.uint32(row[j]) << LOWER).view(np.int32)
            top = max(top, np.int32(bits ^ ((bits >> SIGN) & MAGNITUDE)))
        largest = np.int32(top ^ ((top >> SIGN) & MAGNITUDE)).view(np.float32)
        total = np.float32(0)
        for j in range(n_columns):
            weights[j] = _power_of_two((_to_float32(row[j]) - largest) * factor)
            total += weights[j]
        share = UNIT / total
        for j in range(n_columns):
            row[j] = _to_bf16(np.float32(weights[j] * share))
        log_sums[i] = np.float32(scale) * largest + np.float32(np.log(total))


@numba.njit(nogil=True, cache=True, fastmath=FASTER)
def exponential(x: np.ndarray) -> None:
    """Replace numbers by their exponential, but at least 2^-126; `x`: uint16 (n), the bits of bfloat16."""
    for i in range(x.shape[0]):
        x[i] = _to_bf16(_power_of_two(_to_float32(x[i]) * LOG2_E))
