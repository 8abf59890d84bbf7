"""Floating-point operations of a batch: what model FLOPs utilization (MFU) and `scmodelforge plan` count.

Forward, for S tokens whose cells have P = Σ length² pairs of tokens (half of it in a causal model), a transformer of L
blocks of width d and feed-forward width f, and m asked positions over a vocabulary of V tokens:

    2·S·L·(4d² + 2·d·f)  +  4·P·L·d  +  m · (2·d·V + the small layers of the heads)

Real tokens are counted, never padding, and of the generated genes of scGPT only the pairs that are read. Norms,
softmax, activations, look-ups and losses are left out: below 1 % in any model of a useful size. Training is three times
the forward pass (each product is differentiated in both of its factors); what is computed twice to save memory counts
once.
"""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.models.autoregressive import AutoregressiveTransformer
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.embeddings import ExternalGenes, SoftBins
from scmodelforge.models.generative import GenerativeTransformer
from scmodelforge.models.heads import CountHead, ExpressionHead, MaskedGeneHead
from scmodelforge.models.masked_autoencoder import MaskedAutoencoder
from scmodelforge.models.transformer import Transformer

TRAINING_OVER_FORWARD = 3  # one forward pass, and a backward pass of twice its cost (Kaplan et al. 2020)


def linear_flops(module: nn.Module | None) -> int:
    """FLOPs of all linear layers of a module for one row of its input: two for each weight."""
    if module is None:
        return 0
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return 2 * sum(layer.weight.numel() for layer in layers)


def transformer_flops(
    transformer: Transformer, width: int, tokens: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """FLOPs of the blocks for so many tokens, and so many pairs of a token and one that it reads."""
    return linear_flops(transformer) * tokens + 4 * len(transformer.blocks) * width * pairs


def encoding_flops(model: CellTransformer, lengths: torch.Tensor) -> torch.Tensor:
    """FLOPs of the hidden states of some cells, which is what an embedding costs.

    Parameters
    ----------
    model
        Any architecture.
    lengths
        float64 (n_cells): tokens of each cell, without those of obs columns.

    Returns
    -------
    float64, 0-dimensional, on the device of `lengths`.
    """
    lengths = _with_obs(model, lengths)
    pairs = lengths.square().sum()
    if isinstance(model, AutoregressiveTransformer):
        pairs = pairs / 2
    tokens = lengths.sum()
    return _embedding_flops(model) * tokens + transformer_flops(
        model.transformer, model.hidden_dim, tokens, pairs
    )


def forward_flops(model: CellTransformer, lengths: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """FLOPs of a pretraining batch, forward.

    Parameters
    ----------
    model
        A model with its pretraining heads.
    lengths
        float64 (n_cells): tokens of each cell that go in, without those of obs columns.
    asked
        float64 (n_cells): how many genes of each cell are asked.

    Returns
    -------
    float64, 0-dimensional, on the device of `lengths`.
    """
    heads = _head_flops(model) * asked.sum()
    genes = model.embedding.tokens
    if isinstance(genes, ExternalGenes) and isinstance(getattr(model, "head", None), MaskedGeneHead):
        heads = heads + linear_flops(genes.network) * genes.vectors.num_embeddings  # the whole table, once
    if isinstance(model, GenerativeTransformer):
        return _generation_flops(model, lengths, asked) + heads
    flops = encoding_flops(model, lengths) + heads
    if isinstance(model, MaskedAutoencoder):
        rows = lengths.clamp(min=1) + asked
        width = model.to_decoder.out_features
        into = linear_flops(model.to_decoder) + _lookup_flops(model)
        flops = flops + into * rows.sum()
        flops = flops + transformer_flops(model.decoder, width, rows.sum(), rows.square().sum())
    return flops


def training_flops(model: CellTransformer, lengths: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """FLOPs of a pretraining batch, forward and backward; parameters as in `forward_flops`."""
    return TRAINING_OVER_FORWARD * forward_flops(model, lengths, asked)


def _with_obs(model: CellTransformer, lengths: torch.Tensor) -> torch.Tensor:
    """Lengths with the tokens of obs columns; a cell without tokens is computed as one."""
    n_obs = 0 if model.obs_embedding is None else len(model.obs_embedding.columns)
    return lengths.clamp(min=1) + n_obs


def _lookup_flops(model: CellTransformer) -> int:
    """FLOPs of one gene vector: nothing where it is looked up, the network where vectors are given."""
    genes = model.embedding.tokens
    return linear_flops(genes.network) if isinstance(genes, ExternalGenes) else 0


def _embedding_flops(model: CellTransformer) -> int:
    """FLOPs of embedding one token: gene vector and value."""
    values = getattr(model.embedding, "values", None)
    mixture = 2 * values.bins.weight.numel() if isinstance(values, SoftBins) else 0
    return _lookup_flops(model) + linear_flops(values) + mixture


def _head_flops(model: CellTransformer) -> int:
    """FLOPs of all heads for one asked gene."""
    head, expression = getattr(model, "head", None), getattr(model, "expression_head", None)
    flops = linear_flops(head) + linear_flops(expression)
    if isinstance(head, MaskedGeneHead):
        flops += 2 * model.hidden_dim * len(head.bias)  # its output matrix is the gene table
    auxiliary = getattr(model, "auxiliary", None)
    cell_expression = None if auxiliary is None else auxiliary.cell_expression
    flops += linear_flops(cell_expression)
    reads_gene = isinstance(expression, ExpressionHead | CountHead) or cell_expression is not None
    return flops + (_lookup_flops(model) if reads_gene else 0)


def _generation_flops(
    model: GenerativeTransformer, lengths: torch.Tensor, asked: torch.Tensor
) -> torch.Tensor:
    """Perceived and generated genes: the first read each other, the others read them and themselves."""
    perceived = _with_obs(model, lengths)
    tokens = (perceived + asked).sum()
    pairs = (perceived.square() + asked * (perceived + 1)).sum()
    passes = 2 if model.config.model.objective.second_pass_weight else 1
    again = (passes - 1) * linear_flops(model.expression_head) * asked.sum()
    embedded = _embedding_flops(model) * perceived.sum() + _lookup_flops(model) * asked.sum()
    return again + passes * (embedded + transformer_flops(model.transformer, model.hidden_dim, tokens, pairs))
