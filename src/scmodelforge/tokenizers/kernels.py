"""Compiled kernels of the tokenizers: they release the GIL, so threads run beside each other.

Compiled once and cached on disk by numba; each has a slow twin in the tests.
"""

from __future__ import annotations

import numba
import numpy as np

DIGIT = 11  # bits that one pass of the radix sort looks at; three passes for 32 bits
SMALL_COUNTS = 256  # logarithms of counts below are computed once a cell


@numba.njit(nogil=True, cache=True)
def rank_genes(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    reciprocal: np.ndarray,
    target_sum: float,
    inverse_median: np.ndarray,
    log1p: bool,
    first_token: int,
    out_tokens: np.ndarray,
    out_values: np.ndarray,
    out_lengths: np.ndarray,
) -> None:
    """Genes of each cell by descending counts · reciprocal · target_sum · inverse_median, ties in their order.

    Radix sort of the values in float32, which keeps their order, then of those that are equal there in float64.

    Parameters
    ----------
    indptr, genes, counts
        Cells as in `CellBatch`.
    reciprocal
        float64 (n_cells): 1 / library size, or 1.
    target_sum
        Counts per cell after normalization, or 1.
    inverse_median
        float64 (n_genes): genes where it is not finite are left out.
    log1p
        Carry log(1 + normalized counts) instead of normalized counts.
    first_token
        Token of gene 0.
    out_tokens, out_values
        int64 and float32 (n_cells, room): filled from the left up to `out_lengths` int64 (n_cells).
    """
    room = out_tokens.shape[1]
    longest = 0
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    entry, order = np.empty(longest, np.int64), np.empty(longest, np.int32)
    sorted_order = np.empty(longest, np.int32)
    scaled, rounded = np.empty(longest, np.float64), np.empty(longest, np.float32)
    bits = rounded.view(np.uint32)
    keys, sorted_keys = np.empty(longest, np.uint32), np.empty(longest, np.uint32)
    buckets = np.empty(1 << DIGIT, np.int64)
    logarithms = np.empty(SMALL_COUNTS, np.float32)
    for cell in range(len(indptr) - 1):
        n = 0
        for j in range(indptr[cell], indptr[cell + 1]):
            weight = inverse_median[genes[j]]
            if np.isfinite(weight):
                entry[n] = j
                scaled[n] = np.float64(counts[j]) * reciprocal[cell] * target_sum * weight
                n += 1
        for i in range(n):
            rounded[i] = scaled[i]
            keys[i] = ~bits[i]  # positive floats order as their bits; the largest come first
            order[i] = i
        for shift in (0, DIGIT, 2 * DIGIT):
            buckets[:] = 0
            for i in range(n):
                buckets[(keys[i] >> shift) & ((1 << DIGIT) - 1)] += 1
            place = 0
            for b in range(1 << DIGIT):
                place, buckets[b] = place + buckets[b], place
            for i in range(n):
                b = (keys[i] >> shift) & ((1 << DIGIT) - 1)
                sorted_keys[buckets[b]] = keys[i]
                sorted_order[buckets[b]] = order[i]
                buckets[b] += 1
            keys, sorted_keys = sorted_keys, keys
            order, sorted_order = sorted_order, order
        for i in range(1, n):  # insertion sort within runs of equal float32
            moving, j = order[i], i
            while j > 0 and keys[j - 1] == keys[i] and scaled[order[j - 1]] < scaled[moving]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = moving
        logarithms[:] = -1
        kept = min(n, room)
        for i in range(kept):
            j = entry[order[i]]
            normalized = np.float64(counts[j]) * reciprocal[cell] * target_sum
            small = np.int64(counts[j])
            if not log1p:
                value = np.float32(normalized)
            elif small >= SMALL_COUNTS or small != counts[j]:
                value = np.float32(np.log1p(normalized))
            else:
                if logarithms[small] < 0:
                    logarithms[small] = np.log1p(normalized)
                value = logarithms[small]
            out_tokens[cell, i] = genes[j] + first_token
            out_values[cell, i] = value
        out_lengths[cell] = kept
