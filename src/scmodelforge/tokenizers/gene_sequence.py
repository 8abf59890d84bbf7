"""What the tokenizers share: which genes of a cell stay, in which order, and how they become a `TokenBatch`.

Genes of all cells are handled as flat entries (row, gene, value), cell after cell; no loop over cells. What is random
is a function of (seed, epoch, cell, gene).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from scmodelforge.config import Preprocessing, TokenizerConfig
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.preprocess import normalized
from scmodelforge.data.random import LOW, WORD, philox
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.kernels import COLUMN, RANDOM, VALUE, choose_genes

# The purpose of a draw is in the high half of the key, so that no two of them share their bits.
ORDER, SAMPLE, TIES = (int.from_bytes(name, "big") << 32 for name in (b"orde", b"samp", b"ties"))


def expression(cells: CellBatch, preprocessing: Preprocessing) -> np.ndarray:
    """float64 (nnz): counts as `data.preprocessing` says, normalized or not, logarithms or not."""
    values = normalized(cells, preprocessing.target_sum, preprocessing.normalize)
    return np.log1p(values) if preprocessing.log1p else values


def draw(purpose: int, seed: int, epoch: int, cell: np.ndarray, gene: np.ndarray) -> np.ndarray:
    """uint32 random bits for each pair of a cell (global row) and a gene (row of the vocabulary)."""
    cell = cell.astype(np.uint64)
    return philox(seed ^ purpose, cell & LOW, cell >> WORD, gene, epoch)[0]


def gene_tokens(
    cells: CellBatch,
    expressed: np.ndarray,
    carried: np.ndarray,
    config: TokenizerConfig,
    vocab: GeneVocab,
    seed: int,
    epoch: int,
    zeros_last: bool,
) -> TokenBatch:
    """Sequences of genes with values, by `gene_order`, `overlong` and `include_zero_genes`.

    Parameters
    ----------
    cells
        The cells.
    expressed
        float (nnz): what `gene_order: value` sorts by.
    carried
        float (nnz): what the model reads beside each gene.
    config, vocab
        Of the tokenizer.
    seed, epoch
        For what is random.
    zeros_last
        Genes without a count follow all others, and fill what room these leave; else all genes of a cell are one
        list. Genes that its file did not measure are in neither.
    """
    indptr, genes = cells.indptr, cells.gene_ids
    if config.include_zero_genes:
        indptr, genes, expressed, carried = _with_zeros(cells, expressed, carried, vocab.n_genes)
    longest = int(np.diff(indptr).max(initial=0))
    room = min(longest, config.max_genes - n_special(config))
    input_ids, values, lengths = empty_tokens(cells.n_cells, room, config)
    left_out = np.empty((cells.n_cells, longest - room), dtype=np.int64)
    widest = choose_genes(
        indptr,
        genes,
        expressed,
        carried,
        cells.cell_index,
        {"column": COLUMN, "random": RANDOM, "value": VALUE}[config.gene_order],
        config.overlong == "sample",
        config.include_zero_genes and zeros_last,
        np.uint64(seed ^ SAMPLE),
        np.uint64(seed ^ ORDER),
        np.uint64(epoch),
        vocab.first_gene_token,
        vocab.pad_id,
        int(config.prepend_cls),
        room,
        input_ids,
        values,
        lengths,
        left_out,
    )
    tokens = with_special_tokens(cells, config, vocab, input_ids, values, lengths)
    return replace(tokens, left_out=torch.from_numpy(left_out[:, :widest])) if longest > room else tokens


def _with_zeros(
    cells: CellBatch, expressed: np.ndarray, carried: np.ndarray, n_genes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """indptr, genes and both kinds of values of all genes that were measured, with zeros where nothing was counted."""
    row = np.repeat(np.arange(cells.n_cells), cells.n_genes_per_cell)
    place = row * n_genes + cells.gene_ids
    genes = np.tile(np.arange(n_genes, dtype=np.int32), cells.n_cells)
    counted, read = (_scatter(place, each, len(genes)) for each in (expressed, carried))
    if cells.measured is None:
        return np.arange(cells.n_cells + 1) * n_genes, genes, counted, read
    known = cells.measured.sets[cells.measured.of_cell]
    indptr = np.concatenate([[0], np.cumsum(known.sum(axis=1))])
    known = known.ravel()
    return indptr, genes[known], counted[known], read[known]


def _scatter(place: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    dense = np.zeros(size, dtype=values.dtype)
    dense[place] = values
    return dense


def empty_tokens(
    n_cells: int, room: int, config: TokenizerConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays to fill: tokens int64 and values float32, with room for so many genes and special tokens, and lengths."""
    shape = n_cells, max(room + n_special(config), 1)  # a batch of empty cells still has a position
    return np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(n_cells, np.int64)


def n_special(config: TokenizerConfig) -> int:
    """Special tokens that each cell gets."""
    return int(config.prepend_cls) + int(config.append_eos)


def with_special_tokens(
    cells: CellBatch,
    config: TokenizerConfig,
    vocab: GeneVocab,
    input_ids: np.ndarray,
    carried: np.ndarray,
    n_genes: np.ndarray,
) -> TokenBatch:
    """Put `<cls>` and `<eos>` into sequences (n_cells, at least the longest) with so many genes each."""
    lengths = n_genes + n_special(config)
    if (length := max(int(lengths.max(initial=0)), 1)) < input_ids.shape[1]:
        input_ids, carried = input_ids[:, :length].copy(), carried[:, :length].copy()
    if config.prepend_cls and vocab.cls_id is not None:
        input_ids[:, 0] = vocab.cls_id
        carried[:, 0] = config.cls_value
    if config.append_eos and vocab.eos_id is not None:
        input_ids[np.arange(len(lengths)), lengths - 1] = vocab.eos_id
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        values=torch.from_numpy(carried),
        lengths=torch.from_numpy(lengths),
        cell_index=torch.from_numpy(cells.cell_index),
        has_padding=bool((lengths < input_ids.shape[1]).any()),
        obs=None if cells.obs is None else torch.from_numpy(cells.obs),
        measured=cells.measured,
    )
