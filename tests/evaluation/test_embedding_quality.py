"""The scIB metrics against scib-metrics' own functions on the same cells. Its compilation takes a minute."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pandas as pd
import pytest

from scmodelforge.config_eval import EmbeddingQualityParams
from scmodelforge.errors import DataError, MissingExtraError
from scmodelforge.evaluation import embedding_quality as module
from scmodelforge.evaluation.embedding_quality import embedding_quality

needs_scib = pytest.mark.skipif(
    importlib.util.find_spec("scib_metrics") is None, reason="scib-metrics (extra eval) is not installed"
)


def cells(separation: float = 3.0, n_per_class: int = 50) -> tuple[np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(4), n_per_class)
    embedding = rng.normal(size=(len(codes), 8)) + separation * np.eye(8)[codes]
    batch = np.tile(["x", "y"], len(codes) // 2)
    embedding[batch == "y", 7] += 1.0
    return embedding.astype(np.float32), pd.DataFrame(
        {"cell_type": np.array(list("abcd"))[codes], "batch": batch}
    )


@pytest.fixture(scope="module")
def scored() -> dict[str, float]:
    return embedding_quality(*cells(), EmbeddingQualityParams(batch_key="batch"), 0)


@needs_scib
@pytest.mark.slow
def test_equals_the_functions_of_scib_metrics(scored):
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.metrics import pairwise_distances

    embedding, obs = cells()
    labels, batch = (obs[key].to_numpy() for key in ("cell_type", "batch"))
    distances = pairwise_distances(embedding.astype(np.float64))
    order = np.argsort(distances, axis=1)[:, :90]
    near = NeighborsResults(
        indices=order, distances=np.take_along_axis(distances, order, 1).astype(np.float32)
    )
    clusters = scib_metrics.nmi_ari_cluster_labels_kmeans(embedding, labels)
    expected = {
        "nmi_kmeans": clusters["nmi"],
        "ari_kmeans": clusters["ari"],
        "silhouette_label": scib_metrics.silhouette_label(embedding, labels),
        "silhouette_batch": scib_metrics.silhouette_batch(embedding, labels, batch),
        "isolated_labels": scib_metrics.isolated_labels(embedding, labels, batch),
        "bras": scib_metrics.bras(embedding, labels, batch),
        "clisi": scib_metrics.clisi_knn(near, labels),
        "ilisi": scib_metrics.ilisi_knn(near, batch),
        "kbet": scib_metrics.kbet_per_label(near.subset_neighbors(50), batch, labels),
        "graph_connectivity": scib_metrics.graph_connectivity(near.subset_neighbors(15), labels),
    }
    assert {name: scored[name] for name in expected} == pytest.approx(expected, abs=1e-4)


@needs_scib
@pytest.mark.slow
def test_aggregates_are_the_weighted_means(scored):
    biology = ["nmi_kmeans", "ari_kmeans", "silhouette_label", "clisi", "isolated_labels"]
    mixing = ["bras", "ilisi", "kbet", "graph_connectivity"]
    assert scored["bio_conservation"] == pytest.approx(np.mean([scored[name] for name in biology]))
    assert scored["batch_correction"] == pytest.approx(np.mean([scored[name] for name in mixing]))
    assert scored["total"] == pytest.approx(
        0.6 * scored["bio_conservation"] + 0.4 * scored["batch_correction"]
    )
    assert (scored["n_cells"], scored["n_classes"], scored["n_batches"]) == (200, 4, 2)


@needs_scib
def test_without_batches_the_total_is_the_biology():
    root = logging.root.handlers[:]
    perfect = embedding_quality(*cells(separation=40), EmbeddingQualityParams(), 0)
    assert perfect["nmi_kmeans"] == perfect["ari_kmeans"] == 1.0
    assert perfect["total"] == perfect["bio_conservation"] > 0.95
    assert "batch_correction" not in perfect
    noise = embedding_quality(*cells(separation=0), EmbeddingQualityParams(), 0)
    assert noise["ari_kmeans"] == pytest.approx(0, abs=0.05)
    assert logging.root.handlers == root


@needs_scib
def test_large_data_are_subsampled_by_the_seed(monkeypatch, caplog):
    monkeypatch.setattr(module, "_scib", lambda points, labels, batches: {"sum": float(points.sum())})
    params = EmbeddingQualityParams(max_cells=120)
    with caplog.at_level(logging.INFO):
        first, again, other = (embedding_quality(*cells(), params, seed) for seed in (0, 0, 1))
    assert "120 of 200 cells" in caplog.text
    assert first["n_cells"] == 120
    assert first == again
    assert first["sum"] != other["sum"]


@needs_scib
def test_what_cannot_be_scored_is_refused_with_the_reason():
    embedding, obs = cells()
    with pytest.raises(DataError, match=r"90 neighbours of a cell, and tiny.h5ad leaves 40 cells"):
        embedding_quality(*cells(n_per_class=10), EmbeddingQualityParams(), 0, "tiny.h5ad")
    with pytest.raises(DataError, match=r"obs\['batch'\] of the data has one group only"):
        embedding_quality(embedding, obs.assign(batch="x"), EmbeddingQualityParams(batch_key="batch"), 0)
    with pytest.raises(DataError, match=r"occurs in two batches of obs\['batch'\](.|\n)*null"):
        embedding_quality(
            embedding, obs.assign(batch=obs["cell_type"]), EmbeddingQualityParams(batch_key="batch"), 0
        )
    with pytest.raises(DataError, match="no obs column 'bach'"):
        embedding_quality(embedding, obs, EmbeddingQualityParams(batch_key="bach"), 0)
    with pytest.raises(DataError, match="NaN or infinite"):
        embedding_quality(np.full_like(embedding, np.nan), obs, EmbeddingQualityParams(), 0)


@needs_scib
def test_an_undefined_metric_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "_scib", lambda *_: {"kbet": float("nan"), "clisi": 1.0})
    with pytest.raises(
        DataError, match=r"kbet of scib-metrics cannot be computed for the data \(200 cells\)"
    ):
        embedding_quality(*cells(), EmbeddingQualityParams(), 0)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"embedding_quality needs(.|\n)*scmodelforge\[eval\]"):
        embedding_quality(*cells(), EmbeddingQualityParams(), 0)
