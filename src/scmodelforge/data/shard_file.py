"""One shard: an .h5ad file whose arrays lie in one piece each, written by blocks of cells.

Layout of `X`: `indptr` int64, `indices` int32 and `data` in the smallest type that holds the counts (uint8, uint16,
uint32, or float32 where they are no whole numbers), all contiguous and uncompressed, and so are numeric columns of
obs. Indices would fit uint16, and a third of the bytes would be saved. But then scipy (1.17) refuses `tocoo`,
`multiply`, `eliminate_zeros` and `sum_duplicates` ("Output dtype not compatible with inputs"), torch takes no such
indices, and a shard has to be an ordinary file for everyone.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from scmodelforge.data.h5ad import LIBRARY_SIZE
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError
from scmodelforge.files import atomic_path

BLOCK_CELLS = 2_048
COPY_ENTRIES = 2**22
HASH_BYTES = 2**22


def write_shard(
    target: Path, store: CellStore, rows: np.ndarray, obs: pd.DataFrame, gene_column: str | None
) -> int:
    """Write cells of a store as one shard; returns the number of counts.

    Parameters
    ----------
    rows
        int64: the cells, in this order.
    obs
        Their annotations; the library size is added.
    gene_column
        Column of var that gets the gene ids as well, for configs that name it.
    """
    vocab = store.vocab
    var = pd.DataFrame({"symbol": vocab.symbols, "biotype": vocab.biotypes}, index=pd.Index(vocab.gene_ids))
    if gene_column not in (None, "index"):
        var[gene_column] = vocab.gene_ids
    lengths, libraries, largest, whole = [], [], 0.0, True
    with (
        tempfile.TemporaryFile(dir=target.parent) as genes,
        tempfile.TemporaryFile(dir=target.parent) as counts,
        atomic_path(target) as temporary,
    ):
        for start in range(0, len(rows), BLOCK_CELLS):
            cells = store.read(rows[start : start + BLOCK_CELLS])
            lengths.append(cells.n_genes_per_cell)
            libraries.append(cells.library_size)
            largest = max(largest, float(cells.counts.max(initial=0)))
            whole = whole and bool((cells.counts == np.rint(cells.counts)).all())
            genes.write(cells.gene_ids.data)
            counts.write(cells.counts.data)
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        ad.AnnData(obs=obs.assign(**{LIBRARY_SIZE: np.concatenate(libraries)}), var=var).write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            if "X" in file:
                del file["X"]
            group = file.create_group("X")
            shape = (len(rows), vocab.n_genes)
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
            group.create_dataset("indptr", data=indptr)
            _copy(genes, np.dtype(np.int32), group, "indices", np.dtype(np.int32))
            _copy(counts, np.dtype(np.float32), group, "data", _smallest(largest, whole))
    return int(indptr[-1])


def _copy(held: IO[bytes], dtype: np.dtype, group: h5py.Group, name: str, stored: np.dtype) -> None:
    """Write the numbers in a file as a dataset; without chunks, so it is contiguous."""
    n_entries = held.seek(0, os.SEEK_END) // dtype.itemsize
    dataset = group.create_dataset(name, shape=(n_entries,), dtype=stored)
    held.seek(0)
    for begin in range(0, n_entries, COPY_ENTRIES):
        block = np.frombuffer(held.read(dtype.itemsize * COPY_ENTRIES), dtype=dtype)
        dataset[begin : begin + len(block)] = block.astype(stored, copy=False)


def _smallest(largest: float, whole: bool) -> np.dtype:
    """The smallest type that holds numbers from 0 to `largest` (float32 from 2**24 on, as they were read)."""
    if not whole or largest >= 2**24:
        return np.dtype(np.float32)
    return np.dtype(next(kind for kind in (np.uint8, np.uint16, np.uint32) if largest <= np.iinfo(kind).max))


def file_sha256(path: str | Path) -> str:
    """The sha256 (hex) of a file's bytes; hashing leaves the processor to other threads.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(HASH_BYTES):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {os.strerror(error.errno or 0)}.") from error
