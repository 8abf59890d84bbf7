"""Zero-shot annotation: cells take the label of their nearest reference cells, and say how sure they are.

Nothing is fitted. The k nearest reference cells vote with weights 1 / distance (as scikit-learn's
`KNeighborsClassifier`), and the share of the winner is the confidence. Scored are the labels; whether the confidence
can be believed (calibration); and whether it finds what the reference does not have: each class in turn is taken from
the reference, and 1 - confidence has to rank its cells above all others.

A cell is called unknown below a threshold that is chosen on reference cells alone: their confidence is
cross-validated (leaving out the cell's group where the split is by group, else the cell), and `KNOWN_KEPT` of them
stay known.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

from scmodelforge.config_eval import KnnAnnotationParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation import calibration
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores, announced
from scmodelforge.evaluation.classification import UNTESTED, label_scores
from scmodelforge.evaluation.linear_probe import ProbeCells, probe_cells
from scmodelforge.evaluation.neighbors import nearest_neighbors
from scmodelforge.evaluation.splits import check_embedding
from scmodelforge.evaluation.uncertainty import bootstrap, interval

log = logging.getLogger(__name__)

KNOWN_KEPT = 0.95  # share of reference cells above the threshold, as usual for detectors of what is new
WIDER = 4  # times k neighbours are searched once, so that few cells are searched again without a class


@dataclass(frozen=True)
class Transfer:
    """Labels that were transferred: one row for each query cell of each split.

    Attributes
    ----------
    cell, split
        int64 (n_rows): the cell among those used, and the split.
    probabilities
        float64 (n_rows, n_classes): shares of the vote.
    without
        float64 (n_rows, n_held_out): confidence where one class was taken from the reference.
    threshold
        float64 (n_splits): below it a cell is unknown.
    """

    cell: np.ndarray
    split: np.ndarray
    probabilities: np.ndarray
    without: np.ndarray
    threshold: np.ndarray


class KnnAnnotation:
    """Label transfer by nearest neighbours as a benchmark."""

    def check(self, cells: EvaluationCells, params: KnnAnnotationParams, seed: int) -> None:
        """Raise `DataError` if labels, groups, held-out classes or the number of neighbours cannot be used."""
        used = probe_cells(cells.store.obs, params, seed, cells.where, "knn_annotation")
        held_out = _held_out(used, params, cells.where)
        for train, _ in used.splits:
            sizes = np.bincount(used.truth[train], minlength=len(used.classes))
            left = len(train) - max([1, *sizes[held_out]])
            if left < params.n_neighbors:
                raise DataError(
                    f"knn_annotation asks {params.n_neighbors} reference cells, and a split of {cells.where} leaves "
                    f"{left}, without the largest class that is held out.\n"
                    "Lower n_neighbors or test_size, give more cells, or name fewer held_out_classes."
                )

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: KnnAnnotationParams, seed: int
    ) -> dict[str, Scores]:
        """Score all methods that have an embedding, and the largest class ("majority").

        Beside the figures of `label_scores`: `ece` (expected calibration error) and `brier` (0 to 2), lower is
        better; `unknown_threshold` (mean over the splits), `coverage` (share of query cells that are not unknown) and
        `accuracy_covered` (theirs; absent if there are none); `auroc_held_out` and `unknown_found` (share of cells of
        a held-out class that are unknown), means over the classes that were held out; facts. `details` has
        `reliability` and the figures of each class.

        Raises
        ------
        DataError
            If labels, groups, held-out classes or an embedding cannot be used.
        """
        used = probe_cells(cells.store.obs, params, seed, cells.where, "knn_annotation")
        held_out = _held_out(used, params, cells.where)
        facts: dict[str, int | str] = {
            "n_neighbors": params.n_neighbors,
            "n_splits": len(used.splits),
            "n_cells": len(used.truth),
            "n_classes": len(used.classes),
            "n_reference": round(np.mean([len(train) for train, _ in used.splits])),
            "n_query": round(np.mean([len(test) for _, test in used.splits])),
            "split": used.split,
        }
        found = {}
        scored = [one for one in methods if one.embedding is not None or one.name == "majority"]
        for method in announced(scored, "knn_annotation"):
            if method.embedding is not None:
                check_embedding(method.embedding, len(used.mask))
                transferred = transfer(method.embedding[used.mask], used, params.n_neighbors, held_out)
            else:
                transferred = _largest_class(used, held_out)
            scores = transfer_scores(transferred, used, held_out, seed)
            found[method.name] = replace(scores, metrics={**scores.metrics, **facts})
        return found


BENCHMARK = KnnAnnotation()


def _held_out(used: ProbeCells, params: KnnAnnotationParams, where: str) -> np.ndarray:
    """int64 codes of the classes that are held out in turn, those that no query cell has left out."""
    tested = np.unique(np.concatenate([used.truth[test] for _, test in used.splits]))
    if params.held_out_classes is None:
        if len(used.classes) < 3:
            log.info("knn_annotation: with two classes none is held out, as one vote is always sure")
            return np.zeros(0, np.int64)
        return tested
    known = used.classes.tolist()
    for name in params.held_out_classes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise DataError(
                f"held_out_classes names '{name}', and obs['{params.cell_type_key}'] of {where} has no such "
                f"class.{hint}\nClasses: {', '.join(known)}.\nName some of them, or set held_out_classes to null."
            )
    if params.held_out_classes and len(known) < 3:
        raise DataError(
            f"held_out_classes needs a third class: with one of the two of obs['{params.cell_type_key}'] of {where} "
            "taken away, a single one votes and is always sure.\nSet held_out_classes: []."
        )
    codes = np.unique([known.index(name) for name in params.held_out_classes]).astype(np.int64)
    if len(untested := np.setdiff1d(codes, tested)):
        log.warning("no query cell has the held-out classes %s", ", ".join(used.classes[untested]))
    return np.intersect1d(codes, tested)


def transfer(points: np.ndarray, used: ProbeCells, k: int, held_out: np.ndarray) -> Transfer:
    """Transfer the labels of each split's training cells to its test cells.

    Parameters
    ----------
    points
        float32 (n_cells, d) embedding of the cells used.
    used
        Classes and splits.
    k
        Number of neighbours.
    held_out
        int64 codes of the classes that are taken from the reference in turn.
    """
    parts = []
    for place, (train, test) in enumerate(used.splits):
        labels = used.truth[train]
        near = nearest_neighbors(points[test], min(WIDER * k, len(train)), points[train])
        probabilities = vote(labels[near[0][:, :k]], near[1][:, :k], len(used.classes))
        without = np.zeros((len(test), len(held_out)))
        for column, code in enumerate(held_out):
            without[:, column] = _confidence_without(points, train, test, used.truth, int(code), k, near)
        groups = None if used.groups is None else used.groups[train]
        confidence = _reference_confidence(points[train], labels, groups, k)
        threshold = np.quantile(confidence, 1 - KNOWN_KEPT, method="lower")
        parts.append((test, np.full(len(test), place), probabilities, without, [threshold]))
    return Transfer(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def vote(labels: np.ndarray, distances: np.ndarray, n_classes: int) -> np.ndarray:
    """Shares of a vote weighted by 1 / distance; where some distances are 0, only these vote.

    Parameters
    ----------
    labels
        int64 (n, k) classes of the neighbours.
    distances
        float (n, k).

    Returns
    -------
    numpy.ndarray
        float64 (n, n_classes), rows sum to 1.
    """
    same = distances == 0
    weights = np.where(same.any(1, keepdims=True), same, 1 / np.where(same, 1, distances.astype(np.float64)))
    votes = np.zeros((len(labels), n_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes / votes.sum(1, keepdims=True)


def _confidence_without(
    points: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    truth: np.ndarray,
    code: int,
    k: int,
    near: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Confidence of the test cells where class `code` is not in the reference, float64 (n_test)."""
    n_classes = int(truth.max()) + 1
    labels = truth[train][near[0]]
    allowed = labels != code
    rank = allowed.cumsum(axis=1)
    enough = rank[:, -1] >= k
    chosen = (allowed & (rank <= k))[enough]
    confidence = np.empty(len(test))
    confidence[enough] = vote(
        labels[enough][chosen].reshape(-1, k), near[1][enough][chosen].reshape(-1, k), n_classes
    ).max(1)
    if not enough.all():
        left = train[truth[train] != code]
        indices, distances = nearest_neighbors(points[test[~enough]], k, points[left])
        confidence[~enough] = vote(truth[left][indices], distances, n_classes).max(1)
    return confidence


def _reference_confidence(
    points: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, k: int
) -> np.ndarray:
    """Cross-validated confidence of each reference cell, float64 (n)."""
    n_classes = int(labels.max()) + 1
    if groups is None or not np.ptp(groups):
        indices, distances = nearest_neighbors(points, min(k + 1, len(points)))
        return vote(labels[indices[:, 1:]], distances[:, 1:], n_classes).max(1)
    confidence = np.empty(len(points))
    for group in np.unique(groups):
        own, others = np.flatnonzero(groups == group), np.flatnonzero(groups != group)
        indices, distances = nearest_neighbors(points[own], min(k, len(others)), points[others])
        confidence[own] = vote(labels[others[indices]], distances, n_classes).max(1)
    return confidence


def _largest_class(used: ProbeCells, held_out: np.ndarray) -> Transfer:
    """What a method knows that has seen the labels of the reference and nothing of the cells."""
    parts = []
    for place, (train, test) in enumerate(used.splits):
        sizes = np.bincount(used.truth[train], minlength=len(used.classes))
        without = [np.delete(sizes, code).max() / (len(train) - sizes[code]) for code in held_out]
        shares = sizes / len(train)
        rows = np.ones((len(test), 1))
        parts.append(
            (test, np.full(len(test), place), rows * shares, rows * np.array(without), [shares.max()])
        )
    return Transfer(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def transfer_scores(found: Transfer, used: ProbeCells, held_out: np.ndarray, seed: int) -> Scores:
    """Score transferred labels; `KnnAnnotation.run` says what the figures are.

    Query cells of all splits are scored together. Intervals resample cells, or groups where the split keeps them
    whole. The calibration error of resampled cells is larger than that of the cells themselves, so that its interval
    lies high where calibration is good.
    """
    guess, confidence = found.probabilities.argmax(1), found.probabilities.max(1)
    truth = used.truth[found.cell]
    predicted = np.full((len(used.truth), len(found.threshold)), UNTESTED)
    predicted[found.cell, found.split] = guess
    scores = label_scores(used.truth, predicted, used.classes, used.groups, seed)

    kept = confidence >= found.threshold[found.split]
    columns = np.column_stack(
        [
            calibration.bin_sums(confidence, guess == truth).reshape(len(truth), -1),
            calibration.brier(found.probabilities, truth),
            kept,
            kept & (guess == truth),
        ]
    )
    unit = np.unique(found.cell if used.groups is None else used.groups[found.cell], return_inverse=True)[1]
    of_unit = sparse.csr_matrix((np.ones(len(unit)), (unit, np.arange(len(unit)))))
    figures = {name: float(value[0]) for name, value in _figures(columns.sum(0)[None]).items()}
    drawn = bootstrap(of_unit @ columns, lambda sums: np.stack([*_figures(sums).values()], axis=1), seed)
    intervals = {name: interval(drawn[:, place]) for place, name in enumerate(figures)}
    if not kept.any():
        log.info("knn_annotation: every query cell is unknown, so there is no accuracy_covered")
        del figures["accuracy_covered"], intervals["accuracy_covered"]
    metrics: dict[str, Any] = {**scores.metrics, **figures}
    metrics["unknown_threshold"] = float(found.threshold.mean())
    details = dict(scores.details)
    bins = columns[:, : 3 * calibration.N_BINS].sum(0).reshape(3, -1)
    details["reliability"] = calibration.reliability(bins)
    if len(held_out):
        per_class = [dict(record) for record in details["per_class"]]
        auroc = _aurocs(found, truth, held_out, np.ones((1, len(truth))))[0]
        missed = found.without >= found.threshold[found.split][:, None]
        recall = np.array([1 - missed[truth == code, place].mean() for place, code in enumerate(held_out)])
        for place, code in enumerate(held_out):
            per_class[code] |= {
                "auroc_held_out": float(auroc[place]),
                "unknown_found": float(recall[place]),
            }
        metrics |= {"auroc_held_out": float(auroc.mean()), "unknown_found": float(recall.mean())}
        resampled = bootstrap(
            sparse.identity(of_unit.shape[0], format="csr"),
            lambda weights: _aurocs(found, truth, held_out, weights[:, unit]),
            seed,
        )
        drawn_classes = np.isfinite(resampled).sum(1)  # few resampled groups may lack a class
        means = np.nansum(resampled, axis=1)[drawn_classes > 0] / drawn_classes[drawn_classes > 0]
        intervals["auroc_held_out"] = interval(means)
        details["per_class"] = per_class
    return Scores(metrics, {**scores.intervals, **intervals}, scores.units, details)


def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Figures (n) of the summed columns (n, m) of `transfer_scores`."""
    bins = sums[:, : 3 * calibration.N_BINS].reshape(len(sums), 3, -1)
    n_cells = bins[:, 0].sum(-1)
    loss, kept, right = sums[:, 3 * calibration.N_BINS :].T
    return {
        "ece": calibration.calibration_error(bins),
        "brier": loss / n_cells,
        "coverage": kept / n_cells,
        "accuracy_covered": right / np.maximum(kept, 1),
    }


def _aurocs(found: Transfer, truth: np.ndarray, held_out: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of 1 - confidence for the cells of each held-out class, (n_resamples, n_held_out)."""
    return np.stack(
        [
            calibration.auroc(-found.without[:, place], truth == code, weights)
            for place, code in enumerate(held_out)
        ],
        axis=1,
    )
