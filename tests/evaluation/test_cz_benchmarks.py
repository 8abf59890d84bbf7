"""Results in the form of cz-benchmarks: its names, our values, and nothing that it would misread."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from scmodelforge.errors import ModelError
from scmodelforge.evaluation.cz_benchmarks import NAMES, OF_CLASSES, to_cz_benchmarks

# The values of czbenchmarks.metrics.types.MetricType, version 0.15.1.
THEIRS = {
    "adjusted_rand_index",
    "normalized_mutual_info",
    "silhouette_score",
    "entropy_per_cell",
    "batch_silhouette",
    "mean_squared_error",
    "PEARSON_CORRELATION",
    *(
        f"{prefix}{name}"
        for name in ("accuracy", "f1", "precision", "recall")
        for prefix in ("", "mean_fold_")
    ),
}


def row(benchmark: str, method: str = "model", **metrics: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "dataset": "pbmc", "method": method, "metrics": metrics}


def test_figures_get_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = {"accuracy": 0.8, "accuracy_std": 0.1, "macro_f1": 0.7, "n_splits": 5, "split": "by donor"}
    rows = [
        row("linear_probe", **probe),
        row("linear_probe", "pca", **probe | {"n_splits": 1}),
        row("embedding_quality", silhouette_label=0.6, nmi_kmeans=0.5, kbet=0.4, n_cells=90),
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": rows}))
    with caplog.at_level(logging.INFO, "scmodelforge"):
        found = to_cz_benchmarks(file)
    assert "left out: kbet" in caplog.text
    model = {"benchmark": "linear_probe", "dataset": "pbmc", "method": "model"}
    assert found[:2] == [
        {
            "metric_type": "mean_fold_accuracy",
            "value": 0.8,
            "params": model | {"split": "by donor", "classifier": "lr"},
        },
        {
            "metric_type": "mean_fold_f1",
            "value": 0.7,
            "params": model | {"split": "by donor", "classifier": "lr", "average": "macro"},
        },
    ]
    assert [(one["metric_type"], one["value"]) for one in found[2:]] == [
        ("accuracy", 0.8),
        ("f1", 0.7),
        ("silhouette_score", 0.6),
        ("normalized_mutual_info", 0.5),
    ]
    assert found[-1]["params"]["clustering"] == "kmeans"
    assert json.loads(json.dumps(found)) == found


def test_every_name_is_one_of_theirs() -> None:
    kinds = {kind for kind, _ in NAMES.values()} | {
        prefix + kind for kind, _ in OF_CLASSES.values() for prefix in ("", "mean_fold_")
    }
    assert kinds <= THEIRS


def test_what_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ModelError, match="no benchmark results"):
        to_cz_benchmarks(tmp_path / "x.json")
