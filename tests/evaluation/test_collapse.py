"""Embeddings that say nothing are told from those that only look alike."""

from __future__ import annotations

import numpy as np
import pytest

from scmodelforge.errors import DataError
from scmodelforge.evaluation.collapse import collapse
from scmodelforge.evaluation.splits import check_embedding

RNG = np.random.default_rng(0)
CELLS = RNG.normal(size=(300, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (np.full((300, 16), 0.1, np.float32), "all cells have the same embedding"),
        (1e5 + CELLS, r"all cells are alike: they deviate .* cosine similarity 0\.99999999"),
        (np.outer(CELLS[:, 0], CELLS[0]) + 1e-3 * CELLS, r"all cells lie on one line: .* 0\.9999"),
        (np.outer(CELLS[:, 0], CELLS[0]) + 5, r"all cells lie on one line: .* 1\.000000"),
    ],
    ids=["one point", "rounding", "nearly a line", "line"],
)
def test_a_collapsed_embedding_is_refused_with_the_reason(embedding, reason):
    with pytest.raises(DataError, match=rf"embedding of 'model' has collapsed: {reason}(.|\n)*learning rate"):
        check_embedding(embedding, 300)
    with pytest.raises(DataError, match=r"Leave 'untrained' out of eval\.baselines"):
        check_embedding(embedding, 300, "untrained")


@pytest.mark.parametrize(
    "embedding",
    [
        CELLS,
        1e3 + CELLS,
        CELLS[:, :1],
        CELLS[:2],
        CELLS * np.array([50.0] + [1.0] * 15),
        np.vstack([CELLS, np.full((3, 16), 1e6)]),
    ],
    ids=["noise", "narrow cone", "one dimension", "two cells", "one large direction", "outliers"],
)
def test_a_narrow_embedding_is_no_collapsed_one(embedding):
    assert collapse(embedding) is None


def test_an_untrained_model_has_not_collapsed():
    from scmodelforge.inference import embed_store, open_for
    from tests.helpers import marker_cells, untrained_annotator

    bundle, cells = untrained_annotator(), marker_cells()
    store = open_for(bundle, cells, bundle.config.data)
    assert collapse(embed_store(bundle, store, 64)) is None
