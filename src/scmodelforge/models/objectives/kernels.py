"""Compiled kernels of the pretraining tasks: they release the GIL, so threads run beside each other.

Compiled once and cached on disk by numba; each has a slow twin in the tests.
"""

from __future__ import annotations

import numba
import numpy as np

from scmodelforge.data.random import LOW, WORD, philox_fill

STEP = 2.0**-32  # between two draws in [0, 1)


@numba.njit(nogil=True, cache=True)
def mask_tokens(
    tokens: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    cell_index: np.ndarray,
    key: np.uint64,
    epoch: np.uint64,
    first: int,
    never: np.ndarray,
    mask_ratio: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    random_tokens: np.ndarray,
    sets: np.ndarray,
    set_of_cell: np.ndarray,
    first_gene: int,
    masked_value: np.float32,
    hides_genes: bool,
    hides_values: bool,
    out_tokens: np.ndarray,
    out_values: np.ndarray,
    asked: np.ndarray,
) -> int:
    """Ask some tokens of each cell and hide them; see `MaskedPrediction`.

    Parameters
    ----------
    tokens, values, lengths, cell_index
        As in `TokenBatch`.
    key, epoch
        Of the draws, one (of four words) for each (cell, position).
    first, never
        Tokens from `first` on may be asked, but those in `never` (int64).
    mask_ratio
        Share of them that is asked.
    mask_share, random_share
        Shares of the asked that are masked, and that become another token.
    mask_id, random_tokens
        The token of a mask, and those that may be inserted (int64).
    sets, set_of_cell, first_gene
        As in `MeasuredGenes`, and the token of gene 0: only genes that a cell's file measured are inserted into it.
        `sets` may have no row, if all were.
    masked_value
        Stands where a value is hidden.
    hides_genes, hides_values
        What is hidden.
    out_tokens, out_values
        Of the shape of `tokens` and `values`, filled if they are hidden.
    asked
        int64, filled with flat positions: cell × length + position.

    Returns
    -------
    How many are asked.
    """
    n_cells, length = tokens.shape
    bits, positions = np.empty((4, length), np.uint32), np.arange(length).astype(np.uint32)
    hidden = np.empty(length, np.bool_)
    pool, n_pool, pool_of = random_tokens.copy(), len(random_tokens), -1
    n_asked = 0
    for cell in range(n_cells):
        n = lengths[cell]
        low, high = np.uint64(cell_index[cell]) & LOW, np.uint64(cell_index[cell]) >> WORD
        philox_fill(key, low, high, positions[:n], epoch, bits)
        begin = n_asked
        for i in range(n):
            token = tokens[cell, i]
            hidden[i] = False
            if bits[0, i] * STEP < mask_ratio and token >= first:
                hidden[i] = True
                for kind in never:
                    hidden[i] = hidden[i] and token != kind
                if hidden[i]:
                    asked[n_asked] = cell * length + i
                    n_asked += 1
        if len(sets) and set_of_cell[cell] != pool_of:
            pool_of, n_pool = set_of_cell[cell], 0
            for token in random_tokens:
                if sets[pool_of, token - first_gene]:
                    pool[n_pool] = token
                    n_pool += 1
        if hides_genes:
            out_tokens[cell] = tokens[cell]
        if hides_values:
            out_values[cell] = values[cell]
        for question in range(begin, n_asked):
            i = asked[question] - cell * length
            drawn = bits[1, i] * STEP
            if drawn < mask_share:
                if hides_genes:
                    out_tokens[cell, i] = mask_id
                if hides_values:
                    out_values[cell, i] = masked_value
            elif drawn < mask_share + random_share:
                if hides_genes:
                    chosen = (np.uint64(bits[2, i]) * np.uint64(n_pool)) >> WORD
                    out_tokens[cell, i] = pool[chosen]
                if hides_values:  # that of another token of the cell, but never a hidden one
                    place = (np.uint64(bits[3, i]) * np.uint64(n)) >> WORD
                    out_values[cell, i] = masked_value if hidden[place] else values[cell, place]
    return n_asked


@numba.njit(nogil=True, cache=True)
def ask_genes(
    tokens: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    left_out: np.ndarray,
    sets: np.ndarray,
    set_of_cell: np.ndarray,
    seen: np.ndarray,
    cell_index: np.ndarray,
    key: np.uint64,
    zero_key: np.uint64,
    epoch: np.uint64,
    first: int,
    mask_ratio: float,
    zero_ratio: float,
    n_jumps: int,
    asked: np.ndarray,
    n_asked: np.ndarray,
    out_genes: np.ndarray,
    out_values: np.ndarray,
) -> int:
    """Ask expressed genes and genes without a count; see `MaskedReconstruction`.

    Genes without a count are drawn by jumping from one drawn gene to the next: the jumps are geometric, so there are
    as many random numbers as drawn genes, not as genes.

    Parameters
    ----------
    tokens, values, lengths, left_out, cell_index
        As in `TokenBatch`; `left_out` may have no column.
    sets, set_of_cell
        As in `MeasuredGenes`; `sets` may have no row, if all genes were measured.
    seen
        bool (n_tokens): tokens that may be asked as zeros.
    key, zero_key, epoch
        Of the draws: one for each (cell, gene), and one for each (cell, jump).
    first
        Token of gene 0.
    mask_ratio, zero_ratio
        Share of the expressed genes and of those without a count that is asked.
    n_jumps
        More than any cell needs.
    asked
        bool of the shape of `tokens`, filled.
    n_asked
        int64 (n_cells), filled.
    out_genes, out_values
        int64 and float32, filled: the asked tokens of each cell, ascending, with their values, one cell after another.

    Returns
    -------
    How many are asked in all.
    """
    n_cells, length = tokens.shape
    n_tokens = len(seen)
    bits, jump_bits = np.empty((1, length), np.uint32), np.empty((1, n_jumps), np.uint32)
    jumps = np.arange(n_jumps).astype(np.uint32)
    counted = np.zeros(n_tokens, np.bool_)
    value_of = np.empty(n_tokens, np.float32)
    end = 0
    for cell in range(n_cells):
        n, begin = lengths[cell], end
        low, high = np.uint64(cell_index[cell]) & LOW, np.uint64(cell_index[cell]) >> WORD
        philox_fill(key, low, high, tokens[cell, :n], epoch, bits)
        asked[cell] = False
        for i in range(n):
            token = tokens[cell, i]
            counted[token] = True
            if token >= first and values[cell, i] > 0 and bits[0, i] * STEP < mask_ratio:
                asked[cell, i] = True
                out_genes[end], value_of[token] = token, values[cell, i]
                end += 1
        for token in left_out[cell]:
            counted[token] = True
        if zero_ratio > 0:
            philox_fill(zero_key, low, high, jumps, epoch, jump_bits)
            token, scale = first - 1, np.log1p(-zero_ratio)
            for i in range(n_jumps):
                jump = np.int64(np.floor(np.log1p(-(jump_bits[0, i] * STEP)) / scale))
                token += 1 + min(jump, np.int64(n_tokens))
                if token >= n_tokens:
                    break
                measured = len(sets) == 0 or sets[set_of_cell[cell], token - first]
                if seen[token] and not counted[token] and measured:
                    out_genes[end], value_of[token] = token, 0
                    end += 1
        for i in range(n):
            counted[tokens[cell, i]] = False
        for token in left_out[cell]:
            counted[token] = False
        out_genes[begin:end] = np.sort(out_genes[begin:end])
        for i in range(begin, end):
            out_values[i] = value_of[out_genes[i]]
        n_asked[cell] = end - begin
    return end


@numba.njit(nogil=True, cache=True)
def split_genes(
    tokens: np.ndarray,
    lengths: np.ndarray,
    cell_index: np.ndarray,
    key: np.uint64,
    epoch: np.uint64,
    first: int,
    share: float,
    generated: np.ndarray,
    n_generated: np.ndarray,
) -> None:
    """Draw floor(genes · `share`) genes of each cell; see `ExpressionGeneration`.

    Parameters
    ----------
    tokens, lengths, cell_index
        As in `TokenBatch`.
    key, epoch
        Of the draws, one for each (cell, gene).
    first
        Token of gene 0.
    generated, n_generated
        bool of the shape of `tokens`, and int64 (n_cells), filled.
    """
    n_cells, length = tokens.shape
    bits, words = np.empty((1, length), np.uint32), np.empty(length, np.uint64)
    for cell in range(n_cells):
        low, high = np.uint64(cell_index[cell]) & LOW, np.uint64(cell_index[cell]) >> WORD
        philox_fill(key, low, high, tokens[cell, : lengths[cell]], epoch, bits)
        n = 0
        for i in range(lengths[cell]):
            if tokens[cell, i] >= first:
                words[n] = (np.uint64(bits[0, i]) << WORD) | np.uint64(i)
                n += 1
        generated[cell] = False
        n_generated[cell] = np.int64(n * share)
        for word in np.sort(words[:n])[: n_generated[cell]]:
            generated[cell, np.int64(word & LOW)] = True
