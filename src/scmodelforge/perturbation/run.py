"""`perturb`: what deleting or overexpressing genes does to cells, as a model sees it, as a table of genes.

In-silico perturbation of Theodoris et al. 2023. Cells of the start state are perturbed; a gene's mean shift over its
cells is compared with random perturbations of the same cells, pooled, or with the same perturbation of other cells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from scmodelforge.config import DataConfig
from scmodelforge.data.sources import Source
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError, UserError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.inference import as_bundle, embed_store, open_for
from scmodelforge.inference_batches import default_device, precision_for, token_batches
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.perturbation.cells import CELLS_READ, cells_of_state, detected_sets
from scmodelforge.perturbation.choice import Choice, all_genes, listed, random_sets
from scmodelforge.perturbation.names import gene_tokens, rows_of_state
from scmodelforge.perturbation.shifts import PerturbedCells
from scmodelforge.perturbation.statistics import compare
from scmodelforge.perturbation.variants import Layout
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.gene_sequence import n_special

log = logging.getLogger(__name__)

HOW = ("delete", "overexpress")
SIGNIFICANT = 0.05  # false discovery rate below which genes come first in the table
RANDOM_POOL = 5_000  # random perturbations in all, where genes are given
MOST_RANDOM = 100  # of one cell
SECONDS = 30.0  # between two messages


class Shifts(NamedTuple):
    """Shifts of some perturbations of some cells.

    Attributes
    ----------
    perturbation
        int64 (n): as in `Choice`.
    values
        float64 (n, n_measures): as `PerturbedCells` gives them.
    """

    perturbation: np.ndarray
    values: np.ndarray


def perturb(
    data: Source,
    model: ModelBundle | str | Path,
    genes: str | Sequence[str] = "all",
    *,
    together: bool = False,
    how: str = "delete",
    state_key: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    alt: Sequence[str] = (),
    null: str | None = None,
    max_cells: int = 1000,
    pooling: str | None = None,
    precision: str = "32",
    seed: int = 0,
    config: DataConfig | None = None,
) -> pd.DataFrame:
    """Delete or overexpress genes in cells and measure how the model's embedding of them moves.

    Parameters
    ----------
    data
        Cells with raw counts: an AnnData or a file.
    model
        A loaded model, a checkpoint or a model folder.
    genes
        Symbols or Ensembl ids, each perturbed by itself; "all": every gene of a cell, one at a time.
    together
        Perturb the given genes all at once, in their order. To be deleted, a cell needs all of them.
    how
        "delete" or "overexpress".
    state_key, start
        Perturb only cells whose `obs[state_key]` is `start`; None: all cells.
    goal, alt
        States to measure the shift to, the first of them in `mean_shift`; None: how unlike itself the cell becomes.
    null
        A state whose cells are perturbed in the same way; shifts are compared with theirs, gene by gene, instead of
        with random perturbations.
    max_cells
        Most cells of a state that are perturbed, drawn at random if there are more.
    pooling, precision
        As of `embed`, but the precision is 32 also on a GPU: shifts are small.
    seed
        For the choice of cells and of random perturbations.
    config
        Where the counts are, if not in X (`DataConfig(layer="counts")`).

    Returns
    -------
    DataFrame, one row a perturbation, the significant ones first, then by shift: `gene_id` and `symbol` (of a set, all
    of them with + between), `n_cells`, `mean_shift` (towards `goal`: cos(perturbed, goal) - cos(original, goal);
    without `goal`: 1 - cosine similarity to the original), `effect`, `p_value` and `fdr` (see
    `statistics.Comparison`); with a goal `mean_shift_to_STATE` of `start` and each of `alt`; with `null`
    `n_cells_null` and `mean_shift_null`.

    Raises
    ------
    UserError
        If a gene, a state or a combination of options cannot be used.
    """
    states = _states(how, state_key, start, goal, alt, null)
    bundle = as_bundle(model)
    pooling = _pooling(bundle, pooling)
    sets = _sets(genes, together, bundle)
    device = default_device()
    precision = precision_for(precision, device)
    store = open_for(bundle, data, config)
    layout, overexpressed = Layout.of(bundle.config, bundle.vocab), how == "overexpress"

    def chosen(batch: TokenBatch) -> Choice:
        if sets is None:
            return all_genes(batch, layout, overexpressed)
        return listed(batch, sets, layout, overexpressed)

    def at_random(batch: TokenBatch) -> Choice:
        assert sets is not None
        return random_sets(batch, sets.shape[1], n_per_cell, layout, seed)

    of_start = cells_of_state(bundle, store, state_key, start, max_cells, seed, chosen)
    if sets is not None and not overexpressed:
        sets = detected_sets(sets, of_start, bundle, store)
    of_null = (
        None if null is None else cells_of_state(bundle, store, state_key, null, max_cells, seed, chosen)
    )
    n_per_cell, n_compared = min(-(-RANDOM_POOL // len(of_start.rows)), MOST_RANDOM), 0
    what = "Each gene" if sets is None else f"{len(sets):,} perturbation{'s' * (len(sets) != 1)}"
    said = f"{what} of {len(of_start.rows):,} cells: {of_start.n_chosen:,} perturbed cells"
    if of_null is not None:
        n_compared = of_null.n_chosen
        said += f", and {n_compared:,} of {len(of_null.rows):,} cells of '{null}' to compare them with"
    elif sets is not None:
        n_compared = n_per_cell * int((of_start.n_genes > sets.shape[1]).sum())
        said += f", and {n_compared:,} with random genes, which show what to expect by chance"
    log.info("%s.", said)
    progress = _Progress(of_start.n_chosen + n_compared)
    centres = _centres(bundle, store, state_key, states, pooling, precision)
    cells = PerturbedCells(bundle, overexpressed, centres, pooling, device, precision)
    found = _shifts(bundle, store, of_start.rows, cells, chosen, progress)
    if of_null is not None:
        others = _shifts(bundle, store, of_null.rows, cells, chosen, progress)
        found, others = _in_both(found, others)
    elif sets is None:
        others = found
    else:
        others = _shifts(bundle, store, of_start.rows, cells, at_random, progress)
        mean = others.values[:, 0].mean()
        log.info("%s random perturbations of these cells: mean shift %.3g.", f"{len(others.values):,}", mean)
    return _table(found, others, null is not None, sets, states, bundle.vocab)


def _states(
    how: str, state_key: str | None, start: str | None, goal: str | None, alt: Sequence[str], null: str | None
) -> list[str]:
    """The states to measure shifts to: goal, start, and others; none without a goal."""
    if how not in HOW:
        raise UserError(f"how is '{how}'; it must be delete or overexpress.")
    if state_key is None and (start or goal or alt or null):
        raise UserError("States are given, but not the obs column that holds them: --state-key COLUMN.")
    if state_key is not None and start is None:
        raise UserError(f"Say which cells of obs['{state_key}'] to perturb: --start STATE.")
    if alt and goal is None:
        raise UserError("Other states are given, but no goal: --goal STATE.")
    states = [] if goal is None else [goal, str(start), *alt]
    if len(set(states)) < len(states):
        raise UserError(f"A state is given twice: start, goal and alt must differ ({', '.join(states)}).")
    if null is not None and null == start:
        raise UserError(f"'{null}' is both the start and the null state; the null cells must be others.")
    return states


def _pooling(bundle: ModelBundle, pooling: str | None) -> str:
    if pooling not in (None, "mean", "cls", "window"):
        raise UserError(f"pooling is '{pooling}'; it must be mean, cls or window.")
    pooling = pooling or bundle.model.pooling
    if pooling == "cls" and not bundle.config.tokenizer.prepend_cls:
        raise UserError(
            "pooling cls: this model has no <cls> token, so its place is that of the top gene, which perturbations "
            "change.\nUse pooling mean."
        )
    return pooling


def _sets(genes: str | Sequence[str], together: bool, bundle: ModelBundle) -> np.ndarray | None:
    """int64 (n_perturbations, k): tokens; None for all genes."""
    if isinstance(genes, str) and genes == "all":
        if together:
            raise UserError("'all' perturbs one gene at a time; a set is a list of genes.")
        return None
    tokens = gene_tokens([genes] if isinstance(genes, str) else genes, bundle.vocab)
    room = bundle.config.tokenizer.max_genes - n_special(bundle.config.tokenizer)
    if together and len(tokens) >= room:
        raise UserError(
            f"The set has {len(tokens):,} genes, and the model reads at most {room:,} of a cell: no other gene would "
            "be left beside them. Give fewer."
        )
    return tokens[None, :] if together else tokens[:, None]


def _centres(
    bundle: ModelBundle,
    store: CellStore,
    state_key: str | None,
    states: list[str],
    pooling: str,
    precision: str,
) -> np.ndarray | None:
    """float64 (n_states, width): mean embedding of all cells of each state; None without states."""
    if state_key is None or not states:
        return None
    rows = [rows_of_state(store.obs, state_key, state, store.files[0]) for state in states]
    means = [
        embed_store(bundle, store, rows=of_state, pooling=pooling, precision=precision).mean(
            axis=0, dtype=np.float64
        )
        for of_state in rows
    ]
    return np.stack(means)


def _shifts(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    cells: PerturbedCells,
    choose: Callable[[TokenBatch], Choice],
    progress: _Progress,
) -> Shifts:
    """Shifts under all perturbations that `choose` chooses, of some cells of a store."""
    perturbations, values = [], []
    for tokens in token_batches(bundle, store, rows, CELLS_READ):
        choice = choose(tokens)
        perturbations.append(choice.perturbation)
        for part in cells(tokens, choice):
            values.append(part)
            progress.add(len(part))
    if not values:
        raise DataError(
            "There is no cell to perturb: none has the genes and others beside them.\n"
            "Take other genes, fewer of them together, or other cells."
        )
    return Shifts(np.concatenate(perturbations), np.concatenate(values))


class _Progress:
    """Says every `SECONDS` how many of all perturbed cells are done, and how long the others will take."""

    def __init__(self, n_all: int) -> None:
        self.n_all, self.n_done = n_all, 0
        self.began = self.said = time.monotonic()

    def add(self, n: int) -> None:
        self.n_done += n
        now = time.monotonic()
        if now - self.said > SECONDS:
            self.said, rate = now, self.n_done / (now - self.began)
            log.info(
                "%s of %s perturbed cells (%s a second), about %s left",
                f"{self.n_done:,}",
                f"{self.n_all:,}",
                f"{rate:,.1f}",
                timedelta(seconds=round((self.n_all - self.n_done) / rate)),
            )


def _in_both(found: Shifts, others: Shifts) -> tuple[Shifts, Shifts]:
    """The perturbations that both kinds of cells have."""
    common = np.intersect1d(found.perturbation, others.perturbation)
    if not len(common):
        raise DataError(
            "No gene is perturbed in both the start and the null cells, so there is nothing to compare."
        )
    if n_left_out := len(np.unique(found.perturbation)) - len(common):
        log.warning("%s perturbations are left out: no null cell has these genes.", f"{n_left_out:,}")

    def within(shifts: Shifts) -> Shifts:
        kept = np.isin(shifts.perturbation, common)
        return Shifts(shifts.perturbation[kept], shifts.values[kept])

    return within(found), within(others)


def _table(
    found: Shifts, others: Shifts, by_gene: bool, sets: np.ndarray | None, states: list[str], vocab: GeneVocab
) -> pd.DataFrame:
    """The result of `perturb`; `by_gene`: shifts are compared with the others of the same perturbation."""
    numbers, group = np.unique(found.perturbation, return_inverse=True)
    group_of_others = np.searchsorted(numbers, others.perturbation) if by_gene else None
    result = compare(found.values[:, 0], group, others.values[:, 0], group_of_others)
    rows = (numbers[:, None] if sets is None else sets[numbers]) - vocab.first_gene_token
    table = pd.DataFrame(
        {
            "gene_id": ["+".join(of) for of in vocab.gene_ids[rows]],
            "symbol": [
                "+".join(of) for of in np.where(vocab.symbols == "", vocab.gene_ids, vocab.symbols)[rows]
            ],
            "n_cells": result.n,
            "mean_shift": result.mean,
            "effect": result.effect,
            "p_value": result.p_value,
            "fdr": result.fdr,
        }
    )
    for place, state in enumerate(states[1:], 1):
        table[f"mean_shift_to_{state}"] = np.bincount(group, found.values[:, place]) / result.n
    if group_of_others is not None:
        table["n_cells_null"] = n = np.bincount(group_of_others)
        table["mean_shift_null"] = np.bincount(group_of_others, others.values[:, 0]) / n
    significant = (table["fdr"] < SIGNIFICANT).rename("significant")
    order = table.assign(significant=significant).sort_values(
        ["significant", "mean_shift", "fdr"], ascending=[False, False, True], kind="stable"
    )
    return order.drop(columns="significant").reset_index(drop=True)
