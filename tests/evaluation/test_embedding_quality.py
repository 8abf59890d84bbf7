"""The scIB metrics against scib-metrics' own functions and `Benchmarker` on the same cells (compiles for a minute)."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from scmodelforge.config_eval import EmbeddingQualityParams
from scmodelforge.errors import DataError, MissingExtraError
from scmodelforge.evaluation import embedding_quality as module
from scmodelforge.evaluation.embedding_quality import embedding_quality
from scmodelforge.evaluation.kbet import kbet_per_label
from scmodelforge.evaluation.neighbors import nearest_neighbors

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


def unintegrated() -> np.ndarray:
    """As the embedding, with more of the batch in it."""
    embedding, obs = cells()
    embedding[obs["batch"] == "y", 6:] += 2.0
    return embedding


@pytest.fixture(scope="module")
def scored() -> dict[str, float]:
    params = EmbeddingQualityParams(batch_key="batch")
    return embedding_quality(*cells(), params, 0, unintegrated=unintegrated())


@needs_scib
@pytest.mark.slow
def test_what_stands_beside_the_aggregate_equals_the_functions_of_scib_metrics(scored):
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    embedding, obs = cells()
    labels, batch = (obs[key].to_numpy() for key in ("cell_type", "batch"))
    distances = cdist(embedding, embedding)
    order = np.argsort(distances, axis=1)[:, :15]
    near = NeighborsResults(
        indices=order, distances=np.take_along_axis(distances, order, 1).astype(np.float32)
    )
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(near, labels)
    expected = {
        "silhouette_batch": scib_metrics.silhouette_batch(embedding, labels, batch),
        "nmi_leiden": leiden["nmi"],
        "ari_leiden": leiden["ari"],
    }
    assert {name: scored[name] for name in expected} == pytest.approx(expected, abs=1e-4)


@needs_scib
@pytest.mark.slow
def test_equals_the_benchmarker_with_its_default_metrics(scored):
    import anndata as ad
    from scib_metrics.benchmark import Benchmarker
    from scib_metrics.nearest_neighbors import NeighborsResults

    embedding, obs = cells()
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(obs=obs, obsm={"embedding": embedding, "before": unintegrated()})
    benchmarker = Benchmarker(
        adata,
        "batch",
        "cell_type",
        ["embedding"],
        pre_integrated_embedding_obsm_key="before",
        progress_bar=False,
    )
    benchmarker.prepare(lambda points, k: NeighborsResults(*nearest_neighbors(points, k)))
    benchmarker.benchmark()
    table = benchmarker.get_results(clean_names=False).loc["embedding"]
    ours = {
        "nmi_ari_cluster_labels_kmeans_nmi": "nmi_kmeans",
        "nmi_ari_cluster_labels_kmeans_ari": "ari_kmeans",
        "clisi_knn": "clisi",
        "ilisi_knn": "ilisi",
        "kbet_per_label": "kbet",
        "Bio conservation": "bio_conservation",
        "Batch correction": "batch_correction",
        "Total": "total",
    }
    assert len(table) == 13
    assert {name: scored[ours.get(name, name)] for name in table.index} == pytest.approx(
        table.astype(float).to_dict(), abs=1e-4
    )
    assert (scored["n_cells"], scored["n_classes"], scored["n_batches"]) == (200, 4, 2)


@needs_scib
@pytest.mark.slow
def test_kbet_is_that_of_scib_metrics_on_classes_of_many_shapes(monkeypatch):
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    def exact(points, n_neighbors, **_):
        return NeighborsResults(*nearest_neighbors(points, n_neighbors))

    rng = np.random.default_rng(0)
    sizes = {"large": 400, "small": 25, "tiny": 6, "torn": 120, "one batch": 40}
    labels = np.repeat(list(sizes), list(sizes.values()))
    points = 20 * np.unique(labels, return_inverse=True)[1][:, None] + rng.normal(size=(len(labels), 6))
    points[labels == "torn"] += 500 * rng.integers(0, 12, (120, 1))  # many parts, and too few cells in each
    batches = rng.choice([0, 1, 2], len(labels), p=[0.5, 0.3, 0.2])
    batches[labels == "one batch"] = 0
    points[batches == 1, 0] += 0.5
    near = exact(points.astype(np.float32), 16)
    monkeypatch.setattr(scib_metrics.nearest_neighbors, "pynndescent", exact)
    expected = scib_metrics.kbet_per_label(near, batches, labels)
    assert 0.2 < expected < 0.9
    assert kbet_per_label(near.knn_graph_connectivities, batches, labels) == pytest.approx(expected, abs=1e-6)


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
    monkeypatch.setattr(module, "_scib", lambda points, labels, batches: {"clisi": float(points.sum())})
    params = EmbeddingQualityParams(max_cells=120)
    with caplog.at_level(logging.INFO):
        first, again, other = (embedding_quality(*cells(), params, seed) for seed in (0, 0, 1))
    assert "120 of 200 cells" in caplog.text
    assert first["n_cells"] == 120
    assert first == again
    assert first["clisi"] != other["clisi"]


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
