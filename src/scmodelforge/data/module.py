"""The Lightning data module: training cells in a new order each epoch, validation cells always the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from lightning import LightningDataModule

from scmodelforge.config import DataConfig
from scmodelforge.data.batch import REPEAT, CellBatch
from scmodelforge.data.buffered import BufferedShuffle, buffered_shuffle
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.order import VALIDATION_EPOCH, GlobalShuffle, Order, batch_rows, n_steps
from scmodelforge.data.sampling import weighted_draws
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError

log = logging.getLogger(__name__)


def training_order(store: CellStore, rows: np.ndarray, config: DataConfig, seed: int) -> Order:
    """The order of the training cells `rows` (int64, ascending) that `sampling` and `shuffle_buffer` ask for.

    Raises
    ------
    DataError
        If cells are to be sampled by what they or the files do not have, or from a source that cannot.
    """
    buffer = config.shuffle_buffer or store.shuffle_buffer
    if buffer is None:
        sampled = config.sampling
        return GlobalShuffle(rows, seed) if sampled is None else weighted_draws(store, rows, sampled, seed)
    if config.sampling is not None:
        raise DataError(
            f"data.sampling draws cells from everywhere, and {', '.join(map(str, store.files[:3]))} is read in blocks "
            "of neighbours, shuffled within a buffer.\nMake local shards of it first (scmodelforge shard) and train on "
            "these, or set data.sampling: null."
        )
    order = buffered_shuffle(rows, seed, buffer, store.block_cells)
    log.info(
        "Cells are shuffled within buffers of %s, which blocks of %s neighbours fill (data.shuffle_buffer).",
        f"{order.buffer:,}",
        f"{order.block:,}",
    )
    return order


class CellDataModule(LightningDataModule):
    """Serves batches of training and validation cells.

    Parameters
    ----------
    store
        The cells.
    order
        The cells that train, by `training_order`.
    val_rows
        int64: global rows that validate.
    make_batch
        (cells, epoch, batch_seed) → what the model takes. Called in threads.
    batch_size
        Cells per batch and device.
    seed
        Seed of the order.
    threads
        Threads that make batches.
    known_batch
        (cell_index, batch_seed) → a batch that needs no reading of these cells, or None where they must be read.
    """

    def __init__(
        self,
        store: CellStore,
        order: Order,
        val_rows: np.ndarray,
        make_batch: Callable[[CellBatch, int, int], Any],
        batch_size: int,
        seed: int,
        threads: int,
        known_batch: Callable[[np.ndarray, int], Any | None] | None = None,
    ) -> None:
        super().__init__()
        self.store = store
        self.order = order
        self.val_rows = val_rows
        self.make_batch = make_batch
        self.batch_size = batch_size
        self.seed = seed
        self.threads = threads
        self.known_batch = known_batch
        self._train_loader: BatchLoader[Any] | None = None
        self._start = {"epoch": 0, "step": 0}

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of each rank in an epoch."""
        return n_steps(self.order.n_draws, self.batch_size, self._ranks()[1])

    def _ranks(self) -> tuple[int, int]:
        """Number of this process and of all."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _make(
        self, cell_index: np.ndarray, epoch: int, step: int, announce: Callable[[], None] | None = None
    ) -> Any:
        seeds = np.random.SeedSequence([self.seed, epoch, step, self._ranks()[0]])
        batch_seed = int(seeds.generate_state(1)[0])
        batch = self.known_batch(cell_index, batch_seed) if self.known_batch else None
        if batch is None:
            if announce is not None:
                announce()
            cells = replace(self.store.read(cell_index & (REPEAT - 1)), cell_index=cell_index)
            batch = self.make_batch(cells, epoch, batch_seed)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return batch.pin_memory() if on_gpu else batch

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Copy without waiting: batches lie in pinned memory where there is a GPU."""
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> BatchLoader[Any]:
        """Training batches, in the order of (seed, epoch), from where a resumed run stopped."""
        rank, world = self._ranks()
        announce = _Announcer(self.store, self.order) if isinstance(self.order, BufferedShuffle) else None

        def make(epoch: int, step: int) -> Any:
            draws = self.order.batch(epoch, step, self.batch_size, rank, world)
            tell = partial(announce, epoch, step, self.batch_size, rank, world) if announce else None
            return self._make(draws.rows + draws.repeats * REPEAT, epoch, step, tell)

        self._train_loader = BatchLoader(make, self.steps_per_epoch, self.threads)
        self._train_loader.load_state_dict(self._start)
        return self._train_loader

    def val_dataloader(self) -> BatchLoader[Any] | list[None]:
        """Validation batches, in the order of the file; none where no cell validates."""
        if not len(self.val_rows):
            return []
        rank, world = self._ranks()

        def make(_: int, step: int) -> Any:
            rows = batch_rows(self.val_rows, step, self.batch_size, self.seed, 0, False, rank, world)
            return self._make(rows, VALIDATION_EPOCH, step)

        return BatchLoader(make, n_steps(len(self.val_rows), self.batch_size, world), self.threads)

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the next training batch.

        Lightning saves the loader's state too, but does not restore it where an epoch has just ended.
        """
        return self._train_loader.state_dict() if self._train_loader else self._start

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start where `state_dict` was taken."""
        self._start = state_dict


class _Announcer:
    """Tells the store, once a buffer, what is read now and what comes next."""

    def __init__(self, store: CellStore, order: BufferedShuffle) -> None:
        self.store, self.order = store, order
        self.told = (-1, -1)  # epoch and number of the last buffer that the store knows of
        self.lock = threading.Lock()

    def __call__(self, epoch: int, step: int, batch_size: int, rank: int, world: int) -> None:
        """Before a batch is read."""
        number = self.order.buffer_of(step, batch_size, rank, world)
        with self.lock:
            new = [buffer for buffer in (number, number + 1) if (epoch, buffer) > self.told]
            self.told = (epoch, new[-1]) if new else self.told
        for buffer in new:
            rows = self.order.buffer_rows(epoch, buffer, rank, world)
            if len(rows):
                self.store.prefetch(rows)
