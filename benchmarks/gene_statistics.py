"""How fast are gene medians, gene statistics and highly variable genes measured, and in how much memory?

Makes one contiguous .h5ad file of synthetic cells (see `loading.py`) and measures, each in fresh processes that take
turns: ours out of core with `--threads` threads, and the same in memory by `np.median` over each gene's column and by
`scanpy.pp.highly_variable_genes`; reading the file is part of the time of both. Rates are cells/s of the whole, which
is two passes or three for medians; `a pass` is the first of them. Memory is the peak of the process's anonymous memory.
"seconds of CPU" are those of all threads, and tell more than the rates where the machine is shared.

    python benchmarks/gene_statistics.py --cells 20000 --json statistics.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from loading import PeakMemory, write_cells

TARGET_SUM, N_TOP_GENES = 10_000, 2_000
OURS = ("a pass", "medians", "gene statistics", "hvg seurat", "hvg cell_ranger")
IN_MEMORY = {"medians": "np.median", "hvg seurat": "scanpy seurat", "hvg cell_ranger": "scanpy cell_ranger"}


def measure(run: Callable[[], Any], n_cells: int) -> dict[str, float]:
    """Cells/s, CPU seconds and peak memory in MiB of one call."""
    with PeakMemory() as memory:
        started, cpu = time.perf_counter(), time.process_time()
        run()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"rate": n_cells / seconds, "cpu": cpu, "memory": memory.peak}


def ours(path: str, what: str, threads: int) -> dict[str, float]:
    """Out of core; kernels are loaded from their cache before the clock starts."""
    from scmodelforge.config import DataConfig, HighlyVariableGenes, Preprocessing
    from scmodelforge.data.medians import BinCounts, Scale
    from scmodelforge.data.passes import map_blocks
    from scmodelforge.data.statistics import gene_medians, gene_statistics
    from scmodelforge.data.store import open_store
    from scmodelforge.data.variable_genes import select_hvg
    from scmodelforge.genes.vocab import predefined

    store = open_store([path], predefined("human_protein_coding"), DataConfig())

    def first_pass(rows: np.ndarray) -> None:
        bins, scale = BinCounts(store.vocab.n_genes, threads), Scale(TARGET_SUM, "library_size")
        for _ in map_blocks(store, rows, threads, lambda cells: bins.count(cells, scale)):
            pass

    def hvg(rows: np.ndarray, flavor: Any) -> None:
        n_top_genes = min(N_TOP_GENES, len(rows))
        select_hvg(
            store, rows, HighlyVariableGenes(n_top_genes=n_top_genes, flavor=flavor), Preprocessing(), threads
        )

    runs: dict[str, Callable[[np.ndarray], Any]] = {
        "a pass": first_pass,
        "medians": lambda rows: gene_medians(store, rows, TARGET_SUM, "library_size", threads),
        "gene statistics": lambda rows: gene_statistics(store, rows, Preprocessing(), threads),
        "hvg seurat": partial(hvg, flavor="seurat"),
        "hvg cell_ranger": partial(hvg, flavor="cell_ranger"),
    }
    runs[what](np.arange(64))
    return measure(partial(runs[what], np.arange(store.n_cells)), store.n_cells)


def in_memory(path: str, what: str) -> dict[str, float]:
    """The usual way: the whole matrix, normalized."""
    import anndata as ad
    import scanpy as sc

    def normalized(dtype: type, n_cells: int | None = None) -> ad.AnnData:
        adata = ad.read_h5ad(path)[:n_cells].copy()
        adata.X = adata.X.astype(dtype)
        sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
        return adata

    def np_medians() -> None:
        columns = normalized(np.float64).X.tocsc()
        for gene in np.split(columns.data, columns.indptr[1:-1]):
            if len(gene):
                np.median(gene)

    def hvg(flavor: str, n_cells: int | None = None) -> None:
        adata = normalized(np.float32, n_cells)
        sc.pp.filter_genes(adata, min_cells=1)
        sc.pp.log1p(adata)
        sc.pp.highly_variable_genes(adata, n_top_genes=N_TOP_GENES, flavor=flavor)

    run = np_medians
    if what != "medians":
        hvg("seurat", 64)  # compiles
        run = partial(hvg, what.split()[1])
    return measure(run, len(ad.read_h5ad(path, backed="r").obs))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/cells.h5ad"
        write_cells(path, options.cells)
        runs: dict[str, Callable[[], dict[str, float]]] = {
            what: partial(harness.fresh, ours, path=path, what=what, threads=options.threads) for what in OURS
        }
        runs |= {
            name: partial(harness.fresh, in_memory, path=path, what=what) for what, name in IN_MEMORY.items()
        }
        runs["a pass"]()  # compiles, once for all processes
        names, seen = list(runs), {name: list[dict[str, float]]() for name in runs}
        for turn in range(options.rounds):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                seen[name].append(runs[name]())
    rows = []
    for key, unit in (("rate", "cells/s"), ("cpu", "seconds of CPU"), ("memory", "MiB")):
        figures = {name: float(np.median([value[key] for value in values])) for name, values in seen.items()}
        rows += [
            harness.Row(what, figures[what], unit, figures.get(IN_MEMORY.get(what, ""))) for what in OURS
        ]
    title = f"statistics of {options.cells:,} cells; peer: the same in memory"
    harness.report(title, rows, harness.versions("anndata", "scanpy", "numba"), options.json)


if __name__ == "__main__":
    main()
