"""One shard: an .h5ad file whose arrays lie in one piece each, written by blocks of cells.

Layout of `X`: `indptr` and `indices` int32 and `data` in the smallest type that holds the counts (uint8, uint16,
uint32, or float32 where they are no whole numbers), all contiguous and uncompressed, and so are numeric columns of
obs. Indices would fit uint16, and a third of the bytes would be saved. But scipy (1.17) computes with index arrays that
are both int32 or both int64 alone: of any others `tocoo`, `multiply`, `eliminate_zeros` and `sort_indices` end with
"Output dtype not compatible with inputs". So both are int64 where a shard has 2**31 counts, which takes more than
100,000 cells.
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

from scmodelforge.data.matrix import LIBRARY_SIZE
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError
from scmodelforge.files import atomic_path
from scmodelforge.genes.identifiers import MEASURED

BLOCK_CELLS = 2_048
COUNTS = [np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.float32)]  # from small to large
HASH_BYTES = 2**22
MAX_INT32 = 2**31 - 1


def write_shard(
    target: Path, store: CellStore, rows: np.ndarray, obs: pd.DataFrame, gene_column: str | None
) -> int:
    """Write cells of a store of one file as one shard; returns the number of counts.

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
    (match,) = store.matches
    var = pd.DataFrame(
        {"symbol": vocab.symbols, "biotype": vocab.biotypes, MEASURED: match.measured(vocab.n_genes)},
        index=pd.Index(vocab.gene_ids),
    )
    if gene_column not in (None, "index"):
        var[gene_column] = vocab.gene_ids
    lengths, libraries = [], []
    with (
        tempfile.TemporaryFile(dir=target.parent) as genes_file,
        tempfile.TemporaryFile(dir=target.parent) as counts_file,
        atomic_path(target) as temporary,
    ):
        genes, counts = _Blocks(genes_file), _Blocks(counts_file)
        for start in range(0, len(rows), BLOCK_CELLS):
            cells = store.read(rows[start : start + BLOCK_CELLS])
            lengths.append(cells.n_genes_per_cell)
            libraries.append(cells.library_size)
            genes.append(cells.gene_ids, np.dtype(np.uint16 if vocab.n_genes <= 2**16 else np.int32))
            counts.append(cells.counts, _smallest(cells.counts))
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        ad.AnnData(obs=obs.assign(**{LIBRARY_SIZE: np.concatenate(libraries)}), var=var).write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            if "X" in file:
                del file["X"]
            group = file.create_group("X")
            shape = (len(rows), vocab.n_genes)
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
            index = np.dtype(np.int32 if indptr[-1] <= MAX_INT32 else np.int64)
            group.create_dataset("indptr", data=indptr.astype(index))
            genes.write(group, "indices", index)
            counts.write(group, "data", max((dtype for dtype, _ in counts.parts), key=COUNTS.index))
    return int(indptr[-1])


class _Blocks:
    """Blocks of numbers in a file, each in its own type, until the type and length of all are known."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.parts: list[tuple[np.dtype, int]] = []

    def append(self, values: np.ndarray, dtype: np.dtype) -> None:
        self.file.write(values.astype(dtype).data)
        self.parts.append((dtype, len(values)))

    def write(self, group: h5py.Group, name: str, dtype: np.dtype) -> None:
        """Make them one dataset; without chunks, so it is contiguous."""
        dataset = group.create_dataset(name, shape=(sum(n for _, n in self.parts),), dtype=dtype)
        begin = 0
        self.file.seek(0)
        for held, n in self.parts:
            block = np.frombuffer(self.file.read(n * held.itemsize), dtype=held)
            dataset[begin : begin + n] = block.astype(dtype, copy=False)
            begin += n


def _smallest(counts: np.ndarray) -> np.dtype:
    """The smallest type that holds these counts as they were read (whole numbers are exact up to 2**24)."""
    largest = counts.max(initial=0)
    if largest >= 2**24 or (counts != np.rint(counts)).any():
        return COUNTS[-1]
    return next(dtype for dtype in COUNTS if largest < 2.0 ** (8 * dtype.itemsize))


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
