"""One matrix of counts, read in place by rows: from an .h5ad file or an AnnData in memory.

CSR on disk is read as runs of neighbouring rows, through a chunk cache that keeps what was decompressed.
Dense matrices are read the same way. CSC on disk cannot be read by rows, so it is turned into CSR once,
out of core, in an unnamed temporary file. The matrix itself is never loaded; 8 bytes per cell are (`indptr`).
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import shutil
import tempfile
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata._io.specs.registry import IORegistryError
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem
from scipy import sparse

from scmodelforge.data.obs import column_names, read_rows
from scmodelforge.errors import DataError

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | ad.AnnData

LIBRARY_SIZE = "scmodelforge_library_size"  # obs column of shards: counts over all genes that were measured
CACHE_BYTES = 64 * 2**20  # decompressed chunks kept, per HDF5 dataset
CACHE_SLOTS = 100_003  # a prime well above the chunks that fit, so that they do not evict each other
BRIDGE = 4096  # entries between two wanted rows that are read along rather than skipped
DENSE_BYTES = 32 * 2**20  # a dense matrix is read in blocks of so many bytes
CONVERT_ENTRIES = 4 * 2**20  # a CSC matrix is converted in blocks of so many entries


class Rows(NamedTuple):
    """Some rows of a matrix as CSR: indptr int64 (n + 1), indices (nnz) and data (nnz)."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    def keep(self, entries: np.ndarray) -> Rows:
        """Return the entries where the bool array (nnz) is true."""
        return Rows(_offsets(entries)[self.indptr], self.indices[entries], self.data[entries])

    def take(self, rows: np.ndarray) -> Rows:
        """Return the given rows in the given order, repeats allowed."""
        starts = self.indptr[rows]
        indptr, positions = _spans(starts, self.indptr[rows + 1] - starts)
        return Rows(indptr, self.indices[positions], self.data[positions])


class _Reader(Protocol):
    def take(self, rows: np.ndarray) -> Rows:
        """Return the given rows in the given order; `Rows` itself reads arrays in memory or memory-mapped."""


class Matrix:
    """Cells × genes, read by rows; made by `open_matrix`.

    Attributes
    ----------
    source, layer
        What `open_matrix` was called with.
    name
        The path as given, or "AnnData".
    var
        The genes; those of `.raw` if the matrix is `.raw.X`.
    n_cells, n_genes
        Shape of the matrix.
    storage
        How it is stored, for people: "CSR, float32, gzip".
    """

    def __init__(
        self,
        source: Source,
        layer: str | None,
        value: Any,
        obs: Any,
        var: pd.DataFrame,
        file: h5py.File | None = None,
    ) -> None:
        self.source, self.layer = source, layer
        self.name = "AnnData" if isinstance(source, ad.AnnData) else str(source)
        self.var = var
        self._obs, self._file = obs, file
        self._reader, (self.n_cells, self.n_genes), self.storage = _reader(value, self.name, self.place)
        if len(var) != self.n_genes:
            raise _damaged(self.name, f"{self.place} has {self.n_genes:,} columns, var {len(var):,} rows")
        if not self.n_cells or not self.n_genes:
            what = "cells" if not self.n_cells else "genes"
            raise DataError(
                f"'{self.name}' has no {what}: {self.place} is {self.n_cells:,} × {self.n_genes:,}.\n"
                "Check the filters that it went through, or leave this file out."
            )

    @property
    def place(self) -> str:
        """Where in the file the matrix is: "X", "raw" or "layer 'NAME'"."""
        return "X" if self.layer is None else "raw" if self.layer == "raw" else f"layer '{self.layer}'"

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The cells' annotations, read when first asked."""
        obs = _frame(self._obs, self.name, "obs")
        if len(obs) != self.n_cells:
            raise _damaged(self.name, f"{self.place} has {self.n_cells:,} rows, obs {len(obs):,}")
        return obs

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of `obs`, which is not read for this."""
        return column_names(self._obs)

    def obs_rows(self, start: int, stop: int, columns: list[str] | None = None) -> pd.DataFrame:
        """The annotations (None: all) of the cells `start:stop`; those of other cells are not read."""
        try:
            obs = read_rows(self._obs, start, stop, columns)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise _damaged(self.name, f"obs cannot be read ({error})") from error
        if len(obs) != stop - start:
            raise _damaged(self.name, f"{self.place} has {self.n_cells:,} rows, obs fewer")
        return obs

    @property
    def is_mapped(self) -> bool:
        """Whether the counts are in memory or mapped into it, so that any cell can be had at once."""
        return isinstance(self._reader, Rows)

    @cached_property
    def library_size(self) -> np.ndarray | None:
        """float64 (n_cells) of a shard, over genes that are no longer in it too; None where genes are all there."""
        held = self._obs
        if LIBRARY_SIZE not in held:
            return None
        return np.asarray(held[LIBRARY_SIZE][:], dtype=np.float64)

    def read(self, rows: np.ndarray) -> Rows:
        """Read cells in the order given; callable from several threads.

        Parameters
        ----------
        rows
            int64 in [0, n_cells), in any order, repeats allowed.

        Returns
        -------
        indptr int64, indices int32 and data float32. Explicit zeros are dropped; the genes of a cell come in
        the order of the file, and values are not checked.

        Raises
        ------
        DataError
            If the file is damaged there.
        """
        block = self._take(np.asarray(rows, dtype=np.int64))
        indices = block.indices
        if indices.size and (indices.min() < 0 or indices.max() >= self.n_genes):
            raise _damaged(self.name, f"{self.place} names a column outside of its {self.n_genes:,} genes")
        block = Rows(
            block.indptr, indices.astype(np.int32, copy=False), block.data.astype(np.float32, copy=False)
        )
        stored = block.data != 0
        return block if stored.all() else block.keep(stored)

    def arrays(self, rows: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Return arrays that hold the given cells, as stored and unchecked, and their rows in them.

        A matrix in memory, or mapped into it, is returned as it is (if the processor computes with its numbers); of
        any other the rows are read. Callable from several threads.

        Raises
        ------
        DataError
            If the file is damaged there.
        """
        if isinstance(self._reader, Rows) and all(map(_computable, self._reader)):
            return self._reader, rows
        block = self._take(rows)
        if not all(map(_computable, block)):
            block = Rows(block.indptr, block.indices.astype(np.int32), block.data.astype(np.float32))
        return block, np.arange(len(rows))

    def _take(self, rows: np.ndarray) -> Rows:
        try:
            return self._reader.take(rows)
        except OSError as error:
            raise _damaged(self.name, f"{self.place} cannot be read ({error})") from error

    def close(self) -> None:
        """Close the file, so that it can be written; the matrix cannot be read after that."""
        if self._file is not None:
            self._file.close()


def open_matrix(source: Source, layer: str | None = None, cache_bytes: int = CACHE_BYTES) -> Matrix:
    """Open a matrix of an .h5ad file or an AnnData without reading it.

    Parameters
    ----------
    source
        Path of an .h5ad file, or an AnnData (in memory, backed, or a view).
    layer
        None for X, "raw" for `.raw.X` (where there is none, a layer of that name), else the name of a layer.
    cache_bytes
        Largest size of the decompressed chunks kept in memory, for each of the arrays of a sparse matrix.

    Raises
    ------
    DataError
        If the file is missing, damaged or no AnnData, or has no such matrix, no cells or no genes.
    """
    if isinstance(source, ad.AnnData):
        return _open_anndata(source, layer)
    file = _open_file(Path(source).expanduser(), str(source), cache_bytes)
    for part in ("obs", "var"):
        if part not in file:
            hint = " It looks like a 10x file: read it with scanpy.read_10x_h5." if "matrix" in file else ""
            raise DataError(
                f"'{source}' is an HDF5 file but no AnnData: it has no '{part}'.{hint}\n"
                "Expected an .h5ad file, as AnnData.write_h5ad writes it."
            )
    key = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if layer == "raw" and key not in file:
        key = "layers/raw"
    if key not in file and LIBRARY_SIZE in file["obs"]:
        layer, key = None, "X"  # a shard: its counts are in X, wherever they came from
    value = file.get(key)
    if value is None or value.attrs.get("encoding-type") == "null":
        raise _no_matrix(source, layer)
    var = "raw/var" if key == "raw/X" else "var"
    if var not in file:
        raise _damaged(str(source), f"it has '{key}' but no '{var}'")
    return Matrix(source, layer, value, file["obs"], _frame(file[var], str(source), var), file)


def matrix_places(source: Source) -> list[str | None]:
    """Return what `layer` can be for this source: None for X, names of layers, "raw"; only what is there."""
    if isinstance(source, ad.AnnData):
        has_x, layers, has_raw = source.X is not None, list(source.layers), source.raw is not None
    else:
        with _open_file(Path(source).expanduser(), str(source), CACHE_BYTES) as file:
            has_x = "X" in file and file["X"].attrs.get("encoding-type") != "null"
            layers, has_raw = list(file.get("layers", ())), "raw/X" in file
    return [None] * has_x + [layer for layer in layers if layer != "raw" or not has_raw] + ["raw"] * has_raw


def _open_file(path: Path, name: str, cache_bytes: int) -> h5py.File:
    if not os.path.exists(path):  # not path.exists(), which raises where a folder above may not be read
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.h5ad")], n=1)
        hint = f" Did you mean '{path.with_name(near[0])}'?" if near else ""
        raise DataError(
            f"The data file '{name}' does not exist.{hint}\nCheck the path (working folder: {Path.cwd()})."
        )
    if path.is_dir():
        raise DataError(f"'{name}' is a folder; expected the path of an .h5ad file.")
    try:
        return h5py.File(path, "r", rdcc_nbytes=cache_bytes, rdcc_nslots=CACHE_SLOTS)
    except PermissionError as error:
        raise DataError(f"'{name}' may not be read: {error.strerror}. Change its permissions.") from error
    except BlockingIOError as error:
        raise DataError(
            f"'{name}' is open for writing in another program, so HDF5 has locked it. Close it there."
        ) from error
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise DataError(
                f"'{name}' cannot be opened: this process has too many open files.\n"
                "Raise the limit (ulimit -n), or concatenate the files."
            ) from error
        if not h5py.is_hdf5(path):
            raise DataError(
                f"'{name}' is not an .h5ad file: it is not HDF5.\n"
                "Expected a file that AnnData.write_h5ad wrote; scanpy reads other formats and converts them."
            ) from error
        raise _damaged(name, f"HDF5 cannot open it ({error})") from error


def _open_anndata(adata: ad.AnnData, layer: str | None) -> Matrix:
    if layer == "raw" and adata.raw is not None:
        return Matrix(adata, layer, adata.raw.X, adata.obs, adata.raw.var)
    value = adata.X if layer is None else adata.layers.get(layer)  # of a view: a copy of its rows
    if value is None:
        raise _no_matrix(adata, layer)
    return Matrix(adata, layer, value, adata.obs, adata.var)


def _frame(value: Any, name: str, part: str) -> pd.DataFrame:
    if isinstance(value, pd.DataFrame):
        return value
    try:
        return read_elem(value)
    except IORegistryError as error:
        raise DataError(
            f"'{name}': '{part}' is stored in a way that this version of anndata does not know ({error})."
        ) from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise _damaged(name, f"'{part}' cannot be read ({error})") from error


def _no_matrix(source: Source, layer: str | None) -> DataError:
    name = "AnnData" if isinstance(source, ad.AnnData) else source
    places = matrix_places(source)
    wanted = {None: "X", "raw": ".raw"}.get(layer, f"layer '{layer}'")
    near = difflib.get_close_matches(str(layer), [p for p in places if p], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    there = ", ".join("X (data.layer: null)" if p is None else f"'{p}'" for p in places) or "no matrix at all"
    return DataError(f"'{name}' has no {wanted}.{hint}\nThere is: {there}. Set data.layer to one of these.")


def _damaged(name: str, what: str) -> DataError:
    return DataError(
        f"'{name}' is truncated or damaged: {what}.\nCopy or download it again, or write it anew."
    )


def _computable(array: np.ndarray) -> bool:
    """Whether compiled code takes it: of the machine's byte order, and no half precision."""
    return array.dtype.isnative and array.dtype != np.float16


# --- how each storage is read by rows -----------------------------------------------------------------


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Return the int64 running sum, from 0."""
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and positions of the entries that lie in these spans, one span after the other."""
    indptr = _offsets(lengths)
    return indptr, np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], lengths)


def _reader(value: Any, name: str, place: str) -> tuple[_Reader, tuple[int, int], str]:
    """Return reader, shape and a description of anything that AnnData holds as a matrix."""
    if isinstance(value, CSRDataset | CSCDataset):
        value = value.group
    if isinstance(value, h5py.Group):
        return _sparse_on_disk(value, name, place)
    if sparse.issparse(value) and value.format in ("csr", "csc"):
        storage = f"{value.format.upper()}, {value.dtype}, in memory"
        _check_numeric(value.dtype, name, place)
        csr = value.tocsr()
        return Rows(csr.indptr.astype(np.int64), csr.indices, csr.data), value.shape, storage
    if isinstance(value, np.ndarray | h5py.Dataset) and len(value.shape) == 2:
        _check_numeric(value.dtype, name, place)
        held = (value.compression or "uncompressed") if isinstance(value, h5py.Dataset) else "in memory"
        return _Dense(value), value.shape, f"dense, {value.dtype}, {held}"
    raise DataError(
        f"'{name}': {place} is a {type(value).__name__}, which cannot be read by rows.\n"
        "Expected a CSR, CSC or dense matrix; for a lazy one call adata.to_memory() first."
    )


def _check_numeric(dtype: np.dtype, name: str, place: str) -> None:
    if dtype.kind not in "biuf":
        raise DataError(f"'{name}': {place} holds {dtype} values; expected counts (integers or floats).")


def _sparse_on_disk(group: h5py.Group, name: str, place: str) -> tuple[_Reader, tuple[int, int], str]:
    kind = str(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    kind = kind.removesuffix("_matrix")
    if kind not in ("csr", "csc"):
        raise DataError(f"'{name}': {place} is stored as '{kind}'; expected a CSR, CSC or dense matrix.")
    shape = tuple(int(n) for n in group.attrs.get("shape", group.attrs.get("h5sparse_shape", ())))
    try:
        indptr, indices, data = group["indptr"][:].astype(np.int64), group["indices"], group["data"]
    except (KeyError, OSError) as error:
        raise _damaged(name, f"{place} is incomplete ({error})") from error
    _check_numeric(data.dtype, name, place)
    major = shape[kind == "csc"] if len(shape) == 2 else -1
    ends = len(indptr) == major + 1 and indptr[0] == 0 and indptr[-1] == len(data) == len(indices)
    if not ends or (np.diff(indptr) < 0).any():
        raise _damaged(name, f"indptr of {place} does not fit its other arrays")
    storage = f"{kind.upper()}, {data.dtype}, {data.compression or 'uncompressed'}"
    reader: _Reader
    if kind == "csc":
        reader = _Csc(indptr, indices, data, shape[0], name)
    elif (columns := _mapped(indices)) is not None and (values := _mapped(data)) is not None:
        reader, storage = Rows(indptr, columns, values), f"{storage}, contiguous"
    else:
        reader = _OnDisk(indptr, indices, data)
    return reader, (shape[0], shape[1]), storage


def _mapped(dataset: h5py.Dataset) -> np.ndarray | None:
    """Return the bytes of a contiguous dataset mapped into memory, None where they lie in chunks."""
    offset = dataset.id.get_offset()  # None if chunked, compressed or not yet allocated
    if offset is None or not dataset.dtype.isnative:
        return None
    mapped = np.memmap(dataset.file.filename, dataset.dtype, mode="r", offset=offset, shape=dataset.shape)
    return mapped.view(np.ndarray)


class _OnDisk:
    """CSR in HDF5 datasets."""

    def __init__(self, indptr: np.ndarray, indices: h5py.Dataset, data: h5py.Dataset) -> None:
        self.indptr, self.indices, self.data = indptr, indices, data

    def take(self, rows: np.ndarray) -> Rows:
        wanted, inverse = np.unique(rows, return_inverse=True)
        starts, stops = self.indptr[wanted], self.indptr[wanted + 1]
        jump = starts[1:] - stops[:-1] > BRIDGE
        first, last = np.r_[True, jump][: len(wanted)], np.r_[jump, True][: len(wanted)]
        begin, end = starts[first], stops[last]  # one read for each run of neighbouring rows
        shift = begin - _offsets(end - begin)[:-1]  # from the file to the concatenated runs
        starts_read = starts - shift[np.cumsum(first) - 1]
        indptr, positions = _spans(starts_read[inverse], (stops - starts)[inverse])
        runs = list(zip(begin.tolist(), end.tolist(), strict=True))
        return Rows(indptr, _read_runs(self.indices, runs)[positions], _read_runs(self.data, runs)[positions])


def _read_runs(dataset: h5py.Dataset, runs: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([dataset[a:b] for a, b in runs]) if runs else np.zeros(0, dtype=dataset.dtype)


class _Dense:
    """A two-dimensional array or HDF5 dataset; what is not zero counts as stored."""

    def __init__(self, array: np.ndarray | h5py.Dataset) -> None:
        self.array = array

    def take(self, rows: np.ndarray) -> Rows:
        wanted, inverse = np.unique(rows, return_inverse=True)
        n_rows = max(1, DENSE_BYTES // (self.array.shape[1] * self.array.dtype.itemsize))
        blocks = [self._block(wanted[i : i + n_rows]) for i in range(0, len(wanted), n_rows)]
        if not blocks:
            return Rows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
        indices = np.concatenate([block.indices for block in blocks])
        data = np.concatenate([block.data for block in blocks])
        return Rows(_offsets(lengths), indices, data).take(inverse)

    def _block(self, rows: np.ndarray) -> Rows:
        if isinstance(self.array, np.ndarray):
            block = self.array[rows]
        else:
            edges = np.flatnonzero(np.diff(rows) > 1) + 1
            block = np.concatenate([self.array[r[0] : r[-1] + 1] for r in np.split(rows, edges)])
        row, column = np.nonzero(block)
        return Rows(_offsets(np.bincount(row, minlength=len(rows))), column, block[row, column])


class _Csc:
    """CSC in HDF5 datasets: converted at the first read."""

    def __init__(
        self, indptr: np.ndarray, indices: h5py.Dataset, data: h5py.Dataset, n_rows: int, name: str
    ) -> None:
        self.indptr, self.indices, self.data, self.n_rows, self.name = indptr, indices, data, n_rows, name
        self.csr: Rows | None = None
        self.lock = threading.Lock()

    def take(self, rows: np.ndarray) -> Rows:
        with self.lock:
            if self.csr is None:
                self.csr = self._convert()
        return self.csr.take(rows)

    def _convert(self) -> Rows:
        nnz = len(self.data)
        needed, free = nnz * (4 + self.data.dtype.itemsize), shutil.disk_usage(tempfile.gettempdir()).free
        logger.warning(
            "'%s' is stored by genes (CSC), not by cells: converting it once into a temporary file "
            "(%s MB). To save this time, write it with adata.X = adata.X.tocsr().",
            self.name,
            f"{needed / 1e6:,.0f}",
        )
        if needed > free:
            raise DataError(
                f"'{self.name}' is stored by genes (CSC); converting it needs {needed / 1e9:.1f} GB in "
                f"'{tempfile.gettempdir()}', where {free / 1e9:.1f} GB are free.\n"
                "Point the environment variable TMPDIR to a larger disk, or write the file as CSR."
            )
        blocks = [slice(a, min(a + CONVERT_ENTRIES, nnz)) for a in range(0, nnz, CONVERT_ENTRIES)]
        counts = np.zeros(self.n_rows, dtype=np.int64)
        for block in blocks:
            row = self.indices[block]
            if row.min() < 0 or row.max() >= self.n_rows:
                raise _damaged(self.name, f"a column names a row outside of its {self.n_rows:,} cells")
            counts += np.bincount(row, minlength=self.n_rows)
        indptr = _offsets(counts)
        indices, data = _scratch(nnz, np.dtype(np.int32)), _scratch(nnz, self.data.dtype)
        following = indptr[:-1].copy()  # where the next entry of each row goes; columns come ascending
        for block in blocks:
            row = self.indices[block].astype(np.int64)
            column = np.searchsorted(self.indptr, np.arange(block.start, block.stop), side="right") - 1
            order = np.argsort(row, kind="stable")
            added = np.bincount(row, minlength=self.n_rows)
            within = np.arange(len(row)) - np.repeat(_offsets(added)[:-1], added)
            place = following[row[order]] + within
            indices[place], data[place] = column[order], self.data[block][order]
            following += added
        return Rows(indptr, indices, data)


def _scratch(n: int, dtype: np.dtype) -> np.ndarray:
    """Return an array in a nameless temporary file, which is gone when the process is, however it ends."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=(max(n, 1),))[:n]
