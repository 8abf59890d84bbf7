"""Our causal model against the original TranscriptFormer package, by a golden file and, where it is installed, live.

`make_golden_transcriptformer.py` wrote the file: a tiny model with random weights, and five cells.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from scmodelforge.errors import ModelError
from scmodelforge.models.autoregressive import AutoregressiveTransformer
from scmodelforge.models.bundle import ModelBundle, load_model, save_bundle
from scmodelforge.models.objectives.batch import TrainingBatch
from scmodelforge.models.objectives.next_gene import NextGene
from scmodelforge.models.published.transcriptformer import (
    from_transcriptformer,
    read_published,
    to_transcriptformer,
    write_published,
)
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells
from tests.parity.make_golden_transcriptformer import ASSAYS, GOLDEN, N_GENES, SETTINGS, WINDOW, run

pytestmark = pytest.mark.parity

N_SPECIAL = 7


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def weights() -> dict[str, torch.Tensor]:
    return {k.removeprefix("weight/"): torch.from_numpy(v) for k, v in golden().items() if k[:7] == "weight/"}


def write_folder(folder: Path, settings: dict | None = None, assays: dict[str, int] | None = None) -> Path:
    """A checkpoint as the package publishes them."""
    vocabs = folder / "vocabs"
    vocabs.mkdir(parents=True)
    genes = [f"ENSG{i:011d}" for i in range(N_GENES)]
    with h5py.File(vocabs / "human_gene.h5", "w") as handle:
        handle.create_dataset("keys", data=np.array(genes, dtype="S"))
    (vocabs / "assay_vocab.json").write_text(json.dumps(assays or {n: i for i, n in enumerate(ASSAYS)}))
    (folder / "config.json").write_text(json.dumps({"model": settings or SETTINGS}))
    torch.save(weights(), folder / "model_weights.pt")
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> ModelBundle:
    return read_published(write_folder(tmp_path / "published"))


def cells_as_tokens(bundle: ModelBundle) -> TokenBatch:
    """The golden cells as our tokenizer gives them; assay 0 is unknown."""
    tokens, counts = golden()["tokens"], golden()["counts"]
    cell, place = np.nonzero(tokens >= N_SPECIAL)
    dense = np.zeros((len(tokens), N_GENES))
    dense[cell, tokens[cell, place] - N_SPECIAL] = counts[cell, place]
    batch = build_tokenizer(bundle.config, bundle.vocab)(make_cells(dense))
    return TokenBatch(
        batch.input_ids,
        batch.values,
        batch.lengths,
        batch.cell_index,
        batch.has_padding,
        obs=torch.from_numpy(golden()["assay"]),
    )


def asked(bundle: ModelBundle) -> tuple[AutoregressiveTransformer, NextGene, TrainingBatch]:
    task = NextGene(bundle.config, bundle.vocab)
    assert isinstance(bundle.model, AutoregressiveTransformer)
    return bundle.model, task, task.corrupt(cells_as_tokens(bundle), seed=0, epoch=0)


def close(ours: torch.Tensor, theirs: np.ndarray, relative: float = 0.0) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=1e-5, rtol=relative)


def test_the_tokens_are_theirs_shifted_by_one(bundle: ModelBundle) -> None:
    tokens = cells_as_tokens(bundle)
    assert bundle.vocab.special_tokens == ("<unknown>", "<pad>", "<cls>", "<eos>", "<rd>", "<cell>", "<mask>")
    assert (tokens.input_ids[:, 0] == 2).all()
    assert np.array_equal(tokens.input_ids[:, 1:], golden()["tokens"])
    assert np.array_equal(tokens.values[:, 1:], golden()["counts"])
    assert bundle.vocab.obs_categories == {"assay": ASSAYS[1:]}


def test_hidden_states_logits_and_rates_are_theirs(bundle: ModelBundle) -> None:
    model, task, batch = asked(bundle)
    output = task(model, batch)
    real = torch.from_numpy(golden()["tokens"] != 1).flatten()
    assert torch.equal(torch.nonzero(real)[:, 0], batch.asked)
    own = output.hidden[task.pack(batch).tokens.positions >= 0]
    close(own, golden()["hidden"].reshape(-1, own.shape[1])[real])
    # Theirs are soft-capped inside the loss.
    logits = 10 * np.tanh(golden()["gene_logit"].reshape(len(real), -1)[real] / 10)
    close(output.genes.logits, logits)
    close(output.expression[:, 0], golden()["mu"].flatten()[real], relative=1e-5)


def test_both_losses_and_all_gradients_are_theirs(bundle: ModelBundle) -> None:
    model, task, batch = asked(bundle)
    output = task(model, batch)
    close(output.losses["gene"], golden()["gene_loss"])
    close(output.losses["expression"], golden()["count_loss"], relative=1e-5)
    close(output.loss, golden()["gene_loss"] + golden()["count_loss"], relative=1e-5)
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours["embedding.tokens.vectors.weight"] is None
    theirs = {k.removeprefix("gradient/"): v for k, v in golden().items() if k.startswith("gradient/")}
    gradients = to_transcriptformer(ours, bundle.config)
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            gradients[name],
            torch.from_numpy(gradient),
            atol=1e-5,
            rtol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_cell_embeddings_are_theirs(bundle: ModelBundle) -> None:
    with torch.no_grad():
        close(bundle.model.encode(cells_as_tokens(bundle)), golden()["embeddings"])


@pytest.mark.skipif(importlib.util.find_spec("transcriptformer") is None, reason="the package is not here")
def test_the_golden_file_is_what_the_package_computes() -> None:
    fresh = run()
    assert fresh.keys() == golden().keys()
    for name, expected in golden().items():
        np.testing.assert_allclose(fresh[name], expected, atol=1e-5, rtol=1e-5, err_msg=name)


def test_weights_make_the_round_trip_through_names_and_folders(bundle: ModelBundle, tmp_path: Path) -> None:
    state = weights()
    back = to_transcriptformer(from_transcriptformer(state, bundle.config), bundle.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)

    write_published(bundle, tmp_path / "written")
    written = torch.load(tmp_path / "written" / "model_weights.pt", weights_only=True)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    again = read_published(tmp_path / "written")
    assert again.vocab.fingerprint == bundle.vocab.fingerprint
    assert again.config.model == bundle.config.model
    assert again.config.tokenizer == bundle.config.tokenizer
    with h5py.File(tmp_path / "written" / "vocabs" / "genes.h5") as handle:
        gene = handle["keys"][3].decode()
        assert np.array_equal(
            handle["arrays"][gene][:], state["gene_embeddings.embedding.weight"][N_SPECIAL + 3]
        )


def test_it_is_a_model_folder_of_ours_too(bundle: ModelBundle, tmp_path: Path) -> None:
    loaded = load_model(save_bundle(bundle, tmp_path / "model"))
    with torch.no_grad():
        close(loaded.model.encode(cells_as_tokens(loaded)), golden()["embeddings"])


def test_unknown_is_category_0_whatever_its_number_was(bundle: ModelBundle, tmp_path: Path) -> None:
    order = ("assay b", "assay a", "unknown", "assay c")
    other = read_published(write_folder(tmp_path / "other", assays={n: i for i, n in enumerate(order)}))
    assert other.vocab.obs_categories == {"assay": ("assay b", "assay a", "assay c")}
    theirs = weights()["aux_embeddings.assay.weight"]
    ours = other.model.state_dict()["obs_embedding.columns.0.weight"]
    assert torch.equal(ours, theirs[[2, 0, 1, 3]])


def test_a_model_without_the_gene_head_is_read(tmp_path: Path) -> None:
    settings = SETTINGS | {"loss_config": {"gene_id_loss_weight": 0.0}}
    folder = write_folder(tmp_path / "published", settings)
    torch.save({k: v for k, v in weights().items() if "gene_id_head" not in k}, folder / "model_weights.pt")
    bundle = read_published(folder)
    model, task, batch = asked(bundle)
    output = task(model, batch)
    assert model.head is None
    assert output.genes is None
    close(output.loss, golden()["count_loss"], relative=1e-5)
    assert "perplexity" not in task.metrics(task.count(output, batch))


def test_missing_and_left_over_weights_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "published")
    state = weights() | {"mu.extra": torch.zeros(1)}
    del state["mu.mlp.layers.0.bias"]
    torch.save(state, folder / "model_weights.pt")
    with pytest.raises(ModelError, match=r"mu.mlp.layers.0.bias(.|\n)*mu.extra"):
        read_published(folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model_config", "mu_link_fn", "exp"),
        ("model_config", "activation", "silu"),
        ("model_config", "log_counts_eps", 1e-3),
        ("data_config", "normalize_to_scale", 1000),
        ("loss_config", "softplus_approx", False),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path: Path, section: str, key: str, value: object) -> None:
    folder = write_folder(tmp_path / "published", SETTINGS | {section: SETTINGS[section] | {key: value}})
    with pytest.raises(ModelError, match=f"{section}.{key} is"):
        read_published(folder)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "published")
    with h5py.File(folder / "vocabs" / "human_gene.h5", "w") as handle:
        handle.create_dataset("keys", data=np.array(["ENSG1", "ENSG2"], dtype="S"))
    with pytest.raises(ModelError, match=r"36 gene vectors.* 9 tokens"):
        read_published(folder)
    (folder / "vocabs" / "human_gene.h5").unlink()
    with pytest.raises(ModelError, match=r"human_gene.h5' does not exist"):
        read_published(folder)


def test_another_model_is_not_written_as_a_transcriptformer(bundle: ModelBundle, tmp_path: Path) -> None:
    model = bundle.config.model.model_copy(update={"norm": "pre"})
    other = ModelBundle(bundle.config.model_copy(update={"model": model}), bundle.vocab, bundle.model)
    with pytest.raises(ModelError, match=r"model.norm is 'pre', not 'normed_residual'"):
        write_published(other, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_the_window_is_theirs(bundle: ModelBundle) -> None:
    assert bundle.config.tokenizer.max_genes == WINDOW + 1
    assert bundle.model.max_length == WINDOW
