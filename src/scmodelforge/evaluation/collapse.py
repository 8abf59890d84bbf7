"""Has a model collapsed, so that its embedding says nothing about the cells?

Two ways to collapse: all cells at one point, or all on one line. Cosine similarities near 1 are no sign of it by
themselves (embeddings of transformers lie in a narrow cone, Ethayarajh 2019; the untrained ones of ours at a mean
cosine of 0.99998 still spread over 50 dimensions), so the bound for a point is where rounding begins to matter.
"""

from __future__ import annotations

import numpy as np

MIN_SPREAD = 1e-4  # deviation from the mean cell, relative to the length of a cell; float32 rounds at 1e-7
MAX_ONE_DIRECTION = 0.9999  # median squared cosine of the cells' deviations with one direction
MAX_CELLS = 10_000  # looked at, evenly spaced


def collapse(embedding: np.ndarray) -> str | None:
    """Say how an embedding has collapsed, or None if it has not.

    Parameters
    ----------
    embedding
        float32 (n_cells, d), finite.
    """
    cells = embedding[:: -(-len(embedding) // MAX_CELLS)].astype(np.float64)
    centred = cells - cells.mean(0)
    length = np.sqrt((cells**2).sum(1).mean())
    spread = np.sqrt((centred**2).sum(1).mean())
    if not np.ptp(cells, axis=0).any():
        return "all cells have the same embedding"
    if spread <= MIN_SPREAD * length:
        return (
            f"all cells are alike: they deviate from their mean by {spread / length:.1e} of their length "
            f"(mean cosine similarity {1 - (spread / length) ** 2:.10f})"
        )
    if cells.shape[1] > 1 and len(cells) > 2:
        # medians and directions alone, so that some outliers decide nothing
        deviations = cells - np.median(cells, axis=0)
        lengths = np.linalg.norm(deviations, axis=1)
        directions = deviations[lengths > 0] / lengths[lengths > 0, None]
        line = np.linalg.eigh(directions.T @ directions)[1][:, -1]
        along = float(np.median((directions @ line) ** 2))
        if along > MAX_ONE_DIRECTION:
            return f"all cells lie on one line: the median squared cosine with it is {along:.6f}"
    return None
