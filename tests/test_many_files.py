"""Many files: one function for each, on this machine or on a Dask cluster; what fails is named, the rest is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest

from scmodelforge.config import DataConfig
from scmodelforge.data.shards import verify_shards, write_shards
from scmodelforge.errors import UserError
from scmodelforge.parallel import map_files
from scmodelforge.training.run import RunResult
from tests.helpers import make_vocab, marker_cells
from tests.journeys.command import done, refused


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a local cluster of two worker processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as local:
        yield local.scheduler_address


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of cells, and one that is none."""
    paths = [tmp_path / f"cells/{name}.h5ad" for name in ("a", "b", "bad", "c")]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        marker_cells(30, seed).write_h5ad(path)
    paths[2].write_bytes(b"no HDF5")
    return paths


def test_a_cluster_converts_files_and_names_what_fails(
    cluster: str, files: list[Path], tmp_path: Path
) -> None:
    vocab, folder = make_vocab(30), tmp_path / "shards"
    with pytest.raises(UserError, match="1 of 4 files failed") as error:
        write_shards(files, vocab, DataConfig(), folder, dask=cluster)
    assert "bad.h5ad" in str(error.value)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5ad")}
    assert set(before) == {"a-00000.h5ad", "b-00000.h5ad", "c-00000.h5ad"}
    marker_cells(30, 9).write_h5ad(files[2])
    records = write_shards(files, vocab, DataConfig(), folder, dask=cluster)
    assert [record.name[0] for record in records] == ["a", "b", "b", "c"]
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert verify_shards(folder) == []


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_embed_of_many_files(
    pretrained: RunResult, files: list[Path], tmp_path: Path, request: pytest.FixtureRequest, where: str
) -> None:
    dask = ["--dask", request.getfixturevalue("cluster")] if where == "cluster" else []
    model, output = pretrained.run_dir / "model", tmp_path / "embedded"
    command = ["embed", "--model", model, "--data", files[0].parent / "*.h5ad", "--output", output, *dask]
    message = refused(*command, words=("1 of 4 files failed", "bad.h5ad"))
    assert "a.h5ad:" not in message
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.h5ad")}
    assert set(before) == {"a.h5ad", "b.h5ad", "c.h5ad"}
    files[2].unlink()
    marker_cells(20, 7).write_h5ad(files[3])  # changed: done again
    assert "20 cells of 1 files embedded" in done(*command).out
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.h5ad")}
    assert {name for name in after if after[name] != before[name]} == {"c.h5ad"}
    done("embed", "--model", model, "--data", files[0], "--output", tmp_path / "one.h5ad")
    one, many = (anndata.read_h5ad(path) for path in (tmp_path / "one.h5ad", output / "a.h5ad"))
    np.testing.assert_allclose(one.obsm["X_scmodelforge"], many.obsm["X_scmodelforge"], atol=1e-6)
    again = [*command, "--pooling", "cls"]
    assert "80 cells of 3 files embedded" in done(*again).out  # another question, another answer


def test_many_files_need_a_folder_and_distinct_names(
    pretrained: RunResult, files: list[Path], tmp_path: Path
) -> None:
    command = ["embed", "--model", pretrained.run_dir / "model", "--data", files[0], "--data"]
    refused(*command, files[1], "--output", tmp_path / "one.h5ad", words=("--output DIR",))
    refused(*command, files[1], "--in-place", words=("--output DIR",))
    other = tmp_path / "other/a.h5ad"
    other.parent.mkdir()
    marker_cells(10).write_h5ad(other)
    refused(*command, other, "--output", tmp_path / "out", words=("2 files are called 'a.h5ad'",))
    refused(*command, tmp_path / "x*.h5ad", "--output", tmp_path / "out", words=("No file matches",))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x", "127.0.0.1:port"])
def test_a_wrong_address_is_a_sentence(
    files: list[Path], tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("scmodelforge.parallel.CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match="No Dask scheduler answers at"):
        map_files(str, {"a": (1,)}, dask=address)


def test_outputs_never_replace_the_files_they_come_from(pretrained: RunResult, files: list[Path]) -> None:
    before = files[0].read_bytes()
    text = refused(
        *("embed", "--model", str(pretrained.run_dir / "model"), "--output", str(files[0].parent)),
        *("--data", str(files[0]), "--data", str(files[1])),
        words=("would be replaced by its own output",),
    )
    assert "another output folder" in text
    assert files[0].read_bytes() == before


def test_annotate_takes_one_file(pretrained: RunResult, files: list[Path], tmp_path: Path) -> None:
    refused(
        *("annotate", "--model", str(pretrained.run_dir / "model"), "--output", str(tmp_path / "out.h5ad")),
        *("--data", str(files[0]), "--data", str(files[1])),
        words=("given 2 times",),
    )


def test_a_zarr_store_is_refused_before_any_work(pretrained: RunResult, tmp_path: Path) -> None:
    marker_cells(30).write_zarr(tmp_path / "cells.zarr")
    refused(
        *("embed", "--model", str(pretrained.run_dir / "model"), "--data", str(tmp_path / "cells.zarr")),
        *("--output", str(tmp_path / "out.h5ad")),
        words=("cells.zarr", "anndata.read_zarr"),
    )
