"""Labels: which can be learned, what is said when they cannot, and that they travel with the model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scmodelforge.config import Config, Split
from scmodelforge.data.split import split_cells
from scmodelforge.errors import DataError, ModelError
from scmodelforge.finetuning.run import finetune
from scmodelforge.inference import annotate
from scmodelforge.models.bundle import load_model
from scmodelforge.training.run import RunResult
from tests.helpers import finetune_config, marker_cells


@pytest.fixture
def checkpoint(pretrained: RunResult) -> Path:
    return pretrained.checkpoint_dir / "best.ckpt"


def labelled(changes: dict[int, object], key: str = "cell_type") -> ad.AnnData:
    """`marker_cells` with the labels of some cells replaced."""
    adata = marker_cells()
    values = adata.obs[key].astype(object)
    values.iloc[list(changes)] = list(changes.values())
    adata.obs[key] = values if key == "age" else pd.Categorical(values)
    return adata


def test_labels_travel_with_the_model(annotator: RunResult) -> None:
    assert annotator.model.labels.classes == ("B", "NK", "T"), "sorted"
    unseen = marker_cells(60, seed=3)
    tables = []
    for model in (
        annotator.model,
        annotator.checkpoint_dir / "best.ckpt",
        annotator.run_dir / "model",
        load_model(annotator.run_dir / "model"),
    ):
        tables.append(annotate(unseen, model, copy=True).obs)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    found = tables[0]["scmodelforge_cell_type"]
    assert list(found.cat.categories) == ["B", "NK", "T"]
    assert (found.astype(str) == unseen.obs["cell_type"].astype(str)).mean() > 0.95
    assert tables[0]["scmodelforge_cell_type_probability"].between(1 / 3, 1).all()


def test_the_parameters_of_the_head_are_counted(annotator: RunResult, pretrained: RunResult) -> None:
    assert annotator.model.head is not None
    head = sum(parameter.numel() for parameter in annotator.model.head.parameters())
    assert head > 0
    record = json.loads((annotator.run_dir / "run.json").read_text())
    assert record["model"]["n_parameters"] == pretrained.model.n_parameters + head
    assert annotator.model.n_parameters == load_model(annotator.run_dir / "model").n_parameters
    assert record["model"]["n_parameters"] == annotator.model.n_parameters


def test_labels_that_are_numbers_or_booleans_are_classes_too(checkpoint: Path, tmp_path: Path) -> None:
    adata = marker_cells()
    adata.obs["cluster"] = adata.obs["cell_type"].cat.codes.to_numpy().astype(np.int64) + 9
    config = finetune_config(tmp_path, {"max_epochs": 2}, label_key="cluster")
    result = finetune(config, checkpoint, data=adata)
    assert result.model.labels.classes == ("10", "11", "9"), "as text, in the order of text"
    assert json.loads((result.run_dir / "model" / "labels.json").read_text())["classes"] == ["10", "11", "9"]


def test_cells_without_a_label_are_refused_or_left_out(checkpoint: Path, tmp_path: Path) -> None:
    adata = labelled(dict.fromkeys(range(20), np.nan) | {20: ""})
    with pytest.raises(DataError, match="21 of 240 cells of AnnData have no label in obs") as error:
        finetune(finetune_config(tmp_path), checkpoint, data=adata)
    assert "drop_unlabelled: true" in str(error.value)
    config = finetune_config(tmp_path, {"max_epochs": 1}, drop_unlabelled=True)
    facts = json.loads((finetune(config, checkpoint, data=adata).run_dir / "run.json").read_text())["data"]
    assert facts["n_train"] + facts["n_val"] == 219
    assert facts["n_cells"] == 240


def test_regression_leaves_out_or_refuses_cells_without_a_number(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adata = labelled({0: np.nan, 1: np.nan}, "age")
    regression = {"label_key": "age", "head": {"task": "regression"}}
    with pytest.raises(DataError, match="2 of 240 cells of AnnData have no label in obs"):
        finetune(finetune_config(tmp_path, **regression), checkpoint, data=adata)
    config = finetune_config(tmp_path, {"max_steps": 1}, drop_unlabelled=True, **regression)
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        result = finetune(config, checkpoint, data=adata)
    assert "2 cells without a label in obs['age'] are left out." in caplog.messages
    assert 40 < result.model.labels.mean < 60, "NaN does not reach the mean"


@pytest.mark.parametrize(
    ("changes", "finetuning", "said"),
    [
        ({}, {"label_key": "cell_typ"}, "AnnData has no obs column 'cell_typ'. Did you mean 'cell_type'?"),
        ({}, {"label_key": "age"}, "set finetune.head.task: regression"),
        ({0: "rare"}, {}, "obs['cell_type'] of AnnData has classes with fewer than 2 cells: 'rare' (1)."),
        (
            dict.fromkeys(range(240), "B"),
            {},
            "obs['cell_type'] of AnnData has only one class ('B', 240 cells); at least two",
        ),
        (
            {},
            {"head": {"n_classes": 7}},
            "finetune.head.n_classes is 7, but obs['cell_type'] has 3 classes: B, NK, T. "
            "Set it to null to take the number from the data.",
        ),
        (
            {},
            {"head": {"task": "regression"}},
            "obs['cell_type'] of AnnData is no number in 240 cells, e.g. ",
        ),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[int, object], finetuning: dict, said: str
) -> None:
    with pytest.raises(DataError) as error:
        finetune(finetune_config(tmp_path, **finetuning), checkpoint, data=labelled(changes))
    assert said in str(error.value)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_constant_number_is_nothing_to_learn(checkpoint: Path, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, label_key="age", head={"task": "regression"})
    with pytest.raises(DataError, match=r"obs\['age'\] of AnnData has fewer than two different values"):
        finetune(config, checkpoint, data=labelled(dict.fromkeys(range(240), 50.0), "age"))


def test_a_number_of_classes_that_agrees_is_fine(checkpoint: Path, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, {"max_steps": 1}, head={"n_classes": 3})
    assert finetune(config, checkpoint, data=marker_cells()).model.labels.n_outputs == 3


def test_a_class_that_only_validates_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = finetune_config(tmp_path)
    split = Split(val_split=0.25, group_key="donor")
    config = config.model_copy(update={"data": config.data.model_copy(update={"split": split})})
    validating = split_cells(marker_cells().obs, split, config.training.seed)[1][:5]
    with pytest.raises(DataError) as error:
        finetune(config, checkpoint, data=labelled(dict.fromkeys(validating.tolist(), "only here")))
    assert "After the split no training cell has the class 'only here'" in str(error.value)
    assert "data.split.group_key: donor" in str(error.value)


def test_a_config_that_contradicts_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    sections = finetune_config(tmp_path).model_dump()
    config = Config.model_validate(
        {"training": sections["training"], "model": {"hidden_dim": 64}, "tokenizer": {"max_genes": 100}}
    )
    with pytest.raises(ModelError) as error:
        finetune(config, checkpoint, data=marker_cells())
    assert "model.hidden_dim" in str(error.value)
    assert "tokenizer.max_genes" in str(error.value)
    assert "64" in str(error.value)


def test_no_cells_at_all(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There are no cells to fine-tune on: data\.paths is empty"):
        finetune(finetune_config(tmp_path), checkpoint)
