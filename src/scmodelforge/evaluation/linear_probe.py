"""How well a linear classifier reads the cell types off frozen embeddings.

Logistic regression on standardized dimensions, fitted anew in each split. It is the plainest question that can be
asked of an embedding. The answer is compared in the same splits with what a linear classifier reads off the counts
of all genes themselves ("log_normalized", Boiarsky et al. 2023) and with guessing the largest class ("majority").
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.evaluation.baselines import log_normalized
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores, announced
from scmodelforge.evaluation.classification import UNTESTED, label_scores
from scmodelforge.evaluation.splits import check_embedding, probe_groups, probe_splits, usable_labels

log = logging.getLogger(__name__)

OF_LABELS = ("log_normalized", "majority")  # methods without an embedding that labels allow
MAX_ITERATIONS = 1000  # of lbfgs; standardized embeddings converge within some hundred
SPARSE_TOLERANCE = (
    1e-3  # on all genes: a third of the iterations of scikit-learn's 1e-4, and the same accuracy
)


class ProbeCells(NamedTuple):
    """Which cells a probe uses, and how.

    Attributes
    ----------
    mask
        bool (n_all): the cells to use.
    classes, truth
        str (n_classes), and int64 (n_cells) the class of each cell.
    splits
        Rows that train and that test, among the cells used.
    groups
        int64 (n_cells) groups that stay whole; None: the split is by cell.
    split
        How it was split, in words.
    """

    mask: np.ndarray
    classes: np.ndarray
    truth: np.ndarray
    splits: list[tuple[np.ndarray, np.ndarray]]
    groups: np.ndarray | None
    split: str


def probe_cells(
    obs: pd.DataFrame, params: LinearProbeParams, seed: int, where: str, benchmark: str = "linear_probe"
) -> ProbeCells:
    """Choose cells and splits, the same for every method; needs no embedding, so it goes first.

    Messages name the options of `benchmark`.

    Raises
    ------
    DataError
        If labels or groups cannot be used.
    """
    mask, labels = usable_labels(
        obs,
        params.cell_type_key,
        where,
        drop_unlabelled=params.drop_unlabelled,
        section=f"eval.benchmarks[{benchmark}].params",
        min_cells=max(2, params.min_cells_per_class),  # one cell cannot both train and test
        drop_small=params.drop_small_classes,
    )
    key, groups = probe_groups(obs[mask], labels, params, where)
    classes, truth = np.unique(labels, return_inverse=True)
    splits = probe_splits(labels, params, groups, seed)
    return ProbeCells(mask, classes, truth, splits, groups, f"by {key}" if key else "by cell, stratified")


class LinearProbe:
    """Logistic regression from embeddings to labels as a benchmark."""

    def check(self, cells: EvaluationCells, params: LinearProbeParams, seed: int) -> None:
        """Raise `DataError` if labels or groups cannot be used."""
        probe_cells(cells.store.obs, params, seed, cells.where)

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: LinearProbeParams, seed: int
    ) -> dict[str, Scores]:
        """Score all methods that have an embedding, and the two that labels allow.

        Scaling and regression are fitted on the training cells of each split only. `label_scores` says what the
        figures are; beside them are `n_splits`, `n_cells`, `n_classes`, `n_train` and `n_test` (cells per split,
        rounded mean) and `split` ("by cell, stratified" or "by COLUMN").

        Raises
        ------
        DataError
            If labels, groups or an embedding cannot be used.
        """
        used = probe_cells(cells.store.obs, params, seed, cells.where)
        facts: dict[str, int | str] = {
            "n_splits": len(used.splits),
            "n_cells": len(used.truth),
            "n_classes": len(used.classes),
            "n_train": round(np.mean([len(train) for train, _ in used.splits])),
            "n_test": round(np.mean([len(test) for _, test in used.splits])),
            "split": used.split,
        }
        found = {}
        scored = [one for one in methods if one.embedding is not None or one.name in OF_LABELS]
        for method in announced(scored, "linear_probe"):
            predicted = _predicted(method, cells, used)
            scores = label_scores(used.truth, predicted, used.classes, used.groups, seed)
            found[method.name] = Scores(
                {**scores.metrics, **facts}, scores.intervals, scores.units, scores.details
            )
        return found


BENCHMARK = LinearProbe()


def _predicted(method: Method, cells: EvaluationCells, used: ProbeCells) -> np.ndarray:
    """int64 (n_cells, n_splits) predicted classes, `UNTESTED` elsewhere."""
    if method.embedding is not None:
        check_embedding(method.embedding, len(used.mask))
        return probe(method.embedding[used.mask], used.truth, used.splits, method.name)
    if method.name == "log_normalized":
        return probe(log_normalized(cells.counts)[used.mask], used.truth, used.splits, method.name)
    predicted = np.full((len(used.truth), len(used.splits)), UNTESTED)  # majority
    for place, (train, test) in enumerate(used.splits):
        predicted[test, place] = np.bincount(used.truth[train]).argmax()
    return predicted


def probe(
    features: np.ndarray | csr_matrix,
    truth: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    name: str = "the embedding",
) -> np.ndarray:
    """Predict the test cells of each split with a logistic regression fitted on its training cells.

    Parameters
    ----------
    features
        float32 (n_cells, d). Dense ones are standardized; sparse ones, log-normalized counts, are taken as they are.
    truth
        int64 (n_cells) classes.
    splits
        Training and test rows.
    name
        What messages call it.

    Returns
    -------
    numpy.ndarray
        int64 (n_cells, n_splits), `UNTESTED` where a cell did not test.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted, unfinished = np.full((len(truth), len(splits)), UNTESTED), 0
    for place, (train, test) in enumerate(splits):
        if isinstance(features, csr_matrix):
            model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=SPARSE_TOLERANCE)
        else:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(features[train], truth[train])
        unfinished += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        predicted[test, place] = model.predict(features[test])
    if unfinished:
        log.warning(
            "the linear probe of %s did not converge within %s iterations in %s of %s splits: its scores may be a "
            "little too low",
            name,
            MAX_ITERATIONS,
            unfinished,
            len(splits),
        )
    return predicted
