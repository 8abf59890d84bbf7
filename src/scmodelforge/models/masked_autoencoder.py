"""`masked_autoencoder`: an encoder of the visible genes and a light decoder of all that is asked (scFoundation).

Masked autoencoder of He et al. 2022, on cells as in xTrimoGene and scFoundation (Gong et al. 2023; Hao et al. 2024):
the encoder reads the expressed genes that are not asked, so its cost follows what is expressed; the decoder adds the
asked genes, each as its gene vector and one vector that stands for "hidden".
"""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import Config, ModelConfig
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.auxiliary import AuxiliaryHeads
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.embeddings import MASKED_VALUE, GeneValueEmbedding
from scmodelforge.models.transformer import Transformer, initialize
from scmodelforge.tokenizers.batch import TokenBatch


def decoder_config(model: ModelConfig) -> ModelConfig:
    """The sizes of the decoder; all else, and the ratio of feed-forward layer to width, as in the encoder."""
    width = model.decoder_dim
    sizes = {
        "hidden_dim": width,
        "num_layers": model.decoder.num_layers,
        "num_heads": model.decoder.num_heads or model.num_heads,
        "ffn_dim": max(1, model.feed_forward_dim * width // model.hidden_dim),
    }
    return model.model_copy(update=sizes)


class MaskedAutoencoder(CellTransformer):
    """Encoder, decoder and a linear layer that tells values. `forward` and `encode` are the encoder alone.

    Attributes
    ----------
    to_decoder
        From the width of the encoder to that of the decoder.
    decoder
        Reads visible and asked genes.
    head
        Linear, to the value (or one output per bin with value_loss cross_entropy).
    auxiliary
        Heads of the auxiliary losses; None if there are none.
    """

    embedding: GeneValueEmbedding

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        model = config.model
        self.pad_id = vocab.pad_id
        self.to_decoder = nn.Linear(model.hidden_dim, model.decoder_dim)
        self.decoder = Transformer(decoder_config(model))
        n_outputs = config.tokenizer.n_bins if config.value_loss == "cross_entropy" else 1
        self.head = nn.Linear(model.decoder_dim, n_outputs)
        self.auxiliary = AuxiliaryHeads.build(config, vocab)
        self.apply(initialize)

    def decode(self, hidden: torch.Tensor, tokens: TokenBatch, queries: torch.Tensor) -> torch.Tensor:
        """States of the asked genes.

        Parameters
        ----------
        hidden
            float (n, length, width): what `forward` made of `tokens`.
        tokens
            The visible tokens.
        queries
            int64 (n, n_queries): asked genes, `<pad>` on the right.

        Returns
        -------
        float (n, n_queries, decoder width); those at `<pad>` mean nothing.
        """
        assert self.embedding.values is not None
        unknown = self.embedding.values(hidden.new_full((1, 1), MASKED_VALUE))
        visible = hidden + self.embedding.genes(tokens.input_ids)
        asked = self.embedding.genes(queries) + unknown
        allowed = torch.cat([tokens.attention_mask, queries != self.pad_id], dim=1)
        x = self.to_decoder(torch.cat([visible, asked], dim=1))
        return self.decoder(x, allowed[:, None, None, :])[:, visible.shape[1] :]

    def expression(
        self, hidden: torch.Tensor, asked: torch.Tensor, tokens: TokenBatch, queries: torch.Tensor
    ) -> torch.Tensor:
        """Expression predictions (m, n_outputs) at flat positions `asked` (m) of `queries` (n, n_queries)."""
        states = self.decode(hidden, tokens, queries).flatten(0, 1)
        return self.head(states.index_select(0, asked))
