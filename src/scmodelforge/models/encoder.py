"""`transformer_encoder`: a bidirectional transformer over a cell's tokens (BERT, Geneformer, scGPT)."""

from __future__ import annotations

import torch

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.auxiliary import AuxiliaryHeads
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.heads import ExpressionHead, build_gene_head
from scmodelforge.models.objectives.batch import LossTerm, TrainingBatch
from scmodelforge.models.transformer import initialize
from scmodelforge.tokenizers.batch import TokenBatch


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
        task = config.model.pretraining_task
        self.head = build_gene_head(config, vocab) if task != "expression_reconstruction" else None
        self.expression_head = (
            ExpressionHead(config, vocab, with_gene=task == "dual_prediction")
            if task != "masked_gene_prediction"
            else None
        )
        self.auxiliary = AuxiliaryHeads.build(config, vocab)
        self.apply(initialize)

    def logits(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Gene logits (m, n_tokens) at flat positions (m) of hidden states (n_cells, length, width)."""
        assert self.head is not None
        asked = hidden.flatten(0, 1).index_select(0, positions)
        return self.head(asked, self.embedding.tokens)

    def expression(
        self, hidden: torch.Tensor, positions: torch.Tensor, genes: torch.Tensor, tokens: TokenBatch
    ) -> torch.Tensor:
        """Expression predictions (m, n_outputs) at flat positions (m), whose true genes are `genes` (m)."""
        assert self.expression_head is not None
        asked = hidden.flatten(0, 1).index_select(0, positions)
        return self.expression_head(
            asked, self.embedding.genes(genes), tokens.obs, positions // hidden.shape[1]
        )

    def auxiliary_terms(self, hidden: torch.Tensor, batch: TrainingBatch) -> dict[str, LossTerm]:
        """Auxiliary loss terms from hidden states (n_cells, length, width); none without auxiliary heads."""
        if self.auxiliary is None:
            return {}
        head, tokens = self.expression_head, batch.tokens
        return self.auxiliary.terms(
            self.pool(hidden, tokens),
            self.embedding.genes(batch.genes),
            batch,
            batch_vectors=None if head is None else head.batch_vectors(tokens.obs),
        )
