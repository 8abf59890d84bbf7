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
    """Whether products are faster than torch's kernel: not where a head alone has too many scores."""
    n_scores = rounded(piece.stop - piece.start) * rounded(read.stop - read.start)
    return q.dtype == torch.bfloat16 and 0 < n_scores <= SCORES_AT_ONCE


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

    def fill(piece: slice, read: slice, heads: slice) -> None:
        of_queries = [x[piece, heads].transpose(0, 1) for x in (gradient, q, out)]
        of_keys = [x[read, heads].transpose(0, 1) for x in (k, v)]
        found = _gradients(of_queries, of_keys, sums[piece, heads].T, causal, scale)
        for result, part, of_part in zip(results, (piece, read, read), found, strict=True):
            result[part, heads] = of_part[:, : part.stop - part.start].transpose(0, 1)

    in_threads(fill, places, q.shape[1])


def _gradients(
    of_queries: list[torch.Tensor],
    of_keys: list[torch.Tensor],
    sums: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v of one sequence, (heads, rounded length, width).

    `of_queries` are the gradient of the output, q and the output, `of_keys` k and v: (heads, length, width).
    """
    gradient, q, out = of_queries
    k, v = of_keys
    mean = (gradient.float() * out.float()).sum(-1)  # of the gradients of a row's weights
    wide_q, wide_gradient = _wide(q * scale, sums), _wide(gradient, mean)
    wide_k, wide_v = _wide(k), _wide(v)
    # Keys before queries: of the products that follow one is of a transposed matrix, otherwise two would be.
    weights = torch.bmm(wide_k, wide_q.transpose(1, 2))
    exponential(weights.view(torch.uint16).view(-1).numpy())
    if causal:
        weights.triu_()
    of_v = torch.bmm(weights, wide_gradient[..., :-2])
    of_scores = torch.bmm(wide_v, wide_gradient.transpose(1, 2)).mul_(weights)
    of_k = torch.bmm(of_scores, wide_q[..., :-2])  # scaled, as wide_q is
    return torch.bmm(of_scores.transpose(1, 2), wide_k[..., :-2]).mul_(scale), of_k, of_v


def _wide(x: torch.Tensor, subtracted: torch.Tensor | None = None) -> torch.Tensor:
    """(heads, length, width) as (heads, rounded length, width + 2), for a product less `subtracted`, (heads, length).

    That takes two channels, as one would round it; a factor without it has ones there. Zeros fill up the length, and
    have no part in any gradient.
    """
    heads, length, width = x.shape
    wide = x.new_zeros(heads, rounded(length), width + 2)
    wide[:, :length, :width] = x
    if subtracted is None:
        wide[:, :length, width:] = 1
    else:
        high = subtracted.to(x.dtype)
        wide[:, :length, width] = -high
        wide[:, :length, width + 1] = high.float() - subtracted
    return wide
