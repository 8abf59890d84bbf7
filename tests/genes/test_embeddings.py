"""Given gene vectors: every layout of the file, what is missing in it, and that they stay what they are."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from scmodelforge.config_io import load_config
from scmodelforge.errors import ConfigError, DataError, ModelError
from scmodelforge.evaluation.harness import benchmark
from scmodelforge.finetuning.run import finetune
from scmodelforge.genes.embeddings import read_gene_embeddings
from scmodelforge.models.bundle import load_model
from scmodelforge.training.run import RunResult, train
from tests.helpers import finetune_config, make_vocab, marker_cells, tiny_config

WIDTH, N_GENES = 5, 12
VOCAB = make_vocab(N_GENES)
FIRST = VOCAB.first_gene_token
VECTORS = np.random.default_rng(0).normal(size=(N_GENES, WIDTH)).astype(np.float32)


def write(path: Path, ids: list[str], vectors: np.ndarray, layout: str) -> Path:
    """A file in one of the layouts."""
    if layout == "npz matrix":
        np.savez(path := path.with_suffix(".npz"), gene_ids=np.array(ids), embeddings=vectors)
    elif layout == "npz genes":
        np.savez(path := path.with_suffix(".npz"), **dict(zip(ids, vectors, strict=True)))
    elif layout == "safetensors matrix":
        path = path.with_suffix(".safetensors")
        save_file({"embeddings": vectors}, path, metadata={"gene_ids": json.dumps(ids)})
    elif layout == "safetensors genes":
        save_file(dict(zip(ids, vectors.copy(), strict=True)), path := path.with_suffix(".safetensors"))
    else:
        with h5py.File(path := path.with_suffix(".h5"), "w") as file:
            if layout == "h5 matrix":
                file["gene_ids"], file["embeddings"] = ids, vectors
            elif layout == "h5 genes":
                for name, vector in zip(ids, vectors, strict=True):
                    file[name] = vector
            else:
                file["keys"] = ids
                for name, vector in zip(ids, vectors, strict=True):
                    file[f"arrays/{name}"] = vector
    return path


LAYOUTS = [f"{ending} {kind}" for ending in ("npz", "safetensors", "h5") for kind in ("matrix", "genes")]


@pytest.mark.parametrize("layout", [*LAYOUTS, "transcriptformer"])
@pytest.mark.parametrize("names", ["ids", "versions", "symbols"])
def test_every_layout_gives_each_gene_its_vector(layout: str, names: str, tmp_path: Path) -> None:
    genes = VOCAB.symbols if names == "symbols" else VOCAB.gene_ids
    ids = [f"{gene}.7" if names == "versions" else str(gene) for gene in genes]
    order = np.random.default_rng(1).permutation(N_GENES)
    path = write(tmp_path / "genes", [ids[i] for i in order], VECTORS[order], layout)
    vectors, known = read_gene_embeddings(path, VOCAB)
    assert known.all()
    assert vectors.dtype == np.float32
    assert vectors.shape == (VOCAB.n_tokens, WIDTH)
    np.testing.assert_array_equal(vectors[FIRST:], VECTORS)


def test_genes_without_a_vector_are_near_the_mean_told_apart_and_counted(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    ids = [*VOCAB.gene_ids[:9], "ENSG99999999999"]
    path = write(tmp_path / "genes", ids, VECTORS[:10], "npz matrix")
    vectors, known = read_gene_embeddings(path, VOCAB)
    assert known.tolist() == [True] * 9 + [False] * 3
    missing, spread = vectors[FIRST + 9 :], VECTORS[:9].std(axis=0)
    assert (np.abs(missing - VECTORS[:9].mean(axis=0)) < 0.5 * spread).all()
    assert len(np.unique(missing, axis=0)) == 3
    assert (np.abs(vectors[:FIRST]) < 0.5 * spread).all()
    assert len(np.unique(vectors[:FIRST], axis=0)) == FIRST
    np.testing.assert_array_equal(vectors, read_gene_embeddings(path, VOCAB)[0])
    assert "no vector for 3 of 12 genes (ENSG00000000009, " in caplog.text
    assert "1 of its genes are not in the vocabulary" in caplog.text


def test_the_first_row_of_a_gene_counts(tmp_path: Path, caplog) -> None:
    ids = [*VOCAB.gene_ids, f"{VOCAB.gene_ids[3]}.2"]
    path = write(tmp_path / "genes", ids, np.concatenate([VECTORS, VECTORS[:1]]), "npz matrix")
    np.testing.assert_array_equal(read_gene_embeddings(path, VOCAB)[0][FIRST:], VECTORS)
    assert "1 more rows of genes that it has already" in caplog.text


def test_half_precision_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_tensors

    tensors = {str(g): torch.from_numpy(v).bfloat16() for g, v in zip(VOCAB.gene_ids, VECTORS, strict=True)}
    save_tensors(tensors, tmp_path / "genes.safetensors")
    np.testing.assert_allclose(
        read_gene_embeddings(tmp_path / "genes.safetensors", VOCAB)[0][FIRST:], VECTORS, rtol=0.01
    )


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    ids = [str(gene) for gene in VOCAB.gene_ids]

    def refused(path: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_gene_embeddings(path, VOCAB)

    refused(tmp_path / "none.npz", "there is no file")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", r"does not end in .safetensors, .npz, .h5")
    for ending in ("npz", "h5", "safetensors"):
        (tmp_path / f"broken.{ending}").write_bytes(b"nothing of the kind")
        refused(tmp_path / f"broken.{ending}", "cannot be read")
    strange = [f"ENSG9999999{i:04d}" for i in range(N_GENES)]
    refused(write(tmp_path / "strange", strange, VECTORS, "npz matrix"), "none of the 12 genes")
    refused(write(tmp_path / "flat", ids, VECTORS[:, 0], "npz matrix"), r"shape \(12,\)")
    refused(write(tmp_path / "short", ids, VECTORS[:5], "h5 matrix"), r"shape \(5, 5\)")
    refused(write(tmp_path / "deep", ids, VECTORS[:, None], "h5 genes"), r"shape \(1, 5\)")
    unfinished = VECTORS.copy()
    unfinished[4, 2] = np.nan
    refused(write(tmp_path / "nan", ids, unfinished, "npz genes"), "1 genes.*ENSG00000000004")
    np.savez(tmp_path / "ragged.npz", **{ids[0]: VECTORS[0], ids[1]: VECTORS[1, :3]})
    refused(tmp_path / "ragged.npz", f"{ids[1]}.*shape")
    np.savez(tmp_path / "text.npz", **{ids[0]: np.array(["a", "b"])})
    refused(tmp_path / "text.npz", "numbers are needed")
    np.savez(tmp_path / "objects.npz", gene_ids=np.array(ids, dtype=object), embeddings=VECTORS)
    refused(tmp_path / "objects.npz", "Python objects")
    np.savez(tmp_path / "no_ids.npz", embeddings=VECTORS)
    refused(tmp_path / "no_ids.npz", "both 'embeddings' and 'gene_ids'")


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vectors = np.random.default_rng(2).normal(size=(40, WIDTH)).astype(np.float32)
    ids = [f"ENSG{i:011d}" for i in range(40)]
    return write(tmp_path_factory.mktemp("vectors") / "genes", ids, vectors, "npz matrix")


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = tiny_config(tmp_path_factory.mktemp("run"), model={"gene_embeddings": str(file)})
    return train(config, data=marker_cells())


def given(path: Path) -> torch.Tensor:
    return load_model(path).model.embedding.tokens.vectors.weight


def test_a_run_keeps_the_vectors_and_its_model_needs_no_file(run: RunResult, file: Path, tmp_path) -> None:
    vectors, _ = read_gene_embeddings(file, run.model.vocab)
    assert torch.equal(given(run.run_dir / "model"), torch.from_numpy(vectors))
    assert load_config(run.run_dir / "config.yaml").model.gene_embedding_dim == WIDTH
    moved = file.with_name("moved.npz")
    file.rename(moved)
    try:
        assert load_model(run.run_dir / "model").config.model.gene_embedding_dim == WIDTH
        assert load_model(run.checkpoint_dir / "best.ckpt").model.hidden_dim == 16
    finally:
        moved.rename(file)


def test_frozen_vectors_stay_frozen_through_fine_tuning(run: RunResult, tmp_path: Path) -> None:
    before = given(run.run_dir / "model")
    for name, lora in (("full", False), ("lora", True)):
        if lora:
            pytest.importorskip("peft")
        tuned = finetune(
            finetune_config(tmp_path / name, lora={"enabled": lora}),
            run.checkpoint_dir / "best.ckpt",
            data=marker_cells(),
        )
        assert torch.equal(given(tuned.run_dir / "model"), before)
    model = load_model(run.run_dir / "model").model.requires_grad_(False).requires_grad_(True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["embedding.tokens.vectors.weight"]


def test_vectors_train_if_asked(file: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model={"gene_embeddings": str(file), "train_gene_embeddings": True})
    result = train(config, data=marker_cells())
    vectors, _ = read_gene_embeddings(file, result.model.vocab)
    assert not torch.equal(given(result.run_dir / "model"), torch.from_numpy(vectors))


def test_a_run_resumes_with_and_without_the_width_in_the_config(run: RunResult, file: Path, tmp_path) -> None:
    for width in (None, WIDTH):
        last = shutil.copy(run.checkpoint_dir / "last.ckpt", tmp_path / f"{width}.ckpt")
        model = {"gene_embeddings": str(file), "gene_embedding_dim": width}
        config = tiny_config(tmp_path / str(width), model=model, training={"max_epochs": 3})
        resumed = train(config, resume=last, data=marker_cells())
        assert torch.equal(given(resumed.run_dir / "model"), given(run.run_dir / "model"))
    other = tiny_config(tmp_path / "other", model={"gene_embeddings": str(file), "gene_embedding_dim": 6})
    with pytest.raises(ModelError, match="gene_embedding_dim: 6 in the config, 5 in the run"):
        train(other, resume=last, data=marker_cells())


def test_the_training_config_can_be_used_again_with_the_model(run: RunResult, file: Path, tmp_path) -> None:
    config = tiny_config(tmp_path, model={"gene_embeddings": str(file), "gene_embedding_dim": None})
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"baselines": ["untrained"]})})
    tuned = finetune(config, run.checkpoint_dir / "best.ckpt", data=marker_cells())
    assert tuned.model.config.model.gene_embedding_dim == WIDTH
    results = benchmark(config, run.run_dir / "model", marker_cells())
    assert [result.method for result in results] == ["model", "untrained"]


def test_a_width_without_a_file_or_other_than_its_own_is_refused(file: Path, tmp_path: Path) -> None:
    wrong = {"gene_embeddings": str(file), "gene_embedding_dim": 9}
    with pytest.raises(ConfigError, match=r"is 9, but the vectors .* have 5 numbers"):
        train(tiny_config(tmp_path, model=wrong), data=marker_cells())
    with pytest.raises(ConfigError, match="names no file"):
        train(tiny_config(tmp_path, model={"gene_embedding_dim": 9}), data=marker_cells())


def test_a_missing_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "cells.h5ad").touch()
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{paths: [{tmp_path}/cells.h5ad]}}\nmodel:\n  gene_embeddings: none.npz\n")
    with pytest.raises(
        ConfigError, match=r"c\.yaml:3: model\.gene_embeddings: there is no file 'none\.npz'$"
    ):
        load_config(path, require_data=True)
    assert load_config(path).model.gene_embeddings == "none.npz"
