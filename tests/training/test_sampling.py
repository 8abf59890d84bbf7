"""Training on cells drawn by weight or in stretches: as long as the draws, and resumed exactly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scmodelforge.config import Config, DataConfig, Masking, Preprocessing, TokenizerConfig
from scmodelforge.data.module import CellDataModule, training_order
from scmodelforge.data.order import FixedSize
from scmodelforge.data.store import CellStore, open_store
from scmodelforge.errors import DataError, ModelError
from scmodelforge.finetuning.run import finetune
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.callbacks import LastCheckpoint
from scmodelforge.training.run import RunResult, train
from tests.helpers import finetune_config, make_vocab, marker_cells, masked_genes, rank_tokenizer, tiny_config

N_DRAWS, STEPS = 200, 7  # an epoch, in batches of 30
EPOCHS = 3
SAMPLING = {
    "label_key": "cell_type",
    "curriculum_epochs": 1,
    "mixture": {"one.h5ad": 3, "*": 1},
    "max_repeats": 8,
    "cells_per_epoch": N_DRAWS,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are quickest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets; B cells are rare in the first."""
    folder = tmp_path_factory.mktemp("files")
    cells = marker_cells(120)
    rare = np.flatnonzero(cells.obs["cell_type"] == "B")[5:]
    first = cells[np.setdiff1d(np.arange(120), rare)].copy()
    for name, part in (("one", first), ("two", marker_cells(60, seed=1))):
        part.obs_names = [f"{name}_{cell}" for cell in part.obs_names]
        part.write_h5ad(folder / f"{name}.h5ad")
    return [str(folder / f"{name}.h5ad") for name in ("one", "two")]


def config_of(files: list[str], run_dir: Path, **data) -> Config:
    training = {"max_epochs": EPOCHS, "checkpoint_every_n_steps": 1, "log_every_n_steps": 1}
    return tiny_config(run_dir, data={"paths": files, **data}, training=training)


def with_copies(config: Config, stops: tuple[int, ...]) -> RunResult:
    """A whole run that leaves stop5.ckpt and so on in its folder, as interruptions at these steps would have."""
    save = LastCheckpoint._save

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.global_step in stops:
            shutil.copy(self.path, Path(config.training.run_dir) / f"stop{trainer.global_step}.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        return train(config)


@pytest.mark.parametrize(
    ("data", "stops"), [({"sampling": SAMPLING}, (STEPS - 2, 2 * STEPS + 3)), ({"shuffle_buffer": 20}, (4,))]
)
def test_a_resumed_run_draws_what_the_whole_one_would_have(
    files: list[str], tmp_path: Path, data: dict, stops: tuple[int, ...]
) -> None:
    whole = with_copies(config_of(files, tmp_path / "whole", **data), stops)
    first = read_checkpoint(whole.checkpoint_dir / "last.ckpt")
    for stop in stops:
        config = config_of(files, tmp_path / f"resumed{stop}", **data)
        resumed = train(config, resume=whole.run_dir / f"stop{stop}.ckpt")
        second = read_checkpoint(resumed.checkpoint_dir / "last.ckpt")
        assert first["global_step"] == second["global_step"] > stop
        for name, tensor in first["state_dict"].items():
            assert torch.equal(tensor, second["state_dict"][name]), name


def test_an_epoch_is_as_long_as_its_draws_and_balanced(files: list[str], tmp_path: Path) -> None:
    read: list[np.ndarray] = []
    original = CellStore.read

    def noted(self, rows):
        read.append(rows)
        return original(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellStore, "read", noted)
        result = train(config_of(files, tmp_path, sampling=SAMPLING, split={"val_split": 0.0}))
    assert read_checkpoint(result.checkpoint_dir / "last.ckpt")["global_step"] == EPOCHS * STEPS
    rates = pd.read_csv(tmp_path / "metrics.csv")["learning_rate"].dropna()
    assert rates.iloc[-1] < rates.max() / 10, "the schedule ends with the run"
    last = np.concatenate(read[-STEPS:])  # of the last epoch, in any order
    assert len(last) == N_DRAWS
    drawn = pd.concat([ad.read_h5ad(path).obs for path in files]).iloc[last]
    from_one = drawn.index.str.startswith("one")
    assert from_one.sum() == 150
    counts = drawn["cell_type"][from_one].value_counts()
    assert counts["B"] == 40, "5 cells, at most 8 times each"
    assert abs(counts["T"] - counts["NK"]) <= 1


def test_a_run_goes_on_only_with_the_same_sampling(files: list[str], tmp_path: Path) -> None:
    config = config_of(files, tmp_path / "run", sampling=SAMPLING)
    last = train(config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 1})}))
    checkpoint = last.checkpoint_dir / "last.ckpt"
    with pytest.raises(
        ModelError, match=r"data\.sampling\.label_key: null in the config, cell_type in the run"
    ):
        train(config_of(files, tmp_path / "other"), resume=checkpoint)
    other = SAMPLING | {"mixture": {"one.h5ad": 2, "*": 1}}
    with pytest.raises(
        ModelError, match=r"data\.sampling\.mixture\.one\.h5ad: 2\.0 in the config, 3\.0 in the run"
    ):
        train(config_of(files, tmp_path / "other", sampling=other), resume=checkpoint)


def test_a_missing_label_is_said_before_anything_is_written(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sampling\.label_key is 'celltype'.*Did you mean 'cell_type'"):
        train(config_of(files, tmp_path / "run", sampling={"label_key": "celltype"}))
    assert not (tmp_path / "run").exists()


def test_fine_tuning_draws_by_weight_too(pretrained: RunResult, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, {"max_epochs": 2, "log_every_n_steps": 1})
    sampling = {"label_key": "cell_type", "cells_per_epoch": 600}  # 180 cells train: each comes several times
    data = config.data.model_validate(config.data.model_dump(exclude_unset=True) | {"sampling": sampling})
    result = finetune(
        config.model_copy(update={"data": data}), pretrained.checkpoint_dir / "best.ckpt", data=marker_cells()
    )
    assert read_checkpoint(result.checkpoint_dir / "last.ckpt")["global_step"] == 2 * 20
    assert result.metrics["val_macro_f1"] > 0.8


def test_a_cell_that_comes_again_is_masked_in_another_way() -> None:
    store = open_store([marker_cells(12)], make_vocab(40), DataConfig(min_gene_overlap=0))
    order = training_order(store, np.arange(12), DataConfig(sampling={"cells_per_epoch": 24}), 3)
    tokenizer = rank_tokenizer(TokenizerConfig(max_genes=32), Preprocessing(), make_vocab(40))
    task = masked_genes(Masking(), make_vocab(40))

    def make_batch(cells, epoch, batch_seed):
        return cells.rows, task.corrupt(tokenizer(cells, 3, epoch), 3, epoch, batch_seed)

    ((rows, batch),) = CellDataModule(store, FixedSize(order, 24), None, make_batch, 3, 1).train_dataloader()
    assert (np.bincount(rows) == 2).all()
    hidden = batch.tokens.input_ids.numpy()
    for row in range(12):
        first, second = hidden[rows == row]
        assert not np.array_equal(first, second)
