"""Training on batches of a token budget: as long as said, resumed exactly, refused where it cannot be."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from scmodelforge.config import Config
from scmodelforge.data.batch import REPEAT
from scmodelforge.data.module import CellDataModule
from scmodelforge.errors import ConfigError, ModelError
from scmodelforge.finetuning.run import finetune
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.callbacks import LastCheckpoint
from scmodelforge.training.run import RunResult, train
from tests.helpers import finetune_config, marker_cells, tiny_config

BUDGET, EPOCHS, N_CELLS = 400, 3, 240


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are quickest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of 5 to about 30 tokens."""
    adata = marker_cells(N_CELLS)
    rng = np.random.default_rng(1)
    depth = rng.uniform(0.1, 1.0, N_CELLS)
    adata.X = adata.X.multiply(rng.random(adata.shape) < depth[:, None]).tocsr().astype(np.float32)
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def config_of(cells: Path, run_dir: Path, tokens: int | None = BUDGET, data: dict | None = None, **training):
    training = {"max_epochs": EPOCHS, "checkpoint_every_n_steps": 1, "log_every_n_steps": 1} | training
    config = tiny_config(run_dir, data={"paths": [str(cells)]} | (data or {}))
    tree = config.model_dump(exclude_unset=True)
    tree["training"] |= training | {"tokens_per_batch": tokens}
    del tree["training"]["batch_size"]
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def whole(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[tuple]]:
    """A whole run, with a copy of last.ckpt at each step, and the rows and tokens of its batches."""
    folder = tmp_path_factory.mktemp("whole")
    save, make, made = LastCheckpoint._save, CellDataModule._make, []

    def save_and_copy(self, trainer):
        save(self, trainer)
        shutil.copy(self.path, folder / f"stop{trainer.global_step}.ckpt")

    def noted(self, cell_index, epoch, step, announce=None):
        batch = make(self, cell_index, epoch, step, announce)
        made.append((epoch, step, (cell_index & (REPEAT - 1)).tolist(), batch.n_tokens))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        patch.setattr(CellDataModule, "_make", noted)
        return train(config_of(cells, folder)), made


def test_a_batch_holds_the_tokens_that_it_may(whole: tuple[RunResult, list[tuple]]) -> None:
    result, made = whole
    epochs: dict[int, list[tuple]] = {}
    for epoch, *batch in made:
        epochs.setdefault(epoch, []).append(batch)
    validation = max(epochs)
    for epoch in range(EPOCHS):
        rows = [row for _, cells, _ in epochs[epoch] for row in cells]
        assert len(rows) == len(set(rows)) == 180
        tokens = [n_tokens for _, _, n_tokens in epochs[epoch]]
        assert 0.8 * BUDGET < np.mean(tokens) <= max(tokens) <= BUDGET
        assert len(tokens) == len(epochs[0]) > 4
    assert max(n_tokens for *_, n_tokens in epochs[validation]) <= BUDGET
    of_one_pass = {(step, tuple(cells)) for step, cells, _ in epochs[validation]}
    assert sum(len(cells) for _, cells in of_one_pass) == 60, "the same batches in every epoch"
    steps = read_checkpoint(result.checkpoint_dir / "last.ckpt")["global_step"]
    assert steps == EPOCHS * len(epochs[0])
    rates = pd.read_csv(result.run_dir / "metrics.csv")["learning_rate"].dropna()
    assert rates.iloc[-1] < rates.max() / 10, "the schedule ends with the run"


def test_padding_is_what_a_batch_lacks_of_the_budget(whole: tuple[RunResult, list[tuple]]) -> None:
    result, made = whole
    tokens = [n for epoch, step, _, n in made if epoch < EPOCHS and (epoch, step) != (0, 0)]
    assert result.performance["steps"] == len(tokens), "the first step warms up"
    empty = len(tokens) * BUDGET - sum(tokens)
    assert empty > 0
    assert result.performance["padding_share"] == pytest.approx(empty / (len(tokens) * BUDGET))


@pytest.mark.parametrize("share", [0.2, 1 / EPOCHS, 0.5])
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(
    cells: Path, whole: tuple[RunResult, list[tuple]], tmp_path: Path, share: float
) -> None:
    first = read_checkpoint(whole[0].checkpoint_dir / "last.ckpt")
    stop = round(share * first["global_step"])
    resumed = train(
        config_of(cells, tmp_path, loader_threads=3), resume=whole[0].run_dir / f"stop{stop}.ckpt"
    )
    second = read_checkpoint(resumed.checkpoint_dir / "last.ckpt")
    assert first["global_step"] == second["global_step"] > stop
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name


def test_a_run_goes_on_only_with_the_same_budget(
    cells: Path, whole: tuple[RunResult, list[tuple]], tmp_path: Path
) -> None:
    for tokens, shown in ((300, "300"), (None, "null")):
        with pytest.raises(
            ModelError, match=rf"training\.tokens_per_batch: {shown} in the config, 400 in the run"
        ):
            train(config_of(cells, tmp_path / "other", tokens), resume=whole[0].checkpoint_dir / "last.ckpt")


def test_fine_tuning_takes_a_budget_too(
    pretrained: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = finetune_config(tmp_path, {"tokens_per_batch": 700, "log_every_n_steps": 1})
    with caplog.at_level(logging.INFO, logger="scmodelforge"):
        result = finetune(config, pretrained.checkpoint_dir / "best.ckpt", data=marker_cells())
    assert "training.batch_size has no effect" in caplog.text
    assert "of at most 700 tokens, filled to" in caplog.text
    assert result.metrics["val_macro_f1"] > 0.8


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_written(
    cells: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"training\.tokens_per_batch is 20, and .* have more tokens"):
        train(config_of(cells, tmp_path / "run", 20))
    with pytest.raises(
        ConfigError, match=r"cells\.h5ad is read in blocks of neighbours.*\n.*scmodelforge shard"
    ):
        train(config_of(cells, tmp_path / "run", data={"shuffle_buffer": 50}))
    assert not (tmp_path / "run").exists()


def test_obs_tokens_take_a_place_each(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(Exception):
        """Carries the lengths, and ends the run."""

    def stop(order, val_rows, lengths, tokens_per_batch, world):
        raise Measured(lengths)

    monkeypatch.setattr("scmodelforge.training.batches.token_budgets", stop)
    measured = []
    for columns in ([], ["donor", "cell_type"]):
        tree = config_of(cells, tmp_path).model_dump(exclude_unset=True)
        tree["tokenizer"]["obs_tokens"] = columns
        with pytest.raises(Measured) as found:
            train(Config.model_validate(tree))
        measured.append(found.value.args[0])
    assert len(measured[0]) == N_CELLS
    np.testing.assert_array_equal(measured[1], measured[0] + 2)


# The command itself, with a note of the cells of each batch.
NOTED = """
import json, os
from scmodelforge import cli
from scmodelforge.data.batch import REPEAT
from scmodelforge.data.module import CellDataModule
make = CellDataModule._make
def noted(self, cell_index, epoch, step, announce=None):
    batch, rows = make(self, cell_index, epoch, step, announce), cell_index & (REPEAT - 1)
    with open(f"{os.environ['NOTES']}/{self.trainer.global_rank}", "a") as file:
        file.write(json.dumps([epoch, step, rows.tolist(), batch.n_tokens]) + chr(10))
    return batch
CellDataModule._make = noted
cli.main()
"""


@pytest.mark.slow
def test_two_processes_get_equally_many_tokens(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "noted.py").write_text(NOTED)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(cells, tmp_path / "run").model_dump(exclude_unset=True)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    answer = subprocess.run(
        [*launcher, str(tmp_path / "noted.py"), "train", "--config", str(config)],
        env={**os.environ, "NOTES": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a hang is what this test is about
    )
    assert answer.returncode == 0, answer.stderr
    of_ranks = [
        {(epoch, step): (rows, tokens) for epoch, step, rows, tokens in map(json.loads, lines)}
        for lines in ((tmp_path / str(rank)).read_text().splitlines() for rank in (0, 1))
    ]
    assert of_ranks[0].keys() == of_ranks[1].keys()
    for epoch in range(EPOCHS):
        pairs = [tuple(rank[at] for rank in of_ranks) for at in of_ranks[0] if at[0] == epoch]
        rows = [row for pair in pairs for cells_of, _ in pair for row in cells_of]
        assert len(rows) == len(set(rows)) == 180
        tokens = np.array([[n for _, n in pair] for pair in pairs])
        assert tokens.max() <= BUDGET
        assert (tokens.max(axis=1) / tokens.mean(axis=1)).max() < 1.05
