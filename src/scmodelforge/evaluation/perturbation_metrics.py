"""How well is the effect of a perturbation predicted? Figures of predicted against measured changes of expression.

The change of a perturbation is the mean log-normalized expression of its cells (counts per 10,000, log1p) minus that
of the control cells, gene by gene. Correlations and errors of changes are what Ahlmann-Eltze, Huber & Anders (2025)
and GEARS (Roohani et al. 2023) look at; the correlation of expression itself would be near 1 for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scmodelforge.data.matrix import Matrix
from scmodelforge.data.sources import open_matrix
from scmodelforge.data.state import matrix_state, require_counts, require_finite, row_sums
from scmodelforge.errors import DataError
from scmodelforge.evaluation.baselines import TARGET_SUM
from scmodelforge.evaluation.benchmark import Scores
from scmodelforge.evaluation.splits import obs_column
from scmodelforge.evaluation.uncertainty import mean_interval

METRICS = ("pearson", "mse", "pearson_top", "mse_top", "direction_accuracy", "energy_distance")
CELLS_AT_ONCE = 4096
DISTANCE_CELLS = 300  # of each perturbation, and of the control, between which distances are taken
PCA_CELLS = 5000  # that the space of the distances is fitted on
PCA_COMPONENTS = 50


@dataclass(frozen=True)
class MeasuredChanges:
    """What perturbations did, as it was measured; the first row of all but `names` and `top` is the control.

    Attributes
    ----------
    names
        The perturbations, ascending.
    columns
        int64 (n_genes): columns of the matrix, those of the genes that some cell expresses.
    n_cells
        int64 (1 + n_perturbations).
    means, variances
        float64 (1 + n_perturbations, n_genes): of log-normalized expression, over cells.
    drawn, drawn_group
        float32 CSR (n, n_genes) and int64 (n): some cells of each, and whose they are: -1 for control.
    n_top
        How many genes count as those that change most.
    """

    names: list[str]
    columns: np.ndarray
    n_cells: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    drawn: sparse.csr_matrix
    drawn_group: np.ndarray
    n_top: int

    @property
    def control(self) -> np.ndarray:
        """float64 (n_genes): mean expression of the control cells."""
        return self.means[0]

    @cached_property
    def changes(self) -> np.ndarray:
        """float64 (n_perturbations, n_genes): mean expression minus that of the control."""
        return self.means[1:] - self.control

    @cached_property
    def top(self) -> np.ndarray:
        """int64 (n_perturbations, n_top): genes with the largest |t| of Welch's test against the control cells."""
        from scipy.stats import ttest_ind_from_stats

        spread = np.sqrt(self.variances.clip(min=np.finfo(np.float32).eps))  # of what nobody expresses: t = 0
        n = self.n_cells[:, None]
        t, _ = ttest_ind_from_stats(
            self.means[1:], spread[1:], n[1:], self.means[0], spread[0], n[0], equal_var=False
        )
        return np.argsort(-np.abs(t), axis=1, kind="stable")[:, : self.n_top]


def measured_changes(
    matrix: Matrix,
    group: np.ndarray,
    names: Sequence[str],
    n_top: int,
    seed: int,
    genes: np.ndarray | None = None,
) -> MeasuredChanges:
    """Measure the changes of some perturbations, reading some thousand cells at a time.

    Parameters
    ----------
    matrix
        Raw counts; or log1p values, which are taken as they are.
    group
        int64 (n_cells of the matrix): number of the perturbation in `names`, -1 for control, -2 for cells to leave out.
    seed
        Seed of the cells that are drawn.
    genes
        bool (n_genes of the matrix): genes to look at; None: all. Those that no cell expresses are left out.

    Raises
    ------
    DataError
        If the matrix holds neither counts nor their logarithms.
    """
    state = matrix_state(matrix)
    if state.kind != "log1p":
        require_counts(matrix, state)
    rows = np.flatnonzero(group >= -1)
    n_cells = np.bincount(group[rows] + 1, minlength=1 + len(names))
    totals = np.zeros((1 + len(names), matrix.n_genes))
    squares = np.zeros_like(totals)
    for start in range(0, len(rows), CELLS_AT_ONCE):
        some = rows[start : start + CELLS_AT_ONCE]
        expression = _log_expression(matrix, some, state.kind != "log1p").astype(np.float64)
        present, at = np.unique(group[some] + 1, return_inverse=True)
        one_hot = sparse.csr_matrix((np.ones(len(some)), (at, np.arange(len(some)))))
        totals[present] += (one_hot @ expression).toarray()
        squares[present] += (one_hot @ expression.power(2)).toarray()
    kept = totals.any(axis=0) if genes is None else totals.any(axis=0) & genes
    columns = np.flatnonzero(kept)
    if len(columns) < 2:
        raise DataError(f"The cells of '{matrix.name}' express {len(columns)} of the genes; two are needed.")
    n = n_cells[:, None]
    means = totals[:, columns] / n
    drawn = _drawn(group, seed)
    return MeasuredChanges(
        names=list(names),
        columns=columns,
        n_cells=n_cells,
        means=means,
        variances=(squares[:, columns] / n - means**2) * n / (n - 1),
        drawn=_log_expression(matrix, drawn, state.kind != "log1p")[:, columns],
        drawn_group=group[drawn],
        n_top=min(n_top, len(columns)),
    )


def _log_expression(matrix: Matrix, rows: np.ndarray, from_counts: bool) -> sparse.csr_matrix:
    """log1p of counts per 10,000, or the values as they are: float32 CSR (n_rows, n_genes)."""
    block = matrix.read(rows)
    require_finite(matrix, rows, block)
    values = block.data
    if from_counts:
        library = row_sums(block) if matrix.library_size is None else matrix.library_size[rows]
        values = np.log1p(values / np.repeat(library, np.diff(block.indptr)) * TARGET_SUM)
    shape = (len(rows), matrix.n_genes)
    return sparse.csr_matrix((values.astype(np.float32), block.indices, block.indptr), shape)


def _drawn(group: np.ndarray, seed: int) -> np.ndarray:
    """Rows of at most `DISTANCE_CELLS` cells of each group, drawn at random: int64, ascending."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(group >= -1))
    order = order[np.argsort(group[order], kind="stable")]
    first = np.searchsorted(group[order], group[order])  # where the group begins
    return np.sort(order[np.arange(len(order)) - first < DISTANCE_CELLS])


def perturbation_groups(
    obs: pd.DataFrame, key: str, control: str, min_cells: int, where: str
) -> tuple[np.ndarray, list[str], list[str]]:
    """Number the perturbations of cells.

    Returns
    -------
    group
        int64 (n_cells): number of the perturbation, -1 for control, -2 for cells to leave out.
    names
        The perturbations with at least `min_cells` cells, ascending.
    small
        Those with fewer.

    Raises
    ------
    DataError
        If there is no such column, or fewer than two control cells.
    """
    column = obs_column(obs, key, where)
    labels = column.categories.astype(str)
    counts = np.bincount(column.codes[column.codes >= 0], minlength=len(labels))
    n_control = int(counts[labels == control].sum())
    if n_control < max(2, min_cells):
        largest = ", ".join(f"'{labels[i]}' ({counts[i]:,})" for i in np.argsort(-counts)[:5])
        raise DataError(
            f"obs['{key}'] of {where} says '{control}' of {n_control:,} cells, and at least {max(2, min_cells)} "
            f"control cells are needed. Its largest groups: {largest}.\n"
            "Name the unperturbed cells with params.control, and the column with params.perturbation_key."
        )
    treated = (labels != control) & (counts > 0)
    large = np.flatnonzero(treated & (counts >= min_cells))
    number = np.full(len(labels) + 1, -2)  # the last one is for cells without a label, whose code is -1
    number[large] = np.arange(len(large))
    number[np.flatnonzero(labels == control)] = -1
    names = [str(name) for name in labels[large]]
    return number[column.codes], names, [str(name) for name in labels[treated & (counts < min_cells)]]


def score_changes(predicted: np.ndarray, truth: MeasuredChanges, seed: int) -> Scores:
    """Score predicted changes; all figures are means over the perturbations, which are the units.

    Parameters
    ----------
    predicted
        float (n_perturbations, n_genes): predicted minus control, in log-normalized expression.
    seed
        Seed of the bootstrap.

    Returns
    -------
    Scores
        `pearson` and `mse` of predicted and true changes over all genes; `pearson_top`, `mse_top` and
        `direction_accuracy` (share of genes whose change has the right sign) over the `n_top` genes that change most
        in truth; `energy_distance` as `energy_distances` says. In place of a figure that is undefined stands why: a
        change that is the same for all genes has no correlation, one of zero has no direction.
    """
    rows = np.arange(len(truth.names))[:, None]
    top_predicted, top_true = predicted[rows, truth.top], truth.changes[rows, truth.top]
    by_perturbation = {
        "pearson": _pearson(predicted, truth.changes),
        "mse": np.square(predicted - truth.changes).mean(axis=1),
        "pearson_top": _pearson(top_predicted, top_true),
        "mse_top": np.square(top_predicted - top_true).mean(axis=1),
        "direction_accuracy": np.where(
            (top_predicted == 0).all(axis=1),
            np.nan,
            (np.sign(top_predicted) == np.sign(top_true)).mean(axis=1),
        ),
        "energy_distance": energy_distances(predicted, truth, seed),
    }
    units = {name: values for name, values in by_perturbation.items() if np.isfinite(values).all()}
    metrics: dict[str, float | int | str] = {
        name: float(values.mean()) if name in units else _undefined(name, values)
        for name, values in by_perturbation.items()
    }
    facts = {
        "n_perturbations": len(truth.names),
        "n_cells": int(truth.n_cells.sum()),
        "n_control": int(truth.n_cells[0]),
        "n_genes": len(truth.columns),
        "n_top_genes": truth.n_top,
    }
    records = [
        {"label": name, "n": int(truth.n_cells[1 + place])}
        | {m: float(v[place]) for m, v in by_perturbation.items() if np.isfinite(v[place])}
        for place, name in enumerate(truth.names)
    ]
    intervals = {name: mean_interval(values, seed) for name, values in units.items()}
    return Scores(metrics | facts, intervals, units, {"per_perturbation": records})


def energy_distances(predicted: np.ndarray, truth: MeasuredChanges, seed: int) -> np.ndarray:
    """Energy distance between predicted and measured cells of each perturbation, float64 (n_perturbations).

    Predicted cells are control cells, each moved by the predicted change. 2 E|x − y| − E|x − x'| − E|y − y'| with
    Euclidean distances (Székely & Rizzo 2013) between at most `DISTANCE_CELLS` cells on each side, drawn at random,
    in the space of the first principal components (at most 50) of these cells. It is 0 where both are alike.
    """
    from scipy.spatial.distance import cdist
    from sklearn.decomposition import PCA

    n_components = min(PCA_COMPONENTS, min(truth.drawn.shape) - 1)
    some = np.random.default_rng(seed).permutation(len(truth.drawn_group))[:PCA_CELLS]
    pca = PCA(min(n_components, len(some) - 1), svd_solver="arpack", random_state=seed)
    pca.fit(truth.drawn[some].astype(np.float64))
    places = truth.drawn @ pca.components_.T
    control = places[truth.drawn_group == -1]
    within = cdist(control, control).mean()  # moving all of them changes nothing
    shifts = predicted @ pca.components_.T
    distances = np.empty(len(truth.names))
    for number, shift in enumerate(shifts):
        cells = places[truth.drawn_group == number]
        distances[number] = 2 * cdist(control + shift, cells).mean() - within - cdist(cells, cells).mean()
    return distances


def score_perturbations(
    predicted: pd.DataFrame,
    adata: AnnData,
    *,
    perturbation_key: str = "perturbation",
    control: str = "control",
    layer: str | None = None,
    n_top_genes: int = 20,
    seed: int = 0,
) -> Scores:
    """Score anybody's predictions of perturbations, as the benchmark `perturbation` does its own.

    Parameters
    ----------
    predicted
        One row per perturbation, under its name in `obs[perturbation_key]`, one column per gene, under its name in
        `var_names`: predicted mean log-normalized expression (counts per 10,000, log1p) minus that of the control.
    adata
        Control and perturbed cells: raw counts, or their logarithms after normalization to 10,000 counts a cell.
    control
        What the column says of unperturbed cells.
    layer
        Where the values are; None: X.
    n_top_genes
        How many genes count as those that change most.
    seed
        Seed of the cells that distances are taken between, and of the bootstrap.

    Returns
    -------
    Scores
        As `score_changes`; perturbations in ascending order. Only the genes in `predicted` are looked at.

    Raises
    ------
    DataError
        If perturbations or genes of `predicted` are not in `adata`, occur twice, or are not finite.
    """
    matrix = open_matrix(adata, layer)
    group, names, _ = perturbation_groups(adata.obs, perturbation_key, control, 2, "adata")
    _require_known(
        predicted.index, names, "rows", f"perturbations with two cells in obs['{perturbation_key}']"
    )
    genes = matrix.var.index
    _require_known(predicted.columns, genes, "columns", "genes in var_names")
    asked = sorted(str(name) for name in predicted.index)
    renumbered = np.full(len(names) + 2, -2)  # its last two are for -2 and -1
    renumbered[-1] = -1
    renumbered[[names.index(name) for name in asked]] = np.arange(len(asked))
    truth = measured_changes(
        matrix, renumbered[group], asked, n_top_genes, seed, genes.isin(predicted.columns)
    )
    values = predicted.loc[asked, genes[truth.columns]].to_numpy(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"The prediction of '{asked[row]}' for gene '{genes[truth.columns[column]]}' is {values[row, column]}; "
            "a finite number is needed for each gene."
        )
    return score_changes(values, truth, seed)


def _require_known(given: pd.Index, known: Sequence[str] | pd.Index, what: str, where: str) -> None:
    if not len(given) or given.has_duplicates:
        raise DataError(
            f"The {what} of the predictions must be distinct and at least one; {len(given)} are given."
        )
    if len(unknown := given[~given.isin(known)]):
        shown = ", ".join(map(str, unknown[:5]))
        raise DataError(
            f"{len(unknown):,} {what} of the predictions ({shown}{', …' if len(unknown) > 5 else ''}) are no {where}.\n"
            f"There are: {', '.join(map(str, known[:5]))}, …"
        )


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each row, float64 (n); NaN where a side does not vary."""
    x, y = (side - side.mean(axis=1, keepdims=True) for side in (x, y))
    scale = np.sqrt(np.square(x).sum(axis=1) * np.square(y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=np.full(len(x), np.nan), where=scale > 0)


def _undefined(name: str, values: np.ndarray) -> str:
    n = int((~np.isfinite(values)).sum())
    share = "" if n == len(values) else f" for {n:,} of {len(values):,} perturbations"
    why = "no change is predicted" if name == "direction_accuracy" else "the change is the same for all genes"
    return f"undefined{share}: {why}"
