"""Cells written by an autoregressive model: one gene after the other, each with its value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.data.random import philox, uniform
from scmodelforge.errors import ModelError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.autoregressive import AutoregressiveTransformer
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.models.objectives.counts import draw_counts
from scmodelforge.models.objectives.expression import predicted_values
from scmodelforge.tokenizers.batch import TokenBatch

STREAM = 0x67656E65 << 32  # keeps these draws apart from all others of the same seed


@torch.no_grad()
def generate(
    bundle: ModelBundle,
    prompt: TokenBatch,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    max_genes: int | None = None,
) -> TokenBatch:
    """Continue cells; one pass over each cell per token.

    A gene occurs once in a cell. A cell is done at `<eos>`, if training taught the model to end cells, when it has
    all genes, or at `max_genes` tokens. Values are drawn from the model's distribution (bins, counts), or are its
    prediction (value_loss mse). Rates of counts are shares of a sum that a cell in the making does not have yet: the
    genes so far and their counts give the scale.

    Parameters
    ----------
    bundle
        An autoregressive model trained for next_gene or dual_prediction, in evaluation mode.
    prompt
        `<cls>` and any genes to start from, as the tokenizer gives them, on the model's device; an `<eos>` is taken
        away.
    seed
        The draws are a function of (seed, `cell_index`, position), whatever the batch.
    temperature
        Divides the logits of the genes; above 0.
    top_k
        Draw among so many most likely tokens; None: all.
    max_genes
        Longest result in tokens; None, or more than the model's: `tokenizer.max_genes`. Longer prompts stay.

    Returns
    -------
    TokenBatch of the same cells, `<pad>` on the right: the prompt and what follows, `<eos>` included.

    Raises
    ------
    ModelError
        If the model is another one, cannot tell the values that it reads, or tells counts and a prompt has no gene
        that could give their scale.
    """
    model, config, vocab = bundle.model, bundle.config, bundle.vocab
    if not isinstance(model, AutoregressiveTransformer) or model.head is None:
        raise ModelError(
            "Only an autoregressive model that was trained to tell the next gene generates cells."
        )
    if model.expression_head is None and (model.count_bias or config.value_embedding != "none"):
        raise ModelError(
            "This model reads the value of each gene and cannot tell it, so it cannot go on from its own genes: train "
            "it with pretraining_task dual_prediction, or with value_embedding none."
        )
    longest = min(max_genes or config.tokenizer.max_genes, config.tokenizer.max_genes)
    cells = _with_room(prompt, longest, int(model.appends_eos), vocab.pad_id)
    tells_counts = config.value_loss == "zero_truncated_poisson" and model.expression_head is not None
    known = _known_counts(model, cells) if tells_counts else None
    eos_id = vocab.eos_id if model.appends_eos or config.model.objective.reference else None
    closed = _closed(cells, vocab, eos_id)
    numbers = cells.cell_index.cpu().numpy().astype(np.uint64)

    while len(rows := torch.nonzero((cells.lengths < longest) & ~closed.all(dim=1))[:, 0]):
        now = _rows(cells, rows)
        hidden = model(now)
        last = torch.arange(len(rows), device=rows.device) * hidden.shape[1] + now.lengths - 1
        of_gene, of_value = _uniforms(seed, numbers[rows.cpu().numpy()], now.lengths)
        logits = (
            model.genes_at(hidden, last).logits.float().masked_fill(closed[rows], -torch.inf) / temperature
        )
        gene = _draw(logits, of_gene, top_k)
        closed[rows, gene] = True
        if eos_id is not None:
            closed[rows] |= (gene == eos_id)[:, None]
        if model.expression_head is not None:
            outputs = model.expression(hidden, last, gene, now).float()
            if known is None:
                value = _value(config, outputs, of_value)
            else:
                score, (scores, counts) = outputs[:, 0], known[:, rows]
                value = draw_counts((score - scores).exp() * counts, of_value, config.tokenizer.max_value)
                known[:, rows] = torch.stack([torch.logaddexp(scores, score), counts + value])
            cells.values[rows, now.lengths] = value.where(gene >= vocab.first_gene_token, 0.0)
        cells.input_ids[rows, now.lengths] = gene
        cells.lengths[rows] += 1
    return _rows(cells, torch.arange(cells.n_cells, device=cells.lengths.device))


def _with_room(tokens: TokenBatch, longest: int, n_dropped: int, pad_id: int) -> TokenBatch:
    """The same cells without their last `n_dropped` tokens, and with columns up to `longest` at least."""
    lengths = (tokens.lengths - n_dropped).clamp(min=1)
    n, start = tokens.input_ids.shape
    ids = tokens.input_ids.new_full((n, max(start, longest)), pad_id)
    values = tokens.values.new_zeros(ids.shape)
    real = torch.arange(start, device=lengths.device) < lengths[:, None]
    ids[:, :start] = tokens.input_ids.where(real, pad_id)
    values[:, :start] = tokens.values.where(real, 0.0)
    return replace(tokens, input_ids=ids, values=values, lengths=lengths, has_padding=True)


def _rows(cells: TokenBatch, rows: torch.Tensor) -> TokenBatch:
    """Some of the cells, without columns that none of them needs."""
    lengths = cells.lengths[rows]
    longest = int(lengths.max())
    return TokenBatch(
        input_ids=cells.input_ids[rows, :longest],
        values=cells.values[rows, :longest],
        lengths=lengths,
        cell_index=cells.cell_index[rows],
        has_padding=bool((lengths < longest).any()),
        obs=None if cells.obs is None else cells.obs[rows],
        bin_edges=None if cells.bin_edges is None else cells.bin_edges[rows],
    )


def _closed(cells: TokenBatch, vocab: GeneVocab, eos_id: int | None) -> torch.Tensor:
    """bool (n_cells, n_tokens): tokens that may not come: genes that are there, and special ones but `<eos>`."""
    closed = torch.zeros(cells.n_cells, vocab.n_tokens, dtype=torch.bool, device=cells.lengths.device)
    closed.scatter_(1, cells.input_ids, True)
    closed[:, : vocab.first_gene_token] = True
    if eos_id is not None:
        closed[:, eos_id] = False
    return closed


def _uniforms(seed: int, cell: np.ndarray, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 (n) in [0, 1) for a position of each cell."""
    words = philox(seed ^ STREAM, cell & np.uint64(0xFFFFFFFF), cell >> np.uint64(32), position.cpu().numpy())
    first, second = (torch.from_numpy(uniform(word)).to(position.device) for word in words[:2])
    return first, second


def _draw(logits: torch.Tensor, uniforms: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """int64 (n): one column of logits (n, k) by inversion of its probabilities."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulative = logits.double().softmax(dim=1).cumsum(dim=1)
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=1)


def _value(config: Config, outputs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Values float32 (n) from the outputs of an `ExpressionHead`."""
    if config.value_loss == "cross_entropy":
        return _draw(outputs, uniforms).float()
    value = predicted_values(config, outputs).clamp(min=0)
    bins = config.tokenizer.strategy_like == "binned_expression"
    return value.round().clamp(max=config.tokenizer.n_bins - 1) if bins else value


def _known_counts(model: AutoregressiveTransformer, cells: TokenBatch) -> torch.Tensor:
    """float32 (2, n_cells): log Σ exp(score) of the genes of each cell, and the sum of their counts."""
    real = torch.arange(cells.input_ids.shape[1], device=cells.lengths.device) < cells.lengths[:, None]
    is_gene = (real & (cells.input_ids >= model.first_gene_token))[:, 1:]
    if not is_gene.any(dim=1).all():
        raise ModelError(
            "Some prompts have no gene. This model tells counts in proportion to those of the genes before, so each "
            "prompt needs at least one gene with its count."
        )
    positions = torch.nonzero(is_gene.flatten())[:, 0]
    shorter = replace(cells, input_ids=cells.input_ids[:, :-1], values=cells.values[:, :-1])
    genes = cells.input_ids[:, 1:].flatten()[positions]
    scores = model.expression(model(shorter), positions, genes, shorter)[:, 0].float()
    every = scores.new_full(is_gene.shape, -torch.inf).flatten().index_copy(0, positions, scores)
    counts = cells.values[:, 1:].where(is_gene, 0.0).sum(dim=1)
    return torch.stack([every.view(is_gene.shape).logsumexp(dim=1), counts])
