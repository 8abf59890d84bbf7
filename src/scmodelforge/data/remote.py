"""Remote files, fetched once into a cache folder.

An entry is named by the hash of its address and of what the server says identifies the content (ETag, size, date):
another content is another entry. Bytes are appended to a `.part` file and renamed when they are all there, so what
has the entry's name is whole, and a fetch that was cut or killed asks for the rest only. A .zarr store is mirrored
object by object the same way: reading single objects on demand would put the network into every batch.
The entries that were used longest ago go when the folder outgrows its limit, but none that this process uses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from scmodelforge.data.transport import THREADS, Cut, Described, File, connect, list_folder
from scmodelforge.errors import DataError
from scmodelforge.files import ensure_writable, write_text

log = logging.getLogger(__name__)

CACHE_VARIABLE = "SCMODELFORGE_CACHE"
LIMIT_GB = 100.0
ATTEMPTS = 5  # in a row that bring no byte
ABANDONED = 86_400.0  # seconds after which a part that nobody goes on with may be removed
PAUSE = 1.0  # seconds after the first of them, then twice as long each time

_in_use: set[Path] = set()  # entries of this process


@dataclass(frozen=True)
class Remote:
    """A file or a .zarr store behind a URL, and the folder to keep it in.

    Attributes
    ----------
    url
        Its address.
    cache_dir
        Where it is kept; None: the folder that SCMODELFORGE_CACHE names, else ~/.cache/scmodelforge.
    limit_gb
        Largest size of that folder.
    member
        Name of the AnnData store within a collection; "" if it is none.
    """

    url: str
    cache_dir: str | None = None
    limit_gb: float = LIMIT_GB
    member: str = ""

    def __str__(self) -> str:
        return f"{self.url}/{self.member}" if self.member else self.url

    @cached_property  # one object sees one version, whatever happens on the server
    def local(self) -> Path:
        """The path of the copy; it is fetched when first asked, unless it is there.

        Raises
        ------
        DataError
            If it does not exist, may not be read, or cannot be fetched whole.
        MissingExtraError
            If the package for its protocol is not installed.
        """
        return fetch(self.url, self.cache_dir, self.limit_gb) / self.member


def is_url(source: object) -> bool:
    """Whether this names something remote."""
    return isinstance(source, str) and "://" in source


def fetch(url: str, cache_dir: str | Path | None = None, limit_gb: float = LIMIT_GB) -> Path:
    """Return the path of a local copy, as `Remote.local` says."""
    default = os.environ.get(CACHE_VARIABLE) or "~/.cache/scmodelforge"
    folder = ensure_writable(Path(cache_dir or default).expanduser() / "remote")
    url = url.rstrip("/")
    if url.endswith(".zarr"):
        objects = list_folder(url)
        identity = "\n".join(f"{name} {file.described.identity}" for name, file in objects.items())
        size = sum(file.described.size or 0 for file in objects.values())
    else:
        file = connect(url)
        identity, size = file.described.identity, file.described.size or 0
    key = hashlib.sha256(f"{url}\n{identity}".encode()).hexdigest()
    target = folder / f"{key}{Path(url.partition('?')[0]).suffix}"
    with _alone(folder / f"{key}.lock"):
        if not target.exists():
            part = folder / f"{key}.part"
            _require_room(folder, size - _size(part), url, limit_gb)
            log.info("Fetching '%s' (%s MB) into '%s'.", url, f"{size / 1e6:,.0f}", folder)
            if url.endswith(".zarr"):
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(partial(_mirror, part), objects.items()))
                os.replace(part, target)
            else:
                download(file, part, target)
            write_text(folder / f"{key}.json", json.dumps({"url": url, "identity": identity[:1000]}) + "\n")
    os.utime(target)  # used now
    _in_use.add(target)
    _trim(folder, limit_gb)
    return target


def _mirror(folder: Path, item: tuple[str, File]) -> None:
    name, file = item
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download(file, path.with_name(f"{path.name}.part"), path)


def download(file: File, part: Path, target: Path) -> None:
    """Append to `part` what it lacks, check it, and give it the name `target`.

    Raises
    ------
    DataError
        If the server changes the file meanwhile, breaks off again and again, or its checksum is another one.
    """
    described = file.described
    failures = 0
    part.touch()  # an empty file is never appended to
    while True:
        have = _size(part)
        if described.size is not None and have >= described.size:
            break
        try:
            _append(file, part, have)
            if described.size is None or _size(part) >= described.size:
                break
            cut = Cut("the connection was closed")
        except Cut as error:
            cut = error
        failures = 0 if _size(part) > have else failures + 1
        if failures >= ATTEMPTS:
            raise DataError(
                f"'{file.url}' cannot be fetched: {cut}, {ATTEMPTS} times in a row. {_size(part):,} bytes of it are "
                "kept.\nCheck the connection and start again: the rest is fetched then."
            )
        log.warning("'%s': %s after %s bytes; going on from there.", file.url, cut, f"{_size(part):,}")
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
    _require_whole(part, described, file.url)
    with open(part, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(part, target)


def _append(file: File, part: Path, have: int) -> None:
    start, blocks = file.read_from(have)
    if have and not start:
        log.warning("'%s': the server sends whole files only, so it is fetched from the beginning.", file.url)
    with open(part, "ab") as handle:
        handle.truncate(start)
        for block in blocks:
            handle.write(block)


def _require_whole(part: Path, described: Described, url: str) -> None:
    size = _size(part)
    wrong = f"has {size:,} bytes instead of {described.size:,}" if described.size not in (None, size) else ""
    if not wrong and described.checksum:
        kind, expected = described.checksum
        with open(part, "rb") as handle:
            if hashlib.file_digest(handle, kind).digest() != expected:
                wrong = f"does not have the {kind} that the server gives"
    if wrong:
        part.unlink()
        raise DataError(f"What came of '{url}' {wrong}; it was thrown away. Start again to fetch it anew.")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process or thread fetches this entry."""
    import fcntl  # not on Windows

    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if there is none."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size if path.exists() else 0


def _require_room(folder: Path, needed: int, url: str, limit_gb: float) -> None:
    _trim(folder, limit_gb, needed)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"'{url}' needs {needed / 1e9:.1f} GB in '{folder}', where {free / 1e9:.1f} GB are free.\n"
            f"Point data.cache_dir (or the environment variable {CACHE_VARIABLE}) to a larger disk."
        )


def _trim(folder: Path, limit_gb: float, coming: int = 0) -> None:
    """Remove the entries that were used longest ago until the folder keeps its limit."""
    entries = [path for path in folder.iterdir() if path.suffix not in (".json", ".lock")]
    sizes = {path: _size(path) for path in entries}
    too_much = sum(sizes.values()) + coming - limit_gb * 1e9
    being_fetched = time.time() - ABANDONED
    unused = sorted(
        (path for path in entries if path not in _in_use),
        key=lambda path: path.stat().st_mtime,
    )
    unused = [path for path in unused if path.suffix != ".part" or path.stat().st_mtime < being_fetched]
    for path in unused:
        if too_much <= 0:
            return
        log.info(
            "Removing '%s' (%s MB), unused for longest, from the cache.", path, f"{sizes[path] / 1e6:,.0f}"
        )
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
        too_much -= sizes[path]
    if too_much > 0 and not coming:
        log.warning(
            "'%s' holds %.1f GB more than its limit (data.cache_size_gb: %g), all of it in use.",
            folder,
            too_much / 1e9,
            limit_gb,
        )
