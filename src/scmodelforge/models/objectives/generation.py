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
from scmodelforge.tokenizers.batch import TokenBatch

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
        """Split the genes of each cell; a pure function of (seed, epoch, cell, position)."""
        ids, values = tokens.input_ids.numpy(), tokens.values.numpy()
        cell = tokens.cell_index.numpy()[:, None].astype(np.uint64)
        draw, *_ = philox(
            seed,
            (cell & np.uint64(0xFFFFFFFF)).astype(np.uint32),
            (cell >> np.uint64(32)).astype(np.uint32),
            np.arange(ids.shape[1], dtype=np.uint32)[None, :],
            np.uint32(epoch),
        )
        is_gene = ids >= self.vocab.first_gene_token
        n_generated = (is_gene.sum(axis=1) * self.config.model.objective.generated_share).astype(np.int64)
        place = np.argsort(np.where(is_gene, draw.astype(np.int64), 2**32), axis=1, kind="stable")
        generated = np.empty(ids.shape, dtype=bool)
        np.put_along_axis(generated, place, np.arange(ids.shape[1]) < n_generated[:, None], axis=1)

        lengths = tokens.lengths.numpy() - n_generated
        to_left = np.argsort(generated, axis=1, kind="stable")[:, : max(int(lengths.max(initial=0)), 1)]
        queries_to_left = np.argsort(~generated, axis=1, kind="stable")[:, : max(int(n_generated.max(initial=0)), 1)]
        is_query = np.arange(queries_to_left.shape[1]) < n_generated[:, None]
        queries = np.where(is_query, np.take_along_axis(ids, queries_to_left, axis=1), self.vocab.pad_id)
        answers = np.take_along_axis(values, queries_to_left, axis=1)[is_query]
        perceived = np.arange(to_left.shape[1]) < lengths[:, None]
        shown_ids = np.where(perceived, np.take_along_axis(ids, to_left, axis=1), self.vocab.pad_id)
        shown_values = np.where(perceived, np.take_along_axis(values, to_left, axis=1), np.float32(0))
        return TrainingBatch(
            tokens=replace(
                tokens,
                input_ids=torch.from_numpy(shown_ids),
                values=torch.from_numpy(shown_values),
                lengths=torch.from_numpy(lengths),
                has_padding=bool((lengths < to_left.shape[1]).any()),
            ),
            asked=torch.from_numpy(np.flatnonzero(is_query)),
            genes=torch.from_numpy(queries[is_query]),
            values=torch.from_numpy(answers),
            n_tokens=int(tokens.lengths.sum()),
            seed=batch_seed,
            queries=torch.from_numpy(queries),
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
