"""How well a linear classifier reads the cell types off frozen embeddings.

Logistic regression on standardized dimensions, fitted anew in each split. It is the plainest question that
can be asked of an embedding, and the answer is compared with PCA in the same splits.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pandas as pd

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.evaluation.splits import check_embedding, probe_splits, usable_groups, usable_labels

log = logging.getLogger(__name__)

MAX_ITERATIONS = 1000  # of lbfgs; standardized embeddings converge within some hundred


def probe_cells(
    obs: pd.DataFrame, params: LinearProbeParams, seed: int, where: str
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return the mask of the cells to use, their labels and the splits; needs no embedding, so it goes first.

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
        min_cells=max(2, params.min_cells_per_class),  # one cell cannot both train and test
        drop_small=params.drop_small_classes,
    )
    groups = usable_groups(obs[mask], params.group_key, where) if params.group_key else None
    return mask, labels, probe_splits(labels, params, groups, seed)


def linear_probe(
    embedding: np.ndarray, obs: pd.DataFrame, params: LinearProbeParams, seed: int, where: str = "the data"
) -> dict[str, float | int | str]:
    """Score a logistic regression from embeddings to labels on cells that it has not seen.

    Scaling and regression are fitted on the training cells of each split only. Macro F1 is the mean over
    the classes that have test cells.

    Parameters
    ----------
    embedding
        float32 (n_cells, d).
    obs
        One row per cell, in the same order.
    params
        Columns, number and kind of splits, what to leave out.
    seed
        Seed of the splits; the same seed gives every embedding the same ones.
    where
        What the messages call these data.

    Returns
    -------
    dict
        `accuracy` and `macro_f1` (means over the splits, 0 to 1), `accuracy_std` and `macro_f1_std` (sample
        standard deviation over the splits; 0 for one split), `n_splits`, `n_cells`, `n_classes`, `n_train`
        and `n_test` (cells per split, rounded mean) and `split` ("by cell, stratified" or "by COLUMN").

    Raises
    ------
    DataError
        If labels, groups or embedding cannot be used.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mask, labels, splits = probe_cells(obs, params, seed, where)
    check_embedding(embedding, len(obs))
    embedding = embedding[mask]

    accuracy, macro_f1, unfinished = [], [], 0
    for train, test in splits:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            probe.fit(embedding[train], labels[train])
        unfinished += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        truth, predicted = labels[test], probe.predict(embedding[test])
        accuracy.append(accuracy_score(truth, predicted))
        macro_f1.append(f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0))
    if unfinished:
        log.warning(
            "the linear probe did not converge within %s iterations in %s of %s splits: its scores may be a "
            "little too low",
            MAX_ITERATIONS,
            unfinished,
            len(splits),
        )
    return {
        "accuracy": float(np.mean(accuracy)),
        "accuracy_std": _spread(accuracy),
        "macro_f1": float(np.mean(macro_f1)),
        "macro_f1_std": _spread(macro_f1),
        "n_splits": len(splits),
        "n_cells": len(labels),
        "n_classes": len(np.unique(labels)),
        "n_train": round(np.mean([len(train) for train, _ in splits])),
        "n_test": round(np.mean([len(test) for _, test in splits])),
        "split": f"by {params.group_key}" if params.group_key else "by cell, stratified",
    }


def _spread(scores: list[float]) -> float:
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
