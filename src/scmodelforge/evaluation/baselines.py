"""The bar that a model has to clear: principal components of log-normalized, highly variable genes."""

from __future__ import annotations

import logging

import numpy as np
from scipy.sparse import csr_matrix

from scmodelforge.errors import DataError

log = logging.getLogger(__name__)

TARGET_SUM = 10_000  # counts per cell after normalization, scanpy's usual choice


def pca_embedding(
    counts: csr_matrix, seed: int, n_top_genes: int = 2000, n_components: int = 50
) -> np.ndarray:
    """Embed cells as scanpy's standard workflow does: normalize, log1p, choose genes, PCA.

    Parameters
    ----------
    counts
        (n_cells, n_genes) raw counts; left unchanged.
    seed
        Start vector of the sparse eigensolver.
    n_top_genes
        Highly variable genes (flavor "seurat", Satija et al. 2015); all genes where there are no more.
    n_components
        Number of components; fewer where there are not enough cells or genes.

    Returns
    -------
    numpy.ndarray
        float32 (n_cells, min(n_components, n_cells - 1, n_genes - 1)).

    Raises
    ------
    DataError
        If there are fewer than two cells or genes, or all cells are alike.
    """
    import anndata
    import scanpy as sc

    if min(counts.shape) < 2:
        raise DataError(
            f"PCA needs at least two cells and two genes, not {counts.shape[0]} × {counts.shape[1]}.\n"
            "Give more cells, or leave 'pca' out of eval.baselines."
        )
    adata = anndata.AnnData(csr_matrix(counts, dtype=np.float32, copy=True))
    sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
    sc.pp.log1p(adata)
    if n_top_genes < adata.n_vars:
        sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes, flavor="seurat")
        adata = adata[:, adata.var["highly_variable"].to_numpy()].copy()
    if not (adata.X.max(axis=0) - adata.X.min(axis=0)).nnz:
        raise DataError(
            f"All {adata.n_obs:,} cells have the same normalized counts, so PCA has nothing to separate.\n"
            "Give other cells, or leave 'pca' out of eval.baselines."
        )
    n_kept = min(n_components, adata.n_obs - 1, adata.n_vars - 1)
    if n_kept < n_components:
        log.info("PCA: %s components, as there are %s cells and %s genes", n_kept, adata.n_obs, adata.n_vars)
    return np.ascontiguousarray(
        sc.pp.pca(adata.X, n_comps=n_kept, random_state=seed, dtype="float32"), dtype=np.float32
    )
