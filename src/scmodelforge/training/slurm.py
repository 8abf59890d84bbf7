"""A batch script for Slurm: srun starts a process for each GPU, and the job goes on until training is done.

Before the time of the job is up, and when it is preempted, its processes get a signal, write `last.ckpt` and end with
the code of a stopped run. The script then puts the job back into the queue, and the next time it starts from
`last.ckpt`. A job that fails is not put back, and neither is one that the user cancels, which ends the script too.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from scmodelforge.config_training import TrainingConfig
from scmodelforge.errors import UserError

STOPPED = 130  # exit code of `train` after a signal, with everything saved
SECONDS_TO_SAVE = 180  # Slurm may send the signal up to a minute early
TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-\d+(:[0-5]?\d){0,2}")


def slurm_script(
    training: TrainingConfig,
    config: Path,
    *,
    overrides: list[str],
    nodes: int,
    gpus: int | None,
    cpus: int | None,
    time: str | None,
    partition: str | None,
    folder: Path,
) -> str:
    """The script that trains as `scmodelforge train --config CONFIG` does.

    Parameters
    ----------
    training
        The section of the config, overrides included.
    config, overrides
        The file, and the `--set` options of the command.
    nodes, gpus
        Machines, and GPUs of each: one process a GPU, or one a machine without them. None: `training.num_gpus`, or 1.
    cpus
        CPU cores of each process; None: for the threads that load, one for the model and one to spare.
    time, partition
        As sbatch takes them; None: those of the cluster.
    folder
        Where the command runs: relative paths of the config start there.

    Raises
    ------
    UserError
        If Slurm does not know such a time or partition, or the config asks for other GPUs.
    """
    if time is not None and not TIME.fullmatch(time):
        raise UserError(
            f"--time is '{time}'. Slurm takes MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, e.g. --time 12:00:00."
        )
    if partition is not None and not re.fullmatch(r"[\w.,+-]+", partition):
        raise UserError(
            f"--partition is '{partition}', which is no name of a partition ('sinfo' lists them)."
        )
    if gpus is None:
        gpus = 1 if training.num_gpus is None else training.num_gpus
    if training.num_gpus is not None and training.num_gpus != gpus:
        raise UserError(
            f"--gpus is {gpus}, but training.num_gpus is {training.num_gpus}: each process uses one GPU. Give the "
            "same number, or leave training.num_gpus out."
        )
    if training.run_dir is None:
        overrides = [*overrides, f"training.run_dir=runs/{config.stem}"]
    run_dir = training.run_dir or f"runs/{config.stem}"
    last = Path(training.checkpoint_dir or Path(run_dir, "checkpoints")) / "last.ckpt"
    options = {
        "job-name": re.sub(r"[^\w.-]+", "_", Path(run_dir).name) or "train",
        "nodes": nodes,
        "ntasks-per-node": max(gpus, 1),
        "cpus-per-task": cpus or training.loader_threads + 2,
        "gpus-per-node": gpus or None,
        "time": time,
        "partition": partition,
        "signal": f"USR1@{SECONDS_TO_SAVE}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "scmodelforge.cli", "train", "--config", str(config)]
    command += [part for override in overrides for part in ("--set", override)]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "",
            f"cd {shlex.quote(str(folder))} || exit 1",
            f"last={shlex.quote(str(last))}",
            "resume=()",
            'if [ -e "$last" ]; then resume=(--resume "$last"); fi',
            'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from the job',
            "",
            f'srun --kill-on-bad-exit=0 {shlex.join(command)} "${{resume[@]}}"',
            "code=$?",
            f"if [ $code -eq {STOPPED} ]; then  # stopped by a signal, everything is saved",
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $code",
            "",
        ]
    )
