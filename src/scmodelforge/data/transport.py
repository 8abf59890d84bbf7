"""How bytes of a remote file arrive: HTTP by the standard library, every other protocol by fsspec.

HTTP is spoken here and not through fsspec, because only the answer's status tells a server that sends the rest of a
file from one that ignores the question and begins anew.
"""

from __future__ import annotations

import base64
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any, NamedTuple, Protocol

from scmodelforge.errors import DataError, MissingExtraError, require_extra

BLOCK_BYTES = 2**20
RANGE_BYTES = 8 * 2**20  # of one request where every request asks for a range
THREADS = 8  # requests at once, for the many objects of a store
TIMEOUT = 60.0  # seconds without a byte


class Described(NamedTuple):
    """What a server says of a file: size in bytes if known, what tells another content, and a checksum if given."""

    size: int | None
    identity: str
    checksum: tuple[str, bytes] | None = None


class Cut(Exception):
    """The connection ended before the file did."""


class File(Protocol):
    """A remote file."""

    url: str
    described: Described

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        """Return where the bytes really begin (`start`, or 0 if the server cannot), and the bytes from there.

        Raises `Cut` where the connection ends early, and `DataError` where it is of no use to try again.
        """


def connect(url: str) -> File:
    """Ask what is behind a URL; raise `DataError` if there is no file that can be read."""
    scheme = urllib.parse.urlsplit(url).scheme
    return _Http(url) if scheme in ("http", "https") else _Fsspec(url)


def list_folder(url: str) -> dict[str, File]:
    """All files below a URL, by their names from there, in order.

    Raises
    ------
    DataError
        If there is nothing, or the server does not list what it has.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme in ("http", "https"):
        names = list(_linked(f"{url}/", ""))
        with ThreadPoolExecutor(THREADS) as pool:
            addresses = (f"{url}/{urllib.parse.quote(name)}" for name in names)
            files: dict[str, File] = dict(zip(names, pool.map(_Http, addresses), strict=True))
        if "zarr.json" not in files and ".zgroup" not in files:
            raise DataError(
                f"'{url}' cannot be copied: this server does not list the files of the folder.\n"
                "Copy the store to a local folder, or name it where it can be listed (s3://, gs://)."
            )
    else:
        system, path = _system_of(url)
        with _explained(url):
            found = system.find(path, detail=True)
        prefix = path.rstrip("/") + "/"
        files = {
            name.removeprefix(prefix): _Fsspec(f"{url}/{name.removeprefix(prefix)}", info)
            for name, info in found.items()
        }
    if not files:
        raise DataError(f"'{url}' does not exist, or is an empty folder. Check the address.")
    return dict(sorted(files.items()))


# --- HTTP ---------------------------------------------------------------------------------------------


class _Http:
    def __init__(self, url: str) -> None:
        self.url = url
        try:
            try:
                answer = self._ask("HEAD")
            except DataError as error:
                if not isinstance(error.__cause__, urllib.error.HTTPError) or error.__cause__.code == 404:
                    raise
                answer = self._ask("GET")  # some servers, and signed addresses, take no HEAD
        except Cut as error:
            raise DataError(
                f"'{url}' cannot be reached: {error}.\nCheck the connection, or try later."
            ) from error
        with answer:
            self.described = _described(answer)

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        answer = self._ask("GET", {"Range": f"bytes={start}-"} if start else {})
        now = _described(answer, start if answer.status == 206 else 0)
        if now.identity != self.described.identity:
            raise DataError(
                f"'{self.url}' was changed while it was fetched. Start again to fetch the new one."
            )
        return (start if answer.status == 206 else 0), self._blocks(answer)

    def _blocks(self, answer: Any) -> Iterator[bytes]:
        with answer:
            while True:
                try:
                    block = answer.read1(BLOCK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    raise Cut(f"the connection broke ({error or type(error).__name__})") from error
                if not block:
                    return
                yield block

    def _ask(self, method: str, headers: dict[str, str] | None = None) -> Any:
        # Compressed on the way, bytes could not be counted.
        asked = {"Accept-Encoding": "identity", "User-Agent": "scmodelforge", **(headers or {})}
        try:
            request = urllib.request.Request(self.url, headers=asked, method=method)
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code in (408, 429) or (error.code >= 500 and error.code != 501 and method == "GET"):
                raise Cut(f"the server answers {error.code} ({error.reason})") from error
            raise DataError(_refusal(self.url, error.code, str(error.reason))) from error
        except urllib.error.URLError as error:
            if headers is not None:  # it was there before
                raise Cut(f"the server cannot be reached ({error.reason})") from error
            raise DataError(
                f"'{self.url}' cannot be reached: {error.reason}.\nCheck the address and the connection."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Cut(f"the connection broke ({error or type(error).__name__})") from error
        except ValueError as error:
            raise DataError(f"'{self.url}' is not an address that can be asked ({error}).") from error


def _refusal(url: str, code: int, reason: str) -> str:
    if code in (404, 410):
        return f"'{url}' does not exist (the server answers {code}). Check the address."
    if code in (401, 403):
        return f"'{url}' may not be read (the server answers {code}). Use an address that you may read."
    return f"'{url}' cannot be fetched: the server answers {code} ({reason}). Check the address."


def _described(answer: Any, start: int = 0) -> Described:
    """What the headers say; `start`: the first byte of an answer that holds only the rest."""
    headers = answer.headers
    length = headers.get("Content-Length")
    whole = headers.get("Content-Range", "").rpartition("/")[2]
    size = int(whole) if start and whole.isdecimal() else start + int(length) if length else None
    identity = f"{headers.get('ETag', '')} {size} {headers.get('Last-Modified', '')}"
    checksum = None
    if start == 0 and (md5 := headers.get("Content-MD5")):
        checksum = "md5", base64.b64decode(md5)
    elif start == 0 and headers.get("Digest", "").lower().startswith("sha-256="):
        checksum = "sha256", base64.b64decode(headers["Digest"][len("sha-256=") :])
    return Described(size, identity, checksum)


class _Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _linked(url: str, prefix: str) -> Iterator[str]:
    """Names of the files that the index pages at and below `url` link to."""
    page = _Http(url)
    with page._ask("GET") as answer:
        if "html" not in answer.headers.get("Content-Type", ""):
            return
        links = _Links(answer.read().decode("utf-8", "replace")).found
    for link in sorted(set(links)):
        name = urllib.parse.unquote(link)
        if "/" in name.rstrip("/") or name.startswith(("?", "#", "..")):
            continue  # not a file of this folder
        if name.endswith("/"):
            yield from _linked(f"{url}{link}", prefix + name)
        else:
            yield prefix + name


# --- other protocols ----------------------------------------------------------------------------------


class _Fsspec:
    def __init__(self, url: str, info: dict[str, Any] | None = None) -> None:
        self.url = url
        self.system, self.path = _system_of(url)
        if info is None:
            with _explained(url):
                info = self.system.info(self.path)
        if info.get("type") == "directory":
            raise DataError(f"'{url}' is a folder; expected the address of an .h5ad file or a .zarr store.")
        versions = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "mtime", "created")
        self.described = Described(info["size"], " ".join(str(info.get(k, "")) for k in ("size", *versions)))

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        return start, self._blocks(start)

    def _blocks(self, start: int) -> Iterator[bytes]:
        size = self.described.size or 0
        for first in range(start, size, RANGE_BYTES):
            with _explained(self.url, cut=True):
                block = self.system.cat_file(self.path, start=first, end=min(first + RANGE_BYTES, size))
            yield block
            if len(block) < min(first + RANGE_BYTES, size) - first:
                raise Cut("the connection was closed")


def _system_of(url: str) -> tuple[Any, str]:
    require_extra("fsspec", "cloud", f"'{url}'")
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(
            f"'{url}' needs a package that is not installed: {error}.\n"
            "Install it with: pip install 'scmodelforge[cloud]'"
        ) from error
    except ValueError as error:
        raise DataError(f"'{url}' is not an address that can be read ({error}).") from error


@contextmanager
def _explained(url: str, cut: bool = False) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"'{url}' does not exist. Check the address.") from error
    except PermissionError as error:
        raise DataError(
            f"'{url}' may not be read ({error}).\nCheck the credentials that its protocol takes from the environment."
        ) from error
    except _errors_of_clients() as error:
        if cut:
            raise Cut(f"the connection broke ({error})") from error
        raise DataError(
            f"'{url}' cannot be reached ({error}).\nCheck address, connection and credentials."
        ) from error


def _errors_of_clients() -> tuple[type[BaseException], ...]:
    """OSError, and the errors of the packages that fsspec has loaded."""
    loaded = [
        getattr(sys.modules[module], name)
        for module, name in (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
        if module in sys.modules
    ]
    return (OSError, *loaded)
