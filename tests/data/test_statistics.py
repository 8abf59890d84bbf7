"""Statistics equal numpy's on a matrix in memory, the medians to the last bit, whatever memory and threads they get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from scmodelforge.config import DataConfig, Preprocessing
from scmodelforge.data import medians, passes
from scmodelforge.data.statistics import gene_medians, gene_moments, gene_statistics
from scmodelforge.data.store import open_store
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


def some_counts(max_cells=25):
    """Cells of 8 genes, two of them outside the vocabulary: ties, empty cells, large and fractional counts."""
    return hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, max_cells), st.just(8)),
        elements=st.sampled_from([0, 0, 1, 1, 2, 9, 0.25, 70.5, 10**6, 2**30])
        | st.integers(1, 1000).map(float),
    )


def two_files(counts):
    """A store that holds the cells in two files whose genes come in another order."""
    counts[0, 0] = 1
    order = np.array([3, 1, 0, 2, 7, 5, 4, 6])
    half = (len(counts) + 1) // 2
    sources = [make_adata(counts[:half], np.arange(8))]
    if half < len(counts):
        sources.append(make_adata(counts[half:, order], order, half))
    return open_store(sources, VOCAB, NO_MINIMUM, require_counts=False)


@settings(deadline=None, max_examples=40)
@given(
    counts=some_counts(),
    normalize=st.sampled_from(["library_size", "none"]),
    budget=st.sampled_from([0, 3, 10**6]),
    threads=st.integers(1, 3),
    block=st.sampled_from([1, 4, 512]),
    data=st.data(),
)
def test_medians_equal_numpy(counts, normalize, budget, threads, block, data):
    store = two_files(counts)
    rows = np.array(data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=30)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medians, "MAX_COLLECTED", budget)
        patch.setattr(passes, "BLOCK_CELLS", block)
        measured, statistics = gene_medians(store, rows, 10_000, normalize, threads)
    rows = np.sort(rows)
    np.testing.assert_array_equal(measured, numpy_medians(store, rows, 10_000, normalize))
    np.testing.assert_array_equal(statistics.empty_rows, rows[counts[rows, :6].sum(axis=1) == 0])
    library = store.read(rows).library_size.astype(np.float64)
    assert statistics.library_size["median"] == pytest.approx(np.median(library), rel=1e-12)
    assert statistics.library_size["max"] == library.max()


def dense(store, rows):
    cells = store.read(rows)
    shape = (cells.n_cells, store.vocab.n_genes)
    counts = sparse.csr_matrix((cells.counts.astype(np.float64), cells.gene_ids, cells.indptr), shape=shape)
    return counts.toarray(), cells.library_size.astype(np.float64)[:, None]


@settings(deadline=None, max_examples=25)
@given(counts=some_counts(), threads=st.integers(1, 3), block=st.sampled_from([1, 4, 512]))
def test_means_and_variances_equal_numpy(counts, threads, block):
    store, rows = two_files(counts), np.arange(len(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "BLOCK_CELLS", block)
        found = gene_statistics(store, rows, Preprocessing(), threads)
    inside, library = dense(store, rows)
    logged = np.log1p(inside / np.maximum(library, 1e-9) * 10_000)
    ddof = 1 if len(rows) > 1 else 0
    for moments, values in ((found.logged, logged), (found.counts, inside)):
        np.testing.assert_array_equal(moments.n_cells, (inside > 0).sum(axis=0))
        np.testing.assert_allclose(moments.means, values.mean(axis=0), rtol=1e-13)
        scale = np.square(values).mean(
            axis=0
        )  # what rounding in the difference of two squares is measured by
        np.testing.assert_array_less(
            abs(moments.variances - values.var(axis=0, ddof=ddof)), 1e-13 * scale + 1e-300
        )
    np.testing.assert_array_equal(found.medians, numpy_medians(store, rows, 10_000, "library_size"))
    table = found.table(store.vocab)
    assert list(table) == ["gene_id", "n_cells", "mean", "variance", "median"]
    assert table.gene_id.tolist() == store.vocab.gene_ids.tolist()


def test_many_cells_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(passes, "BLOCK_CELLS", 7)
    monkeypatch.setattr(medians, "MAX_COLLECTED", 20)
    rng = np.random.default_rng(0)
    store = open_store(
        [make_adata(rng.negative_binomial(1, 0.02, (200, 6)), np.arange(6))], VOCAB, NO_MINIMUM
    )
    first, *others = [
        gene_statistics(store, np.arange(200), Preprocessing(), threads) for threads in (1, 2, 3, 8)
    ]
    np.testing.assert_array_equal(first.medians, numpy_medians(store, np.arange(200), 10_000, "library_size"))
    for other in others:
        np.testing.assert_array_equal(other.medians, first.medians)
        np.testing.assert_array_equal(other.logged.means, first.logged.means)
        np.testing.assert_array_equal(other.logged.variances, first.logged.variances)
        assert other.cells.genes_per_cell == first.cells.genes_per_cell


def test_no_cells_at_all():
    store = open_store([make_adata(np.ones((2, 6)), np.arange(6))], VOCAB, NO_MINIMUM)
    found = gene_statistics(store, np.zeros(0, dtype=np.int64), Preprocessing())
    assert np.isnan(found.medians).all()
    assert found.cells.n_cells == found.logged.n_cells.sum() == found.logged.means.sum() == 0


@pytest.mark.parametrize("normalize", ["library_size", "none"])
@pytest.mark.parametrize("budget", [8_000_000, 500])
def test_medians_of_real_cells_from_two_files(real_data, monkeypatch, normalize, budget):
    monkeypatch.setattr(medians, "MAX_COLLECTED", budget)
    paths = [real_data / "pbmc_sorted_zheng.h5ad", real_data / "gut_crohns_kong.h5ad"]
    store = open_store(paths, predefined("human_protein_coding"), DataConfig())
    rows = np.arange(0, store.n_cells, 3)
    measured, statistics = gene_medians(store, rows, 10_000, normalize)
    np.testing.assert_array_equal(measured, numpy_medians(store, rows, 10_000, normalize))
    assert statistics.n_cells == len(rows)
    assert statistics.genes_per_cell["median"] == np.median(store.read(rows).n_genes_per_cell)


def test_only_the_given_cells_count():
    counts = np.array([[1, 1], [3, 0], [900, 0]])
    store = open_store([make_adata(counts, np.arange(2))], VOCAB, NO_MINIMUM)
    measured, _ = gene_medians(store, np.array([0, 1]), 1.0, "none")
    assert measured[0] == 2
    assert measured[1] == 1
    assert np.isnan(measured[2:]).all()


def test_moments_of_real_cells_are_scanpys(real_data):
    from scanpy.preprocessing._utils import _get_mean_var

    store = open_store([real_data / "pbmc3k.h5ad"], predefined("human_protein_coding"), DataConfig())
    rows = np.arange(store.n_cells)
    found = gene_moments(store, rows, lambda cells: np.log1p(cells.counts.astype(np.float64)))
    means, variances = _get_mean_var(sparse.csr_matrix(np.log1p(dense(store, rows)[0])))
    np.testing.assert_allclose(found.means, means, rtol=1e-12)
    np.testing.assert_allclose(found.variances, variances, rtol=1e-10, atol=1e-15)
