"""Model folders and checkpoints: they give the same model, or say what is wrong with them."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scmodelforge.config_io import load_config
from scmodelforge.errors import ModelError, UserError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.bundle import (
    FORMAT_VERSION,
    ModelBundle,
    load_model,
    read_checkpoint,
    save_bundle,
    with_model_of,
)
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.run import RunResult
from tests.helpers import make_cells, marker_cells, tiny_config

COUNTS = marker_cells(12, seed=5).X.toarray()


@pytest.fixture
def folder(annotator: RunResult, tmp_path: Path) -> Path:
    """A copy of a fine-tuned model folder, to be damaged."""
    return Path(shutil.copytree(annotator.run_dir / "model", tmp_path / "model"))


@pytest.fixture
def checkpoint(annotator: RunResult, tmp_path: Path) -> Path:
    """A copy of a fine-tuned checkpoint, to be damaged."""
    return Path(shutil.copyfile(annotator.checkpoint_dir / "best.ckpt", tmp_path / "best.ckpt"))


def outputs(bundle: ModelBundle) -> torch.Tensor:
    with torch.no_grad():
        return bundle.head(
            bundle.model.encode(build_tokenizer(bundle.config, bundle.vocab)(make_cells(COUNTS)))
        )


def rewrite(checkpoint: Path, **changes: object) -> Path:
    """Change top-level entries of what a checkpoint says about its model."""
    content = torch.load(checkpoint, weights_only=True)
    content["scmodelforge"] |= changes
    torch.save(content, checkpoint)
    return checkpoint


def message(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert str(path) in str(error.value), "the message names the file"
    return str(error.value)


def test_checkpoint_folder_and_round_trip_give_the_same_model(annotator: RunResult, tmp_path: Path) -> None:
    first = load_model(annotator.checkpoint_dir / "best.ckpt")
    second = load_model(save_bundle(first, tmp_path / "deep" / "folder"))
    assert torch.equal(outputs(first), outputs(second))
    assert torch.equal(outputs(first), outputs(annotator.model))
    assert second.config == first.config
    assert second.labels == first.labels
    assert second.vocab.fingerprint == first.vocab.fingerprint
    assert not second.model.training
    assert not second.head.training


def test_a_folder_holds_what_is_needed_and_nothing_else(annotator: RunResult, pretrained: RunResult) -> None:
    files = {
        "config.yaml",
        "model.safetensors",
        "genes.parquet",
        "model_card.md",
        "training_cells.safetensors",
    }
    assert {path.name for path in (pretrained.run_dir / "model").iterdir()} == files
    assert {path.name for path in (annotator.run_dir / "model").iterdir()} == files | {"labels.json"}
    card = (annotator.run_dir / "model" / "model_card.md").read_text()
    assert "Classes: B, NK, T" in card
    assert "40 (" in card
    assert load_config(annotator.run_dir / "model" / "config.yaml") == annotator.model.config
    labels = json.loads((annotator.run_dir / "model" / "labels.json").read_text())
    assert labels["key"] == "cell_type"
    assert labels["classes"] == ["B", "NK", "T"]


def test_a_model_loads_without_the_files_it_was_trained_on(pretrained: RunResult, tmp_path: Path) -> None:
    gone = str(tmp_path / "no_longer_there.h5ad")
    data = pretrained.model.config.data.model_copy(update={"paths": [gone]})
    config = pretrained.model.config.model_copy(update={"data": data})
    moved = ModelBundle(config, pretrained.model.vocab, pretrained.model.model)
    assert load_model(save_bundle(moved, tmp_path / "model")).config.data.paths == [gone]


def test_a_model_that_is_not_finetuned_has_no_labels(pretrained: RunResult) -> None:
    for path in (pretrained.run_dir / "model", pretrained.checkpoint_dir / "last.ckpt"):
        bundle = load_model(path)
        assert bundle.labels is None
        assert bundle.head is None


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "genes.parquet"])
def test_a_folder_without_one_of_its_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"is not a model folder: it has no {name}" in message(folder)


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    assert "is not a model folder: it has no config.yaml" in message(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_safetensors(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"\xff" * 500, "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors' is damaged"):
        load_model(folder)


def test_weights_of_another_shape_are_listed(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["ffn_dim"] = 20
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    said = message(folder)
    assert "do not fit the architecture that its config describes (6 differences)" in said
    assert "feed_forward.fc1.weight: shape (24, 16) in the file, (20, 16) in the model" in said


def test_weights_that_are_missing_or_left_over_are_listed(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.stranger"] = state.pop("model.transformer.final_norm.bias")
    vocabulary = GeneVocab.load(folder / "genes.parquet").fingerprint
    save_file(state, folder / "model.safetensors", metadata={"vocabulary": vocabulary})
    said = message(folder)
    assert "(2 differences)" in said
    assert "missing: model.transformer.final_norm.bias" in said
    assert "not part of the model: model.stranger" in said


def test_another_architecture_in_the_config(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["architecture"] = "diffusion_unet"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    said = message(folder)
    assert "diffusion_unet" in said
    assert "transformer_encoder" in said, "the message names what there is"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", '{"key": "cell_type"}', '{"key": "a", "task": "classification", "classes": 3}'],
)
def test_broken_labels(folder: Path, content: str) -> None:
    (folder / "labels.json").write_text(content)
    with pytest.raises(ModelError, match=r"labels\.json' cannot be read"):
        load_model(folder)


def test_labels_that_do_not_fit_the_head(folder: Path) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(labels | {"classes": ["B", "T"]}))
    assert "head.linear.weight: shape (3, 16) in the file, (2, 16) in the model" in message(folder)


def test_a_finetuned_folder_that_lost_its_labels(folder: Path) -> None:
    (folder / "labels.json").unlink()
    assert "not part of the model: head.linear.weight" in message(folder)


def test_a_damaged_vocabulary(folder: Path) -> None:
    (folder / "genes.parquet").write_bytes(b"PAR1 no more")
    assert "is damaged: " in message(folder)


def test_the_genes_of_another_model(folder: Path) -> None:
    """As many genes, so all shapes fit: only the fingerprint tells that the weights are of other genes."""
    vocab = GeneVocab.load(folder / "genes.parquet")
    vocab.subset(torch.arange(vocab.n_genes - 1, -1, -1).numpy()).save(folder / "genes.parquet")
    assert "genes.parquet" in message(folder)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_checkpoint(checkpoint: Path, share: float) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    said = message(checkpoint)
    assert "damaged or was cut off" in said
    assert f"({int(share * len(whole)):,} bytes)" in said


@given(content=st.binary(max_size=50))
@example(content=b"hello\n")
@example(content=b"\x89HDF\r\n\x1a\n" + bytes(100))
def test_a_file_that_is_no_checkpoint(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        path.write_bytes(content)
        message(path)


class _Harmful:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_objects_in_a_checkpoint_are_never_run(tmp_path: Path, how: str) -> None:
    path, target = tmp_path / "harmful.ckpt", tmp_path / "executed"
    if how == "torch":
        torch.save({"scmodelforge": _Harmful(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"scmodelforge": _Harmful(target)}))
    assert "is not a checkpoint of scModelForge" in message(path)
    assert not target.exists()


def test_a_checkpoint_of_another_project(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "was not written by scModelForge" in message(tmp_path / "other.ckpt")


def test_a_checkpoint_of_a_later_format(checkpoint: Path) -> None:
    said = message(rewrite(checkpoint, format_version=FORMAT_VERSION + 1))
    assert f"has format {FORMAT_VERSION + 1}, this version reads format {FORMAT_VERSION}" in said


def test_a_checkpoint_of_another_architecture(checkpoint: Path) -> None:
    config = read_checkpoint(checkpoint)["scmodelforge"]["config"]
    said = message(rewrite(checkpoint, config=config | {"model": {"architecture": "diffusion_unet"}}))
    assert "diffusion_unet" in said


def test_checkpoints_hold_plain_types_only(checkpoint: Path) -> None:
    plain = read_checkpoint(checkpoint)["scmodelforge"]
    assert json.loads(json.dumps(plain["config"])) == plain["config"]
    assert plain["labels"]["classes"] == ["B", "NK", "T"]


def test_a_folder_that_cannot_be_written(annotator: RunResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write into the folder '.*file"):
        save_bundle(annotator.model, tmp_path / "file")


def test_the_models_own_sections_are_taken_and_contradictions_listed(pretrained: RunResult) -> None:
    bundle, own = pretrained.model, pretrained.model.config
    plain = tiny_config(Path("runs/a")).model_copy(update={"tokenizer": own.tokenizer, "model": own.model})
    assert with_model_of(plain, bundle, "best.ckpt").tokenizer == own.tokenizer
    other = tiny_config(Path("runs/a"), model={"num_layers": 3}, data={"gene_vocab": "mouse_protein_coding"})
    with pytest.raises(ModelError) as error:
        with_model_of(other, bundle, "best.ckpt")
    assert "contradicts the model in 'best.ckpt'" in str(error.value)
    assert "model.num_layers: 3" in str(error.value)
    assert "data.gene_vocab: mouse_protein_coding in the config, from_data in the model" in str(error.value)
