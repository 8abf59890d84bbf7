"""Tokens of real cells against the published tokenizer's steps, written with scipy on the whole file."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from scmodelforge.config import DataConfig, Preprocessing, TokenizerConfig
from scmodelforge.data.preprocess import gene_medians
from scmodelforge.data.store import open_store
from scmodelforge.genes.vocab import predefined
from tests.helpers import rank_tokenizer

CELLS = np.arange(0, 2700, 67)


@pytest.mark.parametrize("max_genes", [2048, 200])
def test_tokens_of_pbmc3k(real_data: Path, max_genes: int) -> None:
    path = real_data / "pbmc3k.h5ad"
    vocab = predefined("human_protein_coding")
    store = open_store([path], vocab, DataConfig())
    medians, _ = gene_medians(store, CELLS, 10_000, "library_size")
    vocab = vocab.with_medians(medians)
    config = TokenizerConfig(max_genes=max_genes, append_eos=True)
    batch = rank_tokenizer(config, Preprocessing(), vocab)(store.read(CELLS))

    # The published steps: n_counts over all genes, columns of known genes, X / n · 10,000 / median, argsort.
    adata = anndata.read_h5ad(path)
    counts = sparse.csr_matrix(adata.X[CELLS], dtype=np.float64)
    n_counts = np.asarray(counts.sum(axis=1)).ravel()
    column_gene = store.matches[0].gene_index
    known = np.flatnonzero(column_gene >= 0)
    to_gene = sparse.csr_matrix(
        (np.ones(len(known)), (known, column_gene[known])), shape=(adata.n_vars, vocab.n_genes)
    )
    genes = sparse.csr_matrix(counts @ to_gene)
    scaled = sparse.diags(1.0 / n_counts) @ genes * 10_000
    for i in range(len(CELLS)):
        row = scaled[i].tocoo()
        value = row.data * (1.0 / medians[row.col])
        expected = row.col[np.lexsort((row.col, -value))][: max_genes - 2]
        length = int(batch.lengths[i])
        tokens = batch.input_ids[i, :length].numpy()
        assert (tokens[0], tokens[-1]) == (vocab.cls_id, vocab.eos_id)
        got = tokens[1:-1] - vocab.first_gene_token
        value_of = dict(zip(row.col.tolist(), value.tolist(), strict=True))
        # Equal up to the order within groups of mathematically equal values, which rounding may split.
        np.testing.assert_allclose(
            [value_of[g] for g in got.tolist()], [value_of[g] for g in expected.tolist()], rtol=1e-12
        )
        assert (got == expected).mean() > 0.95
