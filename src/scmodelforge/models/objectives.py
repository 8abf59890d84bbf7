"""Pretraining tasks: what is hidden, what is asked, the loss and the metrics.

A task is a function of tokens and a key, so the same cell in the same epoch is hidden the same way whatever
batch, worker or machine it comes to. Logits are computed at the asked positions only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional as F

from scmodelforge.config import Masking
from scmodelforge.data.random import below, philox, uniform
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.encoder import TransformerEncoder
from scmodelforge.tokenizers.batch import TokenBatch


@dataclass(frozen=True)
class TrainingBatch:
    """Corrupted tokens and the questions about them.

    Attributes
    ----------
    tokens
        What the model sees.
    asked
        int64 (m): flat positions (cell × length + position) that are asked.
    targets
        int64 (m): the true token at each of them.
    n_tokens
        Real tokens in the batch.
    seed
        Seed of the randomness inside the model (dropout) at this step.
    """

    tokens: TokenBatch
    asked: torch.Tensor
    targets: torch.Tensor
    n_tokens: int
    seed: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainingBatch:
        """Copy to a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking),
            asked=self.asked.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class ModelOutput:
    """What a task computes from a batch.

    Attributes
    ----------
    hidden
        float (n_cells, length, width).
    predictions
        float (m, n_tokens): logits at the asked positions.
    losses
        Loss terms by name, scalars; their sum is minimized.
    """

    hidden: torch.Tensor
    predictions: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> torch.Tensor:
        """Sum of the loss terms."""
        return torch.stack(list(self.losses.values())).sum()


class MaskedGenePrediction:
    """Name the genes that are hidden (BERT's masked language model; Geneformer's pretraining).

    Of a cell's gene tokens `mask_ratio` are asked, each by its own draw. Of those, 80 % become `<mask>`,
    10 % a random gene and 10 % stay (shares in the config); the expression value is hidden at all of them.
    Special tokens are neither hidden nor inserted, unless `reference` asks for the published collator's way,
    in which only `<pad>` and `<mask>` are protected and the random token may be any.
    """

    sums = ("loss", "asked", "top1", "top5")

    def __init__(self, masking: Masking, vocab: GeneVocab) -> None:
        self.masking = masking
        self.vocab = vocab
        known = np.ones(vocab.n_genes, dtype=bool) if vocab.medians is None else np.isfinite(vocab.medians)
        # A gene that no cell brings would give itself away as inserted.
        self.random_tokens = np.flatnonzero(known) + vocab.first_gene_token
        if masking.reference:
            self.random_tokens = np.arange(vocab.n_tokens)

    def corrupt(self, tokens: TokenBatch, seed: int, epoch: int, batch_seed: int = 0) -> TrainingBatch:
        """Hide tokens; a pure function of (seed, epoch, cell, position)."""
        masking, vocab = self.masking, self.vocab
        truth = tokens.input_ids.numpy()
        cell = tokens.cell_index.numpy()[:, None].astype(np.uint64)
        choose, action, random_token, _ = philox(
            seed,
            (cell & np.uint64(0xFFFFFFFF)).astype(np.uint32),
            (cell >> np.uint64(32)).astype(np.uint32),
            np.arange(truth.shape[1], dtype=np.uint32)[None, :],
            np.uint32(epoch),
        )
        first = 0 if masking.reference else vocab.first_gene_token
        allowed = truth >= first
        if masking.reference:
            allowed &= (truth != vocab.pad_id) & (truth != vocab.mask_id)
        asked = allowed & (uniform(choose) < masking.mask_ratio)

        drawn = uniform(action)
        masked = asked & (drawn < masking.mask_token_share)
        replaced = asked & ~masked & (drawn < masking.mask_token_share + masking.random_share)
        shown = np.where(masked, vocab.mask_id, truth)
        shown = np.where(replaced, self.random_tokens[below(random_token, len(self.random_tokens))], shown)
        positions = np.flatnonzero(asked)
        return TrainingBatch(
            tokens=replace(
                tokens,
                input_ids=torch.from_numpy(shown),
                values=tokens.values.masked_fill(torch.from_numpy(asked), 0.0),
            ),
            asked=torch.from_numpy(positions),
            targets=torch.from_numpy(truth.ravel()[positions]),
            n_tokens=int(tokens.lengths.sum()),
            seed=batch_seed,
        )

    def __call__(self, model: TransformerEncoder, batch: TrainingBatch) -> ModelOutput:
        """Mean cross-entropy over the asked positions, 0 when none is asked."""
        hidden = model(batch.tokens)
        logits = model.logits(hidden, batch.asked)
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum") / max(len(batch.targets), 1)
        return ModelOutput(hidden, logits, {"cross_entropy": loss})

    def count(self, output: ModelOutput, batch: TrainingBatch) -> torch.Tensor:
        """float64 (4): the sums named in `sums`, to be added over batches and ranks before dividing."""
        n_asked = len(batch.targets)
        top5 = output.predictions.topk(min(5, output.predictions.shape[1]), dim=1).indices
        hits = top5 == batch.targets[:, None]
        return torch.stack(
            [
                output.loss.detach().double() * n_asked,
                torch.tensor(n_asked, dtype=torch.float64, device=hits.device),
                hits[:, :1].sum().double(),
                hits.sum().double(),
            ]
        )

    @staticmethod
    def metrics(sums: torch.Tensor) -> dict[str, float]:
        """Loss, perplexity and accuracies from added-up `count`s; NaN if nothing was asked."""
        loss, asked, top1, top5 = sums.tolist()
        mean = loss / asked if asked else float("nan")
        return {
            "loss": mean,
            "perplexity": float(np.exp(mean)),
            "top1_accuracy": top1 / asked if asked else float("nan"),
            "top5_accuracy": top5 / asked if asked else float("nan"),
            "n_asked": asked,
        }
