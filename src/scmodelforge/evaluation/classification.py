"""Scores of predicted labels: accuracy and F1 with intervals, figures of each class, and what a paired test needs.

All figures are functions of three numbers for each class and split: how many test cells were predicted rightly, how
many have the class, and how many were predicted to. These are sums over cells, so that the bootstrap resamples sums
and not predictions.
"""

from __future__ import annotations

import logging

import numpy as np
from scipy import sparse

from scmodelforge.evaluation.benchmark import Scores
from scmodelforge.evaluation.uncertainty import FEW_UNITS, bootstrap, interval

log = logging.getLogger(__name__)

UNTESTED = -1
METRICS = ("accuracy", "macro_f1", "weighted_f1")


def label_scores(
    truth: np.ndarray, predicted: np.ndarray, classes: np.ndarray, groups: np.ndarray | None, seed: int
) -> Scores:
    """Score predicted labels over one or several splits.

    Parameters
    ----------
    truth
        int64 (n_cells): class of each cell.
    predicted
        int64 (n_cells, n_splits): class predicted in each split; `UNTESTED` where the cell did not test.
    classes
        str (n_classes): their names.
    groups
        int64 (n_cells): groups that are resampled whole; None: cells are.
    seed
        Of the resampling; the same seed draws the same units for every method.

    Returns
    -------
    Scores
        `metrics`: means over the splits of accuracy, macro F1 (over the classes with test cells) and F1 weighted by
        class size, each with its sample standard deviation over the splits (`..._std`; 0 for one split).
        `intervals`: of these, over the units that tested, given the fitted predictors. `units`: for macro F1 and
        accuracy, what each unit contributes (their mean is the figure; macro F1 to first order, as in the
        infinitesimal jackknife of Jaeckel 1972). `details`: `per_class` and `confusion`, pooled over the splits.
    """
    tested = (predicted != UNTESTED).any(axis=1)
    truth, predicted = truth[tested], predicted[tested]
    shape = (predicted.shape[1], len(classes), 3)
    if groups is None:
        unit, counts = _same_outcome(truth, predicted, len(classes))
        representatives = np.unique(unit, return_index=True)[1]
        sums = _sums(truth[representatives], predicted[representatives], np.arange(len(counts)), shape)
    else:
        unit, counts = np.unique(groups[tested], return_inverse=True)[1], None
        sums = _sums(truth, predicted, unit, shape)
        if sums.shape[0] < FEW_UNITS:
            log.warning(
                "only %s groups test, so that intervals and p-values over groups are rough", sums.shape[0]
            )
    weights = np.ones(sums.shape[0]) if counts is None else counts
    total = np.asarray(weights @ sums)[None]
    by_split = {name: figures[0] for name, figures in _figures(total, shape).items()}
    metrics: dict[str, float] = {}
    for name in METRICS:
        metrics |= {name: float(by_split[name].mean()), f"{name}_std": _spread(by_split[name])}

    resampled = bootstrap(sums, lambda drawn: _means(drawn, shape), seed, counts)
    intervals = {name: interval(resampled[:, place]) for place, name in enumerate(METRICS)}
    n_units = int(weights.sum())
    units = {}
    for name, gradient in _gradients(total[0], shape).items():
        contribution = metrics[name] + n_units * np.asarray(sums @ gradient)
        if groups is not None:
            contribution += n_units * _of_single_groups(sums, by_split[name], shape)
        units[name] = contribution if counts is None else contribution[unit]
    return Scores(metrics, intervals, units, _details(total[0].reshape(shape), truth, predicted, classes))


def _same_outcome(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct outcomes of cells: int64 (n_cells) the outcome of each, int64 how many cells have it."""
    outcome = truth
    for column in predicted.T:
        outcome = np.unique(outcome * (n_classes + 1) + column + 1, return_inverse=True)[1]
    return outcome, np.bincount(outcome)


def _sums(
    truth: np.ndarray, predicted: np.ndarray, unit: np.ndarray, shape: tuple[int, int, int]
) -> sparse.csr_matrix:
    """float64 (n_units, n_splits · n_classes · 3): right, true and predicted cells of each class in each split."""
    cell, split = np.nonzero(predicted != UNTESTED)
    true, guess = truth[cell], predicted[cell, split]
    right = true == guess
    rows = unit[np.concatenate([cell[right], cell, cell])]
    columns = np.ravel_multi_index(
        (
            np.concatenate([split[right], split, split]),
            np.concatenate([true[right], true, guess]),
            np.repeat([0, 1, 2], [right.sum(), len(cell), len(cell)]),
        ),
        shape,
    )
    ones = np.ones(len(rows))
    return sparse.csr_matrix((ones, (rows, columns)), shape=(int(unit.max()) + 1, int(np.prod(shape))))


def _figures(sums: np.ndarray, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Figures by split, (n, n_splits), of sums (n, n_splits · n_classes · 3); 0 for a split without test cells."""
    right, true, predicted = np.moveaxis(sums.reshape(-1, *shape), -1, 0)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    n_cells, n_present = np.maximum(true.sum(-1), 1), np.maximum((true > 0).sum(-1), 1)
    return {
        "accuracy": right.sum(-1) / n_cells,
        "macro_f1": np.where(true > 0, f1, 0).sum(-1) / n_present,
        "weighted_f1": (f1 * true).sum(-1) / n_cells,
    }


def _means(sums: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(n, n_metrics) means over the splits that have test cells: resampled groups may leave a split without any."""
    tests = sums.reshape(-1, *shape)[..., 1].sum(-1) > 0
    figures = _figures(sums, shape)
    return np.stack([figures[name].sum(-1) / tests.sum(-1) for name in METRICS], axis=-1)


def _gradients(sums: np.ndarray, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Derivatives of mean macro F1 and accuracy by the sums, (n_splits · n_classes · 3).

    Both do not change when all sums are scaled, so a step along the sums themselves has derivative 0 (Euler), and
    what the units add is 0 in all.
    """
    n_splits = shape[0]
    right, true, predicted = np.moveaxis(sums.reshape(shape), -1, 0)
    both = np.maximum(true + predicted, 1)
    present = true > 0
    share = present / (n_splits * present.sum(-1, keepdims=True))
    slope = -2 * right / both**2 * share
    macro = np.stack([2 / both * share, slope, slope], axis=-1)
    n_cells = true.sum(-1, keepdims=True)
    accuracy = right.sum(-1, keepdims=True) / n_cells
    ones = np.ones_like(right) / (n_splits * n_cells)
    return {
        "macro_f1": macro.ravel(),
        "accuracy": np.stack([ones, -accuracy * ones, 0 * ones], axis=-1).ravel(),
    }


def _of_single_groups(
    sums: sparse.csr_matrix, figures: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """What a group adds to a mean over splits by being the only one that tests in some, (n_units), 0 in all.

    A figure of one group alone does not change with the weight of that group: the gradient is 0 there, and the group
    counts by the figure of its split.
    """
    tests = sums.toarray().reshape(-1, *shape)[..., 1].sum(-1) > 0
    single = tests.sum(axis=0) == 1
    added = tests[:, single] @ (figures[single] - figures.mean()) / len(figures)
    return added - added.mean()


def _details(
    sums: np.ndarray, truth: np.ndarray, predicted: np.ndarray, classes: np.ndarray
) -> dict[str, object]:
    """Figures of each class and the confusion of all, over the test cells of all splits together."""
    right, true, guessed = np.moveaxis(sums.sum(0), -1, 0)
    columns = {
        "precision": right / np.maximum(guessed, 1),
        "recall": right / np.maximum(true, 1),
        "f1": 2 * right / np.maximum(true + guessed, 1),
    }
    per_class = [
        {
            "label": str(label),
            "n": int(true[place]),
            **{name: float(values[place]) for name, values in columns.items()},
        }
        for place, label in enumerate(classes)
    ]
    cell, split = np.nonzero(predicted != UNTESTED)
    pairs = truth[cell] * len(classes) + predicted[cell, split]
    counts = np.bincount(pairs, minlength=len(classes) ** 2).reshape(len(classes), -1)
    return {
        "per_class": per_class,
        "confusion": {"labels": [str(label) for label in classes], "counts": counts.tolist()},
    }


def _spread(scores: np.ndarray) -> float:
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
