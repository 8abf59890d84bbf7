"""From the hidden states of a cell's tokens to one embedding of the cell."""

from __future__ import annotations

import torch

from scmodelforge.tokenizers.batch import TokenBatch


def pool(
    hidden: torch.Tensor, tokens: TokenBatch, pooling: str, first_gene_token: int, window: int
) -> torch.Tensor:
    """Pool hidden states (n_cells, length, width) into cell embeddings (n_cells, width).

    "cls" takes the first position; "mean" averages over gene tokens, without special ones and padding, as
    Geneformer's "cell" embeddings do; "window" adds up all tokens and divides by the longest input `window`, as
    TranscriptFormer does. A cell without any gene token has a mean of zero.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "window":
        counted = tokens.attention_mask.float()
    else:
        counted = ((tokens.input_ids >= first_gene_token) & tokens.attention_mask).float()
    with torch.autocast(hidden.device.type, enabled=False):  # a sum of hundreds of terms needs float32
        total = torch.einsum("nlw,nl->nw", hidden.float(), counted)
        return total / (window if pooling == "window" else counted.sum(dim=1, keepdim=True).clamp(min=1))
