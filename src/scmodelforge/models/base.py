"""What all architectures share: embedding, transformer, and cell embeddings from its hidden states."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.embeddings import ExternalGenes, ObsEmbedding, build_embedding
from scmodelforge.models.pooling import pool
from scmodelforge.models.transformer import Transformer
from scmodelforge.tokenizers.batch import TokenBatch


class CellTransformer(nn.Module):
    """Embedding and transformer; an architecture adds its heads and what its attention may read.

    Parameters
    ----------
    config
        The whole config; the sections `model` and `tokenizer` are read.
    vocab
        The gene vocabulary, which fixes the number of tokens and the categories of obs columns.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__()
        self.pooling: str = config.model.pooling
        self.normalize_embedding = config.model.normalize_embedding
        self.first_gene_token = vocab.first_gene_token
        self.hidden_dim = config.model.hidden_dim
        self.max_length = config.tokenizer.max_genes
        self.embedding = build_embedding(config, vocab)
        self.obs_embedding = ObsEmbedding(config, vocab) if config.tokenizer.obs_tokens else None
        self.transformer = Transformer(config.model)

    @property
    def pretraining_heads(self) -> list[nn.Module]:
        """Modules that `encode` does not use: all that an architecture adds to embedding and transformer."""
        encoder = ("embedding", "obs_embedding", "transformer")
        return [module for name, module in self.named_children() if name not in encoder]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As torch, but given gene vectors stay frozen unless `model.train_gene_embeddings`."""
        super().requires_grad_(requires_grad)
        genes = self.embedding.tokens
        if isinstance(genes, ExternalGenes) and not genes.trained:
            genes.vectors.requires_grad_(False)
        return self

    def inputs(
        self, tokens: TokenBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
        """Embedded tokens, which keys each may read, the bias on its scores, and the number of obs tokens before.

        Returns
        -------
        x float (n, n_obs + length, width); `allowed` and `bias` as in `Transformer.states`.
        """
        x = self.embedding(tokens)
        mask = tokens.attention_mask if tokens.has_padding else None
        n_obs = 0
        if self.obs_embedding is not None:
            assert tokens.obs is not None
            before = self.obs_embedding(tokens.obs)
            n_obs = before.shape[1]
            x = torch.cat([before, x], dim=1)
            mask = None if mask is None else F.pad(mask, (n_obs, 0), value=True)
        return x, None if mask is None else mask[:, None, None, :], None, n_obs

    def hidden_states(self, tokens: TokenBatch) -> list[torch.Tensor]:
        """Embedding output and the output of each block, `num_layers + 1` tensors (n, length, width)."""
        x, allowed, bias, n_obs = self.inputs(tokens)
        return [state[:, n_obs:] for state in self.transformer.states(x, allowed, bias)]

    def forward(self, tokens: TokenBatch) -> torch.Tensor:
        """Hidden states (n_cells, length, width); those at padding positions mean nothing."""
        x, allowed, bias, n_obs = self.inputs(tokens)
        return self.transformer(x, allowed, bias)[:, n_obs:]

    def pool(self, hidden: torch.Tensor, tokens: TokenBatch, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width), not normalized, from hidden states (n_cells, length, width)."""
        return pool(hidden, tokens, pooling or self.pooling, self.first_gene_token, self.max_length)

    def cell_embedding(
        self, hidden: torch.Tensor, tokens: TokenBatch, pooling: str | None = None
    ) -> torch.Tensor:
        """As `pool`, of length 1 with `model.normalize_embedding`."""
        embedding = self.pool(hidden, tokens, pooling)
        return F.normalize(embedding, dim=1) if self.normalize_embedding else embedding

    def encode(self, tokens: TokenBatch, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width); the same whatever cells and padding they come with."""
        return self.cell_embedding(self(tokens), tokens, pooling)
