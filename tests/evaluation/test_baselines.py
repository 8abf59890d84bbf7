"""The PCA baseline."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scmodelforge.errors import DataError
from scmodelforge.evaluation.baselines import pca_embedding


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
