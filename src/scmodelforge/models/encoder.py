"""`transformer_encoder`: a bidirectional transformer over a cell's tokens (BERT, Geneformer, scGPT)."""

from __future__ import annotations

import torch

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.auxiliary import AuxiliaryHeads
from scmodelforge.models.base import CellTransformer, at, cell_of
from scmodelforge.models.gene_prediction import GenePrediction
from scmodelforge.models.heads import ExpressionHead, build_gene_head
from scmodelforge.models.objectives.batch import LossTerm, PackedBatch
from scmodelforge.models.transformer import Transformer, initialize
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import PackedTokens


class TransformerEncoder(CellTransformer):
    """Embedding, transformer and the heads that the pretraining task needs.

    Attributes
    ----------
    head
        Names genes; None for expression_reconstruction.
    expression_head
        Tells values; None for masked_gene_prediction. For dual_prediction it also reads the vector of the true
        gene, as the gene itself is hidden.
    auxiliary
        Heads of the auxiliary losses; None if there are none.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        task = config.model.task_like
        self.head = build_gene_head(config, vocab) if task != "expression_reconstruction" else None
        self.expression_head = (
            ExpressionHead(config, vocab, with_gene=task == "dual_prediction")
            if task != "masked_gene_prediction"
            else None
        )
        self.auxiliary = AuxiliaryHeads.build(config, vocab)
        self.apply(initialize)

    @property
    def leaves_out_unread(self) -> bool:
        """Whether `forward` takes `read` and nothing else looks at hidden states; a plugin may replace parts."""
        own = type(self).forward is TransformerEncoder.forward and type(self.transformer) is Transformer
        return own and self.auxiliary is None

    def forward(self, tokens: TokenBatch | PackedTokens, read: torch.Tensor | None = None) -> torch.Tensor:
        """As in `CellTransformer`; packed, states may be zero but at `read`, flat places (int64 m, ascending)."""
        if read is None or isinstance(tokens, TokenBatch):
            return super().forward(tokens)
        return self.transformer(self.inputs(tokens), self.sequences(tokens), read=read)

    def genes_at(self, hidden: torch.Tensor, places: torch.Tensor) -> GenePrediction:
        """What the head says at flat places (m) of hidden states, packed or padded."""
        assert self.head is not None
        return self.head(at(hidden, places), self.embedding.tokens)

    def expression(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        genes: torch.Tensor,
        tokens: TokenBatch | PackedTokens,
    ) -> torch.Tensor:
        """Expression predictions (m, n_outputs) at flat places (m) of hidden states, whose true genes are `genes`."""
        return self.expression_of(at(hidden, places), genes, tokens, cell_of(tokens, places))

    def expression_of(
        self,
        states: torch.Tensor,
        genes: torch.Tensor,
        tokens: TokenBatch | PackedTokens,
        cell: torch.Tensor,
    ) -> torch.Tensor:
        """Expression predictions (m, n_outputs) from states (m, width) of genes (m) of cells `cell` (m)."""
        assert self.expression_head is not None
        return self.expression_head(states, self.embedding.genes(genes), tokens.obs, cell)

    def auxiliary_terms(self, hidden: torch.Tensor, batch: PackedBatch) -> dict[str, LossTerm]:
        """Auxiliary loss terms from hidden states (total, width); none without auxiliary heads."""
        if self.auxiliary is None:
            return {}
        head, tokens = self.expression_head, batch.tokens
        return self.auxiliary.terms(
            self.pool(hidden, tokens),
            self.embedding.genes(batch.genes),
            batch,
            batch_vectors=None if head is None else head.batch_vectors(tokens.obs),
        )
