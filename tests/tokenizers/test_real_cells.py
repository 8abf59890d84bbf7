"""Tokens of real cells against the steps of the published tokenizers, written with scipy on the whole file."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse
from scipy.stats import spearmanr

from scmodelforge.config import Config, DataConfig, Preprocessing, TokenizerConfig
from scmodelforge.data.statistics import gene_medians
from scmodelforge.data.store import open_store
from scmodelforge.genes.vocab import predefined
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.binned_expression import values_of_bins
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


def test_bins_of_pbmc3k(real_data: Path) -> None:
    """scGPT's steps on the whole file: normalize, log1p, quantiles of each cell's non-zeros, digitize."""
    adata = anndata.read_h5ad(real_data / "pbmc3k.h5ad")[CELLS].copy()
    vocab = predefined("human_protein_coding")
    store = open_store([adata], vocab, DataConfig())
    config = Config.model_validate({"tokenizer": {"strategy": "binned_expression", "max_genes": 4096}})
    batch = build_tokenizer(config, vocab)(store.read(np.arange(len(CELLS))))
    sc.pp.normalize_total(adata, 10_000)
    sc.pp.log1p(adata)
    column_gene = store.matches[0].gene_index
    n_columns = np.bincount(column_gene[column_gene >= 0], minlength=vocab.n_genes)
    values = adata.X.toarray().astype(np.float64)
    for i in range(len(CELLS)):
        length = int(batch.lengths[i])
        genes = batch.input_ids[i, 1:length].numpy() - vocab.first_gene_token
        assert (np.diff(genes) > 0).all()
        bins = batch.values[i, 1:length].numpy()
        if n_columns[genes].max() > 1:
            continue  # several columns of one gene are summed before, not after, the logarithm
        row = np.zeros(vocab.n_genes)
        row[column_gene[column_gene >= 0]] = values[i, column_gene >= 0]
        assert (genes == np.flatnonzero(row)).all()
        edges = np.quantile(row[genes], np.linspace(0, 1, 50))
        np.testing.assert_allclose(batch.bin_edges[i].numpy(), edges, rtol=1e-5)
        # Rounding apart, which makes equal what was not or the other way round: a hair below and above.
        assert (bins <= np.digitize(row[genes] * (1 + 1e-5), edges)).all()
        assert (bins >= np.digitize(row[genes] * (1 - 1e-5), edges, right=True)).all()
        back = values_of_bins(batch.values[i : i + 1, 1:length], batch.bin_edges[i : i + 1])[0].numpy()
        np.testing.assert_allclose(back[bins == 50], row[genes].max(), rtol=1e-5)
        assert spearmanr(back, row[genes]).statistic > 0.95


def test_counts_of_pbmc3k(real_data: Path) -> None:
    """TranscriptFormer's: raw counts up to 30, genes as in the vocabulary, the first 2,047."""
    adata = anndata.read_h5ad(real_data / "pbmc3k.h5ad")[CELLS].copy()
    vocab = predefined("human_protein_coding")
    store = open_store([adata], vocab, DataConfig())
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": "continuous_projection", "max_value": 30, "overlong": "first"},
            "data": {"preprocessing": {"normalize": "none", "log1p": False}},
        }
    )
    batch = build_tokenizer(config, vocab)(store.read(np.arange(len(CELLS))))
    column_gene = store.matches[0].gene_index
    known = np.flatnonzero(column_gene >= 0)
    to_gene = sparse.csr_matrix(
        (np.ones(len(known)), (known, column_gene[known])), shape=(adata.n_vars, vocab.n_genes)
    )
    counts = (adata.X @ to_gene).toarray()
    for i, row in enumerate(counts):
        genes = np.flatnonzero(row)[:2047]
        length = int(batch.lengths[i])
        assert length == 1 + len(genes)
        np.testing.assert_array_equal(batch.input_ids[i, 1:length] - vocab.first_gene_token, genes)
        np.testing.assert_array_equal(batch.values[i, 1:length], np.minimum(row[genes], 30))
