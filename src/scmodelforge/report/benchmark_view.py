"""Benchmarks on a page: methods side by side with their intervals, and the paired test in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scmodelforge.report.cells_view import Confusion, confusion_of
from scmodelforge.report.charts import Whiskers, number, numbers, whiskers
from scmodelforge.report.results import Comparison, MethodResult, Results

MOST_PANELS = 6
AGGREGATES = ("total", "bio_conservation", "batch_correction")  # of scIB: what its other figures come to
PROPER = {  # words that are written in a way of their own
    **{"top1": "top-1", "top5": "top-5", "knn": "k-NN", "kmeans": "k-means", "leiden": "Leiden"},
    **{"ilisi": "iLISI", "clisi": "cLISI", "kbet": "kBET", "r2": "R²"},
    **{"pearson": "Pearson correlation", "spearman": "Spearman correlation"},
    **{
        name: name.upper()
        for name in ("f1", "ari", "nmi", "asw", "mse", "mae", "auroc", "auprc", "auc", "pcr")
    },
    **{name: name.upper() for name in ("lisi", "bras", "rmse", "hvg", "pca")},
}


Figure = tuple[str, bool, float, tuple[float, float] | None]  # method, whether a baseline, figure, interval


@dataclass(frozen=True)
class Row:
    """A method in the table: its figures, each with what stands below it."""

    method: str
    is_baseline: bool
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class BenchmarkView:
    """One benchmark on one data set."""

    title: str
    dataset: str
    panels: list[Whiskers]
    figures: dict[str, list[Figure]]
    columns: list[str]
    rows: list[Row]
    facts: list[tuple[str, str]]
    tests: list[str]
    without_intervals: bool
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confusion: Confusion | None = None


@dataclass(frozen=True)
class Headline:
    """A figure at the top of a page."""

    label: str
    value: str
    note: str = ""


def pretty(name: str) -> str:
    """A name from a file as people write it: macro_f1 is macro F1."""
    return " ".join(PROPER.get(word, word) for word in name.split("_"))


def heading(name: str) -> str:
    """As `pretty`, for the start of a line."""
    text = pretty(name)
    return text if text[1:2].isupper() or text.startswith("k-") else text[:1].upper() + text[1:]


def view_benchmarks(results: Results) -> list[BenchmarkView]:
    """Group results by benchmark and data set; a method that comes again opens another group."""
    groups: list[list[MethodResult]] = []
    for result in results.results:
        for group in groups:
            same = (group[0].benchmark, group[0].dataset) == (result.benchmark, result.dataset)
            if same and result.method not in {row.method for row in group}:
                group.append(result)
                break
        else:
            groups.append([result])
    return [_view(group) for group in groups]


def headlines(results: Results) -> list[Headline]:
    """The model's first figure in each benchmark, beside the baseline that the paired test names or the first one."""
    found = []
    for view in view_benchmarks(results):
        if not view.panels:
            continue
        panel = view.panels[0]
        model = next((row for row in panel.rows if not row.is_baseline), None)
        if model is None:
            continue
        rivals = ", ".join(f"{row.name} {row.text}" for row in panel.rows if row.is_baseline)
        interval = f"95 %: {model.interval_text}. " if model.interval_text else ""
        found.append(Headline(f"{view.title}: {panel.metric}", model.text, f"{interval}{rivals}"))
    return found


def in_words(test: Comparison) -> str:
    """The paired test as sentences."""
    low, high = test.interval
    metric, size = pretty(test.metric), number(abs(test.difference))
    if not all(map(math.isfinite, (test.difference, low, high, test.p_value))):
        return f"The paired test of {metric} against {test.baseline} gave no number: it cannot be told who is ahead."
    way = "higher than" if test.difference > 0 else "lower than" if test.difference < 0 else "equal to"
    by = f"{size} {way}" if test.difference else way
    chance = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.3f}"
    verdict = (
        "The interval holds 0: these cells do not tell the two apart."
        if low <= 0 <= high
        else "The interval leaves out 0: this is more than chance."
    )
    return (
        f"On the same cells the model's {metric} is {by} that of {test.baseline}, the best baseline "
        f"(95 % interval of the difference {number(low)} to {number(high)}; paired test, {chance}). {verdict}"
    )


def _view(group: list[MethodResult]) -> BenchmarkView:
    group = sorted(group, key=lambda row: row.is_rival)
    first = group[0]
    figures = _figures(group)
    aggregates = [name for name in AGGREGATES if name in figures]
    if "batch_correction" not in figures:
        aggregates = aggregates[:1]  # without batches the total is bio_conservation
    with_interval = [name for name in figures if any(name in row.intervals for row in group)]
    tested = [row.comparison for row in group if row.comparison is not None]
    leading = [test.metric for test in tested if test.metric in figures]
    panels = list(dict.fromkeys(leading + aggregates + (with_interval or figures)))[:MOST_PANELS]
    facts = {
        key: value
        for key, value in first.metrics.items()
        if key not in figures and not key.endswith("_std") and not isinstance(value, dict | list)
    }
    shown: dict[str, list[Figure]] = {
        pretty(name): [
            (row.method, row.is_rival, float(row.metrics[name]), row.intervals.get(name))
            for row in group
            if _is_figure(row.metrics.get(name))
        ]
        for name in panels
    }
    columns = [_column(group, name) for name in figures]
    per_class, confusion = _details(first)
    return BenchmarkView(
        heading(first.benchmark),
        first.dataset,
        [whiskers(name, rows) for name, rows in shown.items()],
        shown,
        [pretty(name) for name in figures],
        [
            Row(row.method, row.is_rival, [column[place] for column in columns])
            for place, row in enumerate(group)
        ],
        [
            (pretty(key.removeprefix("n_")), number(value) if isinstance(value, int | float) else str(value))
            for key, value in facts.items()
        ],
        [in_words(test) for test in tested],
        not with_interval,
        per_class,
        confusion,
    )


def _figures(group: list[MethodResult]) -> list[str]:
    """Metrics that are figures: decimal numbers, without their spreads."""
    names = dict.fromkeys(name for row in group for name in row.metrics)
    return [
        name
        for name in names
        if not name.endswith("_std") and any(_is_figure(row.metrics.get(name)) for row in group)
    ]


def _is_figure(value: Any) -> bool:
    return isinstance(value, float)


def _column(group: list[MethodResult], name: str) -> list[tuple[str, str]]:
    """A metric of each method, as it is written, and what stands below it."""
    values = [row.metrics.get(name) for row in group]
    written = iter(numbers([value for value in values if isinstance(value, int | float)]))
    return [
        (next(written), _below(row, name)) if isinstance(value, int | float) else ("—", "")
        for row, value in zip(group, values, strict=True)
    ]


def _below(row: MethodResult, name: str) -> str:
    """The interval of a figure, or its spread."""
    if name in row.intervals:
        return " to ".join(numbers(row.intervals[name]))
    spread = row.metrics.get(f"{name}_std")
    return f"± {numbers([spread])[0]}" if isinstance(spread, int | float) else ""


def _details(result: MethodResult) -> tuple[list[dict[str, Any]], Confusion | None]:
    """Tables of classes, where the benchmark left some in the agreed form."""
    records = result.details.get("per_class")
    per_class = (
        records
        if isinstance(records, list) and all(isinstance(r, dict) and "label" in r for r in records)
        else []
    )
    found = result.details.get("confusion")
    if not isinstance(found, dict) or not found.get("labels"):
        return per_class, None
    counts = np.asarray(found.get("counts"))
    n = len(found["labels"])
    if counts.shape != (n, n):
        return per_class, None
    return per_class, confusion_of(found["labels"], counts.astype(int))
