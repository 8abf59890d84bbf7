"""Benchmarks while training see validation cells only, change no weight, and leave figures in metrics.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.data.selected import SelectedCells
from scmodelforge.errors import ConfigError, DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method
from scmodelforge.evaluation.linear_probe import BENCHMARK
from scmodelforge.inference import embed_store, open_for
from scmodelforge.models.bundle import load_model, read_checkpoint
from scmodelforge.training.run import RunResult, train
from tests.helpers import marker_cells, tiny_config

PROBE = {"name": "linear_probe", "params": {"n_splits": 2}}


def config(run_dir: Path, training: dict[str, Any] | None = None, **evaluation: Any) -> Config:
    return tiny_config(
        run_dir,
        eval={"benchmarks": [PROBE], **evaluation},
        model={"dropout": 0.1},  # so that the random state matters
        training={"max_epochs": 3, "num_gpus": 0, **(training or {})},
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    torch.set_num_threads(1)
    return train(config(tmp_path_factory.mktemp("plain")), data=marker_cells())


def rows(run: RunResult) -> dict[int, dict[str, str]]:
    with open(run.run_dir / "metrics.csv", newline="") as file:
        return {
            int(row["step"]): {
                name: value for name, value in row.items() if name.startswith("eval/") and value
            }
            for row in csv.DictReader(file)
        }


def weights(run: RunResult, file: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return read_checkpoint(run.checkpoint_dir / file)["state_dict"]


@pytest.mark.parametrize(
    ("rhythm", "steps"), [({"every_n_epochs": 2}, [12]), ({"every_n_steps": 4}, [4, 8, 12, 16])]
)
def test_weights_are_those_of_a_run_without_it_bit_for_bit(plain, tmp_path, rhythm, steps):
    torch.set_num_threads(1)
    run = train(config(tmp_path, **rhythm), data=marker_cells())
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(run)[name]), name
    assert [step for step, row in rows(run).items() if row] == steps  # six steps an epoch
    assert "eval/linear_probe/macro_f1" in rows(run)[steps[0]]
    assert not any(rows(plain).values())


def test_figures_are_those_of_the_validation_cells(tmp_path):
    run = train(config(tmp_path, every_n_epochs=3), data=marker_cells())
    last = rows(run)[18]
    cells = marker_cells()
    trained = run.model.trained_on[0]
    store = open_for(run.model, cells)
    held_out = np.flatnonzero(~trained.contain(store.read(np.arange(240))))
    assert len(held_out) == 60
    view = SelectedCells(store, held_out)
    assert view.obs.index.tolist() == cells.obs.index[held_out].tolist()
    model = load_model(run.checkpoint_dir / "last.ckpt")
    embedding = embed_store(model, view)
    scores = BENCHMARK.run(
        [Method("model", False, embedding)],
        EvaluationCells(view, None, None, "cells"),
        config(tmp_path).eval.benchmarks[0].params,
        0,
    )
    assert float(last["eval/linear_probe/macro_f1"]) == pytest.approx(scores["model"].metrics["macro_f1"])


def test_without_validation_cells_it_is_refused(tmp_path):
    settings = tiny_config(tmp_path, data={"split": {"val_split": 0}}, eval={"every_n_epochs": 1})
    with pytest.raises(
        ConfigError, match=r"eval.every_n_epochs evaluates the validation cells(.|\n)*val_split is 0"
    ):
        train(settings, data=marker_cells())
    assert not any(tmp_path.iterdir())


def test_labels_are_checked_before_training(tmp_path):
    cells = marker_cells()
    cells.obs = cells.obs.drop(columns="cell_type")
    with pytest.raises(DataError, match=r"the validation cells of .* has no obs column 'cell_type'"):
        train(config(tmp_path, every_n_steps=5), data=cells)


def test_one_rhythm_at_a_time():
    with pytest.raises(ValueError, match="every_n_epochs and every_n_steps exclude each other"):
        Config.model_validate({"eval": {"every_n_epochs": 1, "every_n_steps": 1}})
