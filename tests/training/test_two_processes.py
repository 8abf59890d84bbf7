"""`torchrun` starts `train` twice: equal shares of uneven data, one run folder, and a stop that both obey."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scmodelforge.config import DataConfig
from scmodelforge.data.shards import write_shards
from scmodelforge.models.bundle import load_model, read_checkpoint
from tests.helpers import make_vocab, marker_cells, tiny_config

# The command itself, with a note of the cells of each batch.
NOTED = """
import json, os, sys
from scmodelforge import cli
from scmodelforge.data import order
batch_rows = order.batch_rows
def noted(rows, step, size, seed, epoch, shuffle, rank, world):
    cells = batch_rows(rows, step, size, seed, epoch, shuffle, rank, world)
    with open(f"{os.environ['NOTES']}/{rank}", "a") as file:
        file.write(json.dumps([shuffle, epoch, step, cells.tolist()]) + chr(10))
    return cells
order.batch_rows = noted  # of validation, and of training
cli.main()
"""
N_CELLS, EPOCHS = 241, 2


def write_config(folder: Path, run: str, batch_size: int) -> Path:
    training = {
        "batch_size": batch_size,
        "max_epochs": EPOCHS,
        "checkpoint_every_n_steps": 5,
        "optimizer": {"lr": 0.03},
    }
    data = {"paths": [str(folder / "shards")]}
    sections = {"data": data, "training": training, "eval": {"every_n_epochs": 1}}
    config = tiny_config(folder / run, **sections).model_dump(exclude_unset=True)
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def batches(notes: Path, rank: int, shuffle: bool) -> dict[tuple[int, int], list[int]]:
    lines = [json.loads(line) for line in (notes / str(rank)).read_text().splitlines()]
    return {(epoch, step): cells for is_train, epoch, step, cells in lines if is_train is shuffle}


@pytest.mark.slow
def test_two_processes_share_uneven_cells(tmp_path: Path) -> None:
    marker_cells(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")
    write_shards(
        [tmp_path / "cells.h5ad"], make_vocab(40), DataConfig(), tmp_path / "shards", cells_per_shard=100
    )
    (tmp_path / "noted.py").write_text(NOTED)
    (tmp_path / "notes").mkdir()
    config = write_config(tmp_path, "two", 15)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    answer = subprocess.run(
        [*launcher, str(tmp_path / "noted.py"), "train", "--config", str(config)],
        env={**os.environ, "NOTES": str(tmp_path / "notes"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a hang is what this test is about
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Done.") == 1

    for shuffle in (True, False):
        first, second = (batches(tmp_path / "notes", rank, shuffle) for rank in (0, 1))
        assert first.keys() == second.keys()
        assert [len(cells) for cells in first.values()] == [len(cells) for cells in second.values()]
        for epoch in {epoch for epoch, _ in first}:
            cells = [
                c for share in (first, second) for (e, _), batch in share.items() if e == epoch for c in batch
            ]
            assert len(cells) == len(set(cells))
    train_cells = {
        c for rank in (0, 1) for batch in batches(tmp_path / "notes", rank, True).values() for c in batch
    }
    val_cells = {
        c for rank in (0, 1) for batch in batches(tmp_path / "notes", rank, False).values() for c in batch
    }
    assert not train_cells & val_cells
    assert len(train_cells) + len(val_cells) >= N_CELLS - 1

    model = load_model(tmp_path / "two/model")
    assert model.vocab.n_genes == 40
    (trained_on,) = model.trained_on
    assert trained_on.n_known >= trained_on.n_cells // 2  # the first process knows what it read
    assert "eval/linear_probe/macro_f1" in (tmp_path / "two/metrics.csv").read_text()


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path: Path) -> None:
    marker_cells(N_CELLS).write_h5ad(tmp_path / "cells.h5ad")
    write_shards([tmp_path / "cells.h5ad"], make_vocab(40), DataConfig(), tmp_path / "shards")
    config, last = write_config(tmp_path, "two", 15), tmp_path / "two/checkpoints/last.ckpt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "scmodelforge.cli", "train", "--config", str(config), "--set"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, "training.max_epochs=10000"], **quiet)
    while not last.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.count("Stopped. To go on:") == 1, output
    step = read_checkpoint(last)["global_step"]
    more = f"training.max_epochs={step // 7 + 2}"  # an epoch is 7 steps
    subprocess.run([*command, more, "--resume", str(last)], **quiet, check=True, timeout=120)
    assert read_checkpoint(last)["global_step"] > step
