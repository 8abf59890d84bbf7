"""The perturbation benchmark on made-up effects with a known answer, and on real ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scmodelforge import registry
from scmodelforge.config_eval_perturbation import PerturbationParams
from scmodelforge.data.sources import open_matrix
from scmodelforge.errors import DataError
from scmodelforge.evaluation import perturbation_metrics
from scmodelforge.evaluation.benchmark import EvaluationCells, Method
from scmodelforge.evaluation.gene_vectors import gene_vectors
from scmodelforge.evaluation.perturbation import (
    _by_fold,
    gene_components,
    held_out,
    perturbation,
    predict_changes,
    usable_perturbations,
)
from scmodelforge.evaluation.perturbation_metrics import (
    MeasuredChanges,
    measured_changes,
    perturbation_groups,
    score_changes,
    score_perturbations,
)
from scmodelforge.genes.vocab import predefined
from scmodelforge.inference import open_for
from scmodelforge.models.bundle import ModelBundle, build_model
from tests.helpers import make_vocab, tiny_config

N_GENES = 40
VOCAB = make_vocab(N_GENES)


def exact_cells(changes: np.ndarray, n_cells: int = 30, seed: int = 0, noise: float = 0.0) -> ad.AnnData:
    """Log-normalized cells: those of the control, moved by `changes` (n, n_genes) exactly, but for `noise`."""
    rng = np.random.default_rng(seed)
    control = rng.uniform(4, 7, (n_cells, changes.shape[1]))
    cells = np.concatenate([control, *(control + change for change in changes)])
    cells += rng.normal(scale=noise, size=cells.shape)
    names = ["control", *(f"G{number:02d}" for number in range(len(changes)))]
    return ad.AnnData(
        sparse.csr_matrix(cells),
        obs=pd.DataFrame(
            {"perturbation": np.repeat(names, n_cells)}, index=[f"c{i}" for i in range(len(cells))]
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(changes.shape[1])]),
    )


def measured_in(adata: ad.AnnData, n_top: int = 5) -> MeasuredChanges:
    group, names, _ = perturbation_groups(adata.obs, "perturbation", "control", 2, "cells")
    return measured_changes(open_matrix(adata), group, names, n_top, 0)


def measured(changes: np.ndarray) -> MeasuredChanges:
    return measured_in(exact_cells(changes))


def some_changes(n: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, N_GENES))


def cells_of(adata: ad.AnnData, bundle: ModelBundle) -> EvaluationCells:
    return EvaluationCells(open_for(bundle, adata), adata, None, "made-up cells")


@cache
def tiny_bundle(seed: int = 0) -> ModelBundle:
    config, vocab = tiny_config(Path("nowhere")), VOCAB
    return ModelBundle(config, vocab, build_model(config, vocab, seed).eval())


def human_bundle() -> ModelBundle:
    config, vocab = tiny_config(Path("nowhere")), predefined("human_protein_coding")
    return ModelBundle(config, vocab, build_model(config, vocab, 0).eval())


def planted(bundle: ModelBundle, n_perturbations: int = 24, seed: int = 0) -> ad.AnnData:
    """Counts of cells in which a perturbed gene moves all genes by a linear function of its embedding."""
    rng = np.random.default_rng(seed)
    vectors = gene_vectors(bundle)[:n_perturbations, :]
    p = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    effects = p[:, :3] @ rng.normal(scale=0.5, size=(3, N_GENES))
    log_rates = np.concatenate([np.zeros((1, N_GENES)), effects]) + np.log(10)
    rates = np.repeat(np.exp(log_rates.clip(-2, 6)), 40, axis=0)
    labels = np.repeat(["control", *(f"G{i}" for i in range(n_perturbations))], 40)
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rates).astype(np.float32)),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)]),
    )


# --- figures ------------------------------------------------------------------------------------------


def test_a_perfect_prediction():
    truth = measured(some_changes())
    scores = score_changes(truth.changes, truth, 0)
    figures = {name: scores.metrics[name] for name in ("pearson", "pearson_top", "direction_accuracy")}
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0))
    assert scores.metrics["mse"] == scores.metrics["mse_top"] == 0
    assert scores.metrics["energy_distance"] == pytest.approx(0, abs=1e-6)
    assert scores.metrics["n_perturbations"] == 6
    assert scores.intervals["pearson"] == pytest.approx((1, 1))


def test_no_change_has_no_correlation_and_no_direction_and_says_so():
    truth = measured(some_changes())
    scores = score_changes(np.zeros_like(truth.changes), truth, 0)
    assert scores.metrics["pearson"] == "undefined: the change is the same for all genes"
    assert scores.metrics["direction_accuracy"] == "undefined: no change is predicted"
    assert scores.metrics["mse"] == pytest.approx(np.square(truth.changes).mean())
    assert set(scores.units) == {"mse", "mse_top", "energy_distance"} == set(scores.intervals)
    one_missing = truth.changes.copy()
    one_missing[2] = 0
    assert (
        score_changes(one_missing, truth, 0)
        .metrics["pearson"]
        .startswith("undefined for 1 of 6 perturbations")
    )


def test_the_opposite_change_is_wrong_in_every_gene():
    truth = measured(some_changes())
    metrics = score_changes(-truth.changes, truth, 0).metrics
    assert (metrics["pearson"], metrics["direction_accuracy"]) == (pytest.approx(-1), 0)
    assert metrics["mse"] == pytest.approx(4 * np.square(truth.changes).mean())


def test_correlations_are_those_of_scipy():
    from scipy.stats import pearsonr

    truth = measured(some_changes())
    predicted = truth.changes + np.random.default_rng(2).normal(size=truth.changes.shape)
    scores = score_changes(predicted, truth, 0)
    expected = [pearsonr(x, y).statistic for x, y in zip(predicted, truth.changes, strict=True)]
    assert scores.units["pearson"] == pytest.approx(expected)
    top = [
        pearsonr(x[at], y[at]).statistic for x, y, at in zip(predicted, truth.changes, truth.top, strict=True)
    ]
    assert scores.units["pearson_top"] == pytest.approx(top)
    assert scores.metrics["pearson"] == pytest.approx(np.mean(expected))
    low, high = scores.intervals["pearson"]
    assert low < scores.metrics["pearson"] < high


def test_top_genes_are_those_of_scanpys_t_test():
    import scanpy as sc

    adata = exact_cells(some_changes() / 3, noise=0.5)
    truth = measured_in(adata, n_top=7)
    sc.tl.rank_genes_groups(adata, "perturbation", reference="control", method="t-test", rankby_abs=True)
    for number, name in enumerate(truth.names):
        expected = adata.uns["rank_genes_groups"]["names"][name][:7]
        assert [f"gene{i}" for i in truth.top[number]] == list(expected)


def test_energy_distance_is_that_of_scipy_on_a_line():
    from scipy.stats import energy_distance

    rng = np.random.default_rng(0)
    line = np.linspace(0.2, 1, N_GENES)
    t = np.concatenate([rng.normal(5, 1, 50), rng.normal(7, 2, 60)])
    adata = ad.AnnData(
        sparse.csr_matrix(t[:, None] * line),
        obs=pd.DataFrame(
            {"perturbation": np.repeat(["control", "A"], [50, 60])}, index=np.arange(110).astype(str)
        ),
    )
    truth = measured_in(adata)
    predicted = 0.5 * line[None]
    expected = energy_distance(t[:50] + 0.5, t[50:]) ** 2 * np.linalg.norm(line)
    assert score_changes(predicted, truth, 0).metrics["energy_distance"] == pytest.approx(expected, rel=1e-6)


def test_counts_are_normalized_as_scanpy_does():
    import scanpy as sc

    adata = planted(tiny_bundle(), 5)
    truth, names = measured_in(adata), ["G0", "G1", "G2", "G3", "G4"]
    assert truth.names == names
    sc.pp.normalize_total(adata, target_sum=10_000)
    sc.pp.log1p(adata)
    means = adata.to_df().groupby(adata.obs["perturbation"]).mean()
    assert truth.changes == pytest.approx((means.loc[names] - means.loc["control"]).to_numpy(), abs=1e-5)


def test_cells_are_read_in_blocks(monkeypatch):
    adata = planted(tiny_bundle(), 5)
    whole = measured_in(adata)
    monkeypatch.setattr(perturbation_metrics, "CELLS_AT_ONCE", 7)
    in_blocks = measured_in(adata)
    assert in_blocks.means == pytest.approx(whole.means)
    assert in_blocks.variances == pytest.approx(whole.variances)
    expected = adata.obs["perturbation"].map({"control": -1, "G0": 0, "G1": 1, "G2": 2, "G3": 3, "G4": 4})
    assert np.array_equal(whole.drawn_group, expected)
    monkeypatch.setattr(perturbation_metrics, "DISTANCE_CELLS", 10)
    assert np.bincount(measured_in(adata).drawn_group + 1).tolist() == [10] * 6


# --- predictions --------------------------------------------------------------------------------------


def test_each_perturbation_is_held_out_once():
    for n, n_folds in ((3, 2), (3, 5), (4, 2), (25, 5), (7, 5)):
        parts = held_out(n, n_folds, 0)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
        assert all(n - len(part) >= 2 for part in parts)


def test_a_linear_effect_of_the_embedding_is_found():
    rng = np.random.default_rng(0)
    p, w = rng.normal(size=(40, 4)), rng.normal(size=(4, N_GENES))
    changes = p @ (w - w.mean(axis=1, keepdims=True)) + rng.normal(
        size=N_GENES
    )  # G knows no change of all genes
    g = gene_components(5 + changes[:30])
    predicted = predict_changes(changes[:30], g, p[:30], p[30:])
    assert predicted == pytest.approx(changes[30:], abs=0.05)
    noise = predict_changes(changes[:30], g, rng.normal(size=(30, 4)), rng.normal(size=(10, 4)))
    mean = changes[:30].mean(axis=0)
    assert (
        np.abs(noise - mean).mean() < 0.5 * np.abs(changes[30:] - mean).mean()
    )  # chosen penalty: near the mean


def test_the_scale_of_an_embedding_does_not_matter():
    rng = np.random.default_rng(0)
    p, changes = rng.normal(size=(20, 8)), rng.normal(size=(20, N_GENES))
    g = gene_components(5 + changes)
    assert predict_changes(changes, g, p, p) == pytest.approx(predict_changes(changes, g, p / 1000, p / 1000))


def test_a_model_whose_embedding_tells_the_effect_wins():
    bundle = tiny_bundle()
    cells = cells_of(planted(bundle), bundle)
    methods = [
        Method("model", False, None, bundle),
        Method("untrained", True, None, tiny_bundle(seed=5)),
        Method("pca", True, np.zeros((cells.store.n_cells, 2), np.float32)),
    ]
    params = PerturbationParams()
    assert registry.BENCHMARKS.load("perturbation") is perturbation
    perturbation.check(cells, params, 0)
    results = perturbation.run(methods, cells, params, 0)
    assert list(results) == ["model", "untrained", "no_change", "mean_shift", "linear"]
    pearson = {name: scores.metrics["pearson"] for name, scores in results.items()}
    assert pearson["model"] > 0.8
    assert pearson["model"] > max(pearson[name] for name in ("untrained", "mean_shift")) + 0.2
    assert "undefined" in pearson["no_change"]
    sizes = {name: {len(units) for units in scores.units.values()} for name, scores in results.items()}
    assert sizes == {name: {24} for name in results}
    assert results["model"].metrics["split"] == "whole perturbations held out"
    assert [record["label"] for record in results["model"].details["per_perturbation"]] == sorted(
        f"G{i}" for i in range(24)
    )


def test_mean_shift_is_exact_where_all_perturbations_do_the_same():
    rng = np.random.default_rng(0)
    rates = np.full(N_GENES, 20.0)
    control, moved = (
        rng.poisson(rates, (40, N_GENES)),
        rng.poisson(rates * np.linspace(0.5, 2, N_GENES), (40, N_GENES)),
    )
    labels = np.repeat(["control", "G1", "G2", "G3", "G4"], 40)
    adata = ad.AnnData(
        sparse.csr_matrix(np.concatenate([control, *[moved] * 4]).astype(np.float32)),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(200)]),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)]),
    )
    bundle = tiny_bundle()
    results = perturbation.run([], cells_of(adata, bundle), PerturbationParams(), 0)
    for name in ("mean_shift", "linear"):
        assert results[name].metrics["pearson"] == pytest.approx(1)
        assert results[name].metrics["mse"] == pytest.approx(0, abs=1e-12)


def test_the_answer_does_not_depend_on_the_cells_of_held_out_perturbations():
    bundle = tiny_bundle()
    adata = planted(bundle, 10)
    changed = adata.copy()
    test = held_out(10, 5, 0)[0]
    names = usable_perturbations(cells_of(adata, bundle), PerturbationParams()).names
    rows = adata.obs["perturbation"].isin([names[number] for number in test]).to_numpy()
    counts = changed.X.toarray()
    counts[rows] = counts[rows, ::-1]
    changed.X = sparse.csr_matrix(counts)

    def predictions(data: ad.AnnData) -> np.ndarray:
        truth = measured_in(data)
        return _by_fold(truth, held_out(10, 5, 0), lambda g: g[: len(truth.names)])

    before, after = predictions(adata), predictions(changed)
    assert np.array_equal(before[test], after[test])
    assert not np.allclose(np.delete(before, test, axis=0), np.delete(after, test, axis=0))


def test_genes_that_are_perturbed_together_are_added(caplog):
    bundle = tiny_bundle()
    adata = planted(bundle, 5)
    new = {"G0": "G0+G1", "G1": "G1+control", "G2": "G2+Nobody", "G4": "ENSG00000000004"}
    adata.obs["perturbation"] = adata.obs["perturbation"].replace(new)
    adata.obs.loc["c199", "perturbation"] = "G30"
    cells = cells_of(adata, bundle)
    usable = usable_perturbations(cells, PerturbationParams())
    asked = {
        name: np.flatnonzero(row).tolist()
        for name, row in zip(usable.names, usable.genes.toarray(), strict=True)
    }
    assert asked == {"ENSG00000000004": [4], "G0+G1": [0, 1], "G1+control": [1], "G3": [3]}
    assert (usable.unknown, usable.small) == (["G2+Nobody"], ["G30"])
    metrics = perturbation.run([], cells, PerturbationParams(), 0)["mean_shift"].metrics
    assert (metrics["n_unknown_genes"], metrics["n_too_small"], metrics["n_perturbations"]) == (1, 1, 4)
    assert "perturbations that name no gene of the vocabulary are left out: G2+Nobody" in caplog.text
    assert "perturbations that have fewer than 20 cells are left out: G30" in caplog.text


# --- predictions of others ----------------------------------------------------------------------------


def test_anybodys_predictions_can_be_scored():
    adata = exact_cells(some_changes())
    truth = measured_in(adata)
    predicted = pd.DataFrame(truth.changes, index=truth.names, columns=adata.var_names)
    scores = score_perturbations(predicted.iloc[::-1, ::-1], adata)
    assert scores.metrics["pearson"] == pytest.approx(1)
    assert scores.metrics["mse"] == pytest.approx(0, abs=1e-10)
    some = score_perturbations(predicted.iloc[[4, 1], :10], adata)
    assert (some.metrics["n_perturbations"], some.metrics["n_genes"]) == (2, 10)
    assert [record["label"] for record in some.details["per_perturbation"]] == ["G01", "G04"]


def test_predictions_that_cannot_be_scored_are_refused():
    adata = exact_cells(some_changes())
    truth = measured_in(adata)
    predicted = pd.DataFrame(truth.changes, index=truth.names, columns=adata.var_names)
    with pytest.raises(DataError, match=r"1 rows of the predictions \(XYZ\) are no perturbations"):
        score_perturbations(predicted.rename(index={"G01": "XYZ"}), adata)
    with pytest.raises(DataError, match=r"1 columns of the predictions \(XYZ\) are no genes in var_names"):
        score_perturbations(predicted.rename(columns={"gene3": "XYZ"}), adata)
    with pytest.raises(DataError, match="must be distinct"):
        score_perturbations(predicted.iloc[[0, 0]], adata)
    predicted.loc["G02", "gene7"] = np.nan
    with pytest.raises(DataError, match="prediction of 'G02' for gene 'gene7' is nan"):
        score_perturbations(predicted, adata)


def test_mistakes_are_said():
    bundle = tiny_bundle()
    cells = cells_of(planted(bundle, 5), bundle)
    with pytest.raises(DataError, match=r"no obs column 'perturbations'\. Did you mean 'perturbation'"):
        perturbation.check(cells, PerturbationParams(perturbation_key="perturbations"), 0)
    with pytest.raises(DataError, match=r"says 'ctrl' of 0 cells, and at least 20 control cells are needed"):
        perturbation.check(cells, PerturbationParams(control="ctrl"), 0)
    obs = cells.store.obs
    obs["perturbation"] = np.repeat(["control", "G1", "G2", "G3", "Nobody"], [210, 20, 3, 2, 5])
    few = r"be asked: 1, and 3 are needed(.|\n)* are 1 that name no gene(.|\n)* and 2 with fewer than 4 cells"
    with pytest.raises(DataError, match=few):
        perturbation.check(cells, PerturbationParams(min_cells=4), 0)


# --- real cells ---------------------------------------------------------------------------------------


def test_real_perturbations_share_much_of_their_effect(real_data):
    """Ahlmann-Eltze et al. 2025: the mean of the training perturbations is hard to beat, and better than nothing."""
    bundle, path = human_bundle(), real_data / "crispr_papalexi.h5ad"
    cells = EvaluationCells(open_for(bundle, path), path, None, path.name)
    results = perturbation.run([Method("untrained", True, None, bundle)], cells, PerturbationParams(), 0)
    assert results["mean_shift"].metrics["n_perturbations"] == 25
    assert results["mean_shift"].intervals["pearson"][0] > 0.1
    assert results["mean_shift"].metrics["mse"] < results["no_change"].metrics["mse"]
    assert results["untrained"].metrics["mse"] < 1.2 * results["mean_shift"].metrics["mse"]


def test_one_perturbation_is_too_few(real_data):
    bundle, path = human_bundle(), real_data / "pbmc_ifnb_kang.h5ad"
    cells = EvaluationCells(open_for(bundle, path), path, None, path.name)
    with pytest.raises(DataError, match="too few perturbations that can be asked: 1, and 3 are needed"):
        perturbation.check(cells, PerturbationParams(), 0)
