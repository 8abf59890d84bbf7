"""Rank value encoding: a cell is its genes in order of median-scaled expression (Theodoris et al. 2023).

A gene's value is counts / library size × target sum / the gene's non-zero median over the training cells,
so housekeeping genes sink and genes that are high *for themselves* rise. The order is the information; the
sequence is cut to the model's input length. Equal values keep the order of the vocabulary (the published
tokenizer leaves ties to an unstable sort). One argsort per batch, no loop over cells.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.module import VALIDATION_EPOCH
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import TokenBatch


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
        column = np.arange(len(row)) - np.repeat(np.cumsum(n_genes) - n_genes, n_genes)

        width = int(n_genes.max(initial=0))
        key = np.full((n_cells, width), np.inf)
        key[row, column] = -(normalized * self.inverse_median[genes])
        n_special = int(config.prepend_cls) + int(config.append_eos)
        n_kept = min(width, config.max_genes - n_special)
        order = np.argsort(key, axis=1, kind="stable")[:, :n_kept]

        tokens = np.full((n_cells, width), vocab.pad_id, dtype=np.int64)
        tokens[row, column] = genes + vocab.first_gene_token
        values = np.zeros((n_cells, width), dtype=np.float32)
        values[row, column] = np.log1p(normalized) if self.log1p else normalized

        start = int(config.prepend_cls)
        lengths = np.minimum(n_genes, n_kept) + n_special
        length = max(n_kept + n_special, 1)  # a batch of empty cells still has a position
        input_ids = np.full((n_cells, length), vocab.pad_id, dtype=np.int64)
        expression = np.zeros(input_ids.shape, dtype=np.float32)
        input_ids[:, start : start + n_kept] = np.take_along_axis(tokens, order, axis=1)
        expression[:, start : start + n_kept] = np.take_along_axis(values, order, axis=1)
        if vocab.cls_id is not None and config.prepend_cls:
            input_ids[:, 0] = vocab.cls_id
        if vocab.eos_id is not None and config.append_eos:
            input_ids[np.arange(n_cells), lengths - 1] = vocab.eos_id
        return TokenBatch(
            input_ids=torch.from_numpy(input_ids),
            values=torch.from_numpy(expression),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            cell_index=torch.from_numpy(cells.cell_index),
            has_padding=bool((lengths < input_ids.shape[1]).any()),
            obs=None if cells.obs is None else torch.from_numpy(cells.obs),
        )

    def explain(self, cells: CellBatch) -> pd.DataFrame:
        """What the first cell of `cells` becomes, one row a token.

        Returns
        -------
        DataFrame with columns position, token, name, gene_id, counts, normalized (counts per target sum),
        median and scaled (the value that is ranked); empty at special tokens.
        """
        batch = self(cells)
        length = int(batch.lengths[0])
        token = batch.input_ids[0, :length].numpy()
        gene = token - self.vocab.first_gene_token
        is_gene = gene >= 0
        first = slice(cells.indptr[0], cells.indptr[1])
        counts = np.full(self.vocab.n_genes, np.nan)
        counts[cells.gene_ids[first]] = cells.counts[first]
        normalized = np.full(self.vocab.n_genes, np.nan)
        normalized[cells.gene_ids[first]] = self._normalize(cells, np.repeat(0, cells.indptr[-1]))[first]

        def of_gene(per_gene: np.ndarray) -> np.ndarray:
            return np.where(is_gene, per_gene[np.maximum(gene, 0)], np.nan)

        table = pd.DataFrame(
            {
                "position": np.arange(length),
                "token": token,
                "name": self.vocab.tokens_to_names(token),
                "gene_id": np.where(is_gene, self.vocab.gene_ids[np.maximum(gene, 0)], ""),
                "counts": of_gene(counts),
                "normalized": of_gene(normalized),
                "median": of_gene(1.0 / self.inverse_median),
            }
        )
        return table.assign(scaled=table["normalized"] / table["median"])
