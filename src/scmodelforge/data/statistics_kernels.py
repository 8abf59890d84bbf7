"""Compiled kernels of the statistics: they release the GIL, so threads run beside each other.

Those of the medians compute the values of a cell (count / size × target sum, in this order in float64) as they go, and
compare `keys`, the bits of a positive float read as int64, which ascend with it.
"""

from __future__ import annotations

import numba
import numpy as np

TOP = np.iinfo(np.int64).max  # above the key of every finite value


@numba.njit(nogil=True, cache=True)
def add_moments(sums: np.ndarray, genes: np.ndarray, values: np.ndarray) -> None:
    """Add each value to its gene's row of `sums` float64 (n_genes, 3): one, the value, its square.

    The square is taken in the dtype of `values` and added in float64, as scanpy does.
    """
    for j in range(len(genes)):
        row = sums[genes[j]]
        value = values[j]
        row[0] += 1.0
        row[1] += value
        row[2] += value * value


@numba.njit(nogil=True, cache=True)
def count_clamped(
    table: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    target_sum: float,
    edge: int,
    shift: int,
) -> None:
    """Count values in bins of equal width of their keys; the outer bins take all beyond.

    The table is larger than the caches of a processor. Bins are its rows, and cells come in the order of their size,
    because most counts of a cell are equal, and of cells of one size they fall into the same few rows.

    Parameters
    ----------
    table
        uint32 (n_bins, n_genes), added to.
    indptr, genes, counts
        As in `CellBatch`.
    sizes, target_sum
        float64 (n_cells) and a number: what counts are divided by, and multiplied with.
    edge, shift
        Key where the bins begin, and their width as a power of two.
    """
    values = np.empty(table.shape[1])
    keys = values.view(np.int64)
    last = len(table) - 1
    for cell in np.argsort(sizes):
        begin, n, size = indptr[cell], indptr[cell + 1] - indptr[cell], sizes[cell]
        for j in range(n):  # a loop of its own is vectorised
            values[j] = np.float64(counts[begin + j]) / size * target_sum
        for j in range(n):
            table[min(max((keys[j] - edge) >> shift, 0), last), genes[begin + j]] += 1


@numba.njit(nogil=True, cache=True)
def count_within(
    table: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    target_sum: float,
    low: np.ndarray,
    high: np.ndarray,
    shift: np.ndarray,
) -> None:
    """As `count_clamped`, for the keys in [low, high) of their gene only, in bins that begin at `low`.

    Parameters
    ----------
    low, high, shift
        int64 (n_genes).
    """
    values = np.empty(len(low))
    keys = values.view(np.int64)
    for cell in range(len(sizes)):
        begin, n, size = indptr[cell], indptr[cell + 1] - indptr[cell], sizes[cell]
        for j in range(n):
            values[j] = np.float64(counts[begin + j]) / size * target_sum
        for j in range(n):
            gene, key = genes[begin + j], keys[j]
            if low[gene] <= key < high[gene]:
                table[(key - low[gene]) >> shift[gene], gene] += 1


@numba.njit(nogil=True, cache=True)
def bins_of_ranks(
    table: np.ndarray, ranks: np.ndarray, bins: np.ndarray, below: np.ndarray, held: np.ndarray
) -> None:
    """Find, for each gene, the bin of the value of a rank, and the number of values below that bin and in it.

    Parameters
    ----------
    table
        uint32 (n_bins, n_genes).
    ranks
        int64 (n_genes), from 0; at least the gene's number of values where there is no such value.
    bins, below, held
        int64 (n_genes), filled; a gene without such a value gets the last bin, with nothing held.
    """
    bins[:], below[:], held[:] = len(table) - 1, 0, 0
    passed = np.zeros(table.shape[1], dtype=np.int64)
    for bin_ in range(len(table)):
        for gene in range(table.shape[1]):
            here = np.int64(table[bin_, gene])
            if passed[gene] <= ranks[gene] < passed[gene] + here:
                bins[gene], below[gene], held[gene] = bin_, passed[gene], here
            passed[gene] += here


@numba.njit(nogil=True, cache=True)
def pick_within(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    target_sum: float,
    low: np.ndarray,
    high: np.ndarray,
    out_genes: np.ndarray,
    out_keys: np.ndarray,
    above: np.ndarray,
) -> int:
    """Copy the keys in [low, high) of their gene, and lower `above` to the smallest key from `high` on.

    Parameters
    ----------
    indptr, genes, counts, sizes, target_sum
        As in `count_clamped`.
    low, high
        int64 (n_genes); where they hold one number only, nothing is copied.
    out_genes, out_keys
        int32 and int64 (nnz), filled from the beginning.
    above
        int64 (n_genes).

    Returns
    -------
    The number of keys copied.
    """
    values = np.empty(len(low))
    keys = values.view(np.int64)
    picked = 0
    for cell in range(len(sizes)):
        begin, n, size = indptr[cell], indptr[cell + 1] - indptr[cell], sizes[cell]
        for j in range(n):
            values[j] = np.float64(counts[begin + j]) / size * target_sum
        for j in range(n):
            gene, key = genes[begin + j], keys[j]
            start, stop = low[gene], high[gene]
            # No branches: which way they go cannot be foreseen. What is not picked is overwritten by the next.
            above[gene] = min(above[gene], key if key >= stop else TOP)
            out_genes[picked], out_keys[picked] = gene, key
            picked += (start <= key) & (key < stop) & (stop - start > 1)
    return picked


@numba.njit(nogil=True, cache=True)
def place(kept: np.ndarray, ends: np.ndarray, genes: np.ndarray, keys: np.ndarray) -> None:
    """Write each key behind those that its gene has in `kept` already; `ends` int64 (n_genes) moves on."""
    for j in range(len(genes)):
        kept[ends[genes[j]]] = keys[j]
        ends[genes[j]] += 1


@numba.njit(nogil=True, cache=True)
def sort_each(kept: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
    """Sort the keys of each gene, which lie at starts:ends of `kept`."""
    for gene in range(len(starts)):
        if ends[gene] - starts[gene] > 1:
            kept[starts[gene] : ends[gene]].sort()
