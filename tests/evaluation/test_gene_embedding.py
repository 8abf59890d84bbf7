"""Gene embeddings against networks with a known answer: planted modules, chance, and real modules of blood cells."""

from __future__ import annotations

import itertools
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import average_precision_score, roc_auc_score

from scmodelforge import registry
from scmodelforge.config_eval_gene_embedding import GeneEmbeddingParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method
from scmodelforge.evaluation.gene_embedding import (
    coexpression_loadings,
    cosines,
    gene_embedding,
    score_pairs,
    weighted_areas,
)
from scmodelforge.evaluation.gene_network import degree_matched_pairs, read_network
from scmodelforge.evaluation.gene_vectors import gene_vectors
from scmodelforge.genes.vocab import predefined
from scmodelforge.inference import open_for
from scmodelforge.models.bundle import ModelBundle, build_model
from tests.helpers import make_vocab, tiny_config

N_GENES, N_MODULES = 80, 8
VOCAB = make_vocab(N_GENES)
MODULE = np.arange(N_GENES) % N_MODULES
BLOOD = (  # what is expressed together in blood cells, in most of them after interferon
    "CD3D CD3E CD3G LCK IL7R LTB CD2",
    "CD79A CD79B MS4A1 BANK1 CD37 TCL1A",
    "NKG7 GNLY PRF1 GZMB CTSW GZMA KLRD1",
    "ISG15 IFI6 IFIT1 IFIT2 IFIT3 MX1 OAS1 ISG20",
    "HLA-DRA HLA-DRB1 HLA-DPA1 HLA-DPB1 CD74 HLA-DQA1",
    "LYZ CD14 S100A8 S100A9 CTSB FCN1 TYROBP",
)


def within(modules: np.ndarray) -> np.ndarray:
    """All pairs within a module, int64 (n, 2)."""
    pairs = np.array(list(itertools.combinations(range(len(modules)), 2)))
    return pairs[modules[pairs[:, 0]] == modules[pairs[:, 1]]]


def bundle_with(vectors: np.ndarray | None = None, seed: int = 0) -> ModelBundle:
    """A model of `VOCAB` with given gene vectors (n_genes, 16)."""
    config = tiny_config(Path("nowhere"))
    model = build_model(config, VOCAB, seed).eval()
    if vectors is not None:
        with torch.no_grad():
            model.embedding.tokens.weight[VOCAB.first_gene_token :] = torch.from_numpy(vectors).float()
    return ModelBundle(config, VOCAB, model)


def some_cells(seed: int = 0, silent: int = 0) -> ad.AnnData:
    """Cells in which the genes of a module rise and fall together; the last `silent` genes are never expressed."""
    rng = np.random.default_rng(seed)
    rates = np.exp(rng.normal(scale=0.8, size=(300, N_MODULES)))[:, MODULE] * 3
    rates[:, N_GENES - silent :] = 0
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rates).astype(np.float32)),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(300)]),
        var=pd.DataFrame(index=VOCAB.gene_ids.astype(str)),
    )


def written(path: Path, pairs: np.ndarray, names: np.ndarray = VOCAB.symbols) -> GeneEmbeddingParams:
    pd.DataFrame(names[pairs]).to_csv(path, sep="\t", header=False, index=False)
    return GeneEmbeddingParams(network=str(path))


def cells_of(bundle: ModelBundle, data: ad.AnnData | Path) -> EvaluationCells:
    return EvaluationCells(open_for(bundle, data), data, None, "made-up cells")


# --- the benchmark ------------------------------------------------------------------------------------


def test_planted_modules_are_found_and_noise_is_chance(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(N_MODULES, 16))
    bundle = bundle_with(centres[MODULE] + 0.1 * rng.normal(size=(N_GENES, 16)))
    params, cells = written(tmp_path / "modules.tsv", within(MODULE)), cells_of(bundle, some_cells())
    assert registry.BENCHMARKS.load("gene_embedding") is gene_embedding
    gene_embedding.check(cells, params, 0)
    methods = [
        Method("model", False, None, bundle),
        Method("untrained", True, None, bundle_with(seed=3)),
        Method("pca", True, np.zeros((300, 2), np.float32)),
    ]
    results = gene_embedding.run(methods, cells, params, 0)
    assert list(results) == ["model", "untrained", "coexpression_pca", "degree"]
    for name in ("model", "coexpression_pca"):
        assert results[name].metrics["auroc"] > 0.98
        assert results[name].metrics["auprc"] > 0.98
    assert results["degree"].metrics["auroc"] == 0.5  # all genes have nine partners
    low, high = results["untrained"].intervals["auroc"]
    assert low < 0.5 < high
    for scores in results.values():
        low, high = scores.intervals["auroc"]
        assert low <= scores.metrics["auroc"] <= high
        assert scores.units["auroc"].shape == (N_GENES,)
        assert scores.units["auroc"].mean() == pytest.approx(scores.metrics["auroc"])
    facts = results["model"].metrics
    assert (facts["n_pairs"], facts["n_random_pairs"], facts["n_genes"]) == (360, 360, N_GENES)


def test_intervals_of_chance_hold_chance():
    """95 % intervals of random vectors: in 30 networks, 0.5 should be outside of one or two."""
    missed = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pairs = within(rng.integers(0, 10, 60))
        drawn = degree_matched_pairs(pairs, pairs, 60, seed)
        genes = np.unique(pairs)
        true, false = np.searchsorted(genes, pairs), np.searchsorted(genes, drawn)
        vectors = rng.normal(size=(60, 8))
        scores = score_pairs(cosines(vectors, true), cosines(vectors, false), true, false, {}, seed)
        low, high = scores.intervals["auroc"]
        missed += not low <= 0.5 <= high
    assert missed <= 4


def test_genes_that_no_cell_expresses_are_left_out(tmp_path):
    bundle = bundle_with()
    params, cells = written(tmp_path / "modules.tsv", within(MODULE)), cells_of(bundle, some_cells(silent=16))
    metrics = gene_embedding.run([], cells, params, 0)["degree"].metrics
    n_pairs = len(within(MODULE[: N_GENES - 16]))
    assert (metrics["n_genes"], metrics["n_pairs"]) == (N_GENES - 16, n_pairs)
    assert metrics["n_pairs_left_out"] == 360 - n_pairs


def test_of_many_pairs_some_are_drawn(tmp_path):
    bundle = bundle_with()
    written(tmp_path / "modules.tsv", within(MODULE))
    params = GeneEmbeddingParams(network=str(tmp_path / "modules.tsv"), max_pairs=100)
    results = gene_embedding.run([], cells_of(bundle, some_cells()), params, 0)
    assert results["degree"].metrics["n_pairs"] == results["degree"].metrics["n_random_pairs"] == 100
    assert results["coexpression_pca"].metrics["auroc"] > 0.95


def test_real_modules_are_expressed_together(real_data, tmp_path):
    modules = [names.split() for names in BLOOD]
    lines = ["gene1\tgene2"]
    lines += ["\t".join(pair) for names in modules for pair in itertools.combinations(names, 2)]
    (tmp_path / "blood.tsv").write_text("\n".join(lines) + "\n")
    config, vocab = tiny_config(Path("nowhere")), predefined("human_protein_coding")
    bundle = ModelBundle(config, vocab, build_model(config, vocab, 0).eval())
    path = real_data / "pbmc_ifnb_kang.h5ad"
    params = GeneEmbeddingParams(network=str(tmp_path / "blood.tsv"))
    methods = [Method("untrained", True, None, bundle)]
    results = gene_embedding.run(methods, cells_of(bundle, path), params, 0)
    assert results["coexpression_pca"].intervals["auroc"][0] > 0.8
    low, high = results["untrained"].intervals["auroc"]
    assert low < 0.5 < high
    low, high = results["degree"].intervals["auroc"]
    assert low < 0.5 < high


# --- figures ------------------------------------------------------------------------------------------


def test_areas_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200).round(1)  # with ties
    is_true = rng.random(200) < 0.4
    weights = rng.integers(0, 4, size=(5, 200)).astype(float)
    auroc, auprc = weighted_areas(scores, is_true, weights)
    assert auroc == pytest.approx([roc_auc_score(is_true, scores, sample_weight=w) for w in weights])
    assert auprc == pytest.approx(
        [average_precision_score(is_true, scores, sample_weight=w) for w in weights]
    )


def test_loadings_of_all_components_are_correlations():
    rng = np.random.default_rng(0)
    expression = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=(200, 6))
    loadings = coexpression_loadings(sparse.csr_matrix(expression), 0)
    expected = np.corrcoef(expression.T)
    assert loadings.shape == (6, 5)  # the solver finds all but one
    assert loadings @ loadings.T == pytest.approx(expected, abs=0.15)


def test_cosine():
    vectors = np.array([[1.0, 0], [2, 2], [0, 0], [-3, 0]])
    pairs = np.array([[0, 1], [0, 2], [0, 3], [1, 1]])
    assert cosines(vectors, pairs) == pytest.approx([0.5**0.5, 0, -1, 1])


@pytest.mark.parametrize("strategy", ["rank_value", "continuous_projection"])
def test_vectors_are_those_that_the_model_adds_ranks_or_values_to(strategy):
    config = tiny_config(
        Path("nowhere"),
        tokenizer={"strategy": strategy},
        model={"gene_embeddings": "a.npz", "gene_embedding_dim": 12},
    )
    model = build_model(config, VOCAB, 0).train()  # dropout must not matter
    vectors = gene_vectors(ModelBundle(config, VOCAB, model))
    given = model.embedding.tokens.vectors.weight[VOCAB.first_gene_token :]
    expected = model.embedding.tokens.network(given)
    if strategy == "continuous_projection":
        expected = model.embedding.norm(expected)
    assert vectors == pytest.approx(expected.detach().numpy(), abs=1e-6)


def test_vectors_that_are_not_finite_are_refused():
    vectors = np.zeros((N_GENES, 16))
    vectors[3] = np.nan
    with pytest.raises(DataError, match="gene embeddings of 1 of 80 genes are NaN"):
        gene_vectors(bundle_with(vectors))


# --- random pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_random_pairs_have_the_degrees_of_the_network(seed):
    rng = np.random.default_rng(seed)
    popular = rng.permutation(200) ** 2 / 200**2 + 0.05  # a few hubs
    pairs = np.array(list(itertools.combinations(range(200), 2)))
    pairs = pairs[rng.random(len(pairs)) < 0.3 * popular[pairs].prod(axis=1)]
    drawn = degree_matched_pairs(pairs, pairs, 200, seed)
    assert np.array_equal(
        np.bincount(drawn.ravel(), minlength=200), np.bincount(pairs.ravel(), minlength=200)
    )
    assert (drawn[:, 0] != drawn[:, 1]).all()
    as_sets = [frozenset(pair) for pair in drawn.tolist()]
    assert len(set(as_sets)) == len(pairs)
    assert not set(as_sets) & {frozenset(pair) for pair in pairs.tolist()}
    assert np.array_equal(drawn, degree_matched_pairs(pairs, pairs, 200, seed))
    assert not np.array_equal(drawn, degree_matched_pairs(pairs, pairs, 200, seed + 1))


def test_dense_networks_are_refused():
    star = np.stack([np.zeros(30, dtype=int), np.arange(1, 31)], axis=1)
    with pytest.raises(
        DataError, match=r"dense: only \d random pairs of genes with the degrees of its 30 pairs"
    ):
        degree_matched_pairs(star, star, 31, 0)


def test_what_cannot_be_had_of_a_dense_network_is_left_out(caplog):
    ring = np.stack([np.arange(60), (np.arange(60) + 1) % 60], axis=1)
    star = np.stack([np.full(20, 60), np.arange(40, 60)], axis=1)
    pairs = np.sort(np.concatenate([ring, star, [[60, other] for other in range(5, 40)]]), axis=1)
    drawn = degree_matched_pairs(pairs, pairs, 61, 0)
    assert 0.5 * len(pairs) <= len(drawn) < len(pairs)
    assert f"only {len(drawn)} random pairs" in caplog.text


# --- files --------------------------------------------------------------------------------------------


def test_names_are_symbols_or_ids(tmp_path):
    (tmp_path / "net.csv").write_text(
        "# from nowhere\ngene_a,gene_b,score\nG3,G1,900\nENSG00000000002.7,G5,1\nG1,G3,2\nG4,G4,3\nG7,NOBODY,4\n"
    )
    network = read_network(tmp_path / "net.csv", VOCAB)
    assert network.pairs.tolist() == [[1, 3], [2, 5]]
    assert (network.n_lines, network.n_unknown) == (6, 2)


def test_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"params\.network: there is no file"):
        read_network(tmp_path / "none.tsv", VOCAB)
    (tmp_path / "net.sif").write_text("G1 G2\n")
    with pytest.raises(DataError, match=r"does not end in \.csv, \.tsv, \.txt"):
        read_network(tmp_path / "net.sif", VOCAB)
    (tmp_path / "one.tsv").write_text("G1,G2\nG2,G3\n")
    with pytest.raises(DataError, match="cannot be read as two columns of gene names, parted by tabs"):
        read_network(tmp_path / "one.tsv", VOCAB)
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(DataError, match="cannot be read as two columns"):
        read_network(tmp_path / "empty.tsv", VOCAB)
    (tmp_path / "string.tsv").write_text("9606.ENSP00000000233\t9606.ENSP00000356607\n")
    with pytest.raises(
        DataError, match=r"none of the 1 lines of .* names two genes of the vocabulary 'test'"
    ):
        read_network(tmp_path / "string.tsv", VOCAB)


def test_too_few_pairs_are_refused(tmp_path):
    params = written(tmp_path / "net.tsv", within(MODULE)[:19])
    cells = cells_of(bundle_with(), some_cells())
    with pytest.raises(DataError, match=r"19 pairs of genes that the data measured .*, and 20 are needed"):
        gene_embedding.check(cells, params, 0)
    few = cells_of(bundle_with(), some_cells(silent=70))
    with pytest.raises(DataError, match="pairs of genes that the cells express"):
        gene_embedding.run([], few, written(tmp_path / "net.tsv", within(MODULE)), 0)
