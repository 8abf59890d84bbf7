"""Attention on the CPU, sequence by sequence: by torch's kernel, or in bfloat16 by our products.

It is one operator, so that `torch.compile` sees neither the loop nor its lengths.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from scmodelforge.models.attention_cpu_bf16 import attend_by_products, is_worth_products
from scmodelforge.models.attention_cpu_gradients import gradients_by_products, has_gradients_by_products
from scmodelforge.models.sequences import pieces

# Cells of different lengths need matrix products of different shapes. oneDNN keeps 1,024 of them, and torch in each
# thread 1,024 descriptions of a quarter of a megabyte: in a long run a third of all memory. Both are read at the first
# product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
os.environ.setdefault("LRU_CACHE_CAPACITY", "48")


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
    by_products = []
    for piece, read in pieces(cu_queries, cu_seqlens):
        if is_worth_products(q, piece, read, causal):
            by_products.append((piece, read))
            continue
        parts = [x[part].transpose(0, 1)[None] for x, part in ((q, piece), (k, read), (v, read))]
        mixed, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, causal, scale=scale
        )
        out[piece] = mixed[0].transpose(0, 1)
        sums[piece] = log_sum[0].T
    if by_products:
        attend_by_products(q, k, v, by_products, scale, out, sums)
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
    by_products = []
    for piece, read in pieces(cu_queries, cu_seqlens):
        if has_gradients_by_products(q, piece, read):
            by_products.append((piece, read))
            continue
        given = ((gradient, piece), (q, piece), (k, read), (v, read), (out, piece))
        parts = [x[part].transpose(0, 1)[None] for x, part in given]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, sums[piece].T[None], 0.0, causal, scale=scale
        )
        for result, place, part in zip(results, (piece, read, read), found, strict=True):
            result[place] = part[0].transpose(0, 1)
    if by_products:
        gradients_by_products(gradient, q, k, v, out, sums, by_products, causal, scale, results)
    return results


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
