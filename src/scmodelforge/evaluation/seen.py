"""Cells of a benchmark that the model was trained on: they are found by content, counted and said."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from scmodelforge.evaluation.benchmark import EvaluationCells
from scmodelforge.models.bundle import ModelBundle

log = logging.getLogger(__name__)

BLOCK_CELLS = 4096
SEEN = "in the training of this model"  # in the note of `seen_cells`, by which a page knows it


class SeenCells(NamedTuple):
    """How many cells of a benchmark the model was trained on.

    Attributes
    ----------
    n
        Cells whose counts are those of a training cell.
    share
        Of all cells.
    """

    n: int
    share: float


def seen_cells(bundle: ModelBundle, cells: EvaluationCells) -> SeenCells | None:
    """Count the cells that the model was trained on, and say it; None where the model does not know its cells.

    Labels do not matter: a cell seen without its label is seen. Cells are compared by hashes of their counts
    (`data/training_cells.py`).
    """
    if not bundle.trained_on:
        log.info(
            "The model carries no record of the cells it was trained on (imported, or trained by an earlier version), "
            "so it is not known which of these cells it has seen."
        )
        return None
    n = 0
    for start in range(0, cells.store.n_cells, BLOCK_CELLS):
        block = cells.store.read(np.arange(start, min(start + BLOCK_CELLS, cells.store.n_cells)))
        n += int(np.any([training.contain(block) for training in bundle.trained_on], axis=0).sum())
    share = n / cells.store.n_cells
    if n:
        log.warning(
            "%s of %s cells (%s) of %s were %s, which flatters it.",
            f"{n:,}",
            f"{cells.store.n_cells:,}",
            f"{share:.1%}",
            cells.where,
            SEEN,
        )
    else:
        log.info("No cell of %s was %s.", cells.where, SEEN)
    known, trained = (sum(getattr(one, name) for one in bundle.trained_on) for name in ("n_known", "n_cells"))
    if known < trained:
        log.warning(
            "Only %s of %s training cells are known by their hash, so that it may have seen about %s as many.",
            f"{known:,}",
            f"{trained:,}",
            f"{trained / max(known, 1):.3g} times",
        )
    return SeenCells(n, share)
