"""Many benchmarks of one model on one data set, beside its baselines, on the same cells and splits."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anndata import AnnData

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.errors import DataError
from scmodelforge.evaluation.baselines import baseline_methods, check_baselines
from scmodelforge.evaluation.benchmark import Benchmark, EvaluationCells, Method, Scores, progress
from scmodelforge.evaluation.seen import SeenCells, seen_cells
from scmodelforge.evaluation.splits import check_embedding
from scmodelforge.evaluation.uncertainty import paired_test
from scmodelforge.files import require_target, write_text
from scmodelforge.inference import as_bundle, embed_store, open_for
from scmodelforge.models.bundle import ModelBundle, with_model_of

log = logging.getLogger(__name__)

VERSIONS_OF = ("scmodelforge", "torch", "scanpy", "scikit-learn", "scib-metrics")


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark of one method.

    Attributes
    ----------
    benchmark, dataset
        Names from the config.
    method
        "model", or the name of a baseline.
    metrics
        Figures and facts by name.
    is_baseline
        Whether the model has to beat it.
    intervals
        95 % bootstrap interval [low, high] of a figure, by its name.
    comparison
        Of the model with the best baseline on the same units: `metric`, `baseline`, `difference`, `interval` and
        `p_value` (see `uncertainty.paired_test`); None for baselines, and where units are not scored.
    details
        Figures of each class, confusion and so on.
    """

    benchmark: str
    dataset: str
    method: str
    metrics: dict[str, Any]
    is_baseline: bool = False
    intervals: dict[str, list[float]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All that a benchmark file gave.

    Attributes
    ----------
    results
        One for each benchmark and method, the model first.
    notes
        What was dropped and why, how it was split, and everything else that was said.
    seen_cells
        Cells that the model was trained on; None where it does not know.
    """

    results: list[BenchmarkResult]
    notes: list[str]
    seen_cells: SeenCells | None


def benchmark(
    config: Config,
    model: ModelBundle | str | Path,
    data: AnnData | str | Path,
    output: str | Path | None = None,
) -> list[BenchmarkResult]:
    """Run the benchmarks of `config.eval` on a model and its baselines; `evaluate` gives the notes, too."""
    return evaluate(config, model, data, output).results


def evaluate(
    config: Config,
    model: ModelBundle | str | Path,
    data: AnnData | str | Path,
    output: str | Path | None = None,
    command: Sequence[str] | None = None,
) -> Evaluation:
    """Run the benchmarks of `config.eval` on a model and its baselines.

    Cells are embedded with the model's own vocabulary, tokenizer and preprocessing.

    Parameters
    ----------
    config
        `eval` is read; `tokenizer` and `model` only to compare with the model's.
    model
        A loaded model, a checkpoint or a model folder.
    data
        Labelled cells with raw counts.
    output
        JSON file for the results.
    command
        The command line, for the JSON file.

    Raises
    ------
    UserError
        If config and model contradict each other, or data or labels cannot be used, or a figure is not a number.
    """
    if output is not None:
        require_target(output)
    bundle = as_bundle(model)
    with_model_of(config, bundle, str(model) if not isinstance(model, ModelBundle) else "memory")
    with _collected_notes() as notes:
        store = open_for(bundle, data, config.data)
        cells = EvaluationCells(store, data, config.data.layer, str(store.files[0]))
        results = _run_all(config, bundle, cells)
        seen = seen_cells(bundle, cells)
    evaluation = Evaluation(results, list(dict.fromkeys(notes)), seen)
    if output is not None:
        facts = {
            "model": "memory" if isinstance(model, ModelBundle) else str(model),
            "data": cells.where,
            "n_cells": store.n_cells,
            "seed": config.eval.seed,
            "command": None if command is None else list(command),
        }
        write_results(evaluation, output, facts)
    return evaluation


def _run_all(config: Config, bundle: ModelBundle, cells: EvaluationCells) -> list[BenchmarkResult]:
    seed = config.eval.seed
    benchmarks: list[tuple[Any, Benchmark]] = [
        (spec, registry.BENCHMARKS.load(spec.name)) for spec in config.eval.benchmarks
    ]
    for spec, one in benchmarks:  # before anything long starts
        one.check(cells, spec.params, seed)
    check_baselines(cells, config.eval)
    began = time.monotonic()
    embedding = embed_store(bundle, cells.store, config.eval.batch_size)
    progress.info("model: embedded in %.1f s", time.monotonic() - began)
    methods = [Method("model", False, embedding, bundle), *baseline_methods(bundle, cells, config.eval)]
    for rival in methods:
        if rival.embedding is not None:
            check_embedding(rival.embedding, cells.store.n_cells, rival.name)
    results = []
    for spec, one in benchmarks:
        progress.info("%s on %s", spec.name, spec.dataset)
        began = time.monotonic()
        scores = one.run(methods, cells, spec.params, seed)
        progress.info(
            "%s on %s took %.1f s: %s", spec.name, spec.dataset, time.monotonic() - began, ", ".join(scores)
        )
        for method, score in scores.items():
            _require_numbers(score, f"{spec.name} of {method}")
        _compare_with_untrained(f"{spec.name} on {spec.dataset}", scores, seed)
        results += _results(spec.name, spec.dataset, scores, seed)
    return results


def _compare_with_untrained(what: str, scores: dict[str, Scores], seed: int) -> None:
    """Say so where pretraining has added nothing, or harms."""
    rivals = {name: score for name, score in scores.items() if name in ("model", "untrained")}
    found = _comparison(rivals, seed) if len(rivals) == 2 else None
    if found is None or found["interval"][0] > 0:
        return
    low, high = found["interval"]
    log.warning(
        "%s: the model is %s its untrained self (%s %+.3f [%+.3f, %+.3f]): here pretraining %s.",
        what,
        "worse than" if high < 0 else "not shown to be better than",
        found["metric"],
        found["difference"],
        low,
        high,
        "does harm" if high < 0 else "has added nothing that these cells can tell",
    )


def _results(name: str, dataset: str, scores: dict[str, Scores], seed: int) -> list[BenchmarkResult]:
    """One result for each method; the model's is compared with the best baseline."""
    return [
        BenchmarkResult(
            name,
            dataset,
            method,
            dict(score.metrics),
            is_baseline=method != "model",
            intervals={metric: list(ends) for metric, ends in score.intervals.items()},
            comparison=_comparison(scores, seed) if method == "model" else None,
            details=dict(score.details),
        )
        for method, score in scores.items()
    ]


def _comparison(scores: dict[str, Scores], seed: int) -> dict[str, Any] | None:
    """Compare the model with the baseline that has the best mean over units in the first metric that has units."""
    ours = scores["model"].units
    for metric in ours:
        rivals = {
            name: score.units[metric]
            for name, score in scores.items()
            if name != "model" and metric in score.units
        }
        if rivals:
            best = max(rivals, key=lambda name: float(rivals[name].mean()))
            test = paired_test(ours[metric], rivals[best], seed)
            return {"metric": metric, "baseline": best, **test._asdict(), "interval": list(test.interval)}
    return None


def _require_numbers(scores: Scores, what: str) -> None:
    figures = {**scores.metrics, **{f"interval of {name}": ends for name, ends in scores.intervals.items()}}
    broken = [
        name
        for name, value in figures.items()
        for number in (value if isinstance(value, tuple | list) else (value,))
        if not isinstance(number, str) and not math.isfinite(number)
    ]
    if broken:
        raise DataError(
            f"{', '.join(dict.fromkeys(broken))} of the benchmark {what} is not a number.\n"
            "Most often the cells are too few or all alike: look at the labels, or leave the benchmark out."
        )


class _Notes(logging.Handler):
    """Collects what is said about the evaluation, and all warnings; not what only says how far it is."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        of_evaluation = record.name.startswith("scmodelforge.evaluation") and record.name != progress.name
        if of_evaluation or record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())


@contextmanager
def _collected_notes() -> Iterator[list[str]]:
    handler, logger = _Notes(), logging.getLogger("scmodelforge")
    evaluation, level = (
        logging.getLogger("scmodelforge.evaluation"),
        logging.getLogger("scmodelforge.evaluation").level,
    )
    logger.addHandler(handler)
    evaluation.setLevel(logging.INFO)  # also where nobody has set up messages, as in a notebook
    try:
        yield handler.messages
    finally:
        evaluation.setLevel(level)
        logger.removeHandler(handler)


def write_results(evaluation: Evaluation, output: str | Path, facts: dict[str, Any]) -> None:
    """Write results as JSON: facts, versions, notes, and one record per benchmark and method."""
    versions = {}
    for package in VERSIONS_OF:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {
        **facts,
        "versions": versions,
        "notes": evaluation.notes,
        "seen_cells": evaluation.seen_cells and evaluation.seen_cells._asdict(),
        "results": [vars(result) for result in evaluation.results],
    }
    write_text(output, json.dumps(record, indent=2, allow_nan=False) + "\n")
