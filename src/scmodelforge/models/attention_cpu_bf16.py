"""Attention in bfloat16 on a CPU by matrix products of whole sequences, which have that format's full speed.

Torch's own kernel multiplies small blocks, which are no faster in bfloat16 than in float32. Products of whole sequences
are, but their scores are rounded to eight binary digits, and those that count are large, and so are their errors.
Therefore a number near the largest score of a row is subtracted within the product, in a channel of its own (as the
bias in `bias_in_channels`): it cancels in the softmax, and what is left of the scores that count is small, wherever the
guess is good. `attention_cpu_gradients.py` has the way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from scmodelforge.models.bf16_kernels import softmax
from scmodelforge.models.single_threads import single_threads

# Torch's kernel uses AMX where a processor has it, and products of whole sequences were not measured against that.
HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
SCORES_AT_ONCE = 2**22  # of one thread; with more, it reads memory instead of its cache
SAMPLED = 64  # keys of which the largest score of a row is guessed
STEP = 64  # lengths are rounded up, as each shape of a product is prepared by itself
NEVER = -1e30  # score of a key that is none
FEWEST_OPERATIONS = 2**22  # scores of a head times its width; with fewer, torch's kernel is as fast


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

    def attend(piece: slice, read: slice, heads: slice) -> None:
        of_q, of_k, of_v = (x[part, heads].transpose(0, 1) for x, part in ((q, piece), (k, read), (v, read)))
        _attend(of_q, of_k, of_v, scale, out[piece, heads].transpose(0, 1), sums[piece, heads].T)

    in_threads(attend, places, q.shape[1])


def in_threads(
    compute: Callable[[slice, slice, slice], None], places: Sequence[tuple[slice, ...]], n_heads: int
) -> None:
    """Call `compute` with the places of queries and keys of each sequence, and as many heads as a cache holds."""
    work, threads = [], torch.get_num_threads()
    for piece, read in places:
        n_queries, n_keys = (rounded(part.stop - part.start) for part in (piece, read))
        at_once = max(SCORES_AT_ONCE // (n_queries * n_keys), 1)
        at_once = min(at_once, math.ceil(n_heads * len(places) / threads))  # so that all threads have some
        work += [(piece, read, slice(h, h + at_once)) for h in range(0, n_heads, at_once)]
    for _ in single_threads(threads).map(torch.inference_mode()(compute), *zip(*work, strict=True)):
        pass


def is_worth_products(q: torch.Tensor, piece: slice, read: slice, causal: bool) -> bool:
    """Whether products are faster than torch's kernel for a sequence."""
    n_operations = (piece.stop - piece.start) * (read.stop - read.start) * q.shape[2]
    return q.dtype == torch.bfloat16 and not causal and not HAS_AMX and n_operations >= FEWEST_OPERATIONS


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor, sums: torch.Tensor
) -> None:
    """Attention of one sequence: all are (heads, length, width) but `sums` (heads, length)."""
    heads, n_queries, width = q.shape
    n_keys = k.shape[1]
    rows, columns = rounded(n_queries), rounded(n_keys)
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
        softmax(scores.view(torch.uint16).view(-1, columns).numpy(), scale, log_sums.view(-1).numpy())
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


def rounded(length: int) -> int:
    """The length that products are made with, so that they come in few shapes."""
    return math.ceil(length / STEP) * STEP
