"""How fast a run is, and how well it uses the machine: figures per interval, and of the whole run.

Rates count real cells and tokens, never padding. The first step, which compiles and warms up, is left out of the
figures of the run. Model FLOPs utilization (MFU) on a GPU is the FLOPs of `models/flops.py` over those that the same
GPU does in plain bfloat16 matrix products, measured before training starts: a table would not know its power limit.
Sums stay on the device until figures are logged, so that no step waits for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from scmodelforge.training.module import TrainingModule

GIB = 2**30
MATMUL_SIZE = 8192  # large enough to be bound by arithmetic on any GPU
IMPORTED = time.perf_counter()


def seconds_since_start() -> tuple[float, str]:
    """Seconds since this process started, and since what: where /proc is missing, since this file was imported."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.perf_counter() - IMPORTED, "import of scmodelforge.training"
    after_name = stat.read_text().rpartition(")")[2].split()  # the name may hold spaces; the state comes next
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22: clock ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started, "start of the process"


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes, and of what: allocated on the GPU, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024, "resident memory of the process"
    import resource  # not on Windows

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss * unit, "resident memory of the process"


def matmul_rate(device: torch.device, repeats: int = 20) -> float:
    """FLOP/s of bfloat16 matrix products on a GPU, measured in some 50 ms."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    a, b = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    ended.record()
    ended.synchronize()
    return 2 * MATMUL_SIZE**3 * repeats / (began.elapsed_time(ended) / 1000)


@dataclass
class Work:
    """What was done in some time.

    Attributes
    ----------
    seconds, waited
        Time, and how much of it went into waiting for data.
    steps, cells, tokens
        Batches, and what is real in them.
    padding
        Places that were computed on without holding a token.
    flops
        0-dimensional float64: FLOPs by the formula; 0 where they are not counted.
    """

    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    cells: int = 0
    tokens: int = 0
    padding: int = 0
    flops: torch.Tensor | float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def count(self, batch: Any) -> None:
        """Add the sizes of a batch."""
        self.steps += 1
        self.cells += batch.tokens.n_cells
        self.tokens += batch.n_tokens
        self.padding += batch.n_padding

    def figures(self, world: int) -> dict[str, float]:
        """Rates of all ranks together, and shares between 0 and 1."""
        seconds = max(self.seconds, 1e-9)
        return {
            "cells_per_second": self.cells * world / seconds,
            "tokens_per_second": self.tokens * world / seconds,
            "seconds_per_step": seconds / max(self.steps, 1),
            "data_wait_share": self.waited / seconds,
            "padding_share": self.padding / max(self.tokens + self.padding, 1),
        }


class Throughput(Callback):
    """Logs figures every `every_n_steps` steps, with the gradient norm and the learning rate, and sums up the run.

    Attributes
    ----------
    first_step
        Seconds until the first optimizer step was done, and since what; None before.
    matmul_rate
        FLOP/s that a utilization of 1 would be; None on a CPU.
    """

    def __init__(self, wait_seconds: Callable[[], float], every_n_steps: int) -> None:
        self.wait_seconds = wait_seconds
        self.every_n_steps = every_n_steps
        self.first_step: tuple[float, str] | None = None
        self.matmul_rate: float | None = None
        self.run, self.warm_up = Work(), Work()

    def _start(self) -> None:
        self.started, self.waited = time.perf_counter(), self.wait_seconds()
        self.work = Work()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        self._start()

    def on_train_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        if pl_module.device.type == "cuda":
            self.matmul_rate = matmul_rate(pl_module.device)
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start()  # a run that resumes within an epoch has no epoch start

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: TrainingModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.work.count(batch)
        if self.matmul_rate is not None:
            self.work.flops = self.work.flops + pl_module.flops(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        is_first = self.first_step is None
        step, is_last = trainer.global_step, trainer.is_last_batch
        due = step % self.every_n_steps == 0 or is_last or step == trainer.max_steps
        if not (due or is_first):
            return
        gradient_norm = float(pl_module.gradient_norm)  # type: ignore[arg-type]  # waits for the GPU
        self.work.seconds = time.perf_counter() - self.started
        self.work.waited = self.wait_seconds() - self.waited
        if is_first:
            self.first_step = seconds_since_start()
            self.warm_up = self.work
        else:
            self.run = self.run + self.work
        if due:
            self._log(trainer, pl_module, gradient_norm)
        self._start()

    def _log(self, trainer: Trainer, pl_module: TrainingModule, gradient_norm: float) -> None:
        figures = self.work.figures(trainer.world_size)
        utilization = self._utilization(self.work)
        pl_module.log_dict(
            figures
            | ({} if utilization is None else {"mfu": utilization})
            | {
                "peak_memory_gib": peak_memory(pl_module.device)[0] / GIB,
                "grad_norm": gradient_norm,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            },
            batch_size=1,
            rank_zero_only=True,
        )

    def _utilization(self, work: Work) -> float | None:
        if self.matmul_rate is None:
            return None
        return float(work.flops) / max(work.seconds, 1e-9) / self.matmul_rate

    def on_validation_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        if not trainer.sanity_checking:
            self._start()

    def leave_out(self, seconds: float) -> None:
        """Do not count time that did not go into training."""
        self.started += seconds

    def performance(self, trainer: Trainer) -> dict[str, Any]:
        """Figures of the run without its first step, for run.json; of the first step where there is no other."""
        if self.first_step is None:
            return {}
        work = self.run if self.run.steps else self.warm_up
        memory, memory_of = peak_memory(trainer.strategy.root_device)
        seconds, since = self.first_step
        figures: dict[str, Any] = {
            "steps": work.steps,
            "seconds": work.seconds,
            "cells": work.cells * trainer.world_size,
            "tokens": work.tokens * trainer.world_size,
            **work.figures(trainer.world_size),
            "peak_memory_gib": memory / GIB,
            "peak_memory_of": memory_of,
            "first_step_seconds": seconds,
            "first_step_since": since,
        }
        if self.matmul_rate is not None:
            figures["mfu"] = self._utilization(work)
            figures["matmul_flops_per_second"] = self.matmul_rate
            figures["mfu_of"] = (
                f"bfloat16 matrix products of {MATMUL_SIZE} × {MATMUL_SIZE}, measured before training"
            )
        return figures


def throughput_of(trainer: Trainer) -> Throughput:
    """The callback of a trainer."""
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
    return callback
