"""The baselines that are embeddings: PCA against a plain decomposition, Harmony and scVI where they are installed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.neighbors import KNeighborsClassifier

from scmodelforge.config_eval import EvalConfig
from scmodelforge.errors import DataError
from scmodelforge.evaluation.baselines import (
    batch_key,
    harmony_embedding,
    log_normalized,
    pca_embedding,
    scvi_embedding,
)
from tests.evaluation.cells import evaluation_cells


def counts(n_cells: int, n_genes: int, seed: int = 0) -> csr_matrix:
    rng = np.random.default_rng(seed)
    return csr_matrix(rng.poisson(rng.gamma(0.5, 2, n_genes), (n_cells, n_genes)).astype(np.float32))


def test_equals_a_singular_value_decomposition_of_log_normalized_counts():
    matrix = counts(80, 30)
    embedding = pca_embedding(matrix, 0, n_components=5)
    dense = matrix.toarray()
    logged = np.log1p(dense / dense.sum(1, keepdims=True) * 10_000)
    left, values, _ = np.linalg.svd(logged - logged.mean(0), full_matrices=False)
    expected = left[:, :5] * values[:5]
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(np.abs(embedding), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_input_is_left_unchanged_and_the_seed_decides():
    matrix = counts(60, 300)
    before = matrix.copy()
    first, again = (pca_embedding(matrix, 3, n_top_genes=100, n_components=10) for _ in range(2))
    assert (matrix != before).nnz == 0
    np.testing.assert_array_equal(first, again)
    assert first.shape == (60, 10)


def test_depth_does_not_matter():
    matrix = counts(60, 40)
    deeper = csr_matrix(matrix.multiply(np.full((60, 1), 3.0)), dtype=np.float32)
    np.testing.assert_allclose(
        np.abs(pca_embedding(matrix, 0, n_components=3)),
        np.abs(pca_embedding(deeper, 0, n_components=3)),
        atol=1e-3,
    )


@settings(max_examples=15, deadline=None)
@given(n_cells=st.integers(3, 70), n_genes=st.integers(8, 70), seed=st.integers(0, 99))
def test_small_data_get_fewer_components(n_cells, n_genes, seed):
    matrix = counts(n_cells, n_genes, seed)
    embedding = pca_embedding(matrix, seed)
    assert embedding.shape == (n_cells, min(50, n_cells - 1, n_genes - 1))
    assert np.isfinite(embedding).all()


def test_empty_cells_are_embedded_and_one_cell_is_refused():
    matrix = counts(20, 30)
    matrix = csr_matrix(np.vstack([matrix.toarray(), np.zeros((2, 30), np.float32)]))
    assert np.isfinite(pca_embedding(matrix, 0)).all()
    with pytest.raises(DataError, match="at least two cells and two genes, not 1 × 30"):
        pca_embedding(counts(1, 30), 0)


def test_cells_that_are_all_alike_are_refused():
    with pytest.raises(DataError, match="All 6 cells have the same normalized counts"):
        pca_embedding(csr_matrix(np.ones((6, 5), np.float32)), 0)


def test_all_genes_are_log_normalized_and_stay_sparse():
    matrix = counts(20, 30)
    values, dense = log_normalized(matrix), matrix.toarray()
    np.testing.assert_allclose(
        values.toarray(), np.log1p(dense / dense.sum(1, keepdims=True) * 1e4), rtol=1e-5
    )
    assert values.nnz == matrix.nnz


def two_batches() -> tuple[csr_matrix, np.ndarray]:
    """Two kinds of cells in two batches, of which the second has twice the counts on a third of the genes."""
    rng, kind, batch = np.random.default_rng(0), np.tile([0, 1], 100), np.repeat(["x", "y"], 100)
    rates = np.where((np.arange(60) < 20)[None] == (kind[:, None] == 0), 4.0, 1.0)
    rates[:, 40:] = np.where(batch == "y", 6.0, 2.0)[:, None]
    return csr_matrix(rng.poisson(rates).astype(np.float32)), batch


def test_harmony_mixes_batches():
    pytest.importorskip("harmonypy")
    matrix, batch = two_batches()
    pca = pca_embedding(matrix, 0, n_components=10)
    mixed, again = (harmony_embedding(pca, batch, 0) for _ in range(2))
    np.testing.assert_array_equal(mixed, again)
    told_apart = [KNeighborsClassifier(15).fit(x, batch).score(x, batch) for x in (pca, mixed)]
    assert told_apart[0] > 0.9
    assert told_apart[1] < 0.8


def test_scvi_embeds_all_cells_the_same_with_the_same_seed(monkeypatch):
    scvi = pytest.importorskip("scvi")
    train = scvi.model.SCVI.train
    monkeypatch.setattr(
        scvi.model.SCVI, "train", lambda self, **options: train(self, max_epochs=2, **options)
    )
    matrix, batch = two_batches()
    cells = evaluation_cells(pd.DataFrame({"batch": batch}), matrix)
    first, again = (scvi_embedding(cells, EvalConfig()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first.shape, first.dtype) == ((200, 10), np.float32)
    assert np.isfinite(first).all()


def test_batches_are_those_of_a_benchmark_or_known_by_their_name():
    cells = evaluation_cells(
        pd.DataFrame({"Donor": ["a", "b"], "lane": ["x", "y"], "batch": ["only", "only"]})
    )
    assert batch_key(cells, EvalConfig()) == "Donor"
    quality = {"name": "embedding_quality", "params": {"batch_key": "lane"}}
    assert batch_key(cells, EvalConfig.model_validate({"benchmarks": [quality]})) == "lane"
    assert batch_key(evaluation_cells(pd.DataFrame({"cell_type": ["a", "b"]})), EvalConfig()) is None
