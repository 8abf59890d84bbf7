"""Attention in bfloat16 on a CPU by matrix products of whole sequences, which have that format's full speed.

Torch's own kernel multiplies small blocks, which are no faster in bfloat16 than in float32. Products of whole sequences
are, but their scores are rounded to eight binary digits, and those that count are large, and so are their errors.
Therefore a number near the largest score of a row is subtracted within the product, in a channel of its own (as the
bias in `bias_in_channels`): it cancels in the softmax, and what is left of the scores that count is small, wherever the
guess is good. Backward, the log of the sum is subtracted, so that the product is the log weight itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from threadpoolctl import threadpool_limits

from scmodelforge.models.attention_cpu_kernel import softmax

# Torch's kernel uses AMX where a processor has it, and products of whole sequences were not measured against that.
HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
SCORES_AT_ONCE = 2**22  # of one thread
SAMPLED = 64  # keys of which the largest score of a row is guessed
STEP = 64  # lengths are rounded up, as each shape of a product is prepared by itself
NEVER = -1e30  # score of a key that is none
FEWEST_SCORES = 2**16  # of a head; with fewer, torch's kernel is as fast
MOST_SCORES = 2**22  # of a sequence (heads × length²) that a processor's cache holds


def attend_by_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: Sequence[tuple[slice, ...]],
    scale: float,
    out: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Fill `out` and `sums` with what `attend_each` returns of sequences; `places`: of the queries and keys of each.

    Each thread computes a sequence by itself, or some heads of a long one.
    """
    work, threads = [], torch.get_num_threads()
    for piece, read in places:
        n_queries, n_keys = (_rounded(part.stop - part.start) for part in (piece, read))
        at_once = max(SCORES_AT_ONCE // (n_queries * n_keys), 1)
        at_once = min(at_once, math.ceil(q.shape[1] * len(places) / threads))  # so that all threads have some
        work += [(piece, read, slice(h, h + at_once)) for h in range(0, q.shape[1], at_once)]

    @torch.inference_mode()
    def attend(piece: slice, read: slice, heads: slice) -> None:
        of_q, of_k, of_v = (x[part, heads].transpose(0, 1) for x, part in ((q, piece), (k, read), (v, read)))
        _attend(of_q, of_k, of_v, scale, out[piece, heads].transpose(0, 1), sums[piece, heads].T)

    for _ in _threads(threads).map(attend, *zip(*work, strict=True)):
        pass


def is_worth_products(q: torch.Tensor, piece: slice, read: slice, causal: bool) -> bool:
    """Whether products are faster than torch's kernel for a sequence."""
    n_scores = (piece.stop - piece.start) * (read.stop - read.start)
    return q.dtype == torch.bfloat16 and not causal and not HAS_AMX and n_scores >= FEWEST_SCORES


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor, sums: torch.Tensor
) -> None:
    """Attention of one sequence: all are (heads, length, width) but `sums` (heads, length)."""
    heads, n_queries, width = q.shape
    n_keys = k.shape[1]
    rows, columns = _rounded(n_queries), _rounded(n_keys)
    wide_q, wide_k = q.new_zeros(heads, rows, width + 2), k.new_zeros(heads, columns, width + 2)
    filled_v = v.new_zeros(heads, columns, v.shape[2])
    wide_q[:, :n_queries, :width] = q
    wide_k[:, :n_keys, :width] = k
    filled_v[:, :n_keys] = v
    sample = _sample(wide_q[:, :n_queries, :width], wide_k[:, :n_keys, :width])
    near = torch.bmm(wide_q[:, :, :width], sample.transpose(1, 2)).float().amax(-1)
    wide_q[:, :, width], wide_k[:, :n_keys, width] = -near, 1
    wide_q[:, :, width + 1], wide_k[:, n_keys:, width + 1] = 1, NEVER
    block = max(SCORES_AT_ONCE // (heads * columns) // STEP, 1) * STEP
    for first in range(0, n_queries, block):
        part = slice(first, min(first + block, n_queries))
        scores = torch.bmm(wide_q[:, first : first + block], wide_k.transpose(1, 2))
        log_sums = torch.empty(scores.shape[:2], dtype=torch.float32)
        softmax(scores.flatten(0, 1).view(torch.uint16).numpy(), scale, log_sums.flatten().numpy())
        n = part.stop - first
        out[:, part] = torch.bmm(scores, filled_v)[:, :n]
        sums[:, part] = log_sums[:, :n] + near[:, part] * scale


def _sample(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Keys (heads, at most SAMPLED, width), one of them nearly the best for each query: what all read, and others."""
    n_keys = k.shape[1]
    if n_keys <= SAMPLED:
        return k
    read_most = (k * q.mean(1, keepdim=True)).sum(-1).topk(SAMPLED // 2).indices
    evenly = torch.arange(SAMPLED // 2) * n_keys // (SAMPLED // 2)
    places = torch.cat([read_most, evenly.expand(len(k), -1)], dim=1)
    return k.gather(1, places[..., None].expand(-1, -1, k.shape[2]))


def _rounded(length: int) -> int:
    return math.ceil(length / STEP) * STEP


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    """`n` threads, in each of which torch computes with one thread alone."""

    def alone() -> None:
        torch.get_num_threads()  # torch asks for its number when a thread first needs it, and not again
        # For this thread alone; torch.set_num_threads would be for others, too.
        threadpool_limits(1, user_api="openmp")

    return ThreadPoolExecutor(n, thread_name_prefix="attention", initializer=alone)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not come along


def factors_of_gradients(
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


def gradients(
    parts: list[torch.Tensor], factors: list[torch.Tensor], causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v of one sequence, (heads, length, width), by five matrix products in half precision.

    Up to twice as fast as torch's kernel while the scores stay in the processor's cache. `parts` are the gradient of
    the output, q and k, `factors` those of `factors_of_gradients`.
    """
    gradient, q, k = parts
    wide_q, wide_k, wide_gradient, wide_v = factors
    weights = torch.bmm(wide_q, wide_k.transpose(1, 2)).exp_()
    if causal:
        weights.tril_()
    of_v = torch.bmm(weights.transpose(1, 2), gradient)
    of_scores = torch.bmm(wide_gradient, wide_v.transpose(1, 2)).mul_(weights)
    return torch.bmm(of_scores, k) * scale, torch.bmm(of_scores.transpose(1, 2), q) * scale, of_v
