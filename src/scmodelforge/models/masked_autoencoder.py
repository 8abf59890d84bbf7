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
from scmodelforge.models.sequences import Sequences
from scmodelforge.models.transformer import Transformer, initialize
from scmodelforge.tokenizers.packed import PackedQueries, PackedTokens


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
        self.to_decoder = nn.Linear(model.hidden_dim, model.decoder_dim)
        self.decoder = Transformer(decoder_config(model))
        n_outputs = config.tokenizer.n_bins if config.value_loss == "cross_entropy" else 1
        self.head = nn.Linear(model.decoder_dim, n_outputs)
        self.auxiliary = AuxiliaryHeads.build(config, vocab)
        self.apply(initialize)

    def decode(self, hidden: torch.Tensor, tokens: PackedTokens, queries: PackedQueries) -> torch.Tensor:
        """States of the asked genes.

        Parameters
        ----------
        hidden
            float (total, width): what `forward` made of `tokens`.
        tokens
            The visible tokens.
        queries
            The asked genes, without obs columns in their sequences.

        Returns
        -------
        float (m, decoder width).
        """
        assert self.embedding.values is not None
        unknown = self.embedding.values(hidden.new_full((1,), MASKED_VALUE))
        visible = (hidden + self.embedding.genes(tokens.input_ids)).index_select(0, queries.tokens)
        asked = self.embedding.genes(queries.ids) + unknown
        x = visible.new_zeros(len(visible) + len(asked), visible.shape[1])
        x = x.index_copy(0, queries.token_places, visible)
        x = x.index_copy(0, queries.places, asked.to(x.dtype))
        sequences = Sequences(queries.cu_seqlens, queries.max_length)
        return self.decoder(self.to_decoder(x), sequences).index_select(0, queries.places)

    def expression(self, hidden: torch.Tensor, tokens: PackedTokens, queries: PackedQueries) -> torch.Tensor:
        """Expression predictions (m, n_outputs) of the asked genes."""
        return self.head(self.decode(hidden, tokens, queries))
