"""`autoregressive_transformer` for expression_reconstruction: values of genes from other genes (scGPT's pretraining).

A cell's genes fall into two parts. The perceived ones come with their value and read each other, as in a
bidirectional encoder. The generated ones come without value and carry a flag instead; each reads all perceived genes
and itself, and is read by nobody else, so any set of genes can be asked at once and no answer depends on the others.
"""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.encoder import TransformerEncoder
from scmodelforge.models.objectives.expression import predicted_values
from scmodelforge.models.sequences import Sequences
from scmodelforge.models.transformer import initialize
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import PackedQueries, PackedTokens, pack_queries

GENERATED = 1  # row of the flags; scGPT has a row 0 too, which it never reads


class GenerativeTransformer(TransformerEncoder):
    """A bidirectional encoder of what is perceived that also answers for genes that are not there.

    `forward` and `encode` know perceived genes only. With `model.objective.reference` the attention of generated genes
    does without the out projection, as in scGPT's code; else they pass it like all others.

    Attributes
    ----------
    flags
        The vector that stands in the place of a generated gene's value.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        self.config = config
        self.flags = nn.Embedding(2, config.model.hidden_dim)
        initialize(self.flags)

    def generated_states(
        self, tokens: PackedTokens, queries: PackedQueries, cells: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of perceived tokens (total, width) and of queries (m, width).

        Parameters
        ----------
        tokens
            What is perceived.
        queries
            The generated genes, with obs columns in their sequences.
        cells
            float (n_cells, width): cell embeddings that take the place of the first token's embedding.
        """
        perceived = self.inputs(tokens)
        if cells is not None:
            perceived = perceived.index_copy(0, tokens.starts, cells.to(perceived.dtype))
        generated = self.embedding.dropout(self.embedding.genes(queries.ids) + self.flags.weight[GENERATED])
        n_all = len(perceived) + len(generated)
        x = perceived.new_zeros(n_all, perceived.shape[1])
        x = x.index_copy(0, queries.token_places, perceived)
        x = x.index_copy(0, queries.places, generated.to(x.dtype))
        nothing = torch.zeros(n_all, dtype=torch.bool, device=x.device)
        is_perceived = nothing.index_fill(
            0, queries.token_places, True
        )  # an assignment would wait for the GPU
        sequences = Sequences(queries.cu_seqlens, queries.max_length, read_by_all=is_perceived)
        projected = is_perceived[:, None] if self.config.model.objective.reference else None
        states = self.transformer(x, sequences, projected)
        return states.index_select(0, queries.token_places), states.index_select(0, queries.places)

    def generate(self, tokens: TokenBatch, genes: torch.Tensor) -> torch.Tensor:
        """Predicted values (n_cells, n_genes) of genes, given what is perceived.

        Parameters
        ----------
        tokens
            Genes with their values.
        genes
            int64 (n_genes) or (n_cells, n_genes): tokens of the asked genes.
        """
        packed, asked = self.packed(tokens), genes.expand(tokens.n_cells, -1)
        cell = torch.arange(tokens.n_cells, device=asked.device).repeat_interleave(asked.shape[1])
        queries = pack_queries(packed, asked.flatten(), cell)
        _, states = self.generated_states(packed, queries)
        outputs = self.expression_of(states, queries.ids, packed, cell)
        return predicted_values(self.config, outputs).view(asked.shape)
