"""Exact neighbours against scikit-learn's brute force, on real cells and on what rounding makes hard."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from scmodelforge.evaluation import neighbors
from scmodelforge.evaluation.baselines import pca_embedding
from scmodelforge.evaluation.neighbors import nearest_neighbors


def brute_force(points, k, reference=None):
    """By scikit-learn, from differences in float64 (its own product of matrices would cancel, too)."""
    rows = points if reference is None else reference
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="precomputed")
    search.fit(np.zeros((len(rows), len(rows))))
    return search.kneighbors(cdist(points.astype(np.float64), rows.astype(np.float64)))[::-1]


def assert_same_up_to_ties(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found[1], expected[1], atol=tolerance * expected[1].max())
    different = found[0] != expected[0]
    assert different.mean() < 0.01
    for row in np.flatnonzero(different.any(axis=1)):  # another order or another cell, at the same distance
        swapped = different[row]
        np.testing.assert_allclose(
            found[1][row, swapped], expected[1][row, swapped], atol=tolerance * expected[1].max()
        )


def test_the_neighbours_of_real_cells_are_those_of_scikit_learn(real_data):
    import anndata as ad

    cells = pca_embedding(ad.read_h5ad(real_data / "pbmc_ifnb_kang.h5ad").X, seed=0)
    found = nearest_neighbors(cells, 90)
    assert_same_up_to_ties(found, brute_force(cells, 90))
    assert np.array_equal(found[0][:, 0], np.arange(len(cells)))
    assert not found[1][:, 0].any()
    assert_same_up_to_ties(
        nearest_neighbors(cells[:500], 15, cells[500:]), brute_force(cells[:500], 15, cells[500:])
    )


def test_blocks_change_nothing(monkeypatch):
    cells = np.random.default_rng(0).normal(size=(203, 7)).astype(np.float32)
    whole = nearest_neighbors(cells, 10)
    monkeypatch.setattr(neighbors, "BLOCK", 2_000)
    for part, one in zip(nearest_neighbors(cells, 10), whole, strict=True):
        np.testing.assert_array_equal(part, one)


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_what_the_float32_product_cannot_tell_is_done_in_float64(scale, monkeypatch):
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(400, 5)).astype(np.float32)
    cells[:200, 0] += scale  # two far groups: the product rounds at about scale² × 1e-7
    searched_again = []
    exact = neighbors._nearest_in_float64
    monkeypatch.setattr(
        neighbors,
        "_nearest_in_float64",
        lambda queries, *rest: searched_again.append(len(queries)) or exact(queries, *rest),
    )
    assert_same_up_to_ties(nearest_neighbors(cells, 20), brute_force(cells, 20), tolerance=1e-6)
    assert sum(searched_again) > 100


def test_equal_cells_come_in_order_after_the_cell_itself():
    cells = np.zeros((50, 3), np.float32)
    cells[40:] = 1
    indices, distances = nearest_neighbors(cells, 4)
    assert indices[0].tolist() == [0, 1, 2, 3]
    assert indices[7].tolist() == [7, 0, 1, 2]
    assert indices[45].tolist() == [45, 40, 41, 42]
    assert not distances.any()


def test_more_neighbours_than_cells_are_refused():
    with pytest.raises(ValueError, match="5 neighbours cannot be chosen among 4 rows"):
        nearest_neighbors(np.zeros((4, 2)), 5)
    assert nearest_neighbors(np.eye(4), 4)[0].shape == (4, 4)
