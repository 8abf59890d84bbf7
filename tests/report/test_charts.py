"""The geometry of charts: what is drawn where, and what is said instead of drawn."""

from __future__ import annotations

import numpy as np
import pytest

from scmodelforge.report.charts import (
    LEAST_SPAN,
    MOST_POINTS,
    Curve,
    line_chart,
    number,
    numbers,
    scatter,
    whiskers,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (162_689, "162,689"),
        (0.61234, "0.612"),
        (1.0, "1.000"),
        (0, "0"),
        (-0.0612, "−0.061"),
        (37_763.9, "37,764"),
        (12.34, "12.3"),
        (2e-5, "2e-5"),
        (float("nan"), "not a number"),
        (float("inf"), "infinite"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_curve_goes_down_the_page_as_values_fall_and_ticks_are_round() -> None:
    x = np.arange(1.0, 11)
    chart = line_chart("Loss", [Curve("training", x, 11 - x, "train")], from_zero=True)
    assert chart is not None
    points = np.array([[float(v) for v in point.split()] for point in chart.curves[0].path[1:].split("L")])
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 1]) > 0).all(), "SVG counts downwards"
    assert [tick.text for tick in chart.y_ticks] == ["0", "2", "4", "6", "8", "10"]
    at = {float(tick.text): tick.at for tick in chart.y_ticks}
    assert points[0, 1] == pytest.approx(at[10.0], abs=0.1), "the value 10 lies on its grid line"
    assert chart.curves[0].words == "training from 10 to 1.000"


def test_long_curves_are_thinned_with_both_ends() -> None:
    x = np.arange(10_000.0)
    chart = line_chart("Loss", [Curve("training", x, x, "train")])
    assert chart is not None
    points = chart.curves[0].path[1:].split("L")
    assert len(points) == MOST_POINTS
    assert points[0].split()[0] == str(float(chart.left))
    assert points[-1].split()[0] == str(float(chart.right))


def test_values_that_are_not_finite_are_counted_not_drawn() -> None:
    y = np.array([1.0, np.nan, np.inf, 0.5])
    chart = line_chart("Loss", [Curve("training", np.arange(4.0), y, "train")])
    assert chart is not None
    assert chart.note == "2 values that are not finite are not drawn."
    assert "nan" not in chart.curves[0].path
    assert line_chart("Loss", [Curve("training", np.arange(2.0), np.full(2, np.nan), "train")]) is None


def test_a_constant_curve_can_be_drawn() -> None:
    curve = Curve("memory", np.array([1.0, 2.0]), np.zeros(2), "train")
    chart = line_chart("Memory", [curve], from_zero=True)
    assert chart is not None
    assert "nan" not in chart.curves[0].path
    assert [tick.text for tick in chart.x_ticks] == ["1", "2"], (
        "no step is written twice, and none is a fraction"
    )


def test_dots_alone_are_no_chart() -> None:
    lone = Curve("validation", np.array([38.0]), np.array([0.3]), "val")
    assert line_chart("Accuracy", [lone]) is None
    line = Curve("training", np.array([10.0, 20.0]), np.array([0.4, 0.3]), "train")
    assert line_chart("Loss", [line, lone]) is not None


@pytest.mark.parametrize(
    ("level", "ends"), [(0.0022, (0.0, 0.05)), (0.5, (0.48, 0.52)), (0.9999, (0.96, 1.0))]
)
def test_noise_of_a_share_is_no_trend(level: float, ends: tuple[float, float]) -> None:
    y = level + np.array([-1e-4, 1e-4, 0.0])
    chart = line_chart("Accuracy", [Curve("v", np.arange(3.0), y, "val")], least_span=LEAST_SPAN)
    assert chart is not None
    at = [float(tick.text) for tick in chart.y_ticks]
    assert (at[0], at[-1]) == ends


def test_figures_side_by_side_have_the_same_digits() -> None:
    assert numbers([0.0, 2 / 3, -0.00001]) == ["0.000", "0.667", "0.000"]
    assert numbers([0.0021, 0.0024]) == ["0.0021", "0.0024"]
    assert numbers([3, 1200]) == ["3", "1,200"]
    assert numbers([0.5, float("nan")]) == ["0.500", "not a number"]


def test_every_cell_is_a_dot_in_the_colour_of_its_class() -> None:
    rng = np.random.default_rng(0)
    codes = np.array([0] * 30 + [1] * 20 + [-1] * 5)
    chart = scatter("Label", rng.normal(size=(55, 2)), codes, ["B", "T"], ["red", "blue"])
    assert [(one.name, one.colour, one.n) for one in chart.classes] == [
        ("B", "red", 30),
        ("T", "blue", 20),
        ("unlabelled", "var(--faint)", 5),
    ]
    dots = [sum(path.count("M") for place, path in chart.paths if place == k) for k in range(3)]
    assert dots == [30, 20, 5]
    assert not chart.numbered
    many = scatter("Label", rng.normal(size=(55, 2)), np.arange(55) % 11, [*"abcdefghijk"], ["red"] * 11)
    assert many.numbered
    assert all(one.centre is not None for one in many.classes)


def test_whiskers_keep_order_and_proportion() -> None:
    panel = whiskers("macro F1", [("model", False, 0.8, (0.7, 0.9)), ("pca", True, 0.6, None)])
    model, pca = panel.rows
    assert model.low is not None
    assert model.high is not None
    assert model.at - model.low == pytest.approx(model.high - model.at, abs=0.02)
    assert model.at - pca.at == pytest.approx(2 * (model.high - model.at), abs=0.05)
    assert (pca.low, pca.interval_text) == (None, "")
    assert model.interval_text == "0.700 to 0.900"
    lost = whiskers("macro F1", [("model", False, float("nan"), None), ("pca", True, 0.6, None)])
    assert lost.rows[0].text == "not a number"
