"""Thousands of files, of which a few are open.

A process may have so many files open (often 1,024), and every HDF5 file that is open keeps its chunks in memory.
So a file is opened when it is read, stays open while there is room, and is closed when others need the room and
nobody reads it. Mapped arrays take part: Python keeps a file open for as long as it is mapped.
"""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import h5py
import numpy as np

from scmodelforge.data.matrix import Rows
from scmodelforge.errors import DataError

MOST_OPEN = max(32, min(512, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))  # HDF5 files
MOST_MAPPED = max(
    64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
)  # files with mapped arrays

T = TypeVar("T")


class Kept(Generic[T]):
    """At most `most` things that are opened when asked for, the longest unused closed first; thread-safe."""

    def __init__(self, most: int, close: Callable[[T], None]) -> None:
        self.most, self._close = most, close
        self._things: OrderedDict[int, T] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.RLock()  # a finalizer may call `discard` while this thread holds it

    @contextmanager
    def borrow(self, key: int, open_: Callable[[], T]) -> Iterator[T]:
        """Lend the thing of this key; it is not closed meanwhile."""
        with self._lock:
            thing = self._things.get(key)
            if thing is None:
                self._close_unused(self.most - 1)  # first, so that there is room
                thing = self._things[key] = open_()
            self._things.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
        try:
            yield thing
        finally:
            with self._lock:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key]
                self._close_unused(self.most)

    def discard(self, key: int) -> None:
        """Close the thing of this key, if it is open."""
        with self._lock:
            thing = self._things.pop(key, None)
            if thing is not None:
                self._close(thing)

    def _close_unused(self, room: int) -> None:
        if len(self._things) <= room:
            return
        for key in [key for key in self._things if key not in self._users][: len(self._things) - room]:
            self.discard(key)

    def __len__(self) -> int:
        return len(self._things)


class OpenFile:
    """An open HDF5 file and the datasets asked of it, which keep their chunks for as long as they are open."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self._parts: dict[str, h5py.Dataset] = {}

    def __getitem__(self, key: str) -> h5py.Dataset:
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = self.file[key]
        return part

    def close(self) -> None:
        self._parts.clear()
        self.file.close()


_numbers = itertools.count()
_open: Kept[OpenFile] = Kept(MOST_OPEN, OpenFile.close)
_mapped: Kept[Rows] = Kept(MOST_MAPPED, lambda rows: None)  # unmapped with the last array that points into it


class LentFile:
    """An HDF5 file that is open while it is read, and afterwards as long as there is room.

    Parameters
    ----------
    path, name
        Where it is, and what the user calls it.
    open_
        Opens it.
    """

    def __init__(self, path: Path, name: str, open_: Callable[[], h5py.File]) -> None:
        self.path, self.name, self.version = path, name, ""
        self._open = open_
        self._key = next(_numbers)
        weakref.finalize(self, _open.discard, self._key)

    def close(self) -> None:
        """Close the file until it is read again."""
        _open.discard(self._key)

    def borrow(self) -> AbstractContextManager[OpenFile]:
        """Lend the open file; raises `DataError` if another one has come in its place since the first time."""
        return _open.borrow(self._key, self._opened)

    def _opened(self) -> OpenFile:
        file = self._open()
        now = _version(self.path)
        if self.version and self.version != now:
            file.close()
            raise _changed(self.name)
        self.version = now
        return OpenFile(file)


class Mapped:
    """CSR whose arrays lie in one piece in a file, mapped into memory while there is room.

    Parameters
    ----------
    path, name
        Where the file is, and what the user calls it.
    indptr
        int64 (n + 1), in memory.
    arrays
        Type, number of entries and first byte of `indices` and `data`.
    """

    def __init__(
        self, path: Path, name: str, indptr: np.ndarray, arrays: Sequence[tuple[np.dtype, int, int]]
    ) -> None:
        self.path, self.name, self.indptr, self.arrays = path, name, indptr, arrays
        self._version = _version(path)
        self._key = next(_numbers)
        weakref.finalize(self, _mapped.discard, self._key)

    def in_place(self) -> Rows:
        """The whole matrix; its arrays stay valid for as long as they are held."""
        with _mapped.borrow(self._key, self._map) as rows:
            return rows

    def take(self, rows: np.ndarray) -> Rows:
        return self.in_place().take(rows)

    def _map(self) -> Rows:
        with open(self.path, "rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if _version(self.path) != self._version:
            raise _changed(self.name)
        indices, data = (np.frombuffer(held, dtype, count, offset) for dtype, count, offset in self.arrays)
        return Rows(self.indptr, indices, data)


def _version(path: Path) -> str:
    """What tells that a file is still the same one: size, time and place on the disk."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _changed(name: str) -> DataError:
    return DataError(
        f"'{name}' was written anew while it was in use. Start again, and leave it alone meanwhile."
    )
