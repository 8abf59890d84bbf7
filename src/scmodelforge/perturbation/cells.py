"""The cells to perturb: those of a state that have a gene, and which of the given genes are among their tokens.

A model reads at most `tokenizer.max_genes` tokens of a cell, so a gene can be expressed and yet not be there to delete.
It is said which of both holds, and in how many cells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError, UserError
from scmodelforge.inference_batches import token_batches
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.perturbation.choice import Choice
from scmodelforge.perturbation.names import rows_of_state
from scmodelforge.perturbation.variants import Layout, detected
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.gene_sequence import n_special

log = logging.getLogger(__name__)

CELLS_READ = 256  # tokenized at once


class Cells(NamedTuple):
    """The cells to perturb.

    Attributes
    ----------
    rows
        int64 (n), ascending: their rows in the store; each has a gene that the model knows.
    n_genes
        int64 (n): genes with a count among the tokens of each.
    counts
        int64 (n_tokens): in how many cells each token is a gene with a count.
    n_chosen
        Perturbed cells that there will be of them.
    """

    rows: np.ndarray
    n_genes: np.ndarray
    counts: np.ndarray
    n_chosen: int


def cells_of_state(
    bundle: ModelBundle,
    store: CellStore,
    state_key: str | None,
    state: str | None,
    max_cells: int,
    seed: int,
    choose: Callable[[TokenBatch], Choice],
) -> Cells:
    """The cells of a state to perturb, and how many perturbed cells `choose` makes of them."""
    if max_cells < 1:
        raise UserError(f"max_cells is {max_cells}; it must be 1 or more.")
    rows = np.arange(store.n_cells)
    if state_key is not None and state is not None:
        rows = rows_of_state(store.obs, state_key, state, store.files[0])
    if len(rows) > max_cells:
        log.info("%s of %s cells are perturbed (max_cells).", f"{max_cells:,}", f"{len(rows):,}")
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
    layout = Layout.of(bundle.config, bundle.vocab)
    counts, n_genes, n_chosen = np.zeros(bundle.vocab.n_tokens, dtype=np.int64), [], 0
    for tokens in token_batches(bundle, store, rows, CELLS_READ):
        present = detected(tokens, layout)
        counts += np.bincount(tokens.input_ids.numpy()[present], minlength=len(counts))
        n_genes.append(present.sum(axis=1))
        n_chosen += len(choose(tokens).cell)
    per_cell = np.concatenate(n_genes)
    kept = rows[per_cell > 0]
    if not len(kept):
        raise DataError(f"No cell of '{store.files[0]}' has a gene that the model knows.")
    if len(kept) < len(rows):
        log.warning(
            "%s cells have no gene that the model knows: they are left out.", f"{len(rows) - len(kept):,}"
        )
    return Cells(kept, per_cell[per_cell > 0], counts, n_chosen)


def detected_sets(sets: np.ndarray, cells: Cells, bundle: ModelBundle, store: CellStore) -> np.ndarray:
    """The sets whose genes are among the tokens of some cell: only these can be deleted. What is not is said."""
    vocab = bundle.vocab
    genes = np.unique(sets)
    n_expressed = np.zeros(vocab.n_genes, dtype=np.int64)
    for start in range(0, len(cells.rows), CELLS_READ):
        block = store.read(cells.rows[start : start + CELLS_READ])
        n_expressed += np.bincount(block.gene_ids[block.counts > 0], minlength=vocab.n_genes)
    expressed, read = n_expressed[genes - vocab.first_gene_token], cells.counts[genes]
    room = bundle.config.tokenizer.max_genes - n_special(bundle.config.tokenizer)
    of = f"the {room:,} genes that the model reads of a cell (tokenizer.max_genes)"
    absent = [
        f"{name}: in none of these cells, so there is nothing to delete"
        if not n
        else f"{name}: expressed in {n:,} of these cells, but in none among {of}, so there is nothing to delete"
        for name, n in zip(vocab.tokens_to_names(genes[read == 0]), expressed[read == 0], strict=True)
    ]
    there = (cells.counts[sets] > 0).all(axis=1)
    if not there.any():
        raise DataError(
            "\n".join(absent) + "\nTake other genes or cells, or how=overexpress, which inserts genes."
        )
    if absent:
        log.warning("%s. They are left out.", "\n".join(absent))
    partly = (read > 0) & (read < expressed)
    for name, n, n_read in zip(
        vocab.tokens_to_names(genes[partly]), expressed[partly], read[partly], strict=True
    ):
        log.info("%s: expressed in %s of these cells, in %s among %s.", name, f"{n:,}", f"{n_read:,}", of)
    return sets[there]
