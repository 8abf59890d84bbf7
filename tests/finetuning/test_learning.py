"""Fine-tuning learns what can be learned, and moves only the weights it may move."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, r2_score

from scmodelforge.finetuning.run import finetune
from scmodelforge.inference import annotate
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.run import RunResult
from tests.helpers import finetune_config, marker_cells

UNSEEN = marker_cells(150, seed=1)


def f1_on_unseen(result: RunResult) -> float:
    found = annotate(UNSEEN, result.model, copy=True).obs["scmodelforge_cell_type"]
    return f1_score(UNSEEN.obs["cell_type"].astype(str), found.astype(str), average="macro")


def backbone(result: RunResult) -> dict[str, torch.Tensor]:
    return result.model.model.state_dict()


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, bool]:
    assert one.keys() == other.keys()
    return {name: torch.equal(one[name], other[name]) for name in one}


@pytest.fixture
def checkpoint(pretrained: RunResult) -> Path:
    return pretrained.checkpoint_dir / "best.ckpt"


def test_full_finetuning_learns_and_moves_the_backbone(annotator: RunResult, pretrained: RunResult) -> None:
    assert f1_on_unseen(annotator) > 0.95
    assert annotator.metrics["val_accuracy"] > 0.95
    equal = same_bits(backbone(annotator), backbone(pretrained))
    assert not equal["embedding.tokens.weight"]
    assert not equal["transformer.blocks.0.attention.q.weight"]
    assert all(same for name, same in equal.items() if name.startswith("head.")), "the unused head stays"


def test_a_frozen_backbone_stays_bit_for_bit(checkpoint: Path, pretrained: RunResult, tmp_path: Path) -> None:
    training = {"max_epochs": 10, "optimizer": {"weight_decay": 0.1}}
    config = finetune_config(tmp_path, training, freeze_backbone=True, head_lr=0.5)
    result = finetune(config, checkpoint, data=marker_cells())
    assert all(same_bits(backbone(result), backbone(pretrained)).values())
    assert f1_on_unseen(result) > 0.8


def test_the_backbone_unfreezes_after_the_first_epochs(
    checkpoint: Path, pretrained: RunResult, tmp_path: Path
) -> None:
    training = {"max_epochs": 4, "save_top_k": 4, "optimizer": {"weight_decay": 0.1}}
    config = finetune_config(tmp_path, training, freeze_backbone_epochs=2)
    result = finetune(config, checkpoint, data=marker_cells())
    start, changed, heads = backbone(pretrained), [], []
    for path in sorted(result.checkpoint_dir.glob("epoch=*.ckpt")):
        state = read_checkpoint(path)["state_dict"]
        changed.append(any(not torch.equal(state[f"model.{name}"], start[name]) for name in start))
        heads.append(state["head.linear.weight"])
    assert changed == [False, False, True, True]
    assert not torch.equal(heads[0], heads[1]), "the head trains from the first epoch"


def test_discriminative_rates_are_in_the_groups_and_scaled_together(checkpoint: Path, tmp_path: Path) -> None:
    training = {"max_epochs": 2, "scheduler": {"name": "linear", "min_lr_ratio": 0.25}}
    config = finetune_config(tmp_path, training, backbone_lr=1e-4, head_lr=1e-2)
    result = finetune(config, checkpoint, data=marker_cells())
    groups = read_checkpoint(result.checkpoint_dir / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-4, 1e-2}
    for group in groups:
        assert group["lr"] == pytest.approx(0.25 * group["initial_lr"])
    sizes = {rate: sum(len(g["params"]) for g in groups if g["initial_lr"] == rate) for rate in (1e-4, 1e-2)}
    assert sizes[1e-2] == 2, "weight and bias of the head"
    assert sizes[1e-4] > 10


def test_regression_predicts_in_the_units_of_the_label(checkpoint: Path, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, {"max_epochs": 8}, label_key="age", head={"task": "regression"})
    result = finetune(config, checkpoint, data=marker_cells())
    found = annotate(UNSEEN, result.model, copy=True).obs
    assert r2_score(UNSEEN.obs["age"], found["scmodelforge_age"]) > 0.6
    assert abs(found["scmodelforge_age"].mean() - UNSEEN.obs["age"].mean()) < 8
    assert "scmodelforge_age_probability" not in found
    assert {"val_mae", "val_r2", "val_loss"} <= result.metrics.keys()
    labels = json.loads((result.run_dir / "model" / "labels.json").read_text())
    assert labels["task"] == "regression"
    assert 20 < labels["mean"] < 80


def test_two_runs_with_one_seed_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    one, two = (
        finetune(finetune_config(tmp_path / name, {"max_epochs": 1}), checkpoint, data=marker_cells())
        for name in ("one", "two")
    )
    assert all(same_bits(backbone(one), backbone(two)).values())
    assert torch.equal(one.model.head.linear.weight, two.model.head.linear.weight)


def test_the_metrics_of_a_run_are_written(annotator: RunResult) -> None:
    with open(annotator.run_dir / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    accuracy = [float(row["val_accuracy"]) for row in rows if row["val_accuracy"]]
    assert len(accuracy) == 4
    assert accuracy[-1] == pytest.approx(annotator.metrics["val_accuracy"])
    assert np.isfinite([float(row["val_macro_f1"]) for row in rows if row["val_macro_f1"]]).all()
