"""Label transfer against scikit-learn's classifier, and on cells with a known answer."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from scmodelforge.config_eval import KnnAnnotationParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method
from scmodelforge.evaluation.knn_annotation import BENCHMARK, vote
from scmodelforge.evaluation.linear_probe import probe_cells


def evaluation_cells(obs: pd.DataFrame) -> EvaluationCells:
    return EvaluationCells(SimpleNamespace(obs=obs), None, None, "cells.h5ad")


def triangle(n_per_class: int = 60, spread: float = 0.3) -> tuple[np.ndarray, pd.DataFrame]:
    """Three classes at a distance; "between" lies halfway between "left" and "right"."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(3), n_per_class)
    centres = np.array([[-10.0, 0], [0, 0], [10, 0]])
    spreads = np.array([spread, spread / 100, spread])  # nearer to neither, so both vote
    cells = centres[codes] + spreads[codes, None] * rng.normal(size=(len(codes), 2))
    donor = np.tile(["d1", "d2", "d3", "d4"], len(codes) // 4)
    names = np.array(["left", "between", "right"])[codes]
    return cells.astype(np.float32), pd.DataFrame({"cell_type": names, "donor": donor})


def scored(embedding, obs, seed=0, **params):
    params = KnnAnnotationParams(**{"group_key": None, "n_splits": 1, **params})
    cells = evaluation_cells(obs)
    BENCHMARK.check(cells, params, seed)
    methods = [Method("model", False, embedding), Method("majority", True)]
    return BENCHMARK.run(methods, cells, params, seed)


def overlapping(n_cells: int = 900) -> tuple[np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(1)
    codes = rng.choice(4, n_cells, p=[0.4, 0.3, 0.2, 0.1])
    cells = rng.normal(size=(n_cells, 6)) + 1.5 * np.eye(6)[codes]
    donor = rng.choice(["x", "y", "z", "u", "v"], n_cells)
    return cells.astype(np.float32), pd.DataFrame(
        {"cell_type": np.array(list("abcd"))[codes], "donor": donor}
    )


@pytest.mark.parametrize("group_key", [None, "donor"])
def test_the_labels_are_those_of_scikit_learns_classifier(group_key):
    embedding, obs = overlapping()
    scores = scored(embedding, obs, group_key=group_key)["model"]
    used = probe_cells(obs, KnnAnnotationParams(group_key=group_key, n_splits=1), 0, "cells")
    train, test = used.splits[0]
    peer = KNeighborsClassifier(15, weights="distance").fit(embedding[train], used.truth[train])
    probabilities, truth = peer.predict_proba(embedding[test]), used.truth[test]
    predicted = probabilities.argmax(1)
    assert scores.metrics["accuracy"] == pytest.approx((predicted == truth).mean())
    assert scores.metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores.metrics["weighted_f1"] == pytest.approx(f1_score(truth, predicted, average="weighted"))
    brier = ((probabilities - np.eye(4)[truth]) ** 2).sum(1).mean()
    assert scores.metrics["brier"] == pytest.approx(brier, abs=1e-5)

    confidence = probabilities.max(1)
    edges = np.linspace(0, 1, 11)
    gaps = [
        abs(confidence[inside].sum() - (predicted == truth)[inside].sum())
        for low, high in pairwise(edges)
        for inside in [(confidence > low) & (confidence <= high)]
    ]
    assert scores.metrics["ece"] == pytest.approx(sum(gaps) / len(truth), abs=1e-5)

    for code, record in enumerate(scores.details["per_class"]):
        rest = train[used.truth[train] != code]
        without = KNeighborsClassifier(15, weights="distance").fit(embedding[rest], used.truth[rest])
        novelty = 1 - without.predict_proba(embedding[test]).max(1)
        expected = roc_auc_score(truth == code, novelty)
        assert record["auroc_held_out"] == pytest.approx(expected, abs=2e-3)


def test_separable_classes_are_labelled_and_the_one_between_two_is_found_to_be_new():
    embedding, obs = triangle()
    scores = scored(embedding, obs, held_out_classes=["between"])
    metrics = scores["model"].metrics
    assert (
        metrics["accuracy"] == metrics["macro_f1"] == metrics["coverage"] == metrics["accuracy_covered"] == 1
    )
    assert metrics["ece"] == metrics["brier"] == 0
    assert metrics["auroc_held_out"] == metrics["unknown_found"] == 1
    assert scores["model"].intervals["auroc_held_out"] == (1, 1)
    assert [record.get("auroc_held_out") for record in scores["model"].details["per_class"]] == [
        1,
        None,
        None,
    ]
    blind = scores["majority"].metrics
    assert blind["auroc_held_out"] == 0.5
    assert blind["accuracy"] == pytest.approx(1 / 3)


def test_noise_scores_as_chance_does():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"cell_type": rng.choice(list("abc"), 3000)})
    scores = scored(rng.normal(size=(3000, 5)).astype(np.float32), obs, n_splits=3)["model"]
    low, high = scores.intervals["auroc_held_out"]
    assert low < 0.5 < high
    assert scores.metrics["accuracy"] == pytest.approx(1 / 3, abs=0.05)
    assert scores.metrics["ece"] > 0.05  # the largest of three random shares is above 1/3


def test_votes_of_equal_cells_count_alone():
    distances = np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 2.0]])
    found = vote(np.array([[1, 2, 0], [0, 1, 1]]), distances, 3)
    np.testing.assert_allclose(found, [[0, 0.5, 0.5], [0.5, 0.5, 0]])


def test_the_threshold_keeps_the_known_cells_of_a_new_donor():
    embedding, obs = overlapping()
    metrics = scored(embedding, obs, group_key="donor", n_splits=4)["model"].metrics
    assert metrics["coverage"] == pytest.approx(0.95, abs=0.03)
    assert metrics["accuracy_covered"] > metrics["accuracy"]
    assert metrics["split"] == "by donor"


def test_the_intervals_hold_the_figures_and_units_are_comparable():
    embedding, obs = overlapping()
    both = scored(embedding, obs, n_splits=3)
    for scores in both.values():
        for name in ("accuracy", "macro_f1", "brier", "coverage", "accuracy_covered", "auroc_held_out"):
            low, high = scores.intervals[name]
            assert low <= scores.metrics[name] <= high, name
    assert both["model"].units["accuracy"].shape == both["majority"].units["accuracy"].shape
    assert scored(embedding, obs, n_splits=3)["model"].intervals == both["model"].intervals


def test_two_classes_hold_none_out(caplog):
    embedding, obs = triangle()
    two = (obs["cell_type"] != "between").to_numpy()
    with caplog.at_level(logging.INFO):
        metrics = scored(embedding[two], obs[two])["model"].metrics
    assert "auroc_held_out" not in metrics
    assert "with two classes none is held out" in caplog.text


def test_what_cannot_be_used_is_refused_with_the_reason():
    embedding, obs = triangle()
    with pytest.raises(DataError, match=r"names 'letf'(.|\n)*Did you mean 'left'\?(.|\n)*to null"):
        scored(embedding, obs, held_out_classes=["letf"])
    with pytest.raises(DataError, match=r"asks 140 reference cells(.|\n)*leaves 96(.|\n)*Lower n_neighbors"):
        scored(embedding, obs, n_neighbors=140)
    with pytest.raises(DataError, match="'model' has collapsed"):
        scored(np.ones_like(embedding), obs)
    two = (obs["cell_type"] != "between").to_numpy()
    with pytest.raises(DataError, match=r"needs a third class(.|\n)*held_out_classes: \[\]"):
        scored(embedding[two], obs[two], held_out_classes=["left"])


def test_donors_of_real_cells_are_annotated_from_others(real_data):
    import anndata as ad

    from scmodelforge.evaluation.baselines import pca_embedding

    adata = ad.read_h5ad(real_data / "pancreas_baron_human.h5ad")
    params = {"group_key": "batch", "drop_small_classes": True, "min_cells_per_class": 10}
    metrics = scored(pca_embedding(adata.X, seed=0), adata.obs, n_splits=3, **params)["model"].metrics
    assert metrics["accuracy"] > 0.95  # as the linear probe
    assert metrics["ece"] < 0.05
    assert metrics["auroc_held_out"] > 0.6


def test_a_benchmark_file_may_ask_for_it(pretrained, tmp_path):
    import json

    from scmodelforge.config import Config
    from scmodelforge.evaluation.harness import evaluate
    from tests.helpers import marker_cells

    spec = {"name": "knn_annotation", "params": {"group_key": "donor", "n_splits": 2}}
    config = Config.model_validate({"eval": {"benchmarks": [spec], "baselines": ["pca", "majority"]}})
    evaluate(config, pretrained.checkpoint_dir / "best.ckpt", marker_cells(), tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["model", "pca", "majority"]
    assert results[0]["comparison"]["baseline"] == "pca"
    assert results[1]["metrics"]["accuracy"] > results[2]["metrics"]["accuracy"]
    assert results[1]["details"]["reliability"][-1]["high"] == 1
