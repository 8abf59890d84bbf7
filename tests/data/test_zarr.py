"""AnnData in zarr stores gives the same cells as in .h5ad, and so do collections that annbatch writes."""

from __future__ import annotations

import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scmodelforge.config import DataConfig
from scmodelforge.config_io import load_config
from scmodelforge.data.matrix import LIBRARY_SIZE
from scmodelforge.data.sources import matrix_places, open_matrix, sources_of
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from tests.data.files import NO_MINIMUM, as_dense, make_adata
from tests.helpers import make_vocab

zarr = pytest.importorskip("zarr")
pytestmark = pytest.mark.filterwarnings("ignore")

N_GENES = 15
COUNTS = np.random.default_rng(0).poisson(0.8, size=(40, N_GENES))


@pytest.fixture(params=[2, 3])
def version(request, monkeypatch):
    monkeypatch.setattr(ad.settings, "zarr_write_format", request.param)
    return request.param


def write(adata, path, entries_in_chunk=None):
    shutil.rmtree(path, ignore_errors=True)
    adata.write_zarr(path)
    if entries_in_chunk:
        group = zarr.open_group(path, mode="r+")["X"]
        for name in ("indices", "data"):
            values = group[name][:]
            del group[name]
            group.create_array(name, data=values, chunks=(entries_in_chunk,))
    return path


def same(source, counts, config=NO_MINIMUM, rows=None):
    store = open_store([source], make_vocab(N_GENES), config)
    rows = np.random.default_rng(1).integers(0, len(counts), 60) if rows is None else rows
    np.testing.assert_array_equal(as_dense(store.read(rows), N_GENES), counts[rows])
    return store


@pytest.mark.parametrize("kind", ["csr", "chunked", "dense", "layer", "raw"])
def test_the_same_cells(tmp_path, version, kind):
    adata, layer = make_adata(COUNTS, np.arange(N_GENES)), None
    if kind == "dense":
        adata.X = adata.X.toarray()
    elif kind == "layer":
        layer, adata.layers["counts"], adata.X = "counts", adata.X, np.log1p(COUNTS)
    elif kind == "raw":
        layer, adata.raw = "raw", adata.copy()
        adata = adata[:, :1].copy()
    path = write(adata, tmp_path / "a.zarr", entries_in_chunk=7 if kind == "chunked" else None)
    store = same(path, COUNTS, DataConfig(layer=layer, min_gene_overlap=0))
    assert list(store.obs.index) == list(adata.obs_names)
    assert f"zarr {version}" in store.matrices[0].storage
    assert layer in matrix_places(path)
    assert store.matrices[0].shuffle_buffer == 65_536


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cells_in_any_chunks(tmp_path, data):
    n = data.draw(st.integers(1, 12))
    flat = data.draw(st.lists(st.integers(0, 3), min_size=n * N_GENES, max_size=n * N_GENES))
    counts = np.array(flat).reshape(n, N_GENES)
    chunk = data.draw(st.integers(1, 9)) if counts.any() else None
    path = write(make_adata(counts, np.arange(N_GENES)), tmp_path / "a.zarr", chunk)
    matrix = open_matrix(path)
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    matrix.prefetch(rows)
    found = matrix.read(rows)
    dense = np.zeros((len(rows), N_GENES))
    for i in range(len(rows)):
        span = slice(found.indptr[i], found.indptr[i + 1])
        dense[i, found.indices[span]] = found.data[span]
    np.testing.assert_array_equal(dense, counts[rows])


def test_library_sizes_of_shards(tmp_path):
    adata = make_adata(COUNTS, np.arange(N_GENES))
    adata.obs[LIBRARY_SIZE] = COUNTS.sum(axis=1) + 100.0
    store = same(write(adata, tmp_path / "a.zarr"), COUNTS)
    np.testing.assert_array_equal(store.read(np.arange(40)).library_size, COUNTS.sum(axis=1) + 100)


def test_by_genes_is_refused_with_the_remedy(tmp_path):
    adata = make_adata(COUNTS, np.arange(N_GENES))
    adata.X = adata.X.tocsc()
    with pytest.raises(DataError, match=r"stored by genes \(CSC\)(.|\n)*adata\.X = adata\.X\.tocsr\(\)"):
        open_matrix(write(adata, tmp_path / "a.zarr"))


def test_what_is_not_there(tmp_path):
    path = write(make_adata(COUNTS, np.arange(N_GENES)), tmp_path / "a.zarr")
    with pytest.raises(
        DataError, match=r"a\.zarr' has no layer 'counts'.\nThere is: X \(data\.layer: null\)"
    ):
        open_matrix(path, "counts")
    with pytest.raises(DataError, match=r"The zarr store '.*b\.zarr' does not exist"):
        open_matrix(tmp_path / "b.zarr")
    (tmp_path / "c.zarr").mkdir()
    with pytest.raises(DataError, match=r"c\.zarr' is no zarr store"):
        open_matrix(tmp_path / "c.zarr")
    zarr.open_group(tmp_path / "d.zarr", mode="w").create_array("x", data=np.arange(3))
    with pytest.raises(DataError, match=r"d\.zarr' is a zarr store but no AnnData: it has no 'obs'"):
        open_matrix(tmp_path / "d.zarr")


@pytest.mark.parametrize("array", ["indices", "data"])
def test_a_missing_chunk_is_no_zeros(tmp_path, array):
    path = write(make_adata(COUNTS + 1, np.arange(N_GENES)), tmp_path / "a.zarr", entries_in_chunk=50)
    chunks = [p for p in (path / "X" / array).rglob("*") if p.is_file() and p.name == "3"]
    chunks[0].unlink()
    with pytest.raises(DataError, match=r"a\.zarr' is truncated or damaged"):
        open_matrix(path).read(np.arange(40))


def test_a_damaged_chunk(tmp_path):
    path = write(make_adata(COUNTS + 1, np.arange(N_GENES)), tmp_path / "a.zarr", entries_in_chunk=50)
    for chunk in [p for p in (path / "X" / "data").rglob("*") if p.is_file() and p.name.isdecimal()]:
        chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"a\.zarr' is truncated or damaged"):
        open_matrix(path).read(np.arange(40))


def test_a_collection_is_its_members(tmp_path):
    parts = np.split(COUNTS, 4)
    for name, part in zip(("dataset_0", "dataset_1", "dataset_2", "dataset_10"), parts, strict=True):
        zarr.open_group(tmp_path / "many.zarr", mode="a")
        make_adata(part, np.arange(N_GENES)).write_zarr(tmp_path / "many.zarr" / name)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"data:\n  paths: ['{tmp_path}/many.zarr']\n  min_gene_overlap: 0\n")
    config = load_config(yaml, require_data=True).data
    store = open_store(sources_of(config), make_vocab(N_GENES), config)
    np.testing.assert_array_equal(as_dense(store.read(np.arange(40)), N_GENES), COUNTS)
    with pytest.raises(
        DataError, match="It is a collection; name one of its members: dataset_0, dataset_1, dataset_2"
    ):
        open_matrix(tmp_path / "many.zarr")


def test_a_collection_of_annbatch(tmp_path):
    annbatch = pytest.importorskip("annbatch", reason="annbatch is not installed (Python >= 3.12)")
    parts = np.split(COUNTS, 4)
    for i, part in enumerate(parts):
        make_adata(part, np.arange(N_GENES), 10 * i).write_h5ad(tmp_path / f"{i}.h5ad")
    collection = annbatch.DatasetCollection(tmp_path / "many.zarr")
    collection.add_adatas(
        [tmp_path / f"{i}.h5ad" for i in range(4)], shuffle=True, n_obs_per_chunk=4, shard_size=8
    )
    config = DataConfig(
        paths=[str(tmp_path / "many.zarr")], min_gene_overlap=0, gene_column=None, gene_vocab="from_data"
    )
    sources = sources_of(config)
    whole = pd.concat([ad.read_zarr(source).to_df() for source in sources])
    genes = [f"v{i}" for i in range(N_GENES)]
    order = [int(name.removeprefix("cell")) for name in whole.index]
    np.testing.assert_array_equal(whole[genes].to_numpy(), COUNTS[order], err_msg="annbatch's own writing")
    rows = np.random.default_rng(0).integers(0, 40, 100)
    start = 0
    for source in sources:
        matrix = open_matrix(source)
        columns = [genes.index(name) for name in matrix.var.index]
        here = rows[(rows >= start) & (rows < start + matrix.n_cells)] - start
        block = matrix.read(here)
        dense = np.zeros((len(here), N_GENES))
        for i in range(len(here)):
            span = slice(block.indptr[i], block.indptr[i + 1])
            dense[i, np.array(columns)[block.indices[span]]] = block.data[span]
        np.testing.assert_array_equal(dense, COUNTS[np.array(order)[here + start]])
        start += matrix.n_cells
    assert start == 40
