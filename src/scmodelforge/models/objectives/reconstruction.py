"""Reconstruction by a masked autoencoder: what is asked is taken out of the input altogether."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.data.random import philox, uniform
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import ModelOutput, TrainingBatch
from scmodelforge.models.objectives.expression import expression_terms
from scmodelforge.models.objectives.masked import MaskedPrediction
from scmodelforge.tokenizers.batch import TokenBatch, keep_tokens

if TYPE_CHECKING:
    from scmodelforge.models.masked_autoencoder import MaskedAutoencoder

ZERO_STREAM = 0x5A45524F << 32  # keeps the draws of zeros apart from those of expressed genes


class MaskedReconstruction(MaskedPrediction):
    """Tell the values of genes that the encoder does not see (scFoundation).

    Of a cell's expressed genes `tokenizer.masking.mask_ratio` are asked, and of the measured genes without a count
    `model.objective.zero_mask_ratio`, each by its own draw. They are `queries`, in the order of the vocabulary, and
    not in `tokens`; nothing is left in their place, and no value is replaced or shown. Genes that did not fit into
    `tokenizer.max_genes` have a count, so they are no zeros; they are not asked. Nor are genes that the cell's file did
    not measure: nobody knows their values.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        self.zero_mask_ratio = config.model.objective.zero_mask_ratio
        self.seen = np.ones(vocab.n_tokens, dtype=bool)
        if vocab.medians is not None:
            self.seen[vocab.first_gene_token :] = np.isfinite(vocab.medians)

    def corrupt(self, tokens: TokenBatch, seed: int, epoch: int, batch_seed: int = 0) -> TrainingBatch:
        """Take genes out and ask for them; a pure function of (seed, epoch, cell, gene)."""
        vocab, truth, values = self.vocab, tokens.input_ids.numpy(), tokens.values.numpy()
        cell = tokens.cell_index.numpy().astype(np.uint64)
        key = (cell & np.uint64(0xFFFFFFFF), cell >> np.uint64(32))
        choose = philox(seed, key[0][:, None], key[1][:, None], truth, np.uint32(epoch))[0]
        expressed = (truth >= vocab.first_gene_token) & (values > 0)
        asked = expressed & (uniform(choose) < self.masking.mask_ratio)

        rows, places = np.nonzero(asked)
        zero_rows, zero_tokens = self._ask_zeros(tokens, key, seed, epoch)
        batch_rows = np.concatenate([rows, zero_rows])
        genes = np.concatenate([truth[rows, places], zero_tokens])
        answers = np.concatenate([values[rows, places], np.zeros(len(zero_rows), dtype=np.float32)])
        order = np.lexsort((genes, batch_rows))
        batch_rows, genes, answers = batch_rows[order], genes[order], answers[order]

        n_asked = np.bincount(batch_rows, minlength=tokens.n_cells)
        column = np.arange(len(batch_rows)) - np.repeat(np.cumsum(n_asked) - n_asked, n_asked)
        queries = np.full((tokens.n_cells, max(int(n_asked.max(initial=0)), 1)), vocab.pad_id)
        queries[batch_rows, column] = genes
        visible = keep_tokens(tokens, ~asked, vocab.pad_id)
        return TrainingBatch(
            tokens=visible,
            asked=torch.from_numpy(batch_rows * queries.shape[1] + column),
            genes=torch.from_numpy(genes),
            values=torch.from_numpy(answers),
            n_tokens=int(visible.lengths.sum()) + len(genes),
            seed=batch_seed,
            queries=torch.from_numpy(queries),
        )

    def _ask_zeros(
        self, tokens: TokenBatch, key: tuple[Any, Any], seed: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measured genes without a count that are asked: rows of the batch and tokens, int64 (m) each.

        Every gene of the vocabulary is drawn with `zero_mask_ratio`, by jumping from one drawn gene to the next: the
        jumps are geometric, so there are as many random numbers as drawn genes, not as genes.
        """
        share, n_genes, first = self.zero_mask_ratio, self.vocab.n_genes, self.vocab.first_gene_token
        if not share:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        expected = n_genes * share
        n_jumps = int(expected + 8 * math.sqrt(expected) + 16)  # eight standard deviations: never too few
        bits = philox(
            seed ^ ZERO_STREAM, key[0][:, None], key[1][:, None], np.arange(n_jumps), np.uint32(epoch)
        )[0]
        jumps = np.floor(np.log1p(-uniform(bits)) / math.log1p(-share)).astype(np.int64) + 1
        drawn = first - 1 + np.cumsum(np.minimum(jumps, n_genes + 1), axis=1)
        rows, places = np.nonzero(drawn < first + n_genes)
        candidates = drawn[rows, places]

        has_count = np.zeros((tokens.n_cells, self.vocab.n_tokens), dtype=bool)
        for with_count in (tokens.input_ids, tokens.left_out):
            if with_count is not None:
                has_count[np.arange(tokens.n_cells)[:, None], with_count.numpy()] = True
        kept = self.seen[candidates] & ~has_count[rows, candidates]
        if (measured := tokens.measured) is not None:
            kept &= measured.sets[measured.of_cell[rows], candidates - first]
        return rows[kept], candidates[kept]

    def __call__(self, model: MaskedAutoencoder, batch: TrainingBatch) -> ModelOutput:  # type: ignore[override]
        """Mean expression loss over the asked genes."""
        assert batch.queries is not None
        hidden = model(batch.tokens)
        expression = model.expression(hidden, batch.asked, batch.tokens, batch.queries)
        terms = expression_terms(self.config, expression, batch.values)
        if model.auxiliary is not None:
            cells = model.pool(hidden, batch.tokens)
            terms |= model.auxiliary.terms(cells, model.embedding.genes(batch.genes), batch)
        return ModelOutput(hidden, expression=expression, terms=terms)
