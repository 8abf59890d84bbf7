"""Compiled kernels of the tokenizers: they release the GIL, so threads run beside each other.

Compiled once and cached on disk by numba; each has a slow twin in the tests.
"""

from __future__ import annotations

import numba
import numpy as np

from scmodelforge.data.random import LOW, WORD, philox_words

DIGIT = 11  # bits that one pass of the radix sort looks at; three passes for 32 bits
MANY_COUNTS = 4096  # whole counts below are sorted by counting them
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


@numba.njit(nogil=True, cache=True)
def bin_counts(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    library_size: np.ndarray,
    target_sum: float,
    log1p: bool,
    steps: np.ndarray,
    key: np.uint64,
    epoch: np.uint32,
    cell_index: np.ndarray,
    out_edges: np.ndarray,
    out_bins: np.ndarray,
) -> None:
    """Bins of counts among the quantiles of their cell, and these quantiles; equal values spread over their bins.

    As `quantile_edges`, `bin_range` and a draw for each (cell, gene), to the last bit (given the same log1p), but once
    for each distinct count of a cell instead of once for each gene.

    Parameters
    ----------
    indptr, genes, counts, cell_index
        Cells as in `CellBatch`.
    library_size
        float64 (n_cells); all 1 with `target_sum` 1 for counts as they are.
    target_sum, log1p
        What is binned: counts / library_size · target_sum, and its log(1 + x).
    steps
        float64 (n_edges): 0 to 1, the quantiles.
    key, epoch
        Of the draws.
    out_edges, out_bins
        float64 (n_cells, n_edges) and (nnz), filled.
    """
    n_edges = len(steps)
    longest = 0
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    size = max(longest, MANY_COUNTS)
    distinct, value, up_to_here = np.empty(size, np.float32), np.empty(size), np.empty(size, np.int64)
    above, up_to = np.empty(size, np.int64), np.empty(size, np.int64)
    tally, place_of = np.zeros(MANY_COUNTS, np.int64), np.empty(MANY_COUNTS, np.int64)
    for cell in range(len(indptr) - 1):
        begin, end = indptr[cell], indptr[cell + 1]
        n = end - begin
        if n == 0:
            out_edges[cell] = 0.0
            continue
        whole, largest = True, np.float32(0)
        for j in range(begin, end):
            largest = max(largest, counts[j])
            if counts[j] != np.int64(counts[j]) or counts[j] >= MANY_COUNTS:
                whole = False

        m = 0  # distinct counts, ascending, with the number of genes up to each
        if whole:
            tally[: np.int64(largest) + 1] = 0
            for j in range(begin, end):
                tally[np.int64(counts[j])] += 1
            seen = 0
            for count in range(np.int64(largest) + 1):
                if tally[count]:
                    seen += tally[count]
                    distinct[m], up_to_here[m], place_of[count] = count, seen, m
                    m += 1
        else:
            ascending = np.sort(counts[begin:end])
            for i in range(n):
                if i == 0 or ascending[i] != ascending[i - 1]:
                    distinct[m] = ascending[i]
                    m += 1
                up_to_here[m - 1] = i + 1
        for d in range(m):
            value[d] = np.float64(distinct[d]) / library_size[cell] * target_sum
            if log1p:
                value[d] = np.log1p(value[d])

        d = 0
        for k in range(n_edges):
            place = (n - 1) * steps[k]
            before = np.int64(np.floor(place))
            while up_to_here[d] <= before:
                d += 1
            low = value[d]
            high = low
            if min(before + 1, n - 1) >= up_to_here[d]:
                high = value[d + 1]
            share, step = place - before, high - low
            out_edges[cell, k] = low + step * share if share < 0.5 else high - step * (1 - share)

        below, not_above = 0, 0
        for d in range(m):
            while below < n_edges and out_edges[cell, below] < value[d]:
                below += 1
            while not_above < n_edges and out_edges[cell, not_above] <= value[d]:
                not_above += 1
            above[d], up_to[d] = below, not_above

        low_word, high_word = (
            np.uint32(cell_index[cell] & LOW),
            np.uint32(np.uint64(cell_index[cell]) >> WORD),
        )
        for j in range(begin, end):
            d = place_of[np.int64(counts[j])] if whole else np.searchsorted(distinct[:m], counts[j])
            drawn = np.uint64(0)
            if up_to[d] - above[d] > 1:
                bits = philox_words(key, low_word, high_word, np.uint32(genes[j]), epoch)[0]
                drawn = (np.uint64(bits) * np.uint64(up_to[d] - above[d])) >> WORD
            out_bins[j] = up_to[d] - np.int64(drawn)
