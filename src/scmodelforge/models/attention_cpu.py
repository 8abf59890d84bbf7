"""Attention on the CPU, one sequence after the other.

It is one operator, so that `torch.compile` sees neither the loop nor its lengths.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from scmodelforge.models.sequences import pieces

# Cells of different lengths need matrix products of different shapes, and oneDNN keeps 1,024 of them: small pieces of
# memory that stay between large ones that go, and so take half a gigabyte. It reads this at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

MOST_SCORES = 2**22  # of a sequence (heads × length²) that a processor's cache holds in half precision


def _log_sums(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("scmodelforge::attend_each", mutates_args=())
def attend_each(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries (m, heads, width) on the CPU, and log Σ exp(score), float32 or 64 (m, heads).

    Keys and values are (total, heads, width); `cu_queries` and `cu_seqlens` say where sequences begin in m and total.
    """
    out, sums = torch.empty_like(q), _log_sums(q)
    for piece, read in pieces(cu_queries, cu_seqlens):
        parts = [x[part].transpose(0, 1)[None] for x, part in ((q, piece), (k, read), (v, read))]
        mixed, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, causal, scale=scale
        )
        out[piece] = mixed[0].transpose(0, 1)
        sums[piece] = log_sum[0].T
    return out, sums


@torch.library.custom_op("scmodelforge::attend_each_backward", mutates_args=())
def _attend_each_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)  # without queries keys have none
    by_products = q.dtype == torch.bfloat16
    factors = _factors(gradient, q, k, v, out, sums, scale) if by_products else ()
    for piece, read in pieces(cu_queries, cu_seqlens):
        n_scores = q.shape[1] * (piece.stop - piece.start) * (read.stop - read.start)
        if by_products and n_scores <= MOST_SCORES:
            wide = [_heads_first(*pair) for pair in zip(factors, (piece, read, piece, read), strict=True)]
            parts = [_heads_first(gradient, piece), _heads_first(q, piece), _heads_first(k, read)]
            gradients = _gradients(parts, wide, causal, scale)
        else:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            given = ((gradient, piece), (q, piece), (k, read), (v, read), (out, piece))
            parts = [_heads_first(*pair) for pair in given]
            whole = kernel(*(x[None] for x in parts), sums[piece].T[None], 0.0, causal, scale=scale)
            gradients = tuple(x[0] for x in whole)
        for result, place, part in zip(results, (piece, read, read), gradients, strict=True):
            result[place] = part.transpose(0, 1)
    return results


def _heads_first(x: torch.Tensor, part: slice) -> torch.Tensor:
    return x[part].transpose(0, 1)


def _factors(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Four tensors (m or total, heads, width + 2): products are log weights, and gradients of weights less their mean.

    What is to be subtracted rides in channels of its own, as in `bias_in_channels`.
    """
    ones = k.new_ones(*k.shape[:2], 2)
    mean = (gradient.float() * out.float()).sum(-1)

    def less(x: torch.Tensor, subtracted: torch.Tensor) -> torch.Tensor:
        high = subtracted.to(x.dtype)
        low = (subtracted - high.float()).to(x.dtype)
        return torch.cat([x, -high[..., None], -low[..., None]], dim=-1)

    wide_k, wide_v = (torch.cat([x, ones], dim=-1) for x in (k, v))
    return less(q * scale, sums), wide_k, less(gradient, mean), wide_v


def _gradients(
    parts: list[torch.Tensor], factors: list[torch.Tensor], causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v of one sequence, (heads, length, width), by five matrix products in half precision.

    Up to twice as fast as torch's kernel while the scores stay in the processor's cache. `parts` are the gradient of
    the output, q and k, `factors` those of `_factors`.
    """
    gradient, q, k = parts
    wide_q, wide_k, wide_gradient, wide_v = factors
    weights = torch.bmm(wide_q, wide_k.transpose(1, 2)).exp_()
    if causal:
        weights.tril_()
    of_v = torch.bmm(weights.transpose(1, 2), gradient)
    of_scores = torch.bmm(wide_gradient, wide_v.transpose(1, 2)).mul_(weights)
    return torch.bmm(of_scores, k) * scale, torch.bmm(of_scores.transpose(1, 2), q) * scale, of_v


@attend_each.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), _log_sums(q)


@_attend_each_backward.register_fake
def _(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_queries, cu_seqlens, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_queries, cu_seqlens)


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, sums, *ends = ctx.saved_tensors
    gradients = _attend_each_backward(gradient.contiguous(), q, k, v, out, sums, *ends, ctx.causal, ctx.scale)
    return (*gradients, None, None, None, None)


attend_each.register_autograd(_backward, setup_context=_keep)
