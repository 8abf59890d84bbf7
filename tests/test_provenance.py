"""An embedding says where it came from, in memory and in files, and scanpy takes it."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc

import scmodelforge
from scmodelforge.inference import embed
from scmodelforge.inference_files import embed_file
from scmodelforge.inference_many import embed_files
from scmodelforge.models.bundle import ModelBundle, load_model
from scmodelforge.training.run import RunResult
from tests.helpers import marker_cells, untrained_annotator

KEY = "X_scmodelforge"


def test_provenance_names_the_model_and_survives_a_file(pretrained: RunResult, tmp_path: Path) -> None:
    folder = pretrained.run_dir / "model"
    cells = marker_cells(20)
    cells.var_names = [*cells.var_names[:30], *(f"unknown{i}" for i in range(10))]
    embed(cells, folder)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for read in (cells, ad.read_h5ad(tmp_path / "cells.h5ad")):
        assert read.uns["scmodelforge"][KEY] == {
            "model": str(folder),
            "model_sha256": pretrained.model.sha256(),
            "version": scmodelforge.__version__,
            "vocabulary_sha256": pretrained.model.vocab.fingerprint,
            "pooling": "mean",
            "precision": "32",
            "genes_matched": 0.75,
            "vocabulary_measured": 0.75,
        }


def test_files_carry_the_same_provenance(pretrained: RunResult, tmp_path: Path) -> None:
    folder = pretrained.run_dir / "model"
    cells = marker_cells(20)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    expected = embed(cells, folder, copy=True).uns["scmodelforge"]
    embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", folder)
    embed_files([tmp_path / "cells.h5ad"], tmp_path / "many", folder)
    for path in (tmp_path / "out.h5ad", tmp_path / "many" / "cells.h5ad"):
        assert ad.read_h5ad(path).uns["scmodelforge"] == expected
    embed_file(tmp_path / "out.h5ad", tmp_path / "out.h5ad", folder, key_added="X_cls", pooling="cls")
    both = ad.read_h5ad(tmp_path / "out.h5ad").uns["scmodelforge"]
    assert both.pop("X_cls")["pooling"] == "cls"
    assert both == expected


def test_provenance_is_of_this_embedding_alone(pretrained: RunResult) -> None:
    cells = marker_cells(20)
    cells.uns["mine"] = "kept"
    copy = embed(cells, pretrained.run_dir / "model", copy=True)
    assert "scmodelforge" not in cells.uns
    other = untrained_annotator()
    embed(copy, other, key_added="X_other")
    records = copy.uns["scmodelforge"]
    assert copy.uns["mine"] == "kept"
    assert set(records) == {KEY, "X_other"}
    assert records["X_other"]["model"] == "in memory"
    assert records["X_other"]["model_sha256"] != records[KEY]["model_sha256"]


def test_the_sha256_follows_the_weights(pretrained: RunResult) -> None:
    checkpoint, folder = pretrained.checkpoint_dir / "best.ckpt", pretrained.run_dir / "model"
    assert load_model(checkpoint).sha256() == load_model(folder).sha256()
    changed = load_model(folder)
    next(changed.model.parameters()).data[0, 0] += 1
    assert changed.sha256() != load_model(folder).sha256()
    assert isinstance(changed, ModelBundle)


def test_scanpy_goes_on_from_an_embedding(annotator: RunResult) -> None:
    cells = embed(marker_cells(60, seed=7), annotator.model)
    sc.pp.neighbors(cells, use_rep=KEY, n_neighbors=8)
    assert cells.uns["neighbors"]["params"]["use_rep"] == KEY
    linked = cells.obsp["connectivities"].tocoo()
    types = cells.obs["cell_type"].cat.codes.to_numpy()
    assert np.average(types[linked.row] == types[linked.col], weights=linked.data) > 0.8
