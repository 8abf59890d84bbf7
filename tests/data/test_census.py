"""A Census gives the cells that it holds, in bounded memory, and says what is wrong with a query."""

from __future__ import annotations

import gc
import json
import logging
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import sparse

from scmodelforge.config import DataConfig
from scmodelforge.config_census import CensusConfig
from scmodelforge.data import census as census_module
from scmodelforge.data import census_address
from scmodelforge.data.matrix import Matrix
from scmodelforge.data.sources import open_matrix, sources_of
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError, MissingExtraError, UserError
from scmodelforge.genes.vocab import predefined
from tests.data.local_census import census_cells, tiledbsoma, write_census

ALL = {"is_primary_data": None}


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return census_cells()


@pytest.fixture(scope="module")
def uri(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> str:
    mouse = census_cells(20, 10)
    return write_census(tmp_path_factory.mktemp("census") / "soma", homo_sapiens=cells, mus_musculus=mouse)


def counts_of(matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    found = matrix.read(rows)
    assert (found.indptr.dtype, found.indices.dtype, found.data.dtype) == (np.int64, np.int32, np.float32)
    return sparse.csr_matrix((found.data, found.indices, found.indptr), (len(rows), matrix.n_genes)).toarray()


# --- what is read -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.integers(0, 299), max_size=50), read_cells=st.sampled_from([16, 64, 8192]))
def test_cells_are_those_it_was_made_from_in_any_order(cells, uri, rows, read_cells):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census_module, "READ_CELLS", read_cells)
        matrix = open_matrix(CensusConfig(uri=uri, **ALL))
    rows = np.array(rows, dtype=np.int64)
    np.testing.assert_array_equal(counts_of(matrix, rows), cells.X[rows].toarray())


def test_genes_and_annotations_are_those_of_the_census(cells, uri):
    matrix = open_matrix(CensusConfig(uri=uri, obs_columns=["donor_id", "nnz", "cell_type"], **ALL))
    assert matrix.var["feature_id"].tolist() == cells.var["feature_id"].tolist()
    assert matrix.obs.index.tolist() == list(range(300))
    assert list(matrix.obs) == ["donor_id", "nnz", "cell_type", "dataset_id"]
    for column in matrix.obs:
        assert matrix.obs[column].astype(str).tolist() == cells.obs[column].astype(str).tolist(), column
    assert all(matrix.obs[column].dtype == "category" for column in ("donor_id", "cell_type", "dataset_id"))


def test_filters_hold_together(cells, uri):
    query = CensusConfig(
        uri=uri,
        tissue_general=["lung"],
        disease=["Crohn's disease", "normal"],
        cell_type=["B cell", "T cell"],
        obs_value_filter="nnz > 20 or donor_id == 'p1'",
    )
    obs = cells.obs
    wanted = np.flatnonzero(
        obs.is_primary_data
        & (obs.tissue_general == "lung")
        & obs.cell_type.isin(["B cell", "T cell"])
        & ((obs.nnz > 20) | (obs.donor_id == "p1"))
    )
    matrix = open_matrix(query)
    assert 0 < len(wanted) < 100
    assert matrix.obs.index.tolist() == wanted.tolist()
    np.testing.assert_array_equal(counts_of(matrix, np.arange(len(wanted))), cells.X[wanted].toarray())
    assert set(matrix.obs["cell_type"].cat.categories) == {"B cell", "T cell"}  # no empty ones


@pytest.mark.parametrize(("primary", "share"), [(True, True), (False, False)])
def test_copies_of_cells_are_left_out_unless_asked_for(cells, uri, primary, share):
    matrix = open_matrix(CensusConfig(uri=uri, is_primary_data=primary))
    assert matrix.n_cells == (cells.obs.is_primary_data == share).sum()


def test_other_organisms_and_their_names_with_a_space(uri):
    assert open_matrix(CensusConfig(uri=uri, organism="Mus musculus", **ALL)).n_cells == 20


def test_the_store_counts_all_genes_for_the_library_size(cells, uri):
    vocab = predefined("human_protein_coding").subset(np.arange(0, 60, 2))  # half of the genes
    config = DataConfig(source="census", census=CensusConfig(uri=uri, **ALL), min_gene_overlap=0)
    batch = open_store(sources_of(config), vocab, config).read(np.arange(300)[::-1])
    np.testing.assert_array_equal(batch.library_size, cells.X.sum(axis=1).A1[::-1].astype(np.float32))
    found = sparse.csr_matrix((batch.counts, batch.gene_ids, batch.indptr), (300, 30)).toarray()
    np.testing.assert_array_equal(found, cells.X[::-1, ::2].toarray())


def test_real_cells(real_data: Path, tmp_path: Path):
    source = ad.read_h5ad(real_data / "census_placenta.h5ad")
    source = source[
        np.sort(np.random.default_rng(0).choice(source.n_obs, min(400, source.n_obs), False))
    ].copy()
    obs = pd.DataFrame({"cell_type": source.obs["cell_type"].astype(str), "dataset_id": "placenta"})
    var = pd.DataFrame(
        {"feature_id": source.var_names.astype(str), "feature_name": source.var_names.astype(str)}
    )
    var.index = [f"g{i}" for i in range(len(var))]
    counts = sparse.csr_matrix(source.X).astype(np.float32)
    uri = write_census(tmp_path / "soma", homo_sapiens=ad.AnnData(counts, obs=obs, var=var))
    matrix = open_matrix(CensusConfig(uri=uri, obs_columns=["cell_type"], **ALL))
    rows = np.random.default_rng(0).permutation(source.n_obs)
    np.testing.assert_array_equal(counts_of(matrix, rows), counts[rows].toarray())
    assert matrix.obs["cell_type"].tolist() == obs["cell_type"].tolist()


def test_a_checksum_stands_for_the_cells(cells, uri, tmp_path):
    def sha256(**query) -> str:
        return census_module.census_sha256(CensusConfig(**{"uri": uri, **ALL, **query}))

    copy = write_census(tmp_path / "copy", homo_sapiens=cells)
    assert sha256() == sha256(uri=copy) == sha256(tissue_general=["lung", "blood"])  # all there are
    others = [sha256(tissue_general=["lung"]), sha256(obs_columns=["nnz"]), sha256(organism="mus_musculus")]
    assert len({sha256(), *others}) == 4


# --- memory and threads -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> CensusConfig:
    """6,000 cells with 150 counts each: 7 MB as CSR of float32."""
    uri = write_census(tmp_path_factory.mktemp("many") / "soma", homo_sapiens=census_cells(6_000, 380))
    return CensusConfig(uri=uri, **ALL)


def test_memory_does_not_hold_the_query(many: CensusConfig, monkeypatch):
    monkeypatch.setattr(census_module, "READ_CELLS", 256)
    matrix = open_matrix(many)
    whole = matrix.read(np.arange(0, 6_000, 40)).data.size * 40 * 8
    assert whole > 5e6
    gc.collect()
    tracemalloc.start()
    for start in range(0, 6_000, 100):
        matrix.read(np.arange(start, start + 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole / 3


def test_opening_a_store_reads_a_sample_in_runs_of_neighbours(many: CensusConfig, monkeypatch):
    monkeypatch.setattr(census_module, "READ_CELLS", 512)
    reads, read = [], census_module._Query.read
    monkeypatch.setattr(
        census_module._Query, "read", lambda self, rows: reads.append(rows) or read(self, rows)
    )
    config = DataConfig(source="census", census=many, gene_vocab="from_data")
    open_store(sources_of(config), predefined("human_protein_coding"), config)
    rows = np.concatenate(reads)
    assert 900 < len(rows) <= 2500
    assert rows.min() == 0
    assert rows.max() == 5999
    assert (np.diff(rows) == 1).mean() > 0.9


def test_reading_ahead_takes_few_large_reads_and_two_buffers_of_memory(many: CensusConfig, monkeypatch):
    monkeypatch.setattr(census_module, "READ_CELLS", 1024)
    reads, read = [], census_module._Query.read
    monkeypatch.setattr(
        census_module._Query, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows)
    )
    matrix = open_matrix(many)
    blocks = np.random.default_rng(0).permutation(93).reshape(3, 31)  # three buffers of 1,984 cells
    buffers = [np.sort((some[:, None] * 64 + np.arange(64)).ravel()) for some in blocks]
    cache = matrix._reader.cache
    matrix.prefetch(buffers[0])
    for buffer, following in zip(buffers, [*buffers[1:], buffers[0][:0]], strict=True):
        matrix.prefetch(following)
        for rows in np.random.default_rng(1).permutation(buffer).reshape(-1, 62):
            matrix.read(rows)
    matrix.close()
    assert sum(reads) == 3 * 1984  # each cell once
    assert max(reads) <= 1024
    assert cache.most_held <= 2 * 1984 + 1024


def test_threads_read_side_by_side(cells, uri, monkeypatch):
    monkeypatch.setattr(census_module, "READ_CELLS", 64)
    matrix = open_matrix(CensusConfig(uri=uri, **ALL))

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, 300, 40)
        matrix.prefetch(rows[:10])
        return np.array_equal(counts_of(matrix, rows), cells.X[rows].toarray())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(60)))
    matrix.close()


# --- what is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"organism": "homo sapien"}, ["no 'homo_sapien'", "did you mean 'homo_sapiens'", "mus_musculus"]),
        (
            {"obs_columns": ["celltype"]},
            ["obs_columns", "'celltype'", "did you mean 'cell_type'", "donor_id"],
        ),
        (
            {"obs_value_filter": "sex == 'x'"},
            ["filter", "not valid", "sex does not exist", "obs_value_filter"],
        ),
        ({"obs_value_filter": "nnz > 'many'"}, ["not valid", "many"]),
        ({"obs_value_filter": "nnz + 3"}, ["not valid", "nnz + 3"]),
        ({"tissue_general": ["lugn"]}, ["No cell", "tissue_general", "'lugn'", "did you mean 'lung'"]),
        ({"obs_value_filter": "nnz > 4000"}, ["No cell", "nnz > 4000"]),
        ({"uri": "/nowhere/at/all"}, ["'/nowhere/at/all' cannot be opened", "data.census.uri"]),
    ],
)
def test_a_query_that_is_wrong_is_told_in_a_sentence(uri, query, words):
    with pytest.raises(DataError) as error:
        open_matrix(CensusConfig(**{"uri": uri, **query}))
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_condition_that_closes_ours_is_refused():
    with pytest.raises(ValidationError, match="no condition"):
        CensusConfig(obs_value_filter="nnz > 3) or (nnz < 3")


def test_a_folder_that_is_no_census_is_told(uri):
    with pytest.raises(DataError, match="is no Census: it has no 'census_data'"):
        open_matrix(CensusConfig(uri=f"{uri}/census_data"))


def test_a_value_that_no_cell_has_is_said(uri, caplog):
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        open_matrix(CensusConfig(uri=uri, cell_type=["B cel", "T cell"]))
    assert "data.census.cell_type: no cell has 'B cel' (did you mean 'B cell'?)" in caplog.text


def test_a_census_without_a_column_that_filters_is_told(cells, tmp_path):
    plain = cells.copy()
    del plain.obs["is_primary_data"]
    uri = write_census(tmp_path / "soma", homo_sapiens=plain)
    with pytest.raises(DataError, match=r"is_primary_data .null: do without. needs the obs column"):
        open_matrix(CensusConfig(uri=uri))
    assert open_matrix(CensusConfig(uri=uri, **ALL)).n_cells == 300


def test_a_line_that_breaks_down_is_told_and_the_next_read_goes_on(cells, uri, monkeypatch):
    matrix = open_matrix(CensusConfig(uri=uri, **ALL))

    def fail(*_):
        raise tiledbsoma.SOMAError("curlCode: 28, Timeout was reached")

    with monkeypatch.context() as patch:
        patch.setattr(tiledbsoma.SparseNDArray, "read", fail)
        with pytest.raises(DataError, match=r"cannot be read \(curlCode: 28, Timeout was reached\)"):
            matrix.read(np.arange(5))
    np.testing.assert_array_equal(counts_of(matrix, np.arange(5)), cells.X[:5].toarray())


def test_the_missing_package_is_named(uri, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"scmodelforge\[census\]"):
        open_matrix(CensusConfig(uri=uri))


# --- the public Census --------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of releases as the public one is written."""
    soma = {"relative_uri": "/cell-census/2025-01-30/soma/", "uri": "s3://old/", "s3_region": "us-east-1"}
    older = {"uri": "s3://old/2023-01-01/soma/", "s3_region": "us-east-1"}
    releases = {"stable": "2025-01-30", "latest": "2025-01-30", "2025-01-30": {"soma": soma}}
    releases["2023-01-01"] = {"soma": older}
    mirrors = {
        "default": "here",
        "here": {"provider": "S3", "base_uri": "s3://mirror/", "region": "us-west-2"},
    }
    (tmp_path / "release.json").write_text(json.dumps(releases))
    (tmp_path / "mirrors.json").write_text(json.dumps(mirrors))
    monkeypatch.setattr(census_address, "DIRECTORY", tmp_path.as_uri())
    return tmp_path


@pytest.mark.parametrize(
    ("version", "uri", "region"),
    [
        ("stable", "s3://mirror/cell-census/2025-01-30/soma/", "us-west-2"),
        ("2025-01-30", "s3://mirror/cell-census/2025-01-30/soma/", "us-west-2"),
        ("2023-01-01", "s3://old/2023-01-01/soma/", "us-east-1"),
    ],
)
def test_a_release_of_the_public_census_is_looked_up(directory, version, uri, region):
    address = census_address.address_of(CensusConfig(version=version))
    assert address.uri == uri
    assert address.release == ("2025-01-30" if version == "stable" else version)
    assert address.settings == {"vfs.s3.region": region, "vfs.s3.no_sign_request": "true"}


def test_an_unknown_release_is_told_with_those_there_are(directory):
    with pytest.raises(DataError, match="no Census '2024'; there are stable, latest, 2025-01-30, 2023-01-01"):
        census_address.address_of(CensusConfig(version="2024"))


def test_without_a_connection_a_copy_is_offered(directory):
    (directory / "release.json").unlink()
    with pytest.raises(UserError, match=r"(?s)cannot be read.*release.json.*data.census.uri"):
        census_address.address_of(CensusConfig())
