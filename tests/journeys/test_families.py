"""Every family's config, made small, goes the whole way: train, resume, benchmark, fine-tune, annotate, embed."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.callbacks import LastCheckpoint
from tests.journeys.command import checkpoint, done, sets

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = ("geneformer_v1", "geneformer_v2", "scgpt", "transcriptformer", "scfoundation")


def small(name: str, cells: Path, run: Path, **more: object) -> list[str]:
    """The family's config with a model that trains in seconds."""
    return [
        "--config",
        str(CONFIGS / f"{name}.yaml"),
        *sets(
            data__paths=f"[{cells}]",
            data__gene_vocab="from_data",
            tokenizer__max_genes=48,
            model__hidden_dim=16,
            model__num_layers=2,
            model__num_heads=2,
            model__ffn_dim=32,
            model__decoder__hidden_dim=8,
            model__decoder__num_heads=2,
            model__decoder__num_layers=1,
            training__precision="32-true",
            training__num_gpus=0,
            training__batch_size=64,
            training__optimizer__lr=0.003,
            training__run_dir=run,
            **{"training__max_epochs": 2, **more},
        ),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_the_whole_way(name: str, cells: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = done("train", *small(name, cells, run)).out
    assert "val_loss" in out
    model = run / "model"
    tuned = tmp_path / "tuned"
    finetuning = sets(data__paths=f"[{cells}]", training__run_dir=tuned, training__max_epochs=1)
    tune = tmp_path / "finetune.yaml"
    tune.write_text("finetune:\n  label_key: cell_type\n")
    done("finetune", "--config", tune, "--checkpoint", checkpoint(run), *finetuning)
    done("annotate", "--model", tuned / "model", "--data", cells, "--output", tmp_path / "annotated.h5ad")
    assert "scmodelforge_cell_type" in anndata.read_h5ad(tmp_path / "annotated.h5ad").obs
    done("embed", "--model", model, "--data", cells, "--output", tmp_path / "embedded.h5ad")
    embedding = anndata.read_h5ad(tmp_path / "embedded.h5ad").obsm["X_scmodelforge"]
    assert embedding.shape == (700, 16)
    assert np.isfinite(embedding).all()
    assert (embedding.std(axis=0) > 0).all()
    table = done("benchmark", "--model", model, "--data", cells).out
    assert "untrained" in table
    shown = done("tokens", cells, "--model", model).out
    assert "ENSG" in shown


@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_ends_with_the_same_weights(name: str, cells: Path, tmp_path: Path) -> None:
    save, middle = LastCheckpoint._save, tmp_path / "middle.ckpt"

    def save_and_copy(self, trainer):
        save(self, trainer)
        if not middle.exists():
            shutil.copy(self.path, middle)

    steps = {"training__checkpoint_every_n_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        done("train", *small(name, cells, tmp_path / "whole", **steps))
    done("train", *small(name, cells, tmp_path / "resumed", **steps), "--resume", middle)
    whole, resumed = (
        read_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in ("whole", "resumed")
    )
    assert 0 < read_checkpoint(middle)["global_step"] < whole["global_step"] == resumed["global_step"]
    for key, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][key]), key
