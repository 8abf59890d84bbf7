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
    end = 0
    out_indptr[0] = 0
    for i in range(len(rows)):
        begin, last, ascending = end, -1, True
        library_size[i] = 0.0
        for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
            column = indices[j]
            if column < 0 or column >= len(gene_index):
                return False
            count = np.float32(data[j])
            if not (count >= 0 and count < np.inf):
                return False
            library_size[i] += count
            gene = gene_index[column]
            if gene >= 0 and count > 0:
                ascending = ascending and gene > last
                last = gene
                out_genes[end] = gene
                out_counts[end] = count
                end += 1
        if not ascending:
            end = _sort_and_sum(out_genes, out_counts, begin, end)
        out_indptr[i + 1] = end
    return True


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
