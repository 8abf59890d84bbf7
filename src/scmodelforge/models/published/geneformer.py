"""Geneformer's weights are those of `transformers.BertForMaskedLM`: names in both directions.

BERT adds a token-type embedding (row 0 everywhere in Geneformer) to the position embedding; ours has none,
so row 0 is folded into the rank embedding on the way in, and is zero on the way out.
"""

from __future__ import annotations

import torch

from scmodelforge.errors import ModelError

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
REDUNDANT = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"}


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
    width = state["embedding.tokens.weight"].shape[1]
    return renamed | {TOKEN_TYPES: torch.zeros(2, width, dtype=state["embedding.tokens.weight"].dtype)}


def from_bert(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """BERT's weights under our names.

    Raises
    ------
    ModelError
        If a tensor is missing or left over; they are listed.
    """
    names = name_map(num_layers)
    missing = sorted(set(names.values()) - state.keys())
    left_over = sorted(state.keys() - set(names.values()) - REDUNDANT - {TOKEN_TYPES})
    if missing or left_over:
        raise ModelError(
            "These weights are not those of a Geneformer (BertForMaskedLM) with "
            f"{num_layers} layers.\n  missing: {missing[:10]}\n  left over: {left_over[:10]}"
        )
    renamed = {ours: state[theirs] for ours, theirs in names.items()}
    if TOKEN_TYPES in state:
        renamed["embedding.ranks.weight"] = renamed["embedding.ranks.weight"] + state[TOKEN_TYPES][0]
    return renamed
