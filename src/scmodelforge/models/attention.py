"""Attention over packed sequences: every cell reads itself alone, and nothing is spent on padding.

Three ways lead to the same result, so that each device takes its fastest:
- on a GPU the kernels of `attention_gpu.py`;
- on the CPU torch's attention, or in bfloat16 matrix products, sequence by sequence (`attention_cpu.py`);
- the formula itself for one sequence after the other, wherever the others do not apply.
No mask over a batch is ever built.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from scmodelforge.models.attention_cpu import attend_each
from scmodelforge.models.attention_gpu import CHANNELS, flexible, has_kernel, variable_length
from scmodelforge.models.sequences import Queries, Sequences, pieces


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    queries: Queries | None = None,
) -> torch.Tensor:
    """Softmax attention within sequences, (total, heads, head width) → the same.

    Scores are q·k / √(head width) + bias, squashed to soft_cap · tanh(score / soft_cap) where there is a cap. With
    `queries`, where `may_leave_out` allows them, q and the result are (m, heads, head width), theirs alone.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if queries is not None:
        return attend_each(q, k, v, queries.cu_seqlens, sequences.cu_seqlens, False, scale)[0]
    if dropout == 0 and soft_cap is None and sequences.plain:
        if sequences.key_bias is None:
            return _fastest(q, k, v, sequences, scale)
        biased = bias_in_channels(q, k, v, sequences.key_bias, scale)
        return _fastest(*biased, sequences, scale)[..., : v.shape[-1]]
    if dropout == 0 and q.is_cuda:
        return flexible(q, k, v, sequences, soft_cap, scale)
    return attend_by_formula(q, k, v, sequences, soft_cap, dropout)


def may_leave_out(x: torch.Tensor, sequences: Sequences, soft_cap: float | None, dropout: float) -> bool:
    """Whether `attend` can serve some queries alone: on a CPU, not compiled, where scores are what they are.

    On a GPU sizes would change from step to step, and the kernels know one packing.
    """
    changed = soft_cap is not None or sequences.key_bias is not None or sequences.read_by_all is not None
    elsewhere = x.is_cuda or torch.compiler.is_compiling()
    return not (changed or elsewhere or sequences.causal or dropout)


def bias_in_channels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v with more channels, such that q·k · scale has the bias (total) of each key added to it.

    The bias rides in two channels of the keys, its leading digits and the rest, which a half precision needs; the
    queries have ones there. Zeros fill up to a multiple of `CHANNELS`.
    """
    scaled = bias / scale
    high = scaled.to(k.dtype)
    low = (scaled - high.float()).to(k.dtype)
    n_heads, room = q.shape[1], -(q.shape[2] + 2) % CHANNELS
    more = torch.stack([high, low], dim=-1)[:, None].expand(-1, n_heads, -1)
    return (
        F.pad(F.pad(q, (0, 2), value=1.0), (0, room)),
        F.pad(torch.cat([k, more], dim=-1), (0, room)),
        F.pad(v, (0, 2 + room)),
    )


def _fastest(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float
) -> torch.Tensor:
    if has_kernel(q):
        return variable_length(q, k, v, sequences, scale)
    if q.is_cuda:
        return attend_by_formula(q, k, v, sequences, scale=scale)
    starts = sequences.cu_seqlens
    return attend_each(q, k, v, starts, starts, sequences.causal, scale)[0]


@torch.compiler.disable
def attend_by_formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """As `attend`, one sequence after the other: by torch's attention, or written out where scores are capped."""
    scale = scale or 1 / math.sqrt(q.shape[-1])
    parts, end = [], 0
    for (piece,) in pieces(sequences.cu_seqlens):
        of_q, of_k, of_v = (x[piece].transpose(0, 1)[None] for x in (q, k, v))
        bias, allowed = _bias(sequences, piece), _allowed(sequences, piece)
        if soft_cap is not None:
            mixed = _capped(of_q, of_k, of_v, bias, allowed, soft_cap, dropout, scale)
        elif bias is None and sequences.read_by_all is None:
            mixed = F.scaled_dot_product_attention(
                of_q, of_k, of_v, dropout_p=dropout, is_causal=sequences.causal, scale=scale
            )
        else:
            mask = allowed
            if bias is not None:
                mask = (bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)).to(q.dtype)
            mixed = F.scaled_dot_product_attention(
                of_q, of_k, of_v, attn_mask=mask, dropout_p=dropout, scale=scale
            )
        parts.append(mixed[0].transpose(0, 1))
        end = piece.stop
    return torch.cat([*parts, v.new_zeros(len(v) - end, *v.shape[1:])])


def _bias(sequences: Sequences, piece: slice) -> torch.Tensor | None:
    """What is added to the scores of one sequence, float32 (length, length)."""
    if sequences.key_bias is None:
        return None
    bias = sequences.key_bias[piece]
    bias = bias.expand(len(bias), -1)
    itself = torch.eye(len(bias), dtype=torch.bool, device=bias.device)
    return bias if sequences.biases_itself else bias.masked_fill(itself, 0.0)


def _allowed(sequences: Sequences, piece: slice) -> torch.Tensor | None:
    """Who reads whom in one sequence, bool (length, length)."""
    length, device = piece.stop - piece.start, sequences.cu_seqlens.device
    allowed = None
    if sequences.causal:
        allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if sequences.read_by_all is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)
        readable = sequences.read_by_all[piece] | itself
        allowed = readable if allowed is None else allowed & readable
    return allowed


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    allowed: torch.Tensor | None,
    soft_cap: float,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Attention (1, heads, length, width) of one sequence whose scores are squashed."""
    weights = _weights(q, k, bias, allowed, soft_cap, scale).to(v.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ v


def _weights(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    allowed: torch.Tensor | None,
    soft_cap: float | None,
    scale: float,
) -> torch.Tensor:
    """How much each token of one sequence reads of each, (…, length, length), from q and k (…, length, width)."""
    scores = q @ k.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(dim=-1)


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    sequences: Sequences,
    heads: Sequence[int],
    soft_cap: float | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weights that `attend` mixes by: of each sequence its place, and float32 (length, length), mean of heads.

    Rows read, columns are read; a row adds up to 1. One head of one sequence is in memory at a time.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    for (piece,) in pieces(sequences.cu_seqlens):
        bias, allowed = _bias(sequences, piece), _allowed(sequences, piece)
        of_heads = (_weights(q[piece, h], k[piece, h], bias, allowed, soft_cap, scale).float() for h in heads)
        yield piece, functools.reduce(torch.add, of_heads) / len(heads)
