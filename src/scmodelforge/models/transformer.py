"""The transformer: attention and blocks, read from top to bottom.

What is special about it:
- own q, k, v and out projections over `scaled_dot_product_attention`, so that adapters reach each of them
  and torch picks the fastest kernel;
- LayerNorm before the sublayers (stable from scratch) or after them (BERT, and so Geneformer);
- padding is masked at the keys; a batch without padding takes the path without a mask;
- what attention may read is a bool mask; a bias on the scores and a soft cap (TranscriptFormer) leave the fast
  kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from scmodelforge.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}
INITIALIZER_RANGE = 0.02  # Devlin et al. 2019; Theodoris et al. 2023


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    soft_cap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Softmax attention (n, heads, length, head width).

    Scores are q·k / √(head width) + `bias`, squashed to soft_cap · tanh(score / soft_cap) where there is a cap.
    `allowed` (bool) and `bias` (float) broadcast against (n, heads, queries, keys). A query that may read nothing
    gets zeros.
    """
    if bias is None and soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    return F.dropout(weights, dropout, training=dropout > 0) @ v


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.soft_cap = config.soft_cap
        self.q = nn.Linear(width, width, bias=config.bias)
        self.k = nn.Linear(width, width, bias=config.bias)
        self.v = nn.Linear(width, width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)
        head, eps = width // config.num_heads, config.layer_norm_eps
        self.q_norm = nn.LayerNorm(head, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head, eps=eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        projected: int | None = None,
    ) -> torch.Tensor:
        """(n, length, width) → the same; see `attend` for `allowed` and `bias`, `Transformer` for `projected`."""
        heads = (x.shape[0], x.shape[1], self.num_heads, -1)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, k, v, allowed, bias, self.soft_cap, dropout)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        if projected is None:
            return self.out(mixed)
        return torch.cat([self.out(mixed[:, :projected]), mixed[:, projected:]], dim=1)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.feed_forward_dim, bias=config.bias)
        self.fc2 = nn.Linear(config.feed_forward_dim, config.hidden_dim, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) → the same."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm.

    The norm comes before the sublayer ("pre"), after it ("post"), or before the sublayer and its residual
    ("normed_residual").
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        projected: int | None = None,
    ) -> torch.Tensor:
        """(n, length, width) → the same."""
        if self.norm == "pre":
            x = x + self.dropout(self.attention(self.attention_norm(x), allowed, bias, projected))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        if self.norm == "normed_residual":
            x = self.attention_norm(x)
            x = self.feed_forward_norm(x + self.dropout(self.attention(x, allowed, bias, projected)))
            return x + self.dropout(self.feed_forward(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, allowed, bias, projected)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """A stack of blocks; "pre" norm ends with a LayerNorm of its own, unless `final_norm` says otherwise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        final_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.final_norm = (
            nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps) if final_norm else nn.Identity()
        )

    def states(
        self,
        x: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        projected: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the input, then the output of each block: `num_layers + 1` tensors (n, length, width).

        Parameters
        ----------
        x
            float (n, length, width): embedded tokens.
        allowed, bias
            bool and float, broadcast against (n, heads, queries, keys): which keys a query may read, and what is
            added to its scores. None: all keys, and nothing.
        projected
            How many positions, from the first, pass attention's out projection; None: all (see `generative.py`).
        """
        yield x
        for block in self.blocks[:-1]:
            x = block(x, allowed, bias, projected)
            yield x
        yield self.final_norm(self.blocks[-1](x, allowed, bias, projected))

    def forward(
        self,
        x: torch.Tensor,
        allowed: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        projected: int | None = None,
    ) -> torch.Tensor:
        """The last of `states`."""
        for state in self.states(x, allowed, bias, projected):
            x = state
        return x


def initialize(module: nn.Module) -> None:
    """Draw weights as BERT does: normal with standard deviation 0.02, zero biases, unit norms."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
