"""Does an embedding keep the biology, and does it mix the batches: the scIB metrics (Luecken et al. 2022).

Every metric of `scib_metrics`, and the aggregation of its `Benchmarker`: biology and batch scores are means of their
metrics, total = 0.6 × biology + 0.4 × batch. The figures are those of the `Benchmarker`, for less than half of its
time: neighbours are exact and computed once (its approximate search compiles for long, and leaves gaps on small
data), silhouettes are shared, and what it compiles anew for each size of a class is computed without
(`silhouettes`, `kbet`). Leiden clusters and the classical batch ASW stand beside the aggregate, as in its defaults.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd

from scmodelforge.config_eval import EmbeddingQualityParams
from scmodelforge.errors import DataError, require_extra
from scmodelforge.evaluation.baselines import pca_embedding
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores, announced
from scmodelforge.evaluation.kbet import MIN_CELLS as MIN_CLASS_FOR_KBET
from scmodelforge.evaluation.kbet import kbet_per_label
from scmodelforge.evaluation.neighbors import nearest_neighbors
from scmodelforge.evaluation.silhouettes import bras, silhouette_batch, silhouettes
from scmodelforge.evaluation.splits import check_embedding, usable_groups, usable_labels

log = logging.getLogger(__name__)

MIN_CELLS = 90  # the widest neighbourhood (LISI)
KBET_NEIGHBORS, GRAPH_NEIGHBORS = 50, 15  # of kBET; of connectivity and Leiden: as in the Benchmarker
BIOLOGY = ("isolated_labels", "nmi_kmeans", "ari_kmeans", "silhouette_label", "clisi")
MIXING = ("bras", "ilisi", "kbet", "graph_connectivity", "pcr_comparison")
BIOLOGY_WEIGHT = 0.6  # Luecken et al. 2022


def quality_cells(
    obs: pd.DataFrame, params: EmbeddingQualityParams, seed: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the rows to score, their labels and batches; needs no embedding, so it goes first.

    Raises
    ------
    DataError
        If labels or batches cannot be used, cells are too few, or no class occurs in two batches.
    """
    mask, labels = usable_labels(
        obs,
        params.cell_type_key,
        where,
        drop_unlabelled=params.drop_unlabelled,
        section="eval.benchmarks[embedding_quality].params",
    )
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
        """Score each embedding; `embedding_quality` says what the figures are.

        With batches, `pcr_comparison` compares with the PCA of the counts, the baseline's where it is there.
        """
        scored = [method for method in methods if method.embedding is not None]
        unintegrated = None
        if params.batch_key is not None:
            pca = next((method.embedding for method in scored if method.name == "pca"), None)
            unintegrated = pca_embedding(cells.counts, seed) if pca is None else pca
        return {
            method.name: Scores(
                embedding_quality(
                    method.embedding,  # type: ignore[arg-type]
                    cells.store.obs,
                    params,
                    seed,
                    cells.where,
                    unintegrated,
                )
            )
            for method in announced(scored, "embedding_quality")
        }


BENCHMARK = EmbeddingQuality()


def embedding_quality(
    embedding: np.ndarray,
    obs: pd.DataFrame,
    params: EmbeddingQualityParams,
    seed: int,
    where: str = "the data",
    unintegrated: np.ndarray | None = None,
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
    unintegrated
        float32 (n_cells, p) embedding that knows of no integration, such as principal components of the counts;
        `pcr_comparison` compares with it, and is left out without.

    Returns
    -------
    dict
        Always `nmi_kmeans`, `ari_kmeans`, `silhouette_label`, `clisi`, `bio_conservation`, `total`, `n_cells`
        and `n_classes`. With a batch column also `isolated_labels` (part of the biology), `bras`, `ilisi`,
        `kbet`, `graph_connectivity`, `pcr_comparison`, `batch_correction` and `n_batches`. Without one, `total`
        is `bio_conservation`. Beside the aggregates: `nmi_leiden`, `ari_leiden`, and with batches
        `silhouette_batch` (the classical batch ASW, which BRAS has replaced).

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
    points = np.ascontiguousarray(embedding[rows], dtype=np.float32)
    with _quiet():
        scores = _scib(points, labels, batches)
        if batches is not None and unintegrated is not None:
            scores["pcr_comparison"] = _pcr_comparison(unintegrated[rows], points, batches)
    if batches is not None and unintegrated is None:
        log.info("embedding_quality: without principal components of the counts, pcr_comparison is left out")
    if undefined := [name for name, value in scores.items() if not np.isfinite(value)]:
        raise DataError(
            f"{', '.join(undefined)} of scib-metrics cannot be computed for {where} ({len(rows):,} cells).\n"
            "Most often classes and batches hardly overlap: look at the UMAP, or set batch_key: null."
        )
    counts = {"n_cells": len(rows), "n_classes": len(np.unique(labels))}
    counts |= {} if batches is None else {"n_batches": len(np.unique(batches))}
    return scores | aggregates(scores) | counts


def aggregates(scores: Mapping[str, float]) -> dict[str, float]:
    """`bio_conservation`, `total` and, if batches were scored, `batch_correction`, as the Benchmarker has them."""
    biology = float(np.mean([scores[name] for name in BIOLOGY if name in scores]))
    mixing = [scores[name] for name in MIXING if name in scores]
    if not mixing:
        return {"bio_conservation": biology, "total": biology}
    batch = float(np.mean(mixing))
    total = BIOLOGY_WEIGHT * biology + (1 - BIOLOGY_WEIGHT) * batch
    return {"bio_conservation": biology, "batch_correction": batch, "total": total}


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
    """All metrics but `pcr_comparison`, by name."""
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    indices, distances = nearest_neighbors(points, MIN_CELLS)
    near = NeighborsResults(indices=indices, distances=distances)
    close = near.subset_neighbors(GRAPH_NEIGHBORS)
    by_label = (silhouettes(points, labels) + 1) / 2
    kmeans = scib_metrics.nmi_ari_cluster_labels_kmeans(points, labels)
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(close, labels)
    scores = {
        "nmi_kmeans": kmeans["nmi"],
        "ari_kmeans": kmeans["ari"],
        "silhouette_label": by_label.mean(),
        "clisi": scib_metrics.clisi_knn(near, labels),
        "nmi_leiden": leiden["nmi"],
        "ari_leiden": leiden["ari"],
    }
    if batches is not None:
        graph = near.subset_neighbors(KBET_NEIGHBORS).knn_graph_connectivities
        scores |= {
            "isolated_labels": _isolated_labels(by_label, labels, batches),
            "bras": bras(points, labels, batches),
            "ilisi": scib_metrics.ilisi_knn(near, batches),
            "kbet": kbet_per_label(graph, batches, labels),
            "graph_connectivity": scib_metrics.graph_connectivity(close, labels),
            "silhouette_batch": silhouette_batch(points, labels, batches),
        }
    return {name: float(value) for name, value in scores.items()}


def _isolated_labels(by_label: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Mean silhouette of the labels that occur in the fewest batches, mean over these labels."""
    n_batches = pd.Series(batches).groupby(labels).nunique()
    means = pd.Series(by_label).groupby(labels).mean()
    return float(means[n_batches == n_batches.min()].mean())


def _pcr_comparison(unintegrated: np.ndarray, points: np.ndarray, batches: np.ndarray) -> float:
    """By how much the batches explain less variance than before integration."""
    import scib_metrics

    return float(scib_metrics.pcr_comparison(unintegrated, points, batches, categorical=True))


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
