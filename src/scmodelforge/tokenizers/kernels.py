"""Compiled kernels of the tokenizers: they release the GIL, so threads run beside each other.

Compiled once and cached on disk by numba; each has a slow twin in the tests. Sorting is by radix: 32-bit keys with the
place of their entry in the lower half of a 64-bit word, two or three passes of 11 bits.
"""

from __future__ import annotations

import numba
import numpy as np

from scmodelforge.data.random import LOW, WORD, philox_fill

DIGIT = 11  # bits that one pass of the radix sort looks at
BUCKETS = 1 << DIGIT
DIGIT_MASK = np.uint64(BUCKETS - 1)
KEY_BITS = 32
COARSE_BITS = 2 * DIGIT  # of the keys by which values are sorted before equal ones are told apart
SHORT_RUN = 32  # longer runs of equal keys are not sorted by insertion
MANY_COUNTS = 4096  # whole counts below are sorted by counting them
SMALL_COUNTS = 256  # logarithms of counts below are computed once a cell

COLUMN, RANDOM, VALUE = range(3)  # `tokenizer.gene_order`


@numba.njit(nogil=True, cache=True)
def _radix_sort(
    words: np.ndarray, spare: np.ndarray, n: int, bits: int, buckets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sort uint64 words by bits 32 to 32 + `bits`; stable. Returns the sorted array and the other one."""
    for shift in range(KEY_BITS, KEY_BITS + bits, DIGIT):
        place = np.uint64(shift)
        buckets[:] = 0
        for i in range(n):
            buckets[(words[i] >> place) & DIGIT_MASK] += 1
        total = 0
        for b in range(BUCKETS):
            total, buckets[b] = total + buckets[b], total
        for i in range(n):
            b = (words[i] >> place) & DIGIT_MASK
            spare[buckets[b]] = words[i]
            buckets[b] += 1
        words, spare = spare, words
    return words, spare


@numba.njit(nogil=True, cache=True)
def _descending(
    values: np.ndarray,
    n: int,
    rounded: np.ndarray,
    words: np.ndarray,
    spare: np.ndarray,
    buckets: np.ndarray,
    order: np.ndarray,
) -> None:
    """Fill `order` with the places of float64 `values` (positive), the largest first, equal ones as they come.

    The bits of positive floats ascend with their value. The 22 that tell most are sorted by radix, which leaves runs
    of nearly equal values; they are sorted by themselves, in float64.
    """
    bits = rounded.view(np.uint32)
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(n):
        rounded[i] = values[i]
        least, most = min(least, bits[i]), max(most, bits[i])
    drop = np.uint32(0)
    while n and (most - least) >> drop >= np.uint32(1 << COARSE_BITS):
        drop += np.uint32(1)
    for i in range(n):
        words[i] = (np.uint64((most - bits[i]) >> drop) << WORD) | np.uint64(i)
    words, spare = _radix_sort(words, spare, n, COARSE_BITS, buckets)
    for i in range(n):
        order[i] = np.int64(words[i] & LOW)
    begin = 0
    while begin < n:
        end, sorted_already = begin + 1, True
        while end < n and words[end] >> WORD == words[begin] >> WORD:
            sorted_already = sorted_already and values[order[end]] <= values[order[end - 1]]
            end += 1
        if not sorted_already and end - begin <= SHORT_RUN:
            for i in range(begin + 1, end):
                moving, j = order[i], i
                while j > begin and values[order[j - 1]] < values[moving]:
                    order[j] = order[j - 1]
                    j -= 1
                order[j] = moving
        elif not sorted_already:
            run = order[begin:end].copy()
            order[begin:end] = run[np.argsort(-values[run], kind="mergesort")]
        begin = end


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
    pad_id: int,
    start: int,
    room: int,
    out_tokens: np.ndarray,
    out_values: np.ndarray,
    out_lengths: np.ndarray,
) -> None:
    """Genes of each cell by descending counts · reciprocal · target_sum · inverse_median, ties in their order.

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
    first_token, pad_id
        Token of gene 0, and of padding.
    start, room
        Column of the first gene, and how many genes fit.
    out_tokens, out_values
        int64 and float32 (n_cells, length), filled, with pads beside the genes.
    out_lengths
        int64 (n_cells): number of genes, filled.
    """
    longest = 0
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    entry, order = np.empty(longest, np.int64), np.empty(longest, np.int64)
    scaled, rounded = np.empty(longest, np.float64), np.empty(longest, np.float32)
    words, spare, buckets = (
        np.empty(longest, np.uint64),
        np.empty(longest, np.uint64),
        np.empty(BUCKETS, np.int64),
    )
    logarithms = np.empty(SMALL_COUNTS, np.float32)
    for cell in range(len(indptr) - 1):
        n = 0
        for j in range(indptr[cell], indptr[cell + 1]):
            weight = inverse_median[genes[j]]
            if np.isfinite(weight):
                entry[n] = j
                scaled[n] = np.float64(counts[j]) * reciprocal[cell] * target_sum * weight
                n += 1
        _descending(scaled, n, rounded, words, spare, buckets, order)
        logarithms[:] = -1
        kept = min(n, room)
        out_tokens[cell, :start] = pad_id
        out_values[cell, :start] = 0
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
            out_tokens[cell, start + i] = genes[j] + first_token
            out_values[cell, start + i] = value
        out_tokens[cell, start + kept :] = pad_id
        out_values[cell, start + kept :] = 0
        out_lengths[cell] = kept


@numba.njit(nogil=True, cache=True)
def choose_genes(
    indptr: np.ndarray,
    genes: np.ndarray,
    expressed: np.ndarray,
    carried: np.ndarray,
    cell_index: np.ndarray,
    gene_order: int,
    sample: bool,
    zeros_last: bool,
    sample_key: np.uint64,
    order_key: np.uint64,
    epoch: np.uint64,
    first_token: int,
    pad_id: int,
    start: int,
    room: int,
    out_tokens: np.ndarray,
    out_values: np.ndarray,
    out_lengths: np.ndarray,
    left_out: np.ndarray,
) -> int:
    """Which genes of each cell stay, in which order, with their values.

    Parameters
    ----------
    indptr, genes, cell_index
        Cells as in `CellBatch`.
    expressed, carried
        float (nnz): what `gene_order` VALUE sorts by, and what the model reads beside each gene.
    gene_order
        COLUMN, RANDOM or VALUE.
    sample
        Of a cell with more genes than fit, a random sample stays instead of the first ones in their order.
    zeros_last
        Genes without a count come after all others, and go first where they do not fit.
    sample_key, order_key, epoch
        Of the draws, one for each (cell, gene).
    first_token, pad_id, start, room, out_tokens, out_values, out_lengths
        As in `rank_genes`.
    left_out
        int64 (n_cells, n), filled: tokens of the genes with a count that do not fit, ascending, with pads on the right.

    Returns
    -------
    The most that any cell has in `left_out`.
    """
    longest, widest = 0, 0
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    order, places = np.empty(longest, np.int64), np.empty(longest, np.int64)
    stays = np.empty(longest, np.bool_)
    values, rounded = np.empty(longest, np.float64), np.empty(longest, np.float32)
    words, spare, buckets = (
        np.empty(longest, np.uint64),
        np.empty(longest, np.uint64),
        np.empty(BUCKETS, np.int64),
    )
    bits = np.empty((1, longest), np.uint32)
    for cell in range(len(indptr) - 1):
        begin, n = indptr[cell], indptr[cell + 1] - indptr[cell]
        low, high = np.uint64(cell_index[cell]) & LOW, np.uint64(cell_index[cell]) >> WORD
        drawn = gene_order == RANDOM or (sample and n > room)
        if drawn:
            # The first of a random order are a sample already.
            key = order_key if gene_order == RANDOM else sample_key
            philox_fill(key, low, high, genes[begin : begin + n], epoch, bits)
            for i in range(n):
                words[i] = (np.uint64(bits[0, i]) << WORD) | np.uint64(i)
            words, spare = _radix_sort(words, spare, n, KEY_BITS, buckets)
            for i in range(n):
                order[i] = np.int64(words[i] & LOW)
        else:
            for i in range(n):
                order[i] = i
        if zeros_last:
            _move_zeros_last(expressed[begin : begin + n], order, n, places)
        if gene_order != RANDOM:
            n_stay = n
            if drawn:
                stays[:n] = False
                for i in range(room):
                    stays[order[i]] = True
                n_stay = 0
                for i in range(n):
                    if stays[i]:
                        order[n_stay] = i
                        n_stay += 1
                if zeros_last:
                    _move_zeros_last(expressed[begin : begin + n], order, n_stay, places)
            if gene_order == VALUE:
                for i in range(n_stay):
                    values[i] = expressed[begin + order[i]]
                _descending(values, n_stay, rounded, words, spare, buckets, places)
                for i in range(n_stay):
                    places[i] = order[places[i]]
                order[:n_stay] = places[:n_stay]
        kept = min(n, room)
        out_tokens[cell, :start] = pad_id
        out_values[cell, :start] = 0
        for i in range(kept):
            j = begin + order[i]
            out_tokens[cell, start + i] = genes[j] + first_token
            out_values[cell, start + i] = carried[j]
        out_tokens[cell, start + kept :] = pad_id
        out_values[cell, start + kept :] = 0
        out_lengths[cell] = kept
        n_left = 0
        if n > room:
            stays[:n] = False
            for i in range(kept):
                stays[order[i]] = True
            for i in range(n):
                if not stays[i] and expressed[begin + i] > 0:
                    left_out[cell, n_left] = genes[begin + i] + first_token
                    n_left += 1
        left_out[cell, n_left:] = pad_id
        widest = max(widest, n_left)
    return widest


@numba.njit(nogil=True, cache=True)
def _move_zeros_last(expressed: np.ndarray, order: np.ndarray, n: int, spare: np.ndarray) -> None:
    """Bring the entries without a count behind the others, both in their order."""
    n_first, n_last = 0, 0
    for i in range(n):
        if expressed[order[i]] > 0:
            order[n_first] = order[i]
            n_first += 1
        else:
            spare[n_last] = order[i]
            n_last += 1
    order[n_first:n] = spare[:n_last]


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
    epoch: np.uint64,
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
    bits = np.empty((1, longest), np.uint32)
    for cell in range(len(indptr) - 1):
        begin, end = indptr[cell], indptr[cell + 1]
        n = end - begin
        if n == 0:
            out_edges[cell] = 0.0
            continue
        whole, largest = True, np.float32(0)
        for j in range(begin, end):
            largest = max(largest, counts[j])
            whole = whole and counts[j] < MANY_COUNTS and counts[j] == np.int64(counts[j])

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

        cell_low, cell_high = np.uint64(cell_index[cell]) & LOW, np.uint64(cell_index[cell]) >> WORD
        philox_fill(key, cell_low, cell_high, genes[begin:end], epoch, bits)
        for i in range(n):
            count = counts[begin + i]
            d = place_of[np.int64(count)] if whole else np.searchsorted(distinct[:m], count)
            spanned = max(up_to[d] - above[d], 1)
            drawn = (np.uint64(bits[0, i]) * np.uint64(spanned)) >> WORD
            out_bins[begin + i] = up_to[d] - np.int64(drawn)


@numba.njit(nogil=True, cache=True)
def count_kept(kept: np.ndarray, lengths: np.ndarray) -> int:
    """The most tokens that any cell keeps: `kept` bool (n_cells, length), of which the first `lengths` are real."""
    most = 0
    for cell in range(len(kept)):
        n = 0
        for i in range(lengths[cell]):
            n += kept[cell, i]
        most = max(most, n)
    return most


@numba.njit(nogil=True, cache=True)
def move_left(
    tokens: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    kept: np.ndarray,
    pad_id: int,
    out_tokens: np.ndarray,
    out_values: np.ndarray,
    out_lengths: np.ndarray,
) -> None:
    """Fill the last three with the tokens of each cell that are `kept` (bool (n_cells, length)), then pads."""
    for cell in range(len(tokens)):
        n = 0
        for i in range(lengths[cell]):
            if kept[cell, i]:
                out_tokens[cell, n], out_values[cell, n] = tokens[cell, i], values[cell, i]
                n += 1
        out_tokens[cell, n:] = pad_id
        out_values[cell, n:] = 0
        out_lengths[cell] = n
