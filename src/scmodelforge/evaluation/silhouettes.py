"""How well batches mix within each class, by silhouettes: the batch ASW and BRAS of scIB.

The definitions of `scib_metrics.silhouette_batch` and `scib_metrics.bras`, which compile anew for each size of a
class. Silhouettes are scikit-learn's; those of BRAS need no distances between cells at all, because a mean of cosine
distances is one minus a product with a mean direction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MEMORY_MB = 128  # of the distances that scikit-learn holds at once


def silhouettes(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Euclidean silhouette of each cell, float (n,) from -1 to 1; 0 where a label has one cell."""
    import sklearn
    from sklearn.metrics import silhouette_samples

    with sklearn.config_context(working_memory=MEMORY_MB):
        return silhouette_samples(points, labels)


def silhouette_batch(points: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Batch ASW (Luecken et al. 2022): 1 - |silhouette| of the batches within a class, mean over the classes."""
    return _within_classes(silhouettes, points, labels, batches)


def bras(points: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Batch removal adapted silhouette (Rautenstrauch and Ohler 2025), by cosine distance to all other batches."""
    return _within_classes(_cosine_silhouettes, points, labels, batches)


def _within_classes(
    silhouette: Callable[[np.ndarray, np.ndarray], np.ndarray],
    points: np.ndarray,
    labels: np.ndarray,
    batches: np.ndarray,
) -> float:
    scores = []
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        if 1 < len(np.unique(batches[cells])) < len(cells):
            scores.append((1 - np.abs(silhouette(points[cells], batches[cells]))).mean())
    return float(np.mean(scores)) if scores else float("nan")


def _cosine_silhouettes(points: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Silhouettes by mean cosine distance to the own batch and to all cells of other batches.

    Sum over a batch of 1 - cos(x, y) = its size - x·(sum of its unit vectors).
    """
    _, codes, sizes = np.unique(batches, return_inverse=True, return_counts=True)
    wide = points.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    sums = np.zeros((len(sizes), unit.shape[1]))
    np.add.at(sums, codes, unit)
    own = sizes[codes] - np.einsum("nd,nd->n", unit, sums[codes])
    all_cells = len(codes) - unit @ sums.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        within = own / (sizes[codes] - 1)
        between = (all_cells - own) / (len(codes) - sizes[codes])
        score = (between - within) / np.maximum(within, between)
    return np.where(sizes[codes] > 1, score, 0.0)  # a batch of one cell, as in scikit-learn
