"""What the pages say, and that names from data stay text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from anndata import read_h5ad

from scmodelforge.cli_output import finish_run
from scmodelforge.data.split import split_cells
from scmodelforge.errors import DataError, UserError
from scmodelforge.evaluation.shown_cells import write_cells
from scmodelforge.inference import embed_store, open_for, predict_store
from scmodelforge.models.bundle import load_model
from scmodelforge.report.benchmark_page import write_benchmark_report
from scmodelforge.report.benchmark_view import in_words
from scmodelforge.report.comparison import compare
from scmodelforge.report.results import Comparison
from scmodelforge.report.run_page import write_report
from scmodelforge.training.run import RunResult
from tests.helpers import marker_cells
from tests.report.examples import ATTACK, RESULTS, cells, hostile_results, results_file, run_folder
from tests.report.pages import Page


@pytest.fixture(scope="module")
def tuned(annotator: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run folder that `finetune` left, with its report."""
    folder = tmp_path_factory.mktemp("copy") / "tuned"
    shutil.copytree(annotator.run_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    write_report(folder)
    return folder


def test_training_leaves_its_validation_cells(tuned: Path) -> None:
    left = read_h5ad(tuned / "validation_cells.h5ad")
    bundle = load_model(tuned / "model")
    store = open_for(bundle, marker_cells())
    labels = store.obs["cell_type"].to_numpy()
    _, rows = split_cells(store.obs, bundle.config.data.split, bundle.config.training.seed, labels)
    assert list(left.obs_names) == list(store.obs.index[rows])
    np.testing.assert_allclose(left.obsm["X_scmodelforge"], embed_store(bundle, store, rows=rows), atol=1e-5)
    assert list(left.obs["cell_type"]) == list(labels[rows])
    predicted = predict_store(bundle, store)["scmodelforge_cell_type"].to_numpy()[rows]
    assert list(left.obs["scmodelforge_cell_type"]) == list(predicted)
    assert left.uns["scmodelforge"]["batch"] == "donor"
    assert left.obsm["X_umap"].shape == (60, 2), "the report keeps its layout there"


def test_a_report_shows_cells_and_predictions(tuned: Path) -> None:
    page, left = Page(tuned / "report.html"), read_h5ad(tuned / "validation_cells.h5ad")
    assert "Fine-tuning for cell_type" in page.text
    assert "All 60 validation cells." in page.text
    titles = [
        a["aria-label"] or "" for name, a in page.tags if name == "svg" and a["aria-label"].startswith("UMAP")
    ]
    assert [title.partition(":")[0].removeprefix("UMAP coloured by ") for title in titles] == [
        "Label",
        "Prediction",
        "Batch",
    ]
    right = (left.obs["cell_type"].astype(str) == left.obs["scmodelforge_cell_type"].astype(str)).mean()
    assert f"accuracy {right:.3f}" in page.text
    for name, n in left.obs["cell_type"].value_counts().items():
        assert f"{name} {n}" in page.text
    assert "240 cells: 180 train, 60 validate, none is left out" in page.text
    assert page.foreign() == []


def test_a_report_is_the_same_again(tuned: Path) -> None:
    first = (tuned / "report.html").read_bytes()
    assert write_report(tuned).read_bytes() == first


def test_a_report_of_a_run_says_what_it_was(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    results_file(folder / "benchmark.json")
    page = Page(write_report(folder))
    for words in (
        "Pretraining",
        "validation loss 3.027 best model, step 75; 3.520 at the end",
        "training cells 80 15 validate",
        "parameters 1,234",
        "waiting for data 12.5 % padding 0.0 %",
        "100 cells: 80 train, 15 validate, 5 do neither",
        "5 cells have no count.",
        "2 met the model's vocabulary, 1 did not",
        "left out 1 unknown name",
        "scmodelforge train --config 'my config.yaml'",
        "Typed in /home/me",
        "git commit none: the working folder is no git repository",
        "From benchmark.json",
        "The run left no validation_cells.h5ad",
    ):
        assert words in page.text, words
    labels = [a.get("aria-label") for name, a in page.tags if name == "svg"]
    assert any(
        (label or "").startswith("Loss by optimizer step: training (running mean) from") for label in labels
    )
    assert any("Waiting and padding" in (label or "") for label in labels)


def test_a_stopped_run_and_one_from_python_are_told_apart(tmp_path: Path) -> None:
    stopped = run_folder(tmp_path / "a", {"interrupted": True, "performance": {}, "command": ["script.py"]})
    page = Page(write_report(stopped))
    assert "Stopped before its end" in page.text
    assert "The run was started from Python, not by a command." in page.text
    assert f"scmodelforge train --config {stopped}/config.yaml" in page.text
    in_memory = {"files": ["AnnData"], "n_cells": 9, "n_train": 9, "n_val": 0, "train_cells": "abc"}
    page = Page(write_report(run_folder(tmp_path / "b", {"command": ["script.py"], "data": in_memory})))
    assert "Its cells were in memory." in page.text
    assert "No cells validate in this run (data.split.val_split is 0)" in page.text
    assert page.count("button") == 0, "there is no command to copy"


def test_few_cells_have_no_umap(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "few")
    few = cells(8)
    del few.obsm["X_umap"]
    write_cells(few, folder / "validation_cells.h5ad")
    page = Page(write_report(folder))
    assert "A UMAP needs at least 10 cells, and there are 8 validation cells." in page.text
    assert "accuracy 0.625" in page.text, "5 of 8 cells: each third one is wrong"


def test_names_from_data_stay_text(tmp_path: Path) -> None:
    record = {
        "notes": [ATTACK],
        "command": ["scmodelforge", "train", ATTACK],
        "folder": ATTACK,
        "data": {"files": [ATTACK], "n_cells": 9, "n_train": 5, "n_val": 4, "train_cells": ATTACK},
        "model": {"n_parameters": 1, "n_genes": 1, "labels": {"key": ATTACK}},
        "versions": {ATTACK: ATTACK},
    }
    folder = run_folder(tmp_path / "mine", record, model={"architecture": ATTACK}, data={"paths": [ATTACK]})
    write_cells(cells(40, ("B", ATTACK)), folder / "validation_cells.h5ad")
    (folder / "gene_match.csv").write_text(f'reason\n"{ATTACK.replace(chr(34), chr(34) * 2)}"\n')
    hostile_results(folder / "benchmark.json")
    hostile_results(tmp_path / "benchmark.json")
    other = run_folder(tmp_path / "other", model={"architecture": "transformer_encoder"})
    for path in (
        write_report(folder),
        write_benchmark_report(tmp_path / "benchmark.json"),
        compare([folder, other], tmp_path / "comparison.html"),
    ):
        page = Page(path)
        assert page.foreign() == [], path
        assert page.count("script") == 1, path
        assert ATTACK in page.text, path
        assert "<script>window" not in path.read_text(), path


def test_a_benchmark_page(tmp_path: Path) -> None:
    path = write_benchmark_report(results_file(tmp_path / "metrics.json"))
    assert path == tmp_path / "metrics.html"
    page = Page(path)
    for words in (
        "Linear probe: macro F1 0.800 95 %: 0.750 to 0.850. pca 0.700, untrained 0.550",
        "the model's macro F1 is 0.100 higher than that of pca, the best baseline (95 % interval of the difference "
        "0.040 to 0.160; paired test, p < 0.001). The interval leaves out 0: this is more than chance.",
        "cells 200 split by donor",
        "B 30 0.900 0.800 0.847",
        "The model was trained on 50 of these cells (25.0 %)",
        "3 cells without a label are left out.",
        "scmodelforge benchmark --model runs/mine/model --data 'my cells.h5ad'",
        "so no cells are drawn",
    ):
        assert words in page.text, words
    assert page.text.index("model 0.800") < page.text.index("pca 0.700 0.650")
    shares = [a["style"] for _, a in page.tags if (a.get("class") or "").startswith("num cell")]
    assert shares == ["--share: 80.0%", "--share: 20.0%", "--share: 40.0%", "--share: 60.0%"]


def test_a_benchmark_page_says_what_is_missing(tmp_path: Path) -> None:
    bare = [
        {"benchmark": "linear_probe", "method": name, "metrics": {"macro_f1": 0.5}}
        for name in ("model", "pca")
    ]
    optional = ("notes", "seen_cells", "seed", "n_cells", "command", "versions", "data")
    path = write_benchmark_report(
        results_file(tmp_path / "bare.json", **dict.fromkeys(optional), results=bare)
    )
    page = Page(path)
    for words in (
        "No paired test of the model against a baseline is in these results.",
        "These results hold no 95 % intervals.",
        "Whether the model saw these cells in its training is not in the results.",
        "These results do not say what was left out.",
        "The command is not in these results",
        "seed not recorded",
    ):
        assert words in page.text, words


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ((-0.05, (-0.1, -0.01), 0.02), "0.050 lower than that of pca"),
        ((0.05, (-0.01, 0.1), 0.2), "The interval holds 0: these cells do not tell the two apart."),
        ((0.0, (-0.01, 0.01), 1.0), "is equal to that of pca"),
        ((float("nan"), (0, 0), 1.0), "gave no number"),
    ],
)
def test_the_paired_test_in_words(test: tuple, words: str) -> None:
    difference, interval, p_value = test
    found = Comparison(metric="f1", baseline="pca", difference=difference, interval=interval, p_value=p_value)
    assert words in in_words(found)


def test_short_and_frozen_runs_are_explained(tmp_path: Path) -> None:
    labels = {"model": {"n_parameters": 1, "n_genes": 1, "labels": {"key": "cell_type"}}}
    folder = run_folder(tmp_path / "short", labels, training={"log_every_n_steps": 10})
    (folder / "metrics.csv").write_text("step,val_accuracy,val_macro_f1,val_loss,epoch\n6,0.15,0.08,2.3,0\n")
    page = Page(write_report(folder))
    assert (
        "Known at one step only, so these are no curves: Loss 2.300 at step 6 Accuracy 0.150 at step 6"
        in page.text
    )
    assert (
        "too short for rates over time: they are logged every 10 steps (training.log_every_n_steps)"
        in page.text
    )
    assert "0.080 best model, epoch 1 " in page.text
    assert page.count("svg") == 0
    (folder / "metrics.csv").write_text(
        "step,cells_per_second,tokens_per_second\n10,6000,0\n20,4000,0\n30,300,40000\n"
    )
    assert "Up to step 20 the backbone was frozen" in Page(write_report(folder)).text


def test_a_resumed_run_shows_every_command(tmp_path: Path) -> None:
    first = ["/bin/scmodelforge", "train", "--config", "c.yaml"]
    resumed = [*first, "--resume", "last.ckpt"]
    folder = run_folder(tmp_path / "a", {"command": resumed, "earlier_commands": [first, resumed]})
    text = Page(write_report(folder)).text
    both = "scmodelforge train --config c.yaml scmodelforge train --config c.yaml --resume last.ckpt Copy"
    assert f"The run was resumed. These commands made it, in this order. {both}" in text


def test_the_terminal_names_the_epoch_of_each_figure(
    annotator: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run")
    head = "step,val_accuracy,val_macro_f1,val_loss,epoch\n20,0.51,0.38,1.45,0\n"
    (folder / "metrics.csv").write_text(f"{head}40,0.7714,0.6863,0.8695,1\n60,0.7286,0.6171,1.018,2\n")
    finish_run(replace(annotator, run_dir=folder), "scmodelforge finetune", None)
    assert (
        "Done. Best, epoch 2: val_accuracy 0.7714  val_macro_f1 0.6863  val_loss 0.8695\n"
        "      Last, epoch 3: val_accuracy 0.7286  val_macro_f1 0.6171  val_loss 1.018\n"
        "Best checkpoint:"
    ) in capsys.readouterr().out
    (folder / "metrics.csv").write_text(head)
    finish_run(replace(annotator, run_dir=folder), "scmodelforge finetune", None)
    assert "Done. Best and last, epoch 1: val_accuracy 0.51" in capsys.readouterr().out
    (folder / "metrics.csv").unlink()
    finish_run(replace(annotator, run_dir=folder), "scmodelforge finetune", None)
    assert "Done.\nBest checkpoint" in capsys.readouterr().out


def test_results_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(DataError, match=r"'.*metrics.json' does not exist"):
        write_benchmark_report(path)
    path.write_text("{}")
    with pytest.raises(
        DataError, match=r"holds no benchmark results: Field required \(at model\)(.|\n)*--output FILE"
    ):
        write_benchmark_report(path)
    path.write_text("no json")
    with pytest.raises(DataError, match="holds no benchmark results: Invalid JSON"):
        write_benchmark_report(path)
    record = RESULTS | {"results": [{"method": "model"}]}
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"Field required \(at results.0.benchmark\)"):
        write_benchmark_report(path)


def test_runs_side_by_side(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "x" / "run", training={"seed": 1, "betas": [0.9, 0.99], "compile": False})
    two = run_folder(
        tmp_path / "y" / "run",
        {"data": {"n_train": 70, "n_val": 5, "train_cells": "other"}},
        training={"seed": 2, "betas": [0.9, 0.99], "compile": None},
    )
    results_file(one / "benchmark.json")
    results_file(two / "benchmark.json", data="other.h5ad", n_cells=10)
    page = Page(compare([one, two], tmp_path / "comparison.html"))
    for words in (
        "x/run y/run",
        "training.seed 1 2",
        "training.compile false null",
        "7 other keys are the same.",
        "These runs differ in their training cells",
        "loss, validation, best model 3.027 3.027",
        "loss, validation, at the end 3.520 3.520",
        "best model step 75 step 75",
        "training cells 80 70",
        "they are no fair comparison: cells.h5ad, 200 cells; other.h5ad, 10 cells",
        "x/run: On the same cells the model's macro F1",
    ):
        assert words in page.text, words
    assert "training.betas" not in page.text
    charts = [a["aria-label"] for name, a in page.tags if name == "svg"]
    assert any(
        label == "Validation loss by optimizer step: x/run from 3.080 to 3.520; y/run from 3.080 to 3.520"
        for label in charts
    )


def test_what_cannot_be_compared_or_reported(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match="needs at least two run folders, and 1 is given"):
        compare([run], tmp_path / "comparison.html")
    with pytest.raises(UserError, match=r"'.*nowhere' does not exist"):
        compare([run, tmp_path / "nowhere"], tmp_path / "comparison.html")
    with pytest.raises(UserError, match=r"is no run folder: it has no run.json and no config.yaml"):
        write_report(tmp_path)
    (run / "metrics.csv").write_text("step,val_loss\n1,low\n")
    with pytest.raises(
        DataError, match=r"metrics.csv' is damaged: a row without a step, or with text for a number"
    ):
        write_report(run)
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"A file in the run folder '.*' is damaged"):
        write_report(run)
    (run / "run.json").write_text("{}")
    (run / "metrics.csv").unlink()
    (run / "validation_cells.h5ad").write_text("no file")
    with pytest.raises(DataError, match=r"Cannot read '.*validation_cells.h5ad'(.|\n)*Delete it"):
        write_report(run)
    assert not (tmp_path / "comparison.html").exists()
    assert not (run / "report.html").exists()


def test_a_run_of_which_hardly_anything_is_left(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    for name in ("metrics.csv", "gene_match.csv"):
        (run / name).unlink()
    (run / "run.json").write_text("{}")
    page = Page(write_report(run))
    for words in (
        "The run logged no figures of training: it was stopped early, or its metrics.csv is gone.",
        "The run kept no notes.",
        "left no gene_match.csv",
    ):
        assert words in page.text
