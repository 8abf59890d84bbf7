"""Tokens to vectors: genes, their ranks or values, and what is known about the cell."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from scmodelforge.config import Config, ModelConfig
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.packed import PackedTokens

MASKED_VALUE = -1.0  # what stands in the place of a hidden value (scGPT)
LARGEST_VALUE = 512.0  # larger values are clamped (scGPT)


class LearnedGenes(nn.Embedding):
    """A learned vector per token."""

    def table(self) -> torch.Tensor:
        """All vectors, float (n_tokens, width)."""
        return self.weight


class ExternalGenes(nn.Module):
    """Given vectors, such as protein language model embeddings, and a network that maps them to the model's width.

    Linear → ReLU → LayerNorm → dropout → Linear, as in TranscriptFormer. The vectors are frozen unless
    `model.train_gene_embeddings`.
    """

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        super().__init__()
        assert config.gene_embedding_dim is not None
        self.trained = config.train_gene_embeddings
        self.vectors = nn.Embedding(n_tokens, config.gene_embedding_dim)
        self.vectors.requires_grad_(self.trained)
        self.network = nn.Sequential(
            nn.Linear(config.gene_embedding_dim, config.hidden_dim),
            nn.ReLU(),
            nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_dim, config.hidden_dim),
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 (...) → float (..., width)."""
        return self.network(self.vectors(input_ids))

    def load_vectors(self, vectors: torch.Tensor) -> None:
        """Take the given vectors, float (n_tokens, `model.gene_embedding_dim`)."""
        with torch.no_grad():
            self.vectors.weight.copy_(vectors)

    def table(self) -> torch.Tensor:
        """All vectors as the model sees them, float (n_tokens, width)."""
        return self.network(self.vectors.weight)


def gene_table(config: ModelConfig, vocab: GeneVocab) -> LearnedGenes | ExternalGenes:
    """Learned or external gene embeddings, as the config says."""
    if config.gene_embedding_dim is not None:
        return ExternalGenes(config, vocab.n_tokens)
    return LearnedGenes(vocab.n_tokens, config.hidden_dim, padding_idx=vocab.pad_id)


class RankEmbedding(nn.Module):
    """Gene embedding + embedding of the rank (BERT's position) → LayerNorm → dropout."""

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__()
        model = config.model
        self.tokens = gene_table(model, vocab)
        self.ranks = nn.Embedding(config.tokenizer.max_genes, model.hidden_dim)
        self.norm = nn.LayerNorm(model.hidden_dim, eps=model.layer_norm_eps)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, tokens: PackedTokens) -> torch.Tensor:
        """Float (total, width). The position of a token is its rank in the cell."""
        ranks = self.ranks(tokens.positions.clamp(min=0))
        return self.dropout(self.norm(self.tokens(tokens.input_ids) + ranks))

    def genes(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Gene vectors without rank, float (..., width)."""
        return self.tokens(input_ids)


class ContinuousValues(nn.Module):
    """A number → Linear → ReLU → Linear → LayerNorm (scGPT's continuous value encoder)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, config.hidden_dim)
        self.linear2 = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Float (...) → float (..., width)."""
        hidden = F.relu(self.linear1(values.clamp(max=LARGEST_VALUE)[..., None]))
        return self.norm(self.linear2(hidden))


class CategoryValues(nn.Module):
    """A learned vector per bin; hidden values and scGPT's padding value have one each → LayerNorm."""

    def __init__(self, config: ModelConfig, n_bins: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.bins = nn.Embedding(n_bins + 2, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Float (...) of whole numbers → float (..., width)."""
        special = torch.where(values == MASKED_VALUE, self.n_bins + 1, self.n_bins)
        return self.norm(self.bins(torch.where(values < 0, special, values.long())))


class SoftBins(nn.Module):
    """A mixture of learned vectors whose weights follow from the value (scFoundation's auto-discretization).

    h = LeakyReLU(W₁v + b₁), w = softmax(α h + W₂h + b₂) with α = 1, and the vector is w · E. A hidden value has a
    vector of its own.
    """

    ALPHA = 1.0
    SLOPE = 0.1

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, config.soft_bins)
        self.linear2 = nn.Linear(config.soft_bins, config.soft_bins)
        self.bins = nn.Embedding(config.soft_bins, config.hidden_dim)
        self.masked = nn.Embedding(1, config.hidden_dim)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Float (...) → float (..., width)."""
        h = F.leaky_relu(self.linear1(values[..., None]), self.SLOPE)
        weights = (self.ALPHA * h + self.linear2(h)).softmax(dim=-1)
        return torch.where(
            (values == MASKED_VALUE)[..., None], self.masked.weight[0], weights @ self.bins.weight
        )


class GeneValueEmbedding(nn.Module):
    """Gene vector (LayerNorm) plus, or times, what its value becomes; no positions: a cell is a set of genes."""

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__()
        model, kind = config.model, config.value_embedding
        self.tokens = gene_table(model, vocab)
        self.norm = (
            nn.LayerNorm(model.hidden_dim, eps=model.layer_norm_eps)
            if config.embedding_norm
            else nn.Identity()
        )
        self.scaling = kind == "scaling"
        self.values: nn.Module | None = None
        if kind == "continuous":
            self.values = ContinuousValues(model)
        elif kind == "category":
            self.values = CategoryValues(model, config.tokenizer.n_bins)
        elif kind == "soft_bins":
            self.values = SoftBins(model)
        self.dropout = nn.Dropout(model.dropout)

    def genes(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Gene vectors without value, float (..., width)."""
        return self.norm(self.tokens(input_ids))

    def forward(self, tokens: PackedTokens) -> torch.Tensor:
        """Float (total, width)."""
        genes = self.genes(tokens.input_ids)
        if self.scaling:
            genes = genes * tokens.values[..., None]
        if self.values is not None:
            genes = genes + self.values(tokens.values)
        return self.dropout(genes)


def build_embedding(config: Config, vocab: GeneVocab) -> RankEmbedding | GeneValueEmbedding:
    """Ranks for rank value encoding, values for everything else."""
    kind = RankEmbedding if config.tokenizer.strategy_like == "rank_value" else GeneValueEmbedding
    return kind(config, vocab)


class ObsEmbedding(nn.Module):
    """A learned vector per category of each obs column that the model reads as a token; row 0 is unknown."""

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__()
        self.columns = nn.ModuleList(
            nn.Embedding(len(vocab.obs_categories[column]) + 1, config.model.hidden_dim)
            for column in config.tokenizer.obs_tokens
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 (n): rows of the tables of all columns, one after the other → float (n, width)."""
        return F.embedding(rows, torch.cat([column.weight for column in self.columns]))  # type: ignore[misc]
