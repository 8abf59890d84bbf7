"""Heads: from hidden states to gene logits, from cell embeddings to labels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from scmodelforge.config import ModelConfig
from scmodelforge.models.transformer import ACTIVATIONS


class MaskedGeneHead(nn.Module):
    """BERT's prediction head; its output matrix is the gene embedding itself (tied)."""

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(n_tokens))

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Hidden states (m, width) and token embeddings (n_tokens, width) → logits (m, n_tokens)."""
        return F.linear(self.norm(self.activation(self.dense(hidden))), embedding, self.bias)


class PredictionHead(nn.Module):
    """Standardize the cell embedding, then dropout and one linear layer.

    The hidden states of all cells share a large common part. `fit_scale` measures mean and standard deviation
    once, before the head is trained, so that the linear layer sees what differs between cells.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, hidden_dim: int, n_outputs: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_dim))
        self.register_buffer("scale", torch.ones(hidden_dim))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_dim, n_outputs)

    def fit_scale(self, embeddings: torch.Tensor) -> None:
        """Take mean and standard deviation from cell embeddings (n_cells, width)."""
        self.mean.copy_(embeddings.mean(dim=0))
        self.scale.copy_(embeddings.std(dim=0, correction=0).clamp(min=1e-6))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """(n_cells, width) → (n_cells, n_outputs)."""
        return self.linear(self.dropout((embedding - self.mean) / self.scale))
