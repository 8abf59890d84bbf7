"""Tokens to vectors: a gene embedding plus a learned embedding of the rank (BERT's position)."""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import ModelConfig


class RankEmbedding(nn.Module):
    """Gene token embedding + rank embedding → LayerNorm → dropout."""

    def __init__(self, config: ModelConfig, n_tokens: int, max_length: int, pad_id: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, config.hidden_dim, padding_idx=pad_id)
        self.ranks = nn.Embedding(max_length, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 (n, length) → float (n, length, width). The position of a token is its rank in the cell."""
        return self.dropout(self.norm(self.tokens(input_ids) + self.ranks.weight[: input_ids.shape[1]]))
