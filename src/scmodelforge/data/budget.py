"""Batches of a token budget: whole cells, as many as fit into a fixed number of tokens, instead of a number of cells.

Cells differ in length, so batches of equally many cells differ in work, and a rank waits for the one with the longest.
Here the draws of an epoch are cut, in their order, into windows of some steps. Within a window the longest cells come
first, each into the batch with the fewest tokens (LPT; Graham 1969), so every batch is a mix of lengths and all are
nearly equally full; neighbours in fullness become the batches of one step. A cell that no batch of its window has
room for waits for the next window. The number of steps is chosen once, as the smallest that epochs fit into.

The plan of an epoch is a pure function of (seed, epoch). It takes about 0.2 s per million draws, half for the order,
and 8 bytes a draw (16 of weighted draws) in memory, those of two epochs at a time; while it is made, 30 more.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scmodelforge.data.batch import CellBatch
from scmodelforge.data.budget_kernels import NO_LIMIT, fill_bins
from scmodelforge.data.order import Draws, GlobalShuffle, InOrder
from scmodelforge.data.passes import map_blocks
from scmodelforge.data.sampling import WeightedDraws
from scmodelforge.data.store import CellStore
from scmodelforge.errors import ConfigError

log = logging.getLogger(__name__)

WINDOW_STEPS = 32  # at least; so many batches of each rank are filled together
SAMPLE = 2**18  # draws that tell how many steps are enough
EPOCHS_TRIED = 3, 16  # at least and at most
SLACK = 0.005  # of the steps: the first step of the search for how many are enough, half of it a margin in the end
CELLS_MARGIN, CELLS_MULTIPLE = 1.1, 8  # by which `max_cells` is above the most cells of a batch in epoch 0

CellOrder = GlobalShuffle | InOrder | WeightedDraws  # those that may give their cells in any combination


def token_lengths(
    store: CellStore, rows: np.ndarray, count: Callable[[CellBatch], np.ndarray], threads: int
) -> np.ndarray:
    """Measure cells by one pass over them.

    Parameters
    ----------
    store, rows
        The cells (global rows, ascending).
    count
        Tokens of each cell of a batch, whole numbers (n_cells); called in threads.
    threads
        Blocks measured at once.

    Returns
    -------
    int32 (store.n_cells): tokens of each cell of `rows`, at least 1, as an empty cell takes a place too; else 0.

    Raises
    ------
    DataError
        If a cell cannot be read or holds what is no count.
    """
    log.info("Measuring the tokens of %s cells (training.tokens_per_batch).", f"{len(rows):,}")
    lengths, at = np.zeros(store.n_cells, dtype=np.int32), 0
    for block in map_blocks(store, rows, threads, count):
        lengths[rows[at : at + len(block)]] = np.maximum(block, 1)
        at += len(block)
    return lengths


# --- the batches of an epoch -----------------------------------------------------------------------


def step_windows(n_steps: int) -> np.ndarray:
    """Bounds of windows of `WINDOW_STEPS` steps or somewhat more: int64 (n_windows + 1)."""
    n_windows = max(1, n_steps // WINDOW_STEPS)
    return np.arange(n_windows + 1, dtype=np.int64) * n_steps // n_windows


@dataclass(frozen=True)
class _Plan:
    """The batches of an epoch: `starts` as of `fill_bins`, and the draws in the order of the batches."""

    starts: np.ndarray
    draws: Draws
    n_over: int


class TokenBudget:
    """Batches of whole cells within a token budget; see `Batches`.

    Parameters
    ----------
    order
        The draws of each epoch.
    lengths
        int32: tokens of each cell, by global row, as of `token_lengths`.
    tokens_per_batch
        Tokens that a batch holds at most.
    world
        Batches of a step, one for each process.
    what
        Whose batches these are, for messages.

    Attributes
    ----------
    n_steps
        Batches of each rank in an epoch; the same in all epochs.
    max_cells
        Cells that a batch holds at most, in any epoch; a tenth more than the most that were seen.
    fill
        Share of the budget that the cells of epoch 0 fill.

    Raises
    ------
    ConfigError
        If a cell is longer than the budget, or there are fewer cells than processes.
    """

    def __init__(
        self,
        order: CellOrder,
        lengths: np.ndarray,
        tokens_per_batch: int,
        world: int,
        what: str = "training",
    ) -> None:
        self.order, self.lengths, self.tokens_per_batch, self.world = order, lengths, tokens_per_batch, world
        self._plans: dict[int, _Plan] = {}
        self._lock = threading.Lock()
        self._told = False
        self._check(what)
        self.max_cells = NO_LIMIT
        self.n_steps, most, self._plans[0] = self._enough_steps()
        self.max_cells = -(-math.ceil(most * CELLS_MARGIN) // CELLS_MULTIPLE) * CELLS_MULTIPLE
        tokens = int(lengths[self._plans[0].draws.rows].sum(dtype=np.int64))
        self.fill = tokens / (self.n_steps * world * tokens_per_batch)

    def batch(self, epoch: int, step: int, rank: int) -> Draws:
        """See `Batches`. May be called by several threads at once."""
        if step >= self.n_steps:
            return Draws(np.zeros(0, dtype=np.int64))
        with self._lock:
            if epoch not in self._plans:
                while len(self._plans) > 1:
                    del self._plans[next(iter(self._plans))]
                self._plans[epoch] = self._plan(epoch, self.n_steps)
            plan = self._plans[epoch]
            if plan.n_over and not self._told:
                self._told = True
                log.warning(
                    "training.tokens_per_batch: %s cells of epoch %d fit into no batch; they are in the emptiest ones, "
                    "which are over %s tokens.",
                    f"{plan.n_over:,}",
                    epoch + 1,
                    f"{self.tokens_per_batch:,}",
                )
        place = step * self.world + rank
        return _part(plan.draws, slice(plan.starts[place], plan.starts[place + 1]))

    def _check(self, what: str) -> None:
        n_cells = self.order.n_draws
        if n_cells < self.world:
            raise ConfigError(
                f"{n_cells:,} {what} cells cannot be shared by {self.world} processes: each needs one in every step.\n"
                "Use fewer processes (training.num_gpus), or more cells."
            )
        of_cells = self.lengths[self.order.rows]
        if n_long := int((of_cells > self.tokens_per_batch).sum()):
            raise ConfigError(
                f"training.tokens_per_batch is {self.tokens_per_batch:,}, and {n_long:,} of {len(of_cells):,} {what} "
                f"cells have more tokens, up to {of_cells.max():,}.\nA batch holds whole cells: set "
                f"training.tokens_per_batch to {of_cells.max():,} or more (ten times as much fills well), or make "
                "tokenizer.max_genes smaller."
            )

    def _plan(self, epoch: int, n_steps: int) -> _Plan:
        draws = self.order.batch(epoch, 0, self.order.n_draws, 0, 1)
        starts, of_batches, n_over = self._fill(self.lengths[draws.rows], n_steps)
        return _Plan(starts, _part(draws, of_batches), n_over)

    def _fill(self, lengths: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray, int]:
        return fill_bins(lengths, self.world, self.tokens_per_batch, self.max_cells, step_windows(n_steps))

    def _enough_steps(self) -> tuple[int, int, _Plan]:
        """The fewest steps that all cells fit into, with a margin; the most cells of a batch; the plan of epoch 0.

        All draws of some epochs are tried, or where there are many, the first ones.
        """
        order, world = self.order, self.world
        n_tried = min(order.n_draws, SAMPLE)
        epochs = {*range(int(np.clip(SAMPLE // order.n_draws, *EPOCHS_TRIED)))}
        if isinstance(order, WeightedDraws):
            epochs.add(len(order.shares) - 1)  # of the curriculum's end, like all that follow
        tried = [self.lengths[order.batch(epoch, 0, n_tried, 0, 1).rows] for epoch in sorted(epochs)]
        total = _largest_total(order, self.lengths)

        def filled(lengths: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray, int]:
            share = 1.0 if n_tried == order.n_draws else lengths.sum(dtype=np.int64) / total
            return self._fill(lengths, min(math.ceil(n_steps * share), n_tried // world))

        def fit(n_steps: int) -> bool:
            return not any(filled(lengths, n_steps)[2] for lengths in tried)

        most_steps = order.n_draws // world  # each batch needs a cell
        low = min(math.ceil(total / (self.tokens_per_batch * world)), most_steps)
        high, stride = low, max(1, round(low * SLACK))
        while high < most_steps and not fit(high):
            low, high, stride = high, min(high + stride, most_steps), 2 * stride
        while high - low > max(1, low * SLACK / 2):
            middle = (low + high) // 2
            low, high = (low, middle) if fit(middle) else (middle, high)
        n_steps = min(high + round(high * SLACK / 2), most_steps) if high > low else high
        stride = max(1, round(low * SLACK / 2))
        while (
            plan := self._plan(0, n_steps)
        ).n_over and n_steps < most_steps:  # the first draws were too kind
            n_steps, stride = min(n_steps + stride, most_steps), 2 * stride
        starts = [plan.starts, *(filled(lengths, n_steps)[0] for lengths in tried)]
        return n_steps, max(int(np.diff(each).max()) for each in starts), plan


def _part(draws: Draws, chosen: np.ndarray | slice) -> Draws:
    return Draws(
        draws.rows[chosen], draws.repeats if isinstance(draws.repeats, int) else draws.repeats[chosen]
    )


def _largest_total(order: CellOrder, lengths: np.ndarray) -> float:
    """Tokens of an epoch; where they differ from epoch to epoch, more than nearly all epochs will have."""
    if isinstance(order, WeightedDraws):
        return order.largest_sum(lengths)
    return float(lengths[order.rows].sum(dtype=np.int64))


def token_budgets(
    order: CellOrder, val_rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int, world: int
) -> tuple[TokenBudget, TokenBudget | None]:
    """Batches of the training and of the validation cells (int64, may be none).

    Raises
    ------
    ConfigError
        As `TokenBudget`.
    """
    training = TokenBudget(order, lengths, tokens_per_batch, world)
    log.info(
        "%s batches an epoch%s of at most %s tokens, filled to %.1f %%, of at most %s cells.",
        f"{training.n_steps:,}",
        f" on each of {world} processes" if world > 1 else "",
        f"{tokens_per_batch:,}",
        100 * training.fill,
        f"{training.max_cells:,}",
    )
    if not len(val_rows):
        return training, None
    return training, TokenBudget(InOrder(val_rows), lengths, tokens_per_batch, world, "validation")
