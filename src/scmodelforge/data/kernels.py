"""Compiled kernels of the data path: they release the GIL, so threads run beside each other.

Compiled once and cached on disk by numba; each has a slow twin in the tests.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def cells_to_vocabulary(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    rows: np.ndarray,
    gene_index: np.ndarray,
    unsigned: bool,
    out_indptr: np.ndarray,
    out_genes: np.ndarray,
    out_counts: np.ndarray,
    library_size: np.ndarray,
) -> bool:
    """Gather rows of a CSR matrix and map its columns to vocabulary genes, in one pass.

    Parameters
    ----------
    indptr, indices, data
        The matrix; `indptr` int64, the others of any integer or float type, in memory or mapped.
    rows
        int64 (n): rows to gather, in any order, repeats allowed.
    gene_index
        int (n_columns): vocabulary gene of each column, -1 for none.
    unsigned
        `data` has an unsigned type, so no count of it can be wrong.
    out_indptr
        int64 (n + 1), filled.
    out_genes, out_counts
        int32 and float32, as long as the gathered rows together; filled up to `out_indptr[n]`. Within a cell genes
        ascend, columns of one gene are summed and zeros are left out.
    library_size
        float64 (n), filled: the sum of each row over all columns.

    Returns
    -------
    Whether all is well: False where a column lies outside of the matrix, or a count is negative or not finite.
    """
    # Short loops that each do one thing run in vector registers; one loop that does all takes twice as long.
    end = 0
    out_indptr[0] = 0
    for i in range(len(rows)):
        first = indptr[rows[i]]
        n = indptr[rows[i] + 1] - first
        columns, stored = indices[first : first + n], data[first : first + n]
        genes, counts = out_genes[end : end + n], out_counts[end : end + n]
        largest = np.uint64(0)
        for j in range(n):
            largest = max(largest, np.uint64(columns[j]))
        if n and largest >= np.uint64(len(gene_index)):
            return False
        for j in range(n):
            counts[j] = stored[j]
        if unsigned:
            total = np.int64(0)
            for j in range(n):
                total += np.int64(stored[j])
            library_size[i] = total
        else:
            good = True
            for j in range(n):
                good &= (counts[j] >= 0) & (counts[j] < np.inf)
            if not good:
                return False
            library_size[i] = _sum(counts)
        for j in range(n):
            genes[j] = gene_index[columns[j]]
        n_out, n_back = 0, 0
        for j in range(n):
            n_out += (genes[j] < 0) | (counts[j] == 0)
        if n_out:
            kept = 0
            for j in range(n):
                genes[kept], counts[kept] = genes[j], counts[j]
                kept += (genes[j] >= 0) & (counts[j] > 0)
            n = kept
        for j in range(1, n):
            n_back += genes[j] <= genes[j - 1]
        end = _sort_and_sum(out_genes, out_counts, end, end + n) if n_back else end + n
        out_indptr[i + 1] = end
    return True


@numba.njit(nogil=True, cache=True)
def _sum(values: np.ndarray) -> float:
    """The sum in float64, as four sums at once: one addition need not wait for the other."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    whole = len(values) - len(values) % 4
    for j in range(0, whole, 4):
        a, b = a + values[j], b + values[j + 1]
        c, d = c + values[j + 2], d + values[j + 3]
    for j in range(whole, len(values)):
        a += values[j]
    return (a + b) + (c + d)


@numba.njit(nogil=True, cache=True)
def _sort_and_sum(genes: np.ndarray, counts: np.ndarray, begin: int, end: int) -> int:
    """Sort the entries begin:end by gene, sum those of one gene, and return the new end."""
    order = np.argsort(genes[begin:end], kind="mergesort")
    sorted_genes, sorted_counts = genes[begin:end][order], counts[begin:end][order]
    kept = begin
    for j in range(len(order)):
        if j and sorted_genes[j] == sorted_genes[j - 1]:
            counts[kept - 1] += sorted_counts[j]
        else:
            genes[kept] = sorted_genes[j]
            counts[kept] = sorted_counts[j]
            kept += 1
    return kept
