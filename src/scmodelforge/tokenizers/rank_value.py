"""Rank value encoding: a cell is its genes in order of median-scaled expression (Theodoris et al. 2023).

A gene's value is counts / library size × target sum / the gene's non-zero median over the training cells,
so housekeeping genes sink and genes that are high *for themselves* rise. The order is the information; the
sequence is cut to the model's input length. Equal values keep the order of the vocabulary (the published
tokenizer leaves ties to an unstable sort).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.explain import explain_tokens, of_first_cell
from scmodelforge.tokenizers.gene_sequence import empty_tokens, n_special, with_special_tokens
from scmodelforge.tokenizers.kernels import rank_genes


class RankValueTokenizer:
    """Turns a `CellBatch` into rank-ordered gene tokens.

    Genes whose median is NaN (never seen in the training cells) are left out: the model has no trained
    embedding for them. Without medians in the vocabulary the genes are ranked by normalized counts alone.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        preprocessing = config.data.preprocessing
        self.config = config.tokenizer
        self.vocab = vocab
        self.log1p = preprocessing.log1p
        self.target_sum = preprocessing.target_sum if preprocessing.normalize == "library_size" else None
        self.inverse_median = np.ones(vocab.n_genes) if vocab.medians is None else 1.0 / vocab.medians

    def _scale(self, cells: CellBatch) -> tuple[np.ndarray, float]:
        """float64 (n_cells) and a number: what counts are multiplied with, one after the other."""
        if self.target_sum is None:
            return np.ones(cells.n_cells), 1.0
        with np.errstate(divide="ignore"):
            return 1.0 / cells.library_size.astype(np.float64), self.target_sum

    def __call__(self, cells: CellBatch, seed: int = 0, epoch: int = VALIDATION_EPOCH) -> TokenBatch:
        """Tokenize cells; see `TokenBatch` for shapes. Cells without a usable gene keep their special tokens."""
        vocab, config = self.vocab, self.config
        room = min(int(cells.n_genes_per_cell.max(initial=0)), config.max_genes - n_special(config))
        input_ids, values, lengths = empty_tokens(cells.n_cells, room, config)
        rank_genes(
            cells.indptr,
            cells.gene_ids,
            cells.counts,
            *self._scale(cells),
            self.inverse_median,
            self.log1p,
            vocab.first_gene_token,
            vocab.pad_id,
            int(config.prepend_cls),
            room,
            input_ids,
            values,
            lengths,
        )
        return with_special_tokens(cells, config, vocab, input_ids, values, lengths)

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token.

        Returns
        -------
        DataFrame as of `explain_tokens`, with normalized (counts per target sum), median and scaled (the value
        that is ranked).
        """
        reciprocal, target_sum = self._scale(cells)
        normalized = (
            cells.counts.astype(np.float64) * np.repeat(reciprocal, cells.n_genes_per_cell) * target_sum
        )
        table = explain_tokens(
            self(cells),
            cells,
            self.config,
            self.vocab,
            normalized=of_first_cell(cells, normalized, self.vocab),
            median=1.0 / self.inverse_median,
        )
        return table.assign(scaled=table["normalized"] / table["median"])
