"""The cells that a report shows: which columns, how many, and predictions of numbers."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scmodelforge.data.store import open_store
from scmodelforge.evaluation import shown_cells as module
from scmodelforge.evaluation.shown_cells import FACTS, shown_cells, write_cells
from scmodelforge.models.bundle import Labels, ModelBundle, build_head, build_model
from scmodelforge.report.cells_view import view_cells
from tests.helpers import make_vocab, marker_cells, tiny_config


@pytest.fixture(scope="module")
def regressor() -> ModelBundle:
    """A tiny model of `marker_cells` with an untrained head for their age."""
    config, vocab = tiny_config(Path("nowhere")), make_vocab(40)
    labels = Labels("age", "regression", mean=50.0, std=10.0)
    return ModelBundle(
        config,
        vocab,
        build_model(config, vocab, seed=0).eval(),
        labels,
        build_head(config, labels, seed=0).eval(),
    )


def test_numbers_are_predicted_and_coloured_from_low_to_high(regressor: ModelBundle, tmp_path: Path) -> None:
    adata = marker_cells(60)
    store = open_store([adata], regressor.vocab, regressor.config.data)
    write_cells(shown_cells(regressor, store, np.arange(60), "cells"), tmp_path / "cells.h5ad")
    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert dict(cells.uns[FACTS]) == {
        "kind": "cells",
        "n_all": 60,
        "label": "age",
        "batch": "donor",
        "prediction": "scmodelforge_age",
    }
    np.testing.assert_allclose(cells.obs["age"], adata.obs["age"])
    cells.obsm["X_umap"] = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    view = view_cells(cells)
    assert view.predictions is not None
    error = np.abs(cells.obs["age"] - cells.obs["scmodelforge_age"]).mean()
    assert dict(view.predictions.figures)["mean absolute error"] == f"{error:.1f}"
    assert [umap.title for umap in view.umaps] == ["Label: age", "Prediction", "Batch: donor"]
    ages = view.umaps[0].classes
    assert sum(one.n for one in ages) == 60
    assert [one.name for one in ages] == sorted(one.name for one in ages)


def test_many_cells_are_thinned_evenly(regressor: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CELLS", 20)
    store = open_store([marker_cells(60)], regressor.vocab, regressor.config.data)
    cells = shown_cells(regressor, store, np.arange(10, 60), "validation cells")
    rows = [int(name.removeprefix("cell")) for name in cells.obs_names]
    assert len(rows) == 20
    assert (rows[0], rows[-1]) == (10, 59)
    assert set(np.diff(rows)) <= {2, 3}
    assert view_cells(cells).words.startswith("20 of 50 validation cells, evenly chosen")
