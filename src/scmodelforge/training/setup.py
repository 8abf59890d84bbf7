"""What a run needs around the model: devices, run folder, loggers, the Lightning trainer, provenance."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from scmodelforge.config import Config, TrainingConfig
from scmodelforge.config_io import to_yaml
from scmodelforge.errors import ConfigError, UserError, require_extra
from scmodelforge.files import ensure_writable, require_writable, write_text
from scmodelforge.inference_batches import bf16_on_cpu
from scmodelforge.training.callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    MetricsFile,
    ProgressBar,
    ProgressLines,
)
from scmodelforge.training.processes import (
    cluster_environment,
    n_machines,
    started_by_torchrun,
    started_processes,
)
from scmodelforge.training.sharded import ShardedStrategy
from scmodelforge.training.throughput import Throughput

log = logging.getLogger(__name__)

RUN_DIR_VARIABLE = "SCMODELFORGE_RUN_DIR"
VERSIONS_OF = ("scmodelforge", "torch", "lightning", "anndata", "scanpy", "numpy", "scikit-learn", "peft")


@dataclass(frozen=True)
class RunFolders:
    """Where a run writes."""

    run: Path
    checkpoints: Path

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The best checkpoint by the validation figure."""
        return self.checkpoints / "best.ckpt"


def check_environment(training: TrainingConfig) -> None:
    """Refuse, before any data are read, what this machine cannot do.

    Raises
    ------
    MissingExtraError
        If the logger is not installed.
    ConfigError
        If the precision needs a GPU and there is none, or the optimizer a newer torch.
    """
    if training.logger in ("wandb", "tensorboard"):
        require_extra(training.logger, training.logger, f"training.logger: {training.logger}")
    if training.precision == "16-mixed" and accelerator(training)[0] == "cpu":
        raise ConfigError(
            "training.precision 16-mixed needs a GPU, and none is used here. Use bf16-mixed or 32-true."
        )
    if training.precision == "bf16-mixed" and accelerator(training)[0] == "cpu" and not bf16_on_cpu():
        log.warning(
            "training.precision is bf16-mixed, and this processor computes bfloat16 by detours (it has neither "
            "AVX512-BF16 nor AMX): 32-true is faster here."
        )
    if training.optimizer.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"training.optimizer.name muon needs torch 2.9 or newer, and this is {torch.__version__}. "
            "Use adamw, or update torch."
        )


def accelerator(training: TrainingConfig) -> tuple[str, int]:
    """What to train on, on this machine: ("gpu", how many) or ("cpu", how many processes).

    Processes that torchrun or srun started are taken as they are; without them a CPU runs one.
    """
    available = torch.cuda.device_count()
    wanted = available if training.num_gpus is None else training.num_gpus
    used = min(wanted, available)
    kind = "gpu" if used else "cpu"
    started = started_processes()
    if started is None:
        return kind, used or 1
    if kind == "gpu" and started.per_machine > used:
        remedy = (
            f"Start one for each: --nproc-per-node {used}."
            if started.by == "torchrun"
            else f"Start one for each (--ntasks-per-node={used}), and give the GPUs to all processes of a machine "
            "(--gpus-per-node, not --gpus-per-task)."
        )
        raise ConfigError(
            f"{started.by} started {started.per_machine} processes on a machine with {used} GPUs to use "
            f"(training.num_gpus: {training.num_gpus}). {remedy}"
        )
    return kind, started.per_machine


def n_processes(training: TrainingConfig) -> int:
    """Processes that train together, on all machines."""
    return accelerator(training)[1] * n_machines()


def choose_folders(training: TrainingConfig, resume: dict[str, Any] | None) -> RunFolders:
    """Where a run will write; a resumed run goes on in its own folder. Nothing is created yet.

    Raises
    ------
    UserError
        If a folder cannot be written.
    """
    earlier = resume["run_dir"] if resume else None
    run = Path(training.run_dir or earlier or _new_run_name())
    return RunFolders(require_writable(run), require_writable(training.checkpoint_dir or run / "checkpoints"))


def _new_run_name() -> str:
    """runs/DATE-TIME, the same for all processes that Lightning starts; of torchrun's and srun's, runs/THEIR-ID."""
    if started_by_torchrun():
        name = os.environ["TORCHELASTIC_RUN_ID"]
        if name == "none":
            raise ConfigError(
                "Processes that torchrun started on several machines need one name for their run: set training.run_dir."
            )
        return f"runs/{name}"
    started = started_processes()
    if started is not None:
        return f"runs/{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[RUN_DIR_VARIABLE] = f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    return os.environ[RUN_DIR_VARIABLE]


def create_folders(folders: RunFolders, resumed: bool) -> None:
    """Create the folders of a run that is about to start.

    What an earlier run left in them is moved to sub-folders `previous`, and that is said.
    """
    ensure_writable(folders.run)
    ensure_writable(folders.checkpoints)
    for left_over in folders.checkpoints.glob(".*.tmp"):  # of a process that was killed while it wrote
        left_over.unlink()
    if resumed:
        return
    names = (
        *("config.yaml", "run.json", "metrics.csv", "gene_match.csv", "validation_cells.h5ad", "report.html"),
        *("model", "tensorboard", "wandb"),
    )
    old = sorted(folders.checkpoints.glob("*.ckpt")) + [
        folders.run / name for name in names if (folders.run / name).exists()
    ]
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    for path in old:
        (path.parent / "previous" / now).mkdir(parents=True, exist_ok=True)
        path.rename(path.parent / "previous" / now / path.name)
    if old:
        places = " and ".join(sorted({str(path.parent / "previous" / now) for path in old}))
        log.warning("%s held another run: its files were moved to %s.", folders.run, places)


def build_trainer(
    training: TrainingConfig,
    folders: RunFolders,
    *,
    monitor: str | None,
    mode: str = "min",
    wait_seconds: Callable[[], float],
    resumed_step: int = 0,
    ddp: str = "ddp",
    callbacks: tuple[Callback, ...] = (),
) -> Trainer:
    """A Lightning trainer for the config; `monitor` is the figure that decides what is best.

    `ddp` is Lightning's name of the kind of DDP that the module needs.
    """
    quiet_lightning()
    kind, count = accelerator(training)
    if training.num_gpus and (kind, count) != ("gpu", training.num_gpus) and started_processes() is None:
        found = f"{count} GPU{'s' * (count > 1)}" if kind == "gpu" else "the CPU"
        log.warning(
            "training.num_gpus is %d, but only %s can be used here: training on it.", training.num_gpus, found
        )
    return Trainer(
        accelerator=kind,
        devices=count,
        num_nodes=n_machines(),
        strategy=_strategy(training, ddp),
        precision=training.precision,
        max_epochs=training.max_epochs,
        max_steps=training.max_steps or -1,
        accumulate_grad_batches=training.accumulate_grad_batches,
        gradient_clip_val=training.gradient_clip_val,
        log_every_n_steps=training.log_every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        default_root_dir=folders.run,
        logger=_loggers(training, folders, resumed_step),
        plugins=[AtomicCheckpointIO(), *cluster_environment()],
        callbacks=[
            *callbacks,
            Throughput(wait_seconds, training.log_every_n_steps),
            ProgressBar() if sys.stdout.isatty() else ProgressLines(),
            BestCheckpoint(folders.checkpoints, monitor, mode, training.save_top_k),
            LastCheckpoint(folders.last, training.checkpoint_every_n_steps),
        ],
    )


def _strategy(training: TrainingConfig, ddp: str) -> str | ShardedStrategy:
    """How several processes train one model; "auto" for one process."""
    processes = n_processes(training)
    if processes == 1:
        if training.strategy == "fsdp":
            log.warning(
                "training.strategy fsdp has no effect: it divides a model over processes, and this is one."
            )
        return "auto"
    return ShardedStrategy(processes) if training.strategy == "fsdp" else ddp


def quiet_lightning() -> None:
    """Leave out notices of Lightning that repeat ours or concern nobody."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*exists and is not empty",
        "The dirpath has changed",
        "The number of training batches",
        ".*isinstance.treespec, LeafSpec",
        "Total length of `list` across ranks is zero",
    ):
        warnings.filterwarnings("ignore", message=message)


def _loggers(training: TrainingConfig, folders: RunFolders, resumed_step: int) -> list[Logger]:
    loggers: list[Logger] = [MetricsFile(folders.run / "metrics.csv", resumed_step)]
    if training.logger == "tensorboard":
        loggers.append(TensorBoardLogger(folders.run, name="tensorboard", version=""))
    if training.logger == "wandb":
        import wandb

        offline = not wandb.login(prompt=False)
        if offline:
            log.warning(
                "No Weights & Biases account is set up: logging offline into %s ('wandb sync' uploads it).",
                folders.run / "wandb",
            )
        loggers.append(
            WandbLogger(
                project=training.wandb_project, name=folders.run.name, save_dir=folders.run, offline=offline
            )
        )
    return loggers


class _Notes(logging.Handler):
    """Collects what was said to the user, for run.json."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()) not in self.messages:
            self.messages.append(message)


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Yield a list that fills with every warning of ours while the block runs."""
    handler = _Notes()
    logger = logging.getLogger("scmodelforge")
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)


def write_provenance(folders: RunFolders, config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Write config.yaml (every default written out) and run.json (versions, hardware, data, command line).

    Returns what is in run.json.
    """
    write_text(folders.run / "config.yaml", to_yaml(config))
    versions = {}
    for package in VERSIONS_OF:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record = {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "git": _git_commit(),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {"platform": platform.platform(), "cpu_threads": torch.get_num_threads(), "gpus": gpus},
        "seed": config.training.seed,
        **facts,
    }
    write_text(folders.run / "run.json", json.dumps(record, indent=2) + "\n")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run folder; empty if there is none.

    Raises
    ------
    UserError
        If it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"The record '{path}' of the run to go on with is damaged: {error}\n"
            "Delete it to go on without the command and the figures that it held."
        ) from error


def _git_commit() -> str | None:
    """The commit of the user's working directory, if it is a git repository."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:  # no git
        return None
    return answer.stdout.strip() or None
