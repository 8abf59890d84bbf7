"""A run that was interrupted and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from scmodelforge.config_io import parse_config
from scmodelforge.errors import ModelError, UserError
from scmodelforge.genes.vocab import predefined
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.callbacks import STOP_SIGNALS, LastCheckpoint
from scmodelforge.training.run import RunResult, train

N_CELLS, N_GENES = 90, 80
STEPS_PER_EPOCH = 6  # 81 training cells in batches of 16, the last one smaller
EPOCHS = 3
LONG = 20  # epochs of a run that is surely under way when a signal comes


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = np.random.default_rng(0).poisson(0.6, (N_CELLS, N_GENES)).astype(np.float32)
    genes = predefined("human_protein_coding").gene_ids[:N_GENES]
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=genes.astype(str)))
    adata.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def settings(cells: Path, folder: Path, **training) -> dict:
    return {
        "data": {"paths": [str(cells)], "gene_vocab": "from_data"},
        "tokenizer": {"max_genes": 32},
        "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.2},
        "training": {
            "batch_size": 16,
            "max_epochs": EPOCHS,
            "run_dir": str(folder),
            "optimizer": {"lr": 1e-2},
            "checkpoint_every_n_steps": 1,
            **training,
        },
    }


def run(cells: Path, folder: Path, resume: Path | None = None, **training) -> RunResult:
    return train(parse_config(settings(cells, folder, **training)), resume=resume)


def same_weights(first: Path, second: Path) -> None:
    one, two = read_checkpoint(first), read_checkpoint(second)
    assert one["global_step"] == two["global_step"]
    assert one["epoch"] == two["epoch"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    for mine, theirs in zip(
        one["optimizer_states"][0]["state"].values(),
        two["optimizer_states"][0]["state"].values(),
        strict=True,
    ):
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])
    assert one["lr_schedulers"][0]["last_epoch"] == two["lr_schedulers"][0]["last_epoch"]


@pytest.fixture(scope="module")
def uninterrupted(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and a copy of last.ckpt each time that it was written."""
    folder = tmp_path_factory.mktemp("whole")
    copies = folder / "copies"
    copies.mkdir()
    save = LastCheckpoint._save
    written = []

    def save_and_copy(self, trainer):
        save(self, trainer)
        written.append(trainer.global_step)
        shutil.copy(self.path, copies / f"{len(written):02d}_step{trainer.global_step:02d}.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        run(cells, folder)
    assert len(written) == EPOCHS * STEPS_PER_EPOCH  # within each epoch, and at its end
    return folder


@pytest.mark.parametrize("number", [1, 3, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 12, 16])
def test_resuming_from_any_step_gives_the_same_weights(
    cells: Path, uninterrupted: Path, tmp_path: Path, number: int
) -> None:
    (checkpoint,) = (uninterrupted / "copies").glob(f"{number:02d}_*.ckpt")
    result = run(cells, tmp_path / "resumed", resume=checkpoint)
    same_weights(uninterrupted / "checkpoints/last.ckpt", result.checkpoint_dir / "last.ckpt")
    whole, resumed = (pd.read_csv(folder / "metrics.csv") for folder in (uninterrupted, tmp_path / "resumed"))
    last = whole["val_loss"].dropna().iloc[-1]
    assert resumed["val_loss"].dropna().iloc[-1] == pytest.approx(last, abs=0)


def test_accumulated_gradients_are_resumed_too(cells: Path, tmp_path: Path) -> None:
    extra = {"accumulate_grad_batches": 2, "checkpoint_every_n_steps": 2, "max_epochs": 2}
    save = LastCheckpoint._save

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.global_step == 2:
            shutil.copy(self.path, tmp_path / "middle.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        whole = run(cells, tmp_path / "whole", **extra)
    resumed = run(cells, tmp_path / "resumed", resume=tmp_path / "middle.ckpt", **extra)
    same_weights(whole.checkpoint_dir / "last.ckpt", resumed.checkpoint_dir / "last.ckpt")


def test_the_number_of_threads_changes_nothing(cells: Path, uninterrupted: Path, tmp_path: Path) -> None:
    result = run(cells, tmp_path, loader_threads=5)
    same_weights(uninterrupted / "checkpoints/last.ckpt", result.checkpoint_dir / "last.ckpt")


def start(cells: Path, folder: Path, tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    import yaml

    config = tmp_path / "config.yaml"
    # Many epochs, so that the run is surely under way when the signal comes.
    config.write_text(yaml.safe_dump(settings(cells, folder, max_epochs=LONG)))
    command = [sys.executable, "-m", "scmodelforge.cli", "train", "--config", str(config)]
    # As many threads as here: sums of another number of parts differ in the last bit.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=threads
    )
    return process, config


def wait_for_step(process: subprocess.Popen, checkpoint: Path, step: int) -> None:
    while process.poll() is None:
        if checkpoint.exists() and read_checkpoint(checkpoint)["global_step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended before step {step}: {process.stdout.read()}")  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_in_the_middle_of_an_epoch_loses_nothing(
    cells: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process, config = start(cells, folder, tmp_path)
    last = folder / "checkpoints/last.ckpt"
    wait_for_step(process, last, STEPS_PER_EPOCH + 2)
    process.send_signal(signum)
    output, _ = process.communicate()
    stopped_at = read_checkpoint(last)["global_step"]
    assert stopped_at < LONG * STEPS_PER_EPOCH
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"To go on:\n  scmodelforge train --config {config} --resume {last}" in output
        assert "Traceback" not in output
    resumed = run(cells, folder, resume=last, max_epochs=LONG)
    whole = run(cells, tmp_path / "whole", max_epochs=LONG)
    same_weights(whole.checkpoint_dir / "last.ckpt", resumed.checkpoint_dir / "last.ckpt")
    steps = pd.read_csv(folder / "metrics.csv")["step"]
    assert steps.is_unique
    assert steps.is_monotonic_increasing


def test_after_a_run_signals_do_what_they_did_before(cells: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    run(cells, tmp_path, max_steps=1)
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_a_run_goes_on_only_as_what_it_was(cells: Path, uninterrupted: Path, tmp_path: Path) -> None:
    last = uninterrupted / "checkpoints/last.ckpt"
    other = settings(cells, tmp_path / "other", batch_size=8)
    other["model"]["hidden_dim"] = 32
    with pytest.raises(ModelError, match="cannot go on") as error:
        train(parse_config(other), resume=last)
    assert "model.hidden_dim: 32 in the config, 16 in the run" in str(error.value)
    assert "training.batch_size: 8 in the config, 16 in the run" in str(error.value)
    assert not (tmp_path / "other").exists()


def test_other_cells_are_refused(cells: Path, uninterrupted: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.h5ad"
    anndata.read_h5ad(cells)[:50].copy().write_h5ad(fewer)
    with pytest.raises(ModelError, match="trained on 81 of 90 cells; this config gives 45 of 50"):
        run(fewer, tmp_path / "run", resume=uninterrupted / "checkpoints/last.ckpt")


def test_a_run_cut_by_max_steps_is_validated_and_has_a_best_checkpoint(cells: Path, tmp_path: Path) -> None:
    result = run(cells, tmp_path, max_steps=STEPS_PER_EPOCH + 2)
    assert read_checkpoint(result.checkpoint_dir / "best.ckpt")["global_step"] in (6, 8)
    steps = pd.read_csv(tmp_path / "metrics.csv").set_index("step")["val_loss"].dropna()
    assert list(steps.index) == [STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2]
    assert run(cells, tmp_path / "short", max_steps=2).metrics["val_loss"] > 0


def test_a_finished_run_says_so_and_keeps_its_record(
    cells: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def files() -> dict[str, bytes]:
        names = ("run.json", "config.yaml", "metrics.csv", "gene_match.csv", "model/model_card.md")
        return {name: (uninterrupted / name).read_bytes() for name in names}

    before = files()
    result = run(cells, uninterrupted, resume=uninterrupted / "checkpoints/last.ckpt")
    assert "All 3 epochs of this run were done already" in caplog.text
    assert files() == before
    validated = pd.read_csv(uninterrupted / "metrics.csv")["val_loss"].dropna()
    assert result.metrics["val_loss"] == validated.iloc[-1]
    assert result.performance == {}


def test_a_run_that_was_killed_after_its_last_epoch_is_completed(
    cells: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "model")
    had = json.loads((folder / "run.json").read_text())
    run(cells, folder, resume=folder / "checkpoints/last.ckpt")
    has = json.loads((folder / "run.json").read_text())
    assert (folder / "model").is_dir()
    assert has["performance"] == had["performance"] != {}
    assert has["metrics"]["val_loss"] == had["metrics"]["val_loss"]


def test_the_commands_of_a_run_are_kept_when_it_goes_on(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [["scmodelforge", "train", str(n)] for n in range(3)]
    for epochs, command in enumerate(commands, start=1):
        monkeypatch.setattr(sys, "argv", command)
        last = None if epochs == 1 else tmp_path / "checkpoints/last.ckpt"
        run(cells, tmp_path, resume=last, max_epochs=epochs)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == commands[2]
    assert record["earlier_commands"] == commands[:2]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(
        UserError, match=r"The record '.*run.json' of the run to go on with is damaged(.|\n)*Delete it"
    ):
        run(cells, tmp_path, resume=tmp_path / "checkpoints/last.ckpt", max_epochs=4)
