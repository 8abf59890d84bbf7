"""Whatever a file looks like, the cells that come out are those of a slow dense reference."""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scmodelforge.config import DataConfig
from scmodelforge.data import h5ad, matrix
from scmodelforge.data.sources import open_matrix
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from scmodelforge.genes.vocab import predefined
from tests.data.files import NO_MINIMUM, STORAGES, as_dense, make_adata, slow_batch, store_as
from tests.helpers import make_vocab

N_GENES = 6  # of the vocabulary; genes with a higher number are outside
VOCAB = make_vocab(N_GENES)


@st.composite
def files(draw, n_files: int = 1):
    """Counts and gene numbers of some files, with duplicated and foreign genes, empty cells and zeros."""
    out = []
    for _ in range(n_files):
        shape = draw(st.tuples(st.integers(2, 7), st.integers(2, 9)))
        counts = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([0, 0, 0, 1, 2, 3, 700])))
        counts[0, 0] = 1  # at least one count
        genes = draw(hnp.arrays(np.int64, shape[1], elements=st.integers(0, N_GENES + 2)))
        genes[0] = min(genes[0], N_GENES - 1)
        out.append((counts, genes))
    return out


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_storage_gives_the_same_cells(storage, data):
    ((counts, genes),) = data.draw(files())
    rows = np.array(data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=10)), dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        source, layer = store_as(storage, counts, genes, Path(folder))
        store = open_store([source], VOCAB, NO_MINIMUM.model_copy(update={"layer": layer}))
        batch = store.read(rows)
        expected, library = slow_batch(counts, genes, rows, N_GENES)
        np.testing.assert_array_equal(as_dense(batch, N_GENES), expected)
        np.testing.assert_array_equal(batch.library_size, library)
        np.testing.assert_array_equal(batch.cell_index, rows)
        store.close()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_many_files_are_one_store(data):
    parts = data.draw(files(n_files=3))
    sizes = [len(counts) for counts, _ in parts]
    rows = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12)), dtype=np.int64)
    store = open_store([make_adata(*part) for part in parts], VOCAB, NO_MINIMUM)
    whole = [slow_batch(counts, genes, np.arange(len(counts)), N_GENES) for counts, genes in parts]
    batch = store.read(rows)
    np.testing.assert_array_equal(store.offsets, np.cumsum([0, *sizes]))
    np.testing.assert_array_equal(as_dense(batch, N_GENES), np.concatenate([c for c, _ in whole])[rows])
    np.testing.assert_array_equal(batch.library_size, np.concatenate([size for _, size in whole])[rows])


def test_library_size_is_summed_in_float64():
    counts = np.zeros((1, 4))
    counts[0] = [2**24, 1, 1, 2]
    store = open_store([make_adata(counts, np.arange(4))], make_vocab(1), NO_MINIMUM)
    assert store.read(np.array([0])).library_size[0] == 2**24 + 4


def test_obs_is_the_union_of_columns_in_file_order():
    first, second = (make_adata(np.ones((2, 2)), np.arange(2), start) for start in (0, 2))
    first.obs["donor"] = pd.Categorical(["a", "b"])
    second.obs["donor"] = pd.Categorical(["c", "a"])
    second.obs["age"] = [1.0, 2.0]
    obs = open_store([first, second], make_vocab(2), NO_MINIMUM).obs
    assert list(obs.index) == ["cell0", "cell1", "cell2", "cell3"]
    assert list(obs.donor) == ["a", "b", "c", "a"]
    assert obs.age.isna().tolist() == [True, True, False, False]
    assert set(obs.columns) == {"donor", "age"}


def test_real_file_equals_anndata(real_data):
    vocab = predefined("human_protein_coding")
    path = real_data / "pbmc3k.h5ad"
    adata = ad.read_h5ad(path)
    store = open_store([path], vocab, DataConfig())
    rows = np.random.default_rng(0).integers(0, adata.n_obs, 100)
    batch = store.read(rows)
    np.testing.assert_array_equal(batch.library_size, np.asarray(adata.X[rows].sum(axis=1)).ravel())
    gene = vocab.index_of()["ENSG00000198851"]  # CD3E
    column = int(np.flatnonzero(store.matches[0].gene_index == gene)[0])
    expected = adata.X[rows][:, column].toarray().ravel()
    found = np.zeros(len(rows))
    hits = np.flatnonzero(batch.gene_ids == gene)
    found[np.searchsorted(batch.indptr, hits, side="right") - 1] = batch.counts[hits]
    np.testing.assert_array_equal(found, expected)


def test_threads_and_a_forked_process_read_the_same(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, size=(200, 30))
    for storage in ("csr_gzip", "csc_gzip"):
        source, _ = store_as(storage, counts, np.arange(30), tmp_path)
        store = open_store([source], make_vocab(30), NO_MINIMUM)
        orders = [rng.permutation(200) for _ in range(16)]
        with ThreadPoolExecutor(4) as pool:
            for rows, batch in zip(orders, pool.map(store.read, orders), strict=True):
                np.testing.assert_array_equal(as_dense(batch, 30), counts[rows])
        child = os.fork()
        if not child:
            same = np.array_equal(as_dense(store.read(orders[0]), 30), counts[orders[0]])
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_array_equal(as_dense(store.read(orders[1]), 30), counts[orders[1]])


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    counts = np.ones((4000, 50))
    source, _ = store_as("csr", counts, np.arange(50), tmp_path)
    matrix = open_matrix(source)
    spans = []
    whole = h5ad._read_runs
    monkeypatch.setattr(h5ad, "_read_runs", lambda dataset, runs: spans.extend(runs) or whole(dataset, runs))
    matrix.read(np.array([3999, 5, 6, 5]))
    assert sorted(set(spans)) == [(250, 350), (199_950, 200_000)], "neighbours in one read, nothing between"


def test_csc_is_converted_in_blocks_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(h5ad, "CONVERT_ENTRIES", 7)
    counts = np.random.default_rng(1).poisson(0.7, size=(20, 15))
    source, _ = store_as("csc", counts, np.arange(15), tmp_path)
    with caplog.at_level(logging.WARNING):
        store = open_store([source], make_vocab(15), NO_MINIMUM)
        np.testing.assert_array_equal(as_dense(store.read(np.arange(20)), 15), counts)
        store.read(np.arange(3))
    assert [("stored by genes (CSC)" in m, str(source) in m) for m in caplog.messages] == [(True, True)]


def test_dense_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "DENSE_BYTES", 200)
    counts = np.random.default_rng(1).poisson(0.7, size=(20, 15))
    source, _ = store_as("dense", counts, np.arange(15), tmp_path)
    rows = np.random.default_rng(2).integers(0, 20, 40)
    store = open_store([source], make_vocab(15), NO_MINIMUM)
    np.testing.assert_array_equal(as_dense(store.read(rows), 15), counts[rows])


def test_reports_name_file_and_genes(tmp_path):
    source, _ = store_as("csr", np.ones((3, 4)), np.array([0, 1, 1, 99]), tmp_path)
    store = open_store([source], make_vocab(2), NO_MINIMUM)
    report = store.gene_report()
    assert report.columns[0] == "file"
    assert (report.file == str(source)).all()
    assert len(report) == 4
    (line,) = store.describe()
    assert "3 cells × 4 genes" in line
    assert "raw counts" in line
    assert "75.0% of the counts" in line


# --- what cannot be used ----------------------------------------------------------------------------


def test_missing_file_names_the_nearest(tmp_path):
    store_as("csr", np.ones((3, 4)), np.arange(4), tmp_path)
    with pytest.raises(DataError, match=r"'.*cst\.h5ad' does not exist\. Did you mean '.*csr\.h5ad'\?"):
        open_matrix(tmp_path / "cst.h5ad")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        open_matrix(tmp_path)


def test_not_hdf5(tmp_path):
    path = tmp_path / "table.h5ad"
    path.write_text("gene,count\n")
    with pytest.raises(DataError, match=r"table\.h5ad' is not an \.h5ad file: it is not HDF5"):
        open_matrix(path)


def test_hdf5_without_anndata(tmp_path):
    with h5py.File(tmp_path / "tenx.h5ad", "w") as file:
        file["matrix/data"] = [1]
    with pytest.raises(DataError, match=r"(?s)no AnnData: it has no 'obs'.*10x.*read_10x_h5"):
        open_matrix(tmp_path / "tenx.h5ad")


def test_truncated_file(tmp_path):
    source, _ = store_as("csr", np.ones((300, 40)), np.arange(40), tmp_path)
    with open(source, "r+b") as handle:
        handle.truncate(os.path.getsize(source) // 2)
    with pytest.raises(DataError, match=r"csr\.h5ad' is truncated or damaged"):
        open_matrix(source)


def test_damage_inside_the_matrix_is_named_on_reading(tmp_path):
    source, _ = store_as("csr", np.ones((30, 4)), np.arange(4), tmp_path)
    with h5py.File(source, "r+") as file:
        file["X/indices"][50] = 4
    with pytest.raises(
        DataError, match=r"csr\.h5ad' is truncated or damaged: X names a column outside of its 4 genes"
    ):
        open_matrix(source).read(np.arange(30))
    with h5py.File(source, "r+") as file:
        file["X/indptr"][5] = 10**6
    with pytest.raises(DataError, match="indptr of X does not fit"):
        open_matrix(source)


@pytest.mark.parametrize(("shape", "what"), [((0, 3), "cells"), ((3, 0), "genes")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_no_cells_or_no_genes(tmp_path, shape, what, in_memory):
    adata = make_adata(np.zeros(shape), np.arange(shape[1]))
    adata.write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(DataError, match=f"has no {what}: X is {shape[0]} × {shape[1]}"):
        open_matrix(adata if in_memory else tmp_path / "empty.h5ad")


@pytest.mark.parametrize("in_memory", [True, False])
def test_unknown_layer_lists_what_there_is(tmp_path, in_memory):
    adata = make_adata(np.ones((3, 4)), np.arange(4))
    adata.layers["counts"] = adata.X
    adata.write_h5ad(tmp_path / "layers.h5ad")
    source = adata if in_memory else tmp_path / "layers.h5ad"
    with pytest.raises(
        DataError, match=r"(?s)has no layer 'count'\. Did you mean 'counts'\?.*X .*null.*'counts'"
    ):
        open_matrix(source, "count")
    with pytest.raises(DataError, match=r"has no \.raw"):
        open_matrix(source, "raw")


@pytest.mark.parametrize("in_memory", [True, False])
def test_no_x(tmp_path, in_memory):
    adata = make_adata(np.ones((3, 4)), np.arange(4))
    adata.layers["counts"], adata.X = adata.X, None
    adata.write_h5ad(tmp_path / "no_x.h5ad")
    with pytest.raises(DataError, match=r"(?s)has no X\..*There is: 'counts'"):
        open_matrix(adata if in_memory else tmp_path / "no_x.h5ad")


def test_no_files():
    with pytest.raises(DataError, match="no data file is given"):
        open_store([], make_vocab(2), NO_MINIMUM)


@pytest.mark.parametrize(("value", "shown"), [(-3.0, "-3"), (np.nan, "nan"), (np.inf, "inf")])
def test_bad_counts_are_named_when_read(value, shown):
    counts = np.ones((5000, 4))
    counts[17, 2] = value  # between the sampled cells
    store = open_store([make_adata(counts, np.arange(4))], make_vocab(4), NO_MINIMUM)
    store.read(np.arange(17))
    with pytest.raises(DataError, match=f"X holds {shown} in cell 'cell17', gene 'v2'"):
        store.read(np.arange(15, 20))


def test_counts_outside_the_vocabulary_are_refused_with_the_cause(real_data):
    with pytest.raises(DataError) as error:
        open_store(
            [real_data / "pancreas_baron_mouse.h5ad"], predefined("human_protein_coding"), DataConfig()
        )
    text = str(error.value)
    assert "pancreas_baron_mouse.h5ad" in text
    assert "data.min_gene_overlap asks for 20.0%" in text
    assert "set data.gene_vocab: mouse_protein_coding" in text


def test_rows_outside_are_an_error():
    store = open_store([make_adata(np.ones((3, 4)), np.arange(4))], make_vocab(4), NO_MINIMUM)
    with pytest.raises(IndexError):
        store.read(np.array([3]))
