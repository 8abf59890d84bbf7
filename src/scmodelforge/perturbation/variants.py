"""Perturbed cells as tokens: genes deleted or overexpressed, as Geneformer's in-silico perturbation does.

Theodoris et al. 2023: to delete genes is to remove their tokens; to overexpress them is to put their tokens first, in
the given order, also where the cell lacks them, and to cut what no longer fits. The original is then cut by as many
tokens, so that both hold the same other genes and nothing but the perturbation is compared.

Where values stand beside the tokens (all tokenizers but `rank_value`), a gene is overexpressed by the cell's highest
value, in its own place unless genes are in order of their values; and where genes without a count are tokens too, a
deleted gene becomes one of them. All is done on arrays of variants: one row is one perturbation of one cell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch, keep_tokens


@dataclass(frozen=True)
class Layout:
    """What a model's token sequences look like.

    Attributes
    ----------
    n_before, n_after
        Special tokens before and after the genes: `<cls>` and `<eos>`.
    max_length
        The longest sequence.
    pad_id, first_gene_token
        As in `GeneVocab`.
    by_value
        Whether the highest gene comes first.
    highest
        The highest value that there is, beside any gene of any cell; None: it is the cell's own maximum.
    with_zeros
        Whether genes without a count are tokens.
    """

    n_before: int
    n_after: int
    max_length: int
    pad_id: int
    first_gene_token: int
    by_value: bool = True
    highest: float | None = None
    with_zeros: bool = False

    @classmethod
    def of(cls, config: Config, vocab: GeneVocab) -> Self:
        """The layout of a model's cells."""
        tokenizer = config.tokenizer
        ranked = tokenizer.strategy_like == "rank_value"
        return cls(
            n_before=int(tokenizer.prepend_cls),
            n_after=int(tokenizer.append_eos),
            max_length=tokenizer.max_genes,
            pad_id=vocab.pad_id,
            first_gene_token=vocab.first_gene_token,
            by_value=ranked or tokenizer.gene_order == "value",
            highest=tokenizer.n_bins - 1 if tokenizer.strategy_like == "binned_expression" else None,
            with_zeros=tokenizer.include_zero_genes and not ranked,
        )


def detected(tokens: TokenBatch, layout: Layout) -> np.ndarray:
    """bool (n_cells, length): the tokens of genes with a count."""
    return ((tokens.input_ids >= layout.first_gene_token) & (tokens.values > 0)).numpy()


def among(ids: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """bool (n, length): tokens (n, length) that are among the genes (n, k) of their row."""
    found = np.zeros(ids.shape, dtype=bool)
    for column in range(genes.shape[1]):
        found |= ids == genes[:, column, None]
    return found


def delete(tokens: TokenBatch, genes: np.ndarray, layout: Layout) -> TokenBatch:
    """Cells without some of their genes.

    Parameters
    ----------
    tokens
        On the CPU, one row a variant.
    genes
        int64 (n_variants, k): tokens of the genes to delete.
    """
    deleted = among(tokens.input_ids.numpy(), genes)
    if layout.with_zeros:
        return replace(tokens, values=tokens.values.masked_fill(torch.from_numpy(deleted), 0.0))
    return keep_tokens(tokens, ~deleted, layout.pad_id)


def overexpress(tokens: TokenBatch, genes: np.ndarray, layout: Layout) -> TokenBatch:
    """Cells with some genes at the top, cut to the longest sequence; parameters as of `delete`."""
    ids, values = tokens.input_ids.numpy(), tokens.values.numpy()
    n, start = len(ids), layout.n_before
    highest = _highest(tokens, layout)
    moved = among(ids, genes)
    if layout.by_value:
        inserted, stays = np.ones_like(genes, dtype=bool), ~moved
    else:
        inserted, stays = is_added(ids, genes), np.ones_like(moved)
        values = np.where(moved, highest, values)
    kept = np.concatenate([stays[:, :start], inserted, stays[:, start:]], axis=1)
    longer = replace(
        tokens,
        input_ids=_insert(ids, genes, start),
        values=_insert(values, np.broadcast_to(highest, (n, genes.shape[1])), start),
        lengths=tokens.lengths + genes.shape[1],
        left_out=None,
    )
    return keep_tokens(longer, kept & _fits(kept, longer.lengths.numpy(), layout), layout.pad_id)


def is_added(ids: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """bool (n, k): genes of each row that are not among its tokens (n, length)."""
    columns = [(ids != genes[:, column, None]).all(axis=1) for column in range(genes.shape[1])]
    return np.stack(columns, axis=1)


def n_overflow(tokens: TokenBatch, genes: np.ndarray, layout: Layout) -> np.ndarray:
    """int64 (n_variants): tokens that overexpression pushes over the end; the original loses as many."""
    n_added = is_added(tokens.input_ids.numpy(), genes).sum(axis=1)
    return np.maximum(tokens.lengths.numpy() + n_added - layout.max_length, 0)


def shorten(tokens: TokenBatch, n_tokens: np.ndarray, layout: Layout) -> TokenBatch:
    """Cells without their last `n_tokens` (n_cells) genes; `<eos>` stays."""
    if not n_tokens.any():
        return tokens
    lengths = tokens.lengths.numpy()[:, None]
    position = np.arange(tokens.input_ids.shape[1])
    ends = lengths - layout.n_after
    return keep_tokens(tokens, (position < ends - n_tokens[:, None]) | (position >= ends), layout.pad_id)


def _highest(tokens: TokenBatch, layout: Layout) -> np.ndarray:
    """float32 (n, 1): the value of an overexpressed gene."""
    if layout.highest is not None:
        return np.full((tokens.n_cells, 1), layout.highest, dtype=np.float32)
    return np.where(detected(tokens, layout), tokens.values.numpy(), 0).max(axis=1, keepdims=True)


def _insert(array: np.ndarray, columns: np.ndarray, start: int) -> torch.Tensor:
    joined = np.concatenate([array[:, :start], columns, array[:, start:]], axis=1)
    return torch.from_numpy(joined.astype(array.dtype, copy=False))


def _fits(kept: np.ndarray, lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """bool (n, length): what is left when the sequences of `kept` tokens are cut, `<eos>` excepted."""
    is_last = np.arange(kept.shape[1]) >= lengths[:, None] - layout.n_after
    return (kept.cumsum(axis=1) <= layout.max_length - layout.n_after) | is_last
