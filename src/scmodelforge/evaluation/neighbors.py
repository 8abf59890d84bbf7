"""The k nearest cells of each cell, exactly, by blocked matrix products.

Approximate search misses some neighbours and takes half a minute to compile and run where a matrix product takes
seconds. Candidates come from |r|² - 2 q·r in float32; their distances are then computed anew from differences, which
does not cancel. Where the rounding of the product could have hidden a neighbour, the row is done again in float64, so
the answer is that of a full comparison up to ties. Memory is bounded by the blocks, whatever the number of cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK = 2**24  # elements of the largest temporary array: 64 MiB
SPARE = 16  # candidates beyond k, so that few rows need float64


def nearest_neighbors(
    points: np.ndarray, k: int, reference: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` nearest rows of `reference` for each row of `points`, by Euclidean distance.

    Parameters
    ----------
    points
        float32 (n, d), finite.
    k
        Number of neighbours.
    reference
        float32 (m, d), finite; None: `points` themselves, and each row is then its own first neighbour.

    Returns
    -------
    indices
        int64 (n, k) rows of `reference`, nearest first; of equal ones the lower row first.
    distances
        float32 (n, k).

    Raises
    ------
    ValueError
        If there are fewer than `k` rows to choose from.
    """
    import torch

    among_themselves = reference is None
    queries = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))
    rows = queries if reference is None else torch.from_numpy(np.ascontiguousarray(reference, np.float32))
    n_rows, n_dimensions = rows.shape
    if not 0 < k <= n_rows:
        raise ValueError(f"{k} neighbours cannot be chosen among {n_rows} rows")
    n_candidates = min(k + SPARE, n_rows)
    centre = rows.mean(0)
    centred = rows - centre
    squares = centred.square().sum(1)
    longest = squares.max().sqrt()
    step = max(1, min(BLOCK // n_rows, BLOCK // (n_candidates * n_dimensions)))
    indices = torch.empty((len(queries), k), dtype=torch.int64)
    distances = torch.empty((len(queries), k))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        own = torch.arange(start, start + len(block)) if among_themselves else None
        shifted = block - centre
        near = torch.addmm(squares[None], shifted, centred.T, alpha=-2)
        if own is not None:
            near[torch.arange(len(block)), own] = -torch.inf
        worst, candidates = near.topk(n_candidates, largest=False)
        found, far = _ordered(block, rows, candidates, k, own)
        if n_candidates < n_rows:
            # of a dot product: d × eps × |q| |r| (Higham 2002, section 3.1), here with its two squares beside it
            length = shifted.square().sum(1).sqrt()
            slack = (n_dimensions + 8) * torch.finfo(torch.float32).eps * (length + longest) ** 2
            unsure = far[:, -1] ** 2 + 2 * slack >= worst[:, -1] + length**2
            for row in torch.nonzero(unsure)[:, 0].split(max(1, BLOCK // (2 * n_rows))):
                chosen = None if own is None else own[row]
                wide = _nearest_in_float64(block[row], rows, n_candidates, chosen)
                found[row], far[row] = _ordered(block[row], rows, wide, k, chosen)
        indices[start : start + step], distances[start : start + step] = found, far
    return indices.numpy(), distances.numpy()


def _nearest_in_float64(
    queries: torch.Tensor, rows: torch.Tensor, n: int, own: torch.Tensor | None
) -> torch.Tensor:
    centre = rows.double().mean(0)
    wide = rows.double() - centre
    near = wide.square().sum(1)[None] - 2 * (queries.double() - centre) @ wide.T
    if own is not None:
        near[range(len(queries)), own] = -float("inf")
    return near.sort(dim=1, stable=True).indices[:, :n]


def _ordered(
    queries: torch.Tensor, rows: torch.Tensor, candidates: torch.Tensor, k: int, own: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of the candidates and their distances, from differences."""
    import torch

    candidates = candidates.sort(dim=1).values
    far = torch.cdist(
        queries[:, None], rows[candidates], compute_mode="donot_use_mm_for_euclid_dist"
    ).squeeze(1)
    if own is not None:
        far[candidates == own[:, None]] = -1  # first, also among cells that are its equals
    far, order = far.sort(dim=1, stable=True)
    return candidates.gather(1, order[:, :k]), far[:, :k].clamp(min=0)
