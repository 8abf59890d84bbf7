"""A "model" that knows no cell: how often genes are the answer, and what their values are on average.

It answers the pretraining tasks as a model does, so its loss and metrics are computed by the same code. It is fitted on
the answers of reference cells, drawn by the task's own rules. Where genes are asked, it knows how often each of them is
the answer at a rank, in ranges of ranks that double (0, 1, 2–3, 4–7, …), drawn towards the frequency at all ranks.
Where values are asked, it knows the mean of each gene (of a loss over bins: how often the gene is in each bin), drawn
towards that of all genes. A gene that was never asked has what all genes have in common.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.gene_prediction import GenePrediction
from scmodelforge.models.objectives.batch import LossTerm, PackedBatch
from scmodelforge.tokenizers.packed import PackedQueries, PackedTokens

N_RANGES = 16  # of ranks; the last one begins at 2**15 - 1
RARE = 0.1  # answers that each token is given beforehand, so that none is impossible
SHRINKAGE = (
    1e4  # answers at all ranks that are added to those of a range: of 100, 1,000, … the best on blood cells
)
VALUE_SHRINKAGE = 1.0  # values of all genes that are added to those of a gene
BIN_SHRINKAGE = 10.0  # the same where all bins are to be told


class MeanPrediction:
    """What a task asks a model, answered without looking at the cell; made by `fit_means`.

    Attributes
    ----------
    log_frequency
        float32 (n_tokens, `N_RANGES`): log probability of a token at a range of ranks.
    outputs
        float32 (n_tokens, n_outputs): what an expression head would say of each gene.
    """

    auxiliary = None

    def __init__(self, log_frequency: torch.Tensor, outputs: torch.Tensor) -> None:
        self.log_frequency, self.outputs = log_frequency, outputs

    def to(self, device: str) -> MeanPrediction:
        """Copy to a device."""
        return MeanPrediction(self.log_frequency.to(device), self.outputs.to(device))

    def __call__(self, tokens: PackedTokens) -> torch.Tensor:
        """In the place of hidden states: which range of ranks a token is in, float32 (total, `N_RANGES`)."""
        return torch.nn.functional.one_hot(range_of(tokens.positions), N_RANGES).float()

    def genes_at(self, hidden: torch.Tensor, places: torch.Tensor) -> GenePrediction:
        """The frequencies as logits."""
        return GenePrediction(
            hidden[places], self.log_frequency, hidden.new_zeros(len(self.log_frequency)), None
        )

    def expression(
        self, hidden: torch.Tensor, where: object, genes: torch.Tensor | PackedQueries, *_: object
    ) -> torch.Tensor:
        """The values of the asked genes (m, n_outputs), in the order of arguments that each architecture has."""
        return self.outputs[genes.ids if isinstance(genes, PackedQueries) else genes]

    def expression_of(self, states: torch.Tensor, genes: torch.Tensor, *_: object) -> torch.Tensor:
        """The values of the asked genes (m, n_outputs)."""
        return self.outputs[genes]

    def generated_states(self, tokens: PackedTokens, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing that is looked at."""
        return self(tokens), self(tokens)

    def pool(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        """Nothing that is looked at."""
        return hidden

    def auxiliary_terms(self, *_: object) -> dict[str, LossTerm]:
        """It has no cell embedding to judge."""
        return {}


def range_of(ranks: torch.Tensor) -> torch.Tensor:
    """int64: the range of ranks that each rank lies in; they double in size."""
    return torch.log2(ranks.clamp(min=0).double() + 1).long().clamp(max=N_RANGES - 1)


def fit_means(config: Config, vocab: GeneVocab, batches: Iterable[PackedBatch]) -> MeanPrediction:
    """Count the answers in batches of a task."""
    shape = (vocab.n_tokens, N_RANGES)
    answers = np.zeros(shape)
    values, genes = [], []
    for batch in batches:
        asked = slice(batch.n_asked)
        genes.append(batch.genes[asked].numpy())
        values.append(batch.values[asked].numpy().astype(np.float64))
        if batch.queries is None:
            ranges = range_of(batch.tokens.positions[batch.asked[asked]]).numpy()
            answers += np.bincount(genes[-1] * N_RANGES + ranges, minlength=answers.size).reshape(shape)
    frequency = answers.sum(axis=1, keepdims=True) + RARE
    frequency /= frequency.sum()
    at_ranks = answers + SHRINKAGE * frequency
    log_frequency = np.log(at_ranks / at_ranks.sum(axis=0))
    outputs = _outputs(config, vocab, np.concatenate(genes), np.concatenate(values))
    return MeanPrediction(
        torch.from_numpy(log_frequency.astype(np.float32)), torch.from_numpy(outputs.astype(np.float32))
    )


def _outputs(config: Config, vocab: GeneVocab, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What an expression head would say of each token, float64 (n_tokens, n_outputs)."""
    real = genes >= vocab.first_gene_token  # <eos> has no value
    genes, values = genes[real], values[real]

    def mean(of: np.ndarray, shrinkage: float = VALUE_SHRINKAGE) -> np.ndarray:
        n = np.bincount(genes, minlength=vocab.n_tokens)
        total = np.bincount(genes, weights=of, minlength=vocab.n_tokens)
        return ((total + shrinkage * of.mean()) / (n + shrinkage))[:, None]

    if not len(genes):
        return np.zeros((vocab.n_tokens, 1))
    if config.value_loss == "zero_truncated_poisson":
        return np.log(mean(values))  # its softmax shares out a cell's counts
    if config.value_loss == "cross_entropy":
        bins = [mean(values == number, BIN_SHRINKAGE) for number in range(config.tokenizer.n_bins)]
        outputs = np.log(np.concatenate(bins, axis=1) + 1e-6)
    else:
        outputs = mean(values)
    if config.model.objective.zero_probability:
        positive = mean(values > 0).clip(1e-6, 1 - 1e-6)
        outputs = np.concatenate([outputs, np.log(positive / (1 - positive))], axis=1)
    return outputs
