"""Published models by name: the settings that give their size and arithmetic.

`n_parameters` is what the published checkpoint holds, tied weights once. Sources are named per family in
docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes
    ----------
    settings
        The part of a config that it sets; keys that the user writes win.
    n_genes
        Genes in its vocabulary.
    n_parameters
        Parameters of the published checkpoint, trained and frozen.
    """

    settings: dict[str, Any] = field(repr=False)
    n_genes: int
    n_parameters: int


def _geneformer(layout: str, max_genes: int, width: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    v2 = layout == "geneformer_v2"
    return {
        "tokenizer": {
            "strategy": "rank_value",
            "max_genes": max_genes,
            "vocab_layout": layout,
            "prepend_cls": v2,
            "append_eos": v2,
        },
        "model": {
            "architecture": "transformer_encoder",
            "pretraining_task": "masked_gene_prediction",
            "hidden_dim": width,
            "num_layers": layers,
            "num_heads": heads,
            "ffn_dim": ffn,
            "dropout": 0.02,
            "attention_dropout": 0.02,
            "activation": "relu",
            "norm": "post",
            "layer_norm_eps": 1e-12,
            "pooling": "cls" if v2 else "mean",
        },
    }


PRESETS: dict[str, Preset] = {
    "geneformer-v1-10m": Preset(_geneformer("geneformer_v1", 2048, 256, 6, 4, 512), 25_424, 10_288_722),
}
