"""What a model has learned of genes, as AnnData: gene vectors, and how much genes attend to each other.

Gene vectors are static (what goes into the model) or contextual: the mean hidden state of a gene over the cells in
which it is a token, as Geneformer's gene embeddings (Theodoris et al. 2023). Attention is softmax(q·k / √width), with
all that the model adds to it, computed by formula because packed attention returns no weights. It costs, for each cell
of n tokens, 2 n² × width operations a layer beside the forward pass, and memory for n² weights of one head at a time.
Results take some 60 bytes for each pair of chosen genes and layer (measured), however many cells there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scmodelforge.config import DataConfig
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError, UserError
from scmodelforge.genes.identifiers import match_genes
from scmodelforge.inference import PROVENANCE_KEY, as_bundle, open_for, provenance
from scmodelforge.inference_batches import (
    FittingBatches,
    default_device,
    precision_for,
    token_batches,
)
from scmodelforge.models.attention import attention_weights
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.models.transformer import Block
from scmodelforge.tokenizers.packed import PackedTokens

log = logging.getLogger(__name__)

MAX_CELLS = 1000  # Geneformer's max_ncells
MAX_GENES = 2000
SEED = 0  # of the cells that are drawn


def gene_embeddings(
    model: ModelBundle | str | Path,
    data: AnnData | str | Path | None = None,
    *,
    layer: int | None = None,
    max_cells: int | None = None,
    batch_size: int = 256,
    precision: str | None = None,
    config: DataConfig | None = None,
) -> AnnData:
    """One vector per gene of a model.

    Parameters
    ----------
    model
        A loaded model, a checkpoint or a model folder.
    data
        Cells with raw counts: vectors are mean hidden states over them. None: the vectors that go into the model.
    layer
        Whose hidden state: 0 what goes into the first block, k what comes out of block k; None: the last.
    max_cells
        Draw so many cells at random; None: take all.
    batch_size, precision, config
        As `embed` takes them.

    Returns
    -------
    AnnData with float32 (n_genes, hidden_dim) in X; obs are genes: `gene_id` as index, `symbol`, `biotype` and, with
    cells, `n_cells` in which the gene was a token. Genes that are tokens of no cell are left out.

    Raises
    ------
    UserError
        If there is no such layer, or the data cannot be used with the model.
    """
    bundle = as_bundle(model)
    if data is None:
        if layer is not None or max_cells is not None:
            raise UserError("A layer or a number of cells needs cells: give data, or leave both out.")
        return _static(bundle)
    device = default_device()
    precision = precision_for(precision, device)
    network = bundle.model.to(device).eval()
    n_layers, first = len(network.transformer.blocks), bundle.vocab.first_gene_token
    layer = n_layers if layer is None else layer
    if not 0 <= layer <= n_layers:
        raise UserError(f"layer is {layer}; this model has 0 (what goes in) to {n_layers} (what comes out).")
    store = open_for(bundle, data, config)
    sums = torch.zeros(bundle.vocab.n_genes, bundle.model.hidden_dim, dtype=torch.float64, device=device)
    n_cells = torch.zeros(bundle.vocab.n_genes, dtype=torch.int64, device=device)

    def add(tokens: PackedTokens) -> None:
        states = network.transformer.states(network.inputs(tokens), network.sequences_to_embed(tokens))
        hidden = next(islice(states, layer, None))
        is_gene = tokens.input_ids >= first
        genes = tokens.input_ids[is_gene] - first
        states_of_genes = hidden[is_gene].double()
        sums.index_add_(0, genes, states_of_genes)
        n_cells.index_add_(0, genes, torch.ones_like(genes))

    rows = _drawn(store, max_cells)
    _each_batch(bundle, store, rows, add, batch_size, device, precision)
    table = _gene_table(bundle).assign(n_cells=n_cells.cpu().numpy())
    found = table["n_cells"].to_numpy() > 0
    if not found.any():
        raise DataError(f"No cell of '{store.files[0]}' has a gene that the model knows.")
    if n_missing := int((~found).sum()):
        log.info(
            "%s of %s genes are tokens of no cell and left out.",
            f"{n_missing:,}",
            f"{bundle.vocab.n_genes:,}",
        )
    means = (sums / n_cells.clamp(min=1)[:, None]).float().cpu().numpy()
    record = provenance(bundle, store, None, precision) | {"layer": layer, "n_cells": len(rows)}
    del record["pooling"]
    return AnnData(means[found], obs=table[found], uns={PROVENANCE_KEY: {"gene_embeddings": record}})


def attention(
    model: ModelBundle | str | Path,
    data: AnnData | str | Path,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    genes: Sequence[str] | None = None,
    max_genes: int = MAX_GENES,
    max_cells: int | None = MAX_CELLS,
    batch_size: int = 64,
    config: DataConfig | None = None,
) -> AnnData:
    """How much genes attend to genes: the mean over the cells in which both are tokens, in float32.

    Parameters
    ----------
    model
        A loaded model, a checkpoint or a model folder.
    data
        Cells with raw counts.
    layers
        Blocks, counted from 1; None: the last.
    heads
        Heads whose mean is taken, counted from 0; None: all.
    genes
        Ids or symbols; None: the `max_genes` that are tokens of the most cells.
    max_cells
        Draw so many cells at random; None: take all.
    batch_size
        Most cells of a batch.
    config
        Where the counts are, if not in X.

    Returns
    -------
    AnnData of genes × genes: X[i, j], sparse float32, is how much gene i (obs) reads of gene j (var), mean over layers
    and heads; what goes to special tokens and genes not chosen is missing in a row. `layers["n_cells"]` holds in how
    many cells both were tokens, and with several layers `layers["layer_K"]` the mean of each.

    Raises
    ------
    UserError
        If there is no such layer, head or gene, or the data cannot be used with the model.
    """
    bundle = as_bundle(model)
    device = default_device()
    network = bundle.model.to(device).eval()
    blocks, first = network.transformer.blocks, bundle.vocab.first_gene_token
    layers = [len(blocks)] if layers is None else list(dict.fromkeys(layers))
    n_heads = bundle.config.model.num_heads
    heads = list(range(n_heads)) if heads is None else list(dict.fromkeys(heads))
    _require("layer", layers, 1, len(blocks))
    _require("head", heads, 0, n_heads - 1)
    store = open_for(bundle, data, config)
    rows = _drawn(store, max_cells)
    chosen = (
        _most_common(bundle, store, rows, max_genes, batch_size) if genes is None else _named(bundle, genes)
    )
    place = torch.full((bundle.vocab.n_tokens,), -1, device=device)
    place[torch.from_numpy(chosen + first).to(device)] = torch.arange(len(chosen), device=device)
    n_pairs = (len(chosen), len(chosen))
    sums = torch.zeros(len(layers), *n_pairs, dtype=torch.float64, device=device)
    n_cells = torch.zeros(n_pairs, dtype=torch.int32, device=device)

    def add(tokens: PackedTokens) -> None:
        sequences = network.sequences_to_embed(tokens)
        states = islice(network.transformer.states(network.inputs(tokens), sequences), max(layers))
        places = place[tokens.input_ids]
        new_sums, new_cells = torch.zeros_like(sums, dtype=torch.float32), torch.zeros_like(n_cells)
        for number, x in enumerate(states, 1):
            if number not in layers:
                continue
            block = blocks[number - 1]
            assert isinstance(block, Block)
            q, k, _ = block.attention.queries_keys_values(block.read_by_attention(x))
            for piece, weights in attention_weights(q, k, sequences, heads, block.attention.soft_cap):
                is_chosen = places[piece] >= 0
                i = places[piece][is_chosen]
                new_sums[layers.index(number), i[:, None], i] += weights[is_chosen][:, is_chosen]
                if number == layers[0]:
                    new_cells[i[:, None], i] += 1
        sums.add_(new_sums)  # last, when the memory was enough: what is tried again counts once
        n_cells.add_(new_cells)

    _each_batch(bundle, store, rows, add, batch_size, device, "32")
    means = (sums / n_cells.clamp(min=1)).float().cpu().numpy()
    counted = sparse.csr_matrix(n_cells.cpu().numpy())
    table = _gene_table(bundle).iloc[chosen].assign(n_cells=counted.diagonal())
    record = provenance(bundle, store, None, "32") | {
        "layers": np.array(layers),
        "heads": np.array(heads),
        "n_cells": len(rows),
    }
    del record["pooling"]
    result = AnnData(
        sparse.csr_matrix(means.mean(axis=0)),
        obs=table,
        var=table,
        layers={"n_cells": counted},
        uns={PROVENANCE_KEY: {"attention": record}},
    )
    if len(layers) > 1:
        for number, mean in zip(layers, means, strict=True):
            result.layers[f"layer_{number}"] = sparse.csr_matrix(mean)
    return result


def _static(bundle: ModelBundle) -> AnnData:
    first = bundle.vocab.first_gene_token
    with torch.inference_mode():
        embedding = bundle.model.eval().embedding
        device = next(embedding.parameters()).device
        ids = torch.arange(first, first + bundle.vocab.n_genes, device=device)
        vectors = embedding.genes(ids).float().cpu().numpy()
    record = {
        "model": bundle.source or "in memory",
        "model_sha256": bundle.sha256(),
        "vocabulary_sha256": bundle.vocab.fingerprint,
    }
    return AnnData(vectors, obs=_gene_table(bundle), uns={PROVENANCE_KEY: {"gene_embeddings": record}})


def _gene_table(bundle: ModelBundle) -> pd.DataFrame:
    return bundle.vocab.to_frame()[["gene_id", "symbol", "biotype"]].set_index("gene_id").astype(str)


def _drawn(store: CellStore, max_cells: int | None) -> np.ndarray:
    """Rows of all cells, or of some drawn at random, in ascending order."""
    if max_cells is None or max_cells >= store.n_cells:
        return np.arange(store.n_cells)
    if max_cells < 1:
        raise UserError(f"max_cells is {max_cells}; it must be 1 or more.")
    log.info("%s of %s cells are drawn (seed %d).", f"{max_cells:,}", f"{store.n_cells:,}", SEED)
    drawn = np.random.default_rng(SEED).choice(store.n_cells, max_cells, replace=False)
    return np.sort(drawn)


def _each_batch(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    add: Callable[[PackedTokens], None],
    batch_size: int,
    device: str,
    precision: str,
) -> None:
    """Call `add` with the packed tokens of all cells, some at a time, in batches that fit into the memory."""

    def compute(tokens: PackedTokens) -> torch.Tensor:
        add(tokens)
        return torch.empty(tokens.n_cells, 0)

    run = FittingBatches(compute, bundle.model, device, precision)
    for tokens in token_batches(bundle, store, rows, batch_size):
        run(tokens)


def _require(what: str, numbers: Sequence[int], lowest: int, highest: int) -> None:
    if not numbers:
        raise UserError(f"No {what} is chosen; this model has {lowest} to {highest}.")
    if wrong := [number for number in numbers if not lowest <= number <= highest]:
        raise UserError(f"There is no {what} {wrong[0]}; this model has {lowest} to {highest}.")


def _most_common(
    bundle: ModelBundle, store: CellStore, rows: np.ndarray, max_genes: int, batch_size: int
) -> np.ndarray:
    """The genes that are tokens of the most cells, at most `max_genes`, in the vocabulary's order."""
    vocab = bundle.vocab
    n_cells = np.zeros(vocab.n_tokens, dtype=np.int64)
    for tokens in token_batches(bundle, store, rows, batch_size):
        n_cells += np.bincount(tokens.input_ids.numpy().ravel(), minlength=vocab.n_tokens)
    n_cells = n_cells[vocab.first_gene_token :]
    found = np.flatnonzero(n_cells)
    if not len(found):
        raise DataError(f"No cell of '{store.files[0]}' has a gene that the model knows.")
    if len(found) > max_genes:
        log.info("The %s most common of %s genes are taken.", f"{max_genes:,}", f"{len(found):,}")
        found = np.sort(found[np.argsort(-n_cells[found], kind="stable")[:max_genes]])
    return found


def _named(bundle: ModelBundle, genes: Sequence[str]) -> np.ndarray:
    """Rows of the vocabulary of genes given by id or symbol, in that order, each once."""
    names = pd.Index(genes).unique()
    found = match_genes(pd.DataFrame(index=names), bundle.vocab).gene_index
    if unknown := [str(name) for name in names[found < 0]]:
        raise DataError(
            f"The model does not know {len(unknown)} of {len(names)} genes, such as '{unknown[0]}'. Leave them out; "
            "model.vocab.to_frame() lists those it knows."
        )
    return pd.unique(found).astype(np.int64)
