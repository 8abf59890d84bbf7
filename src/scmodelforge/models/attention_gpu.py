"""Attention on a GPU: torch's variable-length FlashAttention, and FlexAttention where scores are changed or hidden.

A Hopper has kernels of our own instead of the former, see `attention_hopper.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scmodelforge.models import attention_hopper
from scmodelforge.models.sequences import Sequences

varlen_attn: Callable[..., Any] | None
try:  # from torch 2.10 on; its parameters changed from version to version
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

VARLEN_PARAMETERS = frozenset(() if varlen_attn is None else inspect.signature(varlen_attn).parameters)
BLOCK = 128  # FlexAttention works on blocks of so many tokens
CHANNELS = 8  # kernels take heads whose width is a multiple of this


def has_kernel(q: torch.Tensor) -> bool:
    """Whether `variable_length` takes such queries: on a GPU, in half precision."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return varlen_attn is not None or attention_hopper.takes(q)


def varlen_options(parameters: frozenset[str], causal: bool, scale: float, width: int) -> dict[str, Any]:
    """Keywords of `varlen_attn` in the installed version: `is_causal` (2.10) or `window_size` (later).

    Raises
    ------
    NotImplementedError
        If this version has neither, or no `scale` where another one than 1/√width is needed.
    """
    options: dict[str, Any] = {}
    if causal:
        if "window_size" in parameters:
            options["window_size"] = (-1, 0)
        elif "is_causal" in parameters:
            options["is_causal"] = True
        else:
            raise NotImplementedError("This torch's varlen_attn knows neither window_size nor is_causal.")
    if not math.isclose(scale, 1 / math.sqrt(width)):
        if "scale" not in parameters:
            raise NotImplementedError("This torch's varlen_attn does not take a scale.")
        options["scale"] = scale
    return options


def variable_length(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float
) -> torch.Tensor:
    """Attention (total, heads, width) without a change of scores, in half precision."""
    if attention_hopper.takes(q):
        return attention_hopper.attend(q, k, v, sequences, scale)
    assert varlen_attn is not None
    width, room = v.shape[-1], -q.shape[-1] % CHANNELS
    q, k, v = (F.pad(x, (0, room)) if room else x for x in (q, k, v))
    options = varlen_options(VARLEN_PARAMETERS, sequences.causal, scale, q.shape[-1])
    starts, longest = sequences.cu_seqlens, sequences.max_length
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)[..., :width]


def flexible(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    soft_cap: float | None,
    scale: float,
) -> torch.Tensor:
    """Attention (total, heads, width) with any change of scores."""
    total, room = len(q), -len(q) % BLOCK
    blocks = sequences.blocks or blocks_of(sequences, total)
    changed = change_of_scores(sequences, total + room, soft_cap)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, room)).transpose(0, 1)[None] for x in (q, k, v))
    attention: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    mixed = attention(q, k, v, score_mod=changed, block_mask=blocks, scale=scale)
    return mixed[0].transpose(0, 1)[:total]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def with_blocks(sequences: Sequences, x: torch.Tensor, soft_cap: float | None) -> Sequences:
    """The same, with the blocks of x (total, …) where all layers need them, so that they are found once."""
    if not x.is_cuda or (soft_cap is None and sequences.plain):
        return sequences
    return replace(sequences, blocks=blocks_of(sequences, len(x)))


@torch.compiler.disable
def blocks_of(sequences: Sequences, total: int) -> BlockMask:
    """Which blocks of keys each block of queries reads, from the ends of sequences: no pair of tokens is looked at.

    `create_block_mask` would look at all of them: 4 GB for 65,536 tokens.
    """
    ends = sequences.cu_seqlens
    padded = total + -total % BLOCK
    number = _number(ends, padded)  # behind the last end lies one more sequence
    ends = torch.cat([ends, ends.new_full((1,), padded)])
    first, last = number[::BLOCK], number[BLOCK - 1 :: BLOCK]
    block = torch.arange(padded // BLOCK, device=ends.device, dtype=ends.dtype)
    begin, end = ends[first - 1] // BLOCK, (ends[last] - 1) // BLOCK
    read = (block >= begin[:, None]) & (block <= end[:, None])
    whole = (first == last)[:, None] & (block * BLOCK >= ends[first - 1][:, None])
    whole = whole & ((block + 1) * BLOCK <= ends[last][:, None])
    if sequences.causal:
        read, whole = read & (block <= block[:, None]), whole & (block < block[:, None])
    if sequences.read_by_all is not None:
        whole = torch.zeros_like(whole)
    reads = who_reads(sequences, padded)
    return BlockMask.from_kv_blocks(*_in_order(read & ~whole), *_in_order(whole), BLOCK, reads)


def _number(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """int64 (total): which sequence each place lies in, from 1 on."""
    places = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, places, right=True)


def _in_order(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each row are chosen, and which, those first: int32 (1, 1, n) and (1, 1, n, n)."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def who_reads(sequences: Sequences, total: int) -> Callable[..., torch.Tensor]:
    """The function that FlexAttention asks whether a token reads another."""
    number, everyone = _number(sequences.cu_seqlens, total), _filled(sequences.read_by_all, total)

    def reads(batch: Any, head: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        allowed = number[i] == number[j]
        if sequences.causal:
            allowed = allowed & (i >= j)
        return allowed if everyone is None else allowed & (everyone[j] | (i == j))

    return reads


def change_of_scores(sequences: Sequences, total: int, soft_cap: float | None) -> Callable[..., torch.Tensor]:
    """The function that FlexAttention asks what becomes of a score."""
    bias = _filled(sequences.key_bias, total)

    def changed(score: torch.Tensor, batch: Any, head: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        if bias is not None:
            score = score + (bias[j] if sequences.biases_itself else torch.where(i == j, 0.0, bias[j]))
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    return changed


def _filled(given: torch.Tensor | None, total: int) -> torch.Tensor | None:
    return None if given is None else F.pad(given, (0, total - len(given)))
