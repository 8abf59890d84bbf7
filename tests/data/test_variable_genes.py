"""Variable genes are those that scanpy selects on a matrix in memory."""

from __future__ import annotations

import warnings

import anndata as ad
import numba
import numpy as np
import pytest
import scanpy as sc
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from scmodelforge.config import DataConfig, HighlyVariableGenes, Preprocessing
from scmodelforge.data import passes
from scmodelforge.data.preprocess import normalized
from scmodelforge.data.store import open_store
from scmodelforge.data.variable_genes import select_hvg
from scmodelforge.errors import DataError
from scmodelforge.genes.vocab import predefined
from tests.data.files import NO_MINIMUM, make_adata
from tests.helpers import make_vocab

VOCAB = make_vocab(6)
FLAVORS = ["seurat", "cell_ranger"]
WITH_COUNTS = [
    "pbmc3k",
    "pbmc_kang_12k",
    "pbmc_ifnb_kang",
    "pbmc_frozen_a",
    "pbmc_sorted_zheng",
    "cell_lines_mixology",
    "pancreas_baron_human",
    "pancreas_baron_mouse",
    "pancreas_baron_orthologs",
    "gut_crohns_kong",
    "census_placenta",
    "mouse_brain_merfish",
    "crispr_papalexi",
    "tenx_v3_pbmc_sample",
]


def scanpys(store, rows, n_top_genes, flavor, normalize="library_size"):
    """Its table, for the genes with a count, and these genes."""
    cells = store.read(np.sort(rows))
    values = np.log1p(normalized(cells, 10_000, normalize)).astype(np.float32)
    matrix = sparse.csr_matrix(
        (values, cells.gene_ids, cells.indptr), shape=(cells.n_cells, store.vocab.n_genes)
    )
    seen = np.flatnonzero(matrix.getnnz(axis=0))
    threads = numba.get_num_threads()
    numba.set_num_threads(1)  # scanpy adds in the order of its threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = sc.pp.highly_variable_genes(
                ad.AnnData(matrix[:, seen]), n_top_genes=n_top_genes, flavor=flavor, inplace=False
            )
    finally:
        numba.set_num_threads(threads)
    return table, seen


def test_variable_genes_are_scanpys_on_values_normalized_over_all_genes():
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(1, 1 / (1 + rng.gamma(1, 2, size=900)), size=(300, 900))
    store = open_store([make_adata(counts, np.arange(900))], make_vocab(800), NO_MINIMUM)
    rows = np.arange(0, 300, 2)
    chosen = select_hvg(store, rows, HighlyVariableGenes(n_top_genes=100), Preprocessing())
    values = np.log1p(counts[rows][:, :800] / counts[rows].sum(axis=1, keepdims=True) * 10_000)
    seen = np.flatnonzero(values.any(axis=0))  # genes without a count would shift scanpy's bins
    adata = ad.AnnData(sparse.csr_matrix(values[:, seen].astype(np.float32)))
    sc.pp.highly_variable_genes(adata, n_top_genes=100, flavor="seurat")
    np.testing.assert_array_equal(chosen, seen[adata.var.highly_variable])
    assert len(chosen) == 100


@settings(deadline=None, max_examples=25)
@given(
    counts=hnp.arrays(np.int64, st.tuples(st.integers(3, 40), st.just(30)), elements=st.integers(0, 6)),
    flavor=st.sampled_from(FLAVORS),
    normalize=st.sampled_from(["library_size", "none"]),
    n_top_genes=st.integers(1, 25),
    threads=st.integers(1, 3),
)
def test_variable_genes_of_random_cells_are_scanpys(counts, flavor, normalize, n_top_genes, threads):
    counts[0, :3] = 1, 2, 3
    store = open_store([make_adata(counts, np.arange(30))], make_vocab(28), NO_MINIMUM)
    rows = np.arange(len(counts))
    try:
        table, seen = scanpys(store, rows, n_top_genes, flavor, normalize)
    except (ValueError, IndexError):  # bins of cell_ranger that are not unique; nothing varies
        return
    dispersions = table.dispersions_norm.to_numpy()
    assume(len(seen) > n_top_genes and not np.isinf(dispersions).any())
    hvg = HighlyVariableGenes(n_top_genes=n_top_genes, flavor=flavor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "BLOCK_CELLS", 7)
        chosen = select_hvg(store, rows, hvg, Preprocessing(normalize=normalize), threads)
    # Sums of blocks round in another order: genes within rounding of the last one may be in or out.
    last = dispersions[table.highly_variable.to_numpy()].min()
    certain = abs(dispersions - last) > 1e-9
    np.testing.assert_array_equal(np.isin(seen, chosen)[certain], table.highly_variable.to_numpy()[certain])
    assert len(chosen) >= min(n_top_genes, int((~np.isnan(dispersions)).sum()))


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("name", WITH_COUNTS)
def test_variable_genes_of_real_cells_are_scanpys(real_data, name, flavor):
    vocab = predefined("mouse_protein_coding" if "mouse" in name else "human_protein_coding")
    store = open_store([real_data / f"{name}.h5ad"], vocab, DataConfig(min_gene_overlap=0.0))
    rows = np.arange(store.n_cells)
    n_top_genes = min(2000, int(sum(match.n_genes for match in store.matches)) // 3)
    table, seen = scanpys(store, rows, n_top_genes, flavor)
    chosen = select_hvg(
        store, rows, HighlyVariableGenes(n_top_genes=n_top_genes, flavor=flavor), Preprocessing()
    )
    np.testing.assert_array_equal(chosen, seen[table.highly_variable.to_numpy()])


@pytest.mark.parametrize("flavor", FLAVORS)
def test_variable_genes_of_several_real_files_are_scanpys(real_data, flavor):
    paths = [real_data / f"{name}.h5ad" for name in ("pbmc3k", "pbmc_sorted_zheng", "gut_crohns_kong")]
    store = open_store(paths, predefined("human_protein_coding"), DataConfig())
    rows = np.arange(store.n_cells)[::-1][::2]
    table, seen = scanpys(store, rows, 1000, flavor)
    chosen = select_hvg(store, rows, HighlyVariableGenes(n_top_genes=1000, flavor=flavor), Preprocessing())
    np.testing.assert_array_equal(chosen, seen[table.highly_variable.to_numpy()])


def test_fewer_genes_than_asked_are_all_kept(caplog):
    counts = np.random.default_rng(0).poisson(1, size=(80, 4))
    store = open_store([make_adata(counts, np.arange(4))], VOCAB, NO_MINIMUM)
    chosen = select_hvg(store, np.arange(80), HighlyVariableGenes(n_top_genes=5), Preprocessing())
    assert chosen.tolist() == [0, 1, 2, 3]
    assert "only 4 genes have counts" in caplog.text


def test_genes_that_do_not_vary_are_no_variable_genes(caplog):
    counts = np.ones((10, 4), dtype=np.int64)
    counts[::2, 3] = 2
    store = open_store([make_adata(counts, np.arange(4))], VOCAB, NO_MINIMUM)
    hvg, preprocessing = HighlyVariableGenes(n_top_genes=2), Preprocessing(normalize="none")
    assert select_hvg(store, np.arange(10), hvg, preprocessing).tolist() == [3]
    assert "only 1 genes vary" in caplog.text


def test_nothing_varies_where_nothing_is():
    counts = np.array([[0, 5], [1, 5]])
    store = open_store([make_adata(counts, np.array([0, 99]))], VOCAB, NO_MINIMUM)
    with pytest.raises(DataError, match="nothing varies"):
        select_hvg(store, np.array([0]), HighlyVariableGenes(n_top_genes=1), Preprocessing())


def test_one_cell_does_not_vary():
    store = open_store([make_adata(np.ones((2, 4)), np.arange(4))], VOCAB, NO_MINIMUM)
    with pytest.raises(DataError, match="no gene varies over the 1 training cells"):
        select_hvg(store, np.array([0]), HighlyVariableGenes(n_top_genes=1), Preprocessing(normalize="none"))


def test_cell_ranger_needs_genes_of_different_means():
    counts = np.tile([[1], [2], [3]], (1, 5))
    store = open_store([make_adata(counts, np.arange(5))], VOCAB, NO_MINIMUM)
    hvg = HighlyVariableGenes(n_top_genes=2, flavor="cell_ranger")
    with pytest.raises(DataError, match="Set flavor: seurat"):
        select_hvg(store, np.arange(3), hvg, Preprocessing(normalize="none"))
