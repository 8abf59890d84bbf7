"""Runs side by side: what differs in their configs, their curves in one chart, their figures and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmodelforge.errors import UserError
from scmodelforge.files import require_target
from scmodelforge.report.benchmark_view import BenchmarkView, heading, pretty, view_benchmarks
from scmodelforge.report.charts import Curve, LineChart, Whiskers, line_chart, number, smoothed, whiskers
from scmodelforge.report.render import write_page
from scmodelforge.report.run_folder import COUNTS, Run, read_run
from scmodelforge.report.run_page import command_of, kind_of, span_of

LOOKS = 8  # colours of curves in the style sheet
NOT_SET = "(not set)"
PLACES = ("training.run_dir", "training.checkpoint_dir")  # differ in every pair of runs, and change nothing
SAME_TASK = ("tokenizer.strategy", "model.architecture", "model.pretraining_task", "data.split", "data.paths")


@dataclass(frozen=True)
class SharedBenchmark:
    """A benchmark of several runs: panels with a row for each model, tests in words, and on which data."""

    title: str
    dataset: str
    panels: list[Whiskers]
    tests: list[str]
    data: list[str]


@dataclass(frozen=True)
class TableRow:
    """A line of a table with a column for each run."""

    name: str
    values: list[str]


def compare(runs: Sequence[str | Path], output: str | Path = "comparison.html") -> Path:
    """Write one page that puts runs side by side.

    Parameters
    ----------
    runs
        Two or more run folders.
    output
        The page to write.

    Raises
    ------
    UserError
        If there are fewer than two folders, or one of them is no run folder.
    """
    if len(runs) < 2:
        raise UserError(f"A comparison needs at least two run folders, and {len(runs)} is given.")
    found = [read_run(run) for run in runs]
    names = run_names(found)
    differences = config_differences(found)
    return write_page(
        "comparison.html",
        require_target(output),
        title=f"{len(found)} runs side by side",
        kind="Comparison",
        lede=", ".join(names),
        written=None,
        names=[(name, f"run-{place % LOOKS}") for place, name in enumerate(names)],
        charts=overlaid(found, names),
        caution=_caution(found, differences),
        differences=differences,
        n_same=len({key for run in found for key in flat(run.config)} - set(PLACES)) - len(differences),
        figures=figures_of(found),
        benchmarks=benchmarks_side_by_side(found, names),
        commands=[(name, command_of(run)) for name, run in zip(names, found, strict=True)],
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: of its folder, with the parents that tell equal ones apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({place + 1})" for place, name in enumerate(names)]  # the same folder, given again


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        keys |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return keys


def config_differences(runs: Sequence[Run]) -> list[TableRow]:
    """The config keys whose values are not the same in all runs."""
    trees = [flat(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [_plain(tree[key]) if key in tree else NOT_SET for tree in trees]
        if len(set(values)) > 1 and key not in PLACES:
            rows.append(TableRow(key, values))
    return rows


def overlaid(runs: Sequence[Run], names: Sequence[str]) -> list[LineChart]:
    """One chart for each figure that a run logged, losses first."""
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    validation = [name for name in logged if name.startswith("val_") and name not in ("val_loss", *COUNTS)]
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("val_loss", "Validation loss", {}),
        ("train_loss", "Training loss (running mean)", {}),
        *((name, heading(name.removeprefix("val_")), span_of(name)) for name in validation),
        ("learning_rate", "Learning rate", {"from_zero": True}),
        ("cells_per_second", "Cells per second", {"from_zero": True}),
        ("tokens_per_second", "Tokens per second", {"from_zero": True}),
        ("data_wait_share", "Waiting for data", {"from_zero": True, "percent": True}),
        ("peak_memory_gib", "Peak memory, GiB", {"from_zero": True}),
    ]
    charts = []
    for column, title, how in asked:
        curves = []
        for place, (run, name) in enumerate(zip(runs, names, strict=True)):
            curve = run.curve(column, name, f"run-{place % LOOKS}")
            if curve is None:
                continue
            mean = smoothed(curve.y) if column == "train_loss" else None
            curves.append(curve if mean is None else Curve(curve.name, curve.x, mean, curve.look))
        chart = line_chart(title, curves, **how)
        charts += [chart] if chart is not None else []
    return charts


def figures_of(runs: Sequence[Run]) -> list[TableRow]:
    """Validation figures of the best and the last model, sizes, rates and memory of each run."""
    rows: dict[str, list[str]] = {"kind": [kind_of(run) for run in runs]}

    def add(name: str, value: Any, place: int, text: str | None = None) -> None:
        if value is not None:
            rows.setdefault(name, ["—"] * len(runs))[place] = text or number(value)

    for place, run in enumerate(runs):
        best, last = run.validation(run.best_step), run.validation(run.last_step)
        for name in best | last:
            label = f"{pretty(name.removeprefix('val_'))}, validation"
            add(f"{label}, best model", best.get(name), place)
            add(f"{label}, at the end", last.get(name), place)
    for place, run in enumerate(runs):
        if run.best_step is not None:
            add("best model", run.best_step, place, run.epoch(run.best_step))
    for place, run in enumerate(runs):
        data, model, performance = (run.record.get(key) or {} for key in ("data", "model", "performance"))
        add("training cells", data.get("n_train"), place)
        add("validation cells", data.get("n_val"), place)
        add("parameters", model.get("n_parameters"), place)
        add("steps", max((int(values[-1, 0]) for values in run.metrics.values()), default=None), place)
        add("seconds of training", performance.get("seconds"), place)
        add("cells per second", performance.get("cells_per_second"), place)
        add("tokens per second", performance.get("tokens_per_second"), place)
        for key, name in (
            ("data_wait_share", "waiting for data"),
            ("padding_share", "padding"),
            ("mfu", "MFU"),
        ):
            share = performance.get(key)
            add(name, share, place, None if share is None else f"{100 * share:.1f} %")
        add("peak memory, GiB", performance.get("peak_memory_gib"), place)
        add("warnings", len(run.record.get("notes") or []), place)
    return [TableRow(name, values) for name, values in rows.items()]


def benchmarks_side_by_side(runs: Sequence[Run], names: Sequence[str]) -> list[SharedBenchmark]:
    """Each benchmark that lies in a run folder: the models of the runs, and the baselines once."""
    groups: dict[tuple[str, str], list[tuple[str, str, BenchmarkView]]] = {}
    for name, run in zip(names, runs, strict=True):
        for _, results in run.benchmarks:
            data = f"{results.data or 'data that are not named'}, {results.n_cells or 'unknown'} cells"
            for view in view_benchmarks(results):
                groups.setdefault((view.title, view.dataset), []).append((name, data, view))
    return [
        SharedBenchmark(
            title,
            dataset,
            _panels([(name, view) for name, _, view in found]),
            [f"{name}: {sentence}" for name, _, view in found for sentence in view.tests],
            list(dict.fromkeys(data for _, data, _ in found)),
        )
        for (title, dataset), found in groups.items()
    ]


def _panels(views: Sequence[tuple[str, BenchmarkView]]) -> list[Whiskers]:
    rows: dict[str, dict[tuple[str, bool], tuple[float, tuple[float, float] | None]]] = {}
    for name, view in views:
        for metric, methods in view.figures.items():
            for method, is_baseline, value, interval in methods:
                who = (method if is_baseline else name, is_baseline)
                rows.setdefault(metric, {}).setdefault(who, (value, interval))
    return [
        whiskers(
            metric,
            [(*who, *found) for who, found in sorted(methods.items(), key=lambda item: item[0][1])],
        )
        for metric, methods in rows.items()
    ]


def _plain(value: Any) -> str:
    """A value as it stands in a config."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _caution(runs: Sequence[Run], differences: Sequence[TableRow]) -> str:
    """Why losses may not be compared, if they may not."""
    reasons = [row.name for row in differences if row.name.startswith(SAME_TASK)]
    reasons += ["what they learn"] if len({kind_of(run) for run in runs}) > 1 else []
    cells = {(run.record.get("data") or {}).get("train_cells") for run in runs}
    reasons += ["their training cells"] if len(cells) > 1 else []
    if not reasons:
        return ""
    return (
        f"These runs differ in {', '.join(reasons)}: their losses may measure different things, or on different cells. "
        "Compare them by a benchmark on the same cells."
    )
