"""Reconstruction by a masked autoencoder: what is asked is taken out of the input altogether."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch

from scmodelforge.config import Config
from scmodelforge.data.batch import ALL_MEASURED
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import ModelOutput, PackedBatch, Sizes, TrainingBatch, pack
from scmodelforge.models.objectives.expression import expression_terms
from scmodelforge.models.objectives.kernels import ask_genes
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
        vocab, truth = self.vocab, tokens.input_ids.numpy()
        expected = vocab.n_genes * self.zero_mask_ratio
        n_jumps = int(expected + 8 * math.sqrt(expected) + 16)  # eight standard deviations: never too few
        asked, n_asked = np.empty(truth.shape, dtype=bool), np.empty(tokens.n_cells, dtype=np.int64)
        genes = np.empty(tokens.n_cells * (truth.shape[1] + n_jumps), dtype=np.int64)
        answers = np.empty(len(genes), dtype=np.float32)
        nothing = np.zeros((tokens.n_cells, 0), dtype=np.int64)
        measured = tokens.measured or ALL_MEASURED
        n = ask_genes(
            truth,
            tokens.values.numpy(),
            tokens.lengths.numpy(),
            nothing if tokens.left_out is None else tokens.left_out.numpy(),
            measured.sets,
            measured.of_cell,
            self.seen,
            tokens.cell_index.numpy(),
            np.uint64(seed),
            np.uint64(seed ^ ZERO_STREAM),
            np.uint64(epoch),
            vocab.first_gene_token,
            self.masking.mask_ratio,
            self.zero_mask_ratio,
            n_jumps,
            asked,
            n_asked,
            genes,
            answers,
        )
        genes, answers = genes[:n].copy(), answers[:n].copy()  # without the room for all
        rows = np.repeat(np.arange(tokens.n_cells), n_asked)
        column = np.arange(n) - np.repeat(np.cumsum(n_asked) - n_asked, n_asked)
        queries = np.full((tokens.n_cells, max(int(n_asked.max(initial=0)), 1)), vocab.pad_id)
        queries[rows, column] = genes
        visible = keep_tokens(tokens, ~asked, vocab.pad_id)
        return TrainingBatch(
            tokens=visible,
            asked=torch.from_numpy(rows * queries.shape[1] + column),
            genes=torch.from_numpy(genes),
            values=torch.from_numpy(answers),
            n_tokens=int(visible.lengths.sum()) + n,
            seed=batch_seed,
            queries=torch.from_numpy(queries),
        )

    def pack(self, batch: TrainingBatch | PackedBatch, **sizes: Unpack[Sizes]) -> PackedBatch:
        """As in `MaskedPrediction`; the decoder reads no obs columns."""
        return pack(batch, self.packing, self.vocab.pad_id, obs_in_queries=False, **sizes)

    def __call__(  # type: ignore[override]
        self, model: MaskedAutoencoder, batch: TrainingBatch | PackedBatch
    ) -> ModelOutput:
        """Mean expression loss over the asked genes."""
        batch = self.pack(batch)
        assert batch.queries is not None
        hidden = model(batch.tokens)
        expression = model.expression(hidden, batch.tokens, batch.queries)
        asked = torch.ones_like(batch.genes, dtype=torch.bool)
        terms = expression_terms(self.config, expression, batch.values, asked)
        if model.auxiliary is not None:
            cells = model.pool(hidden, batch.tokens)
            terms |= model.auxiliary.terms(cells, model.embedding.genes(batch.genes), batch)
        return ModelOutput(hidden, expression=expression, terms=terms)
