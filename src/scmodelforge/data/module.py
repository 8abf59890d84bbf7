"""The Lightning data module: training cells in a new order each epoch, validation cells always the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from scmodelforge.config import DataConfig
from scmodelforge.data.batch import REPEAT, CellBatch
from scmodelforge.data.buffered import BufferedShuffle, buffered_shuffle
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.order import VALIDATION_EPOCH, Batches, FixedSize, GlobalShuffle
from scmodelforge.data.sampling import WeightedDraws, weighted_draws
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError

log = logging.getLogger(__name__)


def training_order(
    store: CellStore, rows: np.ndarray, config: DataConfig, seed: int
) -> GlobalShuffle | WeightedDraws | BufferedShuffle:
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
    training, validation
        Which cells train and validate, batch by batch: `FixedSize` or `TokenBudget`, made for as many ranks as there
        are; None: no cell validates.
    make_batch
        (cells, epoch, batch_seed) → what the model takes. Called in threads.
    seed
        Seed of what is random in a batch.
    threads
        Threads that make batches.
    known_batch
        (cell_index, batch_seed) → a batch that needs no reading of these cells, or None where they must be read.
    """

    def __init__(
        self,
        store: CellStore,
        training: Batches,
        validation: Batches | None,
        make_batch: Callable[[CellBatch, int, int], Any],
        seed: int,
        threads: int,
        known_batch: Callable[[np.ndarray, int], Any | None] | None = None,
    ) -> None:
        super().__init__()
        self.store = store
        self.training = training
        self.validation = validation
        self.make_batch = make_batch
        self.seed = seed
        self.threads = threads
        self.known_batch = known_batch
        self._train_loader: BatchLoader[Any] | None = None
        self._start = {"epoch": 0, "step": 0}

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of each rank in an epoch."""
        return self.training.n_steps

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _make(
        self, cell_index: np.ndarray, epoch: int, step: int, announce: Callable[[], None] | None = None
    ) -> Any:
        seeds = np.random.SeedSequence([self.seed, epoch, step, self._rank])
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
        """Copy without waiting, and while the step before is computed, as batches lie in pinned memory."""
        return batch.arriving(torch.device(device))

    def train_dataloader(self) -> BatchLoader[Any]:
        """Training batches, in the order of (seed, epoch), from where a resumed run stopped."""
        rank, batches = self._rank, self.training
        announce = None
        if isinstance(batches, FixedSize) and isinstance(batches.order, BufferedShuffle):
            announce = _Announcer(self.store, batches.order, batches.batch_size, rank, batches.world)

        def make(epoch: int, step: int) -> Any:
            draws = batches.batch(epoch, step, rank)
            tell = partial(announce, epoch, step) if announce else None
            return self._make(draws.rows + draws.repeats * REPEAT, epoch, step, tell)

        self._train_loader = BatchLoader(make, self.steps_per_epoch, self.threads)
        self._train_loader.load_state_dict(self._start)
        return self._train_loader

    def val_dataloader(self) -> BatchLoader[Any] | list[None]:
        """Validation batches, the same in every epoch; none where no cell validates."""
        if self.validation is None:
            return []
        rank, batches = self._rank, self.validation

        def make(_: int, step: int) -> Any:
            return self._make(batches.batch(0, step, rank).rows, VALIDATION_EPOCH, step)

        return BatchLoader(make, batches.n_steps, self.threads)

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

    def __init__(
        self, store: CellStore, order: BufferedShuffle, batch_size: int, rank: int, world: int
    ) -> None:
        self.store, self.order, self.batch_size, self.rank, self.world = store, order, batch_size, rank, world
        self.told = (-1, -1)  # epoch and number of the last buffer that the store knows of
        self.lock = threading.Lock()

    def __call__(self, epoch: int, step: int) -> None:
        """Before a batch is read."""
        number = self.order.buffer_of(step, self.batch_size, self.rank, self.world)
        with self.lock:
            new = [buffer for buffer in (number, number + 1) if (epoch, buffer) > self.told]
            self.told = (epoch, new[-1]) if new else self.told
        for buffer in new:
            rows = self.order.buffer_rows(epoch, buffer, self.rank, self.world)
            if len(rows):
                self.store.prefetch(rows)
