"""From the hidden states of a cell's tokens to one embedding of the cell."""

from __future__ import annotations

import torch

from scmodelforge.tokenizers.packed import PackedTokens


def pool(
    hidden: torch.Tensor, tokens: PackedTokens, pooling: str, first_gene_token: int, window: int
) -> torch.Tensor:
    """Pool hidden states (total, width) into cell embeddings (n_cells, width).

    "cls" takes the first token; "mean" averages over gene tokens, without special ones, as Geneformer's "cell"
    embeddings do; "window" adds up all tokens and divides by the longest input `window`, as TranscriptFormer does. A
    cell without any gene token has a mean of zero.
    """
    if pooling == "cls":
        return hidden.index_select(0, tokens.starts)
    counted = tokens.positions >= 0 if pooling == "window" else tokens.input_ids >= first_gene_token
    with torch.autocast(hidden.device.type, enabled=False):  # a sum of hundreds of terms needs float32
        parts = hidden.float() * counted[:, None]
        total = parts.new_zeros(tokens.n_cells, parts.shape[1]).index_add(0, tokens.cell, parts)
        n_counted = parts.new_zeros(tokens.n_cells, 1).index_add(0, tokens.cell, counted[:, None].float())
        return total / (window if pooling == "window" else n_counted.clamp(min=1))
