"""The linear probe against scikit-learn, on made-up cells with a known answer, and on real ones."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation import linear_probe as module
from scmodelforge.evaluation.baselines import log_normalized, pca_embedding
from scmodelforge.evaluation.benchmark import Method, Scores
from scmodelforge.evaluation.linear_probe import BENCHMARK
from scmodelforge.evaluation.splits import probe_splits
from tests.evaluation.cells import evaluation_cells, method
from tests.helpers import marker_cells

BY_CELL = LinearProbeParams(group_key=None)


def cells(n_per_class: int, separation: float, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(4), n_per_class)
    embedding = rng.normal(size=(len(codes), 8)) + separation * np.eye(8)[codes]
    obs = pd.DataFrame({"cell_type": np.array(list("abcd"))[codes], "donor": rng.integers(0, 6, len(codes))})
    return embedding.astype(np.float32), obs


def scores(embedding: np.ndarray, obs: pd.DataFrame, params: LinearProbeParams, seed: int) -> Scores:
    return BENCHMARK.run([method(embedding)], evaluation_cells(obs), params, seed)["model"]


def test_separated_classes_score_one_and_noise_scores_chance():
    assert scores(*cells(50, 30), BY_CELL, 0).metrics["macro_f1"] == 1.0
    noise = scores(*cells(300, 0), BY_CELL, 0)
    assert noise.metrics["accuracy"] == pytest.approx(0.25, abs=0.06)
    low, high = noise.intervals["accuracy"]
    assert low < 0.25 < high


@pytest.mark.parametrize("group_key", [None, "donor", "auto"])
def test_equals_a_plain_sklearn_pipeline(group_key):
    embedding, obs = cells(60, 1.5)
    params = LinearProbeParams(group_key=group_key, n_splits=3)
    result = scores(embedding, obs, params, 7)
    labels = obs["cell_type"].to_numpy().astype(str)
    groups = obs["donor"].to_numpy() if group_key else None
    figures: dict[str, list[float]] = {"accuracy": [], "macro_f1": [], "weighted_f1": []}
    truth, guessed = [], []
    for train, test in probe_splits(labels, params, groups, 7):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        predicted = pipeline.fit(embedding[train], labels[train]).predict(embedding[test])
        figures["accuracy"].append(accuracy_score(labels[test], predicted))
        figures["macro_f1"].append(f1_score(labels[test], predicted, average="macro"))
        figures["weighted_f1"].append(f1_score(labels[test], predicted, average="weighted"))
        truth, guessed = [*truth, *labels[test]], [*guessed, *predicted]
    for name, by_split in figures.items():
        assert result.metrics[name] == pytest.approx(np.mean(by_split))
        assert result.metrics[f"{name}_std"] == pytest.approx(np.std(by_split, ddof=1))
        low, high = result.intervals[name]
        assert low < result.metrics[name] < high
    facts = [result.metrics[name] for name in ("n_splits", "n_classes", "n_cells", "split")]
    assert facts == [3, 4, 240, "by donor" if group_key else "by cell, stratified"]

    expected = np.stack(precision_recall_fscore_support(truth, guessed))
    per_class = [
        [row[name] for name in ("precision", "recall", "f1", "n")] for row in result.details["per_class"]
    ]
    np.testing.assert_allclose(np.transpose(per_class), expected)
    assert result.details["confusion"] == {
        "labels": ["a", "b", "c", "d"],
        "counts": confusion_matrix(truth, guessed).tolist(),
    }


def test_all_genes_and_the_largest_class_are_fitted_in_the_same_splits():
    adata = marker_cells(200)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    baselines = [Method("log_normalized", True), Method("majority", True), Method("pca", True, None)]
    found = BENCHMARK.run(baselines, evaluation_cells(adata.obs, adata.X), LinearProbeParams(n_splits=2), 1)
    assert list(found) == ["log_normalized", "majority"]  # the third has no embedding
    labels, groups = adata.obs["cell_type"].to_numpy(), adata.obs["donor"].cat.codes.to_numpy()
    genes, majority, values = [], [], log_normalized(adata.X)
    for train, test in probe_splits(labels, LinearProbeParams(n_splits=2), groups, 1):
        fitted = LogisticRegression(max_iter=1000, tol=1e-3).fit(values[train], labels[train])
        genes.append(f1_score(labels[test], fitted.predict(values[test]), average="macro"))
        majority.append((labels[test] == pd.Series(labels[train]).mode()[0]).mean())
    assert found["log_normalized"].metrics["macro_f1"] == pytest.approx(np.mean(genes))
    assert found["majority"].metrics["accuracy"] == pytest.approx(np.mean(majority))


def test_the_same_seed_gives_the_same_figures_and_another_seed_others():
    data = cells(60, 1.5)
    first, again, other = (scores(*data, LinearProbeParams(), seed) for seed in (1, 1, 2))
    assert (first.metrics, first.intervals) == (again.metrics, again.intervals)
    assert first.metrics != other.metrics


def test_left_out_cells_do_not_count():
    embedding, obs = cells(20, 30)
    obs.loc[0, "cell_type"] = None
    obs.loc[1, "cell_type"] = "rare"
    embedding[0] = 20
    params = LinearProbeParams(drop_unlabelled=True, drop_small_classes=True, group_key=None)
    metrics = scores(embedding, obs, params, 0).metrics
    assert (metrics["n_cells"], metrics["n_classes"], metrics["accuracy"]) == (78, 4, 1.0)
    with pytest.raises(DataError, match="'rare'"):
        BENCHMARK.check(evaluation_cells(obs), LinearProbeParams(drop_unlabelled=True), 0)


def test_one_split_has_no_spread():
    assert scores(*cells(20, 1), LinearProbeParams(n_splits=1), 0).metrics["accuracy_std"] == 0.0


def test_a_fit_that_stops_early_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    with caplog.at_level(logging.WARNING, "scmodelforge.evaluation.linear_probe"):
        scores(*cells(50, 1), LinearProbeParams(group_key=None), 0)
    assert [record.getMessage() for record in caplog.records if record.name.endswith("linear_probe")] == [
        "the linear probe of model did not converge within 2 iterations in 5 of 5 splits: "
        "its scores may be a little too low"
    ]


@pytest.mark.parametrize(
    ("name", "macro_f1", "split"),
    [("pbmc_sorted_zheng", 0.883, "by cell, stratified"), ("gut_crohns_kong", 0.885, "by donor")],
)
def test_pca_of_real_cells_reaches_the_known_bar(real_data, name, macro_f1, split):
    """The bars are 5-fold figures of an independent script; random splits differ by their spread."""
    adata = anndata.read_h5ad(real_data / f"{name}.h5ad")
    metrics = scores(pca_embedding(adata.X, 0), adata.obs, LinearProbeParams(), 0).metrics
    assert metrics["macro_f1"] == pytest.approx(macro_f1, abs=0.02)
    assert metrics["split"] == split
