"""How soon does training on shards take its first step, and does its memory stay flat?

Makes synthetic cells (the law of `loading.py`), makes shards of them with `write_shards`, and trains a small model on
them in a fresh process. The clock starts when everything is imported. Gene medians come from a table, as for any
second run on the same cells. Memory is the anonymous memory of the process, sampled through the epoch (or through
`--steps`) while it trains: in its first and in its last tenth.

    python benchmarks/startup.py --cells 20000
    python benchmarks/startup.py --cells 1000000 --steps 4000
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import harness
import loading
import numpy as np


def make_shards(folder: str, n_cells: int) -> None:
    """Write cells and convert them; both stay in `folder` for the next time."""
    from scmodelforge.config import DataConfig
    from scmodelforge.data.shards import write_shards
    from scmodelforge.genes.vocab import predefined

    source, shards = Path(folder) / f"cells_{n_cells}.h5ad", Path(folder) / f"shards_{n_cells}"
    if not (shards / "manifest.json").exists():
        if not source.exists():
            loading.write_cells(str(source), n_cells)
        write_shards([str(source)], predefined("human_protein_coding"), DataConfig(), shards)
    vocab = predefined("human_protein_coding")
    medians = np.random.default_rng(0).uniform(0.5, 20, vocab.n_genes)
    lines = (f"{gene},{median}" for gene, median in zip(vocab.gene_ids, medians, strict=True))
    (Path(folder) / "medians.csv").write_text("gene_id,median\n" + "\n".join(lines) + "\n")


def train(folder: str, n_cells: int, steps: int | None) -> dict[str, float]:
    """Train in this process; seconds to the end of the first step, cells/s after it, and memory in MiB."""
    from scmodelforge.config import Config
    from scmodelforge.training.module import PretrainingModule
    from scmodelforge.training.run import train as run

    config = Config.model_validate(
        {
            "data": {
                "paths": [str(path) for path in sorted((Path(folder) / f"shards_{n_cells}").glob("*.h5ad"))],
                "split": {"val_split": min(0.1, 2048 / n_cells)},
            },
            "tokenizer": {
                "max_genes": 64,
                "gene_medians": str(Path(folder) / "medians.csv"),
                "masking": {"mask_ratio": 0.02},  # so that the loss over all genes is not all there is
            },
            "model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 1, "gene_head": "tied"},
            "training": {
                "batch_size": 256,
                "max_epochs": 1,
                "max_steps": steps,
                "num_gpus": 0,
                "run_dir": str(Path(folder) / "run"),
                "log_every_n_steps": 50,
            },
        }
    )
    moments, memory, running = list[float](), list[tuple[float, float]](), threading.Event()
    step = PretrainingModule.training_step

    def timed_step(module: PretrainingModule, batch: object, batch_idx: int) -> object:
        moments.append(time.perf_counter())
        return step(module, batch, batch_idx)  # type: ignore[arg-type]

    PretrainingModule.training_step = timed_step  # type: ignore[assignment, method-assign]

    def sample() -> None:
        while not running.wait(0.2):
            status = Path("/proc/self/status").read_text().splitlines()
            held = int(next(line for line in status if line.startswith("RssAnon")).split()[1]) / 1024
            memory.append((time.perf_counter(), held))

    started = time.perf_counter()
    threading.Thread(target=sample, daemon=True).start()
    run(config)
    running.set()
    sampled = np.array(memory)
    trained = sampled[(sampled[:, 0] > moments[20]) & (sampled[:, 0] < moments[-1]), 1]
    tenth = max(len(trained) // 10, 1)
    return {
        "first": moments[0] - started,
        "rate": 256 * (len(moments) - 1) / (moments[-1] - moments[0]),
        "early": float(np.median(trained[:tenth])),
        "late": float(np.median(trained[-tenth:])),
        "peak": float(sampled[:, 1].max()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--steps", type=int, help="optimizer steps; default: an epoch")
    parser.add_argument("--folder", type=Path, help="keep the cells in this folder, and use what is there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(options.folder or temporary)
        harness.fresh(make_shards, folder=folder, n_cells=options.cells)
        seen = harness.fresh(train, folder=folder, n_cells=options.cells, steps=options.steps)
    rows = [
        harness.Row("from imports to the first step", seen["first"], "s"),
        harness.Row("training", seen["rate"], "cells/s"),
        harness.Row("memory in the first tenth", seen["early"], "MiB"),
        harness.Row("memory in the last tenth", seen["late"], "MiB", seen["early"]),
        harness.Row("peak memory", seen["peak"], "MiB"),
    ]
    harness.report(
        f"training on {options.cells:,} cells in shards", rows, harness.versions("lightning"), options.json
    )


if __name__ == "__main__":
    main()
