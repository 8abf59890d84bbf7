"""Geneformer's checkpoints: `transformers.BertForMaskedLM` and the dictionaries of its tokenizer.

BERT adds a token-type embedding (row 0 everywhere in Geneformer) to the position embedding; ours has none,
so row 0 is folded into the rank embedding on the way in, and is zero on the way out. The output matrix is tied to
the gene embedding and is not stored.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from scmodelforge.errors import ModelError
from scmodelforge.files import write_text
from scmodelforge.genes.tables import known_genes, species_of
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab
from scmodelforge.models.bundle import ModelBundle, assemble
from scmodelforge.models.published.reading import (
    config_from,
    read_json,
    read_pickle,
    read_weights,
    require_same_keys,
)

log = logging.getLogger(__name__)

NAMES = {
    "embedding.tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embedding.ranks.weight": "bert.embeddings.position_embeddings.weight",
    "embedding.norm.weight": "bert.embeddings.LayerNorm.weight",
    "embedding.norm.bias": "bert.embeddings.LayerNorm.bias",
    "head.dense.weight": "cls.predictions.transform.dense.weight",
    "head.dense.bias": "cls.predictions.transform.dense.bias",
    "head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "head.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "head.bias": "cls.predictions.bias",
}
LAYER_NAMES = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.fc1": "intermediate.dense",
    "feed_forward.fc2": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
# Tied to other tensors, or constants that older versions of transformers stored.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
REDUNDANT = {*TIED, "bert.embeddings.position_ids"}

# BERT's own defaults, for a config.json that leaves them out.
BERT_DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "is_decoder": False,
}
FIXED = {
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "is_decoder": False,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
LAYOUTS = ("geneformer_v2", "geneformer_v1")
TOKENS, MEDIANS, SYMBOLS = "token_dictionary", "gene_median_dictionary", "gene_name_id_dict"
WHERE = (
    "Name the folder that holds them with --dictionaries: in the published repository that is geneformer/ for V2 "
    "models and geneformer/gene_dictionaries_30m/ for V1. Each series has its own."
)


def name_map(num_layers: int) -> dict[str, str]:
    """Our tensor name → the name in `BertForMaskedLM`, for a "post"-norm encoder of so many layers."""
    layers = {
        f"transformer.blocks.{layer}.{ours}.{kind}": f"bert.encoder.layer.{layer}.{theirs}.{kind}"
        for layer in range(num_layers)
        for ours, theirs in LAYER_NAMES.items()
        for kind in ("weight", "bias")
    }
    return NAMES | layers


def to_bert(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Our weights under BERT's names (without the tied decoder)."""
    renamed = {theirs: state[ours] for ours, theirs in name_map(num_layers).items()}
    genes = state["embedding.tokens.weight"]
    return renamed | {TOKEN_TYPES: torch.zeros(2, genes.shape[1], dtype=genes.dtype, device=genes.device)}


def from_bert(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """BERT's weights under our names.

    Raises
    ------
    ModelError
        If a tensor is missing or left over; they are listed.
    """
    names = name_map(num_layers)
    what = f"a Geneformer (BertForMaskedLM) with {num_layers} layers"
    require_same_keys(set(names.values()), set(state), REDUNDANT | {TOKEN_TYPES}, what)
    renamed = {ours: state[theirs] for ours, theirs in names.items()}
    if TOKEN_TYPES in state:
        shapes = [tuple(state[name].shape) for name in (TOKEN_TYPES, NAMES["embedding.ranks.weight"])]
        if not all(len(shape) == 2 and shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
            raise ModelError(
                f"{TOKEN_TYPES} has the shape {shapes[0]}, and the ranks, which it is added to, {shapes[1]}."
            )
        renamed["embedding.ranks.weight"] = renamed["embedding.ranks.weight"] + state[TOKEN_TYPES][0]
    return renamed


def read_published(folder: Path, dictionaries: Path | None = None) -> ModelBundle:
    """A published Geneformer as a model of ours; its token ids stay what they are.

    Parameters
    ----------
    folder
        Holds config.json and model.safetensors or pytorch_model.bin.
    dictionaries
        Folder with token_dictionary*, gene_median_dictionary* and, if there is one, gene_name_id_dict* (.pkl or
        .json); None: `folder` itself.

    Raises
    ------
    ModelError
        If files are missing, damaged, not a Geneformer's, or do not belong together.
    """
    settings = _read_settings(folder)
    vocab, token_file, median_file = read_dictionaries(folder if dictionaries is None else dictionaries)
    if vocab.n_tokens != settings["vocab_size"]:
        raise ModelError(
            f"'{token_file}' has {vocab.n_tokens:,} tokens and the model in '{folder}' {settings['vocab_size']:,}: "
            f"they belong to different models. {WHERE}"
        )
    config = config_from(_config(settings, vocab, token_file, median_file), folder / "config.json")
    weights = next(
        (path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()),
        None,
    )
    if weights is None:
        raise ModelError(f"'{folder}' has no weights: neither model.safetensors nor pytorch_model.bin.")
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(weights).items()
    }
    ours = from_bert(state, config.model.num_layers)
    for tied, source in TIED.items():
        if tied in state and not torch.equal(state[tied], state[source]):
            raise ModelError(
                f"'{weights}': {tied} is not equal to {source}. Ours is the published architecture, whose output "
                "matrix is the gene embedding; this model cannot be held by it."
            )
    return assemble(config, vocab, None, {f"model.{k}": v for k, v in ours.items()}, str(weights))


def _read_settings(folder: Path) -> dict[str, Any]:
    """config.json with BERT's defaults filled in, if it is one of a Geneformer."""
    path = folder / "config.json"
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("model_type", "bert") != "bert":
        raise ModelError(f"'{path}' does not describe a BERT, which every Geneformer is.")
    kinds = settings.get("architectures") or ["BertForMaskedLM"]
    if kinds != ["BertForMaskedLM"]:
        names = ", ".join(map(str, kinds)) if isinstance(kinds, list) else str(kinds)
        raise ModelError(
            f"'{path}' describes a {names}; a pretrained Geneformer is a BertForMaskedLM. A model "
            "that was fine-tuned by Geneformer's own code has lost the head that pretraining needs."
        )
    settings = BERT_DEFAULTS | settings
    if missing := [key for key in SIZES if not isinstance(settings.get(key), int)]:
        raise ModelError(f"'{path}' does not say {', '.join(missing)}.")
    wrong = [
        f"{key} is {settings[key]!r}, not {value!r}" for key, value in FIXED.items() if settings[key] != value
    ]
    if settings["hidden_act"] not in ("relu", "gelu"):
        wrong.append(f"hidden_act is {settings['hidden_act']!r}, not relu or gelu")
    if wrong:
        raise ModelError(f"'{path}' describes a BERT that no Geneformer is: {'; '.join(wrong)}.")
    return settings


def _config(
    settings: dict[str, Any], vocab: GeneVocab, token_file: Path, median_file: Path
) -> dict[str, Any]:
    with_cls = "<cls>" in vocab.special_tokens
    layout = next(name for name in LAYOUTS if VOCAB_LAYOUTS[name] == vocab.special_tokens)
    return {
        "data": {"gene_vocab": str(token_file)},
        "tokenizer": {
            "strategy": "rank_value",
            "max_genes": settings["max_position_embeddings"],
            "vocab_layout": layout,
            "prepend_cls": with_cls,
            "append_eos": with_cls,
            "gene_medians": str(median_file),
            "masking": {"mask_ratio": 0.15, "reference": True},
        },
        "model": {
            "architecture": "transformer_encoder",
            "pretraining_task": "masked_gene_prediction",
            "hidden_dim": settings["hidden_size"],
            "num_layers": settings["num_hidden_layers"],
            "num_heads": settings["num_attention_heads"],
            "ffn_dim": settings["intermediate_size"],
            "dropout": settings["hidden_dropout_prob"],
            "attention_dropout": settings["attention_probs_dropout_prob"],
            "activation": settings["hidden_act"],
            "norm": "post",
            "layer_norm_eps": settings["layer_norm_eps"],
            "pooling": "cls" if with_cls else "mean",
        },
    }


# --- dictionaries ---------------------------------------------------------------------------------


def read_dictionaries(folder: Path) -> tuple[GeneVocab, Path, Path]:
    """The vocabulary with its medians, and the files of tokens and medians.

    Raises
    ------
    ModelError
        If there is none or more than one, or its content is not that of a Geneformer.
    """
    found = sorted(path for end in ("pkl", "json") for path in folder.glob(f"{TOKENS}*.{end}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        problem = f"holds several: {names}" if found else f"has no {TOKENS}*.pkl and no {TOKENS}*.json"
        raise ModelError(f"'{folder}' {problem}. {WHERE}")
    token_file = found[0]
    series = token_file.name.removeprefix(TOKENS)  # such as _gc104M.pkl: the same in all its dictionaries
    median_file, symbol_file = folder / f"{MEDIANS}{series}", folder / f"{SYMBOLS}{series}"
    if not median_file.is_file():
        raise ModelError(
            f"'{folder}' has {token_file.name}, but no {median_file.name}: without the medians of its genes a "
            "Geneformer ranks them wrongly."
        )
    special_tokens, gene_ids = _tokens(token_file)
    medians = _numbers(median_file)
    by_gene = np.array([medians.get(gene, np.nan) for gene in gene_ids], dtype=np.float64)
    if not (by_gene[~np.isnan(by_gene)] > 0).all() or np.isinf(by_gene).any():
        raise ModelError(f"'{median_file}' has medians that are not positive and finite.")
    if (n_without := int(np.isnan(by_gene).sum())) == len(gene_ids):
        raise ModelError(f"'{median_file}' has no median for any gene of '{token_file}'. {WHERE}")
    if n_without:
        log.warning(
            "%s of %s genes have no median: they are left out of the input.", f"{n_without:,}", len(gene_ids)
        )
    known = known_genes()[["symbol", "biotype"]].reindex(gene_ids).fillna("")
    symbols = known["symbol"].to_numpy(object)
    if symbol_file.is_file():
        own = {gene: symbol for symbol, gene in reversed(_strings(symbol_file).items())}
        symbols = np.array(
            [s or own.get(g, "") for s, g in zip(symbols, gene_ids, strict=True)], dtype=object
        )
    vocab = GeneVocab(
        gene_ids=gene_ids,
        symbols=symbols,
        biotypes=known["biotype"].to_numpy(object),
        species=species_of(gene_ids),
        medians=by_gene,
        special_tokens=special_tokens,
        name=token_file.stem,
    )
    return vocab, token_file, median_file


def _tokens(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Special tokens and gene ids, both in the order of their numbers."""
    table = _numbers(path)
    names = sorted(table, key=table.__getitem__)
    if [table[name] for name in names] != list(range(len(names))):
        raise ModelError(f"'{path}' does not number its tokens 0, 1, 2, … without gaps and repeats.")
    special = tuple(name for name in names if name.startswith("<"))
    if special not in [VOCAB_LAYOUTS[name] for name in LAYOUTS] or tuple(names[: len(special)]) != special:
        raise ModelError(
            f"'{path}' has the special tokens {' '.join(special) or '(none)'}; a Geneformer begins with <pad> <mask> "
            "(V1) or <pad> <mask> <cls> <eos> (V2), and then come the genes."
        )
    if len(names) == len(special):
        raise ModelError(f"'{path}' has no genes.")
    return special, np.array(names[len(special) :], dtype=object)


def _read_table(path: Path) -> dict[str, Any]:
    table = read_pickle(path) if path.suffix == ".pkl" else read_json(path)
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ModelError(f"'{path}' is not a dictionary with names as keys.")
    return table


def _numbers(path: Path) -> dict[str, float]:
    table = _read_table(path)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in table.values()):
        raise ModelError(f"'{path}' must give a number for each name.")
    return table


def _strings(path: Path) -> dict[str, str]:
    return {name: gene for name, gene in _read_table(path).items() if isinstance(gene, str)}


# --- the way out ----------------------------------------------------------------------------------


def write_published(bundle: ModelBundle, folder: Path) -> None:
    """Write config.json and model.safetensors as `BertForMaskedLM` does, and the dictionaries as JSON.

    Raises
    ------
    ModelError
        If a BERT cannot hold the model; what does not fit is listed. Nothing is written then.
    """
    model, tokenizer, vocab = bundle.config.model, bundle.config.tokenizer, bundle.vocab
    needed = {
        "tokenizer.strategy": (tokenizer.strategy, "rank_value"),
        "tokenizer.obs_tokens": (tokenizer.obs_tokens, []),
        "model.architecture": (model.architecture, "transformer_encoder"),
        "model.pretraining_task": (model.pretraining_task, "masked_gene_prediction"),
        "model.norm": (model.norm, "post"),
        "model.final_norm": (bool(model.final_norm), False),
        "model.qk_norm": (model.qk_norm, False),
        "model.bias": (model.bias, True),
        "model.soft_cap": (model.soft_cap, None),
        "model.gene_head": (model.gene_head, "tied"),
        "model.gene_embedding_dim": (model.gene_embedding_dim, None),
        "the token of <pad>": (vocab.pad_id, 0),
    }
    wrong = [f"{key} is {have!r}, not {want!r}" for key, (have, want) in needed.items() if have != want]
    state = bundle.model.state_dict()
    if left_over := sorted(state.keys() - name_map(model.num_layers).keys()):
        wrong.append(f"it has {', '.join(left_over[:5])}")
    if wrong:
        raise ModelError("This model is no BERT, as which it should be exported:\n  " + "\n  ".join(wrong))
    if bundle.labels is not None:
        log.warning(
            "The head that predicts '%s' is not exported: BertForMaskedLM has none.", bundle.labels.key
        )
    settings = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": vocab.n_tokens,
        "hidden_size": model.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.feed_forward_dim,
        "hidden_act": model.activation,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "max_position_embeddings": tokenizer.max_genes,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": model.layer_norm_eps,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }
    weights = {name: tensor.cpu().contiguous() for name, tensor in to_bert(state, model.num_layers).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", settings)
    names = [*vocab.special_tokens, *vocab.gene_ids]
    _write_json(folder / f"{TOKENS}.json", {name: token for token, name in enumerate(names)})
    if vocab.medians is not None:
        known = np.flatnonzero(~np.isnan(vocab.medians))
        _write_json(folder / f"{MEDIANS}.json", {vocab.gene_ids[g]: float(vocab.medians[g]) for g in known})
    named = zip(vocab.symbols, vocab.gene_ids, strict=True)
    _write_json(folder / f"{SYMBOLS}.json", {symbol: gene for symbol, gene in named if symbol})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
