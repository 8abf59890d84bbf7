"""Our encoder, losses and generative mode against scGPT's own code; golden files by make_golden_scgpt.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import TrainingBatch, pack
from scmodelforge.models.published.scgpt import (
    from_scgpt,
    gene_vocab,
    read_published,
    to_scgpt,
    write_published,
)
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_vocab

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parent / "golden"
N_TOKENS, N_BINS, PAD = 23, 7, 0
STYLES = ["continuous", "continuous_all", "category", "scaling"]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as content:
        return {key: torch.from_numpy(content[key]) for key in content.files}


def part(golden: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def make_config(style: str, everything: bool = False, **changes: dict[str, Any]) -> Config:
    objective: dict[str, Any] = {"cell_weight": 1.0}
    if everything:
        objective |= {"zero_probability": True, "ecs_weight": 10.0, "ecs_threshold": 0.3}
        objective |= {"batch_key": "donor", "batch_labels": True, "batch_weight": 1.0}
    return Config.model_validate(
        {
            "data": {"preprocessing": {"normalize": "none", "log1p": False}},
            "tokenizer": {
                "strategy": "binned_expression",
                "vocab_layout": "scgpt",
                "n_bins": N_BINS,
                "max_genes": 12,
                "include_zero_genes": everything,
            },
            "model": {
                "architecture": "transformer_encoder",
                "pretraining_task": "expression_reconstruction",
                "hidden_dim": 8,
                "num_layers": 2,
                "num_heads": 2,
                "ffn_dim": 12,
                "activation": "relu",
                "norm": "post",
                "layer_norm_eps": 1e-5,
                "value_embedding": style,
                "pooling": "cls",
                "objective": objective | changes.pop("objective", {}),
            }
            | changes.pop("model", {}),
        }
    )


def make_model(golden: dict[str, torch.Tensor], config: Config) -> ModelBundle:
    vocab = make_vocab(N_TOKENS - 4, layout="scgpt")
    if config.model.objective.batch_key:
        vocab = vocab.with_obs_categories({"donor": ["a", "b", "c"]})
    model = build_model(config, vocab, seed=0).eval()
    model.load_state_dict(from_scgpt(part(golden, "state/")))
    return ModelBundle(config, vocab, model)


def masked_batch(golden: dict[str, torch.Tensor]) -> TrainingBatch:
    masked, ids = golden["masked"], golden["ids"]
    asked = masked.flatten().nonzero()[:, 0]
    obs = golden["batches"][:, None] + 1 if "batches" in golden else None
    tokens = TokenBatch(
        ids, golden["truth"].masked_fill(masked, -1.0), golden["lengths"], torch.arange(len(ids)), True, obs
    )
    return TrainingBatch(tokens, asked, ids.flatten()[asked], golden["truth"].flatten()[asked], 0, 0)


def check_gradients(golden: dict[str, torch.Tensor], model: torch.nn.Module, unused: int = 0) -> None:
    expected = part(golden, "grad/")
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    ours = to_scgpt(ours)
    renamed = {name.replace("Wqkv.", "in_proj_"): gradient for name, gradient in ours.items()}
    assert len(expected) == len(renamed) - unused
    for name, gradient in expected.items():
        torch.testing.assert_close(renamed[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", STYLES)
def test_hidden_states_predictions_losses_and_gradients_are_scgpt_s(name: str) -> None:
    golden = load(f"scgpt_{name}")
    bundle = make_model(golden, make_config(name.removesuffix("_all"), everything=name.endswith("_all")))
    batch = masked_batch(golden)
    output = build_objective(bundle.config, bundle.vocab)(bundle.model, batch)
    valid, tokens = batch.tokens.attention_mask, bundle.model.packed(batch.tokens)
    torch.testing.assert_close(output.hidden, golden["hidden"][valid], atol=1e-5, rtol=0)

    places = torch.arange(len(output.hidden))
    everywhere = bundle.model.expression(output.hidden, places, tokens.input_ids, tokens)
    torch.testing.assert_close(everywhere[:, 0], golden["prediction"][valid], atol=1e-5, rtol=0)
    if "zero_probs" in golden:
        probability = everywhere[:, 1].sigmoid()
        torch.testing.assert_close(probability, golden["zero_probs"][valid], atol=1e-5, rtol=0)

    expected = part(golden, "loss/")
    assert output.losses.keys() == expected.keys()
    for term, loss in expected.items():
        torch.testing.assert_close(output.losses[term], loss, atol=1e-5, rtol=1e-5, msg=term)
    torch.testing.assert_close(output.loss, golden["loss"], atol=1e-5, rtol=1e-5)
    output.loss.backward()
    check_gradients(golden, bundle.model)


def generative_config(**objective: Any) -> Config:
    return make_config(
        "continuous",
        model={"architecture": "autoregressive_transformer"},
        objective={"reference": True, "second_pass_weight": 1.0} | objective,
    )


def generative_batch(golden: dict[str, torch.Tensor]) -> TrainingBatch:
    ids, queries = golden["ids"], golden["queries"]
    asked = (queries != PAD).flatten().nonzero()[:, 0]
    tokens = TokenBatch(ids, golden["values"], (ids != PAD).sum(dim=1), torch.arange(len(ids)), True)
    answers = golden["answers"].flatten()[asked]
    return TrainingBatch(tokens, asked, queries.flatten()[asked], answers, 0, 0, queries)


def test_generated_values_losses_and_gradients_are_those_of_the_dense_formula() -> None:
    golden = load("scgpt_generative")
    bundle = make_model(golden, generative_config())
    batch = generative_batch(golden)
    output = build_objective(bundle.config, bundle.vocab)(bundle.model, batch)
    valid = batch.tokens.attention_mask
    torch.testing.assert_close(output.hidden, golden["hidden"][valid], atol=1e-5, rtol=0)
    prediction = golden["prediction"].flatten()[batch.asked]
    torch.testing.assert_close(output.expression[:, 0], prediction, atol=1e-5, rtol=0)
    expected = part(golden, "loss/")
    assert output.losses.keys() == expected.keys()
    for term, loss in expected.items():
        torch.testing.assert_close(output.losses[term], loss, atol=1e-5, rtol=1e-5, msg=term)
    output.loss.backward()
    check_gradients(golden, bundle.model)


def test_the_out_projection_of_generated_genes_is_the_only_difference_of_reference() -> None:
    golden = load("scgpt_generative")
    batch = generative_batch(golden)
    ours = make_model(golden, generative_config(reference=False)).model
    theirs = make_model(golden, generative_config()).model
    for block in (*ours.transformer.blocks, *theirs.transformer.blocks):
        torch.nn.init.eye_(block.attention.out.weight)
        torch.nn.init.zeros_(block.attention.out.bias)
    packed = pack(batch, ours.packing, 0)
    for mine, reference in zip(
        ours.generated_states(packed.tokens, packed.queries),
        theirs.generated_states(packed.tokens, packed.queries),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=0)


def test_cell_embeddings_are_cls_of_length_one() -> None:
    golden = load("scgpt_continuous")
    bundle = make_model(golden, make_config("continuous", model={"normalize_embedding": True}))
    expected = torch.nn.functional.normalize(golden["hidden"][:, 0], dim=1)
    embedding = bundle.model.encode(masked_batch(golden).tokens)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*STYLES, "generative"])
def test_weights_make_the_round_trip(name: str) -> None:
    state = part(load(f"scgpt_{name}"), "state/")
    back = to_scgpt(from_scgpt(state))
    assert {key.replace("Wqkv.", "in_proj_") for key in back} == state.keys()
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key.replace("Wqkv.", "in_proj_")]), key


@pytest.mark.parametrize("layout", ["Wqkv.", "_impl.Wqkv."])
def test_flash_attention_s_layouts_are_read(layout: str) -> None:
    state = part(load("scgpt_continuous"), "state/")
    flash = {key.replace("in_proj_", layout): tensor for key, tensor in state.items()}
    if layout.startswith("_impl"):
        flash = {key.replace("self_attn.out_proj", "self_attn._impl.out_proj"): t for key, t in flash.items()}
    assert flash.keys() != state.keys()
    expected = from_scgpt(state)
    ours = from_scgpt(flash)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_weights_that_have_no_place_are_named() -> None:
    state = part(load("scgpt_continuous"), "state/")
    with pytest.raises(ModelError, match=r"dsbn\.bns\.0\.running_mean"):
        from_scgpt(state | {"dsbn.bns.0.running_mean": torch.zeros(8)})
    with pytest.raises(ModelError, match=r"head\.bias"):
        to_scgpt(from_scgpt(state) | {"head.bias": torch.zeros(N_TOKENS)})


# --- folders --------------------------------------------------------------------------------------

NAMES = ["CD3E", "B2M", "no-such-gene", "ENSG00000277400.1", *(f"odd{i}" for i in range(16))]


@pytest.fixture(params=["continuous", "continuous_all", "category", "generative"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder as scGPT publishes it: flash-attention's layout, special tokens last, 20 genes."""
    style = "continuous" if request.param == "generative" else request.param.removesuffix("_all")
    state = part(load(f"scgpt_{request.param}"), "state/")
    flash = {f"module.{key.replace('in_proj_', 'Wqkv.')}": tensor for key, tensor in state.items()}
    torch.save(flash, tmp_path / "best_model.pt")
    names = [*NAMES, "<pad>", "<cls>", "<eoc>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    args = {"embsize": 8, "nheads": 2, "d_hid": 12, "nlayers": 2, "n_bins": N_BINS, "max_seq_len": 12}
    args |= {"input_style": "binned", "input_emb_style": style, "pad_value": -2, "dropout": 0.2}
    (tmp_path / "args.json").write_text(json.dumps(args))
    return tmp_path


def test_a_published_folder_is_read_and_written_back(folder: Path, tmp_path_factory) -> None:
    bundle = read_published(folder)
    config, vocab = bundle.config, bundle.vocab
    theirs = torch.load(folder / "best_model.pt", weights_only=True)
    generative = "module.flag_encoder.weight" in theirs
    assert config.model.architecture == (
        "autoregressive_transformer" if generative else "transformer_encoder"
    )
    assert config.tokenizer.cls_value == -2
    assert not config.data.preprocessing.log1p
    assert not bundle.model.training
    table = bundle.model.embedding.tokens.weight
    assert torch.equal(table[vocab.cls_id], theirs["module.encoder.embedding.weight"][21])
    assert torch.equal(table[vocab.first_gene_token], theirs["module.encoder.embedding.weight"][0])
    assert not table[vocab.mask_id].any()

    out = tmp_path_factory.mktemp("out")
    write_published(bundle, out)
    back = torch.load(out / "best_model.pt", weights_only=True)
    assert {f"module.{name}" for name in back} == theirs.keys()
    assert all(torch.equal(tensor, theirs[f"module.{name}"]) for name, tensor in back.items())
    assert json.loads((out / "vocab.json").read_text()) == json.loads((folder / "vocab.json").read_text())
    args = json.loads((folder / "args.json").read_text())
    assert json.loads((out / "args.json").read_text()).items() >= args.items()
    again = read_published(out)
    assert again.vocab.fingerprint == vocab.fingerprint


def test_a_read_model_computes_what_scgpt_does(tmp_path: Path) -> None:
    golden = load("scgpt_continuous")
    state = part(golden, "state/")
    special, genes = [0, 2, 3], list(range(4, N_TOKENS))
    state["encoder.embedding.weight"] = state["encoder.embedding.weight"][genes + special]
    state["cls_decoder.out_layer.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "best_model.pt")
    names = [*(f"G{i}" for i in range(len(genes))), "<pad>", "<cls>"]  # <eoc> is appended, as scGPT does
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    args = {"embsize": 8, "nheads": 2, "d_hid": 12, "nlayers": 2, "n_bins": N_BINS, "max_seq_len": 12}
    (tmp_path / "args.json").write_text(json.dumps(args))
    bundle = read_published(tmp_path)
    tokens = masked_batch(golden).tokens
    expected = torch.nn.functional.normalize(golden["hidden"][:, 0], dim=1)
    torch.testing.assert_close(bundle.model.encode(tokens), expected, atol=1e-5, rtol=0)


def test_folders_that_do_not_belong_together_are_refused(folder: Path) -> None:
    names = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({"extra": len(names)} | names))
    with pytest.raises(ModelError, match="24 tokens"):
        read_published(folder)
    (folder / "vocab.json").write_text(json.dumps(names | {"CD3E": 5}))
    with pytest.raises(ModelError, match="without gaps"):
        read_published(folder)
    (folder / "args.json").write_text("{}")
    with pytest.raises(ModelError, match="lacks embsize"):
        read_published(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    state = torch.load(folder / "best_model.pt", weights_only=True)
    del state["module.transformer_encoder.layers.1.linear2.bias"]
    torch.save(state, folder / "best_model.pt")
    with pytest.raises(ModelError, match=r"feed_forward\.fc2\.bias"):
        read_published(folder)


def test_a_model_that_scgpt_cannot_be_is_not_exported(tmp_path: Path) -> None:
    golden = load("scgpt_continuous")
    bundle = make_model(golden, make_config("continuous"))
    other = bundle.config.model_copy(update={"model": bundle.config.model.model_copy(update={"norm": "pre"})})
    with pytest.raises(ModelError, match=r"model\.norm is 'pre'"):
        write_published(ModelBundle(other, bundle.vocab, bundle.model), tmp_path)
    assert not any(tmp_path.iterdir())


def test_symbols_become_gene_ids_where_they_mean_one_gene(caplog: pytest.LogCaptureFixture) -> None:
    names = ["CD99_ENSG00000002586", "CD99", "CD3E", "no-such-gene", "ENSG00000198851.5"]
    with caplog.at_level(logging.INFO):
        vocab = gene_vocab(names)
    assert isinstance(vocab, GeneVocab)
    assert list(vocab.symbols) == names
    assert list(vocab.gene_ids) == [
        "CD99_ENSG00000002586",  # CD99 itself is there
        "ENSG00000002586",
        "ENSG00000198851",
        "no-such-gene",
        "ENSG00000198851.5",  # CD3E again
    ]
    assert "2 of 5 gene names are known genes (2 by symbol); 3 keep scGPT's name" in caplog.text
