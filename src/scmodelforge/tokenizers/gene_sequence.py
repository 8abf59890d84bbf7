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
    if not config.include_zero_genes:
        return _tokens_of_expressed(cells, expressed, carried, config, vocab, seed, epoch)
    row, gene = np.repeat(np.arange(cells.n_cells), cells.n_genes_per_cell), cells.gene_ids
    if config.include_zero_genes:
        place = row * vocab.n_genes + gene
        row, gene = (each.ravel() for each in np.indices((cells.n_cells, vocab.n_genes)))
        expressed, carried = _scatter(place, expressed, len(row)), _scatter(place, carried, len(row))
        if cells.measured is not None:
            known = cells.measured.sets[cells.measured.of_cell].ravel()
            row, gene, expressed, carried = row[known], gene[known], expressed[known], carried[known]
    without_count = expressed == 0 if zeros_last else np.zeros(len(row), dtype=bool)
    cell = cells.cell_index[row]
    room = config.max_genes - n_special(config)

    kept = np.arange(len(row))
    too_long = np.bincount(row, minlength=cells.n_cells)[row] > room
    if config.overlong == "sample" and config.gene_order != "random" and too_long.any():
        long = np.flatnonzero(too_long)  # the first of a random order are a sample already
        bits = draw(SAMPLE, seed, epoch, cell[long], gene[long])
        chosen = _first(room, row[long], _by_cell(row[long], without_count[long], bits))
        kept = np.sort(np.concatenate([np.flatnonzero(~too_long), long[chosen]]))

    # Sorting is stable: what is equal stays in the order of the vocabulary.
    if config.gene_order == "random":
        bits = draw(ORDER, seed, epoch, cell[kept], gene[kept])
        kept = kept[_by_cell(row[kept], without_count[kept], bits)]
    elif config.gene_order == "value":
        kept = kept[np.lexsort((-expressed[kept], row[kept]))]  # zeros are last by themselves
    elif without_count.any():
        kept = kept[_by_cell(row[kept], without_count[kept], np.uint32(0))]
    kept = kept[_first(room, row[kept], np.arange(len(kept)))]
    tokens = token_batch(cells, config, vocab, row[kept], gene[kept], carried[kept])
    if not too_long.any():
        return tokens
    left_out = expressed > 0
    left_out[kept] = False
    return replace(tokens, left_out=_padded(row[left_out], gene[left_out], cells.n_cells, vocab))


def _tokens_of_expressed(
    cells: CellBatch,
    expressed: np.ndarray,
    carried: np.ndarray,
    config: TokenizerConfig,
    vocab: GeneVocab,
    seed: int,
    epoch: int,
) -> TokenBatch:
    """As `gene_tokens`, of genes with a count alone."""
    room, longest = room_for_genes(cells, config), int(cells.n_genes_per_cell.max(initial=0))
    input_ids = np.empty((cells.n_cells, max(room + n_special(config), 1)), dtype=np.int64)
    values = np.empty(input_ids.shape, dtype=np.float32)
    lengths = np.empty(cells.n_cells, dtype=np.int64)
    left_out = np.empty((cells.n_cells, longest - room), dtype=np.int64)
    choose_genes(
        cells.indptr,
        cells.gene_ids,
        expressed,
        carried,
        cells.cell_index,
        {"column": COLUMN, "random": RANDOM, "value": VALUE}[config.gene_order],
        config.overlong == "sample",
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
    tokens = with_special_tokens(cells, config, vocab, input_ids, values, lengths + n_special(config))
    return replace(tokens, left_out=torch.from_numpy(left_out)) if longest > room else tokens


def room_for_genes(cells: CellBatch, config: TokenizerConfig) -> int:
    """Genes that the sequences of these cells need room for: those of the longest, if they fit."""
    return min(int(cells.n_genes_per_cell.max(initial=0)), config.max_genes - n_special(config))


def _padded(row: np.ndarray, gene: np.ndarray, n_cells: int, vocab: GeneVocab) -> torch.Tensor:
    """int64 (n_cells, n): tokens of the genes of each cell (ascending `row`), pads on the right."""
    n_genes = np.bincount(row, minlength=n_cells)
    tokens = np.full((n_cells, int(n_genes.max(initial=0))), vocab.pad_id, dtype=np.int64)
    tokens[row, position_in_cell(row)] = gene + vocab.first_gene_token
    return torch.from_numpy(tokens)


def _by_cell(row: np.ndarray, last: np.ndarray, bits: np.ndarray | np.uint32) -> np.ndarray:
    """int64: the order of entries by cell, then those that are not `last`, then by 32 bits; stable."""
    words = row.astype(np.uint64) << np.uint64(33) | last.astype(np.uint64) << WORD | bits
    return np.argsort(words, kind="stable")


def _scatter(place: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    dense = np.zeros(size, dtype=values.dtype)
    dense[place] = values
    return dense


def _first(n: int, row: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of entries taken in an order that keeps cells together: the first `n` of each cell."""
    return order[position_in_cell(row[order]) < n]


def position_in_cell(row: np.ndarray) -> np.ndarray:
    """int64: place of each entry within its cell, for ascending `row`."""
    n = np.bincount(row)
    return np.arange(len(row)) - np.repeat(np.cumsum(n) - n, n)


def n_special(config: TokenizerConfig) -> int:
    """Special tokens that each cell gets."""
    return int(config.prepend_cls) + int(config.append_eos)


def token_batch(
    cells: CellBatch,
    config: TokenizerConfig,
    vocab: GeneVocab,
    row: np.ndarray,
    gene: np.ndarray,
    values: np.ndarray,
) -> TokenBatch:
    """Tokens of genes that are chosen and in order (ascending `row`), with `<cls>`, `<eos>` and pads."""
    n_cells, start = cells.n_cells, int(config.prepend_cls)
    lengths = np.bincount(row, minlength=n_cells) + n_special(config)
    length = max(int(lengths.max(initial=0)), 1)  # a batch of empty cells still has a position
    input_ids = np.full((n_cells, length), vocab.pad_id, dtype=np.int64)
    carried = np.zeros(input_ids.shape, dtype=np.float32)
    place = start + position_in_cell(row)
    input_ids[row, place] = gene + vocab.first_gene_token
    carried[row, place] = values
    return with_special_tokens(cells, config, vocab, input_ids, carried, lengths)


def with_special_tokens(
    cells: CellBatch,
    config: TokenizerConfig,
    vocab: GeneVocab,
    input_ids: np.ndarray,
    carried: np.ndarray,
    lengths: np.ndarray,
) -> TokenBatch:
    """Put `<cls>` and `<eos>` into sequences (n_cells, at least the longest) of `lengths`, which count them."""
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
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        cell_index=torch.from_numpy(cells.cell_index),
        has_padding=bool((lengths < input_ids.shape[1]).any()),
        obs=None if cells.obs is None else torch.from_numpy(cells.obs),
        measured=cells.measured,
    )
