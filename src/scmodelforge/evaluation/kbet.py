"""kBET within each class (Büttner et al. 2019): have the neighbours of a cell the batches of its class?

The same steps, in the same precision, as `scib_metrics.kbet_per_label` (Luecken et al. 2022): neighbours by diffusion
distance on the graph of a class, then a chi² test for each cell. One thing differs: the neighbours in diffusion space
are exact, where scib-metrics searches approximately. That also saves the compilation of the search, and of the test
for each size of a class, which cost it most of its time.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from scipy.stats import chi2

from scmodelforge.evaluation.neighbors import nearest_neighbors

MIN_CELLS = 10  # of a class; smaller ones are left out
ALPHA = 0.05  # of the test
NEIGHBORS = 10, 70  # fewest and most; between them a quarter of the mean size of a batch
COMPONENTS = 100  # of the diffusion map
MIN_CONNECTED = 0.75  # share of a class in components of 3 × neighbours or more, without which it scores 0


def kbet_per_label(graph: sparse.csr_matrix, batches: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose neighbourhood has the batches of its class, mean over the classes.

    Parameters
    ----------
    graph
        float32 (n_cells, n_cells) connectivities of the neighbour graph.
    batches
        int64 (n_cells) numbers from 0.
    labels
        (n_cells) class of each cell.

    Returns
    -------
    float
        0 (batches apart) to 1 (mixed); NaN where no class has `MIN_CELLS` cells in two batches.
    """
    scores, n_components = [], COMPONENTS
    graph = sparse.csr_matrix(graph)
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        sizes = np.bincount(batches[cells])
        sizes = sizes[sizes > 0]
        if len(cells) < MIN_CELLS or len(sizes) == 1:
            continue
        k = int(np.clip(sizes.mean() // 4, *NEIGHBORS))
        connected = _connected(graph, cells, k)
        if connected is None:
            scores.append(0.0)
            continue
        n_components = min(n_components, len(connected) - 1)  # once lower it stays so: as in scib-metrics
        near = _diffusion_neighbors(_subgraph(graph, connected), k, n_components)
        scores.append(_accepted(near, batches[connected]))
    return float(np.mean(scores)) if scores else float("nan")


def _connected(graph: sparse.csr_matrix, cells: np.ndarray, k: int) -> np.ndarray | None:
    """The cells of large components; None where these are too few."""
    n_parts, part = connected_components(_subgraph(graph, cells), connection="strong")
    if n_parts == 1:
        return cells
    kept = (np.bincount(part) >= 3 * k)[part]
    return cells[kept] if kept.mean() >= MIN_CONNECTED else None


def _subgraph(graph: sparse.csr_matrix, cells: np.ndarray) -> sparse.csr_matrix:
    part = graph[cells][:, cells]
    part.sort_indices()
    return part


def _diffusion_neighbors(graph: sparse.csr_matrix, k: int, n_components: int) -> np.ndarray:
    """int64 (n, k + 1) neighbours of each cell, itself first, in the diffusion map (Coifman et al. 2005)."""
    for power in (1.0, 0.5):  # by density, then by degree
        scale = sparse.diags(1 / np.asarray(graph.sum(axis=0)).ravel() ** power)
        graph = scale @ graph @ scale
    start = np.random.default_rng(0).uniform(-1, 1, graph.shape[0])
    values, vectors = eigsh(graph.astype(np.float64), k=n_components, v0=start)
    # float32, as in scib-metrics: how near the first value comes to 1 decides the weight of its vector
    values, vectors = values.astype(np.float32)[::-1], vectors.astype(np.float32)[:, ::-1]
    values += np.float32(1e-8)
    weights = np.array([value if value == 1 else value / (1 - value) for value in values])
    return nearest_neighbors(vectors * weights, min(k + 1, len(vectors)))[0]


def _accepted(neighbors: np.ndarray, batches: np.ndarray) -> float:
    """Share of cells whose neighbours do not differ from all cells in their batches."""
    _, codes, sizes = np.unique(batches, return_inverse=True, return_counts=True)
    expected = sizes / len(codes) * neighbors.shape[1]
    counts = np.zeros((len(neighbors), len(sizes)))
    np.add.at(counts, (np.arange(len(neighbors))[:, None], codes[neighbors]), 1)
    statistic = ((counts - expected) ** 2 / expected).sum(1)
    return float((chi2.sf(statistic, len(sizes) - 1) >= ALPHA).mean())
