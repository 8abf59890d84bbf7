"""The transformer: attention and blocks, read from top to bottom.

What is special about it:
- own q, k, v and out projections over `scaled_dot_product_attention`, so that adapters reach each of them
  and torch picks the fastest kernel;
- LayerNorm before the sublayers (stable from scratch) or after them (BERT, and so Geneformer);
- padding is masked at the keys; a batch without padding takes the path without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from scmodelforge.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}
INITIALIZER_RANGE = 0.02  # Devlin et al. 2019; Theodoris et al. 2023


class Attention(nn.Module):
    """Multi-head self-attention, bidirectional."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """(n, length, width) → the same; `key_mask` bool (n, 1, 1, length), True where a key may be read."""
        heads = (x.shape[0], x.shape[1], self.num_heads, -1)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.feed_forward_dim)
        self.fc2 = nn.Linear(config.feed_forward_dim, config.hidden_dim)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) → the same."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm before ("pre") or after ("post") it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """(n, length, width) → the same."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), key_mask))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, key_mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """A stack of blocks; "pre" norm ends with a LayerNorm of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = (
            nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
            if config.norm == "pre"
            else nn.Identity()
        )

    def states(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Yield the input, then the output of each block: `num_layers + 1` tensors (n, length, width).

        Parameters
        ----------
        x
            float (n, length, width): embedded tokens.
        attention_mask
            bool (n, length), True at real tokens; None where there is no padding.
        """
        key_mask = None if attention_mask is None else attention_mask[:, None, None, :]
        yield x
        for block in self.blocks[:-1]:
            x = block(x, key_mask)
            yield x
        yield self.final_norm(self.blocks[-1](x, key_mask))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The last of `states`."""
        for state in self.states(x, attention_mask):
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
