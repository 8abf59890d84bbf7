"""The compiled part of `budget`: which draw of an epoch comes in which batch.

Per million draws it takes 0.05 to 0.11 s on one core (1 to 64 ranks), and 13 bytes a draw while it runs.
"""

from __future__ import annotations

import numba
import numpy as np

LAST_WINDOW = 0.9  # how full the last window is planned, so that it has room for the cells that wait
N_LEVELS = 128  # above `level_of` any int32
NO_LIMIT = 2**62


@numba.njit(nogil=True, cache=True)
def level_of(length: int) -> int:
    """The length to three binary digits, as a whole number from 1 up; four levels an octave.

    So cells of about one length are placed in the order of the draws, and have other company in each epoch.
    """
    level = 0
    while length > 7:
        length >>= 1
        level += 4
    return level + length


@numba.njit(nogil=True, cache=True)
def _sink(heap: np.ndarray, size: int, place: int, loads: np.ndarray) -> None:
    """Move a bin down the heap (the least loaded is at 0; of equals, the first) until the order is right."""
    moved = heap[place]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and (loads[heap[child + 1]], heap[child + 1]) < (loads[heap[child]], heap[child]):
            child += 1
        if (loads[moved], moved) < (loads[heap[child]], heap[child]):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = moved


@numba.njit(nogil=True, cache=True)
def _sort_by_level(draws: np.ndarray, levels: np.ndarray) -> None:
    """Sort by falling level; those of one level keep their order."""
    ends = np.zeros(N_LEVELS + 1, np.int64)
    for draw in draws:
        ends[N_LEVELS - levels[draw]] += 1
    ends = np.cumsum(ends)
    for draw in draws[::-1].copy():
        place = N_LEVELS - levels[draw]
        ends[place] -= 1
        draws[ends[place]] = draw


@numba.njit(nogil=True, cache=True)
def _fill(
    draws: np.ndarray,
    lengths: np.ndarray,
    first: int,
    end: int,
    limit: int,
    max_cells: int,
    loads: np.ndarray,
    cells: np.ndarray,
    bin_of: np.ndarray,
) -> int:
    """Put draws, in their order, into the bins `first:end`, each into the least loaded one.

    Returns how many do not fit; they are moved to the front of `draws`.
    """
    heap, size = np.arange(first, end), end - first
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap, size, place, loads)
    left = 0
    for draw in draws:
        if size == 0 or loads[heap[0]] + lengths[draw] > limit:
            draws[left] = draw
            left += 1
            continue
        chosen = heap[0]
        bin_of[draw] = chosen
        loads[chosen] += lengths[draw]
        cells[chosen] += 1
        if cells[chosen] == max_cells:
            size -= 1
            heap[0] = heap[size]
        _sink(heap, size, 0, loads)
    return left


@numba.njit(nogil=True, cache=True)
def fill_bins(
    lengths: np.ndarray, world: int, limit: int, max_cells: int, windows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Distribute the draws of an epoch over its batches.

    Parameters
    ----------
    lengths
        int32 (n), positive, at most `limit`: tokens of the draws, in their order; n is below 2**32.
    world
        Batches of a step.
    limit, max_cells
        Tokens and cells that a batch holds at most.
    windows
        int64 (n_windows + 1): window `w` has the steps `windows[w]:windows[w + 1]`; all steps together have at most n
        batches.

    Returns
    -------
    starts
        int64 (n_bins + 1): batch `step * world + rank` has the draws `draws[starts[batch]:starts[batch + 1]]`.
    draws
        uint32 (n): all draws, in each batch in their order; every batch has at least one.
    n_over
        Draws for which no batch had room: they are in those with most room.
    """
    n, bounds = len(lengths), windows * world
    n_bins = bounds[-1]
    bin_of = np.empty(n, np.uint32)
    loads, cells = np.zeros(n_bins, np.int64), np.zeros(n_bins, np.int64)
    levels, placing = np.empty(n, np.uint8), np.empty(n, np.uint32)  # `placing`: draws without a batch
    tokens, remaining, at, waiting = np.int64(0), np.int64(lengths.sum()), 0, 0
    for w in range(len(bounds) - 1):
        first, end = bounds[w], bounds[w + 1]
        last = end == n_bins
        spared = 0.0 if last else (1 - LAST_WINDOW) * (n_bins - bounds[-2])
        wanted = min(remaining * ((end - first) / (n_bins - first - spared)), (end - first) * limit)
        least, most = end - first, waiting + n - at - (n_bins - end)
        n_placing = waiting
        while at < n and n_placing < most and (last or tokens < wanted or n_placing < least):
            placing[n_placing], levels[at] = at, level_of(lengths[at])
            tokens += lengths[at]
            at, n_placing = at + 1, n_placing + 1
        _sort_by_level(placing[:n_placing], levels)
        chosen = min(n_placing, most)  # each later bin needs a cell too
        left = _fill(placing[:chosen], lengths, first, end, limit, max_cells, loads, cells, bin_of)
        waiting = left + n_placing - chosen
        placing[left:waiting] = placing[chosen:n_placing].copy()
        placed = loads[first:end].sum()
        tokens, remaining = tokens - placed, remaining - placed
    n_over = 0
    if waiting:
        n_over = _fill(placing[:waiting], lengths, 0, n_bins, limit, max_cells, loads, cells, bin_of)
        _fill(placing[:n_over], lengths, 0, n_bins, NO_LIMIT, NO_LIMIT, loads, cells, bin_of)
    place_of = np.empty(n_bins, np.uint32)  # in the order of fullness within a window
    for w in range(len(bounds) - 1):
        by_load = np.argsort(loads[bounds[w] : bounds[w + 1]], kind="mergesort")
        for i in range(len(by_load)):
            place_of[bounds[w] + by_load[i]] = bounds[w] + i
    starts = np.zeros(n_bins + 1, np.int64)
    for b in range(n_bins):
        starts[place_of[b] + 1] = cells[b]
    starts = np.cumsum(starts)
    following, draws = starts[:-1].copy(), np.empty(n, np.uint32)
    for i in range(n):
        place = place_of[bin_of[i]]
        draws[following[place]] = i
        following[place] += 1
    return starts, draws, n_over
