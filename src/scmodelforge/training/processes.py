"""Who started the processes of a run: torchrun, Slurm's srun, or nobody but the user.

Both say it in variables of the environment, and both run `scmodelforge train` unchanged in each process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from scmodelforge.errors import ConfigError


@dataclass(frozen=True)
class StartedProcesses:
    """Processes that something else started for this run.

    Attributes
    ----------
    by
        "torchrun" or "srun".
    per_machine, machines
        How many there are.
    """

    by: str
    per_machine: int
    machines: int


def started_processes() -> StartedProcesses | None:
    """Who started the processes of this run, and how many; None if there is this one alone.

    The variables of a job step tell tasks of srun from a shell of salloc or a script of sbatch, which also know
    SLURM_NTASKS, and which Lightning would take for one task of many.

    Raises
    ------
    ConfigError
        If srun put unequal numbers of tasks on the machines.
    """
    known = os.environ
    if started_by_torchrun():
        here = int(known["LOCAL_WORLD_SIZE"])
        return StartedProcesses("torchrun", here, int(known["WORLD_SIZE"]) // here)
    tasks, machines = int(known.get("SLURM_STEP_NUM_TASKS", 1)), int(known.get("SLURM_STEP_NUM_NODES", 1))
    if tasks == 1:
        return None
    if tasks % machines:
        raise ConfigError(
            f"srun started {tasks} processes on {machines} machines, and each needs equally many: use "
            "--ntasks-per-node instead of --ntasks."
        )
    return StartedProcesses("srun", tasks // machines, machines)


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_WORLD_SIZE" in os.environ


def cluster_environment() -> list[ClusterEnvironment]:
    """Lightning's plugin for who started the processes; none where Lightning finds out by itself."""
    started = started_processes()
    if started is not None and started.by == "srun":
        sizes = {
            "SLURM_NTASKS": started.per_machine * started.machines,
            "SLURM_NTASKS_PER_NODE": started.per_machine,
            "SLURM_NNODES": started.machines,
        }
        # Lightning reads those of the job, which a step need not fill.
        os.environ.update({name: str(size) for name, size in sizes.items()})
        return [SLURMEnvironment(auto_requeue=False)]  # `LastCheckpoint` obeys the signals
    if started is not None:
        return [TorchElasticEnvironment()]
    return [LightningEnvironment()] if "SLURM_NTASKS" in os.environ else []


def n_machines() -> int:
    """Machines that train together."""
    started = started_processes()
    return 1 if started is None else started.machines
