"""Training, fine-tuning and shards from a Census that lies on this disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from scmodelforge.data import census
from scmodelforge.data.sources import open_matrix
from scmodelforge.manifest import shard_paths
from scmodelforge.models.bundle import load_model, read_checkpoint
from scmodelforge.training.callbacks import LastCheckpoint
from tests.data.local_census import census_cells, write_census
from tests.journeys.command import checkpoint, done, files_below, refused, sets

CONFIG = """\
data:
  source: census
  gene_vocab: from_data
  shuffle_buffer: 64
  census:
    uri: {uri}
    tissue_general: [lung, blood]
    obs_value_filter: nnz > 1
  split: {{val_split: 0.2, group_key: donor_id}}
tokenizer: {{max_genes: 32, obs_tokens: [assay]}}
model: {{hidden_dim: 16, num_layers: 1, num_heads: 2}}
training:
  batch_size: 30
  max_epochs: 2
  num_gpus: 0
  checkpoint_every_n_steps: 1
  optimizer: {{lr: 0.01}}
finetune:
  label_key: cell_type
"""


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Neighbours that stay together are so few that these 300 cells make many blocks of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census, "NEIGHBOURS", 16)
        yield


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return write_census(tmp_path_factory.mktemp("census") / "soma", homo_sapiens=census_cells())


@pytest.fixture(scope="module")
def config(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "census.yaml"
    path.write_text(CONFIG.format(uri=uri))
    return path


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and last.ckpt as it was after step 5 of 2 × 7."""
    run = tmp_path_factory.mktemp("run") / "whole"
    save = LastCheckpoint._save

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.global_step == 5:
            shutil.copy(self.path, run / "middle.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", save_and_copy)
        done("train", "--config", config, *sets(training__run_dir=run))
    return run


def test_a_run_records_its_census_and_learns(trained: Path, uri: str) -> None:
    record = json.loads((trained / "run.json").read_text())
    facts = record["data"]
    cells = census_cells()
    n_cells = int((cells.obs.is_primary_data & (cells.obs.nnz > 1)).sum())
    assert facts["n_cells"] == n_cells == facts["n_train"] + facts["n_val"]
    assert facts["census"] == {
        "uri": uri,
        "release": "2026-01-01",
        "schema": "2.1.0",
        "organism": "homo_sapiens",
        "filter": "is_primary_data == True and tissue_general in ['lung', 'blood'] and (nnz > 1)",
        "n_cells": n_cells,
        "n_datasets": 3,
    }
    assert any("all training cells are read three times over" in note for note in record["notes"])
    assert f"Census {uri}, homo_sapiens" in (trained / "model/model_card.md").read_text()
    assert load_model(trained / "model").vocab.n_genes == 60


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "copied elsewhere"])
def test_a_resumed_run_ends_with_the_same_weights(
    config: Path, uri: str, trained: Path, tmp_path: Path, moved: bool
) -> None:
    where = sets(data__census__uri=shutil.copytree(uri, tmp_path / "copy")) if moved else []
    done(
        "train",
        "--config",
        config,
        "--resume",
        trained / "middle.ckpt",
        *sets(training__run_dir=tmp_path),
        *where,
    )
    whole, resumed = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (trained, tmp_path))
    assert whole["global_step"] == resumed["global_step"]
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    assert all(
        torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in whole["state_dict"].items()
    )


def test_single_cells_that_validate_are_warned_of(config: Path, tmp_path: Path) -> None:
    options = sets(training__run_dir=tmp_path, training__max_steps=1, data__split__group_key="null")
    assert "nearly all cells of the Census are read. Name a column" in " ".join(
        done("train", "--config", config, *options).err.split()
    )


def test_other_cells_are_no_continuation(config: Path, trained: Path, tmp_path: Path) -> None:
    refused(
        *("train", "--config", config, "--resume", trained / "middle.ckpt"),
        *sets(training__run_dir=tmp_path, data__census__obs_value_filter="nnz > 25"),
        words=("cannot go on", "data.census.obs_value_filter: nnz > 25 in the config, nnz > 1 in the run"),
    )
    assert not files_below(tmp_path)


def test_a_model_learns_labels_of_the_census(config: Path, trained: Path, tmp_path: Path) -> None:
    labels_only = tmp_path / "finetune.yaml"
    sections = config.read_text().partition("tokenizer:")
    labels_only.write_text(sections[0] + "training:" + sections[2].partition("training:")[2])
    done(
        *("finetune", "--config", labels_only, "--checkpoint", checkpoint(trained)),
        *sets(training__run_dir=tmp_path / "run", training__max_epochs=1),
    )
    labels = load_model(tmp_path / "run/model").labels
    assert labels.classes == ("B cell", "T cell", "natural killer cell")


def test_shards_hold_the_cells_of_the_census(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    answer = done("shard", "--config", config, "--output", folder, "--cells-per-shard", 100)
    assert f"{folder}" in answer.out
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.h5ad"))
    other = ("shard", "--config", config, "--output", folder, "--cells-per-shard", 100)
    refused(*other, *sets(data__census__tissue_general="[lung]"), words=("other cells of the Census",))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.h5ad")) == before
    done("shard", "--verify", folder)
    from scmodelforge.config_io import load_config

    matrix = open_matrix(load_config(config).data.census)
    shards = [ad.read_h5ad(path) for path in shard_paths(folder)]
    assert [shard.n_obs for shard in shards][:-1] == [100] * (len(shards) - 1)
    together = ad.concat(shards)
    assert together.obs_names.tolist() == matrix.obs.index.astype(str).tolist()
    assert together.obs["cell_type"].tolist() == matrix.obs["cell_type"].tolist()
    cells = census_cells()[matrix.obs.index.to_numpy()]
    np.testing.assert_array_equal(together.X.toarray(), cells.X.toarray())
    before = {path: path.stat().st_mtime_ns for path in shard_paths(folder)}
    done("shard", "--config", config, "--output", folder, "--cells-per-shard", 100)  # all there already
    assert before == {path: path.stat().st_mtime_ns for path in shard_paths(folder)}
    plain = tmp_path / "shards.yaml"
    text = config.read_text()
    plain.write_text(
        f"data:\n  paths: ['{folder}/*.h5ad']\n  gene_vocab: from_data\n" + text[text.index("  split") :]
    )
    done("train", "--config", plain, *sets(training__run_dir=tmp_path / "run", training__max_epochs=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__census": "null"}, ("data.source census needs data.census",)),
        ({"data__source": "local"}, ("data.census is there, but data.source is local",)),
        ({"data__paths": "[cells.h5ad]"}, ("data.paths: with data.source census",)),
        ({"data__layer": "counts"}, ("data.layer: the Census has one layer",)),
        (
            {"data__split__group_key": "sex"},
            ("data.split.group_key reads the obs column 'sex'", "obs_columns"),
        ),
        (
            {"tokenizer__obs_tokens": "[sex]"},
            ("tokenizer.obs_tokens reads the obs column 'sex'", "obs_columns"),
        ),
        ({"data__census__obs_value_filter": "nnz >"}, ("obs_value_filter", "'nnz >' is no condition")),
        (
            {"data__census__tissu": "[lung]"},
            ("data.census.tissu: is unknown; did you mean data.census.tissue?",),
        ),
        ({"data__census__tissue": "lung"}, ("data.census.tissue: must be a list", "write [lung]")),
        ({"data__census__obs_columns": "[celltype]"}, ("'celltype'", "did you mean 'cell_type'")),
        ({"data__census__uri": "/nowhere"}, ("The Census at '/nowhere' cannot be opened",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_end_in_one_message(config: Path, tmp_path: Path, changes, words) -> None:
    changes = {"data__split__group_key": "null", "tokenizer__obs_tokens": "[]"} | changes
    refused("train", "--config", config, *sets(training__run_dir=tmp_path / "run", **changes), words=words)
    assert not files_below(tmp_path)
