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


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
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
            x = (np.uint32(np.uint32(row[j]) << LOWER).view(np.float32) - largest) * factor
            x = max(x, LOWEST)
            whole = np.int32(x - HALF)  # the nearest: x is not above zero, and this cuts off
            x -= np.float32(whole)
            power = UNIT + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * C5))))
            found = np.uint32(np.float32(power).view(np.uint32) + (np.uint32(whole) << MANTISSA)).view(
                np.float32
            )
            weights[j] = found
            total += found
        share = UNIT / total
        for j in range(n_columns):
            rounded = np.float32(weights[j] * share).view(np.uint32)
            row[j] = np.uint16(
                (rounded + BELOW_HALF + ((rounded >> LOWER) & ONE)) >> LOWER
            )  # to the nearest, or even
        log_sums[i] = np.float32(scale) * largest + np.float32(np.log(total))


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def exponential(x: np.ndarray) -> None:
    """Replace numbers by their exponential, but at least 2^-126; `x`: uint16 (n), the bits of bfloat16."""
    for i in range(x.shape[0]):
        power = np.uint32(np.uint32(x[i]) << LOWER).view(np.float32) * LOG2_E
        power = min(max(power, LOWEST), HIGHEST)  # in this order what is no number stays so
        whole = np.floor(power + HALF)
        rest = power - whole
        found = UNIT + rest * (C1 + rest * (C2 + rest * (C3 + rest * (C4 + rest * C5))))
        bits = np.uint32(np.float32(found).view(np.uint32) + (np.uint32(np.int32(whole)) << MANTISSA))
        x[i] = np.uint16((bits + BELOW_HALF + ((bits >> LOWER) & ONE)) >> LOWER)
