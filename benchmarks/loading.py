"""How fast do cells come off the disk and become tokens?

Makes one contiguous .h5ad file of synthetic cells (20,120 genes, 1,640 counts a cell on average) and measures, each in
fresh processes that take turns: a plain compiled gather from the mapped arrays (the limit), and ours with a true global
shuffle, batches of 64 and two threads, up to cells in the gene space of the vocabulary (csr), rank tokens, masked rank
tokens, and bins. Memory is the peak of the process's anonymous memory.

    python benchmarks/loading.py --cells 20000 --json loading.json
    python benchmarks/loading.py --cells 200000 --peers

`--peers` also times what is installed of: AnnCollection, a plain DataLoader over a backed AnnData.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import harness
import numpy as np

BATCH, THREADS, COUNTS_PER_CELL, MAX_SECONDS = 64, 2, 1640, 6.0
OURS = ("csr", "rank", "rank+mask", "binned")
BLOCK = 10_000


def write_cells(path: str, n_cells: int) -> None:
    """Write the synthetic cells: genes by a log-normal popularity, small counts."""
    import anndata as ad
    import pandas as pd

    from scmodelforge.genes.vocab import predefined

    rng = np.random.default_rng(0)
    genes = predefined("human_protein_coding").gene_ids
    popularity = rng.lognormal(sigma=1.5, size=len(genes))
    obs = pd.DataFrame(index=pd.RangeIndex(n_cells).astype(str))
    ad.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(genes))).write_h5ad(path)
    lengths = rng.integers(COUNTS_PER_CELL // 2, 3 * COUNTS_PER_CELL // 2, n_cells)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
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
        pool = [
            np.argsort(rng.exponential(size=len(genes)) / popularity)[: 2 * COUNTS_PER_CELL]
            for _ in range(64)
        ]
        for start in range(0, n_cells, BLOCK):
            stop = min(start + BLOCK, n_cells)
            rows = [np.sort(pool[i % len(pool)][: lengths[i]]) for i in range(start, stop)]
            indices[indptr[start] : indptr[stop]] = np.concatenate(rows)
            data[indptr[start] : indptr[stop]] = rng.geometric(0.5, int(indptr[stop] - indptr[start]))


class PeakMemory:
    """Samples the anonymous memory of this process, in MiB."""

    def __init__(self) -> None:
        self.peak, self.running = 0.0, True
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    def _sample(self) -> None:
        status = Path("/proc/self/status")
        while self.running and status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) / 1024)
            time.sleep(0.02)


def measure(batches: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Cells/s of an iterator of batch sizes after one warm-up batch, and the peak memory in MiB."""
    next(batches())
    with PeakMemory() as memory:
        n_cells, started = 0, time.perf_counter()
        for n in batches():
            n_cells += n
            if time.perf_counter() - started > MAX_SECONDS:
                break
        seconds = time.perf_counter() - started
    return {"rate": n_cells / seconds, "memory": memory.peak}


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

    from scmodelforge.data.h5ad import open_matrix

    held, _ = open_matrix(path).arrays(np.arange(1))
    order = np.random.default_rng(0).permutation(len(held.indptr) - 1)

    def batches() -> Iterator[int]:
        for start in range(0, len(order) - BATCH, BATCH):
            rows = order[start : start + BATCH]
            size = int((held.indptr[rows + 1] - held.indptr[rows]).sum())
            gather(*held, rows, np.empty(size, np.int32), np.empty(size, np.float32))
            yield BATCH

    return measure(batches)


def ours(path: str, stage: str) -> dict[str, float]:
    """Our loader up to a stage: csr, rank, rank+mask or binned."""
    from scmodelforge.config import Config
    from scmodelforge.data.loader import BatchLoader
    from scmodelforge.data.order import batch_rows
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
    rows = np.arange(store.n_cells)

    def make(epoch: int, step: int) -> int:
        cells = store.read(batch_rows(rows, step, BATCH, 0, epoch, True, 0, 1))
        if stage != "csr":
            tokens = tokenizer(cells, 0, epoch)
            if stage == "rank+mask":
                objective.corrupt(tokens, 0, epoch)
        return cells.n_cells

    return measure(lambda: iter(BatchLoader(make, len(rows) // BATCH, THREADS)))


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


def ann_collection(path: str) -> dict[str, float]:
    """anndata's AnnCollection over the backed file, shuffled batches."""
    import anndata as ad
    from anndata.experimental import AnnCollection

    backed = ad.read_h5ad(path, backed="r")
    collection = AnnCollection([backed], join_vars="inner")
    order = np.random.default_rng(0).permutation(backed.n_obs)

    def batches() -> Iterator[int]:
        for start in range(0, len(order) - BATCH, BATCH):
            yield collection[np.sort(order[start : start + BATCH])].X.shape[0]

    return measure(batches)


def plain_loader(path: str) -> dict[str, float]:
    """torch's DataLoader over single rows of the backed file, without workers."""
    import anndata as ad
    from torch.utils.data import DataLoader

    backed = ad.read_h5ad(path, backed="r")

    class Cells:
        def __len__(self) -> int:
            return backed.n_obs

        def __getitem__(self, row: int) -> np.ndarray:
            return backed.X[row].toarray()[0]

    loader = DataLoader(Cells(), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type, var-annotated]
    return measure(lambda: (len(batch) for batch in loader))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="also time other loaders")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/cells.h5ad"
        write_cells(path, options.cells)
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "raw gather": partial(harness.fresh, raw_gather, path=path)
        }
        runs |= {f"ours/{stage}": partial(harness.fresh, ours, path=path, stage=stage) for stage in OURS}
        runs["conversion"] = partial(harness.fresh, conversion, path=path)
        if options.peers:
            runs["AnnCollection"] = partial(harness.fresh, ann_collection, path=path)
            runs["DataLoader over AnnData"] = partial(harness.fresh, plain_loader, path=path)
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(options.rounds):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                seen[name].append(runs[name]())
    figures = {
        name: {key: float(np.median([value[key] for value in values])) for key in ("rate", "memory")}
        for name, values in seen.items()
    }
    rows = [
        harness.Row(name, figure["rate"], "cells/s", figures["raw gather"]["rate"])
        for name, figure in figures.items()
    ]
    rows += [harness.Row(f"{name}, memory", figure["memory"], "MiB") for name, figure in figures.items()]
    title = f"loading {options.cells:,} cells; peer: the raw gather"
    harness.report(title, rows, harness.versions("anndata", "h5py", "numba"), options.json)


if __name__ == "__main__":
    main()
