"""Raw counts or not? Told from a sample of the cells, before anything long starts.

Rank encoding and count models need raw counts. What else a matrix may hold (logarithms, normalized or scaled
values) is recognised by its numbers, so that the message can say what was seen and where the counts are.
"""

from __future__ import annotations

import shlex
from typing import Literal, NamedTuple

import numpy as np

from scmodelforge.data.matrix import Matrix, Rows
from scmodelforge.data.sources import matrix_places, open_matrix
from scmodelforge.errors import DataError
from scmodelforge.genes.identifiers import GeneMatch

SAMPLE_CELLS = 1000
RUN = 64  # neighbours that are sampled together where single cells are read slowly
SAMPLE_CELLS_OF_ALL = 100_000  # where there are many files, less of each is looked at
FEWEST_CELLS = 20
LOG_MAX = 15.0  # natural or binary logarithms of counts stay below; counts and normalized values rarely do
CONSTANT = 1e-3  # relative spread of cell totals below which they were made equal

Kind = Literal["counts", "log1p", "normalized", "scaled", "fractional", "empty", "invalid"]


class MatrixState(NamedTuple):
    """What kind of numbers a matrix holds, and a few words on why we think so."""

    kind: Kind
    detail: str


class Sample(NamedTuple):
    """What some cells of a matrix show: its state, and the share of their counts on vocabulary genes."""

    state: MatrixState
    share: float


def row_sums(block: Rows) -> np.ndarray:
    """Return the float64 sum of each row: float32 sums would lose counts above 2**24."""
    row = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
    return np.bincount(row, weights=block.data, minlength=len(block.indptr) - 1)


def locate(matrix: Matrix, rows: np.ndarray, block: Rows, bad: np.ndarray) -> str:
    """Name value, cell and gene of the first bad entry."""
    entry = int(np.flatnonzero(bad)[0])
    cell = matrix.obs.index[rows[np.searchsorted(block.indptr, entry, side="right") - 1]]
    return f"{block.data[entry]:g} in cell '{cell}', gene '{matrix.var.index[block.indices[entry]]}'"


def require_finite(matrix: Matrix, rows: np.ndarray, block: Rows) -> None:
    """Raise `DataError` naming file, cell and gene if a value is negative, NaN or infinite.

    Parameters
    ----------
    matrix, rows, block
        `block` is what `matrix.read(rows)` returned.
    """
    if block.data.size and not (block.data.min() >= 0 and block.data.max() < np.inf):
        bad = ~((block.data >= 0) & (block.data < np.inf))
        raise DataError(
            f"'{matrix.name}': {matrix.place} holds {locate(matrix, rows, block, bad)}.\n"
            "Counts are finite and not negative: mend or remove such cells, or set data.layer to raw counts."
        )


def matrix_state(matrix: Matrix, n: int = SAMPLE_CELLS) -> MatrixState:
    """Tell raw counts from transformed values, by up to `n` evenly spaced cells.

    counts: whole numbers; log1p: logarithms; normalized: cells scaled to a total; scaled: negative values
    (z-scores); fractional: other fractions; empty: zeros only; invalid: NaN, infinite or negative counts.
    """
    rows = _evenly(matrix, n)
    return _state(matrix, rows, matrix.read(rows))


def sample_matrix(matrix: Matrix, match: GeneMatch, n: int = SAMPLE_CELLS) -> Sample:
    """Return the state of a matrix and its share of counts on vocabulary genes, by up to `n` cells."""
    rows = _evenly(matrix, n)
    block = matrix.read(rows)
    state = _state(matrix, rows, block)
    total = block.data.sum(dtype=np.float64)
    inside = block.data[match.gene_index[block.indices] >= 0].sum(dtype=np.float64)
    return Sample(state, float(inside / total) if 0 < total < np.inf else 0.0)


def evenly(n_cells: int, n: int, in_runs: bool) -> np.ndarray:
    """Return at most `n` of the numbers below `n_cells`, evenly spaced: one by one, or in runs of `RUN` neighbours."""
    if not in_runs or n_cells <= n:
        return np.unique(np.linspace(0, n_cells - 1, min(n, n_cells)).astype(np.int64))
    starts = np.linspace(0, n_cells - RUN, max(1, n // RUN)).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(RUN))


def _evenly(matrix: Matrix, n: int) -> np.ndarray:
    return evenly(matrix.n_cells, n, matrix.shuffle_buffer is not None)


def _state(matrix: Matrix, rows: np.ndarray, block: Rows) -> MatrixState:
    values = block.data  # float32, as read; in float64 only where fractions are looked at
    if not values.size:
        return MatrixState("empty", "zeros only")
    if not np.isfinite(values).all():
        place = locate(matrix, rows, block, ~np.isfinite(values))
        return MatrixState("invalid", f"values that are not finite ({place})")
    whole = bool((values == np.rint(values)).all())
    if values.min() < 0:
        place = locate(matrix, rows, block, values < 0)
        if whole:
            return MatrixState("invalid", f"negative whole numbers ({place})")
        return MatrixState("scaled", f"negative values, as scaling leaves them ({place})")
    if whole:
        return MatrixState("counts", f"raw counts (whole numbers up to {values.max():,.0f})")
    values = values.astype(np.float64)
    top = f"fractions up to {values.max():,.4g}"
    if total := _constant(row_sums(block)):
        return MatrixState("normalized", f"normalized values ({top}, each cell adds up to {total:,.6g})")
    if values.max() < LOG_MAX:
        total = _constant(row_sums(block._replace(data=np.expm1(values))))
        detail = f", log1p of {total:,.6g} a cell" if total else ""
        return MatrixState("log1p", f"log-transformed values ({top}{detail})")
    smallest = np.minimum.reduceat(values, block.indptr[:-1][np.diff(block.indptr) > 0])
    ratio = values / np.repeat(smallest, np.diff(block.indptr)[np.diff(block.indptr) > 0])
    if np.mean(np.abs(ratio - np.rint(ratio)) < 0.01) > 0.95:
        return MatrixState(
            "normalized", f"normalized values ({top}, multiples of each cell's smallest value)"
        )
    return MatrixState("fractional", f"fractions that are neither counts nor their logarithms ({top})")


def _constant(sums: np.ndarray) -> float:
    """Return the common value of what is positive, 0 if there is none."""
    sums = sums[sums > 0]
    return float(np.median(sums)) if len(sums) > 1 and np.ptp(sums) < CONSTANT * np.median(sums) else 0.0


def require_counts(matrix: Matrix, state: MatrixState | None = None) -> None:
    """Raise `DataError` unless the matrix holds raw counts; say where in the same file they are, if anywhere.

    Parameters
    ----------
    matrix
        The matrix to use.
    state
        Its `matrix_state`, if known already.
    """
    state = state or matrix_state(matrix)
    if state.kind == "counts":
        return
    message = f"'{matrix.name}': {matrix.place} does not hold raw counts, but {state.detail}.\n"
    if found := counts_elsewhere(matrix):
        raise DataError(f"{message}Raw counts are in the same file: set {layer_settings(found)}.")
    if state.kind == "invalid":
        raise DataError(
            f"{message}Mend or remove these cells, or name the layer with the counts (data.layer)."
        )
    raise DataError(
        f"{message}No layer and no .raw of it holds raw counts either. Use the file as it was before "
        "normalization, or store the counts in a layer and name it with data.layer."
    )


def layer_settings(layers: list[str | None]) -> str:
    """How to name each of these layers, in a config and on the command line."""
    names = ["null" if layer is None else layer for layer in layers]
    return " or ".join(f"data.layer: {name} (--set {shlex.quote(f'data.layer={name}')})" for name in names)


def counts_elsewhere(matrix: Matrix) -> list[str | None]:
    """Return the other places of the same source that hold raw counts, as values for `data.layer`."""
    places = [place for place in matrix_places(matrix.source) if place != matrix.layer]
    return [
        place for place in places if matrix_state(open_matrix(matrix.source, place), 200).kind == "counts"
    ]
