"""A benchmark says which of its cells the model was trained on, by the files that training really left."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata
import pytest

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.evaluation.harness import evaluate
from scmodelforge.models.bundle import load_model, save_bundle
from scmodelforge.training.run import train
from tests.helpers import marker_cells, tiny_config

QUICK = Config.model_validate(
    {
        "eval": {
            "baselines": [],
            "benchmarks": [{"name": "linear_probe", "params": {"n_splits": 1, "group_key": None}}],
        }
    }
)


def seen(model, cells):
    found = evaluate(QUICK, model, cells)
    return found.seen_cells, found.notes


@pytest.mark.parametrize("file", ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "model"])
def test_training_cells_are_found_whatever_they_are_called_now(pretrained, file):
    trained = marker_cells()  # of its 240 cells three quarters train
    trained.obs_names = [f"renamed{i}" for i in range(240)]
    trained = trained[::-1, ::-1].copy()
    (n, share), notes = seen(pretrained.run_dir / file, trained)
    assert (n, share) == (180, 0.75)
    assert any("180 of 240 cells (75.0%)" in note for note in notes)


def test_other_cells_are_not_and_a_model_without_a_record_says_so(pretrained, tmp_path):
    others = marker_cells(100, seed=9)
    found, notes = seen(pretrained.model, others)
    assert found == (0, 0.0)
    assert any("No cell of" in note and "was in the training" in note for note in notes)
    save_bundle(replace(pretrained.model, trained_on=()), tmp_path / "model")
    assert not (tmp_path / "model" / "training_cells.safetensors").exists()
    found, notes = seen(tmp_path / "model", others)
    assert found is None
    assert any("no record of the cells it was trained on" in note for note in notes)


def test_cells_of_the_training_before_are_remembered(annotator, pretrained, tmp_path):
    others = marker_cells(100, seed=9)
    config = tiny_config(tmp_path, training={"max_epochs": 1})
    again = train(config, data=others, checkpoint=pretrained.run_dir / "model").model
    assert [(one.n_cells, one.n_known) for one in again.trained_on] == [(180, 180), (75, 75)]
    both = anndata.concat([marker_cells(), others])
    both.obs_names_make_unique()
    assert seen(again, both)[0].n == 255
    tuned = load_model(annotator.run_dir / "model")
    assert [one.n_cells for one in tuned.trained_on] == [180, 180]


def test_a_damaged_record_is_named(pretrained, tmp_path):
    save_bundle(pretrained.model, tmp_path)
    (tmp_path / "training_cells.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"training_cells.safetensors' is damaged"):
        load_model(tmp_path)


def test_the_results_hold_the_number(pretrained, tmp_path):
    evaluate(QUICK, pretrained.model, marker_cells(), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["seen_cells"] == {"n": 180, "share": 0.75}
