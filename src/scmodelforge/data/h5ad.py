""".h5ad files, read in place by rows.

CSR on disk is read as runs of neighbouring rows, through a chunk cache that keeps what was decompressed; where
its arrays are contiguous they are mapped into memory. Dense matrices are read by runs of rows too. CSC on disk
cannot be read by rows, so it is turned into CSR once, out of core, in an unnamed temporary file. The matrix
itself is never loaded; 8 bytes per cell are (`indptr`).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import h5py
import numpy as np
import pandas as pd

from scmodelforge.data.matrix import (
    LIBRARY_SIZE,
    Dense,
    Held,
    Matrix,
    ObsParts,
    Reader,
    Rows,
    check_numeric,
    damaged,
    no_matrix,
    offsets,
    place_of,
    read_frame,
    spans,
)
from scmodelforge.data.obs import column_names, read_rows
from scmodelforge.data.open_files import LentFile, Mapped
from scmodelforge.errors import DataError
from scmodelforge.files import require_data

logger = logging.getLogger(__name__)

CACHE_BYTES = 64 * 2**20  # decompressed chunks kept, per HDF5 dataset
CACHE_SLOTS = 100_003  # of this cache: well above the chunks that fit, so that they do not evict each other
BRIDGE = 4096  # entries between two wanted rows that are read along rather than skipped
CONVERT_ENTRIES = 4 * 2**20  # a CSC matrix is converted in blocks of so many entries


# A matrix lent for reading: its datasets by name, "" for a dense matrix itself.
Lend: TypeAlias = Callable[[], AbstractContextManager[Callable[[str], h5py.Dataset]]]

_frames: WeakValueDictionary[bytes, pd.DataFrame] = WeakValueDictionary()  # genes in use, by what is stored


def open_h5ad(path: str | Path, source: Any, layer: str | None, cache_bytes: int) -> Matrix:
    """Open a matrix of the .h5ad file at `path`, as `open_matrix` says; messages name `source`."""
    name, path = str(source), Path(path).expanduser()
    lent = LentFile(path, name, lambda: _open_file(path, name, cache_bytes))

    def obs() -> pd.DataFrame:
        with lent.borrow() as opened:
            frame = read_frame(opened.file["obs"], name, "obs")
        lent.close()  # as below
        return frame

    def obs_columns() -> list[str]:
        with lent.borrow() as opened:
            return column_names(opened.file["obs"])

    def obs_rows(start: int, stop: int, columns: list[str] | None) -> pd.DataFrame:
        try:
            with lent.borrow() as opened:
                return read_rows(opened.file["obs"], start, stop, columns)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise damaged(name, f"obs cannot be read ({error})") from error

    with lent.borrow() as opened:
        file = opened.file
        for part in ("obs", "var"):
            if part not in file:
                hint = (
                    " It looks like a 10x file: read it with scanpy.read_10x_h5." if "matrix" in file else ""
                )
                raise DataError(
                    f"'{name}' is an HDF5 file but no AnnData: it has no '{part}'.{hint}\n"
                    "Expected an .h5ad file, as AnnData.write_h5ad writes it."
                )
        key = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
        if layer == "raw" and key not in file:
            key = "layers/raw"
        place = layer
        if key not in file and LIBRARY_SIZE in file["obs"]:
            place, key = None, "X"  # a shard: its counts are in X, wherever they came from
        value = file.get(key)
        if value is None or value.attrs.get("encoding-type") == "null":
            raise no_matrix(name, layer, _places(file))
        var = "raw/var" if key == "raw/X" else "var"
        if var not in file:
            raise damaged(name, f"it has '{key}' but no '{var}'")

        @contextmanager
        def lend() -> Iterator[Callable[[str], h5py.Dataset]]:
            with lent.borrow() as opened:
                yield lambda part: opened[f"{key}/{part}" if part else key]

        held = held_on_disk(value, name, place_of(place), lend)
        library = None
        if LIBRARY_SIZE in file["obs"]:
            library = np.asarray(file["obs"][LIBRARY_SIZE][:], dtype=np.float64)
        genes = _genes(file[var], name, var)
    lent.close()  # HDF5 keeps what it has read of var, in every file
    some_obs = ObsParts(obs_columns, obs_rows)
    return Matrix(source, place, held, genes, obs, lambda: library, close=lent.close, some_obs=some_obs)


def _genes(group: h5py.Group, name: str, part: str) -> pd.DataFrame:
    """Read `var`; files with the same genes share one frame."""
    try:
        key = _digest(group)
    except TypeError:  # neither text nor numbers: not shared
        return read_frame(group, name, part)
    except OSError as error:
        raise damaged(name, f"'{part}' cannot be read ({error})") from error
    frame = _frames.get(key)
    if frame is None:
        frame = _frames[key] = read_frame(group, name, part)
    return frame


def _digest(group: h5py.Group) -> bytes:
    """Hash all that is stored in a group."""
    digest = hashlib.sha256()

    def add(key: str, value: h5py.Group | h5py.Dataset) -> None:
        digest.update(
            repr((key, [(k, np.asarray(v).tolist()) for k, v in sorted(value.attrs.items())])).encode()
        )
        if isinstance(value, h5py.Dataset):
            array = np.asarray(value[()])
            digest.update(f"{array.dtype} {array.shape} ".encode())
            if array.dtype == object:  # texts, as bytes without a zero
                digest.update(b"\0".join(array.ravel().tolist()))
            else:
                digest.update(array.tobytes())

    add("", group)
    group.visititems(add)
    return digest.digest()


def h5ad_places(path: str | Path, name: str) -> list[str | None]:
    """What `layer` can be for an .h5ad file."""
    with _open_file(Path(path).expanduser(), name, CACHE_BYTES) as file:
        return _places(file)


def _places(file: h5py.File) -> list[str | None]:
    has_x = "X" in file and file["X"].attrs.get("encoding-type") != "null"
    layers, has_raw = list(file.get("layers", ())), "raw/X" in file
    return [None] * has_x + [layer for layer in layers if layer != "raw" or not has_raw] + ["raw"] * has_raw


def _open_file(path: Path, name: str, cache_bytes: int) -> h5py.File:
    require_data(path)
    if path.is_dir():
        raise DataError(f"'{name}' is a folder; expected the path of an .h5ad file.")
    slots = max(521, CACHE_SLOTS * cache_bytes // CACHE_BYTES | 1)  # 8 bytes each, for every dataset
    try:
        return h5py.File(path, "r", rdcc_nbytes=cache_bytes, rdcc_nslots=slots)
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
        raise damaged(name, f"HDF5 cannot open it ({error})") from error


def held_on_disk(value: h5py.Group | h5py.Dataset, name: str, place: str, lend: Lend | None = None) -> Held:
    """Read a matrix of an HDF5 file; raise `DataError` if it is damaged, or no matrix of numbers.

    `lend` opens `value` again when it is read; None: `value` stays open.
    """
    if lend is None:
        own = cache(lambda part: value[part] if part else value)
        lend = lambda: nullcontext(own)  # noqa: E731
    if isinstance(value, h5py.Group):
        return _sparse_on_disk(value, name, place, lend)
    if len(value.shape) != 2:
        raise DataError(
            f"'{name}': {place} is a {type(value).__name__}, which cannot be read by rows.\n"
            "Expected a CSR, CSC or dense matrix; for a lazy one call adata.to_memory() first."
        )
    check_numeric(value.dtype, name, place)
    storage = f"dense, {value.dtype}, {value.compression or 'uncompressed'}"
    return Held(_DenseOnDisk(lend), value.shape, storage)


def _sparse_on_disk(group: h5py.Group, name: str, place: str, lend: Lend) -> Held:
    kind = str(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    kind = kind.removesuffix("_matrix")
    if kind not in ("csr", "csc"):
        raise DataError(f"'{name}': {place} is stored as '{kind}'; expected a CSR, CSC or dense matrix.")
    shape = tuple(int(n) for n in group.attrs.get("shape", group.attrs.get("h5sparse_shape", ())))
    try:
        indptr, indices, data = group["indptr"][:].astype(np.int64), group["indices"], group["data"]
    except (KeyError, OSError) as error:
        raise damaged(name, f"{place} is incomplete ({error})") from error
    check_numeric(data.dtype, name, place)
    major = shape[kind == "csc"] if len(shape) == 2 else -1
    ends = len(indptr) == major + 1 and indptr[0] == 0 and indptr[-1] == len(data) == len(indices)
    if not ends or (np.diff(indptr) < 0).any():
        raise damaged(name, f"indptr of {place} does not fit its other arrays")
    storage = f"{kind.upper()}, {data.dtype}, {data.compression or 'uncompressed'}"
    reader: Reader
    if kind == "csc":
        reader = _Csc(indptr, lend, shape[0], name)
    elif (columns := _in_one_piece(indices)) is not None and (values := _in_one_piece(data)) is not None:
        reader = Mapped(Path(group.file.filename), name, indptr, (columns, values))
        storage = f"{storage}, contiguous"
    else:
        reader = _OnDisk(indptr, lend)
    return Held(reader, (shape[0], shape[1]), storage)


def _in_one_piece(dataset: h5py.Dataset) -> tuple[np.dtype, int, int] | None:
    """Return type, length and first byte of a contiguous dataset, None where it lies in chunks."""
    offset = dataset.id.get_offset()  # None if chunked, compressed or not yet allocated
    if offset is None or not dataset.dtype.isnative:
        return None
    return dataset.dtype, len(dataset), offset


class _OnDisk:
    """CSR in HDF5 datasets."""

    def __init__(self, indptr: np.ndarray, lend: Lend) -> None:
        self.indptr, self.lend = indptr, lend

    def take(self, rows: np.ndarray) -> Rows:
        wanted, inverse = np.unique(rows, return_inverse=True)
        starts, stops = self.indptr[wanted], self.indptr[wanted + 1]
        jump = starts[1:] - stops[:-1] > BRIDGE
        first, last = np.r_[True, jump][: len(wanted)], np.r_[jump, True][: len(wanted)]
        begin, end = starts[first], stops[last]  # one read for each run of neighbouring rows
        shift = begin - offsets(end - begin)[:-1]  # from the file to the concatenated runs
        starts_read = starts - shift[np.cumsum(first) - 1]
        indptr, positions = spans(starts_read[inverse], (stops - starts)[inverse])
        runs = list(zip(begin.tolist(), end.tolist(), strict=True))
        with self.lend() as part:
            indices, data = _read_runs(part("indices"), runs), _read_runs(part("data"), runs)
        return Rows(indptr, indices[positions], data[positions])


def _read_runs(dataset: h5py.Dataset, runs: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([dataset[a:b] for a, b in runs]) if runs else np.zeros(0, dtype=dataset.dtype)


class _DenseOnDisk:
    """A dense HDF5 dataset."""

    def __init__(self, lend: Lend) -> None:
        self.lend = lend

    def take(self, rows: np.ndarray) -> Rows:
        with self.lend() as part:
            return Dense(part("")).take(rows)


class _Csc:
    """CSC in HDF5 datasets: converted at the first read."""

    def __init__(self, indptr: np.ndarray, lend: Lend, n_rows: int, name: str) -> None:
        self.indptr, self.lend, self.n_rows, self.name = indptr, lend, n_rows, name
        self.csr: Rows | None = None
        self.lock = threading.Lock()

    def take(self, rows: np.ndarray) -> Rows:
        with self.lock:
            if self.csr is None:
                with self.lend() as part:
                    self.csr = self._convert(part("indices"), part("data"))
        return self.csr.take(rows)

    def _convert(self, indices: h5py.Dataset, data: h5py.Dataset) -> Rows:
        nnz = len(data)
        needed, free = nnz * (4 + data.dtype.itemsize), shutil.disk_usage(tempfile.gettempdir()).free
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
            row = indices[block]
            if row.min() < 0 or row.max() >= self.n_rows:
                raise damaged(self.name, f"a column names a row outside of its {self.n_rows:,} cells")
            counts += np.bincount(row, minlength=self.n_rows)
        indptr = offsets(counts)
        columns, values = _scratch(nnz, np.dtype(np.int32)), _scratch(nnz, data.dtype)
        following = indptr[:-1].copy()  # where the next entry of each row goes; columns come ascending
        for block in blocks:
            row = indices[block].astype(np.int64)
            column = np.searchsorted(self.indptr, np.arange(block.start, block.stop), side="right") - 1
            order = np.argsort(row, kind="stable")
            added = np.bincount(row, minlength=self.n_rows)
            within = np.arange(len(row)) - np.repeat(offsets(added)[:-1], added)
            place = following[row[order]] + within
            columns[place], values[place] = column[order], data[block][order]
            following += added
        return Rows(indptr, columns, values)


def _scratch(n: int, dtype: np.dtype) -> np.ndarray:
    """Return an array in a nameless temporary file, which is gone when the process is, however it ends."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=(max(n, 1),))[:n]
