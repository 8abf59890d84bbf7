"""What a benchmark is: the methods that it compares, the cells that it compares them on, and the scores that come back.

A benchmark is a module-level object with the two calls of `Benchmark`. It first checks what is cheap to check, before
any cell is embedded, and then scores the model and the baselines on the same cells and splits. It may add baselines
of its own (majority class, no change) under their own names.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from scmodelforge.data.sources import open_matrix
from scmodelforge.data.store import CellStore
from scmodelforge.models.bundle import ModelBundle

progress = logging.getLogger("scmodelforge.evaluation.progress")  # is no note of the results


@dataclass(frozen=True)
class Method:
    """One of the rivals.

    Attributes
    ----------
    name
        "model", "untrained", "pca", "log_normalized" and so on.
    is_baseline
        Whether the model has to beat it.
    embedding
        float32 (n_cells, d), one row for each cell of the store; None for a method without cell embeddings, which a
        benchmark that knows its name may score in its own way ("log_normalized", "majority").
    bundle
        The weights behind it; None for a method without any.
    """

    name: str
    is_baseline: bool
    embedding: np.ndarray | None = None
    bundle: ModelBundle | None = None


@dataclass(frozen=True)
class EvaluationCells:
    """The cells of a benchmark.

    Attributes
    ----------
    store
        Counts in the model's vocabulary, with obs.
    data
        What the user gave: a path or an AnnData, for what needs all genes that were measured.
    layer
        Where the counts are in it; None: X.
    where
        What messages call these data.
    """

    store: CellStore
    data: Any
    layer: str | None
    where: str

    @cached_property
    def counts(self) -> sparse.csr_matrix:
        """float32 CSR (n_cells, n_genes): all counts over all genes that were measured, in memory; read once."""
        matrix = open_matrix(self.data, self.layer)
        indptr, indices, values = matrix.read(np.arange(matrix.n_cells))
        return sparse.csr_matrix((values, indices, indptr), shape=(matrix.n_cells, matrix.n_genes))


@dataclass(frozen=True)
class Scores:
    """How one method did.

    Attributes
    ----------
    metrics
        Figures and facts by name, ready for JSON.
    intervals
        95 % bootstrap interval (low, high) of a figure in `metrics`, by its name.
    units
        For paired tests: float64 (n_units) score of each unit (a test cell, a perturbation), by name of the metric,
        the one to compare first; higher is better, their mean is the metric. The units of every method are the same,
        in the same order.
    details
        What a page shows beside the figures, ready for JSON: `per_class` (a list of records with `label`, `n` and
        figures), `confusion` ({"labels": [...], "counts": [[...]]}, rows are the truth) and so on.
    """

    metrics: Mapping[str, float | int | str]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    units: Mapping[str, np.ndarray] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def announced(methods: Sequence[Method], benchmark: str) -> Iterator[Method]:
    """The methods that a benchmark scores, one by one; of several it is said how long each took."""
    for method in methods:
        began = time.monotonic()
        yield method
        if len(methods) > 1:  # not while a model trains
            progress.info("%s: %s took %.1f s", benchmark, method.name, time.monotonic() - began)


class Benchmark(Protocol):
    """A question that can be asked of a model and its baselines."""

    def check(self, cells: EvaluationCells, params: Any, seed: int) -> None:
        """Raise `UserError` if labels, groups or counts cannot be used; cheap, and called before embedding."""

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: Any, seed: int
    ) -> dict[str, Scores]:
        """Score the methods, and baselines of its own, on the same cells and splits; by name of the method."""
