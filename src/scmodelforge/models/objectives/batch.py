"""The types between a pretraining task and training: `TrainingBatch`, `LossTerm`, `ModelOutput`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import DeviceBatch, TokenBatch


@dataclass(frozen=True)
class TrainingBatch(DeviceBatch):
    """Corrupted tokens and the questions about them.

    Attributes
    ----------
    tokens
        What the model sees.
    asked
        int64 (m): flat positions that are asked: cell × length + position, where the length is that of
        `tokens`, or of `queries` if there are any.
    genes
        int64 (m): the true token at each of them.
    values
        float32 (m): the true value at each of them.
    n_tokens
        Real tokens in the batch.
    seed
        Seed of the randomness inside the model (dropout) at this step.
    queries
        int64 (n_cells, n_queries), `<pad>` on the right: genes that are asked without being in `tokens`.
    """

    tokens: TokenBatch
    asked: torch.Tensor
    genes: torch.Tensor
    values: torch.Tensor
    n_tokens: int
    seed: int
    queries: torch.Tensor | None = None

    @property
    def cell(self) -> torch.Tensor:
        """int64 (m): row in the batch of each asked position."""
        length = self.tokens.input_ids.shape[1] if self.queries is None else self.queries.shape[1]
        return self.asked // length


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss, as a sum and a count, so that it can be added over batches before dividing.

    Attributes
    ----------
    total
        Scalar: the sum.
    count
        How many numbers were added.
    weight
        Weight of the mean in the loss.
    """

    total: torch.Tensor
    count: int
    weight: float = 1.0

    @property
    def mean(self) -> torch.Tensor:
        """The mean, 0 of nothing."""
        return self.total / max(self.count, 1)


@dataclass(frozen=True)
class ModelOutput:
    """What a task computes from a batch.

    Attributes
    ----------
    hidden
        float (n_cells, length, width).
    gene_logits
        float (m, n_tokens) at the asked positions, or None.
    expression
        float (m, n_outputs) at the asked positions, or None.
    terms
        Loss terms by name.
    """

    hidden: torch.Tensor
    gene_logits: torch.Tensor | None = None
    expression: torch.Tensor | None = None
    terms: dict[str, LossTerm] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """Mean of each term, without its weight."""
        return {name: term.mean for name, term in self.terms.items()}

    @property
    def loss(self) -> torch.Tensor:
        """Weighted sum of the terms, which is minimized."""
        return torch.stack([term.weight * term.mean for term in self.terms.values()]).sum()


class Objective(Protocol):
    """A pretraining task, made from the config and the vocabulary; it holds no parameters.

    Attributes
    ----------
    sums
        Names of the figures that `count` gives.
    """

    sums: tuple[str, ...]

    def __init__(self, config: Config, vocab: GeneVocab) -> None: ...

    def corrupt(self, tokens: TokenBatch, seed: int, epoch: int, batch_seed: int = 0) -> TrainingBatch:
        """Hide and ask; a pure function of (seed, epoch, cell, position)."""
        ...

    def __call__(self, model: Any, batch: TrainingBatch) -> ModelOutput:
        """Predictions and loss terms."""
        ...

    def count(self, output: ModelOutput, batch: TrainingBatch) -> torch.Tensor:
        """float64: the figures named in `sums`, to be added over batches and ranks before dividing."""
        ...

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Loss and metrics from added-up `count`s; NaN where nothing was asked."""
        ...
