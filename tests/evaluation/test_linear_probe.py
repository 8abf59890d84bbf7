"""The linear probe against scikit-learn, on made-up cells with a known answer, and on real ones."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation import linear_probe as module
from scmodelforge.evaluation.baselines import pca_embedding
from scmodelforge.evaluation.linear_probe import linear_probe
from scmodelforge.evaluation.splits import probe_splits


def cells(n_per_class: int, separation: float, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(4), n_per_class)
    embedding = rng.normal(size=(len(codes), 8)) + separation * np.eye(8)[codes]
    obs = pd.DataFrame({"cell_type": np.array(list("abcd"))[codes], "donor": rng.integers(0, 6, len(codes))})
    return embedding.astype(np.float32), obs


def test_separated_classes_score_one_and_noise_scores_chance():
    assert linear_probe(*cells(50, 30), LinearProbeParams(), 0)["macro_f1"] == 1.0
    assert linear_probe(*cells(300, 0), LinearProbeParams(), 0)["accuracy"] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("group_key", [None, "donor"])
def test_equals_a_plain_sklearn_pipeline(group_key):
    embedding, obs = cells(60, 1.5)
    params = LinearProbeParams(group_key=group_key, n_splits=3)
    result = linear_probe(embedding, obs, params, 7)
    labels = obs["cell_type"].to_numpy().astype(str)
    groups = obs["donor"].to_numpy() if group_key else None
    accuracy, f1 = [], []
    for train, test in probe_splits(labels, params, groups, 7):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        predicted = pipeline.fit(embedding[train], labels[train]).predict(embedding[test])
        accuracy.append(accuracy_score(labels[test], predicted))
        f1.append(f1_score(labels[test], predicted, average="macro"))
    assert result["accuracy"] == pytest.approx(np.mean(accuracy))
    assert result["macro_f1"] == pytest.approx(np.mean(f1))
    assert result["macro_f1_std"] == pytest.approx(np.std(f1, ddof=1))
    assert (result["n_splits"], result["n_classes"], result["n_cells"]) == (3, 4, 240)
    assert result["split"] == ("by donor" if group_key else "by cell, stratified")


def test_the_same_seed_gives_the_same_figures_and_another_seed_others():
    data = cells(60, 1.5)
    first, again, other = (linear_probe(*data, LinearProbeParams(), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_left_out_cells_do_not_count():
    embedding, obs = cells(20, 30)
    obs.loc[0, "cell_type"] = None
    obs.loc[1, "cell_type"] = "rare"
    embedding[0] = 1e6
    params = LinearProbeParams(drop_unlabelled=True, drop_small_classes=True)
    result = linear_probe(embedding, obs, params, 0)
    assert (result["n_cells"], result["n_classes"], result["accuracy"]) == (78, 4, 1.0)
    with pytest.raises(DataError, match="'rare'"):
        linear_probe(embedding, obs, LinearProbeParams(drop_unlabelled=True), 0)


def test_one_split_has_no_spread():
    assert linear_probe(*cells(20, 1), LinearProbeParams(n_splits=1), 0)["accuracy_std"] == 0.0


def test_a_fit_that_stops_early_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    with caplog.at_level(logging.WARNING):
        linear_probe(*cells(50, 1), LinearProbeParams(), 0)
    assert [record.getMessage() for record in caplog.records] == [
        "the linear probe did not converge within 2 iterations in 5 of 5 splits: "
        "its scores may be a little too low"
    ]


@pytest.mark.parametrize(
    ("name", "group_key", "macro_f1"),
    [("pbmc_sorted_zheng", None, 0.883), ("gut_crohns_kong", "donor", 0.885)],
)
def test_pca_of_real_cells_reaches_the_known_bar(real_data, name, group_key, macro_f1):
    """The bars are 5-fold figures of an independent script; random splits differ by their spread."""
    adata = anndata.read_h5ad(real_data / f"{name}.h5ad")
    result = linear_probe(pca_embedding(adata.X, 0), adata.obs, LinearProbeParams(group_key=group_key), 0)
    assert result["macro_f1"] == pytest.approx(macro_f1, abs=0.02)
