"""What a run leaves behind: figures, checkpoints, provenance, and earlier checkpoints kept aside."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from scmodelforge.config_io import load_config
from scmodelforge.models.bundle import load_model, read_checkpoint
from scmodelforge.training.run import RunResult, train
from tests.helpers import marker_cells, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    training = {"max_epochs": 5, "save_top_k": 2, "optimizer": {"lr": 0.05}}  # too high to improve steadily
    config = tiny_config(
        tmp_path_factory.mktemp("runs") / "first", training=training | {"scheduler": {"warmup_steps": 2000}}
    )
    return train(config, data=marker_cells())


def figures(run: RunResult, column: str) -> list[float]:
    with open(run.run_dir / "metrics.csv", newline="") as handle:
        return [float(row[column]) for row in csv.DictReader(handle) if row[column]]


def test_metrics_have_every_figure(run: RunResult) -> None:
    for column in (
        "train_loss",
        "val_loss",
        "val_perplexity",
        "val_top1_accuracy",
        "cells_per_second",
        "tokens_per_second",
        "data_wait_share",
        "padding_share",
        "peak_memory_gib",
        "grad_norm",
        "learning_rate",
    ):
        values = figures(run, column)
        assert values, column
        assert all(math.isfinite(value) and value >= 0 for value in values), column
    assert len(figures(run, "val_loss")) == 5, "once an epoch"
    assert figures(run, "step") == sorted(figures(run, "step"))
    assert figures(run, "step")[-1] == 30, "180 training cells in batches of 30, five times"
    assert all(0 <= share <= 1 for share in figures(run, "data_wait_share"))


def test_tokens_and_cells_per_second_agree(run: RunResult) -> None:
    ratios = [
        tokens / cells
        for tokens, cells in zip(
            figures(run, "tokens_per_second"), figures(run, "cells_per_second"), strict=True
        )
    ]
    assert all(2 < ratio <= 32 for ratio in ratios), "tokens of a cell, at most max_genes"


def test_best_checkpoint_is_the_epoch_with_the_best_figure(run: RunResult) -> None:
    losses = figures(run, "val_loss")
    best = read_checkpoint(run.checkpoint_dir / "best.ckpt")
    assert best["epoch"] == losses.index(min(losses))
    for kept in (load_model(run.checkpoint_dir / "best.ckpt"), load_model(run.run_dir / "model"), run.model):
        for name, tensor in kept.model.state_dict().items():
            assert torch.equal(tensor, best["state_dict"][f"model.{name}"])
    assert read_checkpoint(run.checkpoint_dir / "last.ckpt")["epoch"] == 4


def test_the_k_best_checkpoints_are_kept(run: RunResult) -> None:
    losses = figures(run, "val_loss")
    kept = {read_checkpoint(path)["epoch"] for path in run.checkpoint_dir.glob("epoch=*.ckpt")}
    assert kept == {losses.index(loss) for loss in sorted(losses)[:2]}
    assert len(list(run.checkpoint_dir.iterdir())) == 4, "two, best.ckpt, last.ckpt, and no temporary file"


def test_the_config_of_a_run_loads_again(run: RunResult) -> None:
    config = load_config(run.run_dir / "config.yaml")
    assert config == run.model.config
    assert config.model.num_layers == 2
    assert "eps: " in (run.run_dir / "config.yaml").read_text(), "defaults are written out"


def test_run_json_says_what_ran(run: RunResult) -> None:
    record = json.loads((run.run_dir / "run.json").read_text())
    assert {"command", "git", "versions", "hardware", "seed", "data", "notes", "metrics"} <= record.keys()
    assert {"python", "torch", "scmodelforge", "anndata"} <= record["versions"].keys()
    assert record["seed"] == 42
    assert (record["data"]["n_train"], record["data"]["n_val"]) == (180, 60)
    assert record["data"]["vocabulary"] == run.model.vocab.fingerprint
    assert any("shortened to a tenth of it, 3." in note for note in record["notes"]), "what was said is kept"
    assert record["metrics"]["val_loss"] == pytest.approx(figures(run, "val_loss")[-1])


def test_the_gene_report_has_a_row_for_each_gene(run: RunResult) -> None:
    table = pd.read_csv(run.run_dir / "gene_match.csv")
    assert len(table) == 40
    assert set(table["file"]) == {"AnnData"}


def test_checkpoints_of_an_earlier_run_are_moved_aside_and_said(
    run: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path, training={"max_epochs": 1, "checkpoint_dir": str(tmp_path / "kept here")})
    first = train(config, data=marker_cells())
    names = {path.name for path in first.checkpoint_dir.glob("*.ckpt")}
    content = (first.checkpoint_dir / "last.ckpt").read_bytes()
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        train(config, data=marker_cells(seed=4))
    (previous,) = (tmp_path / "kept here" / "previous").iterdir()
    assert {path.name for path in previous.iterdir()} == names
    assert (previous / "last.ckpt").read_bytes() == content
    (previous_run,) = (tmp_path / "previous").iterdir()
    assert {"metrics.csv", "run.json", "model"} <= {path.name for path in previous_run.iterdir()}
    assert (
        f"{tmp_path} held another run: its files were moved to {previous} and {previous_run}."
        in caplog.messages
    )


def test_without_validation_the_last_epoch_is_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path, data={"split": {"val_split": 0}}, training={"max_epochs": 2})
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        result = train(config, data=marker_cells(60))
    assert "No cells validate (data.split.val_split is 0): best.ckpt is the last epoch." in caplog.messages
    assert read_checkpoint(result.checkpoint_dir / "best.ckpt")["epoch"] == 1


def test_the_schedule_is_as_long_as_the_run(tmp_path: Path) -> None:
    """Six steps an epoch, two batches a step: the last of six steps comes just before the floor."""
    training = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "log_every_n_steps": 1,
        "scheduler": {"name": "linear", "min_lr_ratio": 0.5},
    }
    result = train(tiny_config(tmp_path, training=training), data=marker_cells())
    state = read_checkpoint(result.checkpoint_dir / "last.ckpt")
    assert state["global_step"] == 6
    assert [group["lr"] for group in state["optimizer_states"][0]["param_groups"]] == [0.005, 0.005]


def test_tensorboard_gets_the_figures_too(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra tensorboard"
    )
    train(tiny_config(tmp_path, training={"max_epochs": 1, "logger": "tensorboard"}), data=marker_cells())
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train_loss", "val_loss", "cells_per_second"} <= set(events.Tags()["scalars"])


def test_a_logger_that_is_not_installed_is_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from scmodelforge.errors import MissingExtraError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny_config(tmp_path / "run", training={"logger": "wandb"}, data={"paths": ["not_there.h5ad"]})
    with pytest.raises(MissingExtraError, match=r"pip install 'scmodelforge\[wandb\]'"):
        train(config)
    assert not (tmp_path / "run").exists()
