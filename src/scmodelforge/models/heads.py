"""Heads: from hidden states to genes and values, from cell embeddings to labels."""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import Config, ModelConfig
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.embeddings import ExternalGenes, LearnedGenes
from scmodelforge.models.gene_prediction import GenePrediction
from scmodelforge.models.transformer import ACTIVATIONS


class MaskedGeneHead(nn.Module):
    """BERT's prediction head; its output matrix is the gene embedding itself (tied)."""

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        super().__init__()
        self.soft_cap = config.soft_cap
        self.dense = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(n_tokens))

    def forward(self, hidden: torch.Tensor, genes: LearnedGenes | ExternalGenes) -> GenePrediction:
        """From hidden states (..., width)."""
        states = self.norm(self.activation(self.dense(hidden)))
        return GenePrediction(states, genes.table(), self.bias, self.soft_cap)


class GeneNetwork(nn.Module):
    """A network of its own: Linear → ReLU → LayerNorm → dropout → Linear (TranscriptFormer), soft-capped."""

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        super().__init__()
        width = config.gene_head_dim or config.hidden_dim
        self.soft_cap = config.soft_cap
        self.layers = nn.Sequential(
            nn.Linear(config.hidden_dim, width),
            nn.ReLU(),
            nn.LayerNorm(width, eps=config.layer_norm_eps),
            nn.Dropout(config.dropout),
            nn.Linear(width, n_tokens),
        )

    def forward(self, hidden: torch.Tensor, genes: LearnedGenes | ExternalGenes) -> GenePrediction:
        """From hidden states (..., width)."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return GenePrediction(self.layers[:-1](hidden), last.weight, last.bias, self.soft_cap)


def build_gene_head(config: Config, vocab: GeneVocab) -> MaskedGeneHead | GeneNetwork:
    """The head that `model.gene_head` names."""
    kind = MaskedGeneHead if config.model.gene_head == "tied" else GeneNetwork
    return kind(config.model, vocab.n_tokens)


class CountHead(nn.Module):
    """A score of a gene's count from the hidden state before it and the gene's own vector (TranscriptFormer).

    Linear → ReLU → LayerNorm → dropout → Linear to one number, plus a number of the gene. A softmax over the scores of
    a cell's genes shares out its counts, see `objectives.counts.count_rates`.
    """

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        super().__init__()
        width = max(1, config.hidden_dim // 2)
        self.layers = nn.Sequential(
            nn.Linear(2 * config.hidden_dim, width),
            nn.ReLU(),
            nn.LayerNorm(width, eps=config.layer_norm_eps),
            nn.Dropout(config.dropout),
            nn.Linear(width, 1),
        )
        self.gene_bias = nn.Embedding(n_tokens, 1)

    def forward(self, hidden: torch.Tensor, vectors: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
        """Hidden states and gene vectors (m, width) of the genes `genes` (int64 m) → (m, 1)."""
        return self.layers(torch.cat([hidden, vectors], dim=1)) + self.gene_bias(genes)


def three_layers(n_inputs: int, width: int, n_outputs: int) -> nn.Sequential:
    """Linear → LeakyReLU → Linear → LeakyReLU → Linear (scGPT's expression decoder)."""
    return nn.Sequential(
        nn.Linear(n_inputs, width),
        nn.LeakyReLU(),
        nn.Linear(width, width),
        nn.LeakyReLU(),
        nn.Linear(width, n_outputs),
    )


class ExpressionHead(nn.Module):
    """Tells the value of a gene from its hidden state (scGPT's `ExprDecoder`).

    Beside the hidden state it reads the vector of the gene where the input hides it (`with_gene`), and a vector of
    the cell's batch with `model.objective.batch_labels`. One output for the value, or one per bin with value_loss
    cross_entropy, and a last one, the logit of being more than zero, with `zero_probability`.
    """

    def __init__(self, config: Config, vocab: GeneVocab, with_gene: bool) -> None:
        super().__init__()
        width, objective = config.model.hidden_dim, config.model.objective
        self.with_gene = with_gene
        self.batch_embedding: nn.Module | None = None
        if objective.batch_labels and objective.batch_key is not None:
            self.batch_place = list(vocab.obs_categories).index(objective.batch_key)
            n_batches = len(vocab.obs_categories[objective.batch_key]) + 1
            self.batch_embedding = nn.Sequential(
                nn.Embedding(n_batches, width), nn.LayerNorm(width, eps=config.model.layer_norm_eps)
            )
        n_inputs = width * (1 + with_gene + (self.batch_embedding is not None))
        n_outputs = config.tokenizer.n_bins if config.value_loss == "cross_entropy" else 1
        self.value = three_layers(n_inputs, width, n_outputs)
        self.nonzero = three_layers(n_inputs, width, 1) if objective.zero_probability else None

    def batch_vectors(self, obs: torch.Tensor | None) -> torch.Tensor | None:
        """Vector of each cell's batch, float (n_cells, width), from its obs categories; None without batch_labels."""
        if self.batch_embedding is None:
            return None
        assert obs is not None
        return self.batch_embedding(obs[:, self.batch_place])

    def forward(
        self, hidden: torch.Tensor, genes: torch.Tensor, obs: torch.Tensor | None, cell: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states and gene vectors (m, width) of cells `cell` (int64 m) → (m, n_outputs)."""
        parts = [hidden]
        if self.with_gene:
            parts.append(genes)
        batches = self.batch_vectors(obs)
        if batches is not None:
            parts.append(batches[cell])
        x = torch.cat(parts, dim=1)
        if self.nonzero is None:
            return self.value(x)
        return torch.cat([self.value(x), self.nonzero(x)], dim=1)


class PredictionHead(nn.Module):
    """Standardize the cell embedding, then dropout and one linear layer.

    The hidden states of all cells share a large common part. `fit_scale` measures mean and standard deviation
    once, before the head is trained, so that the linear layer sees what differs between cells.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, hidden_dim: int, n_outputs: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_dim))
        self.register_buffer("scale", torch.ones(hidden_dim))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_dim, n_outputs)

    def fit_scale(self, embeddings: torch.Tensor) -> None:
        """Take mean and standard deviation from cell embeddings (n_cells, width)."""
        self.mean.copy_(embeddings.mean(dim=0))
        self.scale.copy_(embeddings.std(dim=0, correction=0).clamp(min=1e-6))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """(n_cells, width) → (n_cells, n_outputs)."""
        return self.linear(self.dropout((embedding - self.mean) / self.scale))
