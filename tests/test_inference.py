"""Embedding and annotation: the same for a cell wherever it comes from, and nothing else is touched."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scmodelforge.config import Config, DataConfig
from scmodelforge.errors import DataError, ModelError
from scmodelforge.inference import annotate, embed, open_for, tokens
from scmodelforge.inference_batches import token_batches
from scmodelforge.inference_files import annotate_file, embed_file
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.run import RunResult
from tests.helpers import make_vocab, marker_cells

KEY = "X_scmodelforge"


@pytest.fixture(scope="module")
def model(annotator: RunResult) -> ModelBundle:
    return annotator.model


@pytest.fixture(scope="module")
def expected(model: ModelBundle) -> np.ndarray:
    """Embeddings of 50 cells in one batch."""
    return embed(marker_cells(50, seed=7), model).obsm[KEY]


@pytest.fixture
def cells() -> ad.AnnData:
    return marker_cells(50, seed=7)


@pytest.fixture
def rich_file(cells: ad.AnnData, tmp_path: Path) -> Path:
    """An .h5ad file with something in every slot."""
    cells.raw = cells.copy()
    cells.layers["counts"] = cells.X.copy()
    cells.obsm["X_pca"] = np.arange(100.0).reshape(50, 2)
    cells.varm["loadings"] = np.ones((40, 2))
    cells.obsp["distances"] = sparse.random(50, 50, 0.1, "csr", random_state=0)
    cells.uns["palette"] = {"colors": np.array(["red", "blue"]), "deep": {"number": 3}}
    cells.obs["note"] = [f"free text {i}" for i in range(50)]
    cells.write_h5ad(tmp_path / "rich.h5ad", compression="gzip")
    return tmp_path / "rich.h5ad"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(path: Path) -> dict[str, Any]:
    """Every dataset and every attribute of a file, by name."""
    found: dict[str, Any] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found.update({f"{name}@{key}": np.asarray(value).tolist() for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype, item.compression, np.asarray(item[()]).tolist())

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


def without(all_of: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    return {name: value for name, value in all_of.items() if not name.startswith(prefixes)}


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_an_embedding_is_float32_and_tells_cells_apart(cells: ad.AnnData, expected: np.ndarray) -> None:
    assert expected.shape == (50, 16)
    assert expected.dtype == np.float32
    types = cells.obs["cell_type"].cat.codes.to_numpy()
    centres = np.stack([expected[types == code].mean(0) for code in range(3)])
    nearest = np.linalg.norm(expected[:, None] - centres, axis=2).argmin(1)
    assert (nearest == types).mean() > 0.9


@settings(max_examples=12, deadline=None)
@given(batch_size=st.integers(1, 64), order=st.permutations(range(50)))
def test_batch_size_and_order_do_not_matter(
    model: ModelBundle, expected: np.ndarray, batch_size: int, order: list[int]
) -> None:
    shuffled = marker_cells(50, seed=7)[order].copy()
    close(embed(shuffled, model, batch_size=batch_size).obsm[KEY], expected[order])


def test_other_cells_do_not_matter(model: ModelBundle, cells: ad.AnnData, expected: np.ndarray) -> None:
    close(embed(cells[13:14].copy(), model).obsm[KEY], expected[13:14])


def test_order_of_the_genes_does_not_matter(
    model: ModelBundle, cells: ad.AnnData, expected: np.ndarray
) -> None:
    close(embed(cells[:, ::-1].copy(), model).obsm[KEY], expected)


@pytest.mark.parametrize("storage", ["csr", "csc", "dense", "view", "int64", "layer", "raw"])
def test_the_same_however_the_counts_are_stored(
    model: ModelBundle, cells: ad.AnnData, expected: np.ndarray, tmp_path: Path, storage: str
) -> None:
    adata, config = cells, DataConfig()
    if storage == "csc":
        adata.X = adata.X.tocsc()
    elif storage == "dense":
        adata.X = adata.X.toarray()
    elif storage == "int64":
        adata.X = adata.X.astype(np.int64)
    elif storage == "view":
        adata = ad.concat([marker_cells(10), cells], keys=["a", "b"], index_unique="-")[10:]
    elif storage == "layer":
        adata.layers["counts"], config = adata.X.copy(), DataConfig(layer="counts")
        adata.X = adata.X.log1p()
    elif storage == "raw":
        adata.raw, config = adata.copy(), DataConfig(layer="raw")
        adata = adata[:, :3].copy()
    close(embed(adata, model, config=config, copy=True).obsm[KEY], expected)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", model, config=Config(data=config)) == 50
    close(ad.read_h5ad(tmp_path / "out.h5ad").obsm[KEY], expected)
    close(embed(ad.read_h5ad(tmp_path / "cells.h5ad"), model, config=config).obsm[KEY], expected)


def test_a_model_is_named_by_itself_its_folder_or_its_checkpoint(
    annotator: RunResult, cells: ad.AnnData, expected: np.ndarray
) -> None:
    for named in (annotator.run_dir / "model", str(annotator.checkpoint_dir / "best.ckpt")):
        np.testing.assert_array_equal(embed(cells, named, copy=True).obsm[KEY], expected)


@pytest.mark.parametrize("use", [embed, annotate])
def test_a_copy_leaves_the_input_untouched(
    use, model: ModelBundle, cells: ad.AnnData, tmp_path: Path
) -> None:
    cells.write_h5ad(tmp_path / "before.h5ad")
    result = use(cells, model, copy=True)
    cells.write_h5ad(tmp_path / "after.h5ad")
    assert contents(tmp_path / "after.h5ad") == contents(tmp_path / "before.h5ad")
    assert result is not cells
    assert use(cells, model) is cells, "without copy the input itself is changed and returned"


def test_keys_and_pooling_are_the_users(model: ModelBundle, cells: ad.AnnData, expected: np.ndarray) -> None:
    adata = embed(embed(cells, model, key_added="mine"), model, key_added="cls", pooling="cls")
    close(adata.obsm["mine"], expected)
    assert not np.allclose(adata.obsm["cls"], expected, atol=1e-3)


def test_scanpy_takes_it_from_there(model: ModelBundle, cells: ad.AnnData) -> None:
    embed(cells, model)
    sc.pp.neighbors(cells, n_neighbors=5, use_rep=KEY, method="gauss")  # umap's would compile first
    assert cells.obsp["connectivities"].shape == (50, 50)


def test_cells_without_known_genes_are_counted(
    model: ModelBundle, cells: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = cells.X.tolil()
    matrix[[3, 8]] = 0
    cells.X = matrix.tocsr()
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        embed(cells, model)
    assert "2 cells have no gene that the model knows: their embedding says nothing." in caplog.messages
    assert np.isfinite(cells.obsm[KEY]).all()


def test_data_that_do_not_fit_the_model_are_refused(model: ModelBundle, cells: ad.AnnData) -> None:
    logged = cells.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(DataError, match="raw counts"):
        embed(logged, model)
    cells.var_names = [f"nothing{i}" for i in range(40)]
    with pytest.raises(DataError, match=r"min_gene_overlap"):
        embed(cells, model)
    assert KEY not in cells.obsm


def test_embed_file_leaves_all_else_as_it_was(
    model: ModelBundle, rich_file: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    before, bytes_before = contents(rich_file), digest(rich_file)
    assert embed_file(rich_file, tmp_path / "new" / "copy.h5ad", model) == 50
    assert digest(rich_file) == bytes_before, "the source is only read"
    embed_file(rich_file, rich_file, model)
    for path in (tmp_path / "new" / "copy.h5ad", rich_file):
        close(ad.read_h5ad(path).obsm[KEY], expected)
        assert without(contents(path), f"obsm/{KEY}", "uns/scmodelforge") == before
    embed_file(rich_file, rich_file, model)  # a second time replaces the key
    close(ad.read_h5ad(rich_file).obsm[KEY], expected)
    assert {path.name for path in tmp_path.iterdir()} == {"rich.h5ad", "new"}, "nothing half-written remains"


def test_annotate_file_adds_two_columns_and_leaves_all_else(
    model: ModelBundle, rich_file: Path, cells: ad.AnnData, tmp_path: Path
) -> None:
    predictions = annotate_file(rich_file, tmp_path / "copy.h5ad", model)
    after = ad.read_h5ad(tmp_path / "copy.h5ad")
    columns = ["scmodelforge_cell_type", "scmodelforge_cell_type_probability"]
    pd.testing.assert_frame_equal(after.obs[columns], predictions)
    in_memory = annotate(marker_cells(50, seed=7), model).obs[columns]
    pd.testing.assert_frame_equal(in_memory, predictions)
    before = ad.read_h5ad(rich_file)
    pd.testing.assert_frame_equal(after.obs.drop(columns=columns), before.obs)
    assert without(contents(tmp_path / "copy.h5ad"), "obs/", "obs@") == without(
        contents(rich_file), "obs/", "obs@"
    )


def test_labels_come_from_a_finetuned_model_only(pretrained: RunResult, cells: ad.AnnData) -> None:
    with pytest.raises(
        ModelError, match=r"(?s)was not fine-tuned, so it knows no labels.*scmodelforge finetune"
    ):
        annotate(cells, pretrained.model)


def test_annotation_needs_no_label_column(model: ModelBundle, cells: ad.AnnData) -> None:
    truth = cells.obs.pop("cell_type").astype(str)
    found = annotate(cells, model).obs["scmodelforge_cell_type"].astype(str)
    assert (found == truth).mean() > 0.9


def test_a_failed_run_leaves_no_output(model: ModelBundle, cells: ad.AnnData, tmp_path: Path) -> None:
    cells.X.data[5] = -1
    cells.write_h5ad(tmp_path / "bad.h5ad")
    before = digest(tmp_path / "bad.h5ad")
    for output in ("out.h5ad", "bad.h5ad"):
        with pytest.raises(DataError, match=r"negative|raw counts"):
            embed_file(tmp_path / "bad.h5ad", tmp_path / output, model)
    assert digest(tmp_path / "bad.h5ad") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bad.h5ad"]


def test_tokens_show_what_a_cell_becomes(model: ModelBundle, cells: ad.AnnData) -> None:
    by_row, by_name = tokens(cells, 4, model=model), tokens(cells, "cell4", model=model)
    pd.testing.assert_frame_equal(by_row, by_name)
    assert by_row["name"][0] == "<cls>"
    assert by_row["scaled"].dropna().is_monotonic_decreasing
    assert len(by_row) == min(32, 1 + int((cells.X[4] > 0).sum()))
    with pytest.raises(DataError, match=r"(?si)no cell 'cell50'.*give a row from 0 to 49, or a name"):
        tokens(cells, "cell50", model=model)


def test_tokens_without_a_model_take_categories_from_the_data(
    cells: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    sections = {
        "data": {"gene_vocab": "from_data"},
        "tokenizer": {"strategy": "binned_expression", "obs_tokens": ["donor"]},
    }
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        table = tokens(cells, 1, config=Config.model_validate(sections))
    assert not caplog.messages, "medians are for ranks only"
    assert table["name"].tolist()[:2] == ["donor: d1", "<cls>"]
    assert table["bin"].iloc[2:].between(1, 50).all()
    sections["tokenizer"] = {"strategy": "rank_value"}
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        tokens(cells, 1, config=Config.model_validate(sections))
    assert "gene medians are unknown" in caplog.text
    sections["tokenizer"] = {"strategy": "continuous_projection", "obs_tokens": ["lane"]}
    with pytest.raises(DataError, match=r"no obs column 'lane', .*; there are: cell_type, donor"):
        tokens(cells, 1, config=Config.model_validate(sections))


def test_a_value_at_cls_does_not_make_a_cell_full(
    model: ModelBundle, cells: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    config = model.config.model_copy(
        update={"tokenizer": model.config.tokenizer.model_copy(update={"cls_value": 1.0})}
    )
    cells.X = sparse.csr_matrix(cells.X.toarray() * (np.arange(50) != 3)[:, None])
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        embed(cells, replace(model, config=config))
    assert "1 cells have no gene that the model knows: their embedding says nothing." in caplog.messages


def test_ties_spread_by_numpy_s_generator_go_cell_by_cell(cells: ad.AnnData) -> None:
    """As scGPT spreads them: one generator, so batches are made one after the other."""
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": "binned_expression", "bin_ties": "numpy"},
            "model": {"hidden_dim": 8, "num_layers": 1, "num_heads": 2},
        }
    )
    vocab = make_vocab(40)
    scgpt = ModelBundle(config, vocab, build_model(config, vocab, seed=0))
    tokenizer, store = build_tokenizer(config, vocab), open_for(scgpt, cells)
    np.random.seed(0)  # noqa: NPY002
    in_order = [tokenizer(store.read(np.arange(i, i + 2))) for i in range(0, 50, 2)]
    np.random.seed(0)  # noqa: NPY002
    batches = token_batches(scgpt, store, np.arange(50), batch_size=2)
    assert all(torch.equal(a.values, b.values) for a, b in zip(batches, in_order, strict=True))


def test_real_cells(model: ModelBundle, real_data: Path, tmp_path: Path) -> None:
    """A model of invented genes refuses real ones with the reason, and reads nothing for long."""
    with pytest.raises(DataError, match=r"pbmc3k\.h5ad.*of its counts are on genes of the vocabulary"):
        embed_file(real_data / "pbmc3k.h5ad", tmp_path / "out.h5ad", model)
    assert not (tmp_path / "out.h5ad").exists()
