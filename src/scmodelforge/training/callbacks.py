"""What happens beside the steps: checkpoints, interruption, progress lines, metrics.csv."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from scmodelforge.files import atomic_path
from scmodelforge.models.bundle import read_checkpoint

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES = 10.0  # of metrics.csv
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that are never unpickled."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """Write to a temporary file, then rename."""
        with atomic_path(os.fspath(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read with `weights_only=True`, whatever was asked."""
        return read_checkpoint(Path(path))


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoints by a validation figure; the best of them is also `best.ckpt`.

    Without a figure to watch (`monitor` None) the newest epoch is the best.
    """

    def __init__(self, folder: Path, monitor: str | None, mode: str, save_top_k: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="{epoch:03d}" + (f"-{{{monitor}:.4f}}" if monitor else ""),
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor else 1,
            save_on_train_epoch_end=True,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also in a folder that was moved since: its best.ckpt stays until a better model comes."""
        if Path(self.dirpath or "", "best.ckpt").exists():
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # so that an epoch that max_steps cuts short is validated too

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_path
        super().on_train_epoch_end(trainer, pl_module)
        if self.best_model_path and self.best_model_path != before and trainer.is_global_zero:
            with atomic_path(Path(self.best_model_path).parent / "best.ckpt") as temporary:
                try:
                    os.link(self.best_model_path, temporary)  # the same bytes, no second copy on disk
                except OSError:  # a file system without hard links
                    shutil.copyfile(self.best_model_path, temporary)


class Interrupted(Exception):
    """Training was stopped by a signal after its state was saved."""


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after each epoch, every `every_n_steps` steps, and when a signal asks to stop.

    Ctrl-C, SIGTERM and SIGUSR1 (Slurm's, before the time is up) are obeyed between two optimizer steps, so what is
    saved is a whole step; a second Ctrl-C stops at once. It is a `Checkpoint`, so it runs after `BestCheckpoint`, whose
    state it has to hold.
    """

    def __init__(self, path: Path, every_n_steps: int | None) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.stop_requested = False
        self._handlers: dict[int, Any] = {}

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGINT:
            if not self.stop_requested:
                log.warning("%s: stopping after this step.", signal.Signals(signum).name)
        elif self.stop_requested:
            raise KeyboardInterrupt
        else:
            log.warning("Stopping after this step; press Ctrl-C again to stop at once without saving.")
        self.stop_requested = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            for signum in STOP_SIGNALS:
                self._handlers[signum] = signal.signal(signum, self._request_stop)
        except ValueError:  # signals can be handled in the main thread only
            log.info("Not in the main thread: Ctrl-C will not save a checkpoint.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back()

    def _give_back(self) -> None:
        # Not in `teardown`: Lightning has removed its own handlers by then, and these bring them back.
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if trainer.is_last_batch or accumulating:
            return
        if trainer.world_size > 1:  # a signal may reach one process only, and all must save together
            self.stop_requested = trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due or self.stop_requested:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.write()  # figures and checkpoint end at the same step
        if self.stop_requested:
            raise Interrupted


class ProgressBar(RichProgressBar):
    """Lightning's bar, with epochs counted from 1 and figures that mean something.

    Nothing is logged with `prog_bar`: Lightning would read it after each step, and let the GPU wait for that.
    """

    def __init__(self) -> None:
        super().__init__(leave=True)
        self.figures: dict[str, float] = {}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Loss, cells/s and validation loss, read where figures are logged."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 or trainer.is_last_batch or step == trainer.max_steps:
            shown = {"train_loss": "loss", "cells_per_second": "cells/s", "val_loss": "val_loss"}
            measured = trainer.callback_metrics
            self.figures |= {name: float(measured[key]) for key, name in shown.items() if key in measured}
        return dict(self.figures)


class ProgressLines(Callback):
    """One line an epoch, for logs and pipes where a progress bar cannot be drawn."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = ("train_loss", "val_loss", "val_accuracy", "val_macro_f1", "cells_per_second")
        figures = {
            name: float(trainer.callback_metrics[name]) for name in shown if name in trainer.callback_metrics
        }
        line = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        log.info(
            "epoch %d/%d  step %d  %s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            trainer.global_step,
            line,
        )


class MetricsFile(Logger):
    """metrics.csv in the run folder: a row per logged step, columns as they come, kept when a run resumes."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.written_at = 0.0
        self.rows: dict[int, dict[str, Any]] = {}
        if path.exists():
            with open(path, newline="", encoding="utf-8") as handle:
                for row in csv.DictReader(handle):
                    if int(row["step"]) <= first_step:  # later steps are taken again
                        self.rows[int(row["step"])] = {k: v for k, v in row.items() if v and k != "step"}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep figures of a step; Lightning counts steps from 0, the file from 1."""
        self.rows.setdefault((step or 0) + 1, {}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write the file if it was not written in the last seconds; Lightning asks for it at each logged step."""
        if time.monotonic() - self.written_at > SECONDS_BETWEEN_WRITES:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file anew, atomically."""
        self.written_at = time.monotonic()
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        with (
            atomic_path(self.path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as handle,
        ):
            writer = csv.DictWriter(handle, ["step", *columns])
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.write()
