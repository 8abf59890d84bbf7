"""Cells on a page: UMAPs coloured by label, batch and prediction, and how predictions meet the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scmodelforge.evaluation.shown_cells import FACTS
from scmodelforge.inference import EMBEDDING_KEY
from scmodelforge.report.charts import Scatter, colours_for, colours_of_values, number, scatter
from scmodelforge.report.layout import MIN_CELLS_FOR_UMAP, umap_layout

if TYPE_CHECKING:
    from anndata import AnnData

LAYOUT = "X_umap"
MOST_CLASSES = 40  # of a confusion matrix on a page; the largest are shown
BINS = 6  # of values, in colours


@dataclass(frozen=True)
class Confusion:
    """Cells by true (rows) and predicted class (columns); `shares` are of a row."""

    labels: list[str]
    totals: list[int]
    counts: list[list[int]]
    shares: list[list[float]]
    left_out: str


@dataclass(frozen=True)
class Predictions:
    """How predictions meet the labels: figures, and for classes the two tables."""

    figures: list[tuple[str, str]]
    per_class: list[dict[str, Any]]
    confusion: Confusion | None


@dataclass(frozen=True)
class CellsView:
    """What a page says about cells; without UMAPs `missing` says why."""

    words: str
    umaps: list[Scatter]
    predictions: Predictions | None
    missing: str = ""


def with_layout(cells: AnnData) -> bool:
    """Compute the layout of the cells into obsm["X_umap"] where it is missing and can be; whether it was."""
    if LAYOUT in cells.obsm or cells.n_obs < MIN_CELLS_FOR_UMAP:
        return False
    cells.obsm[LAYOUT] = umap_layout(np.asarray(cells.obsm[EMBEDDING_KEY]))
    return True


def view_cells(cells: AnnData) -> CellsView:
    """Charts and tables of cells that `shown_cells` made, with their layout."""
    facts = cells.uns[FACTS]
    n_all, kind = int(facts["n_all"]), str(facts["kind"])
    some = (
        f"{cells.n_obs:,} of {n_all:,} {kind}, evenly chosen"
        if cells.n_obs < n_all
        else f"All {n_all:,} {kind}"
    )
    label, prediction = facts.get("label"), facts.get("prediction")
    predictions = None
    if label is not None and prediction is not None:
        predictions = _predictions(cells.obs[label], cells.obs[prediction])
    if LAYOUT not in cells.obsm:
        why = f"A UMAP needs at least {MIN_CELLS_FOR_UMAP} cells, and there are {cells.n_obs} {kind}."
        return CellsView(some + ".", [], predictions, why)
    points = np.asarray(cells.obsm[LAYOUT])
    shared = _shared_classes(cells.obs, label, prediction)
    umaps = [
        _coloured(
            role if role == "Prediction" else f"{role}: {name}",
            points,
            cells.obs[name],
            shared if role != "Batch" else None,
        )
        for role, name in (("Label", label), ("Prediction", prediction), ("Batch", facts.get("batch")))
        if name is not None
    ]
    if not umaps:
        zeros = np.zeros(len(points), dtype=int)
        umaps = [scatter("Cells", points, zeros, ["cells, without a label or batch column"], colours_for(1))]
    words = f"{some}. Neighbours and layout are scanpy's (UMAP of the cell embeddings, with its defaults and seed 0)."
    return CellsView(words, umaps, predictions)


def confusion_of(labels: Sequence[str], counts: np.ndarray) -> Confusion:
    """A confusion matrix for a page, of the `MOST_CLASSES` largest classes; int (k, k), rows are the truth."""
    totals = counts.sum(axis=1)
    kept = np.sort(np.argsort(-totals, kind="stable")[:MOST_CLASSES])
    shares = counts / np.maximum(totals, 1)[:, None]
    left_out = (
        f"The {len(kept)} largest of {len(labels)} classes are shown." if len(kept) < len(labels) else ""
    )
    return Confusion(
        [str(labels[k]) for k in kept],
        totals[kept].tolist(),
        counts[np.ix_(kept, kept)].tolist(),
        shares[np.ix_(kept, kept)].round(4).tolist(),
        left_out,
    )


def _shared_classes(obs: pd.DataFrame, label: str | None, prediction: str | None) -> list[str]:
    """Names of label and prediction together, so that both have the same colours."""
    names: set[str] = set()
    for column in (label, prediction):
        if column is not None and not pd.api.types.is_numeric_dtype(obs[column]):
            names |= set(_names(obs[column]))
    return sorted(names)


def _names(column: pd.Series) -> list[str]:
    """Names of the classes, sorted, with the categories that no cell shown has: colours do not depend on these."""
    names = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.dropna()
    return sorted(set(map(str, names)))


def _coloured(title: str, points: np.ndarray, column: pd.Series, names: list[str] | None) -> Scatter:
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > 1:
        bins = pd.cut(column, BINS, labels=False)
        low, high = float(column.min()), float(column.max())
        edges = np.linspace(low, high, BINS + 1)
        ranges = [
            f"{number(a)} to {number(b)}"
            for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]
        return scatter(title, points, bins.fillna(-1).to_numpy(int), ranges, colours_of_values(BINS))
    names = names or _names(column)
    codes = pd.Index(names).get_indexer(pd.Index(column.astype(object).where(column.notna()).map(str)))
    return scatter(title, points, np.where(column.notna(), codes, -1), names, colours_for(len(names)))


def _predictions(truth: pd.Series, predicted: pd.Series) -> Predictions | None:
    """Figures on the cells that have a label."""
    from sklearn import metrics

    known = truth.notna().to_numpy()
    if not known.any():
        return None
    truth, predicted = truth[known], predicted[known]
    if pd.api.types.is_numeric_dtype(predicted):
        error = float(metrics.mean_absolute_error(truth, predicted))
        figures = [("cells", f"{len(truth):,}"), ("mean absolute error", number(error))]
        if truth.nunique() > 1 and predicted.nunique() > 1:
            figures.append(("Pearson correlation", number(float(np.corrcoef(truth, predicted)[0, 1]))))
        return Predictions(figures, [], None)
    truth, predicted = truth.astype(str), predicted.astype(str)
    labels = sorted(set(truth) | set(predicted))
    precision, recall, f1, n = metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=0
    )
    per_class = [
        {
            "label": name,
            "n": int(n[k]),
            "precision": float(precision[k]),
            "recall": float(recall[k]),
            "f1": float(f1[k]),
        }
        for k, name in enumerate(labels)
    ]
    figures = [
        ("cells", f"{len(truth):,}"),
        ("accuracy", number(float(metrics.accuracy_score(truth, predicted)))),
        (
            "macro F1",  # over classes that a cell has or is predicted to, as torchmetrics has it in training
            number(float(metrics.f1_score(truth, predicted, average="macro", zero_division=0))),
        ),
    ]
    return Predictions(
        figures, per_class, confusion_of(labels, metrics.confusion_matrix(truth, predicted, labels=labels))
    )
