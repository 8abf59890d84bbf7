"""The types between a pretraining task and training: `TrainingBatch`, `PackedBatch`, `LossTerm`, `ModelOutput`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.gene_prediction import GenePrediction
from scmodelforge.tokenizers.batch import DeviceBatch, TokenBatch
from scmodelforge.tokenizers.packed import PackedQueries, PackedTokens, Packing, pack_queries

ASKED_MULTIPLE = 128  # matrix products like round sizes


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


class Sizes(TypedDict, total=False):
    """What a batch of fixed size is filled up to, see `pack`."""

    total: int
    n_asked: int


@dataclass(frozen=True)
class PackedBatch(DeviceBatch):
    """As `TrainingBatch`, as the model takes it: cells packed, questions by flat place.

    Attributes
    ----------
    tokens
        What the model sees.
    asked
        int64 (m): flat places that are asked; places among `queries` if there are any.
    genes, values
        int64 and float32 (m): the truth at each of them; `<pad>` and 0 where nothing is asked (the last ones of a
        batch of fixed size).
    cell
        int64 (m): row in the batch of each one's cell.
    n_tokens, seed
        As in `TrainingBatch`.
    n_asked
        How many are asked in truth, the first ones.
    queries
        Genes that are asked without being in `tokens`.
    """

    tokens: PackedTokens
    asked: torch.Tensor
    genes: torch.Tensor
    values: torch.Tensor
    cell: torch.Tensor
    n_tokens: int
    seed: int
    n_asked: int
    queries: PackedQueries | None = None

    @property
    def n_padding(self) -> int:
        """Places without a token."""
        return self.tokens.n_padding


def pack(
    batch: TrainingBatch | PackedBatch,
    packing: Packing,
    pad_id: int,
    *,
    obs_in_queries: bool = True,
    total: int | None = None,
    n_asked: int = 0,
) -> PackedBatch:
    """Pack a batch; one that is packed stays as it is.

    Parameters
    ----------
    obs_in_queries
        Whether queries are read together with obs columns.
    total
        As in `Packing.__call__`, for batches of a fixed size.
    n_asked
        Ask at least so many, the surplus about nothing, and a multiple of `ASKED_MULTIPLE`; 0: as many as there are.
    """
    if isinstance(batch, PackedBatch):
        return batch
    tokens, cell = packing(batch.tokens, total), batch.cell
    if batch.queries is None:
        asked, queries = tokens.starts[cell] + batch.asked % batch.tokens.input_ids.shape[1], None
    else:
        queries = pack_queries(tokens, batch.genes, cell, obs_in_queries)
        asked = torch.arange(len(cell), device=cell.device)
    room = 0
    if n_asked and queries is None:
        size = max(n_asked, len(asked))
        room = size + -size % ASKED_MULTIPLE - len(asked)
    return PackedBatch(
        tokens=tokens,
        asked=F.pad(asked, (0, room)),
        genes=F.pad(batch.genes, (0, room), value=pad_id),
        values=F.pad(batch.values, (0, room)),
        cell=F.pad(cell, (0, room)),
        n_tokens=batch.n_tokens,
        seed=batch.seed,
        n_asked=len(asked),
        queries=queries,
    )


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss, as a sum and a count, so that it can be added over batches before dividing.

    Attributes
    ----------
    total
        Scalar: the sum.
    count
        How many numbers were added; a tensor where only the device knows.
    weight
        Weight of the mean in the loss.
    """

    total: torch.Tensor
    count: torch.Tensor | int
    weight: float = 1.0

    @property
    def mean(self) -> torch.Tensor:
        """The mean, 0 of nothing."""
        count = self.count
        return self.total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


@dataclass(frozen=True)
class ModelOutput:
    """What a task computes from a batch.

    Attributes
    ----------
    hidden
        float (total, width); where a task reads only the asked positions, the others may be zero.
    genes
        What is said about the genes at the asked positions (m), or None.
    expression
        float (m, n_outputs) at the asked positions, or None.
    terms
        Loss terms by name.
    """

    hidden: torch.Tensor
    genes: GenePrediction | None = None
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

    def pack(self, batch: TrainingBatch | PackedBatch, **sizes: Unpack[Sizes]) -> PackedBatch:
        """The batch as the model takes it; for `sizes` see `pack`."""
        ...

    def __call__(self, model: Any, batch: TrainingBatch | PackedBatch) -> ModelOutput:
        """Predictions and loss terms."""
        ...

    def count(self, output: ModelOutput, batch: TrainingBatch | PackedBatch) -> torch.Tensor:
        """float64: the figures named in `sums`, to be added over batches and ranks before dividing."""
        ...

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Loss and metrics from added-up `count`s; NaN where nothing was asked."""
        ...
