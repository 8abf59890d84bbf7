"""The Lightning data module: training cells in a new order each epoch, validation cells always the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lightning import LightningDataModule

from scmodelforge.data.batch import CellBatch
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.order import batch_rows, n_steps
from scmodelforge.data.store import CellStore

VALIDATION_EPOCH = 2**32 - 1  # the "epoch" of validation batches, so their masks never change


class CellDataModule(LightningDataModule):
    """Serves batches of training and validation cells.

    Parameters
    ----------
    store
        The cells.
    train_rows, val_rows
        int64: global rows that train and that validate.
    make_batch
        (cells, epoch, batch_seed) → what the model takes. Called in threads.
    batch_size
        Cells per batch and device.
    seed
        Seed of the order.
    threads
        Threads that make batches.
    """

    def __init__(
        self,
        store: CellStore,
        train_rows: np.ndarray,
        val_rows: np.ndarray,
        make_batch: Callable[[CellBatch, int, int], Any],
        batch_size: int,
        seed: int,
        threads: int,
    ) -> None:
        super().__init__()
        self.store = store
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.make_batch = make_batch
        self.batch_size = batch_size
        self.seed = seed
        self.threads = threads
        self._train_loader: BatchLoader[Any] | None = None
        self._start = {"epoch": 0, "step": 0}

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of each rank in an epoch."""
        world = self.trainer.world_size if self.trainer else 1
        return n_steps(len(self.train_rows), self.batch_size, world)

    def _loader(self, rows: np.ndarray, shuffle: bool) -> BatchLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

        def make(epoch: int, step: int) -> Any:
            epoch = epoch if shuffle else VALIDATION_EPOCH
            cells = batch_rows(rows, step, self.batch_size, self.seed, epoch, shuffle, rank, world)
            batch_seed = int(np.random.SeedSequence([self.seed, epoch, step, rank]).generate_state(1)[0])
            return self.make_batch(self.store.read(cells), epoch, batch_seed)

        return BatchLoader(make, n_steps(len(rows), self.batch_size, world), self.threads)

    def train_dataloader(self) -> BatchLoader[Any]:
        """Training batches, shuffled by (seed, epoch), from where a resumed run stopped."""
        self._train_loader = self._loader(self.train_rows, shuffle=True)
        self._train_loader.load_state_dict(self._start)
        return self._train_loader

    def val_dataloader(self) -> BatchLoader[Any] | list[None]:
        """Validation batches, in the order of the file; none where no cell validates."""
        return self._loader(self.val_rows, shuffle=False) if len(self.val_rows) else []

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the next training batch.

        Lightning saves the loader's state too, but does not restore it where an epoch has just ended.
        """
        return self._train_loader.state_dict() if self._train_loader else self._start

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start where `state_dict` was taken."""
        self._start = state_dict
