"""An interrupted fine-tuning run goes on to the weights of an uninterrupted one, and only as what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from scmodelforge.errors import ModelError
from scmodelforge.finetuning.run import finetune
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.callbacks import LastCheckpoint
from scmodelforge.training.run import RunResult
from tests.helpers import finetune_config, marker_cells

STEPS = 6  # an epoch: 180 training cells in batches of 30


@pytest.mark.parametrize(
    "options", [{"freeze_backbone_epochs": 1}, {"lora": {"enabled": True}}, {"freeze_backbone": True}]
)
@pytest.mark.parametrize("stop_at", [STEPS - 2, STEPS, STEPS + 3])
def test_resumed_weights_are_those_of_a_whole_run(
    pretrained: RunResult, tmp_path: Path, options: dict, stop_at: int
) -> None:
    training = {"checkpoint_every_n_steps": 1, "max_epochs": 3}
    backbone = pretrained.checkpoint_dir / "best.ckpt"
    save = LastCheckpoint._save

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.global_step == stop_at:
            shutil.copy(self.path, tmp_path / "stopped.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        whole = finetune(
            finetune_config(tmp_path / "whole", training, **options), backbone, data=marker_cells()
        )
    config = finetune_config(tmp_path / "resumed", training, **options)
    resumed = finetune(config, backbone, data=marker_cells(), resume=tmp_path / "stopped.ckpt")
    first, second = (read_checkpoint(run.checkpoint_dir / "last.ckpt") for run in (whole, resumed))
    assert first["global_step"] == second["global_step"] == 3 * STEPS
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name


def test_it_does_not_go_on_with_other_labels_or_cells(
    pretrained: RunResult, annotator: RunResult, tmp_path: Path
) -> None:
    backbone, last = pretrained.checkpoint_dir / "best.ckpt", annotator.checkpoint_dir / "last.ckpt"
    config = finetune_config(tmp_path / "run", label_key="donor")
    with pytest.raises(ModelError, match=r"finetune\.label_key: donor in the config, cell_type in the run"):
        finetune(config, backbone, data=marker_cells(), resume=last)
    with pytest.raises(ModelError, match="not the same ones"):
        finetune(finetune_config(tmp_path / "run"), backbone, data=marker_cells(200), resume=last)
    assert not (tmp_path / "run").exists()
