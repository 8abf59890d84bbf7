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
from scmodelforge.models.transformer import initialize
from scmodelforge.tokenizers.batch import TokenBatch

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
        self, tokens: TokenBatch, queries: torch.Tensor, cells: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of perceived tokens (n_cells, length, width) and of queries (n_cells, n_queries, width).

        Parameters
        ----------
        tokens
            What is perceived.
        queries
            int64 (n_cells, n_queries): token of each generated gene; at pads the result means nothing.
        cells
            float (n_cells, width): cell embeddings that take the place of the first token's embedding.
        """
        x, allowed, _, n_obs = self.inputs(tokens)
        if cells is not None:
            x = torch.cat([x[:, :n_obs], cells[:, None].to(x.dtype), x[:, n_obs + 1 :]], dim=1)
        generated = self.embedding.dropout(self.embedding.genes(queries) + self.flags.weight[GENERATED])
        n_perceived, n_queries = x.shape[1], queries.shape[1]
        n_all = n_perceived + n_queries

        readable = torch.arange(n_all, device=x.device) < n_perceived  # by everyone
        if allowed is not None:
            readable = torch.cat([allowed, allowed.new_zeros(len(x), 1, 1, n_queries)], dim=3)
        own = torch.eye(n_all, dtype=torch.bool, device=x.device)
        own[:n_perceived] = False
        projected = n_perceived if self.config.model.objective.reference else None
        states = self.transformer(torch.cat([x, generated], dim=1), readable | own, projected=projected)
        return states[:, n_obs:n_perceived], states[:, n_perceived:]

    def generate(self, tokens: TokenBatch, genes: torch.Tensor) -> torch.Tensor:
        """Predicted values (n_cells, n_genes) of genes, given what is perceived.

        Parameters
        ----------
        tokens
            Genes with their values.
        genes
            int64 (n_genes) or (n_cells, n_genes): tokens of the asked genes.
        """
        queries = genes.expand(tokens.n_cells, -1)
        _, states = self.generated_states(tokens, queries)
        asked = torch.arange(queries.numel(), device=queries.device)
        outputs = self.expression(states, asked, queries.flatten(), tokens)
        return predicted_values(self.config, outputs).view(queries.shape)
