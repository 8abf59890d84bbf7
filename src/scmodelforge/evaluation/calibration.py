"""Does a classifier know when it is wrong: calibration of its confidence, and how well it tells unknown cells apart.

Expected calibration error with ten bins of equal width and the table behind it (Guo et al. 2017), the Brier score of
all classes (Brier 1950), and the area under the ROC curve of a score for unknown cells.
"""

from __future__ import annotations

import numpy as np

N_BINS = 10


def bin_sums(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """What each cell adds to the bins of confidence.

    Parameters
    ----------
    confidence
        float (n): probability of the predicted class, in [0, 1]. Bins are open below and closed above.
    correct
        bool (n).

    Returns
    -------
    numpy.ndarray
        float64 (n, 3, N_BINS): one, the confidence, and one if correct, in the cell's bin.
    """
    place = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
    sums = np.zeros((len(confidence), 3, N_BINS))
    sums[np.arange(len(confidence)), :, place] = np.stack(
        [np.ones(len(confidence)), confidence, correct], axis=1
    )
    return sums


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error (...) of summed bins (..., 3, N_BINS): mean |confidence - accuracy| over cells."""
    n_cells, confidence, correct = np.moveaxis(sums, -2, 0)
    return np.abs(confidence - correct).sum(-1) / n_cells.sum(-1)


def reliability(sums: np.ndarray) -> list[dict[str, float | int]]:
    """The bins that have cells, as records: `low`, `high`, `n`, and mean `confidence` and `accuracy`."""
    return [
        {
            "low": place / N_BINS,
            "high": (place + 1) / N_BINS,
            "n": round(n),
            "confidence": float(confidence / n),
            "accuracy": float(correct / n),
        }
        for place, (n, confidence, correct) in enumerate(sums.T)
        if n
    ]


def brier(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared error of each cell's probabilities, summed over the classes: float64 (n), 0 to 2.

    Parameters
    ----------
    probabilities
        float (n, n_classes), rows sum to 1.
    truth
        int64 (n) class of each cell.
    """
    right = probabilities[np.arange(len(truth)), truth]
    return (probabilities**2).sum(1) - 2 * right + 1


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for weighted cells; ties count half (Mann-Whitney).

    Parameters
    ----------
    score
        float (n): higher for those that should be positive.
    positive
        bool (n).
    weights
        float (m, n): how often each cell counts, in m resamples.

    Returns
    -------
    numpy.ndarray
        float64 (m); NaN where one of the two sides has no weight.
    """
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    up = np.add.reduceat(weights[:, order] * positive[order], first, axis=1)
    down = np.add.reduceat(weights[:, order] * ~positive[order], first, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    with np.errstate(invalid="ignore"):
        return (up * below).sum(1) / (up.sum(1) * down.sum(1))
