"""Generating values: part of a cell's genes is perceived, the values of the others are asked (scGPT's pretraining)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from scmodelforge.models.objectives.batch import ModelOutput, PackedBatch, TrainingBatch
from scmodelforge.models.objectives.expression import expression_terms
from scmodelforge.models.objectives.kernels import split_genes
from scmodelforge.models.objectives.masked import MaskedPrediction
from scmodelforge.tokenizers.batch import TokenBatch, keep_tokens

if TYPE_CHECKING:
    from scmodelforge.models.generative import GenerativeTransformer


class ExpressionGeneration(MaskedPrediction):
    """Tell the values of genes that are not perceived; losses and metrics are those of masked values.

    Of the g genes of a cell, floor(g · `generated_share`) drawn at random are taken out of the input and asked.
    Special tokens stay. The same split serves training and validation, as nothing asked is ever seen.

    With `second_pass_weight` the values are generated once more with the cell embedding of the first pass, detached,
    in the place of `<cls>`, so that the embedding learns to stand for the cell.
    """

    def corrupt(self, tokens: TokenBatch, seed: int, epoch: int, batch_seed: int = 0) -> TrainingBatch:
        """Split the genes of each cell; a pure function of (seed, epoch, cell, gene)."""
        ids = tokens.input_ids.numpy()
        generated, n_generated = np.empty(ids.shape, dtype=bool), np.empty(tokens.n_cells, dtype=np.int64)
        split_genes(
            ids,
            tokens.lengths.numpy(),
            tokens.cell_index.numpy(),
            np.uint64(seed),
            np.uint64(epoch),
            self.vocab.first_gene_token,
            self.config.model.objective.generated_share,
            generated,
            n_generated,
        )
        queries = keep_tokens(tokens, generated, self.vocab.pad_id)
        asked = np.flatnonzero(np.arange(queries.input_ids.shape[1]) < n_generated[:, None])
        return TrainingBatch(
            tokens=keep_tokens(tokens, ~generated, self.vocab.pad_id),
            asked=torch.from_numpy(asked),
            genes=queries.input_ids.flatten()[asked],
            values=queries.values.flatten()[asked],
            n_tokens=int(tokens.lengths.sum()),
            seed=batch_seed,
            queries=queries.input_ids,
        )

    def __call__(  # type: ignore[override]
        self, model: GenerativeTransformer, batch: TrainingBatch | PackedBatch
    ) -> ModelOutput:
        """Loss of the generated values, of the second pass, and the auxiliary losses."""
        batch = self.pack(batch)
        assert batch.queries is not None
        tokens, weight = batch.tokens, self.config.model.objective.second_pass_weight
        asked = torch.ones_like(batch.genes, dtype=torch.bool)
        hidden, states = model.generated_states(tokens, batch.queries)
        expression = model.expression_of(states, batch.genes, tokens, batch.cell)
        terms = expression_terms(self.config, expression, batch.values, asked)
        terms |= model.auxiliary_terms(hidden, batch)
        if weight:
            cells = model.pool(hidden, tokens).detach()
            _, states = model.generated_states(tokens, batch.queries, cells)
            again = model.expression_of(states, batch.genes, tokens, batch.cell)
            second = expression_terms(self.config, again, batch.values, asked)["expression"]
            terms["second_pass"] = replace(second, weight=weight)
        return ModelOutput(hidden, None, expression, terms)
