"""Attention over packed sequences: every cell reads itself alone, and nothing is spent on padding.

Three ways lead to the same result, so that each device takes its fastest:
- on a GPU in half precision torch's variable-length FlashAttention, or FlexAttention where scores are capped, biased
  or read by some only;
- on the CPU `scaled_dot_product_attention` for one sequence after the other, behind one operator, so that
  `torch.compile` sees neither the loop nor its lengths;
- the formula itself for one sequence after the other, wherever the others do not apply.
No mask over a batch is ever built.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

varlen_attn: Callable[..., Any] | None
try:  # from torch 2.10 on; its parameters changed from version to version
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

VARLEN_PARAMETERS = frozenset(() if varlen_attn is None else inspect.signature(varlen_attn).parameters)
BLOCK = 128  # FlexAttention works on blocks of so many tokens
MOST_SCORES = 2**22  # of a sequence (heads × length²) that a processor's cache holds in half precision
CHANNELS = 8  # the kernels of a GPU take heads whose width is a multiple of this


@dataclass(frozen=True)
class Sequences:
    """Which tokens of a packed batch read which.

    Attributes
    ----------
    cu_seqlens
        int32 (n_sequences + 1): where each sequence begins, and the end of the last.
    max_length
        No sequence is longer.
    causal
        A token reads only what comes before it, and itself.
    key_bias
        float32 (total): added to the score of a token wherever it is read; None: nothing.
    biases_itself
        Whether `key_bias` of a token is added where the token reads itself, too.
    read_by_all
        bool (total): a token that is not is read by itself alone. None: all are.
    blocks
        What FlexAttention needs to know of all this, see `with_blocks`.
    """

    cu_seqlens: torch.Tensor
    max_length: int
    causal: bool = False
    key_bias: torch.Tensor | None = None
    biases_itself: bool = True
    read_by_all: torch.Tensor | None = None
    blocks: BlockMask | None = None

    @property
    def plain(self) -> bool:
        """Whether scores are those of the queries and keys, with at most a bias of the keys."""
        return self.read_by_all is None and (self.key_bias is None or self.biases_itself)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    soft_cap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention within sequences, (total, heads, head width) → the same.

    Scores are q·k / √(head width) + bias, squashed to soft_cap · tanh(score / soft_cap) where there is a cap.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if dropout == 0 and soft_cap is None and sequences.plain:
        if sequences.key_bias is None:
            return _fastest(q, k, v, sequences, scale)
        biased = bias_in_channels(q, k, v, sequences.key_bias, scale)
        return _fastest(*biased, sequences, scale)[..., : v.shape[-1]]
    if dropout == 0 and q.is_cuda:
        return _flexible(q, k, v, sequences, soft_cap, scale)
    return attend_by_formula(q, k, v, sequences, soft_cap, dropout)


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
    if q.is_cuda and varlen_attn is not None and q.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(q, k, v, sequences, scale)
    if q.is_cuda:
        return attend_by_formula(q, k, v, sequences, scale=scale)
    return attend_each(q, k, v, sequences.cu_seqlens, sequences.causal, scale)[0]


# --- GPU ------------------------------------------------------------------------------------------


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


def _variable_length(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float
) -> torch.Tensor:
    assert varlen_attn is not None
    width, room = v.shape[-1], -q.shape[-1] % CHANNELS
    q, k, v = (F.pad(x, (0, room)) if room else x.contiguous() for x in (q, k, v))
    options = varlen_options(VARLEN_PARAMETERS, sequences.causal, scale, q.shape[-1])
    starts, longest = sequences.cu_seqlens, sequences.max_length
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)[..., :width]


def _flexible(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    soft_cap: float | None,
    scale: float,
) -> torch.Tensor:
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


# --- one sequence after the other -----------------------------------------------------------------


def _pieces(cu_seqlens: torch.Tensor) -> Iterator[slice]:
    """The sequences that are not empty."""
    starts = cu_seqlens.tolist()
    return (slice(a, b) for a, b in itertools.pairwise(starts) if b > a)


def _log_sums(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("scmodelforge::attend_each", mutates_args=())
def attend_each(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (total, heads, width) on the CPU, and float32 or 64 (total, heads): log of the sum of exp(score)."""
    out, sums = torch.empty_like(q), _log_sums(q)
    for piece in _pieces(cu_seqlens):
        parts = [x[piece].transpose(0, 1)[None] for x in (q, k, v)]
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
    cu_seqlens: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    by_products = q.dtype == torch.bfloat16
    factors = _factors(gradient, q, k, v, out, sums, scale) if by_products else ()
    for piece in _pieces(cu_seqlens):
        parts = [x[piece].transpose(0, 1) for x in (gradient, q, k, v, out)]
        if by_products and q.shape[1] * (piece.stop - piece.start) ** 2 <= MOST_SCORES:
            wide = [x[piece].transpose(0, 1) for x in factors]
            gradients = _gradients(parts[:3], wide, causal, scale)
        else:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            whole = kernel(*(x[None] for x in parts), sums[piece].T[None], 0.0, causal, scale=scale)
            gradients = tuple(x[0] for x in whole)
        for result, part in zip(results, gradients, strict=True):
            result[piece] = part.transpose(0, 1)
    return results


def _factors(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Four tensors (total, heads, width + 2), whose products are log weights, and gradients of weights less their mean.

    What is to be subtracted rides in channels of its own, as in `bias_in_channels`.
    """
    ones = q.new_ones(*q.shape[:2], 2)
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
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), _log_sums(q)


@_attend_each_backward.register_fake
def _(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, sums, cu_seqlens = ctx.saved_tensors
    gradients = _attend_each_backward(
        gradient.contiguous(), q, k, v, out, sums, cu_seqlens, ctx.causal, ctx.scale
    )
    return (*gradients, None, None, None)


attend_each.register_autograd(_backward, setup_context=_keep)


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
    for piece in _pieces(sequences.cu_seqlens):
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
    for piece in _pieces(sequences.cu_seqlens):
        bias, allowed = _bias(sequences, piece), _allowed(sequences, piece)
        of_heads = (_weights(q[piece, h], k[piece, h], bias, allowed, soft_cap, scale).float() for h in heads)
        yield piece, functools.reduce(torch.add, of_heads) / len(heads)
