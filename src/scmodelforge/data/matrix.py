"""One matrix of counts, read by rows: what every kind of source is turned into.

A source (`sources.py`) gives the shape, the genes and a reader of rows; the matrix itself is never loaded.
The readers of arrays in memory are here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import anndata as ad
import numpy as np
import pandas as pd
from anndata._io.specs.registry import IORegistryError
from anndata.io import read_elem
from scipy import sparse

from scmodelforge.errors import DataError

if TYPE_CHECKING:
    from scmodelforge.data.sources import Source

LIBRARY_SIZE = "scmodelforge_library_size"  # obs column of shards: counts over all genes that were measured
DENSE_BYTES = 32 * 2**20  # a dense matrix is read in blocks of so many bytes


class Rows(NamedTuple):
    """Some rows of a matrix as CSR: indptr int64 (n + 1), indices (nnz) and data (nnz)."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    def in_place(self) -> Rows:
        """Return itself: arrays in memory need no reading."""
        return self

    def keep(self, entries: np.ndarray) -> Rows:
        """Return the entries where the bool array (nnz) is true."""
        return Rows(offsets(entries)[self.indptr], self.indices[entries], self.data[entries])

    def take(self, rows: np.ndarray) -> Rows:
        """Return the given rows in the given order, repeats allowed."""
        starts = self.indptr[rows]
        indptr, positions = spans(starts, self.indptr[rows + 1] - starts)
        return Rows(indptr, self.indices[positions], self.data[positions])


class Reader(Protocol):
    """How rows are read; `Rows` itself reads arrays in memory or memory-mapped."""

    def take(self, rows: np.ndarray) -> Rows:
        """Return the given rows (int64) in the given order; callable from several threads."""


@runtime_checkable
class _InPlace(Protocol):
    def in_place(self) -> Rows:
        """Return the whole matrix without reading it."""


@runtime_checkable
class _Ahead(Protocol):
    def prefetch(self, rows: np.ndarray) -> None:
        """Begin to read rows that will be asked for soon."""


class Held(NamedTuple):
    """A matrix as a source holds it: its reader, its shape, and how it is stored, for people."""

    reader: Reader
    shape: tuple[int, int]
    storage: str


class ObsParts(NamedTuple):
    """How annotations on disk are read in parts: their names, and the rows from one to before another."""

    columns: Callable[[], list[str]]
    rows: Callable[[int, int, list[str] | None], pd.DataFrame]


class Matrix:
    """Cells × genes, read by rows; made by `open_matrix`.

    Parameters
    ----------
    obs, library_size
        Called when the annotations, or a shard's library sizes (float64, None if it is no shard), are first asked.
    close
        Called by `close`.

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
    shuffle_buffer
        None where cells can be read in any order; else the cells among which an order should shuffle, so that
        what lies together is read together.
    block_cells
        How many neighbours are read well together; None where that makes no difference.
    """

    def __init__(
        self,
        source: Source,
        layer: str | None,
        held: Held,
        var: pd.DataFrame,
        obs: Callable[[], pd.DataFrame],
        library_size: Callable[[], np.ndarray | None] = lambda: None,
        shuffle_buffer: int | None = None,
        block_cells: int | None = None,
        close: Callable[[], None] = lambda: None,
        some_obs: ObsParts | None = None,
    ) -> None:
        self.source, self.layer = source, layer
        self.name = "AnnData" if isinstance(source, ad.AnnData) else str(source)
        self.var = var
        self.shuffle_buffer, self.block_cells = shuffle_buffer, block_cells
        self._reader, (self.n_cells, self.n_genes), self.storage = held
        self._in_place = held.reader.in_place if isinstance(held.reader, _InPlace) else None
        self._read_obs, self._read_library_size, self._close = obs, library_size, close
        self._some_obs = some_obs
        if len(var) != self.n_genes:
            raise damaged(self.name, f"{self.place} has {self.n_genes:,} columns, var {len(var):,} rows")
        if not self.n_cells or not self.n_genes:
            what = "cells" if not self.n_cells else "genes"
            raise DataError(
                f"'{self.name}' has no {what}: {self.place} is {self.n_cells:,} × {self.n_genes:,}.\n"
                "Check the filters that it went through, or leave this file out."
            )

    @property
    def place(self) -> str:
        """Where in the file the matrix is: "X", "raw" or "layer 'NAME'"."""
        return place_of(self.layer)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The cells' annotations, read when first asked."""
        obs = self._read_obs()
        if len(obs) != self.n_cells:
            raise damaged(self.name, f"{self.place} has {self.n_cells:,} rows, obs {len(obs):,}")
        return obs

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of `obs`, which is not read for this where it is on disk."""
        return self._some_obs.columns() if self._some_obs else [str(name) for name in self.obs.columns]

    def obs_rows(self, start: int, stop: int, columns: list[str] | None = None) -> pd.DataFrame:
        """The annotations (None: all) of the cells `start:stop`; those of other cells are not read from a file."""
        if self._some_obs is None:
            obs = self.obs if columns is None else self.obs[columns]
            return obs.iloc[start:stop].set_axis(
                obs.index[start:stop].astype(str)
            )  # the Census numbers its cells
        obs = self._some_obs.rows(start, stop, columns)
        if len(obs) != stop - start:
            raise damaged(self.name, f"{self.place} has {self.n_cells:,} rows, obs fewer")
        return obs

    @property
    def is_mapped(self) -> bool:
        """Whether the counts are in memory or mapped into it, so that any cell can be had at once."""
        return self._in_place is not None

    @cached_property
    def library_size(self) -> np.ndarray | None:
        """float64 (n_cells) of a shard, over genes that are no longer in it too; None where genes are all there."""
        return self._read_library_size()

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
            raise damaged(self.name, f"{self.place} names a column outside of its {self.n_genes:,} genes")
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
        if self._in_place is not None:
            try:
                held = self._in_place()
            except OSError as error:
                raise damaged(self.name, f"{self.place} cannot be read ({error})") from error
            if all(map(_computable, held)):
                return held, rows
        block = self._take(rows)
        if not all(map(_computable, block)):
            block = Rows(block.indptr, block.indices.astype(np.int32), block.data.astype(np.float32))
        return block, np.arange(len(rows))

    def prefetch(self, rows: np.ndarray) -> None:
        """Begin to read cells that will be asked for soon; nothing where reading them then costs no time."""
        if isinstance(self._reader, _Ahead):
            self._reader.prefetch(rows)

    def _take(self, rows: np.ndarray) -> Rows:
        try:
            return self._reader.take(rows)
        except OSError as error:
            raise damaged(self.name, f"{self.place} cannot be read ({error})") from error

    def close(self) -> None:
        """Close the file, so that it can be written; the matrix cannot be read after that."""
        self._close()


def place_of(layer: str | None) -> str:
    """Where in a file the matrix of this layer is, for people."""
    return "X" if layer is None else "raw" if layer == "raw" else f"layer '{layer}'"


def damaged(name: str, what: str) -> DataError:
    """The error of a file that cannot be read to its end, or contradicts itself."""
    return DataError(
        f"'{name}' is truncated or damaged: {what}.\nCopy or download it again, or write it anew."
    )


def read_frame(value: Any, name: str, part: str) -> pd.DataFrame:
    """Read `obs` or `var` as anndata stores it; raise `DataError` if that fails."""
    try:
        return read_elem(value)
    except IORegistryError as error:
        raise DataError(
            f"'{name}': '{part}' is stored in a way that this version of anndata does not know ({error})."
        ) from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise damaged(name, f"'{part}' cannot be read ({error})") from error


def no_matrix(name: str, layer: str | None, places: Sequence[str | None]) -> DataError:
    """The error of a source that has only the matrices `places`, and not `layer`."""
    wanted = {None: "X", "raw": ".raw"}.get(layer, f"layer '{layer}'")
    near = difflib.get_close_matches(str(layer), [p for p in places if p], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    there = ", ".join("X (data.layer: null)" if p is None else f"'{p}'" for p in places) or "no matrix at all"
    return DataError(f"'{name}' has no {wanted}.{hint}\nThere is: {there}. Set data.layer to one of these.")


def check_numeric(dtype: np.dtype, name: str, place: str) -> None:
    """Raise `DataError` unless the values are numbers."""
    if dtype.kind not in "biuf":
        raise DataError(f"'{name}': {place} holds {dtype} values; expected counts (integers or floats).")


def _computable(array: np.ndarray) -> bool:
    """Whether compiled code takes it: of the machine's byte order, and no half precision."""
    return array.dtype.isnative and array.dtype != np.float16


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Return the int64 running sum, from 0."""
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and positions of the entries that lie in these spans, one span after the other."""
    indptr = offsets(lengths)
    return indptr, np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], lengths)


# --- matrices in memory -------------------------------------------------------------------------------


def held_in_memory(value: Any, name: str, place: str) -> Held:
    """Read a sparse or dense matrix in memory; raise `DataError` if it is neither."""
    if sparse.issparse(value) and value.format in ("csr", "csc"):
        check_numeric(value.dtype, name, place)
        csr = value.tocsr()
        reader = Rows(csr.indptr.astype(np.int64), csr.indices, csr.data)
        return Held(reader, value.shape, f"{value.format.upper()}, {value.dtype}, in memory")
    if isinstance(value, np.ndarray) and value.ndim == 2:
        check_numeric(value.dtype, name, place)
        return Held(Dense(value), value.shape, f"dense, {value.dtype}, in memory")
    raise DataError(
        f"'{name}': {place} is a {type(value).__name__}, which cannot be read by rows.\n"
        "Expected a CSR, CSC or dense matrix; for a lazy one call adata.to_memory() first."
    )


class Dense:
    """A two-dimensional array, in memory or one that is read by slices of rows; what is not zero counts as stored."""

    def __init__(self, array: Any) -> None:
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
        return Rows(offsets(lengths), indices, data).take(inverse)

    def _block(self, rows: np.ndarray) -> Rows:
        if isinstance(self.array, np.ndarray):
            block = self.array[rows]
        else:
            edges = np.flatnonzero(np.diff(rows) > 1) + 1
            block = np.concatenate([self.array[r[0] : r[-1] + 1] for r in np.split(rows, edges)])
        row, column = np.nonzero(block)
        return Rows(offsets(np.bincount(row, minlength=len(rows))), column, block[row, column])
