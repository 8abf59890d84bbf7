"""Gradients of attention in bfloat16 on a CPU, by five matrix products of whole sequences.

As in `attention_cpu_bf16.py`, what would be rounded too coarsely is subtracted within the products, in channels of its
own: the log of a row's sum, so that a product is the log weight itself, and the mean of the gradients of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scmodelforge.models.attention_cpu_bf16 import SCORES_AT_ONCE, in_threads, rounded
from scmodelforge.models.bf16_kernels import exponential


def has_gradients_by_products(q: torch.Tensor, piece: slice, read: slice) -> bool:
    """Whether products are faster than torch's kernel: where a head's scores stay in the processor's cache."""
    n_scores = rounded(piece.stop - piece.start) * rounded(read.stop - read.start)
    return q.dtype == torch.bfloat16 and n_scores <= SCORES_AT_ONCE


def gradients_by_products(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    places: Sequence[tuple[slice, ...]],
    causal: bool,
    scale: float,
    results: tuple[torch.Tensor, ...],
) -> None:
    """Fill `results` with the gradients of q, k and v of sequences; `places`: of the queries and keys of each.

    Each thread computes a sequence by itself, or some heads of a long one.
    """
    factors = _factors(gradient, q, k, v, out, sums, scale)

    def fill(piece: slice, read: slice, heads: slice) -> None:
        parts = [_padded(x[part, heads]) for x, part in zip(factors, (piece, read, piece, read), strict=True)]
        found = _gradients(parts, causal, scale)
        for result, part, of_part in zip(results, (piece, read, read), found, strict=True):
            result[part, heads] = of_part[:, : part.stop - part.start].transpose(0, 1)

    in_threads(fill, places, q.shape[1])


def _factors(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Four tensors (m or total, heads, width + 2): products are log weights, and gradients of weights less a mean."""
    ones = k.new_ones(*k.shape[:2], 2)
    mean = (gradient.float() * out.float()).sum(-1)

    def less(x: torch.Tensor, subtracted: torch.Tensor) -> torch.Tensor:
        high = subtracted.to(x.dtype)
        low = (subtracted - high.float()).to(x.dtype)
        return torch.cat([x, -high[..., None], -low[..., None]], dim=-1)

    wide_k, wide_v = (torch.cat([x, ones], dim=-1) for x in (k, v))
    return less(q * scale, sums), wide_k, less(gradient, mean), wide_v


def _padded(x: torch.Tensor) -> torch.Tensor:
    """(length, heads, width) as (heads, rounded length, width), with zeros, which have no part in any gradient."""
    length, heads, width = x.shape
    padded = x.new_zeros(heads, rounded(length), width)
    padded[:, :length] = x.transpose(0, 1)
    return padded


def _gradients(parts: list[torch.Tensor], causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v of one sequence, (heads, length, width); `parts`: its `_factors`."""
    wide_q, wide_k, wide_gradient, wide_v = parts
    # Keys before queries: of the products that follow one is of a transposed matrix, otherwise two would be.
    weights = torch.bmm(wide_k, wide_q.transpose(1, 2))
    exponential(weights.view(torch.uint16).flatten().numpy())
    if causal:
        weights.triu_()
    of_v = torch.bmm(weights, wide_gradient[..., :-2])
    of_scores = torch.bmm(wide_v, wide_gradient.transpose(1, 2)).mul_(weights)
    of_k = torch.bmm(of_scores, wide_q[..., :-2])  # scaled, as wide_q is
    return torch.bmm(of_scores.transpose(1, 2), wide_k[..., :-2]).mul_(scale), of_k, of_v
