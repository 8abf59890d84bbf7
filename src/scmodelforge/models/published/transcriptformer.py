"""TranscriptFormer's checkpoints: config.json, model_weights.pt and the vocabularies in vocabs/.

Token ids stay what they are: the special tokens in the order of config.json, then the genes of the files in its
order. Categories of obs columns keep their numbers, except that "unknown" becomes 0 if it was not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.files import atomic_path, write_text
from scmodelforge.genes.tables import known_genes, species_of
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.bundle import ModelBundle, assemble
from scmodelforge.models.objectives.counts import EPSILON
from scmodelforge.models.published.reading import (
    config_from,
    n_rows,
    read_json,
    read_weights,
    require_same_keys,
)

# Their special tokens by our names; any other "[X]" is "<x>".
SPECIAL_TOKENS = {"unknown": "<unknown>", "[START]": "<cls>", "[END]": "<eos>"}
UNKNOWN = "unknown"
BLOCK_LENGTH = 128
VECTORS = "gene_embeddings.embedding.weight"
NETWORKS = {  # ours → theirs; parts 0 and 4 are Linear, 2 is LayerNorm in both
    "embedding.tokens.network": "gene_embeddings.mlp.layers",
    "expression_head.layers": "mu.mlp.layers",
    "head.layers": "gene_id_head.layers",
}
LAYER_NAMES = {
    "attention.q.weight": "self_attn.linears.0.weight",
    "attention.k.weight": "self_attn.linears.1.weight",
    "attention.v.weight": "self_attn.linears.2.weight",
    "attention.out.weight": "self_attn.linears.3.weight",
    "attention_norm.weight": "norm1.weight",
    "attention_norm.bias": "norm1.bias",
    "feed_forward.fc1.weight": "linear1.weight",
    "feed_forward.fc2.weight": "linear2.weight",
    "feed_forward_norm.weight": "norm2.weight",
    "feed_forward_norm.bias": "norm2.bias",
}
BIAS_NAMES = {
    "attention.q.bias": "self_attn.linears.0.bias",
    "attention.k.bias": "self_attn.linears.1.bias",
    "attention.v.bias": "self_attn.linears.2.bias",
    "attention.out.bias": "self_attn.linears.3.bias",
    "feed_forward.fc1.bias": "linear1.bias",
    "feed_forward.fc2.bias": "linear2.bias",
}


def name_map(config: Config) -> dict[str, str]:
    """Our tensor name → the name in a `Transcriptformer`."""
    model = config.model
    in_layer = LAYER_NAMES | (BIAS_NAMES if model.bias else {})
    names = {
        "embedding.tokens.vectors.weight": VECTORS,
        "expression_head.gene_bias.weight": "mu.gene_embedding.weight",
    }
    for i, column in enumerate(config.tokenizer.obs_tokens):
        names[f"obs_embedding.columns.{i}.weight"] = f"aux_embeddings.{column}.weight"
    for ours, theirs in NETWORKS.items():
        if ours == "head.layers" and model.objective.gene_weight == 0:
            continue
        for part in (0, 2, 4):
            names |= {f"{ours}.{part}.{kind}": f"{theirs}.{part}.{kind}" for kind in ("weight", "bias")}
    for layer in range(model.num_layers):
        for ours, theirs in in_layer.items():
            names[f"transformer.blocks.{layer}.{ours}"] = (
                f"transformer_encoder.encoder_layers.{layer}.{theirs}"
            )
    return names


def to_transcriptformer(state: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Our weights under TranscriptFormer's names."""
    return {theirs: state[ours] for ours, theirs in name_map(config).items()}


def from_transcriptformer(state: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """TranscriptFormer's weights under our names.

    Raises
    ------
    ModelError
        If a tensor is missing or left over; they are listed.
    """
    names = name_map(config)
    what = f"a TranscriptFormer with {config.model.num_layers} layers"
    require_same_keys(set(names.values()), set(state), set(), what)
    return {ours: state[theirs] for ours, theirs in names.items()}


# --- the way in -----------------------------------------------------------------------------------


def read_published(folder: Path) -> ModelBundle:
    """A published TranscriptFormer as a model of ours, for embedding, prediction and more training.

    Parameters
    ----------
    folder
        Holds config.json, model_weights.pt, and vocabs/ with the gene files (.h5) that config.json names and a
        COLUMN_vocab.json per obs column.

    Raises
    ------
    ModelError
        If files are missing, damaged, do not belong together, or ask for what the published models do not.
    """
    path = folder / "config.json"
    settings = _sections(path)
    data = settings["data_config"]
    columns = _names(data.get("aux_cols"))
    categories, orders = {}, {}
    for column in columns:
        categories[column], orders[column] = _read_categories(folder / "vocabs" / f"{column}_vocab.json")
    vocab = _read_vocab(folder, data, categories)
    weights = folder / "model_weights.pt"
    state = {name: tensor.float() for name, tensor in read_weights(weights).items()}
    if VECTORS not in state or n_rows(state[VECTORS]) != vocab.n_tokens:
        rows = f"{n_rows(state[VECTORS]):,} gene vectors" if VECTORS in state else "no gene vectors"
        raise ModelError(
            f"'{weights}' has {rows}, and the vocabulary in '{folder / 'vocabs'}' {vocab.n_tokens:,} tokens "
            f"({len(vocab.special_tokens)} special ones): they belong to different models."
        )
    config = _config(path, settings, columns, state[VECTORS].shape[1])
    for column, order in orders.items():
        name = f"aux_embeddings.{column}.weight"
        if name in state and n_rows(state[name]) == len(order):
            state[name] = state[name][order]
    ours = from_transcriptformer(state, config)
    return assemble(config, vocab, None, {f"model.{k}": v for k, v in ours.items()}, str(weights))


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of config.json that say how the model computes."""
    settings = read_json(path)
    settings = settings.get("model", settings) if isinstance(settings, dict) else {}
    settings = settings if isinstance(settings, dict) else {}
    names = ("model_config", "data_config", "loss_config")
    if missing := [name for name in names if not isinstance(settings.get(name), dict)]:
        raise ModelError(f"'{path}' is no config of a TranscriptFormer: it lacks {', '.join(missing)}.")
    if settings.get("model_type", "transcriptformer") != "transcriptformer":
        raise ModelError(f"'{path}' describes a {settings['model_type']}, which is no transformer.")
    return {name: settings[name] for name in names}


def _names(value: Any) -> list[str]:
    """A list that may be written with commas, and may be empty."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts]


def _read_categories(path: Path) -> tuple[tuple[str, ...], list[int]]:
    """Categories in the order of their numbers, and the rows of their vectors, "unknown" first."""
    table = read_json(path)
    if not isinstance(table, dict) or sorted(table.values()) != list(range(len(table))):
        raise ModelError(f"'{path}' does not number its categories 0, 1, 2, … without gaps and repeats.")
    if UNKNOWN not in table:
        raise ModelError(f"'{path}' has no category '{UNKNOWN}'.")
    known = sorted((name for name in table if name != UNKNOWN), key=table.__getitem__)
    return tuple(known), [table[UNKNOWN], *(table[name] for name in known)]


def _read_vocab(folder: Path, data: dict[str, Any], categories: dict[str, tuple[str, ...]]) -> GeneVocab:
    files = [folder / "vocabs" / Path(name).name for name in _names(data.get("esm2_mappings"))]
    if not files:
        raise ModelError(f"'{folder / 'config.json'}' names no gene files (data_config.esm2_mappings).")
    genes: list[str] = []
    for file in files:
        if not file.is_file():
            raise ModelError(f"The gene file '{file}' does not exist.")
        try:
            with h5py.File(file, "r") as handle:
                genes += [key.decode("utf-8") for key in handle["keys"][:]]
        except (OSError, KeyError, AttributeError) as error:
            raise ModelError(f"'{file}' is no gene file: it has no table of keys.") from error
    special = tuple(
        SPECIAL_TOKENS.get(name, f"<{name.strip('[]').lower()}>")
        for name in _names(data.get("special_tokens"))
    )
    if missing := {"<pad>", "<mask>", "<cls>", "<eos>"} - set(special):
        raise ModelError(
            f"'{folder / 'config.json'}' lists the special tokens {' '.join(special) or '(none)'} in "
            f"data_config.special_tokens; {', '.join(sorted(missing))} of ours (<cls> is [START], <eos> [END]) have "
            "no counterpart."
        )
    ids = pd.unique(np.array(genes, dtype=object))  # the first of doubled genes counts
    known = known_genes()[["symbol", "biotype"]].reindex(ids).fillna("")
    return GeneVocab(
        gene_ids=ids,
        symbols=known["symbol"].to_numpy(object),
        biotypes=known["biotype"].to_numpy(object),
        species=species_of(ids),
        special_tokens=special,
        name=folder.name,
        obs_categories=categories,
    )


def _config(path: Path, settings: dict[str, dict[str, Any]], columns: list[str], vector_dim: int) -> Config:
    model, data, loss = settings["model_config"], settings["data_config"], settings["loss_config"]
    sizes = ("seq_len", "embed_dim", "model_dim", "num_layers", "num_heads")
    if missing := [key for key in sizes if not isinstance(model.get(key), int)]:
        raise ModelError(f"'{path}' does not say {', '.join(missing)} in model_config.")
    fixed: dict[str, tuple[Any, Any]] = {
        "model_config.mu_link_fn": (model.get("mu_link_fn", "softmax"), "softmax"),
        "model_config.log_counts_eps": (model.get("log_counts_eps", EPSILON), EPSILON),
        "model_config.fw_bias": (model.get("fw_bias", False), model.get("attn_bias", False)),
        "data_config.normalize_to_scale": (data.get("normalize_to_scale") or 0, 0),
        "data_config.pad_zeros": (data.get("pad_zeros", True), True),
        "loss_config.softplus_approx": (loss.get("softplus_approx", True), True),
    }
    wrong = [f"{key} is {has!r}, not {must!r}" for key, (has, must) in fixed.items() if has != must]
    if model.get("activation", "gelu") not in ("gelu", "relu"):
        wrong.append(f"model_config.activation is {model['activation']!r}, not gelu or relu")
    if wrong:
        raise ModelError(f"'{path}' describes what no published TranscriptFormer is: {'; '.join(wrong)}.")
    order = "random" if data.get("randomize_genes") else "value" if data.get("sort_genes") else "column"
    return config_from(
        {
            "data": {
                "gene_vocab": str(path.parent / "vocabs"),
                "preprocessing": {"normalize": "none", "log1p": False},
            },
            "tokenizer": {
                "strategy": "continuous_projection",
                "max_genes": model["seq_len"] + 1,
                "vocab_layout": "transcriptformer",
                "gene_order": order,
                "overlong": "first",
                "max_value": data.get("clip_counts"),
                "obs_tokens": columns,
            },
            "model": {
                "architecture": "autoregressive_transformer",
                "pretraining_task": "dual_prediction",
                "hidden_dim": model["embed_dim"],
                "num_layers": model["num_layers"],
                "num_heads": model["num_heads"],
                "ffn_dim": model["model_dim"],
                "dropout": model.get("dropout", 0.1),
                "activation": model.get("activation", "gelu"),
                "norm": "normed_residual",
                "layer_norm_eps": 1e-5,
                "bias": bool(model.get("attn_bias", False)),
                "soft_cap": model.get("softcap") or None,
                "count_bias": True,
                "embedding_norm": False,
                "gene_embedding_dim": vector_dim,
                "gene_head": "mlp",
                "gene_head_dim": model.get("gene_head_hidden_dim", 2048),
                "pooling": "window",
                "objective": {
                    "gene_weight": loss.get("gene_id_loss_weight", 1.0),
                    "value_loss": "zero_truncated_poisson",
                    "reference": True,
                },
            },
        },
        path,
    )


# --- the way out ----------------------------------------------------------------------------------


def write_published(bundle: ModelBundle, folder: Path) -> None:
    """Write a folder that `read_published` and TranscriptFormer's own package read.

    All genes go into one gene file, with the vectors that the model holds.

    Raises
    ------
    ModelError
        If the model is not built as a TranscriptFormer is.
    """
    config, vocab = bundle.config, bundle.vocab
    _require_same_arithmetic(config)
    their_names = {ours: theirs for theirs, ours in SPECIAL_TOKENS.items()}
    special = [their_names.get(name, f"[{name.strip('<>').upper()}]") for name in vocab.special_tokens]
    state = {name: tensor.detach().cpu() for name, tensor in bundle.model.state_dict().items()}
    vocabs = folder / "vocabs"
    vocabs.mkdir(parents=True, exist_ok=True)
    vectors = state["embedding.tokens.vectors.weight"].numpy()[len(special) :]
    with atomic_path(vocabs / "genes.h5") as temporary, h5py.File(temporary, "w") as handle:
        handle.create_dataset("keys", data=np.array([gene.encode() for gene in vocab.gene_ids]))
        arrays = handle.create_group("arrays")
        for gene, vector in zip(vocab.gene_ids, vectors, strict=True):
            arrays.create_dataset(gene, data=vector)
    for column in config.tokenizer.obs_tokens:
        numbers = {name: i for i, name in enumerate((UNKNOWN, *vocab.obs_categories[column]))}
        write_text(vocabs / f"{column}_vocab.json", json.dumps(numbers, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps({"model": _settings(config, special)}, indent=2) + "\n")
    with atomic_path(folder / "model_weights.pt") as temporary:
        torch.save(to_transcriptformer(state, config), temporary)


def _require_same_arithmetic(config: Config) -> None:
    """Refuse a model that TranscriptFormer's code would compute differently."""
    model, tokenizer = config.model, config.tokenizer
    needed: dict[str, tuple[Any, Any]] = {
        "model.architecture": (model.architecture, "autoregressive_transformer"),
        "model.objective.value_loss": (config.value_loss, "zero_truncated_poisson"),
        "model.norm": (model.norm, "normed_residual"),
        "model.final_norm": (bool(model.final_norm), False),
        "model.qk_norm": (model.qk_norm, False),
        "model.layer_norm_eps": (model.layer_norm_eps, 1e-5),
        "model.count_bias": (model.count_bias, True),
        "model.value_embedding": (config.value_embedding, "none"),
        "model.embedding_norm": (config.embedding_norm, False),
        "model.gene_head": (model.gene_head, "mlp"),
        "tokenizer.append_eos": (tokenizer.append_eos, False),
    }
    wrong = [f"{key} is {has!r}, not {must!r}" for key, (has, must) in needed.items() if has != must]
    if model.gene_embedding_dim is None:
        wrong.append("model.gene_embedding_dim is None: its gene embeddings are learned, not given")
    if wrong:
        raise ModelError(
            "This model is no TranscriptFormer, as which it should be exported:\n  " + "\n  ".join(wrong)
        )


def _settings(config: Config, special: list[str]) -> dict[str, dict[str, Any]]:
    """The sections of config.json."""
    model, tokenizer = config.model, config.tokenizer
    seq_len, aux_len = tokenizer.max_genes - 1, len(tokenizer.obs_tokens)
    whole = seq_len + aux_len
    return {
        "model_config": {
            "log_counts_eps": EPSILON,
            "num_heads": model.num_heads,
            "num_layers": model.num_layers,
            "model_dim": model.feed_forward_dim,
            "embed_dim": model.hidden_dim,
            "dropout": model.dropout,
            "activation": model.activation,
            "attn_bias": model.bias,
            "fw_bias": model.bias,
            "mu_link_fn": "softmax",
            "softcap": model.soft_cap or 0,
            "seq_len": seq_len,
            "aux_len": aux_len,
            "block_len": whole if whole % BLOCK_LENGTH else BLOCK_LENGTH,
            "gene_head_hidden_dim": model.gene_head_dim or model.hidden_dim,
            "use_aux": aux_len > 0,
            "compile_block_mask": True,
        },
        "data_config": {
            "aux_vocab_path": "vocabs",
            "pin_memory": True,
            "aux_cols": ",".join(tokenizer.obs_tokens) or None,
            "gene_col_name": "ensembl_id",
            "clip_counts": tokenizer.max_value,
            "filter_to_vocabs": True,
            "filter_outliers": 0.0,
            "pad_zeros": True,
            "normalize_to_scale": 0,
            "n_data_workers": 0,
            "sort_genes": tokenizer.gene_order == "value",
            "randomize_genes": tokenizer.gene_order == "random",
            "min_expressed_genes": 0,
            "gene_pad_token": "[PAD]",
            "aux_pad_token": UNKNOWN,
            "esm2_mappings": ["genes.h5"],
            "esm2_mappings_path": "vocabs",
            "special_tokens": special,
        },
        "loss_config": {"gene_id_loss_weight": model.objective.gene_weight, "softplus_approx": True},
    }
