"""`transformer_encoder`: a bidirectional transformer over rank tokens, BERT's way (Geneformer)."""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.embeddings import RankEmbedding
from scmodelforge.models.heads import MaskedGeneHead
from scmodelforge.models.pooling import pool
from scmodelforge.models.transformer import Transformer, initialize
from scmodelforge.tokenizers.batch import TokenBatch


class TransformerEncoder(nn.Module):
    """Embedding, transformer and masked-gene head.

    Parameters
    ----------
    config
        The whole config; the sections `model` and `tokenizer` are read.
    vocab
        The gene vocabulary, which fixes the number of tokens.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__()
        self.pooling = config.model.pooling
        self.first_gene_token = vocab.first_gene_token
        self.hidden_dim = config.model.hidden_dim
        self.embedding = RankEmbedding(config.model, vocab.n_tokens, config.tokenizer.max_genes, vocab.pad_id)
        self.transformer = Transformer(config.model)
        self.head = MaskedGeneHead(config.model, vocab.n_tokens)
        self.apply(initialize)

    def _embed(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.embedding(tokens.input_ids), tokens.attention_mask if tokens.has_padding else None

    def hidden_states(self, tokens: TokenBatch) -> list[torch.Tensor]:
        """Embedding output and the output of each block, `num_layers + 1` tensors (n, length, width)."""
        return list(self.transformer.states(*self._embed(tokens)))

    def forward(self, tokens: TokenBatch) -> torch.Tensor:
        """Hidden states (n_cells, length, width); those at padding positions mean nothing."""
        return self.transformer(*self._embed(tokens))

    def logits(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Gene logits (m, n_tokens) at flat positions (m) of hidden states (n_cells, length, width)."""
        asked = hidden.flatten(0, 1).index_select(0, positions)
        return self.head(asked, self.embedding.tokens.weight)

    def encode(self, tokens: TokenBatch, pooling: str | None = None) -> torch.Tensor:
        """Cell embeddings (n_cells, width); the same whatever cells and padding they come with."""
        return pool(self(tokens), tokens, pooling or self.pooling, self.first_gene_token)
