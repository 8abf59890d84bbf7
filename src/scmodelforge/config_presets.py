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
    rounding
        How far from the exact number `n_parameters` may be, as published; None: not confirmed, `note` says why.
    note
        What the number leaves open, and what differs from the published model.
    """

    settings: dict[str, Any] = field(repr=False)
    n_genes: int
    n_parameters: int
    rounding: int | None = 0
    note: str = ""


def _geneformer(layout: str, max_genes: int, width: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    v2 = layout == "geneformer_v2"
    return {
        "tokenizer": {
            "strategy": "rank_value",
            "max_genes": max_genes,
            "vocab_layout": layout,
            "prepend_cls": v2,
            "append_eos": v2,
            "masking": {"mask_ratio": 0.15, "reference": True},
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


_V1, _V2 = ("geneformer_v1", 2048), ("geneformer_v2", 4096)

SCGPT: dict[str, Any] = {
    "data": {"preprocessing": {"normalize": "none", "log1p": False}},
    "tokenizer": {
        "strategy": "binned_expression",
        "n_bins": 51,
        "max_genes": 1200,
        "vocab_layout": "scgpt",
        "prepend_cls": True,
        "append_eos": False,
        "cls_value": -2.0,
    },
    "model": {
        "architecture": "autoregressive_transformer",
        "pretraining_task": "expression_reconstruction",
        "hidden_dim": 512,
        "num_layers": 12,
        "num_heads": 8,
        "ffn_dim": 512,
        "dropout": 0.2,
        "attention_dropout": 0.2,
        "activation": "relu",
        "norm": "post",
        "layer_norm_eps": 1e-5,
        "value_embedding": "continuous",
        "pooling": "cls",
        "normalize_embedding": True,
        "objective": {"cell_weight": 1.0, "second_pass_weight": 1.0, "reference": True},
    },
}


def _transcriptformer(gene_head_dim: int) -> dict[str, Any]:
    return {
        "data": {"preprocessing": {"normalize": "none", "log1p": False}},
        "tokenizer": {
            "strategy": "continuous_projection",
            "max_genes": 2048,  # <cls> and 2,047 genes, of which the last is only predicted
            "vocab_layout": "transcriptformer",
            "prepend_cls": True,
            "append_eos": False,
            "gene_order": "random",
            "overlong": "first",
            "max_value": 30.0,
            "obs_tokens": ["assay"],
        },
        "model": {
            "architecture": "autoregressive_transformer",
            "pretraining_task": "dual_prediction",
            "hidden_dim": 2048,
            "num_layers": 12,
            "num_heads": 16,
            "ffn_dim": 2048,
            "dropout": 0.1,
            "activation": "gelu",
            "norm": "normed_residual",
            "layer_norm_eps": 1e-5,
            "bias": False,
            "soft_cap": 10.0,
            "count_bias": True,
            "embedding_norm": False,
            "gene_embedding_dim": 2560,
            "gene_head": "mlp",
            "gene_head_dim": gene_head_dim,
            "pooling": "window",
            "objective": {"value_loss": "zero_truncated_poisson", "reference": True},
        },
    }


SCFOUNDATION: dict[str, Any] = {
    "data": {"preprocessing": {"normalize": "library_size", "target_sum": 10_000, "log1p": True}},
    "tokenizer": {
        "strategy": "continuous_projection",
        "max_genes": 15_000,
        "prepend_cls": False,
        "append_eos": False,
        "masking": {"mask_ratio": 0.3},
    },
    "model": {
        "architecture": "masked_autoencoder",
        "pretraining_task": "expression_reconstruction",
        "hidden_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "ffn_dim": 3072,
        "activation": "relu",
        "norm": "post",
        "final_norm": True,
        "layer_norm_eps": 1e-5,
        "value_embedding": "soft_bins",
        "soft_bins": 100,
        "decoder": {"hidden_dim": 512, "num_layers": 6, "num_heads": 8},
        "objective": {"zero_mask_ratio": 0.03},
    },
}

_ASSAYS = "published to a tenth of a million, trained and frozen apart; the number of its assays is not"

PRESETS: dict[str, Preset] = {
    "geneformer-v1-10m": Preset(_geneformer(*_V1, 256, 6, 4, 512), 25_424, 10_288_722),
    "geneformer-v1-40m": Preset(_geneformer(*_V1, 512, 12, 8, 1024), 25_424, 39_591_250),
    "geneformer-12l-38m": Preset(_geneformer(*_V2, 512, 12, 8, 1024), 20_271, 37_997_363),
    "geneformer-20l-151m": Preset(
        _geneformer(*_V2, 896, 20, 14, 1792),
        20_271,
        151_313_459,
        note="14 attention heads follow from a width of 64 each; they do not change the number of parameters",
    ),
    "geneformer-v2-104m": Preset(_geneformer(*_V2, 768, 12, 12, 3072), 20_271, 104_386_867),
    "geneformer-v2-316m": Preset(_geneformer(*_V2, 1152, 18, 18, 4608), 20_271, 316_354_867),
    "scgpt-human": Preset(
        SCGPT,
        60_694,
        51_330_049,
        note="ours has a vector for <mask> too, which scGPT's vocabulary lacks: 512 parameters more",
    ),
    "transcriptformer-sapiens": Preset(_transcriptformer(2048), 23_822, 429_800_000, 100_000, _ASSAYS),
    "transcriptformer-metazoa": Preset(_transcriptformer(512), 247_381, 1_077_200_000, 100_000, _ASSAYS),
    "transcriptformer-exemplar": Preset(
        _transcriptformer(2048),
        110_283,
        824_300_000,
        None,
        "not confirmed: published as 542 M trained parameters, and these settings give 546 M; take gene_head_dim from "
        "the config.json of the published folder",
    ),
    "scfoundation": Preset(
        SCFOUNDATION,
        19_264,
        100_000_000,
        None,
        "not confirmed: published as 100 M; these settings have its encoder, and a plain transformer where its decoder "
        "is a Performer, and none of its two tokens for the library size",
    ),
}
