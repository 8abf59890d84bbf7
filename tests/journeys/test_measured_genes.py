"""Files with different genes in one run: what a file did not measure is no zero, from the file to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scmodelforge.config import Config, DataConfig
from scmodelforge.data.store import CellStore, open_store
from scmodelforge.genes.vocab import GeneVocab, predefined
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives.batch import TrainingBatch
from scmodelforge.models.objectives.reconstruction import MaskedReconstruction
from scmodelforge.tokenizers.base import build_tokenizer
from tests.data.files import NO_MINIMUM, make_adata
from tests.helpers import make_vocab

N_GENES = 30
SMALL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0}


def autoencoder(**objective: Any) -> Config:
    task = {"architecture": "masked_autoencoder", "pretraining_task": "expression_reconstruction"}
    tokenizer = {"strategy": "continuous_projection"}
    return Config.model_validate({"tokenizer": tokenizer, "model": SMALL | task | {"objective": objective}})


def with_zeros(strategy: str, max_genes: int) -> Config:
    tokenizer = {"strategy": strategy, "include_zero_genes": True, "max_genes": max_genes}
    task = {"pretraining_task": "expression_reconstruction"}
    return Config.model_validate({"tokenizer": tokenizer, "model": SMALL | task})


def asked_of(store: CellStore, vocab: GeneVocab, config: Config, rows: np.ndarray) -> TrainingBatch:
    tokens = build_tokenizer(config, vocab)(store.read(rows), 1, 2)
    return MaskedReconstruction(config, vocab).corrupt(tokens, 1, 2)


@st.composite
def two_files(draw):
    """Counts and gene numbers of two files; some genes are outside the vocabulary, some in neither file."""
    out = []
    for _ in range(2):
        genes = np.array(draw(st.lists(st.integers(0, N_GENES + 3), min_size=1, max_size=20, unique=True)))
        shape = (draw(st.integers(1, 5)), len(genes))
        out.append((draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([0, 0, 1, 5]))), genes))
        out[-1][0][0, 0] = 1
    return out


@settings(max_examples=60, deadline=None)
@given(two_files(), st.sampled_from(["binned_expression", "continuous_projection"]), st.integers(4, 40))
def test_zeros_are_of_genes_that_the_file_of_the_cell_measured(parts, strategy, max_genes) -> None:
    vocab = make_vocab(N_GENES)
    store = open_store([make_adata(*part) for part in parts], vocab, NO_MINIMUM)
    genes_of_cell = [set(genes[genes < N_GENES].tolist()) for counts, genes in parts for _ in counts]
    rows = np.random.default_rng(0).permutation(store.n_cells)

    tokens = build_tokenizer(with_zeros(strategy, max_genes), vocab)(store.read(rows))
    batch = asked_of(store, vocab, autoencoder(zero_mask_ratio=0.9), rows)
    for i, row in enumerate(rows):
        ids = tokens.input_ids[i].numpy() - vocab.first_gene_token
        assert set(ids[ids >= 0].tolist()) <= genes_of_cell[row]
        assert (ids >= 0).sum() == min(len(genes_of_cell[row]), max_genes - 1)
        asked = batch.genes[batch.cell == i].numpy() - vocab.first_gene_token
        assert set(asked.tolist()) <= genes_of_cell[row]


@pytest.mark.parametrize("strategy", ["binned_expression", "continuous_projection"])
def test_an_embedding_does_not_depend_on_the_genes_of_other_files(strategy: str) -> None:
    rng, vocab = np.random.default_rng(0), make_vocab(N_GENES)
    one = make_adata(rng.poisson(1.0, (6, 12)), np.arange(12))
    two = make_adata(rng.poisson(1.0, (6, N_GENES)), np.arange(N_GENES), first_cell=6)
    config = with_zeros(strategy, 2 * N_GENES)
    tokenizer, model = build_tokenizer(config, vocab), build_model(config, vocab, seed=0).eval()
    with torch.inference_mode():
        together = model.encode(tokenizer(open_store([one, two], vocab, NO_MINIMUM).read(np.arange(12))))
        alone = model.encode(tokenizer(open_store([one], vocab, NO_MINIMUM).read(np.arange(6))))
    assert (together[:6] - alone).abs().max() < 1e-5


def test_a_panel_of_real_cells_is_asked_about_its_own_genes(real_data: Path) -> None:
    """1,287 genes were measured: without knowing that, nearly all zeros asked would be of the other 18,800."""
    vocab = predefined("human_protein_coding")
    store = open_store([real_data / "pbmc_kang_12k.h5ad"], vocab, DataConfig())
    rows = np.arange(0, store.n_cells, 50)
    cells = store.read(rows)
    n_measured = store.matches[0].n_genes
    assert 1200 < n_measured < 1287
    batch = asked_of(store, vocab, autoencoder(), rows)
    zeros = int((batch.values == 0).sum())
    expected = 0.03 * float((n_measured - cells.n_genes_per_cell).sum())
    assert zeros == pytest.approx(expected, abs=4 * np.sqrt(expected))

    tokens = build_tokenizer(with_zeros("binned_expression", 4096), vocab)(cells)
    assert (tokens.lengths == 1 + n_measured).all()
