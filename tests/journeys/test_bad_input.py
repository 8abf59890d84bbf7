"""What a stranger may give us: each mistake ends with exit code 2 and one message, and leaves nothing behind."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from anndata import AnnData

from tests.journeys.command import checkpoint, done, files_below, refused, sets

Spoil = Callable[[AnnData, Path], None]


# --- data files -----------------------------------------------------------------------------------


def _truncated(adata: AnnData, path: Path) -> None:
    adata.write_h5ad(path)
    path.write_bytes(path.read_bytes()[:-20_000])


def _other_hdf5(adata: AnnData, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["counts"] = [1, 2]


def _unknown_genes(adata: AnnData, path: Path) -> None:
    adata.var_names = [f"feature{number}" for number in range(adata.n_vars)]
    adata.write_h5ad(path)


def _log(adata: AnnData, path: Path) -> None:
    adata.X = adata.X.log1p()
    adata.write_h5ad(path)


def _log_with_counts(adata: AnnData, path: Path) -> None:
    adata.layers["counts"] = adata.X.copy()
    _log(adata, path)


def _value(value: float) -> Spoil:
    def spoil(adata: AnnData, path: Path) -> None:
        adata.X.data[0] = value
        adata.write_h5ad(path)

    return spoil


FILES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing": (lambda adata, path: None, ("does not exist",)),
    "text": (lambda adata, path: path.write_text("hello") and None, ("is not an .h5ad file",)),
    "nothing": (lambda adata, path: path.touch(), ("is not an .h5ad file",)),
    "folder": (lambda adata, path: path.mkdir(), ("is a folder",)),
    "other_hdf5": (_other_hdf5, ("no AnnData", "it has no 'obs'")),
    "truncated": (_truncated, ("truncated or damaged", "Copy or download it again")),
    "no_cells": (lambda adata, path: adata[:0].copy().write_h5ad(path), ("has no cells",)),
    "no_genes": (lambda adata, path: adata[:, :0].copy().write_h5ad(path), ("has no genes",)),
    "unknown_genes": (
        _unknown_genes,
        ("only 0.0% of its counts", "'feature0'", "neither Ensembl ids nor symbols"),
    ),
    "log": (_log, ("X does not hold raw counts, but", "layer")),
    "log_with_counts": (_log_with_counts, ("Raw counts are in the same file: set data.layer: counts",)),
    "negative": (_value(-1), ("negative whole numbers", "-1 in cell", "Mend or remove")),
    "nan": (_value(np.nan), ("not finite", "nan in cell", "Mend or remove")),
    "infinite": (_value(np.inf), ("not finite", "inf in cell")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_by_every_command(
    name: str, adata: AnnData, config: Path, trained: Path, tmp_path: Path
) -> None:
    spoil, words = FILES[name]
    path, out = tmp_path / f"{name}.h5ad", tmp_path / "out"
    spoil(adata, path)
    before = files_below(tmp_path)
    words = (str(path), *words)
    vocab = "human_protein_coding" if name == "unknown_genes" else "from_data"
    best = ("--model", checkpoint(trained))
    refused(
        *("train", "--config", config),
        *sets(data__paths=f"[{path}]", data__gene_vocab=vocab, training__run_dir=out),
        words=words,
    )
    refused("embed", *best, "--data", path, "--output", out / "e.h5ad", words=words)
    refused("benchmark", *best, "--data", path, "--output", out / "r.json", words=words)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", ["text", "truncated", "no_cells"])
def test_a_bad_file_cannot_be_checked(name: str, adata: AnnData, tmp_path: Path) -> None:
    spoil, words = FILES[name]
    path = tmp_path / f"{name}.h5ad"
    spoil(adata, path)
    refused("check", path, words=(str(path), *words))
    refused("tokens", path, words=(str(path), *words))
    refused("init", path, "--output", tmp_path / "c.yaml", words=(str(path), *words))
    assert not (tmp_path / "c.yaml").exists()


def test_human_symbols_where_the_vocabulary_is_mouse(cells: Path, config: Path, tmp_path: Path) -> None:
    refused(
        *("train", "--config", config),
        *sets(data__gene_vocab="mouse_protein_coding", training__run_dir=tmp_path),
        words=(str(cells), "The genes look like human", "set data.gene_vocab: human_protein_coding"),
    )
    assert files_below(tmp_path) == []


def test_a_file_of_little_overlap_is_said(adata: AnnData, trained: Path, tmp_path: Path) -> None:
    total = np.asarray(adata.X.sum(axis=0)).ravel()
    order = np.argsort(-total)
    n_hidden = int((np.cumsum(total[order]) < 0.6 * total.sum()).sum()) + 1
    names = adata.var_names.to_numpy().copy()
    names[order[:n_hidden]] = [f"feature{number}" for number in range(n_hidden)]
    adata.var_names = names
    share = total[order[n_hidden:]].sum() / total.sum()
    adata.write_h5ad(tmp_path / "few.h5ad")
    best = checkpoint(trained)
    answer = done("embed", "--model", best, "--data", tmp_path / "few.h5ad", "--output", tmp_path / "e.h5ad")
    assert f"Warning: '{tmp_path / 'few.h5ad'}': only {share:.1%} of the counts" in answer.err


# --- labels ---------------------------------------------------------------------------------------

LABELS = {
    "celltype": ("has no obs column 'celltype'. Did you mean 'cell_type'?",),
    "gaps": ("3 of 120 cells", "no label in obs['gaps']", "drop_unlabelled: true"),
    "same": ("only one class ('T', 120 cells)",),
    "lonely": ("fewer than 2 cells: 'rare' (1)", "merge them"),
}


@pytest.mark.parametrize("key", LABELS)
def test_bad_labels_are_refused_before_anything_is_embedded(
    key: str, adata: AnnData, config: Path, trained: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "labels.h5ad", tmp_path / "out"
    label = adata.obs["cell_type"].astype(str).to_numpy()
    number = np.arange(adata.n_obs)
    adata.obs["gaps"] = np.where(number < 3, None, label)
    adata.obs["same"] = "T"
    adata.obs["lonely"] = np.where(number < 1, "rare", label)
    adata.write_h5ad(path)
    best = checkpoint(trained)
    words = (str(path), *LABELS[key])
    refused(
        *("benchmark", "--config", config, "--model", best, "--data", path, "--output", out / "r.json"),
        *sets(eval__benchmarks__0__params__cell_type_key=key),
        words=words,
    )
    refused(
        *("finetune", "--config", config, "--checkpoint", best),
        *sets(data__paths=f"[{path}]", finetune__label_key=key, training__run_dir=out),
        words=words,
    )
    assert files_below(tmp_path) == ["labels.h5ad"]


def test_unlabelled_cells_are_left_out_when_asked_and_said_once(
    adata: AnnData, config: Path, trained: Path, tmp_path: Path
) -> None:
    label = adata.obs["cell_type"].astype(str).to_numpy()
    adata.obs["cell_type"] = np.where(np.arange(adata.n_obs) < 3, None, label)
    adata.write_h5ad(tmp_path / "gaps.h5ad")
    answer = done(
        *("benchmark", "--config", config, "--model", checkpoint(trained), "--data", tmp_path / "gaps.h5ad"),
        *sets(eval__benchmarks__0__params__drop_unlabelled="true"),
    )
    assert answer.err.count("3 of 120 cells without a label") == 1


# --- models ---------------------------------------------------------------------------------------


class Villain:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_a_pickle_is_never_run(cells: Path, config: Path, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "villain.ckpt"
    for bare in (True, False):
        if bare:
            path.write_bytes(pickle.dumps(Villain(trace)))
        else:
            torch.save({"scmodelforge": Villain(trace)}, path)
        words = (str(path), "they could run code")
        refused("embed", "--model", path, "--data", cells, "--output", tmp_path / "e.h5ad", words=words)
        refused("finetune", "--config", config, "--checkpoint", path, words=words)
        refused("train", "--config", config, "--resume", path, words=words)
    assert files_below(tmp_path) == ["villain.ckpt"]


def _edit(change: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    def spoil(source: Path, target: Path) -> None:
        content = torch.load(source, weights_only=True)
        change(content)
        torch.save(content, target)

    return spoil


CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "missing": (lambda source, target: None, ("does not exist",)),
    "empty": (lambda source, target: target.touch(), ("cannot be read", "0 bytes")),
    "truncated": (
        lambda source, target: target.write_bytes(source.read_bytes()[:50_000]),
        ("damaged or was cut off", "50,000 bytes"),
    ),
    "text": (lambda source, target: target.write_text("hello"), ("not a checkpoint of scModelForge",)),
    "foreign": (lambda source, target: torch.save({"a": 1}, target), ("not written by scModelForge",)),
    "other_architecture": (
        _edit(lambda c: c["scmodelforge"]["config"]["model"].update(architecture="autoregressive")),
        ("the model architecture 'autoregressive' does not exist in this version", "transformer_encoder"),
    ),
    "other_shape": (
        _edit(lambda c: c["scmodelforge"]["config"]["model"].update(hidden_dim=32)),
        ("do not fit the architecture that its config describes", "shape (769, 16) in the file"),
    ),
    "no_weights": (_edit(lambda c: c.pop("state_dict")), ("it has no state_dict",)),
}


@pytest.mark.parametrize(
    "name",
    list(CHECKPOINTS),
)
def test_a_bad_checkpoint_is_refused(
    name: str, trained: Path, config: Path, cells: Path, tmp_path: Path
) -> None:
    spoil, words = CHECKPOINTS[name]
    path, out = tmp_path / f"{name}.ckpt", tmp_path / "out"
    spoil(checkpoint(trained), path)
    before = files_below(tmp_path)
    words = (str(path), *words)
    refused("embed", "--model", path, "--data", cells, "--output", out / "e.h5ad", words=words)
    refused("annotate", "--model", path, "--data", cells, "--output", out / "e.h5ad", words=words)
    refused(
        *("finetune", "--config", config, "--checkpoint", path, *sets(training__run_dir=out)), words=words
    )
    assert files_below(tmp_path) == before


def test_a_bad_model_folder_is_refused(trained: Path, cells: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    embed = ("embed", "--model", model, "--data", cells, "--output", tmp_path / "e.h5ad")
    refused(*embed, words=(str(weights), "is damaged"))
    weights.unlink()
    refused(*embed, words=(str(model), "it has no model.safetensors"))
    assert not (tmp_path / "e.h5ad").exists()


def test_a_model_without_labels_cannot_annotate(trained: Path, cells: Path, tmp_path: Path) -> None:
    annotate = ("annotate", "--model", checkpoint(trained), "--data", cells, "--output", tmp_path / "a.h5ad")
    refused(*annotate, words=("was not fine-tuned", "scmodelforge finetune"))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokenizer.max_genes=32", ("tokenizer.max_genes: 32 in the config, 48 in the run",)),
        ("training.batch_size=8", ("training.batch_size: 8 in the config, 64 in the run",)),
        ("training.seed=3", ("training.seed: 3 in the config, 42 in the run",)),
        ("data.paths=[{other}]", ("not the same ones", "data.paths")),
    ],
)
def test_a_run_does_not_go_on_as_something_else(
    override: str, words: tuple[str, ...], trained: Path, config: Path, adata: AnnData, tmp_path: Path
) -> None:
    other = tmp_path / "other.h5ad"
    adata.write_h5ad(other)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    last = trained / "checkpoints" / "last.ckpt"
    refused(
        *("train", "--config", config, "--resume", last, "--set", override.format(other=other)),
        words=(str(last), *words),
    )
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_train_does_not_resume_a_fine_tuned_model(tuned: Path, config: Path) -> None:
    refused(
        "train",
        "--config",
        config,
        "--resume",
        checkpoint(tuned),
        words=("is of a fine-tuning run", "scmodelforge finetune"),
    )


def test_finetune_does_not_resume_a_pretrained_model(trained: Path, config: Path, tmp_path: Path) -> None:
    refused(
        *("finetune", "--config", config, "--checkpoint", checkpoint(trained)),
        *("--resume", checkpoint(trained), *sets(training__run_dir=tmp_path)),
        words=(str(checkpoint(trained)), "is of a pretraining run", "scmodelforge train"),
    )


def test_a_refused_run_leaves_the_run_before_it_alone(
    trained: Path, config: Path, adata: AnnData, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = files_below(run)
    _log(adata, tmp_path / "log.h5ad")
    refused(
        *("train", "--config", config),
        *sets(data__paths=f"[{tmp_path / 'log.h5ad'}]", training__run_dir=run),
        words=("does not hold raw counts",),
    )
    assert files_below(run) == before


# --- where to write -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file.txt", "file.txt/below"])
def test_an_output_folder_that_is_a_file(
    place: str, trained: Path, tuned: Path, cells: Path, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("precious")
    folder = tmp_path / place
    words = (f"Cannot write into the folder '{folder}': '{tmp_path / 'file.txt'}' is a file",)
    best, data = ("--model", checkpoint(trained)), ("--data", cells)
    refused("embed", *best, *data, "--output", folder / "e.h5ad", words=words)
    refused("annotate", "--model", checkpoint(tuned), *data, "--output", folder / "a.h5ad", words=words)
    refused("benchmark", "--config", config, *best, *data, "--output", folder / "r.json", words=words)
    refused("init", cells, "--output", folder / "c.yaml", words=words)
    refused("train", "--config", config, *sets(training__run_dir=folder), words=words)
    tune = ("finetune", "--config", config, "--checkpoint", checkpoint(trained))
    refused(*tune, *sets(training__run_dir=folder), words=words)
    assert files_below(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "precious"


def test_an_output_file_that_is_a_folder(
    trained: Path, tuned: Path, cells: Path, config: Path, tmp_path: Path
) -> None:
    words = (f"'{tmp_path}' is a folder",)
    best, data = ("--model", checkpoint(trained)), ("--data", cells, "--output", tmp_path)
    refused("embed", *best, *data, words=words)
    refused("annotate", "--model", checkpoint(tuned), *data, words=words)
    refused("benchmark", "--config", config, *best, *data, words=words)
    assert files_below(tmp_path) == []


def test_where_to_write_must_be_said_once(trained: Path, cells: Path, tmp_path: Path) -> None:
    embed = ("embed", "--model", checkpoint(trained), "--data", cells)
    words = ("either --output FILE.h5ad or --in-place",)
    refused(*embed, words=words)
    refused(*embed, "--in-place", "--output", tmp_path / "e.h5ad", words=words)
    output = ("--output", tmp_path / "e.h5ad")
    refused(*embed, *output, "--key", "a/b", words=("The key 'a/b' holds a '/'",))
    refused(*embed, *output, "--pooling", "max", words=("--pooling is 'max'", "mean, cls or window"))
    refused(*embed, *output, "--precision", "16", words=("precision is '16'", "32, bf16 or bf16-true"))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["cells.h5ad", "same/../cells.h5ad", "link.h5ad"])
def test_the_input_is_not_overwritten_in_silence(
    name: str, trained: Path, tuned: Path, adata: AnnData, tmp_path: Path
) -> None:
    path, output = tmp_path / "cells.h5ad", tmp_path / name
    adata.write_h5ad(path)
    (tmp_path / "same").mkdir()
    (tmp_path / "link.h5ad").symlink_to(path)
    before, words = path.read_bytes(), (f"--output '{output}' is the input file itself", "--in-place")
    refused("embed", "--model", trained / "model", "--data", path, "--output", output, words=words)
    refused("annotate", "--model", tuned / "model", "--data", path, "--output", output, words=words)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["e.csv", "annot.txt", "bare"])
def test_an_output_that_is_no_h5ad_file(
    name: str, trained: Path, tuned: Path, cells: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "new" / name, ("The output is an .h5ad file", name, f"{Path(name).stem}.h5ad")
    refused("embed", "--model", trained / "model", "--data", cells, "--output", output, words=words)
    refused("annotate", "--model", tuned / "model", "--data", cells, "--output", output, words=words)
    refused("genes", "--model", trained / "model", "--output", output, words=words)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_gets_a_next_step(cells: Path, tmp_path: Path) -> None:
    embed = ("embed", "--model", tmp_path / "nomodel", "--data", cells, "--output", tmp_path / "e.h5ad")
    words = (f"The checkpoint or model folder '{tmp_path / 'nomodel'}' does not exist", "scmodelforge train")
    refused(*embed, words=(*words, "RUN/model", "best.ckpt"))


def test_no_unlike_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "neg.h5ad").touch()
    assert "Did you mean" not in refused("check", tmp_path / "nothere.h5ad", words=("does not exist",))
    refused("check", tmp_path / "negs.h5ad", words=(f"Did you mean '{tmp_path / 'neg.h5ad'}'?",))


def test_init_overwrites_nothing(cells: Path, config: Path) -> None:
    before = config.read_text()
    refused("init", cells, "--output", config, words=(str(config), "exists already"))
    assert config.read_text() == before


# --- configs --------------------------------------------------------------------------------------

YAML = {
    "tab": ("data:\n\tpaths: [a.h5ad]\n", ("bad.yaml:2", "a tab; YAML is indented with spaces")),
    "duplicate": (
        "training:\n  seed: 1\n  seed: 2\n",
        ("bad.yaml:3", "training.seed: is written twice, first in line 2"),
    ),
    "unknown": ("trainig: {seed: 1}\n", ("bad.yaml:1", "trainig: is unknown; did you mean training?")),
    "impossible": (
        "model: {hidden_dim: 10, num_heads: 3}\ntokenizer: {masking: {mask_ratio: 1.2}}\n",
        (
            "2 problems",
            "bad.yaml:1",
            "divisible by num_heads (3)",
            "bad.yaml:2",
            "must be less than 1, not 1.2",
        ),
    ),
    "unknown strategy": (
        "tokenizer: {strategy: rank_values}\n",
        ("does not exist", "Did you mean 'rank_value'"),
    ),
    "what does not fit together": (
        "tokenizer: {strategy: binned_expression}\nmodel: {architecture: masked_autoencoder}\n",
        ("do not fit together", "Nearest that works", "expression_reconstruction"),
    ),
    "empty": ("", ("the file is empty",)),
}


@pytest.mark.parametrize("name", YAML)
def test_a_bad_config_is_refused(name: str, trained: Path, cells: Path, tmp_path: Path) -> None:
    text, words = YAML[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    best = ("--model", checkpoint(trained), "--data", cells)
    text = refused("benchmark", "--config", path, *best, "--output", tmp_path / "r.json", words=words)
    assert refused("embed", "--config", path, *best, "--output", tmp_path / "e.h5ad", words=words) == text
    assert refused("check", cells, "--config", path, words=words) == text
    assert files_below(tmp_path) == ["bad.yaml"]


def test_a_config_is_needed(trained: Path, tmp_path: Path) -> None:
    words = ("needs a config: --config FILE", "scmodelforge init")
    refused("train", words=("'train'", *words))
    refused("finetune", "--checkpoint", checkpoint(trained), words=("'finetune'", *words))
    missing = tmp_path / "no.yaml"
    refused("train", "--config", missing, words=(f"The config file '{missing}' does not exist",))


def test_an_unknown_key_on_the_command_line(config: Path, trained: Path, cells: Path, tmp_path: Path) -> None:
    best = ("--model", checkpoint(trained), "--data", cells)
    wrong = ("--set", "training.max_epoch=3")
    for command in (
        ("train", "--config", config),
        ("finetune", "--config", config, "--checkpoint", checkpoint(trained)),
        ("benchmark", *best),
        ("embed", *best, "--output", tmp_path / "e.h5ad"),
        ("annotate", *best, "--output", tmp_path / "e.h5ad"),
        ("check", cells),
        ("tokens", cells),
    ):
        refused(
            *command, *wrong, words=("training.max_epoch: is unknown; did you mean training.max_epochs?",)
        )
    refused("check", cells, "--set", "data.layer", words=("expected KEY=VALUE",))


@pytest.mark.parametrize("cell", ["700", "-1", "nobody"])
def test_tokens_of_a_cell_that_is_not_there(cell: str, cells: Path, trained: Path) -> None:
    refused(
        *("tokens", cells, "--cell", cell, "--model", checkpoint(trained)),
        words=(f"has no cell '{cell}'", "from 0 to 699", str(cells)),
    )


def test_a_layer_that_is_not_there(cells: Path) -> None:
    refused(
        "check",
        cells,
        *sets(data__layer="counts"),
        words=(str(cells), "has no layer 'counts'", "There is: X"),
    )
