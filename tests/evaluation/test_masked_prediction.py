"""The pretraining task as a benchmark: training's own figures, cell by cell, beside a baseline of means."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scmodelforge import registry
from scmodelforge.config_eval_masked_prediction import MaskedPredictionParams
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.errors import DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores
from scmodelforge.evaluation.masked_prediction import (
    asked_batches,
    cell_sums,
    divided,
    masked_prediction,
    task_scores,
)
from scmodelforge.evaluation.mean_prediction import fit_means, range_of
from scmodelforge.inference import open_for
from scmodelforge.models.bundle import ModelBundle, build_model, load_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.strategies import TABLE, Combination
from scmodelforge.training.data import prepare_data
from scmodelforge.training.run import RunResult
from tests.helpers import make_vocab, marker_cells, tiny_config

ALLOWED = [row for row in TABLE.values() if row.allowed]
VOCAB = make_vocab(40, np.full(40, 1.5))
PARAMS = MaskedPredictionParams()


def bundle_of(row: Combination, **model: Any) -> ModelBundle:
    config = tiny_config(
        Path("nowhere"),
        tokenizer={"strategy": row.tokenizer, "n_bins": 6},
        model={"architecture": row.architecture, "pretraining_task": row.task, **model},
    )
    return ModelBundle(config, VOCAB, build_model(config, VOCAB, 0).eval())


@cache
def cells() -> ad.AnnData:
    return marker_cells(80)


def evaluation_cells(bundle: ModelBundle, data: ad.AnnData) -> EvaluationCells:
    return EvaluationCells(open_for(bundle, data), data, None, "made-up cells")


def run(
    bundle: ModelBundle, data: ad.AnnData | None = None, params: MaskedPredictionParams = PARAMS
) -> dict[str, Scores]:
    data = cells() if data is None else data
    methods = [
        Method("model", False, None, bundle),
        Method("pca", True, np.zeros((data.n_obs, 2), np.float32)),
    ]
    return masked_prediction.run(methods, evaluation_cells(bundle, data), params, 0)


def test_figures_are_those_that_training_logs_for_its_validation_cells(pretrained: RunResult):
    logged = pd.read_csv(pretrained.run_dir / "metrics.csv")["val_loss"].dropna()
    bundle = load_model(pretrained.checkpoint_dir / "last.ckpt")
    config = bundle.config
    prepared = prepare_data(config, marker_cells(), bundle.vocab)
    task, seed = build_objective(config, bundle.vocab), config.training.seed
    of = EvaluationCells(prepared.store, None, None, "")
    asked = asked_batches(bundle, task, of, prepared.val_rows, seed, VALIDATION_EPOCH, 1)
    sums = cell_sums(task, {"model": bundle.model.eval()}, asked, "cpu")["model"]
    scores = task_scores(task, sums, {}, 0)
    assert scores.metrics["loss"] == pytest.approx(logged.iloc[-1], rel=1e-5)


@pytest.mark.parametrize("row", ALLOWED, ids=lambda row: f"{row.tokenizer}-{row.architecture}-{row.task}")
def test_every_task_has_figures_and_a_baseline(row):
    results = run(bundle_of(row))
    expected = {
        "masked_gene_prediction": "frequency",
        "next_gene": "frequency",
        "expression_reconstruction": "mean_value",
        "dual_prediction": "frequency_and_mean_value",
    }[row.task]
    assert list(results) == ["model", expected]
    model, means = results.values()
    assert model.metrics.keys() == means.metrics.keys()
    assert model.metrics["loss"] > means.metrics["loss"]  # it was not trained
    for name in ("n_asked", "n_values"):
        assert model.metrics.get(name) == means.metrics.get(name) != 0
    assert (model.metrics["n_cells"], model.metrics["n_reference"]) == (40, 40)
    for scores in results.values():
        assert all(np.isfinite(value) for value in scores.metrics.values() if isinstance(value, float))
        low, high = scores.intervals["loss"]
        assert low < scores.metrics["loss"] < high
        assert scores.units["loss"].shape == (40,)
        assert next(iter(scores.units)) in ("top1_accuracy", "pearson")
        assert scores.units["loss"].mean() == pytest.approx(scores.metrics["loss"], rel=1e-2)


def test_the_unit_of_a_cell_is_its_own_figure_where_all_cells_ask_alike():
    """The pseudo-value of a mean over cells that count alike is the cell's own value."""
    bundle = bundle_of(TABLE["binned_expression", "transformer_encoder", "expression_reconstruction"])
    task = build_objective(bundle.config, VOCAB)
    rng = np.random.default_rng(0)
    sums = np.zeros((30, len(task.sums)))
    losses = rng.uniform(1, 5, 30)
    columns = {name: place for place, name in enumerate(task.sums)}
    sums[:, columns["expression_total"]] = 7 * losses
    sums[:, columns["squared_error"]] = 7 * losses**2
    sums[:, [columns["expression_count"], columns["values"]]] = 7
    scores = task_scores(task, sums, {}, 0)
    assert scores.units["loss"] == pytest.approx(losses)
    assert scores.units["mse"] == pytest.approx(losses**2)
    assert scores.metrics["pearson"] == "undefined: nothing varies, or nothing was asked"
    assert "pearson" not in scores.units
    from scipy.stats import bootstrap

    expected = bootstrap((losses,), np.mean, method="percentile", n_resamples=5000, rng=0).confidence_interval
    assert scores.intervals["loss"] == pytest.approx(tuple(expected), abs=0.1)


def test_a_trained_model_beats_the_untrained_one_and_the_frequencies(pretrained: RunResult):
    bundle = load_model(pretrained.checkpoint_dir / "best.ckpt")
    fresh = ModelBundle(bundle.config, bundle.vocab, build_model(bundle.config, bundle.vocab, 1).eval())
    data = marker_cells(200, seed=9)
    methods = [Method("model", False, None, bundle), Method("untrained", True, None, fresh)]
    results = masked_prediction.run(methods, evaluation_cells(bundle, data), PARAMS, 0)
    loss = {name: scores.metrics["loss"] for name, scores in results.items()}
    assert loss["model"] < loss["untrained"]
    better = results["untrained"].units["loss"] - results["model"].units["loss"]
    assert better.mean() > 3 * better.std() / np.sqrt(len(better))


def test_a_cell_has_the_same_figures_whatever_cells_are_beside_it():
    bundle = bundle_of(TABLE["continuous_projection", "masked_autoencoder", "expression_reconstruction"])
    of, task = evaluation_cells(bundle, cells()), build_objective(bundle.config, VOCAB)
    rows = np.arange(12)

    def sums(of_rows: np.ndarray, batch_size: int) -> np.ndarray:
        batches = asked_batches(bundle, task, of, of_rows, 0, VALIDATION_EPOCH, batch_size)
        return cell_sums(task, {"model": bundle.model}, batches, "cpu")["model"]

    alone = sums(rows, 1)
    assert alone[3] == pytest.approx(sums(rows[3:4], 1)[0])
    assert alone.sum(axis=0) == pytest.approx(sums(rows, 12)[0], rel=1e-4)


def test_losses_that_are_not_about_tokens_are_left_out(caplog):
    row = TABLE["continuous_projection", "transformer_encoder", "expression_reconstruction"]
    caplog.set_level("INFO")
    results = run(bundle_of(row, objective={"ecs_weight": 1.0, "cell_weight": 1.0}, pooling="mean"))
    assert "the loss leaves out cell_expression, ecs" in caplog.text
    for scores in results.values():
        assert scores.metrics["loss"] == pytest.approx(scores.metrics["mse"])
        assert not any("ecs" in name or "cell" in name for name in scores.metrics if name != "n_cells")


@pytest.mark.parametrize(
    "row",
    [
        TABLE["rank_value", "transformer_encoder", "masked_gene_prediction"],
        TABLE["binned_expression", "transformer_encoder", "dual_prediction"],
        TABLE["continuous_projection", "autoregressive_transformer", "dual_prediction"],
        TABLE["continuous_projection", "autoregressive_transformer", "expression_reconstruction"],
        TABLE["continuous_projection", "masked_autoencoder", "expression_reconstruction"],
    ],
    ids=lambda row: f"{row.architecture}-{row.task}",
)
def test_cells_without_an_answer_count_nothing(row):
    data = cells().copy()
    counts = data.X.toarray()
    counts[:10] = 0
    counts[10:20, 1:] = 0
    counts[10:20, 0] = 3
    data.X = sparse.csr_matrix(counts)
    for scores in run(bundle_of(row), data).values():
        assert np.isfinite(scores.metrics["loss"])
        assert np.isfinite(scores.units["loss"]).all()
        assert scores.metrics["n_cells"] == 40


# --- the baseline of means ----------------------------------------------------------------------------


def test_ranges_of_ranks_double():
    assert range_of(torch.tensor([-1, 0, 1, 2, 3, 6, 7, 14, 15, 10**6])).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        15,
    ]


def answers(bundle: ModelBundle, counts: np.ndarray) -> Any:
    data = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=VOCAB.gene_ids))
    task = build_objective(bundle.config, VOCAB)
    rows = np.arange(len(counts))
    batches = asked_batches(bundle, task, evaluation_cells(bundle, data), rows, 0, 0, 64)
    return fit_means(bundle.config, VOCAB, batches)


def test_it_knows_which_genes_come_first():
    counts = np.zeros((400, 40))
    counts[:, :8] = 2.0 ** np.arange(8, 0, -1)  # always in the same order
    counts[:, 8:] = np.random.default_rng(0).poisson(0.2, (400, 32))
    bundle = bundle_of(TABLE["rank_value", "transformer_encoder", "masked_gene_prediction"])
    means = answers(bundle, counts)
    assert means.log_frequency.exp().sum(dim=0) == pytest.approx(torch.ones(16))
    first = VOCAB.first_gene_token
    position = int(bundle.config.tokenizer.prepend_cls)
    ranges = range_of(torch.arange(position, position + 3)).tolist()
    assert means.log_frequency[:, ranges[0]].argmax() in (first, first + 1)
    assert means.log_frequency[first + 7, ranges[2]] < means.log_frequency[first + 2, ranges[2]]


@pytest.mark.parametrize("value_loss", ["mse", "cross_entropy"])
def test_it_knows_the_values_of_genes(value_loss):
    counts = np.zeros((300, 40))
    counts[:, :10] = np.arange(1, 11) ** 2
    bundle = bundle_of(
        TABLE["binned_expression", "transformer_encoder", "expression_reconstruction"],
        objective={"value_loss": value_loss},
    )
    outputs = answers(bundle, counts).outputs[VOCAB.first_gene_token :]
    values = outputs.argmax(dim=1) if value_loss == "cross_entropy" else outputs[:, 0]
    assert (torch.diff(values[:10].float()) > -0.1).all()
    assert values[9] - values[0] >= 3
    assert torch.equal(outputs[20], outputs[30])  # never seen: what all genes have in common


# --- cells --------------------------------------------------------------------------------------------


def test_reference_and_scored_cells_are_apart():
    of = evaluation_cells(bundle_of(ALLOWED[0]), cells())
    reference, scored = divided(of, MaskedPredictionParams(reference_share=0.25), 0)
    assert (len(reference), len(scored)) == (20, 60)
    assert not set(reference) & set(scored)
    assert all(len(rows) == 20 for rows in divided(of, MaskedPredictionParams(max_cells=20), 0))
    assert not np.array_equal(scored, divided(of, MaskedPredictionParams(reference_share=0.25), 1)[1])


def test_too_few_cells_are_refused():
    assert registry.BENCHMARKS.load("masked_prediction") is masked_prediction
    of = evaluation_cells(bundle_of(ALLOWED[0]), cells()[:19])
    with pytest.raises(
        DataError, match=r"divides the 19 cells of made-up cells into 10 to take means from and 9"
    ):
        masked_prediction.check(of, PARAMS, 0)
