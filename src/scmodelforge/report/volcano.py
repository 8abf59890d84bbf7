"""What `perturb` found, as files: the table, and the volcano plot of shift against false discovery rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from scmodelforge.files import atomic_path

DPI = 150
INK, GREY, DOWN, UP = "#333333", "#c8c8c8", "#4477aa", "#cc6633"

SIGNIFICANT = 0.05
SHOWN = 10  # rows in the summary
NAMED = 20  # genes with a name in the picture, as far as there is room
NAME_SIZE = 0.12, 0.032  # of a name in the picture, as shares of its axes
SMALLEST = 1e-300  # a rate that is 0 for a float is drawn here


def write_perturbations(
    table: pd.DataFrame, folder: Path, how: str, start: str | None = None, goal: str | None = None
) -> str:
    """Write `perturbations.csv` and `volcano.png` of a table of `perturb`; returns a summary of a few lines."""
    with atomic_path(folder / "perturbations.csv") as temporary:
        table.to_csv(temporary, index=False)
    cells = f" in {start} cells" if start else ""
    shift = f"mean shift towards {goal}" if goal else "mean change of the cell (1 − cosine similarity)"
    plot_volcano(table, folder / "volcano.png", f"{how}{cells}", shift)
    shown = table.head(SHOWN).to_string(index=False, float_format=lambda value: f"{value:.4g}")
    n_significant = int((table["fdr"] < SIGNIFICANT).sum())
    return (
        f"{shown}\n"
        f"{n_significant:,} of {len(table):,} perturbations with a false discovery rate below {SIGNIFICANT}: "
        f"{folder / 'perturbations.csv'}, {folder / 'volcano.png'}"
    )


def plot_volcano(table: pd.DataFrame, output: Path, title: str, shift: str) -> None:
    """Draw mean shift against false discovery rate, one point a perturbation; the strongest have names.

    Parameters
    ----------
    table
        As `perturb` returns it.
    output
        The picture; its suffix (.png, .pdf, .svg) is the format.
    title, shift
        Heading, and what the shift is.
    """
    x = table["mean_shift"].to_numpy()
    y = -np.log10(table["fdr"].clip(lower=SMALLEST).to_numpy())
    significant = table["fdr"].to_numpy() < SIGNIFICANT
    kinds = {
        "not significant": (~significant, GREY),
        "shift below others": (significant & (table["effect"].to_numpy() < 0), DOWN),
        "shift above others": (significant & (table["effect"].to_numpy() >= 0), UP),
    }
    from matplotlib.figure import Figure  # and not pyplot: no display is needed, no global state touched

    figure = Figure(figsize=(6.4, 5.0))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    for label, (chosen, colour) in kinds.items():
        if chosen.any():
            axes.scatter(
                x[chosen],
                y[chosen],
                s=16,
                c=colour,
                linewidths=0,
                alpha=0.8,
                label=f"{label} ({chosen.sum():,})",
            )
    axes.axhline(-np.log10(SIGNIFICANT), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.margins(0.08)
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # room for points at 0
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(shift)
    axes.set_ylabel("−log₁₀ false discovery rate")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    scaled = np.stack([(x - left) / (right - left), (y - bottom) / (top - bottom)], axis=1)
    strongest = np.lexsort([-np.abs(x), -y])
    for place, side in _with_room(scaled, strongest[significant[strongest]]):
        axes.annotate(
            table["symbol"].iloc[place],
            (x[place], y[place]),
            xytext=(4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7,
            color=INK,
        )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    with atomic_path(output) as temporary:
        figure.savefig(
            temporary, format=output.suffix.lstrip("."), dpi=DPI, bbox_inches="tight", pad_inches=0.12
        )


def _with_room(points: np.ndarray, order: np.ndarray) -> list[tuple[int, int]]:
    """Points (n, 2), in `order`, whose names cover no other name, and the side of each name: 1 right, -1 left."""
    named: list[tuple[int, int]] = []
    centres = np.empty((0, 2))
    for place in order:
        for side in (1, -1):
            centre = points[place] + (side * NAME_SIZE[0] / 2, 0)
            if len(named) < NAMED and not (np.abs(centres - centre) < NAME_SIZE).all(axis=1).any():
                named.append((int(place), side))
                centres = np.vstack([centres, centre])
                break
    return named
