"""`scmodelforge slurm`: a script that bash, and stand-ins for srun and scontrol, run as Slurm would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scmodelforge.config import TrainingConfig
from scmodelforge.errors import ConfigError, UserError
from scmodelforge.models.bundle import load_model, read_checkpoint
from scmodelforge.training.processes import StartedProcesses, cluster_environment, started_processes
from scmodelforge.training.slurm import slurm_script
from tests.helpers import marker_cells, tiny_config
from tests.journeys.command import done, refused

# srun starts a task on each node, which are all this machine, passes signals on, and ends with their highest code.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
nodes = int(os.environ["FAKE_NODES"])
step = {{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_LOCALID": "0"}}
tasks = [
    subprocess.Popen(command, env=os.environ | step | {{"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)}})
    for n in range(nodes)
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/bash\necho "$@" >> requeued\n'


def script(training: dict | None = None, **options) -> str:
    defaults = {"overrides": [], "nodes": 1, "gpus": None, "cpus": None, "time": None, "partition": None}
    config = TrainingConfig.model_validate(training or {})
    return slurm_script(config, Path("my.yaml"), folder=Path("/data/my cells"), **(defaults | options))


def options_of(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_bash_takes_the_script(tmp_path: Path) -> None:
    text = script({"run_dir": "it's mine"}, overrides=["data.paths=['a b.h5ad']"], time="1-12", gpus=4)
    (tmp_path / "job").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "job")], check=True)
    shown = subprocess.run(
        [
            "bash",
            "-c",
            text.replace("cd '", "cd / # '").replace("srun --kill-on-bad-exit=0", "printf '%s\\n'"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown == [
        *(sys.executable, "-m", "scmodelforge.cli", "train", "--config", "my.yaml"),
        *("--set", "data.paths=['a b.h5ad']"),
    ]


def test_sizes_become_options() -> None:
    options = options_of(script(nodes=3, gpus=4, time="2-12:30", partition="gpu,long"))
    assert options == {
        "job-name": "my",
        "nodes": "3",
        "ntasks-per-node": "4",
        "cpus-per-task": "4",
        "gpus-per-node": "4",
        "time": "2-12:30",
        "partition": "gpu,long",
        "signal": "USR1@180",
        "open-mode": "append",
        "requeue": "",
    }


def test_the_config_decides_what_is_not_said() -> None:
    text = script({"num_gpus": 0, "loader_threads": 6, "run_dir": "runs/a", "checkpoint_dir": "/fast/ckpt"})
    options = options_of(text)
    assert "gpus-per-node" not in options
    assert (options["ntasks-per-node"], options["cpus-per-task"], options["job-name"]) == ("1", "8", "a")
    assert "last=/fast/ckpt/last.ckpt" in text
    assert "--set" not in text
    assert options_of(script())["gpus-per-node"] == "1"
    assert "--set training.run_dir=runs/my" in script(), "a name that the next turn finds again"


@pytest.mark.parametrize(
    ("options", "training", "words"),
    [
        ({"time": "soon"}, {}, "--time is 'soon'. Slurm takes MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        ({"time": "1:2:3:4"}, {}, "--time is '1:2:3:4'"),
        ({"partition": "a b\n#SBATCH"}, {}, "is no name of a partition"),
        ({"gpus": 4}, {"num_gpus": 2}, "--gpus is 4, but training.num_gpus is 2: each process uses one GPU."),
    ],
)
def test_wrong_options_are_sentences(options: dict, training: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        script(training, **options)
    assert words in str(error.value)


def test_the_command_refuses_to_overwrite_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = job_config(tmp_path)
    (tmp_path / "job.sbatch").write_text("mine")
    refused(
        *("slurm", "--config", config, "--output", tmp_path / "job.sbatch"),
        words=("exists already", "--output"),
    )
    assert (tmp_path / "job.sbatch").read_text() == "mine"


def job_config(folder: Path, **training) -> Path:
    marker_cells().write_h5ad(folder / "cells.h5ad")
    config = tiny_config(folder / "run", data={"paths": ["cells.h5ad"]}, training=training)
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    return path


def submit(folder: Path, nodes: int) -> subprocess.Popen:
    """Run job.sbatch as Slurm runs the script of a job."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": str(nodes),
        "SLURM_PROCID": "0",
        "SLURM_CPUS_PER_TASK": "1",
    }
    environment = os.environ | job | {"FAKE_NODES": str(nodes), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    return subprocess.Popen(
        ["bash", "job.sbatch"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_whose_time_is_up_goes_on_in_its_next_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    job_config(tmp_path, checkpoint_every_n_steps=3, max_epochs=4000)
    last = tmp_path / "run/checkpoints/last.ckpt"
    answer = done("slurm", "--config", "my.yaml", "--nodes", nodes, "--set", "training.max_steps=100000")
    assert answer.out == "job.sbatch is ready; submit it with: sbatch job.sbatch\n"

    first = submit(tmp_path, nodes)
    while not last.exists() and first.poll() is None:
        time.sleep(0.1)
    assert first.poll() is None, first.stdout.read()  # type: ignore[union-attr]
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    assert "SIGUSR1: stopping after this step." in output
    assert output.count("Stopped. To go on:") == 1, "the first process speaks for all"
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    step = read_checkpoint(last)["global_step"]

    text = (tmp_path / "job.sbatch").read_text()
    (tmp_path / "job.sbatch").write_text(text.replace("max_steps=100000", f"max_steps={step + 4}"))
    second = submit(tmp_path, nodes)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert output.count("Done.") == 1
    assert read_checkpoint(last)["global_step"] == step + 4
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "a job that is done is not put back"
    assert load_model(tmp_path / "run/model").vocab.n_genes == 40


def test_a_job_that_fails_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job_config(tmp_path)
    done("slurm", "--config", "my.yaml")
    (tmp_path / "cells.h5ad").unlink()
    job = submit(tmp_path, 1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2
    assert "Error: " in output
    assert not (tmp_path / "requeued").exists()


SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (SLURM_JOB, None),  # a script of sbatch
        (SLURM_JOB | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}, None),  # a shell of salloc
        (
            SLURM_JOB | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
            StartedProcesses("srun", 4, 2),
        ),
        (
            SLURM_JOB
            | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}  # srun that starts torchrun
            | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "6"},
            StartedProcesses("torchrun", 3, 2),
        ),
    ],
)
def test_tasks_of_srun_are_told_from_shells(
    variables: dict, found: StartedProcesses | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    assert started_processes() == found
    (kind,) = [type(plugin).__name__ for plugin in cluster_environment()] or [None]
    expected = {"srun": "SLURMEnvironment", "torchrun": "TorchElasticEnvironment"}
    shell = "LightningEnvironment" if variables else None  # not Slurm's, which would wait for other tasks
    assert kind == (shell if found is None else expected[found.by])


def test_unequal_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(ConfigError, match=r"srun started 3 processes on 2 machines.*--ntasks-per-node"):
        started_processes()
