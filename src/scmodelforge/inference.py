"""Using a trained model: embeddings and labels for cells, in an AnnData or in an .h5ad file.

Results do not depend on the batch that a cell came with. Files are never loaded whole: results are written
into a copy of the file (or into the file itself), which appears under its name only when it is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from anndata.io import write_elem

from scmodelforge.config import Config, DataConfig
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.sources import Source, located, open_matrix
from scmodelforge.data.species import species_of_matrices
from scmodelforge.data.store import CellStore, obs_categories, open_store
from scmodelforge.data.zarr import is_zarr
from scmodelforge.errors import DataError, ModelError
from scmodelforge.files import atomic_path, ensure_target
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, read_medians, resolve_vocab
from scmodelforge.models.bundle import Labels, ModelBundle, load_model, with_model_of
from scmodelforge.models.heads import PredictionHead
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch

log = logging.getLogger(__name__)

EMBEDDING_KEY = "X_scmodelforge"
THREADS = 2


def as_bundle(model: ModelBundle | str | Path) -> ModelBundle:
    """A loaded model, from itself or from the path of a checkpoint or model folder."""
    return model if isinstance(model, ModelBundle) else load_model(model)


def _bundle_for(model: ModelBundle | str | Path, config: Config | None) -> ModelBundle:
    """A loaded model that `config` does not contradict."""
    bundle = as_bundle(model)
    if config is not None:
        with_model_of(config, bundle, "memory" if isinstance(model, ModelBundle) else str(model))
    return bundle


def default_device() -> str:
    """The first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    return open_store(sources, bundle.vocab, config or DataConfig(), selected_genes=selected)


def token_batches(
    bundle: ModelBundle, store: CellStore, rows: np.ndarray, batch_size: int
) -> Iterator[TokenBatch]:
    """Token batches of the given rows of a store, in their order, made by threads ahead of the model."""
    tokenizer = build_tokenizer(bundle.config, bundle.vocab)
    in_order = (
        bundle.config.tokenizer.bin_ties == "numpy"
    )  # numpy's generator serves one cell after the other

    def make(epoch: int, step: int) -> TokenBatch:
        return tokenizer(store.read(rows[step * batch_size : (step + 1) * batch_size]))

    yield from BatchLoader(make, -(-len(rows) // batch_size), 1 if in_order else THREADS)


def embed_store(
    bundle: ModelBundle,
    store: CellStore,
    batch_size: int = 64,
    pooling: str | None = None,
    device: str | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Embed cells of a store: all of them, or the given rows; float32 (n_cells, hidden_dim) in that order."""
    device = device or default_device()
    model = bundle.model.to(device).eval()
    if (pooling or model.pooling) == "cls" and not bundle.config.tokenizer.prepend_cls:
        log.warning("pooling cls: this model has no <cls> token, so the first gene's hidden state is taken.")
    rows = np.arange(store.n_cells) if rows is None else rows
    embeddings = np.empty((len(rows), model.hidden_dim), dtype=np.float32)
    done, n_empty = 0, 0
    with torch.inference_mode():
        for tokens in token_batches(bundle, store, rows, batch_size):
            vectors = model.encode(tokens.to(device), pooling)
            embeddings[done : done + tokens.n_cells] = vectors.float().cpu().numpy()
            done += tokens.n_cells
            n_empty += _n_empty(bundle, tokens)
    _warn_of_empty(n_empty, "embedding")
    return embeddings


def _n_empty(bundle: ModelBundle, tokens: TokenBatch) -> int:
    expressed = (tokens.values > 0) & (tokens.input_ids >= bundle.vocab.first_gene_token)
    return int((~expressed.any(dim=1)).sum())


def _warn_of_empty(n_cells: int, what: str) -> None:
    if n_cells:
        log.warning(
            "%s cells have no gene that the model knows: their %s says nothing.", f"{n_cells:,}", what
        )


def predict_store(
    bundle: ModelBundle, store: CellStore, batch_size: int = 64, device: str | None = None
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
    """
    labels, head = _require_labels(bundle)
    device = device or default_device()
    model, head = bundle.model.to(device).eval(), head.to(device).eval()
    outputs = np.empty((store.n_cells, labels.n_outputs), dtype=np.float32)
    n_empty = 0
    with torch.inference_mode():
        for tokens in token_batches(bundle, store, np.arange(store.n_cells), batch_size):
            prediction = head(model.encode(tokens.to(device))).float()
            if labels.task == "classification":
                prediction = prediction.softmax(dim=1)
            outputs[tokens.cell_index.numpy()] = prediction.cpu().numpy()
            n_empty += _n_empty(bundle, tokens)
    _warn_of_empty(n_empty, "label")
    name = f"scmodelforge_{labels.key}"
    if labels.task == "regression":
        return pd.DataFrame({name: outputs[:, 0] * labels.std + labels.mean}, index=store.obs.index)
    predicted = pd.Categorical.from_codes(
        outputs.argmax(axis=1).tolist(), categories=pd.Index(labels.classes)
    )
    return pd.DataFrame({name: predicted, f"{name}_probability": outputs.max(axis=1)}, index=store.obs.index)


def _require_labels(bundle: ModelBundle) -> tuple[Labels, PredictionHead]:
    """Labels and head of a fine-tuned model."""
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
    batch_size: int = 64,
    pooling: str | None = None,
    config: DataConfig | None = None,
    copy: bool = False,
) -> AnnData:
    """Embed the cells of an AnnData into `obsm[key_added]`.

    Parameters
    ----------
    data
        Cells with raw counts.
    model
        A loaded model, a checkpoint or a model folder.
    pooling
        "mean" over genes, "cls" or "window"; None: as the model is set.
    config
        Where the counts are, if not in X (`DataConfig(layer="counts")`).
    copy
        Return a copy instead of changing `data`.

    Returns
    -------
    The AnnData with float32 (n_cells, hidden_dim) in `obsm[key_added]`.
    """
    bundle = as_bundle(model)
    adata = data.copy() if copy else data
    adata.obsm[key_added] = embed_store(bundle, open_for(bundle, data, config), batch_size, pooling)
    return adata


def annotate(
    data: AnnData,
    model: ModelBundle | str | Path,
    *,
    batch_size: int = 64,
    config: DataConfig | None = None,
    copy: bool = False,
) -> AnnData:
    """Write the labels that a fine-tuned model predicts into `obs`; see `predict_store` for the columns."""
    bundle = as_bundle(model)
    adata = data.copy() if copy else data
    for name, column in predict_store(bundle, open_for(bundle, data, config), batch_size).items():
        adata.obs[name] = column.to_numpy() if column.dtype != "category" else pd.Categorical(column)
    return adata


@contextmanager
def _edited_copy(source: str | Path, output: str | Path) -> Iterator[h5py.File]:
    """Copy a file and yield the copy, open for editing; it takes the name `output` when all went well."""
    with atomic_path(output) as temporary:
        try:
            shutil.copyfile(source, temporary)
        except OSError as error:
            raise DataError(
                f"'{source}' cannot be copied to '{output}': {error.strerror or error}."
            ) from error
        with h5py.File(temporary, "r+") as handle:
            yield handle


def _require_h5ad(source: str | Path) -> None:
    """Refuse, before any work, what could not be copied: zarr stores and URLs."""
    if "://" in str(source):
        raise DataError(
            f"'{source}' is not on this machine, and results are written into a copy of it: fetch it first."
        )
    if is_zarr(source):
        raise DataError(
            f"'{source}' is a zarr store, and results are written into a copy of an .h5ad file.\n"
            "In Python: adata = anndata.read_zarr(...), then scmodelforge.embed(adata, model) or annotate."
        )


def embed_file(
    source: str | Path,
    output: str | Path,
    model: ModelBundle | str | Path,
    *,
    key_added: str = EMBEDDING_KEY,
    batch_size: int = 64,
    pooling: str | None = None,
    config: Config | None = None,
) -> int:
    """Write a copy of an .h5ad file with the embedding in `obsm[key_added]`; returns the number of cells.

    `output` may be `source`: the file is replaced when the new one is complete.
    """
    if "/" in key_added:  # HDF5 would make a group of it, which is no embedding
        raise DataError(f"The key '{key_added}' holds a '/', which no name in obsm of a file can.")
    _require_h5ad(source)
    ensure_target(output)
    bundle = _bundle_for(model, config)
    store = open_for(bundle, source, config.data if config else None)
    embeddings = embed_store(bundle, store, batch_size, pooling)
    with _edited_copy(source, output) as handle:
        write_elem(handle.require_group("obsm"), key_added, embeddings)
    return store.n_cells


def annotate_file(
    source: str | Path,
    output: str | Path,
    model: ModelBundle | str | Path,
    *,
    batch_size: int = 64,
    config: Config | None = None,
) -> pd.DataFrame:
    """Write a copy of an .h5ad file with predicted labels in `obs`; returns the predictions."""
    _require_h5ad(source)
    ensure_target(output)
    bundle = _bundle_for(model, config)
    _require_labels(bundle)
    store = open_for(bundle, source, config.data if config else None)
    predictions = predict_store(bundle, store, batch_size)
    with _edited_copy(source, output) as handle:
        obs = anndata.io.read_elem(handle["obs"])
        for name, column in predictions.items():
            obs[name] = column.to_numpy() if column.dtype != "category" else pd.Categorical(column)
        write_elem(handle, "obs", obs)
    return predictions


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
        bundle = _bundle_for(model, config)
        store, tokenizer = open_for(bundle, data, config.data), build_tokenizer(bundle.config, bundle.vocab)
    else:
        data = located(data, config.data)
        matrix = open_matrix(data, config.data.layer)
        species = species_of_matrices([matrix], config.data)
        vocab = resolve_vocab(config.data.gene_vocab, [matrix.var], config.data.gene_column, species)
        vocab = vocab.with_special_tokens(VOCAB_LAYOUTS[config.tokenizer.vocab_layout])
        medians = config.tokenizer.gene_medians
        if config.tokenizer.strategy != "rank_value" or medians == "none":
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
