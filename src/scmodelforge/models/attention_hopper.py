"""Attention on a Hopper GPU (H100, H200), by kernels for Triton.

torch's FlashAttention 2 does not use what a Hopper has for matrix products, and reaches a third of its rate. The same
algorithm, compiled for it by Triton, is 1.4 times as fast forward and 1.3 times backward (on an H200, with heads of 64
channels; see docs/performance.md), and gives the same bits each time. Other GPUs were not measured, and take torch's.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any, NamedTuple

import torch

from scmodelforge.models.sequences import Sequences


class Tile(NamedTuple):
    """What one program of a kernel takes: rows that it computes, rows that it reads at a time, and how it does."""

    rows: int
    read: int
    warps: int
    stages: int


# Width of a head → tiles of the forward pass, of the gradients of keys and of queries: the fastest seen on an H200.
TILES = {
    32: (Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2)),
    64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
    128: (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}
BLOCK = 64  # rows of a program of `mean_gradient`


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
    """Attention (total, heads, width), and for the backward pass log Σ exp(score), float32 (heads, total)."""
    from scmodelforge.models.attention_hopper_kernel import forward

    out, sums = q.new_empty(q.shape), _log_sums(q)
    tile, _, _ = TILES[q.shape[-1]]
    programs, sizes = _sizes(q, k, v, cu_seqlens, longest, tile)
    with torch.cuda.device(q.device):  # Triton takes the current one
        forward[programs](
            *(q, k, v, out, sums, cu_seqlens),
            *sizes,
            scale / math.log(2),
            **_constants(q, causal, tile),
            query_block=tile.rows,
            key_block=tile.read,
        )
    return out, sums


def _sizes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, tile: Tile
) -> tuple[tuple[int], tuple[int, ...]]:
    """How many programs a kernel has, and the sizes that all kernels are told."""
    blocks = -(-longest // tile.rows)
    strides = (*(x.stride(0) for x in (q, k, v)), *(x.stride(1) for x in (q, k, v)))
    return (blocks * q.shape[1] * (len(cu_seqlens) - 1),), (*strides, len(q), blocks)


def _constants(q: torch.Tensor, causal: bool, tile: Tile) -> dict[str, Any]:
    """What kernels are compiled for."""
    _, heads, width = q.shape
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"heads": heads, "width": width, "causal": causal, **options}


def _log_sums(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@attend_on_hopper.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), _log_sums(q)


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
    from scmodelforge.models.attention_hopper_kernel import (
        gradient_of_keys,
        gradient_of_queries,
        mean_gradient,
    )

    total, heads, width = q.shape
    means = torch.empty_like(sums)
    of_q, of_k, of_v = (x.new_empty(x.shape) for x in (q, k, v))
    with torch.cuda.device(q.device):
        mean_gradient[(-(-total // BLOCK), heads)](
            out, gradient, means, total, heads=heads, width=width, block=BLOCK
        )
        given = (q, k, v, gradient, sums, means, cu_seqlens)
        _, tile, tile_of_q = TILES[width]
        programs, sizes = _sizes(q, k, v, cu_seqlens, longest, tile)
        gradient_of_keys[programs](
            *given,
            *(of_k, of_v),
            *sizes,
            *(scale / math.log(2), scale),
            **_constants(q, causal, tile),
            key_block=tile.rows,
            query_block=tile.read,
        )
        programs, sizes = _sizes(q, k, v, cu_seqlens, longest, tile_of_q)
        gradient_of_queries[programs](
            *given,
            of_q,
            *sizes,
            *(scale / math.log(2), scale),
            **_constants(q, causal, tile_of_q),
            query_block=tile_of_q.rows,
            key_block=tile_of_q.read,
        )
    return of_q, of_k, of_v


@_attend_on_hopper_backward.register_fake
def _(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
