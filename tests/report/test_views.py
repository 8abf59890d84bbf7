"""Benchmarks on a page: titles, names, what leads; and one colour and one macro F1 for the same cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

from scmodelforge.evaluation.seen import SEEN
from scmodelforge.finetuning.module import validation_metrics
from scmodelforge.models.bundle import Labels
from scmodelforge.report.benchmark_page import short_name, write_benchmark_report
from scmodelforge.report.benchmark_view import BenchmarkView, Headline, heading, headlines, view_benchmarks
from scmodelforge.report.cells_view import view_cells
from scmodelforge.report.results import read_results
from tests.report.examples import cells, results_file
from tests.report.pages import Page


def test_a_benchmark_page_has_a_title_and_says_seen_cells_once(tmp_path: Path) -> None:
    note = f"50 of 200 cells (25.0%) of cells.h5ad were {SEEN}, which flatters it."
    changes = {
        "model": "runs/mine/checkpoints/best.ckpt",
        "data": "some/cells.h5ad",
        "notes": [note, "Other."],
    }
    page = Page(write_benchmark_report(results_file(tmp_path / "metrics.json", **changes)))
    assert "Benchmark mine on cells.h5ad runs/mine/checkpoints/best.ckpt on some/cells.h5ad." in page.text
    assert "trained on 50 of these cells" in page.text
    assert "Other." in page.text
    assert SEEN not in page.text
    assert "on blood" not in page.text, "one data set needs no name"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/mine/model", "mine"),
        ("a/b/checkpoints/best.ckpt", "b"),
        ("model", "model"),
        ("hf://me/name@main", "name@main"),
        ("somewhere/weights", "weights"),
    ],
)
def test_short_names_of_models(model: str, name: str) -> None:
    assert short_name(model) == name


def test_the_aggregates_of_scib_lead(tmp_path: Path) -> None:
    def quality(method: str, batches: bool) -> dict:
        metrics = {"nmi_kmeans": 0.0, "clisi": 2 / 3, "bio_conservation": 0.4}
        metrics |= {"batch_correction": 0.9, "total": 0.6} if batches else {"total": 0.4}
        return {"benchmark": "embedding_quality", "dataset": "d", "method": method, "metrics": metrics}

    def view(batches: bool) -> tuple[BenchmarkView, list[Headline]]:
        rows = [quality(method, batches) for method in ("model", "pca")]
        results = read_results(results_file(tmp_path / "metrics.json", results=rows))
        (found,) = view_benchmarks(results)
        return found, headlines(results)

    found, (headline,) = view(batches=True)
    assert [panel.metric for panel in found.panels] == [
        *("total", "bio conservation", "batch correction"),
        *("NMI k-means", "cLISI"),
    ]
    assert (headline.label, headline.value) == ("Embedding quality: total", "0.600")
    assert ("0.667", "") in found.rows[0].cells
    assert found.panels[3].rows[0].text == "0", "no other figure of this metric has digits"
    assert view(batches=False)[0].panels[0].metric == "total"


def test_names_are_written_as_people_do() -> None:
    names = ("top1_accuracy", "clisi", "kbet", "linear_probe", "r2", "nmi_leiden", "knn_annotation")
    assert [heading(name) for name in names] == [
        *("Top-1 accuracy", "cLISI", "kBET", "Linear probe"),
        *("R²", "NMI Leiden", "k-NN annotation"),
    ]


def test_a_label_has_one_colour_whatever_cells_are_shown() -> None:
    names = ["B", "NK", "T"]
    every = cells(60, tuple(names))
    some = every[every.obs["cell_type"] != "B"].copy()
    for column in ("cell_type", "predicted"):
        some.obs[column] = pd.Categorical(some.obs[column].astype(str), names)
    one, other = ({c.name: c.colour for c in view_cells(shown).umaps[0].classes} for shown in (every, some))
    assert set(other) == {"NK", "T"}
    assert other == {name: one[name] for name in other}


def test_macro_f1_of_cells_is_that_of_training() -> None:
    """Class C is predicted and no cell has it: it counts as 0, in torchmetrics and in scikit-learn."""
    truth, predicted = ["A", "A", "B", "B", "B"] * 4, ["A", "C", "B", "B", "A"] * 4
    shown = cells(20)
    shown.obs["cell_type"], shown.obs["predicted"] = pd.Categorical(truth), pd.Categorical(predicted)
    metrics = validation_metrics(Labels("cell_type", "classification", ("A", "B", "C", "D")))
    metrics.update(*(torch.tensor(["ABCD".index(name) for name in names]) for names in (predicted, truth)))
    view = view_cells(shown).predictions
    assert view is not None
    figure = dict(view.figures)["macro F1"]
    assert figure == f"{float(metrics.compute()['val_macro_f1']):.3f}"
    assert figure == f"{f1_score(truth, predicted, average='macro', zero_division=0):.3f}"
    assert figure == f"{np.mean([record['f1'] for record in view.per_class]):.3f}", "the mean of the table"
