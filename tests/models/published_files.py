"""Tiny folders as the authors of published models write them."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.models.published import export_model
from tests.helpers import make_vocab

TINY = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "gene_head_dim": 12}
GENES = [f"ENSG{i:011d}" for i in range(40)]  # those of helpers.marker_cells
SPECIALS = {"v1": ["<pad>", "<mask>"], "v2": ["<pad>", "<mask>", "<cls>", "<eos>"]}
SERIES = {"v1": "", "v2": "_gc104M"}


def geneformer_folder(
    folder: Path, version: str = "v2", *, weights: str = "model.safetensors", dictionaries: Path | None = None
) -> torch.nn.Module:
    """Write a tiny Geneformer with random weights through transformers; returns it in evaluation mode."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    dictionaries = dictionaries or folder
    dictionaries.mkdir(parents=True, exist_ok=True)
    tokens = {name: np.int16(token) for token, name in enumerate([*SPECIALS[version], *GENES])}
    shuffled = dict(
        np.random.default_rng(0).permutation(np.array(list(tokens.items()), dtype=object)).tolist()
    )
    medians = {gene: np.float64(0.5 + i / 10) for i, gene in enumerate(GENES)}
    names = {f"SYM{i}": gene for i, gene in enumerate(GENES)}
    for stem, table in (
        ("token_dictionary", shuffled),
        ("gene_median_dictionary", medians),
        ("gene_name_id_dict", names),
    ):
        (dictionaries / f"{stem}{SERIES[version]}.pkl").write_bytes(pickle.dumps(table, protocol=4))
    torch.manual_seed(1)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_act="relu",
            hidden_dropout_prob=0.02,
            attention_probs_dropout_prob=0.02,
            max_position_embeddings=32,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.normal_(std=0.3)
    if weights == "model.safetensors":
        bert.save_pretrained(folder)
    else:  # as transformers did for V1: tied matrices and position ids are in the file
        state = dict(bert.state_dict())
        state["bert.embeddings.position_ids"] = torch.arange(32)[None]
        torch.save(state, folder / weights)
        (folder / "config.json").write_text(json.dumps(bert.config.to_dict()))
    return bert


def preset_folder(folder: Path, preset: str, **model: object) -> None:
    """Write a tiny model of a preset, with random weights, as the authors of its family do."""
    config = Config.model_validate(
        {"model": {"preset": preset} | TINY | model, "tokenizer": {"max_genes": 32}}
    )
    vocab = make_vocab(40, layout=config.tokenizer.vocab_layout)
    vocab = replace(vocab, symbols=vocab.gene_ids)  # scGPT knows genes by one name
    vocab = vocab.with_obs_categories({column: ["10x"] for column in config.obs_columns})
    bundle = ModelBundle(config, vocab, build_model(config, vocab, seed=1).eval())
    export_model(bundle, preset.partition("-")[0], folder)
