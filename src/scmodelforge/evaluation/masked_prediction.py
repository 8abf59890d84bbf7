"""How well does a model do what it was pretrained to do, on cells that it has not seen?

The task is that of the model's own config with its validation masks, and the figures are those that training logs for
its validation cells: loss, perplexity, accuracies, errors, correlations. Beside the model stand the untrained model and
`MeanPrediction`, which knows genes but no cell: a model that does not beat it has learned nothing about cells. It is
called by what it knows: `frequency` of genes, `mean_value`, or `frequency_and_mean_value`.

Cells go through the model one by one, so that the figures of each are known, for any task: on a CPU 6 % slower than in
batches of 16 (4 layers × 128, 800 genes a cell). Losses that compare cells, or ask about obs columns, are no part of
the loss here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from scmodelforge.config_eval_masked_prediction import MaskedPredictionParams
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.errors import DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores
from scmodelforge.evaluation.mean_prediction import fit_means
from scmodelforge.evaluation.uncertainty import interval, resampled
from scmodelforge.inference_batches import THREADS, default_device
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import LossTerm, Objective, PackedBatch
from scmodelforge.tokenizers.base import build_tokenizer

log = logging.getLogger(__name__)

FEWEST = 10  # cells to score, and to take means of
AUXILIARY = ("cell_expression", "cell_nonzero", "ecs", "batch")  # losses of the cell embedding
REFERENCE_BATCH = 64
REFERENCE_EPOCHS = 4  # each reference cell is asked so often, each time about other genes
COUNTS = ("n_asked", "n_values")
LESS_IS_BETTER = ("loss", "perplexity", "mse", "mae", "count_nll")


class MaskedPredictionBenchmark:
    """The benchmark `masked_prediction`."""

    def check(self, cells: EvaluationCells, params: MaskedPredictionParams, seed: int) -> None:
        """Raise `DataError` if there are too few cells."""
        divided(cells, params, seed)

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: MaskedPredictionParams, seed: int
    ) -> dict[str, Scores]:
        """Score each method that brings a model, and the baseline of means."""
        reference, rows = divided(cells, params, seed)
        with_model = {method.name: method.bundle for method in methods if method.bundle is not None}
        if not with_model:
            return {}
        bundle = next(iter(with_model.values()))
        if bundle.labels is not None:
            log.warning(
                "masked_prediction: fine-tuning has changed this model since it learned its pretraining task."
            )
        task = build_objective(bundle.config, bundle.vocab)
        if left_out := [name for name in AUXILIARY if any(f"{name}_total" == part for part in task.sums)]:
            log.info("masked_prediction: the loss leaves out %s", ", ".join(left_out))
        device = default_device()
        answers = (
            batch
            for epoch in range(REFERENCE_EPOCHS)
            for batch in asked_batches(bundle, task, cells, reference, seed, epoch, REFERENCE_BATCH)
        )
        means = fit_means(bundle.config, bundle.vocab, answers)
        rivals: dict[str, Any] = {name: with_model[name].model.to(device).eval() for name in with_model} | {
            mean_name(task): means.to(device)
        }
        asked = asked_batches(bundle, task, cells, rows, seed, VALIDATION_EPOCH, 1)
        sums = cell_sums(task, rivals, asked, device)
        facts: dict[str, float | int | str] = {
            "n_cells": len(rows),
            "n_reference": len(reference),
            "split": "by cell, at random",
        }
        return {name: task_scores(task, of_cells, facts, seed) for name, of_cells in sums.items()}


def divided(
    cells: EvaluationCells, params: MaskedPredictionParams, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that means are taken from, and rows to score: int64, ascending, disjoint.

    Raises
    ------
    DataError
        If one of them has fewer than 10 cells.
    """
    n_cells = cells.store.n_cells
    order = np.random.default_rng(seed).permutation(n_cells)
    n_reference = round(params.reference_share * n_cells)
    if min(n_reference, n_cells - n_reference) < FEWEST:
        raise DataError(
            f"masked_prediction divides the {n_cells:,} cells of {cells.where} into {n_reference:,} to take means from "
            f"and {n_cells - n_reference:,} to score, and {FEWEST} are needed of each.\n"
            "Give more cells, or change params.reference_share."
        )
    reference, scored = order[:n_reference], order[n_reference:]
    return np.sort(reference[: params.max_cells]), np.sort(scored[: params.max_cells])


def asked_batches(
    bundle: ModelBundle,
    task: Objective,
    cells: EvaluationCells,
    rows: np.ndarray,
    seed: int,
    epoch: int,
    batch_size: int,
) -> Iterator[PackedBatch]:
    """What the task asks about some rows, `batch_size` cells at a time; made by threads ahead of the model."""
    tokenizer = build_tokenizer(bundle.config, bundle.vocab)
    in_order = (
        bundle.config.tokenizer.bin_ties == "numpy"
    )  # numpy's generator serves one cell after the other

    def make(_: int, step: int) -> PackedBatch:
        some = cells.store.read(rows[step * batch_size : (step + 1) * batch_size])
        return task.pack(task.corrupt(tokenizer(some, seed, epoch), seed, epoch))

    return iter(BatchLoader(make, -(-len(rows) // batch_size), 1 if in_order else THREADS))


def mean_name(task: Objective) -> str:
    """What the baseline of means is called: by what the task asks."""
    known = [name for name, part in (("frequency", "genes"), ("mean_value", "values")) if part in task.sums]
    return "_and_".join(known)


@torch.inference_mode()
def cell_sums(
    task: Objective, models: dict[str, Any], batches: Iterator[PackedBatch], device: str
) -> dict[str, np.ndarray]:
    """What `task.count` gives of each cell, float64 (n_cells, n_sums), by name of the model; 0 where nothing is asked.

    Parameters
    ----------
    batches
        One cell each.
    """
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    nothing = torch.zeros(len(task.sums), dtype=torch.float64)
    for batch in batches:
        on_device = batch.to(device, non_blocking=True)
        for name, model in models.items():
            if not batch.n_asked:
                sums[name].append(nothing)
                continue
            output = task(model, on_device)
            zero = LossTerm(output.hidden.new_zeros(()), 0)
            terms = output.terms | dict.fromkeys(AUXILIARY, zero)
            sums[name].append(task.count(replace(output, terms=terms), on_device))
    return {name: torch.stack([row.cpu() for row in rows]).numpy() for name, rows in sums.items()}


def task_scores(task: Objective, sums: np.ndarray, facts: dict[str, float | int | str], seed: int) -> Scores:
    """The task's metrics of all cells together.

    The unit of a cell is its jackknife pseudo-value n θ − (n − 1) θ₋ᵢ (Tukey 1958), where θ is the metric of all cells
    and θ₋ᵢ that without this one: their mean is θ but for terms of the order of 1/n, whatever the metric is made of.
    Metrics of which more is better come first among the units, as comparisons look at the first one.

    Parameters
    ----------
    sums
        float64 (n_cells, n_sums), as `cell_sums` gives them.
    """
    n, total = len(sums), sums.sum(axis=0)
    metrics = _metrics(task, total)
    figures = {name: value for name, value in metrics.items() if name not in COUNTS and np.isfinite(value)}
    without = [_metrics(task, total - row) for row in sums]
    drawn = [_metrics(task, row) for row in resampled(n, seed) @ sums]
    units, intervals = {}, {}
    for name, value in figures.items():
        units[name] = n * value - (n - 1) * np.array([others[name] for others in without])
        draws = np.array([others[name] for others in drawn])
        if np.isfinite(draws).all():
            intervals[name] = interval(draws)
    units = {
        name: units[name] for name in sorted(units, key=_less_is_better) if np.isfinite(units[name]).all()
    }
    said: dict[str, float | int | str] = {
        name: value if np.isfinite(value) else "undefined: nothing varies, or nothing was asked"
        for name, value in metrics.items()
    }
    return Scores(
        said | {name: int(metrics[name]) for name in COUNTS if name in metrics} | facts, intervals, units
    )


def _metrics(task: Objective, sums: np.ndarray) -> dict[str, float]:
    """The metrics without the parts of the loss that are left out."""
    metrics = task.metrics(torch.from_numpy(sums))
    return {name: value for name, value in metrics.items() if name.removesuffix("_loss") not in AUXILIARY}


def _less_is_better(metric: str) -> bool:
    return metric.endswith(LESS_IS_BETTER)


masked_prediction = MaskedPredictionBenchmark()
