"""The harness: one model and its baselines on the same cells, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.errors import DataError, MissingExtraError
from scmodelforge.evaluation import harness
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores
from scmodelforge.evaluation.harness import benchmark, evaluate
from scmodelforge.evaluation.uncertainty import paired_test
from tests.helpers import marker_cells

BASELINES = ["pca", "log_normalized", "untrained", "majority"]


def config(**evaluation: Any) -> Config:
    return Config.model_validate({"eval": evaluation})


class Stub:
    """A benchmark that gives each method the scores that a test wants."""

    def __init__(self, units: dict[str, list[float]], metrics: dict[str, float] | None = None) -> None:
        self.units, self.metrics = units, metrics or {}

    def check(self, cells: EvaluationCells, params: Any, seed: int) -> None:
        pass

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: Any, seed: int
    ) -> dict[str, Scores]:
        return {
            name: Scores({"score": float(np.mean(units)), **self.metrics}, units={"score": np.array(units)})
            for name, units in self.units.items()
        }


def with_stub(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> None:
    monkeypatch.setattr(
        registry, "BENCHMARKS", SimpleNamespace(load=lambda name: stub, group=registry.BENCHMARKS.group)
    )


def test_every_method_is_scored_on_the_same_cells(pretrained, tmp_path):
    cells = marker_cells(160, seed=3)
    results = benchmark(Config(), pretrained.model, cells, tmp_path / "r.json")
    assert [result.method for result in results] == ["model", *BASELINES]
    assert len({(result.metrics["split"], result.metrics["n_test"]) for result in results}) == 1
    figures = {result.method: result.metrics["macro_f1"] for result in results}
    assert figures["model"] > figures["majority"]
    assert figures["log_normalized"] > 0.9
    for result in results:
        low, high = result.intervals["macro_f1"]
        assert low <= result.metrics["macro_f1"] <= high
        assert sum(row["n"] for row in result.details["per_class"]) == np.sum(
            result.details["confusion"]["counts"]
        )
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record) >= {"model", "data", "n_cells", "seed", "command", "versions", "notes", "results"}
    assert (record["model"], record["command"]) == ("memory", None)
    assert record["results"][0]["comparison"] == results[0].comparison
    assert any("split by obs['donor'] (4 groups)" in note for note in record["notes"])


def test_the_model_is_tested_against_the_best_baseline(monkeypatch, pretrained):
    units = {"model": [0.9, 0.8, 0.4], "pca": [0.1, 0.2, 0.3], "untrained": [0.8, 0.7, 0.5]}
    with_stub(monkeypatch, Stub(units))
    model, *baselines = benchmark(config(baselines=[]), pretrained.model, marker_cells(60))
    expected = paired_test(np.array(units["model"]), np.array(units["untrained"]), 0)
    assert model.comparison == {
        "metric": "score",
        "baseline": "untrained",
        "difference": expected.difference,
        "interval": list(expected.interval),
        "p_value": expected.p_value,
    }
    assert [(row.is_baseline, row.comparison) for row in baselines] == [(True, None)] * 2


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([0.1, 0.2, 0.3], "the model is worse than its untrained self (score -0.300 ["),
        ([0.6, 0.5, 0.4], "the model is not shown to be better than its untrained self (score +0.000 ["),
        ([0.8, 0.8, 0.8], None),
    ],
)
def test_a_model_that_its_untrained_self_equals_is_told(monkeypatch, pretrained, units, expected):
    with_stub(monkeypatch, Stub({"model": units, "pca": [0.9, 0.9, 0.9], "untrained": [0.4, 0.5, 0.6]}))
    said = evaluate(config(baselines=[]), pretrained.model, marker_cells(60)).notes
    found = [note for note in said if "untrained self" in note]
    assert len(found) == (expected is not None)
    assert not found or found[0].startswith(
        f"linear_probe on {config().eval.benchmarks[0].dataset}: {expected}"
    )


def test_a_figure_that_is_no_number_is_an_error(monkeypatch, pretrained, tmp_path):
    with_stub(monkeypatch, Stub({"model": [1.0]}, {"lost": float("nan")}))
    with pytest.raises(DataError, match="lost of the benchmark linear_probe of model is not a number"):
        benchmark(config(baselines=[]), pretrained.model, marker_cells(60), tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_labels_are_checked_before_anything_is_embedded(monkeypatch, pretrained):
    monkeypatch.setattr(harness, "embed_store", lambda *_: pytest.fail("cells were embedded"))
    cells = marker_cells(60)
    cells.obs = cells.obs.drop(columns="cell_type")
    with pytest.raises(DataError, match="has no obs column 'cell_type'"):
        benchmark(Config(), pretrained.model, cells)


def test_harmony_needs_its_package_and_batches(monkeypatch, pretrained):
    pytest.importorskip("harmonypy")
    cells = marker_cells(60)
    cells.obs = cells.obs.drop(columns="donor")
    with pytest.raises(DataError, match=r"harmony corrects for batches(.|\n)*batch_key of embedding_quality"):
        benchmark(config(baselines=["harmony"]), pretrained.model, cells)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("harmony", "harmonypy", "baselines"), ("scvi", "scvi", "scvi")]
)
def test_a_baseline_that_is_not_installed_is_named(monkeypatch, pretrained, name, package, extra):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else found(asked))
    with pytest.raises(MissingExtraError, match=rf"baseline {name} needs(.|\n)*scmodelforge\[{extra}\]"):
        benchmark(config(baselines=[name]), pretrained.model, marker_cells(60))


def test_notes_are_collected_without_repeats_and_without_progress(pretrained):
    cells = marker_cells(160, seed=3)
    cells.obs.loc[cells.obs.index[:7], "cell_type"] = None
    spec = {"name": "linear_probe", "params": {"drop_unlabelled": True, "group_key": None}}
    notes = evaluate(config(benchmarks=[spec]), pretrained.model, cells).notes
    assert len(notes) == len(set(notes))
    assert sum("7 of 160 cells without a label" in note for note in notes) == 1
    assert sum("split by cell (as asked)" in note for note in notes) == 1
    assert not any("linear_probe on test: model, pca" in note for note in notes)
