"""The UMAP: the same each time, and clusters stay apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scmodelforge.errors import DataError
from scmodelforge.report.charts import COLOURS, colours_for
from scmodelforge.report.layout import umap_layout


def test_umap_is_the_same_each_time_and_keeps_clusters_apart() -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 60)
    embedding = (rng.normal(size=(120, 5)) + 50 * codes[:, None]).astype(np.float32)
    first = umap_layout(embedding)
    np.testing.assert_array_equal(first, umap_layout(embedding))
    assert first.shape == (120, 2)
    centres = np.stack([first[codes == 0].mean(0), first[codes == 1].mean(0)])
    distance = np.linalg.norm(first[:, None] - centres, axis=2)
    assert (distance.argmin(axis=1) == codes).all()


def test_what_comes_after_computes_with_as_many_threads_as_before() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    umap_layout(np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_too_few_cells_for_a_umap() -> None:
    with pytest.raises(DataError, match="at least 10 cells, and there are 4"):
        umap_layout(np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("n", [3, 10, 11, 25, 70, 150])
def test_each_class_has_a_colour_of_its_own_as_far_as_there_are_some(n: int) -> None:
    colours = colours_for(n)
    assert len(colours) == n
    assert len(set(colours)) == min(n, 102)
    assert (n > 10) or tuple(colours) == COLOURS[:n]
