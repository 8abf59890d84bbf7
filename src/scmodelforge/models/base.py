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
from scmodelforge.models.sequences import Sequences
from scmodelforge.models.transformer import Transformer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import PackedTokens, Packing, unpack


class CellTransformer(nn.Module):
    """Embedding and transformer; an architecture adds its heads and what its attention may read.

    It computes on packed cells. Padded ones (`TokenBatch`) are packed first, and what comes of them is padded again.

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
        self.packing = Packing.of(config, vocab)
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

    def packed(self, tokens: TokenBatch | PackedTokens) -> PackedTokens:
        """The same cells without padding."""
        return self.packing(tokens) if isinstance(tokens, TokenBatch) else tokens

    def readable(self, tokens: TokenBatch, total: int | None = None) -> PackedTokens:
        """What `encode` reads of cells, packed; `total` as in `Packing`."""
        return self.packing(tokens, total)

    def inputs(self, tokens: PackedTokens) -> torch.Tensor:
        """Embedded tokens and obs columns, float (total, width)."""
        x = self.embedding(tokens)
        if self.obs_embedding is None:
            return x
        assert tokens.obs_places is not None
        assert tokens.obs_rows is not None
        columns = self.obs_embedding(tokens.obs_rows)
        return x.index_copy(0, tokens.obs_places, columns.to(x.dtype))

    def sequences(self, tokens: PackedTokens) -> Sequences:
        """Which tokens read which: in a bidirectional model all of a cell."""
        return Sequences(tokens.cu_seqlens, tokens.max_length)

    def sequences_to_embed(self, tokens: PackedTokens) -> Sequences:
        """Which tokens read which while `encode` embeds a cell."""
        return self.sequences(tokens)

    def hidden_states(self, tokens: TokenBatch) -> list[torch.Tensor]:
        """Embedding output and the output of each block, `num_layers + 1` tensors (n_cells, length, width)."""
        packed, length = self.packed(tokens), tokens.input_ids.shape[1]
        states = self.transformer.states(self.inputs(packed), self.sequences(packed))
        return [unpack(state, packed, length) for state in states]

    def forward(self, tokens: TokenBatch | PackedTokens) -> torch.Tensor:
        """Hidden states (total, width) of packed cells; (n_cells, length, width) of padded ones, zero at padding."""
        packed = self.packed(tokens)
        hidden = self.transformer(self.inputs(packed), self.sequences(packed))
        return hidden if packed is tokens else unpack(hidden, packed, tokens.input_ids.shape[1])

    def embedded_tokens(self, tokens: PackedTokens) -> torch.Tensor:
        """Hidden states (total, width) as embeddings of genes in the context of their cell."""
        return self(tokens)

    def pool(self, hidden: torch.Tensor, tokens: PackedTokens, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width), not normalized, from hidden states (total, width)."""
        return pool(hidden, tokens, pooling or self.pooling, self.first_gene_token, self.max_length)

    def cell_embedding(
        self, hidden: torch.Tensor, tokens: PackedTokens, pooling: str | None = None
    ) -> torch.Tensor:
        """As `pool`, of length 1 with `model.normalize_embedding`."""
        embedding = self.pool(hidden, tokens, pooling)
        return F.normalize(embedding, dim=1) if self.normalize_embedding else embedding

    def encode(self, tokens: TokenBatch | PackedTokens, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width); the same whatever cells they come with."""
        packed = self.readable(tokens) if isinstance(tokens, TokenBatch) else tokens
        return self.cell_embedding(self.embedded_tokens(packed), packed, pooling)


def at(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Hidden states (m, width) at flat places (m) of packed (total, width) or padded (n_cells, length, width) ones."""
    return hidden.flatten(0, -2).index_select(0, places)


def cell_of(tokens: TokenBatch | PackedTokens, places: torch.Tensor) -> torch.Tensor:
    """int64 (m): row in the batch of the cell at each flat place."""
    return tokens.cell[places] if isinstance(tokens, PackedTokens) else places // tokens.input_ids.shape[1]
