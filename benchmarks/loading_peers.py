"""Other loaders for `loading.py`, and how all of them are measured.

Imports nothing of ours, so that a peer can run in an environment of its own. Each peer is a function of the .h5ad file
that gives cells/s, memory and randomness; None where it is not installed. The row number of a cell is written in the
counts of its first two genes (`row_numbers`), so that it can be told which cells a loader puts into one batch.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, MAX_SECONDS, DIGITS = 64, 6.0, 1000
STRETCH, LOOKED_AT = 256, 30  # randomness: neighbours, and batches that are looked at


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


def row_numbers(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row numbers from the counts of the first two genes."""
    return (np.asarray(first) - 1).astype(np.int64) + (np.asarray(second) - 1).astype(np.int64) * DIGITS


def randomness(rows: list[np.ndarray], n_cells: int) -> float:
    """Stretches of 256 neighbours that a batch touches, over the expectation for a perfect shuffle; 1: as random."""
    n_stretches = n_cells / STRETCH
    touched = np.mean([len(np.unique(batch // STRETCH)) for batch in rows])
    return float(touched / (n_stretches * (1 - (1 - 1 / n_stretches) ** BATCH)))


def measure(
    batches: Callable[[], Iterator[Any]], rows_of: Callable[[Any], np.ndarray], n_cells: int
) -> dict[str, float]:
    """Cells/s after a warm-up, the peak memory in MiB, and how random the batches are."""
    with PeakMemory() as memory:
        looked_at = []
        for batch in batches():
            looked_at.append(rows_of(batch))
            if len(looked_at) == LOOKED_AT:
                break
        n, started = 0, time.perf_counter()
        for _ in batches():
            n += BATCH
            if time.perf_counter() - started > MAX_SECONDS:
                break
        seconds = time.perf_counter() - started
    return {"rate": n / seconds, "memory": memory.peak, "randomness": randomness(looked_at, n_cells)}


def _missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


def _dense_rows(batch: Any) -> np.ndarray:
    dense = batch.to_dense().numpy() if hasattr(batch, "to_dense") else np.asarray(batch.todense())
    return row_numbers(dense[:, 0], dense[:, 1])


def ann_collection(path: str) -> dict[str, float] | None:
    """anndata's AnnCollection over the backed file, shuffled batches."""
    if _missing("anndata"):
        return None
    import anndata as ad
    from anndata.experimental import AnnCollection

    backed = ad.read_h5ad(path, backed="r")
    collection = AnnCollection([backed], join_vars="inner")
    order = np.random.default_rng(0).permutation(backed.n_obs)

    def batches() -> Iterator[Any]:
        for start in range(0, len(order) - BATCH, BATCH):
            yield collection[np.sort(order[start : start + BATCH])].X

    return measure(batches, _dense_rows, len(order))


def plain_loader(path: str) -> dict[str, float] | None:
    """torch's DataLoader over single rows of the backed file, without workers."""
    if _missing("anndata", "torch"):
        return None
    import anndata as ad
    import torch
    from torch.utils.data import DataLoader

    backed = ad.read_h5ad(path, backed="r")

    class Cells:
        def __len__(self) -> int:
            return backed.n_obs

        def __getitem__(self, row: int) -> torch.Tensor:
            return torch.from_numpy(backed.X[row].toarray()[0].astype(np.float32))

    loader = DataLoader(Cells(), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type, var-annotated]
    return measure(lambda: iter(loader), _dense_rows, backed.n_obs)


def bionemo_scdl(path: str) -> dict[str, float] | None:
    """BioNeMo's memory-mapped data set in torch's DataLoader, made from the file before."""
    if _missing("bionemo.scdl" if importlib.util.find_spec("bionemo") else "bionemo"):
        return None
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    made = Path(f"{path}.scdl")
    if not made.exists():
        SingleCellMemMapDataset(str(made), h5ad_path=path, use_X_not_raw=True)
    cells = SingleCellMemMapDataset(str(made))
    loader = DataLoader(cells, batch_size=BATCH, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    return measure(lambda: iter(loader), _dense_rows, len(cells))


def sc_dataset(path: str, block: int) -> dict[str, float] | None:
    """scDataset over AnnCollection of the backed file, blocks of so many neighbours."""
    if _missing("scdataset", "anndata"):
        return None
    import anndata as ad
    from anndata.experimental import AnnCollection
    from scdataset import BlockShuffling, scDataset

    collection = AnnCollection([ad.read_h5ad(path, backed="r")], join_vars="inner")

    def batches() -> Iterator[Any]:
        yield from scDataset(
            collection,
            BlockShuffling(block_size=block),
            batch_size=BATCH,
            fetch_factor=64,
            fetch_transform=lambda fetched: fetched.X,
        )

    return measure(batches, _dense_rows, collection.shape[0])


def annbatch(path: str, chunk: int) -> dict[str, float] | None:
    """annbatch over a zarr collection of its own making, not shuffled before, chunks of so many neighbours."""
    if _missing("annbatch"):
        return None
    import zarr
    from annbatch import DatasetCollection, Loader

    made = Path(f"{path}.annbatch.zarr")
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            DatasetCollection(f"{folder}/made.zarr").add_adatas([path], shuffle=False)
            shutil.move(f"{folder}/made.zarr", made)
    if importlib.util.find_spec("zarrs"):  # the codecs that its authors recommend
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})

    def batches() -> Iterator[Any]:
        loader = Loader(
            chunk_size=chunk,
            preload_nchunks=min(4096 // chunk, 512),
            batch_size=BATCH,
            shuffle=True,
            preload_to_gpu=False,
        )
        loader.use_collection(DatasetCollection(str(made), mode="r"))
        for batch in loader:
            yield batch["X"] if isinstance(batch, dict) else batch

    n_cells = len(DatasetCollection(str(made), mode="r").obs())
    return measure(batches, _dense_rows, n_cells)


PEERS: dict[str, tuple[Callable[..., dict[str, float] | None], dict[str, int]]] = {
    "bionemo-scdl": (bionemo_scdl, {}),
    "annbatch, chunks of 32": (annbatch, {"chunk": 32}),
    "annbatch, chunks of 1": (annbatch, {"chunk": 1}),
    "scDataset, blocks of 16": (sc_dataset, {"block": 16}),
    "scDataset, blocks of 1": (sc_dataset, {"block": 1}),
    "AnnCollection": (ann_collection, {}),
    "DataLoader over AnnData": (plain_loader, {}),
}
