"""`data.cache_dir`: slow files become shards once, and training does not see the difference."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from scipy import sparse

from scmodelforge.config import Config
from scmodelforge.data import shards
from scmodelforge.data.cache import cached_sources, warn_if_slow
from scmodelforge.data.store import CellStore, open_store
from scmodelforge.finetuning.run import finetune
from scmodelforge.manifest import shard_paths
from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.run import RunResult, train
from tests.helpers import finetune_config, make_vocab, marker_cells, tiny_config

VOCAB = make_vocab(40)


@pytest.fixture
def slow(tmp_path: Path) -> list[Path]:
    """Compressed, by genes, and dense."""
    paths = [tmp_path / f"{name}.h5ad" for name in ("gzip", "csc", "dense")]
    for seed, path in enumerate(paths):
        adata = marker_cells(60, seed=seed)
        adata.obs_names = [f"{path.stem}{i}" for i in range(60)]
        if path.stem == "csc":
            adata.X = sparse.csc_matrix(adata.X)
        elif path.stem == "dense":
            adata.X = adata.X.toarray()
        adata.write_h5ad(path, compression="gzip" if path.stem == "gzip" else None)
    return paths


def configured(paths: list[Path], run: Path, cache: Path | None, **data: object) -> Config:
    where = {"paths": [str(path) for path in paths], "cache_dir": None if cache is None else str(cache)}
    return tiny_config(run, data=where | data)


def same_weights(one: RunResult, two: RunResult) -> None:
    first, second = (read_checkpoint(run.checkpoint_dir / "last.ckpt")["state_dict"] for run in (one, two))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_training_on_the_cache_is_training_on_the_files(
    slow: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "scmodelforge")
    cache = tmp_path / "cache"
    plain = train(configured(slow, tmp_path / "plain", None))
    cached = train(configured(slow, tmp_path / "cached", cache))
    same_weights(plain, cached)
    assert caplog.text.count("is converted once into shards") == 3
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.h5ad")}
    assert len(before) == 3
    longer = configured(slow, tmp_path / "cached", cache).model_copy(deep=True)
    resumed = train(longer, resume=plain.checkpoint_dir / "last.ckpt")  # a run may move to its cache
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.h5ad")} == before
    assert caplog.text.count("is read from its shards") == 3
    same_weights(plain, resumed)


def test_finetuning_reads_the_cache_too(pretrained: RunResult, slow: list[Path], tmp_path: Path) -> None:
    checkpoint = pretrained.checkpoint_dir / "best.ckpt"
    runs = []
    for cache in (None, tmp_path / "cache"):
        config = finetune_config(tmp_path / f"run{cache is None}", {"max_epochs": 1})
        where = configured(slow, tmp_path, cache).data
        data = config.data.model_copy(update={"paths": where.paths, "cache_dir": where.cache_dir})
        runs.append(finetune(config.model_copy(update={"data": data}), checkpoint))
    assert len(list((tmp_path / "cache").rglob("*.h5ad"))) == 3
    same_weights(*runs)


def test_a_changed_file_or_vocabulary_gets_new_shards(
    slow: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = configured(slow[:1], tmp_path, tmp_path / "cache").data
    first = cached_sources(data.paths, VOCAB, data)
    assert cached_sources(data.paths, VOCAB.with_medians(None), data) == first
    assert cached_sources(data.paths, make_vocab(39), data) != first
    marker_cells(50, seed=9).write_h5ad(slow[0], compression="gzip")
    changed = cached_sources(data.paths, VOCAB, data)
    assert changed != first
    os.truncate(changed[0], 1000)  # what is not whole is made again
    assert cached_sources(data.paths, VOCAB, data) == changed
    assert shards.verify_shards(Path(str(changed[0])).parent) == []


def test_what_is_mapped_already_is_not_copied(slow: list[Path], tmp_path: Path) -> None:
    shards.write_shards(slow, VOCAB, Config().data, tmp_path / "shards")
    paths = shard_paths(tmp_path / "shards")
    data = configured(paths, tmp_path, tmp_path / "cache").data
    assert cached_sources(data.paths, VOCAB, data) == data.paths
    assert not list((tmp_path / "cache").rglob("*.h5ad"))


def test_slow_files_are_named_in_one_warning(
    slow: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = configured(slow, tmp_path, None).data
    assert cached_sources(data.paths, VOCAB, data) == data.paths
    matrices = open_store(data.paths, VOCAB, data).matrices
    caplog.clear()  # opening a CSC file says that it is converted
    warn_if_slow(matrices)
    assert not caplog.records  # few cells are read soon enough
    monkeypatch.setattr("scmodelforge.data.cache.FEW_CELLS", 10)
    warn_if_slow(matrices)
    (record,) = caplog.records
    text = record.getMessage()
    for words in ("gzip.h5ad' and 2 more", "data.cache_dir", "scmodelforge shard"):
        assert words in text


def test_untouched_shards_are_not_read_before_training(
    slow: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scmodelforge.training.data import prepare_data

    shards.write_shards(slow[:2], VOCAB, Config().data, tmp_path / "shards")
    mixed = [*shard_paths(tmp_path / "shards"), slow[2]]
    prepared = prepare_data(configured(mixed, tmp_path, None))
    read = []
    monkeypatch.setattr(CellStore, "read", lambda self, rows: read.extend(rows.tolist()))
    prepared.read_through()
    assert read == list(range(120, 180))


def test_a_folder_of_shards_is_data(slow: list[Path], tmp_path: Path) -> None:
    from scmodelforge.config_io import check_paths
    from scmodelforge.errors import ConfigError

    folder = tmp_path / "shards"
    shards.write_shards(slow[::-1], VOCAB, Config().data, folder)
    config = Config.model_validate({"data": {"paths": [str(folder)]}})
    assert check_paths(config).data.paths == [str(path) for path in shard_paths(folder)]
    shard_paths(folder)[0].unlink()
    with pytest.raises(
        ConfigError, match=r"'.*dense-00000.h5ad' is missing; start 'scmodelforge shard' again"
    ):
        check_paths(config)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json' is damaged"):
        check_paths(config)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"folder without manifest.json"):
        check_paths(config)
