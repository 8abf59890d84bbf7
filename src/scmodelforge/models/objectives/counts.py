"""Counts that are never zero: the zero-truncated Poisson distribution of TranscriptFormer's counts.

A gene is in the sequence because it was seen, so its count is at least 1: p(c) = μᶜ / (c! (exp μ − 1)).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

EPSILON = 1e-6  # added to rates and to the counts that steer attention (TranscriptFormer)


def count_rates(
    scores: torch.Tensor, counts: torch.Tensor, cell: torch.Tensor, n_cells: int, asked: torch.Tensor
) -> torch.Tensor:
    """Rates μ float32 (m): the cell's counts shared out among its genes by a softmax of their scores.

    Parameters
    ----------
    scores, counts
        float (m): score and true count of each gene.
    cell
        int64 (m): row in the batch of its cell.
    n_cells
        Cells in the batch.
    asked
        bool (m): those that take part; the others get 0.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.float().masked_fill(~asked, -torch.inf)
        largest = scores.new_full((n_cells,), torch.finfo(scores.dtype).min)
        largest = largest.scatter_reduce(0, cell, scores.detach(), "amax")
        weights = (scores - largest[cell]).exp()

        def per_cell(x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(n_cells).index_add(0, cell, x)[cell]

        share = weights / per_cell(weights).where(asked, 1.0)
        return share * per_cell(counts.float() * asked)


def count_nll(rates: torch.Tensor, counts: torch.Tensor, reference: bool = False) -> torch.Tensor:
    """Negative log-likelihood float (m) of counts (m) under zero-truncated Poisson distributions of `rates` (m).

    −c log μ + log(exp μ − 1) + log c!, with ε added to μ. `reference` takes max(μ − softplus(−μ), 0) for the second
    term, as TranscriptFormer's code does: close for large μ, wrong below 1 (0.03 for −0.43 at μ = 0.5).
    """
    rates = rates + EPSILON
    exact = rates + torch.log(-torch.expm1(-rates))
    log_norm = (rates - F.softplus(-rates)).clamp(min=0) if reference else exact
    return log_norm - counts * rates.log() + torch.lgamma(counts + 1)


def expected_counts(rates: torch.Tensor) -> torch.Tensor:
    """Means (m) of the zero-truncated Poisson distributions of `rates` (m): μ / (1 − exp −μ)."""
    rates = rates + EPSILON
    return rates / -torch.expm1(-rates)


def draw_counts(rates: torch.Tensor, uniforms: torch.Tensor, largest: float | None) -> torch.Tensor:
    """Counts float (m) from 1 on, at most `largest`, drawn by inversion with `uniforms` (m) in [0, 1)."""
    rates = rates.double() + EPSILON
    highest = float(rates.max()) if len(rates) else 1.0
    n = int(largest) if largest is not None else int(highest + 12 * np.sqrt(highest)) + 20
    counts = torch.arange(1, n + 1, device=rates.device, dtype=torch.float64)
    cumulative = torch.exp(-count_nll(rates[:, None], counts)).cumsum(dim=1)
    below = (cumulative <= uniforms[:, None].double()).sum(dim=1)
    return (below + 1).clamp(max=n).float()
