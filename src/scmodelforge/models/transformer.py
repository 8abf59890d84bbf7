"""The transformer: attention and blocks, read from top to bottom.

What is special about it:
- it reads packed cells, (total, width): no padding anywhere, and all but attention needs no idea of cells
  (see `attention.py`);
- own q, k, v and out projections, so that adapters reach each of them, computed in one where there is none;
- LayerNorm before the sublayers (stable from scratch) or after them (BERT, and so Geneformer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scmodelforge.config import ModelConfig
from scmodelforge.models.attention import attend
from scmodelforge.models.attention_gpu import with_blocks
from scmodelforge.models.sequences import Sequences

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}
INITIALIZER_RANGE = 0.02  # Devlin et al. 2019; Theodoris et al. 2023


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
        self, x: torch.Tensor, sequences: Sequences, projected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(total, width) → the same; see `Transformer` for `projected`."""
        q, k, v = self.queries_keys_values(x)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, k, v, sequences, self.soft_cap, dropout).flatten(1)
        return self.out(mixed) if projected is None else torch.where(projected, self.out(mixed), mixed)

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(total, width) → three of (total, heads, head width)."""
        layers = (self.q, self.k, self.v)
        if all(
            type(layer) is nn.Linear for layer in layers
        ):  # one product reads x once; an adapter is a layer itself
            weight = torch.cat([layer.weight for layer in layers])
            bias = None if self.q.bias is None else torch.cat([layer.bias for layer in layers])
            q, k, v = F.linear(x, weight, bias).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        else:
            q, k, v = (layer(x).unflatten(1, (self.num_heads, -1)) for layer in layers)
        return self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype), v  # norms give float32 under autocast


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.feed_forward_dim, bias=config.bias)
        self.fc2 = nn.Linear(config.feed_forward_dim, config.hidden_dim, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(total, width) → the same."""
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
        self, x: torch.Tensor, sequences: Sequences, projected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(total, width) → the same."""
        if self.norm == "pre":
            x = x + self.dropout(self.attention(self.attention_norm(x), sequences, projected))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        if self.norm == "normed_residual":
            x = self.attention_norm(x)
            x = self.feed_forward_norm(x + self.dropout(self.attention(x, sequences, projected)))
            return x + self.dropout(self.feed_forward(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, sequences, projected)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))

    def read_by_attention(self, x: torch.Tensor) -> torch.Tensor:
        """What of the block's input x (total, width) its attention reads."""
        return x if self.norm == "post" else self.attention_norm(x)


class Transformer(nn.Module):
    """A stack of blocks; "pre" norm ends with a LayerNorm of its own, unless `final_norm` says otherwise.

    Attributes
    ----------
    recomputes
        Forget what is inside the blocks in the forward pass and compute it again in the backward pass: a fourth more
        work for a fraction of the memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        final_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.final_norm = (
            nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps) if final_norm else nn.Identity()
        )
        self.soft_cap = config.soft_cap
        self.recomputes = False

    def states(
        self, x: torch.Tensor, sequences: Sequences, projected: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the input, then the output of each block: `num_layers + 1` tensors (total, width).

        Parameters
        ----------
        x
            float (total, width): embedded tokens.
        sequences
            Which of them read which.
        projected
            bool (total, 1): which of them pass attention's out projection; None: all (see `generative.py`).
        """
        yield x
        sequences = with_blocks(sequences, x, self.soft_cap)
        for number, block in enumerate(self.blocks, 1):
            if self.recomputes and torch.is_grad_enabled():
                x = checkpoint(block, x, sequences, projected, use_reentrant=False)
            else:
                x = block(x, sequences, projected)
            yield self.final_norm(x) if number == len(self.blocks) else x

    def forward(
        self, x: torch.Tensor, sequences: Sequences, projected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last of `states`."""
        for state in self.states(x, sequences, projected):
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
