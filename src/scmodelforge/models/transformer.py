"""The transformer: attention and blocks, read from top to bottom.

What is special about it:
- it reads packed cells, (total, width): no padding anywhere, and all but attention needs no idea of cells
  (see `attention.py`);
- own q, k, v and out projections, so that adapters reach each of them, computed in one where there is none;
- LayerNorm before the sublayers (stable from scratch) or after them (BERT, and so Geneformer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scmodelforge.config import ModelConfig
from scmodelforge.models.attention import attend, may_leave_out
from scmodelforge.models.attention_gpu import with_blocks
from scmodelforge.models.sequences import Queries, Sequences

# ReLU in place: no gradient needs what goes in.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": torch.relu_}
INITIALIZER_RANGE = 0.02  # Devlin et al. 2019; Theodoris et al. 2023


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is its weight and bias and no more: no adapter, and nobody listens to it."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


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
        sequences: Sequences,
        projected: torch.Tensor | None = None,
        queries: Queries | None = None,
    ) -> torch.Tensor:
        """(total, width) → the same, or (m, width) of `queries`; see `Transformer` for `projected`."""
        q, k, v = self.queries_keys_values(x, queries)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, k, v, sequences, self.soft_cap, dropout, queries).flatten(1)
        return self.out(mixed) if projected is None else torch.where(projected, self.out(mixed), mixed)

    def queries_keys_values(
        self, x: torch.Tensor, queries: Queries | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(total, width) → three of (total, heads, head width); the first (m, …) where there are `queries`."""
        if queries is None:
            q, k, v = self._heads(x, self.q, self.k, self.v)
        else:
            (q,), (k, v) = self._heads(_read(x, queries), self.q), self._heads(x, self.k, self.v)
        return self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype), v  # norms give float32 under autocast

    def _heads(self, x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
        """What each layer makes of x, (…, heads, head width)."""
        linear = [layer for layer in layers if _is_plain(layer)]
        if len(linear) < len(layers):  # an adapter is a layer itself
            return [layer(x).unflatten(1, (self.num_heads, -1)) for layer in layers]
        weight = torch.cat([layer.weight for layer in linear])  # one product reads x once
        bias = None if linear[0].bias is None else torch.cat([layer.bias for layer in linear])
        return F.linear(x, weight, bias).unflatten(1, (len(linear), self.num_heads, -1)).unbind(1)


def _read(x: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    return x if queries is None else x.index_select(0, queries.places)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.feed_forward_dim, bias=config.bias)
        self.fc2 = nn.Linear(config.feed_forward_dim, config.hidden_dim, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(total, width) → the same."""
        in_one = self.activation is torch.relu_ and not torch.is_grad_enabled() and _is_plain(self.fc1)
        if in_one and x.is_cuda and self.fc1.bias is not None and torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
            return self.fc2(linear_relu(*(t.to(half) for t in (x, self.fc1.weight, self.fc1.bias))))
        return self.fc2(self.activation(self.fc1(x)))


@torch.library.custom_op("scmodelforge::linear_relu", mutates_args=())
def linear_relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer and its ReLU in one kernel, (total, n) → (total, m), for a GPU where no gradient is asked."""
    return torch._addmm_activation(bias, x, weight.t())


@linear_relu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])  # and not len(x), which would fix the size


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm.

    The norm comes before the sublayer ("pre"), after it ("post"), or before the sublayer and its residual
    ("normed_residual"). With `rounds_residuals` what it returns is bfloat16, see `rounded_residuals`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.rounds_residuals = False
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        projected: torch.Tensor | None = None,
        queries: Queries | None = None,
    ) -> torch.Tensor:
        """(total, width) → the same, or (m, width) of `queries`."""
        if self.norm != "post":
            normed = self._normed(self.attention_norm, x)
            attended = self.dropout(self.attention(normed, sequences, projected, queries))
            if self.norm == "pre":
                x = _read(x, queries) + attended
                return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
            x = self._normed(self.feed_forward_norm, _read(normed, queries) + attended)
            return x + self.dropout(self.feed_forward(x))
        attended = self.dropout(self.attention(x, sequences, projected, queries))
        x = self._normed(self.attention_norm, _read(x, queries) + attended)
        return self._normed(self.feed_forward_norm, x + self.dropout(self.feed_forward(x)))

    def _normed(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = norm(x)  # float32 under autocast
        return x.bfloat16() if self.rounds_residuals else x

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
    rounds_residuals
        Give bfloat16 to the first block, see `rounded_residuals`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        final_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.final_norm = (
            nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps) if final_norm else nn.Identity()
        )
        self.soft_cap, self.attention_dropout = config.soft_cap, config.attention_dropout
        self.recomputes = False
        self.rounds_residuals = False

    def states(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        projected: torch.Tensor | None = None,
        read: torch.Tensor | None = None,
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
        read
            int64 (m), ascending: of the last tensor, nobody reads but these places; the others may be zero. None: all.
        """
        if self.rounds_residuals:
            x = x.bfloat16()
        yield x
        sequences = with_blocks(sequences, x, self.soft_cap)
        *earlier, last = self.blocks
        for block in earlier:
            x = self._through(block, x, sequences, projected)
            yield x
        dropout = self.attention_dropout if self.training else 0.0
        if read is None or projected is not None or not may_leave_out(x, sequences, self.soft_cap, dropout):
            yield self.final_norm(self._through(last, x, sequences, projected))
            return
        some = self.final_norm(self._through(last, x, sequences, None, Queries.at(read, sequences)))
        yield some.new_zeros(x.shape).index_copy(0, read, some)

    def _through(self, block: nn.Module, x: torch.Tensor, *how: Any) -> torch.Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, x, *how, use_reentrant=False)
        return block(x, *how)

    def forward(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        projected: torch.Tensor | None = None,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last of `states`."""
        for state in self.states(x, sequences, projected, read):
            x = state
        return x


@contextmanager
def rounded_residuals(model: nn.Module, rounded: bool) -> Iterator[None]:
    """Within it the blocks of `model` hand bfloat16 to each other, if `rounded`.

    Under autocast that is the arithmetic of a model whose weights are bfloat16, with half the memory traffic.
    """
    parts = [part for part in model.modules() if isinstance(part, Transformer | Block)]
    for part in parts:
        part.rounds_residuals = rounded
    try:
        yield
    finally:
        for part in parts:
            part.rounds_residuals = False


def initialize(module: nn.Module) -> None:
    """Draw weights as BERT does: normal with standard deviation 0.02, zero biases, unit norms."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
