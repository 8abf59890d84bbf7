"""Attention on a Hopper GPU (H100, H200): a forward pass for Triton, and torch's backward pass.

torch's FlashAttention 2 does not use what a Hopper has for matrix products, and reaches a third of its rate; the same
algorithm, compiled by Triton for it, is 1.4 times as fast, and 1.7 times where attention is causal (measured on an
H200 with heads of 64 channels; the figures are in docs/performance.md). Other GPUs were not measured, and take torch's.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import torch

from scmodelforge.models.sequences import Sequences

# Width of a head → queries and keys of a block, warps, blocks of keys that are loaded ahead; the fastest on an H200.
TILES = {32: (64, 64, 4, 2), 64: (128, 64, 8, 3), 128: (128, 64, 4, 2)}


@cache
def _is_hopper(device: torch.device) -> bool:
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(device)[0] == 9


@torch.compiler.assume_constant_result
def _takes(width: int, device: torch.device) -> bool:
    return width in TILES and _is_hopper(device)


def takes(q: torch.Tensor) -> bool:
    """Whether `attend` takes such queries: heads of 32, 64 or 128 channels on a Hopper, where Triton is installed."""
    return _takes(q.shape[-1], q.device)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float
) -> torch.Tensor:
    """Attention (total, heads, width) within sequences, in half precision; channels lie side by side in memory."""
    starts, longest = sequences.cu_seqlens, sequences.max_length
    return attend_on_hopper(q, k, v, starts, longest, sequences.causal, scale)[0]


@torch.library.custom_op("scmodelforge::attend_on_hopper", mutates_args=())
def attend_on_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (total, heads, width), and float32 (heads, total): log of the sum of exp(score), as torch keeps it."""
    from scmodelforge.models.attention_hopper_kernel import forward

    total, heads, width = q.shape
    out, sums = torch.empty(q.shape, dtype=q.dtype, device=q.device), _log_sums(q)
    query_block, key_block, warps, stages = TILES[width]
    blocks = -(-longest // query_block)
    forward[(blocks * heads * (len(cu_seqlens) - 1),)](
        *(q, k, v, out, sums, cu_seqlens),
        *(x.stride(0) for x in (q, k, v)),
        *(x.stride(1) for x in (q, k, v)),
        total,
        blocks,
        scale / math.log(2),
        heads=heads,
        width=width,
        causal=causal,
        query_block=query_block,
        key_block=key_block,
        num_warps=warps,
        num_stages=stages,
    )
    return out, sums


def _log_sums(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


@attend_on_hopper.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _log_sums(q)


@torch.library.custom_op("scmodelforge::attend_on_hopper_backward", mutates_args=())
def _attend_on_hopper_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    undrawn = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of a dropout that there is not
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        *(gradient, q, k, v, out, sums, cu_seqlens, cu_seqlens, longest, longest),
        *(0.0, causal, undrawn, unused),
        scale=scale,
    )


@_attend_on_hopper_backward.register_fake
def _(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.longest, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, sums, cu_seqlens = ctx.saved_tensors
    gradients = _attend_on_hopper_backward(
        gradient.contiguous(), q, k, v, out, sums, cu_seqlens, ctx.longest, ctx.causal, ctx.scale
    )
    return (*gradients, None, None, None, None)


attend_on_hopper.register_autograd(_backward, setup_context=_keep)
