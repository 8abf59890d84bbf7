"""`neighbour_purity`: how many of a cell's nearest neighbours in the embedding have its label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field
from sklearn.neighbors import NearestNeighbors

from scmodelforge.config import Section
from scmodelforge.errors import DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores
from scmodelforge.evaluation.splits import usable_labels


class PurityParams(Section):
    """`params` of the benchmark neighbour_purity."""

    cell_type_key: str = Field("cell_type", description="obs column with the labels.")
    n_neighbours: int = Field(15, ge=1, description="Neighbours of each cell.")


class NeighbourPurity:
    """Mean share of neighbours with the cell's own label; `chance` is what random neighbours would give."""

    Params = PurityParams

    def check(self, cells: EvaluationCells, params: PurityParams, seed: int) -> None:
        """Raise `DataError` if there are no labels, or fewer cells than neighbours."""
        _, labels = _labels(cells, params)
        if len(labels) <= params.n_neighbours:
            raise DataError(
                f"{cells.where} has {len(labels):,} labelled cells, too few for {params.n_neighbours} neighbours each: "
                "lower params.n_neighbours of the benchmark neighbour_purity."
            )

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: PurityParams, seed: int
    ) -> dict[str, Scores]:
        """The purity of each method's embedding."""
        mask, labels = _labels(cells, params)
        classes, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
        scores = {}
        for method in methods:
            if method.embedding is None:
                continue
            embedding = method.embedding[mask]
            finder = NearestNeighbors(n_neighbors=params.n_neighbours).fit(embedding)
            neighbours = finder.kneighbors(return_distance=False)  # without the cell itself
            scores[method.name] = (code[neighbours] == code[:, None]).mean(axis=1)
        scores["chance"] = ((counts - 1) / (len(code) - 1))[code]
        facts = {"n_cells": len(code), "n_classes": len(classes), "n_neighbours": params.n_neighbours}
        return {
            name: Scores(
                {"purity": float(purity.mean()), **facts},
                intervals={"purity": _bootstrap(purity, seed)},
                units={"purity": purity},
            )
            for name, purity in scores.items()
        }


def _labels(cells: EvaluationCells, params: PurityParams) -> tuple[np.ndarray, np.ndarray]:
    """Which cells have a label, and their labels."""
    return usable_labels(
        cells.store.obs, params.cell_type_key, cells.where, drop_unlabelled=True, min_cells=1
    )


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of a mean, from 1,000 resamples of the cells."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


neighbour_purity = NeighbourPurity()
