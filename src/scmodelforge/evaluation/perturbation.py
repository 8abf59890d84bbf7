"""Can the effect of a perturbation be told from the gene that is perturbed? On perturbations that nobody has seen.

The perturbations are divided into parts, and each part is predicted from the others: no cell of a held-out
perturbation is in any fit. The model is read out as Ahlmann-Eltze, Huber & Anders (2025, "Deep-learning-based gene
perturbation effect prediction does not yet outperform simple linear baselines") do: Y ≈ G W Pᵀ + b, where Y are the
changes of the training perturbations, b is their mean, G the principal components of their expression, and P the
vectors of the perturbed genes. The rivals differ in P only: the model's gene embeddings, those of the untrained model,
or the rows of G (`linear`). `mean_shift` is b alone, and `no_change` is zero.

Two things differ from the paper. The dimensions of P are standardized over the training perturbations, so that the
scale of an embedding does not matter, and the strength of the ridge penalty is chosen by leaving one training
perturbation out at a time, where the paper takes 0.1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse

from scmodelforge.config_eval_perturbation import PerturbationParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation.benchmark import EvaluationCells, Method, Scores
from scmodelforge.evaluation.gene_vectors import gene_vectors
from scmodelforge.evaluation.perturbation_metrics import (
    MeasuredChanges,
    measured_changes,
    perturbation_groups,
    score_changes,
)
from scmodelforge.genes.identifiers import match_genes

log = logging.getLogger(__name__)

FEWEST = 3  # one is held out, and two are needed to tell what they share from what they do not
N_COMPONENTS = 10  # of G (Ahlmann-Eltze et al. 2025)
RIDGES = np.logspace(-2, 4, 13)
BETWEEN = "+"  # of the genes that are perturbed together


@dataclass(frozen=True)
class Perturbed:
    """The perturbations that can be asked.

    Attributes
    ----------
    group
        int64 (n_cells): number of the perturbation of each cell, -1 for control, -2 for cells that are left out.
    names
        The perturbations, ascending.
    genes
        float64 CSR (n_perturbations, n_genes of the vocabulary): 1 at the perturbed genes.
    unknown, small
        Perturbations with a name that is no gene of the vocabulary, and those with too few cells: both are left out.
    """

    group: np.ndarray
    names: list[str]
    genes: sparse.csr_matrix
    unknown: list[str]
    small: list[str]


class PerturbationBenchmark:
    """The benchmark `perturbation`."""

    def check(self, cells: EvaluationCells, params: PerturbationParams, seed: int) -> None:
        """Raise `DataError` if there are no control cells or too few perturbations."""
        usable_perturbations(cells, params)

    def run(
        self, methods: Sequence[Method], cells: EvaluationCells, params: PerturbationParams, seed: int
    ) -> dict[str, Scores]:
        """Score each method that brings a model, and `no_change`, `mean_shift` and `linear`."""
        usable = usable_perturbations(cells, params)
        for why, names in (
            ("name no gene of the vocabulary", usable.unknown),
            (f"have fewer than {params.min_cells} cells", usable.small),
        ):
            if names:
                shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
                log.warning("%s: perturbations that %s are left out: %s", cells.where, why, shown)
        truth = measured_changes(
            cells.store.matrices[0], usable.group, usable.names, params.n_top_genes, seed
        )
        folds = held_out(len(usable.names), params.n_folds, seed)
        place, n_genes = cells.store.matches[0].gene_index[truth.columns], cells.store.vocab.n_genes
        unmeasured = usable.genes[:, np.setdiff1d(np.arange(n_genes), place)].getnnz(axis=1) > 0
        if unmeasured.any():
            log.info("linear: the genes of %s perturbations are not measured", int(unmeasured.sum()))

        def loadings(expression: np.ndarray) -> np.ndarray:
            table = np.zeros((n_genes, expression.shape[1]))
            table[place[place >= 0]] = expression[place >= 0]
            return usable.genes @ table

        predicted = {
            method.name: _by_fold(truth, folds, usable.genes @ gene_vectors(method.bundle))
            for method in methods
            if method.bundle is not None
        } | {
            "no_change": np.zeros_like(truth.changes),
            "mean_shift": _by_fold(truth, folds, None),
            "linear": _by_fold(truth, folds, loadings),
        }
        facts: dict[str, float | int | str] = {
            "n_folds": len(folds),
            "n_unknown_genes": len(usable.unknown),
            "n_too_small": len(usable.small),
            "n_targets_not_measured": int(unmeasured.sum()),
            "split": "whole perturbations held out",
        }
        scores = {name: score_changes(change, truth, seed) for name, change in predicted.items()}
        return {name: replace(score, metrics={**score.metrics, **facts}) for name, score in scores.items()}


def usable_perturbations(cells: EvaluationCells, params: PerturbationParams) -> Perturbed:
    """Find the perturbations that have enough cells and name genes of the vocabulary; reads no counts.

    `A+B` perturbs both; a part that is the control's name (`A+control`) says nothing.

    Raises
    ------
    DataError
        If there are no control cells, or fewer than three perturbations.
    """
    if len(cells.store.matrices) > 1:
        raise DataError(
            f"perturbation compares cells within one matrix, and {cells.where} has {len(cells.store.matrices)}.\n"
            "Write them into one file, or give one of them."
        )
    group, names, small = perturbation_groups(
        cells.store.obs, params.perturbation_key, params.control, params.min_cells, cells.where
    )
    parts = pd.Series(names, dtype=object).str.split(BETWEEN, regex=False).explode().str.strip()
    parts = parts[parts != params.control]
    at, distinct = pd.factorize(parts)
    species = cells.store.matches[0].species
    match = match_genes(pd.DataFrame(index=distinct), cells.store.vocab, "index", species)
    gene = match.gene_index[at]
    known = np.setdiff1d(parts.index, parts.index[gene < 0])
    if len(known) < FEWEST:
        unknown = len(names) - len(known)
        raise DataError(
            f"obs['{params.perturbation_key}'] of {cells.where} has too few perturbations that can be asked: "
            f"{len(known)}, and {FEWEST} are needed, as one is held out and the fit needs two others. Left out are "
            f"{unknown} that name no gene of the vocabulary '{cells.store.vocab.name}', and {len(small)} with fewer "
            f"than {params.min_cells} cells.\n"
            "Give data with more perturbations, lower params.min_cells, or name another column with "
            "params.perturbation_key."
        )
    shape = (len(names), cells.store.vocab.n_genes)
    asked = gene >= 0
    genes = sparse.csr_matrix((np.ones(asked.sum()), (parts.index[asked], gene[asked])), shape)
    renumbered = np.full(len(names) + 2, -2)  # its last two are for -2 and -1
    renumbered[-1] = -1
    renumbered[known] = np.arange(len(known))
    unknown_names = [name for number, name in enumerate(names) if renumbered[number] == -2]
    return Perturbed(
        renumbered[group], [names[number] for number in known], genes[known], unknown_names, small
    )


def held_out(n_perturbations: int, n_folds: int, seed: int) -> list[np.ndarray]:
    """Divide perturbations into parts at random, each int64; a part is predicted from the others.

    There are no more parts than perturbations, and at least two perturbations are outside of each.
    """
    order = np.random.default_rng(seed).permutation(n_perturbations)
    n_folds = min(n_folds, n_perturbations)
    if n_perturbations - -(-n_perturbations // n_folds) < 2:
        n_folds = n_perturbations
    return [np.sort(part) for part in np.array_split(order, n_folds)]


def _by_fold(
    truth: MeasuredChanges,
    folds: list[np.ndarray],
    vectors: np.ndarray | Callable[[np.ndarray], np.ndarray] | None,
) -> np.ndarray:
    """Changes of each perturbation, predicted from those in other folds: float64 (n_perturbations, n_genes).

    `vectors` is as in `predict_changes`; or gives them from G, which only the training perturbations know.
    """
    predicted = np.empty_like(truth.changes)
    for test in folds:
        train = np.setdiff1d(np.arange(len(predicted)), test)
        expression = truth.control + truth.changes[train]
        if vectors is None:
            predicted[test] = truth.changes[train].mean(axis=0)
            continue
        components = gene_components(expression)
        p = vectors(components) if callable(vectors) else vectors
        predicted[test] = predict_changes(truth.changes[train], components, p[train], p[test])
    return predicted


def gene_components(expression: np.ndarray) -> np.ndarray:
    """Gene embeddings G (n_genes, k) from expression (n_perturbations, n_genes): principal components of the genes.

    Genes are the observations and perturbations the variables, as in Ahlmann-Eltze et al. 2025; k is at most 10.
    """
    centred = expression.T - expression.mean(axis=1)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((s > s[0] * 1e-6).sum())
    k = min(N_COMPONENTS, rank)
    return u[:, :k] * s[:k]


def predict_changes(
    changes: np.ndarray, components: np.ndarray, known: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    """Fit Y ≈ G W Pᵀ + b to training perturbations, and return Y of others: float64 (n_asked, n_genes).

    Parameters
    ----------
    changes
        float (n_train, n_genes): Y, one row a perturbation.
    components
        float (n_genes, k): G, with orthogonal columns.
    known, asked
        float (n_train, d) and (n_asked, d): P of the training perturbations and of those to predict.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mean = changes.mean(axis=0)
    directions = components / np.linalg.norm(components, axis=0)
    fit = make_pipeline(StandardScaler(), RidgeCV(RIDGES))
    fit.fit(known, (changes - mean) @ directions)
    return mean + fit.predict(asked).reshape(len(asked), -1) @ directions.T


perturbation = PerturbationBenchmark()
