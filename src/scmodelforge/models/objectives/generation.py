"""Generating values: part of a cell's genes is perceived, the values of the others are asked (scGPT's pretraining)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from scmodelforge.data.random import philox
from scmodelforge.models.objectives.batch import ModelOutput, TrainingBatch
from scmodelforge.models.objectives.expression import expression_terms
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
        cell = tokens.cell_index.numpy()[:, None].astype(np.uint64)
        key = (cell & np.uint64(0xFFFFFFFF), cell >> np.uint64(32))
        draw = philox(seed, *key, ids, np.uint32(epoch))[0].astype(np.int64)
        is_gene = ids >= self.vocab.first_gene_token
        n_generated = (is_gene.sum(axis=1) * self.config.model.objective.generated_share).astype(np.int64)
        order = np.argsort(np.where(is_gene, draw, 2**32), axis=1, kind="stable")
        generated = np.empty(ids.shape, dtype=bool)
        np.put_along_axis(generated, order, np.arange(ids.shape[1]) < n_generated[:, None], axis=1)

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

    def __call__(self, model: GenerativeTransformer, batch: TrainingBatch) -> ModelOutput:  # type: ignore[override]
        """Loss of the generated values, of the second pass, and the auxiliary losses."""
        assert batch.queries is not None
        tokens, weight = batch.tokens, self.config.model.objective.second_pass_weight
        hidden, states = model.generated_states(tokens, batch.queries)
        expression = model.expression(states, batch.asked, batch.genes, tokens)
        terms = expression_terms(self.config, expression, batch.values)
        terms |= model.auxiliary_terms(hidden, batch)
        if weight:
            cells = model.pool(hidden, tokens).detach()
            _, states = model.generated_states(tokens, batch.queries, cells)
            again = model.expression(states, batch.asked, batch.genes, tokens)
            second = expression_terms(self.config, again, batch.values)["expression"]
            terms["second_pass"] = replace(second, weight=weight)
        return ModelOutput(hidden, None, expression, terms)
