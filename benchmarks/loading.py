"""How fast do cells come off the disk and become tokens?

Makes one contiguous .h5ad file of synthetic cells (20,120 genes, 1,640 counts a cell on average) and measures, each in
fresh processes that take turns: a plain compiled gather from the mapped arrays (the limit), and ours with a true global
shuffle, batches of 64 and two threads, up to cells in the gene space of the vocabulary (csr), rank tokens, masked rank
tokens, and bins. Memory is the peak of the process's anonymous memory.

    python benchmarks/loading.py --cells 20000 --json loading.json
    python benchmarks/loading.py --cells 200000 --peers
    python benchmarks/loading.py --cells 200000 --peers --peer-python A/bin/python --peer-python B/bin/python

`--peers` also times what is installed (here, or in the environments that are named) of: bionemo-scdl, annbatch,
scDataset, AnnCollection, a plain DataLoader over AnnData. Randomness is 1 for a true global shuffle. The row
`conversion` is `scmodelforge shard`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import harness
import loading_peers
import numpy as np
from loading_peers import BATCH, DIGITS, PeakMemory, measure, row_numbers

Run = Callable[[], dict[str, float] | None]

THREADS, COUNTS_PER_CELL = 2, 1640
OURS = ("csr", "rank", "rank+mask", "binned")
BLOCK = 10_000


def write_cells(path: str, n_cells: int) -> None:
    """Write the synthetic cells: genes by a log-normal popularity, small counts; the row number in the first two."""
    import anndata as ad
    import pandas as pd

    from scmodelforge.genes.vocab import predefined

    rng = np.random.default_rng(0)
    genes = predefined("human_protein_coding").gene_ids
    popularity = rng.lognormal(sigma=1.5, size=len(genes))
    obs = pd.DataFrame(index=pd.RangeIndex(n_cells).astype(str))
    ad.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(genes))).write_h5ad(path)
    lengths = rng.integers(COUNTS_PER_CELL // 2, 3 * COUNTS_PER_CELL // 2, n_cells)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    if indptr[-1] < 2**31:  # scipy computes with two int32, or two int64, not with one of each
        indptr = indptr.astype(np.int32)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        shape = (n_cells, len(genes))
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        group.create_dataset("indptr", data=indptr)
        indices = group.create_dataset("indices", shape=(int(indptr[-1]),), dtype=np.int32)
        data = group.create_dataset("data", shape=(int(indptr[-1]),), dtype=np.uint16)
        # A pool of gene sets keeps the making short; counts are drawn for each cell.
        popularity[:2] = np.inf  # every cell has the first two genes
        pool = [
            np.argsort(rng.exponential(size=len(genes)) / popularity)[: 2 * COUNTS_PER_CELL]
            for _ in range(64)
        ]
        for start in range(0, n_cells, BLOCK):
            stop = min(start + BLOCK, n_cells)
            rows = [np.sort(pool[i % len(pool)][: lengths[i]]) for i in range(start, stop)]
            indices[indptr[start] : indptr[stop]] = np.concatenate(rows)
            counts = rng.geometric(0.5, int(indptr[stop] - indptr[start]))
            first, row = indptr[start:stop] - indptr[start], np.arange(start, stop)
            counts[first], counts[first + 1] = row % DIGITS + 1, row // DIGITS + 1
            data[indptr[start] : indptr[stop]] = counts


def raw_gather(path: str) -> dict[str, float]:
    """The limit: rows gathered by a compiled loop, nothing else."""
    import numba

    @numba.njit(nogil=True)
    def gather(indptr: Any, indices: Any, data: Any, rows: Any, genes: Any, counts: Any) -> int:
        end = 0
        for row in rows:
            for j in range(indptr[row], indptr[row + 1]):
                genes[end], counts[end] = indices[j], data[j]
                end += 1
        return end

    from scmodelforge.data.sources import open_matrix

    held, _ = open_matrix(path).arrays(np.arange(1))
    order = np.random.default_rng(0).permutation(len(held.indptr) - 1)

    def batches() -> Iterator[int]:
        for start in range(0, len(order) - BATCH, BATCH):
            rows = order[start : start + BATCH]
            size = int((held.indptr[rows + 1] - held.indptr[rows]).sum())
            gather(*held, rows, np.empty(size, np.int32), np.empty(size, np.float32))
            yield rows

    return measure(batches, lambda rows: rows, len(order))


def ours(path: str, stage: str) -> dict[str, float]:
    """Our loader up to a stage: csr, rank, rank+mask or binned."""
    from scmodelforge.config import Config
    from scmodelforge.data.loader import BatchLoader
    from scmodelforge.data.order import GlobalShuffle
    from scmodelforge.data.store import open_store
    from scmodelforge.genes.vocab import predefined
    from scmodelforge.models.objectives import build_objective
    from scmodelforge.tokenizers.base import build_tokenizer

    strategy = "binned_expression" if stage == "binned" else "rank_value"
    task = "expression_reconstruction" if stage == "binned" else "masked_gene_prediction"
    config = Config.model_validate({"tokenizer": {"strategy": strategy}, "model": {"pretraining_task": task}})
    vocab = predefined("human_protein_coding")
    if strategy == "rank_value":
        vocab = vocab.with_medians(np.random.default_rng(0).uniform(0.5, 20, vocab.n_genes))
    store = open_store([path], vocab, config.data)
    tokenizer, objective = build_tokenizer(config, vocab), build_objective(config, vocab)
    order = GlobalShuffle(np.arange(store.n_cells), seed=0)

    def make(epoch: int, step: int) -> Any:
        cells = store.read(order.batch(epoch, step, BATCH, 0, 1).rows)
        if stage == "csr":
            return cells
        tokens = tokenizer(cells, 0, epoch)
        return objective.corrupt(tokens, 0, epoch).tokens if stage == "rank+mask" else tokens

    def rows_of(batch: Any) -> np.ndarray:
        if stage == "csr":  # read off the counts, as of the peers
            first = batch.indptr[:-1]
            return row_numbers(batch.counts[first], batch.counts[first + 1])
        return batch.cell_index.numpy()

    n_steps = store.n_cells // BATCH
    return measure(lambda: iter(BatchLoader(make, n_steps, THREADS)), rows_of, store.n_cells)


def conversion(path: str) -> dict[str, float]:
    """`scmodelforge shard`: the file read, mapped to the vocabulary, written, and both hashed."""
    from scmodelforge.config import DataConfig
    from scmodelforge.data.shards import write_shards
    from scmodelforge.genes.vocab import predefined

    vocab = predefined("human_protein_coding")
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder, PeakMemory() as memory:
        started = time.perf_counter()
        records = write_shards([path], vocab, DataConfig(), folder)
        seconds = time.perf_counter() - started
    return {"rate": sum(record.n_cells for record in records) / seconds, "memory": memory.peak}


def rounds(runs: dict[str, Run], n: int) -> dict[str, dict[str, float]]:
    """Call all `runs` once a round, each round beginning with the next of them; medians of what they give."""
    names, seen = list(runs), {name: list[dict[str, float]]() for name in runs}
    for turn in range(n):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            if (figures := runs[name]()) is not None:
                seen[name].append(figures)
    return {
        name: {key: float(np.median([each[key] for each in figures])) for key in figures[0]}
        for name, figures in seen.items()
    }


def installed(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs of peers that are installed, which each is asked once."""
    found = {}
    for name, run in runs.items():
        if run() is None:
            print(f"{name}: not installed")
        else:
            found[name] = run
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="also time other loaders")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        help="interpreter of an environment with peers (repeatable)",
    )
    parser.add_argument("--folder", type=Path, help="keep the cells in this folder, and use what is there")
    parser.add_argument("--only", nargs="*", help="names of the rows to measure; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = f"{options.folder or temporary}/cells_{options.cells}.h5ad"
        if not Path(path).exists():
            write_cells(path, options.cells)
        runs: dict[str, Run] = {"raw gather": partial(harness.fresh, raw_gather, path=path)}
        runs |= {f"ours/{stage}": partial(harness.fresh, ours, path=path, stage=stage) for stage in OURS}
        runs["conversion"] = partial(harness.fresh, conversion, path=path)
        if options.peers:
            peers: dict[str, Run] = {}
            for name, (peer, arguments) in loading_peers.PEERS.items():
                for python in options.peer_python or [sys.executable]:
                    peers.setdefault(
                        name if python == sys.executable else f"{name} ({Path(python).parts[-3]})",
                        partial(harness.fresh, peer, python=python, path=path, **arguments),
                    )
            runs |= installed(peers)
        if options.only:
            runs = {name: run for name, run in runs.items() if name in options.only}
        figures = rounds(runs, options.rounds)
    title = f"loading {options.cells:,} cells; peer: the raw gather"
    limit = figures.get("raw gather", {}).get("rate")
    rows = [harness.Row(name, each["rate"], "cells/s", limit) for name, each in figures.items()]
    rows += [harness.Row(f"{name}, memory", each["memory"], "MiB") for name, each in figures.items()]
    rows += [
        harness.Row(f"{name}, randomness", each["randomness"], "of a perfect shuffle")
        for name, each in figures.items()
        if "randomness" in each
    ]
    best = max(
        (each["rate"] for name, each in figures.items() if name.split(" (")[0] in loading_peers.PEERS),
        default=None,
    )
    if best and "ours/csr" in figures:
        rows.append(harness.Row("ours/csr over the best peer", figures["ours/csr"]["rate"], "cells/s", best))
    harness.report(title, rows, harness.versions("anndata", "h5py", "numba"), options.json)


if __name__ == "__main__":
    main()
