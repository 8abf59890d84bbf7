"""Medians equal NumPy's to the last bit, however little memory they get; variable genes are scanpy's."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from scmodelforge.config import DataConfig, HighlyVariableGenes, Preprocessing
from scmodelforge.data import preprocess
from scmodelforge.data.preprocess import gene_medians, select_hvg
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from scmodelforge.genes.vocab import predefined
from tests.data.files import NO_MINIMUM, make_adata
from tests.helpers import make_vocab

VOCAB = make_vocab(6)


def numpy_medians(store, rows, target_sum, normalize):
    """The same by `np.median` of each gene's column."""
    cells = store.read(rows)
    values = cells.counts.astype(np.float64)
    if normalize == "library_size":
        values = (
            values / np.repeat(cells.library_size.astype(np.float64), cells.n_genes_per_cell) * target_sum
        )
    shape = (cells.n_cells, store.vocab.n_genes)
    columns = sparse.csr_matrix((values, cells.gene_ids, cells.indptr), shape=shape).tocsc()
    parts = np.split(columns.data, columns.indptr[1:-1])
    return np.array([np.median(part) if len(part) else np.nan for part in parts])


@settings(deadline=None, max_examples=40)
@given(
    counts=hnp.arrays(
        np.int64,
        st.tuples(st.integers(1, 25), st.just(8)),
        elements=st.sampled_from([0, 0, 1, 1, 2, 9, 10**6]),
    ),
    normalize=st.sampled_from(["library_size", "none"]),
    budget=st.sampled_from([0, 3, 10**6]),
)
def test_medians_equal_numpy(counts, normalize, budget):
    counts[0, 0] = 1
    store = open_store([make_adata(counts, np.arange(8))], VOCAB, NO_MINIMUM)
    rows = np.arange(len(counts))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "MAX_COLLECTED", budget)
        medians, statistics = gene_medians(store, rows, 10_000, normalize)
    np.testing.assert_array_equal(medians, numpy_medians(store, np.sort(rows), 10_000, normalize))
    np.testing.assert_array_equal(statistics.empty_rows, np.flatnonzero(counts[:, :6].sum(axis=1) == 0))


@pytest.mark.parametrize("normalize", ["library_size", "none"])
@pytest.mark.parametrize("budget", [8_000_000, 500])
def test_medians_of_real_cells_from_two_files(real_data, monkeypatch, normalize, budget):
    monkeypatch.setattr(preprocess, "MAX_COLLECTED", budget)
    paths = [real_data / "pbmc_sorted_zheng.h5ad", real_data / "gut_crohns_kong.h5ad"]
    store = open_store(paths, predefined("human_protein_coding"), DataConfig())
    rows = np.arange(0, store.n_cells, 3)
    medians, statistics = gene_medians(store, rows, 10_000, normalize)
    np.testing.assert_array_equal(medians, numpy_medians(store, rows, 10_000, normalize))
    assert statistics.n_cells == len(rows)
    assert statistics.genes_per_cell["median"] == np.median(store.read(rows).n_genes_per_cell)


def test_only_the_given_cells_count():
    counts = np.array([[1, 1], [3, 0], [900, 0]])
    store = open_store([make_adata(counts, np.arange(2))], VOCAB, NO_MINIMUM)
    medians, _ = gene_medians(store, np.array([0, 1]), 1.0, "none")
    assert medians[0] == 2
    assert medians[1] == 1
    assert np.isnan(medians[2:]).all()


def test_variable_genes_are_scanpys_on_values_normalized_over_all_genes():
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(1, 1 / (1 + rng.gamma(1, 2, size=900)), size=(300, 900))
    vocab = make_vocab(800)
    store = open_store([make_adata(counts, np.arange(900))], vocab, NO_MINIMUM)
    rows = np.arange(0, 300, 2)
    chosen = select_hvg(store, rows, HighlyVariableGenes(n_top_genes=100), Preprocessing(), 0)
    values = np.log1p(counts[rows][:, :800] / counts[rows].sum(axis=1, keepdims=True) * 10_000)
    seen = np.flatnonzero(values.any(axis=0))  # genes without a count would shift scanpy's bins
    adata = ad.AnnData(sparse.csr_matrix(values[:, seen].astype(np.float32)))
    sc.pp.highly_variable_genes(adata, n_top_genes=100, flavor="seurat")
    np.testing.assert_array_equal(chosen, seen[adata.var.highly_variable])
    assert len(chosen) == 100


def test_variable_genes_of_many_cells_are_chosen_on_a_sample(caplog):
    counts = np.random.default_rng(0).poisson(1, size=(80, 6))
    store = open_store([make_adata(counts, np.arange(6))], VOCAB, NO_MINIMUM)
    hvg = HighlyVariableGenes(n_top_genes=3)
    with caplog.at_level(logging.INFO):
        first = select_hvg(store, np.arange(80), hvg, Preprocessing(), 1, max_cells=50)
    assert "chosen on 50 of 80 cells" in caplog.text
    np.testing.assert_array_equal(
        first, select_hvg(store, np.arange(80), hvg, Preprocessing(), 1, max_cells=50)
    )


def test_fewer_genes_than_asked_are_all_kept(caplog):
    counts = np.random.default_rng(0).poisson(1, size=(80, 4))
    store = open_store([make_adata(counts, np.arange(4))], VOCAB, NO_MINIMUM)
    chosen = select_hvg(store, np.arange(80), HighlyVariableGenes(n_top_genes=5), Preprocessing(), 0)
    assert chosen.tolist() == [0, 1, 2, 3]
    assert "only 4 genes have counts" in caplog.text


def test_nothing_varies_where_nothing_is():
    counts = np.array([[0, 5], [1, 5]])
    store = open_store([make_adata(counts, np.array([0, 99]))], VOCAB, NO_MINIMUM)
    with pytest.raises(DataError, match="nothing varies"):
        select_hvg(store, np.array([0]), HighlyVariableGenes(n_top_genes=1), Preprocessing(), 0)
