"""Using a trained model: embeddings and labels for cells of a store or an AnnData, and what a cell becomes.

Results come in the order of the cells, and do not depend on the batch that a cell came with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

import scmodelforge
from scmodelforge.config import Config, DataConfig
from scmodelforge.data.sources import Source, located, open_matrix
from scmodelforge.data.species import species_of_matrices
from scmodelforge.data.store import CellStore, obs_categories, open_store
from scmodelforge.errors import DataError, ModelError, UserError
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, read_medians, resolve_vocab
from scmodelforge.inference_batches import (
    Computed,
    compute_cells,
    default_device,
    precision_for,
    warn_of_empty,
)
from scmodelforge.models.bundle import Labels, ModelBundle, load_model, with_model_of
from scmodelforge.models.heads import PredictionHead
from scmodelforge.tokenizers.base import build_tokenizer

log = logging.getLogger(__name__)

EMBEDDING_KEY = "X_scmodelforge"
PROVENANCE_KEY = "scmodelforge"  # in uns


def as_bundle(model: ModelBundle | str | Path) -> ModelBundle:
    """A loaded model, from itself or from the path of a checkpoint or model folder."""
    return model if isinstance(model, ModelBundle) else load_model(model)


def bundle_for(model: ModelBundle | str | Path, config: Config | None) -> ModelBundle:
    """A loaded model that `config` does not contradict."""
    bundle = as_bundle(model)
    if config is not None:
        with_model_of(config, bundle, "memory" if isinstance(model, ModelBundle) else str(model))
    return bundle


def open_for(bundle: ModelBundle, data: Source | list[Source], config: DataConfig | None = None) -> CellStore:
    """Open cells in the model's gene space.

    Parameters
    ----------
    config
        Where counts and gene ids are, and whose (`layer`, `gene_column`, `species`, `min_gene_overlap`); the rest
        is the model's.

    Raises
    ------
    DataError
        If the file, its counts or its genes cannot be used with this model.
    """
    if config is not None and config.extend_vocab is not None:
        log.warning("data.extend_vocab has no effect here: genes are added to a model by train and finetune.")
    sources = data if isinstance(data, list) else [data]
    selected = bundle.config.data.preprocessing.hvg is not None
    return open_store(sources, bundle.vocab, config or DataConfig(), selected_genes=selected, of_model=True)


def embed_store(
    bundle: ModelBundle,
    store: CellStore,
    batch_size: int = 256,
    pooling: str | None = None,
    device: str | None = None,
    rows: np.ndarray | None = None,
    precision: str | None = None,
) -> np.ndarray:
    """Embed cells of a store: all of them, or the given rows; float32 (n_cells, hidden_dim) in that order.

    `precision` is "32", "bf16" or "bf16-true"; None: bf16 on a GPU that has it, else 32.
    """
    rows = np.arange(store.n_cells) if rows is None else rows
    embeddings = np.empty((len(rows), bundle.model.hidden_dim), dtype=np.float32)
    done, n_empty = 0, 0
    for part in embeddings_of(bundle, store, rows, batch_size, pooling, device, precision):
        embeddings[done : done + len(part.values)] = part.values
        done, n_empty = done + len(part.values), n_empty + part.n_empty
    warn_of_empty(n_empty, "embedding")
    return embeddings


def embeddings_of(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    batch_size: int = 256,
    pooling: str | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Iterator[Computed]:
    """As `embed_store`, some cells at a time.

    Raises
    ------
    UserError
        If there is no such pooling or precision, or a cell alone does not fit into the memory.
    """
    if pooling not in (None, "mean", "cls", "window"):
        raise UserError(f"pooling is '{pooling}'; it must be mean, cls or window.")
    device = device or default_device()
    precision = precision_for(precision, device)
    model = bundle.model.to(device).eval()
    if (pooling or model.pooling) == "cls" and not bundle.config.tokenizer.prepend_cls:
        log.warning("pooling cls: this model has no <cls> token, so the first gene's hidden state is taken.")
    return compute_cells(
        bundle,
        store,
        rows,
        lambda tokens: model.encode(tokens, pooling),
        batch_size=batch_size,
        device=device,
        precision=precision,
    )


def provenance(
    bundle: ModelBundle, store: CellStore, pooling: str | None, precision: str | None
) -> dict[str, str | float]:
    """Where an embedding came from, for `uns["scmodelforge"][KEY]`: plain values that any file of AnnData can hold.

    Returns
    -------
    dict
        `model` (path or address), `model_sha256` (of weights, vocabulary, labels and tokenizer), `version` (of
        scModelForge), `vocabulary_sha256`, `pooling`, `precision`, `genes_matched` (share of the data's genes that the
        vocabulary has) and `vocabulary_measured` (share of the vocabulary that the data measured).
    """
    return {
        "model": bundle.source or "in memory",
        "model_sha256": bundle.sha256(),
        "version": scmodelforge.__version__,
        "vocabulary_sha256": bundle.vocab.fingerprint,
        "pooling": pooling or bundle.model.pooling,
        "precision": precision_for(precision, default_device()),
        "genes_matched": store.matched_share,
        "vocabulary_measured": store.measured_share,
    }


def predict_store(
    bundle: ModelBundle,
    store: CellStore,
    batch_size: int = 256,
    device: str | None = None,
    precision: str | None = None,
) -> pd.DataFrame:
    """Predict the labels of all cells of a store with a fine-tuned model.

    Returns
    -------
    DataFrame in the store's order with columns `scmodelforge_LABEL` and, for classes,
    `scmodelforge_LABEL_probability` (of the predicted class). Regression is in the label's own units.

    Raises
    ------
    ModelError
        If the model was not fine-tuned.
    UserError
        If there is no such precision, or a cell alone does not fit into the memory.
    """
    parts = list(outputs_of(bundle, store, np.arange(store.n_cells), batch_size, device, precision))
    warn_of_empty(sum(part.n_empty for part in parts), "label")
    return labels_of(bundle, np.concatenate([part.values for part in parts]), store.obs.index)


def outputs_of(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    batch_size: int = 256,
    device: str | None = None,
    precision: str | None = None,
) -> Iterator[Computed]:
    """What `labels_of` makes labels of, some cells at a time: number of the class and its probability, or the value."""
    labels, head = require_labels(bundle)
    device = device or default_device()
    precision = precision_for(precision, device)
    model, head = bundle.model.to(device).eval(), head.to(device).eval()
    return compute_cells(
        bundle,
        store,
        rows,
        lambda tokens: head_outputs(labels, head, model.encode(tokens)),
        batch_size=batch_size,
        device=device,
        precision=precision,
    )


def head_outputs(labels: Labels, head: PredictionHead, embedding: torch.Tensor) -> torch.Tensor:
    """What `labels_of` makes labels of, from embeddings (n_cells, hidden_dim)."""
    output = head(embedding).float()
    if labels.task == "regression":
        return output
    probability, number = output.softmax(dim=1).max(dim=1)
    return torch.stack([number.float(), probability], dim=1)


def labels_of(bundle: ModelBundle, outputs: np.ndarray, index: pd.Index) -> pd.DataFrame:
    """The columns that `predict_store` returns, of what the model gave for each cell (`outputs_of`)."""
    labels, _ = require_labels(bundle)
    name = f"scmodelforge_{labels.key}"
    if labels.task == "regression":
        return pd.DataFrame({name: outputs[:, 0] * labels.std + labels.mean}, index=index)
    numbers, probabilities = outputs[:, 0].astype(np.int64), outputs[:, 1].copy()
    predicted = pd.Categorical.from_codes(numbers.tolist(), categories=pd.Index(labels.classes))
    return pd.DataFrame({name: predicted, f"{name}_probability": probabilities}, index=index)


def require_labels(bundle: ModelBundle) -> tuple[Labels, PredictionHead]:
    """Labels and head of a fine-tuned model.

    Raises
    ------
    ModelError
        If the model was not fine-tuned.
    """
    if bundle.labels is None or bundle.head is None:
        raise ModelError(
            "This model was not fine-tuned, so it knows no labels.\nFine-tune it first: scmodelforge finetune"
        )
    return bundle.labels, bundle.head


def embed(
    data: AnnData,
    model: ModelBundle | str | Path,
    *,
    key_added: str = EMBEDDING_KEY,
    batch_size: int = 256,
    pooling: str | None = None,
    precision: str | None = None,
    config: DataConfig | None = None,
    copy: bool = False,
) -> AnnData:
    """Embed the cells of an AnnData into `obsm[key_added]`; `uns["scmodelforge"][key_added]` says where it came from.

    Parameters
    ----------
    data
        Cells with raw counts.
    model
        A loaded model, a checkpoint or a model folder.
    pooling
        "mean" over genes, "cls" or "window"; None: as the model is set.
    batch_size
        Most cells of a batch; long cells come in smaller ones.
    precision
        "32", "bf16" or "bf16-true"; None: bf16 on a GPU that has it, else 32.
    config
        Where the counts are, if not in X (`DataConfig(layer="counts")`).
    copy
        Return a copy instead of changing `data`.

    Returns
    -------
    The AnnData with float32 (n_cells, hidden_dim) in `obsm[key_added]`, and its `provenance` in `uns`.
    """
    bundle = as_bundle(model)
    adata = data.copy() if copy else data
    store = open_for(bundle, data, config)
    adata.obsm[key_added] = embed_store(bundle, store, batch_size, pooling, precision=precision)
    record = provenance(bundle, store, pooling, precision)
    adata.uns[PROVENANCE_KEY] = {**adata.uns.get(PROVENANCE_KEY, {}), key_added: record}
    return adata


def annotate(
    data: AnnData,
    model: ModelBundle | str | Path,
    *,
    batch_size: int = 256,
    precision: str | None = None,
    config: DataConfig | None = None,
    copy: bool = False,
) -> AnnData:
    """Write the labels that a fine-tuned model predicts into `obs`; see `predict_store` for the columns."""
    bundle = as_bundle(model)
    adata = data.copy() if copy else data
    store = open_for(bundle, data, config)
    for name, column in predict_store(bundle, store, batch_size, precision=precision).items():
        adata.obs[name] = column.to_numpy() if column.dtype != "category" else pd.Categorical(column)
    return adata


def tokens(
    data: AnnData | str | Path,
    cell: str | int = 0,
    *,
    model: ModelBundle | str | Path | None = None,
    config: Config | None = None,
) -> pd.DataFrame:
    """What one cell becomes: one row a token, see `Tokenizer.explain`.

    Parameters
    ----------
    cell
        Row number, or name in `obs_names`.
    model
        Use this model's vocabulary and tokenizer; None: those of `config`. What would come from training cells
        is not known then: genes are ranked by normalized counts alone where medians would be measured, and the
        categories of obs columns are those of `data`.

    Raises
    ------
    DataError
        If there is no such cell or obs column, or the data cannot be used.
    """
    config = config or Config()
    if model is not None:
        bundle = bundle_for(model, config)
        store, tokenizer = open_for(bundle, data, config.data), build_tokenizer(bundle.config, bundle.vocab)
    else:
        data = located(data, config.data)
        matrix = open_matrix(data, config.data.layer)
        species = species_of_matrices([matrix], config.data)
        vocab = resolve_vocab(config.data.gene_vocab, [matrix.var], config.data.gene_column, species)
        vocab = vocab.with_special_tokens(VOCAB_LAYOUTS[config.tokenizer.vocab_layout])
        medians = config.tokenizer.gene_medians
        if config.tokenizer.strategy_like != "rank_value" or medians == "none":
            vocab = vocab.with_medians(None)
        elif medians == "from_data":
            log.warning(
                "No model is given, so gene medians are unknown: genes are ranked by normalized counts."
            )
        else:
            vocab = vocab.with_medians(read_medians(medians, vocab))
        store = open_store([data], vocab, config.data)
        store.obs_categories = obs_categories(store.obs, config.obs_columns)
        vocab = vocab.with_obs_categories(store.obs_categories)
        tokenizer = build_tokenizer(config, vocab)
    names = store.obs.index
    if isinstance(cell, str) and cell in names:
        row = int(np.flatnonzero(names == cell)[0])
    elif str(cell).isdecimal() and int(cell) < store.n_cells:
        row = int(cell)
    else:
        raise DataError(
            f"'{store.files[0]}' has no cell '{cell}'.\n"
            f"Give a row from 0 to {store.n_cells - 1}, or a name such as '{names[0]}'."
        )
    return tokenizer.explain(store.read(np.array([row])))
