"""The pictures of a run: the loss curve and the UMAP.

Drawn on matplotlib's own figure objects, without pyplot: no display is needed and no global state is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scmodelforge.errors import DataError, UserError
from scmodelforge.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
INK, GREY = "#333333", "#c8c8c8"
TRAIN_COLOUR, VALIDATION_COLOUR = "#4477aa", "#cc6633"
MIN_CELLS_FOR_UMAP = 10
NUMBERED_FROM = 11  # with more classes colours alone are hard to tell apart: numbers stand on the clusters
LEGEND_ROWS = 24


def plot_loss(metrics_csv: Path, output: Path) -> None:
    """Draw training and validation loss against the optimizer step.

    Parameters
    ----------
    metrics_csv
        Table with the columns `step` and `train_loss` or `val_loss` or both; cells may be empty.
    output
        The picture; its suffix (.png, .pdf, .svg) is the format.

    Raises
    ------
    DataError
        If the table is missing or holds no loss.
    """
    try:
        table = pd.read_csv(metrics_csv)
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise DataError(f"Cannot read the metrics table '{metrics_csv}': {error}.") from error
    curves = {
        name: table[["step", name]].dropna()
        for name in ("train_loss", "val_loss")
        if name in table and "step" in table
    }
    if not any(map(len, curves.values())):
        raise DataError(
            f"'{metrics_csv}' holds no loss: it needs the columns step and train_loss or val_loss, with "
            f"values in them (columns: {', '.join(map(str, table.columns))}).\n"
            "A run writes them as it trains."
        )
    with _axes(output, width=6.4, height=4.0) as axes:
        train, validation = (curves.get(name, pd.DataFrame()) for name in ("train_loss", "val_loss"))
        if len(train):
            smooth = len(train) >= 50
            line: dict[str, Any] = {"color": TRAIN_COLOUR, "linewidth": 1.6}
            raw = line | {"alpha": 0.3, "linewidth": 0.8} if smooth else line | {"label": "training"}
            axes.plot(train["step"], train["train_loss"], **raw)
            if smooth:
                mean = train["train_loss"].rolling(len(train) // 20, center=True, min_periods=1).mean()
                axes.plot(train["step"], mean, label="training (running mean)", **line)
        if len(validation):
            axes.plot(
                validation["step"],
                validation["val_loss"],
                color=VALIDATION_COLOUR,
                linewidth=1.6,
                marker="o",
                markersize=4,
                label="validation",
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)


def plot_umap(
    embedding: np.ndarray, labels: np.ndarray, output: Path, title: str, seed: int = 0
) -> np.ndarray:
    """Draw a UMAP of an embedding, coloured by label, and return its coordinates.

    Neighbours and layout are scanpy's, with its defaults and a fixed seed.

    Parameters
    ----------
    embedding
        float32 (n_cells, d), finite.
    labels
        (n_cells): a name for each cell; None, NaN and "" are drawn grey, as unlabelled.
    output
        The picture; its suffix (.png, .pdf, .svg) is the format.
    title
        Heading of the picture.
    seed
        Seed of neighbours and layout.

    Returns
    -------
    numpy.ndarray
        float32 (n_cells, 2).

    Raises
    ------
    DataError
        If there are fewer than ten cells.
    """
    points = umap_layout(embedding, seed)

    column = pd.Categorical(pd.Series(labels, dtype=object).replace("", None))
    legend_columns = -(-(len(column.categories) + 1) // LEGEND_ROWS)
    with _axes(output, width=6.0, height=6.0) as axes:
        _scatter(axes, points, column, seed)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("UMAP 1", loc="left", fontsize=8, color=INK)
        axes.set_ylabel("UMAP 2", loc="bottom", fontsize=8, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_box_aspect(1)
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            ncols=legend_columns,
            frameon=False,
            fontsize=7.5 if legend_columns > 1 else 8.5,
            handletextpad=0.3,
            columnspacing=1.0,
        )
    return points


def umap_layout(embedding: np.ndarray, seed: int = 0) -> np.ndarray:
    """Coordinates of a UMAP by scanpy, float32 (n_cells, 2).

    Raises
    ------
    DataError
        If there are fewer than ten cells.
    """
    import anndata
    import scanpy as sc

    if len(embedding) < MIN_CELLS_FOR_UMAP:
        raise DataError(f"A UMAP needs at least {MIN_CELLS_FOR_UMAP} cells, and there are {len(embedding)}.")
    adata = anndata.AnnData(obsm={"X": np.asarray(embedding, dtype=np.float32)})
    sc.pp.neighbors(adata, n_neighbors=min(15, len(embedding) - 1), use_rep="X", random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    return np.asarray(adata.obsm["X_umap"], dtype=np.float32)


def _scatter(axes: Axes, points: np.ndarray, column: pd.Categorical[Any], seed: int) -> None:
    from matplotlib.patheffects import withStroke

    codes, names = np.asarray(column.codes), [str(name) for name in column.categories]
    palette = class_colours(len(names))
    colours = np.array([*palette, GREY])
    order = np.random.default_rng(seed).permutation(len(points))  # so that no class covers another
    order = order[np.argsort(codes[order] >= 0, kind="stable")]  # unlabelled cells lie below
    size = float(np.clip(20_000 / len(points), 1.0, 24.0))
    axes.scatter(
        points[order, 0],
        points[order, 1],
        s=size,
        c=colours[codes[order]],
        linewidths=0,
        alpha=0.85,
        rasterized=True,
    )
    numbered = len(names) >= NUMBERED_FROM
    for code, name in enumerate(names):
        label = f"{code + 1}  {name}" if numbered else name
        axes.scatter([], [], s=30, color=colours[code], label=label, linewidths=0)
        if numbered:
            own = points[codes == code]
            centre = own[
                np.abs(own - np.median(own, axis=0)).sum(1).argmin()
            ]  # a cell, never the gap between two
            axes.annotate(
                str(code + 1),
                centre,
                xytext=(3.5, 3.5),  # beside it, so that a class of few cells stays visible
                textcoords="offset points",
                fontsize=7,
                color=INK,
                path_effects=[withStroke(linewidth=1.6, foreground="white")],
            )
    if (codes < 0).any():
        axes.scatter([], [], s=30, color=GREY, label="unlabelled", linewidths=0)


def class_colours(n: int) -> list[str]:
    """`n` colours: scanpy's palettes for up to 10, 20, 28 and 102 classes, repeated beyond."""
    from scanpy.plotting import palettes

    choices = (palettes.vega_10_scanpy, palettes.vega_20_scanpy, palettes.default_28, palettes.default_102)
    palette = next((choice for choice in choices if len(choice) >= n), choices[-1])
    return [palette[i % len(palette)] for i in range(n)]


@contextmanager
def _axes(output: Path, width: float, height: float) -> Iterator[Axes]:
    """Yield the axes of a figure (inches) that is written to `output`, whole, at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    output = Path(output)
    figure = Figure(figsize=(width, height))
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if (suffix := output.suffix.lstrip(".").lower()) not in formats:
        raise UserError(
            f"Cannot draw '{output}': the ending '{output.suffix}' is no picture format.\n"
            f"Use one of: {', '.join(sorted(formats))}."
        )
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    yield axes
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format=suffix, dpi=DPI, bbox_inches="tight", pad_inches=0.12)
