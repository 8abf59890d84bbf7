"""Is anything lost when `shard` or `train` is killed? Kills each many times and compares with what was left alone.

`scmodelforge shard` and `scmodelforge train` (on those shards, a checkpoint every second step) run as their own
processes and get SIGKILL after a random time, drawn from a seed, again and again; each next start goes on where
the last one was. At the end the shards must hold the same bytes of cells, with no file too many, and the last
checkpoint the same weights, bit for bit, as those of a conversion and a run that nobody disturbed.

    python benchmarks/kill.py --kills 20 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

N_CELLS, N_GENES, EPOCHS = 3_000, 400, 3
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def write_cells(path: Path, seed: int, n_cells: int) -> None:
    """Cells of invented counts over known genes, compressed as a slow file is."""
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    from scmodelforge.genes.vocab import predefined

    counts = np.random.default_rng(seed).poisson(0.4, (n_cells, N_GENES)).astype(np.float32)
    genes = predefined("human_protein_coding").gene_ids[:N_GENES].astype(str)
    obs = pd.DataFrame(index=[f"{path.stem}{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=genes)
    ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(path, compression="gzip")


def one_thread() -> dict[str, str]:
    """The environment of a process whose sums have one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def killed_until_done(command: list[str], kills: int, longest: float, rng: np.random.Generator) -> int:
    """Run a command, kill it up to `kills` times at random moments, then let it end; returns the kills."""
    done = 0
    while True:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=one_thread()
        )
        try:
            output, _ = process.communicate(timeout=rng.uniform(0, longest) if done < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
            continue
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output.decode()}")
        return done


def cells_in(folder: Path) -> dict[str, str]:
    """What the manifest says of each shard, and the cells in it: checksum of counts, genes, names."""
    import hashlib

    import anndata as ad

    from scmodelforge.data.shards import verify_shards

    if problems := verify_shards(folder):
        raise SystemExit("\n".join(problems))
    found = {}
    for record in json.loads((folder / "manifest.json").read_text())["shards"]:
        cells = ad.read_h5ad(folder / record["name"])
        digest = hashlib.sha256()
        for part in (cells.X.indptr, cells.X.indices, cells.X.data, "\n".join(cells.obs_names).encode()):
            digest.update(part)
        found[record["name"]] = f"{record['first_cell']}+{record['n_cells']} {digest.hexdigest()}"
    return found


def kill_shard(work: Path, kills: int, rng: np.random.Generator) -> int:
    """Convert two files, undisturbed and killed; raise unless the outcome is the same. Returns the kills."""
    files = [work / "one.h5ad", work / "two.h5ad"]
    for seed, path in enumerate(files):
        write_cells(path, seed, N_CELLS * (seed + 1))
    config = work / "shard.yaml"
    config.write_text(json.dumps({"data": {"paths": list(map(str, files))}}))
    command = [sys.executable, "-m", "scmodelforge.cli", "shard", "--config", str(config)]
    command += ["--cells-per-shard", "500", "--set", "data.min_gene_overlap=0", "--output"]
    started = time.perf_counter()
    subprocess.run([*command, str(work / "whole")], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    command += [str(work / "killed"), "--processes", "2"]
    done = killed_until_done(command, kills, seconds, rng)
    if cells_in(work / "whole") != cells_in(work / "killed"):
        raise SystemExit("The killed conversion holds other cells.")
    names = [{path.name for path in (work / name).iterdir()} for name in ("whole", "killed")]
    if names[0] != names[1]:
        raise SystemExit(f"Files too many or too few: {sorted(names[0] ^ names[1])}")
    return done


def kill_train(work: Path, kills: int, rng: np.random.Generator) -> int:
    """Train on the shards, undisturbed and killed; raise unless the weights are the same. Returns the kills."""
    import torch

    from scmodelforge.models.bundle import read_checkpoint

    config = {
        "data": {"paths": [str(work / "whole")], "gene_vocab": "from_data"},
        "tokenizer": {"max_genes": 32},
        "model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2},
        "training": {"batch_size": 512, "max_epochs": EPOCHS, "checkpoint_every_n_steps": 2, "num_gpus": 0},
    }
    (work / "train.yaml").write_text(json.dumps(config))

    def command(run: str) -> list[str]:
        last = work / run / "checkpoints/last.ckpt"
        start = [sys.executable, "-m", "scmodelforge.cli", "train", "--config", str(work / "train.yaml")]
        start += ["--set", f"training.run_dir={work / run}"]
        return [*start, "--resume", str(last)] if last.exists() else start

    started = time.perf_counter()
    process = subprocess.Popen(command("undisturbed"), env=one_thread(), **SILENT)
    while process.poll() is None and not (work / "undisturbed/checkpoints/last.ckpt").exists():
        time.sleep(0.05)
    first = time.perf_counter() - started
    if process.wait():
        raise SystemExit("The undisturbed run failed.")
    steps = time.perf_counter() - started - first
    done = 0
    for _ in range(kills):
        process = subprocess.Popen(command("disturbed"), env=one_thread(), **SILENT)
        try:
            code = process.wait(timeout=rng.uniform(first / 2, first + steps / 8))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done, code = done + 1, 0
        if code:
            raise SystemExit(f"A resumed run ended with {code}.")
    killed_until_done(command("disturbed"), 0, 0, rng)
    last = [read_checkpoint(work / run / "checkpoints/last.ckpt") for run in ("undisturbed", "disturbed")]
    same = all(
        torch.equal(tensor, last[1]["state_dict"][name]) for name, tensor in last[0]["state_dict"].items()
    )
    if not same or last[0]["global_step"] != last[1]["global_step"]:
        raise SystemExit("The killed run ended with other weights.")
    return done


def main() -> None:
    """Kill, compare, say how often it was killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("shard", "train"))
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    work = Path(tempfile.mkdtemp())
    try:
        n_killed = kill_shard(work, options.kills if options.only != "train" else 0, rng)
        print(f"shard: killed {n_killed} times, nothing lost, nothing double", flush=True)
        if options.only != "shard":
            n_killed = kill_train(work, options.kills, rng)
            print(f"train: killed {n_killed} times, the same weights", flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
