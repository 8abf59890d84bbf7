"""Two processes learn what one would from the same cells, with DDP and with FSDP, and go on as if never stopped.

One launch of `torchrun` makes all runs of two processes, one after the other, by the commands a user would give.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from scmodelforge.models.bundle import load_model, read_checkpoint
from scmodelforge.models.objectives.batch import LossTerm
from scmodelforge.training.global_loss import global_loss
from tests.helpers import marker_cells, tiny_config
from tests.journeys.command import done, files_below, refused

COMMANDS = """
import glob, json, sys
from scmodelforge import cli
for arguments in json.load(open(sys.argv[1])):
    arguments = [glob.glob(argument)[0] if "*" in argument else argument for argument in arguments]
    sys.argv = ["scmodelforge", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
"""
STEPS = 24  # 180 training cells in two epochs of 12 global batches of 16, the last one smaller


def write_config(folder: Path, run: str, batch_size: int) -> str:
    training = {
        "batch_size": batch_size,
        "log_every_n_steps": 1,
        "save_top_k": 2,
        "gradient_clip_val": 0.1,  # less than the norm: clipping is part of what must agree
        # Adam divides by the size of a gradient: with the usual eps rounding decides where there is none.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
    }
    config = tiny_config(
        folder / run,
        data={"paths": [str(folder / "cells.h5ad")]},
        model={"objective": {"cell_weight": 0.5}, "pretraining_task": "dual_prediction"},
        tokenizer={"strategy": "binned_expression"},
        training=training,
    )
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `one` process, two with `ddp` and `fsdp`, and these resumed after their first epoch."""
    folder = tmp_path_factory.mktemp("runs")
    marker_cells(240).write_h5ad(folder / "cells.h5ad")
    torch.set_num_threads(1)
    done("train", "--config", write_config(folder, "one", 16))
    labels = ["--checkpoint", f"{folder}/one/model", "--set", "finetune.label_key=cell_type"]
    labels += ["--set", "finetune.freeze_backbone_epochs=1"]
    commands = []
    for strategy in ("ddp", "fsdp"):
        command = ["train", "--config", write_config(folder, strategy, 8)]
        command += ["--set", f"training.strategy={strategy}"]
        first_epoch = f"{folder}/{strategy}/checkpoints/epoch=000*.ckpt"
        elsewhere = f"training.run_dir={folder}/{strategy}_resumed"
        commands += [command, [*command, "--set", elsewhere, "--resume", first_epoch]]
        commands += [
            ["finetune", *command[1:], *labels, "--set", f"training.run_dir={folder}/{strategy}_label"]
        ]
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "commands.py").write_text(COMMANDS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    answer = subprocess.run(
        [*launcher, str(folder / "commands.py"), str(folder / "commands.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a hang is what this is about
    )
    assert answer.returncode == 0, answer.stderr
    return folder


def figures(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "metrics.csv").set_index("step")


def load_weights(run: Path) -> list[torch.Tensor]:
    return list(load_model(run / "checkpoints/best.ckpt").model.state_dict().values())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(runs: Path, strategy: str) -> None:
    one, two = figures(runs / "one"), figures(runs / strategy)
    assert len(one["train_loss"].dropna()) == STEPS
    for name in ("train_loss", "train_gene_loss", "train_expression_loss", "grad_norm", "val_loss"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert two["token_imbalance"].dropna().between(1, 2).all()
    assert two["token_imbalance"].max() > 1
    assert "token_imbalance" not in one
    ours, theirs = weights(runs / strategy), weights(runs / "one")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)
    files = [{re.sub(r"=.*", "", file) for file in files_below(runs / run)} for run in ("one", strategy)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_as_if_never_stopped(runs: Path, strategy: str) -> None:
    ours, theirs = (
        read_checkpoint(runs / name / "checkpoints/last.ckpt") for name in (f"{strategy}_resumed", strategy)
    )
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    for mine, other in zip(
        ours["optimizer_states"][0]["state"].values(),
        theirs["optimizer_states"][0]["state"].values(),
        strict=True,
    ):
        assert torch.equal(mine["exp_avg_sq"], other["exp_avg_sq"])


@pytest.mark.slow
def test_fine_tuning_with_a_backbone_that_unfreezes_agrees_too(runs: Path) -> None:
    ddp, fsdp = figures(runs / "ddp_label"), figures(runs / "fsdp_label")
    assert len(ddp["train_loss"].dropna()) == STEPS
    for name in ("train_loss", "grad_norm", "val_loss", "val_macro_f1"):
        np.testing.assert_allclose(fsdp[name], ddp[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_whole(runs: Path) -> None:
    ours, theirs = (read_checkpoint(runs / name / "checkpoints/best.ckpt") for name in ("fsdp", "ddp"))
    assert {n: t.shape for n, t in ours["state_dict"].items()} == {
        n: t.shape for n, t in theirs["state_dict"].items()
    }
    assert all(type(tensor) is torch.Tensor for tensor in ours["state_dict"].values())
    for one, two in zip(load_weights(runs / "fsdp"), load_weights(runs / "ddp"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    config = runs / "fsdp.yaml"
    refused(
        *("train", "--config", config, "--set", "training.strategy=fsdp"),
        *("--resume", runs / "fsdp/checkpoints/last.ckpt"),
        words=("cannot go on", "devices: 1 here, 2 in the run"),
    )
    refused(
        *("train", "--config", config, "--resume", runs / "fsdp/checkpoints/last.ckpt"),
        words=("training.strategy: ddp in the config, fsdp in the run",),
    )


def test_the_mean_of_one_process_is_divided_once() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    terms = {"gene": LossTerm(total, 3, 2.0), "none": LossTerm(total * 0, torch.tensor(0))}
    loss = global_loss(terms, 10)
    loss.share.backward()
    assert (loss.share.item(), loss.mean.item()) == (4.0, 4.0)
    assert total.grad == pytest.approx(2 / 3)
    assert {name: float(mean) for name, mean in loss.terms.items()} == {"gene": 2.0, "none": 0.0}
    assert float(loss.token_imbalance) == 1.0
