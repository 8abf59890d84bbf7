"""Thousands of files: few are open at once, and what they share is read and matched once."""

from __future__ import annotations

import os
import threading

import anndata as ad
import numpy as np
import pytest

from scmodelforge.data import open_files, state
from scmodelforge.data import store as store_module
from scmodelforge.data.sources import open_matrix
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from tests.data.files import NO_MINIMUM, as_dense, make_adata, store_as
from tests.helpers import make_vocab

N_FILES, N_CELLS, N_GENES = 30, 5, 12


@pytest.fixture
def few(monkeypatch):
    """Room for three files of each kind; returns what was opened."""
    monkeypatch.setattr(open_files, "_open", open_files.Kept(3, open_files.OpenFile.close))
    monkeypatch.setattr(open_files, "_mapped", open_files.Kept(3, lambda rows: None))


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(1.0, size=(N_FILES, N_CELLS, N_GENES))


def write(tmp_path, counts, compression="gzip"):
    """One file for each part of `counts`; genes in one of three orders."""
    paths, dense = [], []
    for i, part in enumerate(counts):
        genes = np.roll(np.arange(N_GENES), i % 3)
        paths.append(tmp_path / f"{i:03d}.h5ad")
        make_adata(part, genes).write_h5ad(paths[-1], compression=compression)
        whole = np.zeros_like(part)
        whole[:, genes] = part
        dense.append(whole)
    return paths, np.concatenate(dense)


@pytest.mark.parametrize("contiguous", [False, True])
def test_batches_over_many_files_with_few_open(tmp_path, counts, few, contiguous):
    paths, whole = write(tmp_path, counts)
    if contiguous:
        paths = [make_contiguous(path) for path in paths]
    store = open_store(paths, make_vocab(N_GENES), NO_MINIMUM)
    rng = np.random.default_rng(1)
    for _ in range(5):
        rows = rng.integers(0, len(whole), 64)
        np.testing.assert_array_equal(as_dense(store.read(rows), N_GENES), whole[rows])
    assert len(store.obs) == len(whole), "obs of files that were closed meanwhile"
    assert len(open_files._open) <= 3
    assert len(open_files._mapped) <= 3


def make_contiguous(path):
    """Write the CSR arrays of a file in one piece."""
    import h5py

    with h5py.File(path, "r+") as file:
        for name in ("indices", "data"):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"].create_dataset(name, data=values)
    assert "contiguous" in open_matrix(path).storage
    return path


def test_threads_beside_each_other(tmp_path, counts, few):
    paths, whole = write(tmp_path, counts)
    store = open_store(paths, make_vocab(N_GENES), NO_MINIMUM)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(10):
            rows = rng.integers(0, len(whole), 40)
            if not np.array_equal(as_dense(store.read(rows), N_GENES), whole[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_in_use_is_not_closed():
    closed = []
    kept = open_files.Kept(1, closed.append)
    with kept.borrow(0, lambda: "a"):
        with kept.borrow(1, lambda: "b"):
            assert closed == [], "both are in use, although there is room for one"
        assert closed == ["b"]
    with kept.borrow(2, lambda: "c"):
        assert closed == ["b", "a"]


def test_the_same_genes_are_matched_once(tmp_path, counts, monkeypatch):
    paths, _ = write(tmp_path, counts)
    matched = []
    match = store_module.match_genes
    monkeypatch.setattr(
        store_module, "match_genes", lambda var, *args: matched.append(var) or match(var, *args)
    )
    store = open_store(paths, make_vocab(N_GENES), NO_MINIMUM)
    assert len(matched) == 3
    assert len({id(matrix.var) for matrix in store.matrices}) == 3


def test_genes_that_differ_in_one_letter_are_not_shared(tmp_path):
    adata = make_adata(np.ones((2, 3)), np.arange(3))
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.var["ensembl_id"] = [*adata.var["ensembl_id"][:2], "ENSG00000000009"]
    adata.write_h5ad(tmp_path / "b.h5ad")
    one, other = open_matrix(tmp_path / "a.h5ad"), open_matrix(tmp_path / "b.h5ad")
    assert one.var is not other.var
    assert other.var["ensembl_id"].iloc[2] == "ENSG00000000009"


def test_every_file_is_looked_at_but_not_all_of_it(tmp_path, counts, monkeypatch):
    monkeypatch.setattr(state, "SAMPLE_CELLS_OF_ALL", 60)
    monkeypatch.setattr(state, "FEWEST_CELLS", 1)
    paths, _ = write(tmp_path, counts)
    seen = []
    sample = state.sample_matrix
    monkeypatch.setattr(
        state, "sample_matrix", lambda m, match, n: seen.append((m.name, n)) or sample(m, match, n)
    )
    open_store(paths, make_vocab(N_GENES), NO_MINIMUM)
    assert seen == [(str(path), 2) for path in paths]

    adata = ad.read_h5ad(paths[17])
    adata.X = adata.X.multiply(0.5).tocsr()
    adata.write_h5ad(paths[17])
    with pytest.raises(DataError, match=r"017\.h5ad': X does not hold raw counts"):
        open_store(paths, make_vocab(N_GENES), NO_MINIMUM)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_file_written_anew_meanwhile_is_refused(tmp_path, contiguous):
    path, _ = store_as("csr", np.ones((4, 3)), np.arange(3), tmp_path)
    matrix = open_matrix(make_contiguous(path) if contiguous else path)
    other = tmp_path / "other.h5ad"
    make_adata(np.full((4, 3), 2.0), np.arange(3)).write_h5ad(other)
    os.replace(other, path)
    with pytest.raises(DataError, match=r"csr\.h5ad' was written anew while it was in use"):
        matrix.read(np.arange(4))


def test_a_file_can_be_written_when_its_matrix_is_gone(tmp_path):
    path, _ = store_as("csr", np.ones((4, 3)), np.arange(3), tmp_path)
    matrix = open_matrix(path)
    matrix.read(np.arange(4))
    matrix.close()
    make_adata(np.full((4, 3), 2.0), np.arange(3)).write_h5ad(path)
    assert open_matrix(path).read(np.arange(4)).data.max() == 2
    make_adata(np.full((4, 3), 3.0), np.arange(3)).write_h5ad(path)


def test_the_report_lists_the_same_genes_once(tmp_path, counts):
    paths, _ = write(tmp_path, counts)
    store = open_store(paths, make_vocab(N_GENES), NO_MINIMUM)
    report = store.gene_report()
    assert len(report) == 3 * N_GENES
    assert set(report.file) == {f"{path} and 9 more with the same genes" for path in paths[:3]}
    *lines, last = store.describe()
    assert len(lines) == 20
    assert last == "… and 10 more files with 50 cells"
