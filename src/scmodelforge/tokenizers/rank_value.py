"""Rank value encoding: a cell is its genes in order of median-scaled expression (Theodoris et al. 2023).

A gene's value is counts / library size × target sum / the gene's non-zero median over the training cells,
so housekeeping genes sink and genes that are high *for themselves* rise. The order is the information; the
sequence is cut to the model's input length. Equal values keep the order of the vocabulary (the published
tokenizer leaves ties to an unstable sort). One argsort per batch, no loop over cells.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.module import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.explain import explain_tokens, of_first_cell
from scmodelforge.tokenizers.gene_sequence import n_special, position_in_cell, token_batch


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
        self.known = np.isfinite(self.inverse_median)

    def _normalize(self, cells: CellBatch, row: np.ndarray) -> np.ndarray:
        """float64 (nnz): counts scaled to the target sum, in the published order of operations."""
        counts = cells.counts.astype(np.float64)
        if self.target_sum is None:
            return counts
        with np.errstate(divide="ignore"):
            reciprocal = 1.0 / cells.library_size.astype(np.float64)
        return counts * reciprocal[row] * self.target_sum

    def __call__(self, cells: CellBatch, seed: int = 0, epoch: int = VALIDATION_EPOCH) -> TokenBatch:
        """Tokenize cells; see `TokenBatch` for shapes. Cells without a usable gene keep their special tokens."""
        n_cells, vocab, config = cells.n_cells, self.vocab, self.config
        row = np.repeat(np.arange(n_cells), cells.n_genes_per_cell)
        normalized = self._normalize(cells, row)
        genes = cells.gene_ids
        usable = self.known[genes]
        if not usable.all():
            row, genes, normalized = row[usable], genes[usable], normalized[usable]
        n_genes = np.bincount(row, minlength=n_cells)
        start = np.cumsum(n_genes) - n_genes
        width = int(n_genes.max(initial=0))
        key = np.full((n_cells, width), np.inf)
        key[row, position_in_cell(row)] = -(normalized * self.inverse_median[genes])
        n_kept = min(width, config.max_genes - n_special(config))
        order = np.argsort(key, axis=1, kind="stable")[:, :n_kept]
        kept = (start[:, None] + order)[np.arange(n_kept) < n_genes[:, None]]
        values = np.log1p(normalized[kept]) if self.log1p else normalized[kept]
        return token_batch(cells, config, vocab, row[kept], genes[kept], values)

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token.

        Returns
        -------
        DataFrame as of `explain_tokens`, with normalized (counts per target sum), median and scaled (the value
        that is ranked).
        """
        normalized = self._normalize(cells, np.repeat(np.arange(cells.n_cells), cells.n_genes_per_cell))
        table = explain_tokens(
            self(cells),
            cells,
            self.config,
            self.vocab,
            normalized=of_first_cell(cells, normalized, self.vocab),
            median=1.0 / self.inverse_median,
        )
        return table.assign(scaled=table["normalized"] / table["median"])
