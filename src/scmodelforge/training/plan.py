"""What a pretraining run will cost, before it starts: tokens, memory, FLOPs, and time from a few real steps.

The steps are those of `train`: the same data, model, batches, precision and Lightning loop, on one device. Nothing is
written, and the trained weights are thrown away.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from scmodelforge.config import Config, TrainingConfig
from scmodelforge.config_idle import say_idle_keys
from scmodelforge.data.module import CellDataModule
from scmodelforge.data.state import evenly
from scmodelforge.errors import UserError
from scmodelforge.training.auto_budget import with_chosen_budget
from scmodelforge.training.batches import choose_batches
from scmodelforge.training.memory import activation_bytes, available_bytes, fixed_bytes, saved_bytes
from scmodelforge.training.optim import total_steps
from scmodelforge.training.pretraining import Pretraining, given_model, set_up
from scmodelforge.training.setup import (
    accelerator,
    check_environment,
    collected_notes,
    n_processes,
    quiet_lightning,
)
from scmodelforge.training.throughput import Throughput

log = logging.getLogger(__name__)

SAMPLED_CELLS = 2048
STEPS, SECONDS = 30, 20.0  # the steps end with whichever comes first
FEW_STEPS = 10  # in an epoch
COMPILING_PAYS_AFTER = 300.0  # seconds of a run: torch.compile takes up to 30, and saves a third of the rest


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes
    ----------
    parameters
        Of the model.
    tokens
        int64 (n): tokens of some training cells, drawn with the seed of the run.
    batch_tokens
        Tokens of the first batch that are computed on, padding included.
    fixed_bytes
        Weights, gradients and optimizer.
    bytes_per_token
        What a token adds, by formula, with its share of the asked genes.
    batch_bytes, batch_bytes_measured
        What the first batch adds: by formula, and what autograd kept of it (without the passing copies of the logits).
    available_bytes
        Memory that there is.
    flops_per_cell
        Of a training step.
    flops_per_epoch
        Of all training steps of an epoch.
    optimizer_steps, steps_per_epoch
        Of the whole run, and batches of each process in an epoch.
    processes
        That will train together; their speed is taken to be that of one, times their number.
    performance
        Figures of the measured steps, as in run.json; empty if a step would not have fitted.
    seconds
        Of the whole run, validation included; None if nothing was measured.
    notes
        Everything that was warned about.
    """

    parameters: int
    tokens: np.ndarray
    batch_tokens: int
    fixed_bytes: int
    bytes_per_token: float
    batch_bytes: int
    batch_bytes_measured: int | None
    available_bytes: int
    flops_per_cell: float
    flops_per_epoch: float
    optimizer_steps: int
    steps_per_epoch: int
    processes: int
    performance: dict[str, Any]
    seconds: float | None
    notes: list[str]


def plan(config: Config, data: AnnData | None = None) -> Plan:
    """Measure what `train` would need with this config.

    Parameters
    ----------
    config
        The whole config.
    data
        Cells in memory instead of `data.paths`.

    Raises
    ------
    UserError
        If config, data or machine do not allow the run, as `train` would say.
    """
    with collected_notes() as notes:
        training = config.training
        check_environment(training)
        say_idle_keys(config)
        given_model(config, None, None)
        run = with_chosen_budget(set_up(config, data))
        training = run.bundle.config.training
        run.announce()
        device = torch.device("cuda" if accelerator(training)[0] == "gpu" else "cpu")

        tokens, flops_per_cell, asked_per_token = _sample(run)
        cells = _cells(run)
        batch = next(iter(cells.train_dataloader()))
        n_tokens, bundle = batch.tokens.input_ids.numel(), run.bundle
        fixed = fixed_bytes(bundle.model)
        estimate = activation_bytes(bundle.config, bundle.vocab, n_tokens, len(batch.asked))
        available = available_bytes(device)
        large = 10**6  # so that rounding does not matter
        per_token = (
            activation_bytes(bundle.config, bundle.vocab, large, round(asked_per_token * large)) / large
        )

        measured: int | None = None
        performance: dict[str, Any] = {}
        if fixed + estimate > available:
            log.warning(
                "A batch of %s cells needs about %.1f GiB, and %.1f GiB are free: it was not tried. Use a smaller "
                "training.batch_size, with training.accumulate_grad_batches for the same step.",
                f"{training.batch_size:,}",
                (fixed + estimate) / 2**30,
                available / 2**30,
            )
        else:
            measured, performance = _try_steps(run, cells, batch, device)

        n_draws = cells.training.order.n_draws
        steps_per_epoch, processes = cells.steps_per_epoch, n_processes(training)
        steps = total_steps(training, steps_per_epoch)
        seconds = _seconds(run, performance, n_draws, steps, steps_per_epoch, processes)
        _warn(training, steps_per_epoch, seconds)
        return Plan(
            parameters=bundle.n_parameters,
            tokens=tokens,
            batch_tokens=n_tokens,
            fixed_bytes=fixed,
            bytes_per_token=per_token,
            batch_bytes=estimate,
            batch_bytes_measured=measured,
            available_bytes=available,
            flops_per_cell=flops_per_cell,
            flops_per_epoch=flops_per_cell * n_draws,
            optimizer_steps=steps,
            steps_per_epoch=steps_per_epoch,
            processes=processes,
            performance=performance,
            seconds=seconds,
            notes=notes,
        )


def _cells(run: Pretraining) -> CellDataModule:
    """The batches of `train`, for the first process."""
    prepared, config = run.prepared, run.bundle.config
    training = config.training
    batches, _ = choose_batches(run.bundle, prepared, read_through=False)
    return CellDataModule(
        prepared.store, batches, None, run.make_batch, training.seed, training.loader_threads
    )


def _sample(run: Pretraining) -> tuple[np.ndarray, float, float]:
    """Tokens of some training cells, FLOPs of a cell, and asked genes a token."""
    rows, store, training = run.prepared.train_rows, run.prepared.store, run.bundle.config.training
    chosen = np.random.default_rng(training.seed).permutation(rows)[:SAMPLED_CELLS]
    if any(matrix.shuffle_buffer for matrix in store.matrices):
        chosen = rows[evenly(len(rows), SAMPLED_CELLS, in_runs=True)]
    chosen, module = np.sort(chosen), run.module
    lengths, flops, n_asked, n_read = [], 0.0, 0, 0
    for start in range(0, len(chosen), training.batch_size):
        cells = store.read(chosen[start : start + training.batch_size])
        tokens = run.tokenizer(cells, training.seed, 0)
        lengths.append(tokens.lengths.numpy())
        batch = run.task.pack(run.task.corrupt(tokens, training.seed, 0))
        flops += float(module.flops(batch))
        n_asked += batch.n_asked
        n_read += int(batch.tokens.lengths.sum())
    return np.concatenate(lengths), flops / len(chosen), n_asked / max(n_read, 1)


def _try_steps(
    run: Pretraining, cells: CellDataModule, batch: Any, device: torch.device
) -> tuple[int, dict[str, Any]]:
    """What autograd keeps of a batch, and the figures of some steps."""
    training, module = run.bundle.config.training, run.module
    try:
        module.model.to(device).train()
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(training.precision)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            measured = saved_bytes(module.model, lambda: run.task(module.model, batch.to(device)).loss)
        throughput = Throughput(lambda: trainer.train_dataloader.wait_seconds, every_n_steps=1)  # type: ignore[union-attr]
        quiet_lightning()
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=training.precision,
            max_epochs=training.max_epochs,
            max_steps=min(STEPS, training.max_steps or STEPS),
            accumulate_grad_batches=training.accumulate_grad_batches,
            gradient_clip_val=training.gradient_clip_val,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            plugins=[LightningEnvironment()],
            callbacks=[throughput, _StopAfter(SECONDS)],
        )
        trainer.fit(module, datamodule=cells)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"A batch of {training.batch_size:,} cells ({batch.tokens.input_ids.numel():,} tokens) does not fit into "
            "the memory of the GPU. Use a smaller training.batch_size, with training.accumulate_grad_batches for the "
            "same step, or training.precision bf16-mixed."
        ) from error
    return measured, throughput.performance(trainer)


class _StopAfter(Callback):
    """Ends training after some seconds, but not before two steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= 2 and time.perf_counter() - self.started > self.seconds:
            trainer.should_stop = True


def _seconds(
    run: Pretraining,
    performance: dict[str, Any],
    n_draws: int,
    steps: int,
    steps_per_epoch: int,
    processes: int,
) -> float | None:
    """Time of the whole run: training cells at the measured rate, validation cells without their backward pass."""
    if not performance:
        return None
    epochs = steps * run.bundle.config.training.accumulate_grad_batches / steps_per_epoch
    cells = epochs * (n_draws + len(run.prepared.val_rows) / 3)
    return cells / performance["cells_per_second"] / processes


def _warn(training: TrainingConfig, steps_per_epoch: int, seconds: float | None) -> None:
    if steps_per_epoch < FEW_STEPS:
        log.warning(
            "An epoch has only %d steps, and so the run %d: a smaller training.batch_size, or more "
            "training.max_epochs, would let the model learn more.",
            steps_per_epoch,
            total_steps(training, steps_per_epoch),
        )
    compiles = training.compile
    if compiles and seconds is not None and seconds < COMPILING_PAYS_AFTER:
        log.warning(
            "The run takes some %d s: training.compile costs up to 30 s at its start and will hardly pay.",
            round(seconds),
        )
