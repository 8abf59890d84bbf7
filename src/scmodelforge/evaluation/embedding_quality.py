"""Does an embedding keep the biology, and does it mix the batches: the scIB metrics (Luecken et al. 2022).

Everything is computed by `scib_metrics.benchmark.Benchmarker`, with its own aggregation: biology and batch
scores are means of their metrics, total = 0.6 × biology + 0.4 × batch. Two choices are ours: neighbours are
exact (its approximate search leaves gaps on small data), and `pcr_comparison` is left out, because it
compares with an embedding before integration, which a foundation model does not have.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scmodelforge.config_eval import EmbeddingQualityParams
from scmodelforge.errors import DataError, require_extra
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores
from scmodelforge.evaluation.splits import check_embedding, usable_groups, usable_labels

if TYPE_CHECKING:
    from scib_metrics.nearest_neighbors import NeighborsResults

log = logging.getLogger(__name__)

MIN_CELLS = 90  # the widest neighbourhood of the Benchmarker (LISI)
MIN_CLASS_FOR_KBET = 10  # scib_metrics leaves smaller classes out of kBET
NAMES = {  # of the Benchmarker: ours
    "nmi_ari_cluster_labels_kmeans_nmi": "nmi_kmeans",
    "nmi_ari_cluster_labels_kmeans_ari": "ari_kmeans",
    "clisi_knn": "clisi",
    "ilisi_knn": "ilisi",
    "kbet_per_label": "kbet",
    "Bio conservation": "bio_conservation",
    "Batch correction": "batch_correction",
    "Total": "total",
}


def quality_cells(
    obs: pd.DataFrame, params: EmbeddingQualityParams, seed: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the rows to score, their labels and batches; needs no embedding, so it goes first.

    Raises
    ------
    DataError
        If labels or batches cannot be used, cells are too few, or no class occurs in two batches.
    """
    mask, labels = usable_labels(obs, params.cell_type_key, where, drop_unlabelled=params.drop_unlabelled)
    rows = np.flatnonzero(mask)
    batches = usable_groups(obs.iloc[rows], params.batch_key, where) if params.batch_key else None
    if len(rows) > params.max_cells:
        log.info(
            "embedding_quality: %s of %s cells, drawn at random (max_cells)", params.max_cells, len(rows)
        )
        kept = np.sort(np.random.default_rng(seed).choice(len(rows), params.max_cells, replace=False))
        rows, labels = rows[kept], labels[kept]
        batches = None if batches is None else batches[kept]
    if len(rows) < MIN_CELLS:
        raise DataError(
            f"embedding_quality looks at {MIN_CELLS} neighbours of a cell, and {where} leaves "
            f"{len(rows)} cells.\n"
            f"Give at least {MIN_CELLS} labelled cells, or raise max_cells if it is smaller."
        )
    if batches is not None:
        _check_batches(labels, batches, params, where)
    return rows, labels, batches


class EmbeddingQuality:
    """The scIB metrics as a benchmark of all methods that have an embedding."""

    def check(self, cells: EvaluationCells, params: EmbeddingQualityParams, seed: int) -> None:
        """Raise `UserError` if scib-metrics is not installed, or labels or batches cannot be used."""
        require_extra("scib_metrics", "eval", "The benchmark embedding_quality")
        quality_cells(cells.store.obs, params, seed, cells.where)

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: EmbeddingQualityParams, seed: int
    ) -> dict[str, Scores]:
        """Score each embedding; `embedding_quality` says what the figures are."""
        return {
            method.name: Scores(
                embedding_quality(method.embedding, cells.store.obs, params, seed, cells.where)
            )
            for method in methods
            if method.embedding is not None
        }


BENCHMARK = EmbeddingQuality()


def embedding_quality(
    embedding: np.ndarray,
    obs: pd.DataFrame,
    params: EmbeddingQualityParams,
    seed: int,
    where: str = "the data",
) -> dict[str, float | int]:
    """Score an embedding with the scIB metrics; all lie in [0, 1], and higher is better.

    Parameters
    ----------
    embedding
        float32 (n_cells, d).
    obs
        One row per cell, in the same order.
    params
        Label and batch columns; how many cells at most.
    seed
        Seed of the subsample where there are more than `params.max_cells` cells.
    where
        What the messages call these data.

    Returns
    -------
    dict
        Always `nmi_kmeans`, `ari_kmeans`, `silhouette_label`, `clisi`, `bio_conservation`, `total`, `n_cells`
        and `n_classes`. With a batch column also `isolated_labels` (part of the biology), `bras`, `ilisi`,
        `kbet`, `graph_connectivity`, `batch_correction`, `n_batches`, and `silhouette_batch` (the classical
        batch ASW, beside the aggregate: BRAS has replaced it there). Without one, `total` is
        `bio_conservation`.

    Raises
    ------
    MissingExtraError
        If scib-metrics is not installed.
    DataError
        If labels, batches or embedding cannot be used, cells are too few, no class occurs in two batches, or
        a metric is undefined.
    """
    require_extra("scib_metrics", "eval", "The benchmark embedding_quality")
    rows, labels, batches = quality_cells(obs, params, seed, where)
    check_embedding(embedding, len(obs))
    log.info(
        "embedding_quality: %s cells; scib-metrics compiles its code at its first use (a minute)", len(rows)
    )
    points = np.ascontiguousarray(embedding[rows], dtype=np.float32)
    scores = _scib(points, labels, batches)
    if undefined := [name for name, value in scores.items() if not np.isfinite(value)]:
        raise DataError(
            f"{', '.join(undefined)} of scib-metrics cannot be computed for {where} ({len(rows):,} cells).\n"
            "Most often classes and batches hardly overlap: look at the UMAP, or set batch_key: null."
        )
    counts = {"n_cells": len(rows), "n_classes": len(np.unique(labels))}
    return scores | counts | ({} if batches is None else {"n_batches": len(np.unique(batches))})


def _check_batches(
    labels: np.ndarray, batches: np.ndarray, params: EmbeddingQualityParams, where: str
) -> None:
    table = pd.crosstab(labels, batches).to_numpy()
    cells, n_batches = table.sum(1), (table > 0).sum(1)
    if not ((cells >= MIN_CLASS_FOR_KBET) & (n_batches > 1) & (n_batches < cells)).any():
        raise DataError(
            f"No class of obs['{params.cell_type_key}'] with {MIN_CLASS_FOR_KBET} or more cells occurs in "
            f"two batches of obs['{params.batch_key}'] of {where}, so mixing cannot be told from biology.\n"
            "Choose another batch_key, or set it to null to score the biology only."
        )


def _scib(points: np.ndarray, labels: np.ndarray, batches: np.ndarray | None) -> dict[str, float]:
    import anndata
    import scib_metrics
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    by_batch = batches is not None
    batch = np.zeros(len(labels), dtype=np.int64) if batches is None else batches
    obs = pd.DataFrame(
        {"label": labels, "batch": batch.astype(str)}, index=np.arange(len(labels)).astype(str)
    )
    benchmarker = Benchmarker(
        anndata.AnnData(obs=obs, obsm={"embedding": points}),
        batch_key="batch",
        label_key="label",
        embedding_obsm_keys=["embedding"],
        bio_conservation_metrics=BioConservation(isolated_labels=by_batch),
        batch_correction_metrics=BatchCorrection(pcr_comparison=False) if by_batch else None,
        pre_integrated_embedding_obsm_key="embedding",  # unused without pcr_comparison; saves a PCA
        progress_bar=False,
    )
    with _quiet():
        benchmarker.prepare(neighbor_computer=_exact_neighbors)
        benchmarker.benchmark()
        table = benchmarker.get_results(min_max_scale=False, clean_names=False)
        scores = {NAMES.get(name, name): float(value) for name, value in table.loc["embedding"].items()}
        if by_batch:
            scores["silhouette_batch"] = float(scib_metrics.silhouette_batch(points, labels, batch))
    scores.setdefault("total", scores["bio_conservation"])
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the chatter of JAX, numba and scib-metrics from the user; undefined metrics are checked after."""
    handlers, disabled = logging.root.handlers[:], logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers  # scib-metrics logs through the root, which adds a handler


def _exact_neighbors(points: np.ndarray, k: int) -> NeighborsResults:
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    distances, indices = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(points)
    return NeighborsResults(indices=indices, distances=distances.astype(np.float32))
