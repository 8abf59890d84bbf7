"""The bars that a model has to clear, from guessing the largest class to PCA and a linear model on all genes.

A method with an embedding is scored as the model is. "log_normalized" and "majority" have none: a benchmark of labels
fits them itself, on the same training cells as the others.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from scmodelforge.config_eval import EvalConfig
from scmodelforge.errors import DataError, require_extra
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, progress
from scmodelforge.evaluation.splits import group_column
from scmodelforge.inference import embed_store
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.models.embeddings import ExternalGenes

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

TARGET_SUM = 10_000  # counts per cell after normalization, scanpy's usual choice
N_TOP_GENES = 2000


def check_baselines(cells: EvaluationCells, config: EvalConfig) -> None:
    """Raise `UserError` if a baseline of `config` needs a package or a column that is not there; cheap."""
    if "harmony" in config.baselines:
        require_extra("harmonypy", "baselines", "The baseline harmony")
        if batch_key(cells, config) is None:
            raise DataError(
                f"The baseline harmony corrects for batches, and {cells.where} has no obs column of batches that is "
                "known by its name (batch, donor, dataset, ...).\nName one as batch_key of embedding_quality, or leave "
                "'harmony' out of eval.baselines."
            )
    if "scvi" in config.baselines:
        require_extra("scvi", "scvi", "The baseline scvi")


def baseline_methods(bundle: ModelBundle, cells: EvaluationCells, config: EvalConfig) -> list[Method]:
    """Build the baselines of `config`, in its order; each is computed once for all benchmarks.

    Raises
    ------
    UserError
        If the cells do not allow one of them.
    """
    methods: dict[str, Method] = {}
    for name in dict.fromkeys(config.baselines):
        embedding, fresh, began = None, None, time.monotonic()
        if name == "untrained":
            fresh = untrained(bundle, config.seed)
            embedding = embed_store(fresh, cells.store, config.batch_size)
        elif name == "pca":
            embedding = pca_embedding(cells.counts, config.seed)
        elif name == "harmony":
            known = methods["pca"].embedding if "pca" in methods else None
            pca = pca_embedding(cells.counts, config.seed) if known is None else known
            batch = cells.store.obs[batch_key(cells, config)].astype(str).to_numpy()
            embedding = harmony_embedding(pca, batch, config.seed)
        elif name == "scvi":
            embedding = scvi_embedding(cells, config)
        methods[name] = Method(name, True, embedding, fresh)
        if embedding is not None:
            progress.info("%s: embedded in %.1f s", name, time.monotonic() - began)
    return list(methods.values())


def untrained(bundle: ModelBundle, seed: int) -> ModelBundle:
    """The model before training; given gene vectors are not learned and stay."""
    fresh = ModelBundle(bundle.config, bundle.vocab, build_model(bundle.config, bundle.vocab, seed))
    given, genes = bundle.model.embedding.tokens, fresh.model.embedding.tokens
    if isinstance(given, ExternalGenes) and isinstance(genes, ExternalGenes):
        genes.load_vectors(given.vectors.weight)
    return fresh


def log_normalized(counts: csr_matrix) -> csr_matrix:
    """log(1 + counts per 10,000) of all genes, float32 CSR as `counts`, which is left unchanged."""
    return _log_normalized(counts).X


def _log_normalized(counts: csr_matrix) -> AnnData:
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(csr_matrix(counts, dtype=np.float32, copy=True))
    sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
    sc.pp.log1p(adata)
    return adata


def pca_embedding(
    counts: csr_matrix, seed: int, n_top_genes: int = N_TOP_GENES, n_components: int = 50
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
    import scanpy as sc

    if min(counts.shape) < 2:
        raise DataError(
            f"PCA needs at least two cells and two genes, not {counts.shape[0]} × {counts.shape[1]}.\n"
            "Give more cells, or leave 'pca' out of eval.baselines."
        )
    adata = _log_normalized(counts)
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


def batch_key(cells: EvaluationCells, config: EvalConfig) -> str | None:
    """The obs column of the batches that harmony and scvi correct for.

    The first `batch_key` that a benchmark names, else the first known column of batches, donors or data sets, else
    None.
    """
    named = (getattr(spec.params, "batch_key", None) for spec in config.benchmarks)
    return next(filter(None, named), None) or group_column(cells.store.obs, ("batch", "donor", "dataset"))


def harmony_embedding(pca: np.ndarray, batch: np.ndarray, seed: int) -> np.ndarray:
    """Correct principal components for batches with Harmony (Korsunsky et al. 2019); float32 as `pca`."""
    import harmonypy
    import pandas as pd

    corrected = harmonypy.run_harmony(
        pca, pd.DataFrame({"batch": batch}), "batch", random_state=seed, verbose=False
    )
    return np.ascontiguousarray(corrected.Z_corr, dtype=np.float32)


def scvi_embedding(cells: EvaluationCells, config: EvalConfig) -> np.ndarray:
    """Latent means of scVI (Lopez et al. 2018) with its defaults, trained on these cells; float32 (n_cells, 10).

    It reads the counts of the highly variable genes and, where there are any, the batches.
    """
    import anndata
    import scanpy as sc
    import scvi

    adata = anndata.AnnData(cells.counts.copy())
    if adata.n_vars > N_TOP_GENES:
        genes = sc.pp.highly_variable_genes(
            _log_normalized(cells.counts), n_top_genes=N_TOP_GENES, flavor="seurat", inplace=False
        )
        adata = adata[:, genes["highly_variable"].to_numpy()].copy()
    key = batch_key(cells, config)
    if key is not None:
        adata.obs["batch"] = cells.store.obs[key].astype(str).to_numpy()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    scvi.settings.seed = config.seed
    scvi.model.SCVI.setup_anndata(adata, batch_key=None if key is None else "batch")
    model = scvi.model.SCVI(adata)
    model.train(enable_progress_bar=False, enable_model_summary=False)
    return np.ascontiguousarray(model.get_latent_representation(), dtype=np.float32)
