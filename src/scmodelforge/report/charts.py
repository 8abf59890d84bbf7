"""Charts of a report as plain geometry: numbers and texts that the templates draw as SVG.

Hand-made rather than matplotlib's, so that text and lines follow the page: its font, dark mode and width. A chart is
drawn 360 units wide and shown about as wide, so that its text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
LEAST_SPAN = 0.05  # of the axis of a share
MOST_POINTS = 240  # of a drawn curve
FEW_POINTS = 40  # up to which each is a dot
UMAP_SIZE = 340
LAYERS = 6  # in which the cells of the classes are drawn in turn, so that no class covers another
NUMBERED_FROM = 11  # with more classes colours alone are hard to tell apart: numbers stand on the clusters
COLOURS = (  # mid tones, readable on white and on black
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1"),
    *("#3fb2c4", "#d4a72c", "#ff8fa3", "#9c755f", "#7f7fd5"),
)


@dataclass(frozen=True)
class Curve:
    """One curve: `look` is the class of its colour (train, validation, run-0 …), `faint` what lies behind."""

    name: str
    x: np.ndarray
    y: np.ndarray
    look: str
    faint: bool = False


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A curve as an SVG path, with dots where there are few points; `words` is read aloud."""

    name: str
    look: str
    faint: bool
    path: str
    dots: list[tuple[float, float, str]]
    words: str


@dataclass(frozen=True)
class LineChart:
    """Curves over optimizer steps."""

    title: str
    curves: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    note: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Class:
    """A class of cells in a UMAP; `centre` is where its number stands."""

    name: str
    colour: str
    n: int
    centre: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scatter:
    """Cells as dots: each path is the place of a class in `classes`, and dots of it."""

    title: str
    classes: list[Class]
    paths: list[tuple[int, str]]
    dot: float
    numbered: bool
    size: int = UMAP_SIZE


@dataclass(frozen=True)
class Whisker:
    """A figure and its interval on an axis from 0 to 100."""

    name: str
    is_baseline: bool
    text: str
    interval_text: str
    at: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Whiskers:
    """One metric, method by method."""

    metric: str
    rows: list[Whisker]
    ticks: list[Tick] = field(default_factory=list)


def number(value: float) -> str:
    """A figure as people write it: three or four digits, thousands apart."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    sign, size = "−" if value < 0 else "", abs(value)
    if isinstance(value, int) or value == 0 or (value == int(value) and size >= 10):
        return f"{sign}{int(size):,}"
    if size >= 100:
        return f"{sign}{size:,.0f}"
    if size >= 0.01:
        return f"{sign}{size:.3f}" if size < 10 else f"{sign}{size:.1f}"
    mantissa, _, power = f"{size:.2g}".partition("e")
    return sign + (f"{mantissa}e{int(power)}" if power else mantissa)


def numbers(values: Sequence[float]) -> list[str]:
    """Figures that stand side by side: three decimals for all where the largest has them, else each as `number`."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if not 0.01 <= largest < 10 or all(isinstance(value, int) for value in values):
        return [number(value) for value in values]
    return [
        _minus(f"{round(value, 3) + 0.0:.3f}") if math.isfinite(value) else number(value) for value in values
    ]


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    percent: bool = False,
    least_span: float = 0.0,
) -> LineChart | None:
    """Lay out curves; None if none has two finite points: dots alone tell nothing.

    Parameters
    ----------
    from_zero
        Start the vertical axis at 0, as rates and shares need.
    percent
        The values are shares, written as such.
    least_span
        What the vertical axis spans at least, within 0 and 1.
    """
    finite = [np.isfinite(curve.y) for curve in curves]
    n_lost = int(sum((~keep).sum() for keep in finite))
    shown = [
        Curve(curve.name, curve.x[keep], curve.y[keep], curve.look, curve.faint)
        for curve, keep in zip(curves, finite, strict=True)
        if keep.any()
    ]
    if all(len(curve.x) < 2 for curve in shown):
        return None
    x_low, x_high = _range([curve.x for curve in shown])
    y_low, y_high = _range([curve.y for curve in shown])
    if from_zero:
        y_low, y_high = min(0.0, y_low), y_high if y_high > 0 else 1.0
    else:
        pad = 0.06 * (y_high - y_low)
        y_low, y_high = y_low - pad, y_high + pad
    if y_high - y_low < least_span:
        y_low = min(max((y_low + y_high - least_span) / 2, 0.0), 1.0 - least_span)
        y_high = y_low + least_span
    y_ticks = _ticks(y_low, y_high, percent)
    if from_zero and y_ticks:
        y_high = max(y_high, y_ticks[-1][0])

    def x_at(values: np.ndarray) -> np.ndarray:
        return LEFT + (WIDTH - LEFT - RIGHT) * (values - x_low) / (x_high - x_low)

    def y_at(values: np.ndarray) -> np.ndarray:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (values - y_low) / (y_high - y_low)

    drawn = []
    for curve in shown:
        x, y = _thinned(curve.x, curve.y)
        at = np.column_stack([x_at(x), y_at(y)])
        said = [f"{100 * value:.1f} %" if percent else number(float(value)) for value in curve.y[[0, -1]]]
        dots = []
        if len(curve.x) <= FEW_POINTS and not curve.faint:
            dots = [
                (round(float(a), 1), round(float(b), 1), f"step {int(step):,}: {number(float(value))}")
                for (a, b), step, value in zip(at, curve.x, curve.y, strict=True)
            ]
        words = f"{curve.name} from {said[0]} to {said[1]}"
        drawn.append(Drawn(curve.name, curve.look, curve.faint, _path(at), dots, words))
    return LineChart(
        title,
        drawn,
        [Tick(round(float(x_at(np.array(at))), 1), text) for at, text in _ticks(x_low, x_high, whole=True)],
        [Tick(round(float(y_at(np.array(at))), 1), text) for at, text in y_ticks],
        "optimizer step",
        f"{n_lost:,} values that are not finite are not drawn." if n_lost else "",
    )


def smoothed(values: np.ndarray) -> np.ndarray | None:
    """Running mean over a twentieth of the values; None where there are too few to need one."""
    if len(values) < 50:
        return None
    return pd.Series(values).rolling(len(values) // 20, center=True, min_periods=1).mean().to_numpy()


def scatter(
    title: str, points: np.ndarray, codes: np.ndarray, names: Sequence[str], colours: Sequence[str]
) -> Scatter:
    """Cells in two dimensions, coloured by class.

    Parameters
    ----------
    points
        float (n_cells, 2).
    codes
        int (n_cells): number of the class in `names`; -1: none, drawn grey.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (UMAP_SIZE - 24) / max(float((high - low).max()), 1e-9)
    at = (points - (low + high) / 2) * scale * [1, -1] + UMAP_SIZE / 2
    layer = np.random.default_rng(0).integers(LAYERS, size=len(points))
    present = [code for code in [*range(len(names)), -1] if (codes == code).any()]
    paths = []
    for turn in range(LAYERS):
        for place, code in enumerate(present):
            own = at[(codes == code) & (layer == turn)]
            if len(own):
                paths.append((place, "".join(f"M{x:.1f} {y:.1f}h0" for x, y in own)))
    numbered = sum(code >= 0 for code in present) >= NUMBERED_FROM
    classes = []
    for code in present:
        own = at[codes == code]
        middle = own[
            np.abs(own - np.median(own, axis=0)).sum(1).argmin()
        ]  # a cell, never the gap between two
        centre = (round(float(middle[0]), 1), round(float(middle[1]), 1)) if numbered and code >= 0 else None
        name, colour = ("unlabelled", "var(--faint)") if code < 0 else (names[code], colours[code])
        classes.append(Class(name, colour, len(own), centre))
    return Scatter(
        title, classes, paths, round(float(np.clip(150 / math.sqrt(len(points)), 3.0, 12.0)), 1), numbered
    )


def colours_for(n: int) -> list[str]:
    """`n` colours: ten of our own, else those of scanpy for 20, 28 and 102 classes, repeated beyond."""
    if n <= len(COLOURS):
        return list(COLOURS[:n])
    from scmodelforge.report.layout import class_colours

    return class_colours(n)


def colours_of_values(n: int) -> list[str]:
    """`n` colours from low to high values, viridis without its ends, which vanish on black and on white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.15, 0.9, n))]


def whiskers(metric: str, rows: Sequence[tuple[str, bool, float, tuple[float, float] | None]]) -> Whiskers:
    """Lay out a metric of several methods: name, whether a baseline, figure, interval."""
    ends = [end for _, _, value, interval in rows for end in (value, *(interval or ())) if math.isfinite(end)]
    low, high = _range([np.array(ends)]) if ends else (0.0, 1.0)
    pad = 0.08 * (high - low)
    bounded = bool(ends) and low >= 0 and high <= 1
    low, high = (max(0.0, low - pad), min(1.0, high + pad)) if bounded else (low - pad, high + pad)

    def at(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    laid = []
    texts = numbers([value for _, _, value, _ in rows])
    for (name, is_baseline, value, interval), text in zip(rows, texts, strict=True):
        known = interval is not None and all(map(math.isfinite, interval))
        laid.append(
            Whisker(
                name,
                is_baseline,
                text,
                " to ".join(numbers(interval)) if known and interval else "",
                at(value) if math.isfinite(value) else -1.0,
                at(interval[0]) if known and interval else None,
                at(interval[1]) if known and interval else None,
            )
        )
    ticks = [Tick(at(value), text) for value, text in _ticks(low, high)]
    return Whiskers(metric, laid, ticks)


def _range(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Smallest and largest value, never the same."""
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    if low == high:
        half = abs(low) / 2 or 0.5
        return low - half, high + half
    return low, high


def _ticks(low: float, high: float, percent: bool = False, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers between two ends, all with the same decimals; `whole`: whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    factor = 100 if percent else 1
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
    values = locator.tick_values(low * factor, high * factor)
    step = float(values[1] - values[0])
    inside = [float(v) for v in values if low * factor - step * 1e-6 <= v <= high * factor + step * 1e-6]
    most = max(abs(v) for v in inside) if inside else 1.0
    suffix = " %" if percent else ""
    if most >= 10_000:
        unit, letter = (1e6, " M") if most >= 1e6 else (1e3, " k")
        decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
        return [(v / factor, _minus(f"{v / unit:.{decimals}f}{letter}") if v else "0") for v in inside]
    if most < 1e-3 and most > 0:
        return [(v / factor, number(v) if v else "0") for v in inside]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**decimals, 6) % 1:  # steps of 2.5
        decimals += 1
    return [(v / factor, _minus(f"{v:,.{decimals}f}{suffix}")) for v in inside]


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` of the points, evenly, with the first and the last."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
    return x[kept], y[kept]


def _path(at: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
