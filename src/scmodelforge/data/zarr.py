"""AnnData in zarr stores, versions 2 and 3, and the collections of them that annbatch writes.

A collection is a group of AnnData stores (`dataset_0`, `dataset_1`, …) with compressed shards of about a gigabyte;
each is a source of its own. They are read by zarr alone and not by annbatch's loader: that one draws its own random
order, and ours must be a function of (seed, epoch, step) for a resumed run to go on exactly.

Chunks are decompressed whole, so cells come by way of blocks in memory (`blocks.py`), and an order that shuffles
within a buffer reads each chunk about once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scmodelforge.data.blocks import BLOCK_CELLS, READ_CELLS, BlockCache, by_runs
from scmodelforge.data.matrix import (
    LIBRARY_SIZE,
    Held,
    Matrix,
    Rows,
    check_numeric,
    damaged,
    no_matrix,
    offsets,
    place_of,
    read_frame,
)
from scmodelforge.errors import DataError, require_extra

SHUFFLE_BUFFER = 65_536
MOST_BLOCK_CELLS = 1024


def is_zarr(path: str | Path) -> bool:
    """Whether there is a zarr group at this path."""
    return any((Path(path).expanduser() / name).is_file() for name in ("zarr.json", ".zgroup"))


def zarr_members(path: str | Path, name: str) -> list[str]:
    """Names of the AnnData stores in a collection, in order; none if the store is an AnnData itself."""
    group = _open_group(path, name)
    if "obs" in group and "var" in group:
        return []
    named = [member for member in group.group_keys() if {"obs", "var"} <= set(group[member].group_keys())]
    return sorted(named, key=lambda member: (len(member), member))  # dataset_2 before dataset_10


def open_zarr(path: str | Path, source: Any, layer: str | None, cache_bytes: int) -> Matrix:
    """Open a matrix of an AnnData store at `path`, as `open_matrix` says; messages name `source`."""
    name = str(source)
    group = _open_group(path, name)
    for part in ("obs", "var"):
        if part not in group:
            members = zarr_members(path, name)
            hint = f" It is a collection; name one of its members: {', '.join(members)}." if members else ""
            raise DataError(
                f"'{name}' is a zarr store but no AnnData: it has no '{part}'.{hint}\n"
                "Expected a store that AnnData.write_zarr or annbatch wrote."
            )
    key = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if layer == "raw" and key not in group:
        key = "layers/raw"
    if key not in group or group[key].attrs.get("encoding-type") == "null":
        raise no_matrix(name, layer, zarr_places(path, name))
    var = "raw/var" if key == "raw/X" else "var"
    if var not in group:
        raise damaged(name, f"it has '{key}' but no '{var}'")
    library = None
    if LIBRARY_SIZE in group["obs"]:
        library = np.asarray(group["obs"][LIBRARY_SIZE][:], dtype=np.float64)
    held = _held(group[key], name, place_of(layer), cache_bytes)
    assert isinstance(held.reader, _Blocks)
    return Matrix(
        source,
        layer,
        held,
        read_frame(group[var], name, var),
        obs=lambda: read_frame(group["obs"], name, "obs"),
        library_size=lambda: library,
        shuffle_buffer=SHUFFLE_BUFFER,
        block_cells=held.reader.cache.block_cells,
        close=held.reader.cache.close,
    )


def zarr_places(path: str | Path, name: str) -> list[str | None]:
    """What `layer` can be for an AnnData store."""
    group = _open_group(path, name)
    has_x = "X" in group and group["X"].attrs.get("encoding-type") != "null"
    layers, has_raw = list(group["layers"]) if "layers" in group else [], "raw/X" in group
    return [None] * has_x + [layer for layer in layers if layer != "raw" or not has_raw] + ["raw"] * has_raw


def _open_group(path: str | Path, name: str) -> Any:
    require_extra("zarr", "zarr", "A .zarr store")
    import zarr

    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(
            f"The zarr store '{name}' does not exist.\nCheck the path (working folder: {Path.cwd()})."
        )
    if not is_zarr(path):
        raise DataError(
            f"'{name}' is no zarr store: it has neither zarr.json nor .zgroup.\n"
            "Expected a folder that AnnData.write_zarr or annbatch wrote."
        )
    try:
        return zarr.open_group(
            path, mode="r", use_consolidated=False
        )  # a copy of the metadata may be out of date
    except (OSError, KeyError, ValueError) as error:
        raise damaged(name, f"zarr cannot open it ({error})") from error


def _held(value: Any, name: str, place: str, cache_bytes: int) -> Held:
    import zarr

    if isinstance(value, zarr.Array):
        if value.ndim != 2:
            raise DataError(f"'{name}': {place} has {value.ndim} dimensions; expected cells × genes.")
        check_numeric(value.dtype, name, place)
        dense = _Dense(value, name, place)
        storage = f"dense, {value.dtype}, zarr {value.metadata.zarr_format}"
        return Held(
            _Blocks(dense, value.shape[0], value.chunks[0], cache_bytes // (4 * value.shape[1])),
            (value.shape[0], value.shape[1]),
            storage,
        )
    kind = str(value.attrs.get("encoding-type", "")).removesuffix("_matrix")
    if kind == "csc":
        raise DataError(
            f"'{name}': {place} is stored by genes (CSC), and reading cells would read all of it each time.\n"
            f"Write it once by cells: adata = anndata.read_zarr('{name}'); adata.X = adata.X.tocsr(); "
            "adata.write_zarr(…)."
        )
    if kind != "csr":
        raise DataError(f"'{name}': {place} is stored as '{kind}'; expected a CSR or dense matrix.")
    shape = tuple(int(n) for n in value.attrs.get("shape", ()))
    try:
        indptr, indices, data = value["indptr"][:].astype(np.int64), value["indices"], value["data"]
        missing = data.nchunks - data.nchunks_initialized
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise damaged(name, f"{place} is incomplete ({error})") from error
    check_numeric(data.dtype, name, place)
    fits = len(shape) == 2 and len(indptr) == shape[0] + 1 and indptr[0] == 0
    if not fits or not indptr[-1] == data.shape[0] == indices.shape[0] or (np.diff(indptr) < 0).any():
        raise damaged(name, f"indptr of {place} does not fit its other arrays")
    if missing > 0:  # zarr would read zeros
        raise damaged(name, f"{missing:,} of {data.nchunks:,} chunks of {place} are missing")
    n_rows = shape[0]
    cells_in_chunk = int(data.chunks[0] * n_rows / max(1, indptr[-1]))
    cells_that_fit = cache_bytes * n_rows // (8 * max(data.shape[0], 1))
    reader = _Blocks(_Csr(indptr, indices, data, name, place), n_rows, cells_in_chunk, cells_that_fit)
    return Held(reader, (n_rows, shape[1]), f"CSR, {data.dtype}, zarr {data.metadata.zarr_format}")


class _Csr:
    """Ranges of rows of a CSR group."""

    def __init__(self, indptr: np.ndarray, indices: Any, data: Any, name: str, place: str) -> None:
        self.indptr, self.indices, self.data, self.name, self.place = indptr, indices, data, name, place

    def __call__(self, first: int, last: int) -> Rows:
        begin, end = self.indptr[first], self.indptr[last]
        indptr = self.indptr[first : last + 1] - begin
        with_entries = slice(int(begin), int(end))
        try:
            indices, data = self.indices[with_entries], self.data[with_entries]
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(self.name, f"{self.place} cannot be read ({error})") from error
        row = np.searchsorted(indptr, np.flatnonzero(indices == 0), side="right")
        if len(row) and (np.diff(row) == 0).any():
            raise damaged(
                self.name, f"{self.place} names column 0 twice in a cell, as where chunks are missing"
            )
        return Rows(indptr, indices, data)


class _Dense:
    """Ranges of rows of a dense array; what is not zero counts as stored."""

    def __init__(self, array: Any, name: str, place: str) -> None:
        self.array, self.name, self.place = array, name, place

    def __call__(self, first: int, last: int) -> Rows:
        try:
            block = self.array[first:last]
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(self.name, f"{self.place} cannot be read ({error})") from error
        row, column = np.nonzero(block)
        return Rows(
            offsets(np.bincount(row, minlength=len(block))), column.astype(np.int32), block[row, column]
        )


class _Blocks:
    """Rows by way of blocks in memory, each about as large as a chunk."""

    def __init__(self, read: _Csr | _Dense, n_rows: int, cells_in_chunk: int, cells_that_fit: int) -> None:
        block_cells = min(max(cells_in_chunk, BLOCK_CELLS), MOST_BLOCK_CELLS)
        capacity = min(2 * READ_CELLS, max(cells_that_fit, 2 * block_cells))
        self.cache = BlockCache(
            by_runs(read), n_rows, block_cells, capacity_cells=capacity, read_cells=min(READ_CELLS, capacity)
        )

    def take(self, rows: np.ndarray) -> Rows:
        return self.cache.take(rows)

    def prefetch(self, rows: np.ndarray) -> None:
        self.cache.make_room_for(rows)
        self.cache.prefetch(rows)
