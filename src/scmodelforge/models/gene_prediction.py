"""Which gene? Predictions over the whole vocabulary, never held as a whole.

Logits of 5,000 asked positions over 20,000 genes are 400 MB, and their gradient as much again. Here they are made for
some rows at a time, which stay in the processor's cache, turned into the loss and into the gradients of states and
output matrix at once, and forgotten (the idea of Wijmans et al. 2024, "Cut your losses", and of Liger's fused linear
cross-entropy). No operation is done twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from scmodelforge.models.bf16_kernels import softmax
from scmodelforge.models.single_threads import single_threads

ROWS_ON_CPU = 512  # 20 MB of logits over 20,000 genes, in half precision
ROWS_ON_GPU = 4096
ROWS_BY_TORCH = 64  # 5 MB in float32, of such a chunk on the CPU


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(logits / cap), or the logits as they are without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class GenePrediction:
    """What a head says about asked positions, before the last matrix.

    Attributes
    ----------
    states
        float (m, width).
    weight, bias
        float (n_tokens, width) and (n_tokens): the output matrix.
    soft_cap
        See `soft_capped`.
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    soft_cap: float | None

    @property
    def logits(self) -> torch.Tensor:
        """All logits at once, float (m, n_tokens)."""
        return soft_capped(F.linear(self.states, self.weight, self.bias), self.soft_cap)

    def cross_entropy(self, genes: torch.Tensor, ignored: int) -> torch.Tensor:
        """Sum over the asked positions of −log p(gene), float32; none of those whose gene (int64 m) is `ignored`."""
        states, weight, bias = self.states, self.weight, self.bias
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            states, weight, bias = states.to(dtype), weight.to(dtype), bias.to(dtype)
        return linear_cross_entropy(states, weight, bias, genes, ignored, self.soft_cap)

    def chunks(self, genes: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """float32 logits and true genes of some rows at a time, for the first states as there are `genes`."""
        states = self.states[: len(genes)]
        for rows in row_chunks(states):
            part = GenePrediction(states[rows], self.weight, self.bias, self.soft_cap)
            yield part.logits.float(), genes[rows]


def row_chunks(states: torch.Tensor) -> list[slice]:
    """The rows of (m, width) that are looked at together."""
    return _slices(len(states), ROWS_ON_GPU if _is_large(states) else ROWS_ON_CPU)


def _is_large(states: torch.Tensor) -> bool:
    """Whether chunks are large: compiled, one needs no copies beside its logits, and each is compiled by itself."""
    return states.is_cuda or torch.compiler.is_compiling()


def _has_kernel(states: torch.Tensor) -> bool:
    """Whether a kernel makes the softmax of a chunk in place."""
    return (
        states.device.type == "cpu" and states.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    )


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, n, step)]


def linear_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    genes: torch.Tensor,
    ignored: int,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies of soft_capped(states · weightᵀ + bias) against `genes`, float32 scalar.

    Parameters
    ----------
    states
        float (m, width).
    weight, bias
        float (n_tokens, width) and (n_tokens), of the same dtype.
    genes
        int64 (m): the right rows of `weight`; `ignored` adds nothing.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (states, weight, bias)):
        return _LinearCrossEntropy.apply(states, weight, bias, genes, ignored, soft_cap)
    return _total_and_gradients(states, weight, bias, genes, ignored, soft_cap, gradients=False)[0]


def _total_and_gradients(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    genes: torch.Tensor,
    ignored: int,
    soft_cap: float | None,
    gradients: bool,
) -> tuple[torch.Tensor, ...]:
    of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight, dtype=torch.float32)
    of_bias = torch.zeros_like(bias, dtype=torch.float32)
    log_p_of_right = torch.empty(len(states), device=states.device)
    # The same memory for all chunks: fetching it anew costs more than the arithmetic.
    chunks = row_chunks(states)
    n_rows = min(chunks[0].stop, len(states)) if chunks else 0
    some_logits = states.new_empty(n_rows, len(weight))
    some_of_weight = torch.empty_like(weight)
    large, by_kernel = _is_large(states), _has_kernel(states)
    at_once = n_rows if large or (by_kernel and soft_cap is None) else min(ROWS_BY_TORCH, n_rows)
    room = None if by_kernel else states.new_empty(at_once, len(weight), dtype=torch.float32)
    counted = (genes != ignored).to(states.dtype)
    right = torch.where(genes != ignored, genes, 0)
    for rows in chunks:
        some_states, weights = states[rows], counted[rows, None]
        logits = some_logits[: len(some_states)]
        torch.addmm(bias, some_states, weight.T, out=logits)
        for part in _slices(len(logits), at_once):
            some_right = right[rows][part]
            log_p_of_right[rows][part] = _to_gradient(logits[part], some_right, room, soft_cap, gradients)
        if not gradients:
            continue
        # Rows that do not count are taken out of the small factors, not of the large one.
        of_states[rows] = (logits @ weight) * weights
        torch.mm(logits.T, some_states * weights, out=some_of_weight)
        of_weight += some_of_weight
        of_bias += (weights.T @ logits)[0]
    return -(log_p_of_right * counted).sum(), of_states, of_weight, of_bias


def _to_gradient(
    logits: torch.Tensor,
    right: torch.Tensor,
    room: torch.Tensor | None,
    soft_cap: float | None,
    gradients: bool,
) -> torch.Tensor:
    """log p(gene) of `right` (n), float32; turns `logits` (n, n_tokens) into the gradient of its negative sum.

    `room` is float32, of at least as many rows, as a softmax with a conversion would fetch memory anew; None: there is
    the kernel, which needs none.
    """
    n = len(logits)
    each = torch.arange(n, device=logits.device)
    slope = None
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_()
        slope = 1 - logits.square() if gradients else None
        logits.mul_(soft_cap)
    if room is None:
        chosen = logits[each, right].float()
        chosen -= _softmax_by_kernel(logits)
    elif _is_large(logits):
        log_p = torch.log_softmax(room[:n].copy_(logits), 1, out=room[:n])
        chosen = log_p[each, right]
        if gradients:
            torch.exp(log_p, out=logits)
    else:
        chosen = logits[each, right].float()
        chosen -= _softmax(room[:n].copy_(logits))
        if gradients:
            logits.copy_(room[:n])
    if gradients:
        logits[each, right] -= 1
        if slope is not None:
            logits *= slope
    return chosen


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Turn float32 logits (n, n_tokens) into their softmax; return log Σ exp, float32 (n)."""
    largest = logits.amax(1)
    torch.softmax(logits, 1, out=logits)  # one exponential less than by log_softmax
    return largest - logits.amax(1).log()  # of the largest, as float32 may have no number for another one


def _softmax_by_kernel(logits: torch.Tensor) -> torch.Tensor:
    """As `_softmax`, of bfloat16: one pass over each row, which stays in the cache of a thread."""
    log_sums = logits.new_empty(len(logits), dtype=torch.float32)
    bits, found, threads = logits.view(torch.uint16).numpy(), log_sums.numpy(), torch.get_num_threads()
    parts = _slices(len(logits), math.ceil(len(logits) / threads))
    for _ in single_threads(threads).map(lambda part: softmax(bits[part], 1.0, found[part]), parts):
        pass
    return log_sums


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed beside the loss, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        genes: torch.Tensor,
        ignored: int,
        soft_cap: float | None,
    ) -> torch.Tensor:
        total, *gradients = _total_and_gradients(states, weight, bias, genes, ignored, soft_cap, True)
        ctx.save_for_backward(*gradients)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_states, of_weight, of_bias = ctx.saved_tensors
        factor = factors[0]
        return (
            of_states * factor.to(of_states.dtype),
            (of_weight * factor).to(ctx.dtype),
            (of_bias * factor).to(ctx.dtype),
            None,
            None,
            None,
        )
