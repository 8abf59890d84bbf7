"""Small vocabularies and cells that several tests build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scmodelforge.config import Config, DataConfig, Masking, Preprocessing, TokenizerConfig
from scmodelforge.data.batch import CellBatch, MeasuredGenes
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab
from scmodelforge.models.bundle import Labels, ModelBundle, build_head, build_model
from scmodelforge.models.objectives.masked import MaskedPrediction
from scmodelforge.tokenizers.rank_value import RankValueTokenizer


def make_vocab(n_genes: int, medians: np.ndarray | None = None, layout: str = "geneformer_v2") -> GeneVocab:
    """A vocabulary of invented human genes, in ascending order of id."""
    ids = np.array([f"ENSG{i:011d}" for i in range(n_genes)], dtype=object)
    return GeneVocab(
        gene_ids=ids,
        symbols=np.array([f"G{i}" for i in range(n_genes)], dtype=object),
        biotypes=np.full(n_genes, "protein_coding", dtype=object),
        species="human",
        medians=medians,
        special_tokens=VOCAB_LAYOUTS[layout],
        name="test",
    )


def make_cells(
    counts: np.ndarray,
    unmatched: np.ndarray | None = None,
    first_row: int = 0,
    measured: np.ndarray | None = None,
) -> CellBatch:
    """A batch from dense counts (n_cells, n_genes); `unmatched`: counts of genes outside the vocabulary.

    `measured`: bool of the same shape.
    """
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    total = counts.sum(axis=1) + (0 if unmatched is None else unmatched)
    return CellBatch(
        indptr=matrix.indptr.astype(np.int64),
        gene_ids=matrix.indices.astype(np.int32),
        counts=matrix.data,
        library_size=total.astype(np.float32),
        cell_index=np.arange(first_row, first_row + len(counts), dtype=np.int64),
        measured=None if measured is None else MeasuredGenes(measured, np.arange(len(counts))),
    )


MARKERS = {"B": range(0, 6), "NK": range(6, 12), "T": range(12, 18)}


def marker_cells(n_cells: int = 240, seed: int = 0) -> ad.AnnData:
    """Cells of three types with six marker genes each, among 40 genes; a label and a number can be learned.

    obs: `cell_type` (by the markers), `donor` (four), and `age` in years (20 to 80), which moves counts from
    the last six genes to the six before them.
    """
    rng = np.random.default_rng(seed)
    rates = np.full((n_cells, 40), 1.0)
    cell_type = rng.choice(list(MARKERS), n_cells)
    for name, genes in MARKERS.items():
        rates[:, genes] = np.where(cell_type == name, 5.0, 0.02)[:, None]
    age = rng.uniform(20, 80, n_cells)
    share = ((age - 20) / 60)[:, None]
    rates[:, 28:34], rates[:, 34:40] = 4 * share, 4 * (1 - share)
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rates).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(cell_type),
                "donor": pd.Categorical([f"d{i % 4}" for i in range(n_cells)]),
                "age": age,
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(40)]),
    )


def tiny_config(run_dir: Path, **sections: dict[str, Any]) -> Config:
    """A model that trains in seconds on `marker_cells`; `sections` are laid over, key by key."""
    tree: dict[str, Any] = {
        "data": {"gene_vocab": "from_data", "split": {"val_split": 0.25}},
        "tokenizer": {"max_genes": 32},
        "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "dropout": 0.0},
        "training": {
            "batch_size": 30,
            "max_epochs": 2,
            "num_gpus": 0,
            "log_every_n_steps": 2,
            "run_dir": str(run_dir),
            "optimizer": {"lr": 1e-2},
        },
    }
    return Config.model_validate(_over(tree, sections))


def _over(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _over(tree[key], value) for key, value in changes.items() if isinstance(tree.get(key), dict)
    }
    return tree | changes | nested


def finetune_config(run_dir: Path, training: dict[str, Any] | None = None, **finetune: Any) -> Config:
    """As `tiny_config`, without the sections that the checkpoint brings."""
    sections = tiny_config(run_dir, training={"max_epochs": 4} | (training or {})).model_dump()
    return Config.model_validate(
        {
            "data": {"split": sections["data"]["split"]},
            "training": sections["training"],
            "finetune": finetune,
        }
    )


def rank_tokenizer(
    tokenizer: TokenizerConfig, preprocessing: Preprocessing, vocab: GeneVocab
) -> RankValueTokenizer:
    """A rank value tokenizer of two sections of a config."""
    return RankValueTokenizer(
        Config(tokenizer=tokenizer, data=DataConfig(preprocessing=preprocessing)), vocab
    )


def masked_genes(masking: Masking, vocab: GeneVocab) -> MaskedPrediction:
    """Masked gene prediction on rank tokens."""
    return MaskedPrediction(Config(tokenizer=TokenizerConfig(masking=masking)), vocab)


def untrained_annotator(**sections: Any) -> ModelBundle:
    """A tiny model of the 40 genes of `marker_cells` with a head for their cell types, always the same."""
    config = tiny_config(Path("nowhere"), **sections)
    vocab, labels = make_vocab(40), Labels("cell_type", "classification", tuple(MARKERS))
    model, head = build_model(config, vocab, seed=0), build_head(config, labels, seed=0)
    return ModelBundle(config, vocab, model.eval(), labels, head.eval())
