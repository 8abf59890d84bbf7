"""Options of the training recipe through the command: muon goes on exactly, qk_norm bounds scores, strategies alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from scmodelforge.config import Config, ModelConfig
from scmodelforge.errors import ModelError
from scmodelforge.models.bundle import load_model, read_checkpoint
from scmodelforge.models.published import export_model
from scmodelforge.models.sequences import Sequences
from scmodelforge.models.transformer import Attention
from scmodelforge.training.run import train
from tests.helpers import marker_cells, tiny_config


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(run: Path, optimizer: str = "adamw", qk_norm: bool = False, **training: object) -> Config:
    return tiny_config(
        run, training={"optimizer": {"name": optimizer}} | training, model={"qk_norm": qk_norm}
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 or newer")
def test_a_run_with_muon_learns_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    cells = marker_cells()
    whole = train(recipe(tmp_path / "whole", "muon", max_epochs=3, save_top_k=3), data=cells)
    first = next(whole.checkpoint_dir.glob("epoch=000*.ckpt"))
    resumed = train(
        recipe(tmp_path / "resumed", "muon", max_epochs=3, save_top_k=3), resume=first, data=cells
    )
    assert resumed.metrics["val_loss"] == whole.metrics["val_loss"]
    one, other = (read_checkpoint(run.checkpoint_dir / "last.ckpt") for run in (whole, resumed))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    losses = [
        float(path.stem.partition("val_loss=")[2]) for path in sorted(whole.checkpoint_dir.glob("epoch=*"))
    ]
    assert losses[-1] < losses[0]


def test_qk_norm_keeps_scores_whatever_the_size_of_the_queries() -> None:
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    sequences = Sequences(torch.tensor([0, 5, 10], dtype=torch.int32), max_length=5)
    for qk_norm in (True, False):
        torch.manual_seed(0)
        attention = Attention(ModelConfig(hidden_dim=8, num_heads=2, qk_norm=qk_norm))
        before = attention(x, sequences)
        with torch.no_grad():
            for parameter in attention.q.parameters():
                parameter.mul_(100)
        assert torch.allclose(attention(x, sequences), before, atol=1e-5) is qk_norm


def test_a_model_with_qk_norm_is_loaded_again_and_not_exported(tmp_path: Path) -> None:
    run = train(recipe(tmp_path / "run", qk_norm=True), data=marker_cells())
    again = load_model(run.run_dir / "model")
    norms = [m for n, m in again.model.named_modules() if n.endswith(("q_norm", "k_norm"))]
    assert len(norms) == 4
    assert all(isinstance(norm, nn.LayerNorm) and norm.weight.shape == (8,) for norm in norms)
    with pytest.raises(ModelError, match=r"model\.qk_norm"):
        export_model(again, "huggingface-bert", tmp_path / "exported")


def test_one_process_has_nothing_to_divide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(recipe(tmp_path / "run", strategy="fsdp", max_steps=1), data=marker_cells())
    assert (
        "training.strategy fsdp has no effect: it divides a model over processes, and this is one."
        in caplog.messages
    )
