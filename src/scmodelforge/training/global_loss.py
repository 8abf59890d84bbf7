"""The loss over the cells of all processes, of which each process sees its share.

DDP and FSDP average gradients over the processes. Processes whose cells ask unequally many questions would then weigh
a question unequally. So each process divides its sums by the counts of all: the averaged gradient is that of the
global batch, as if one process had seen all cells. It costs one all-reduce of a few numbers a step, and the host
waits for nothing. A term that compares the cells of a batch with each other (`ecs`) sees those of its process only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed

from scmodelforge.models.objectives.batch import LossTerm


@dataclass(frozen=True)
class GlobalLoss:
    """The loss of a step over all processes.

    Attributes
    ----------
    share
        Scalar with a gradient, to be minimized here: averaged over the processes, it is `mean`.
    mean
        Scalar: weighted sum of `terms`.
    terms
        Scalars by name: mean of each term, without its weight.
    token_imbalance
        Scalar: tokens of the process that has most, over the mean of all; 1 if there is one process.
    """

    share: torch.Tensor
    mean: torch.Tensor
    terms: dict[str, torch.Tensor]
    token_imbalance: torch.Tensor


def global_loss(terms: Mapping[str, LossTerm], n_tokens: int) -> GlobalLoss:
    """Divide the loss terms of this process by what all processes count.

    Parameters
    ----------
    terms
        Loss terms by name; every process has the same names.
    n_tokens
        Real tokens in the batch of this process.
    """
    rank, world = _place()
    n_terms = len(terms)
    device = next(iter(terms.values())).total.device
    # Totals, counts, and a place for the tokens of each process, so that a sum over processes keeps them apart.
    sums = torch.zeros(2 * n_terms + world, dtype=torch.float64, device=device)
    for place, term in enumerate(terms.values()):
        sums[place] = term.total.detach()
        sums[n_terms + place] = term.count
    sums[2 * n_terms + rank] = n_tokens
    if world > 1:
        distributed.all_reduce(sums)
    totals, counts, tokens = sums.split([n_terms, n_terms, world])
    counts = counts.clamp(min=1).float()
    means = totals.float() / counts
    weights = [term.weight for term in terms.values()]
    share = torch.stack(
        [
            weight * term.total / (count / world)
            for weight, term, count in zip(weights, terms.values(), counts, strict=True)
        ]
    ).sum()
    return GlobalLoss(
        share=share,
        mean=torch.stack([weight * mean for weight, mean in zip(weights, means, strict=True)]).sum(),
        terms=dict(zip(terms, means, strict=True)),
        token_imbalance=tokens.max() / tokens.mean().clamp(min=1),
    )


def _place() -> tuple[int, int]:
    """Number of this process and of all that train together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
