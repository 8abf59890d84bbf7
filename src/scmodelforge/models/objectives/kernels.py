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
                    chosen = (np.uint64(bits[2, i]) * np.uint64(len(random_tokens))) >> WORD
                    out_tokens[cell, i] = random_tokens[chosen]
                if hides_values:  # that of another token of the cell, but never a hidden one
                    place = (np.uint64(bits[3, i]) * np.uint64(n)) >> WORD
                    out_values[cell, i] = masked_value if hidden[place] else values[cell, place]
    return n_asked
