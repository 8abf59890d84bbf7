"""Remote files come once and whole, whatever happens to the connection."""

from __future__ import annotations

import base64
import hashlib
import logging
import multiprocessing
import os
import threading

import numpy as np
import pytest

from scmodelforge.config import DataConfig
from scmodelforge.config_io import load_config
from scmodelforge.data import remote, transport
from scmodelforge.data.remote import Remote, fetch
from scmodelforge.data.sources import matrix_places, open_matrix, sources_of
from scmodelforge.data.store import open_store
from scmodelforge.errors import ConfigError, DataError, MissingExtraError
from tests.data.files import NO_MINIMUM, as_dense, make_adata
from tests.data.server import serving
from tests.helpers import make_vocab

COUNTS = np.random.default_rng(0).poisson(1.0, size=(20, 15))


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "_in_use", set())
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def put(server, name, n_bytes=100_000, seed=0):
    data = np.random.default_rng(seed).bytes(n_bytes)
    (server.folder / name).write_bytes(data)
    return f"{server.url}/{name}", data


def entries(cache):
    return sorted(path.name for path in (cache / "remote").iterdir() if path.suffix not in (".json", ".lock"))


def test_a_remote_file_is_a_source_like_others(server, cache):
    make_adata(COUNTS, np.arange(15)).write_h5ad(server.folder / "a.h5ad")
    url = f"{server.url}/a.h5ad"
    config = DataConfig(paths=[url], cache_dir=str(cache), min_gene_overlap=0)
    (source,) = sources_of(config)
    store = open_store([source], make_vocab(15), config)
    np.testing.assert_array_equal(as_dense(store.read(np.arange(20)), 15), COUNTS)
    assert store.files == [url], "the user's name for it, not the cache's"
    assert matrix_places(source) == [None]
    with pytest.raises(DataError, match=r"a\.h5ad' has no layer 'counts'"):
        open_matrix(source, "counts")


def test_the_folder_comes_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SCMODELFORGE_CACHE", str(tmp_path / "elsewhere"))
    url, data = put(server, "a.h5ad")
    assert fetch(url).read_bytes() == data
    assert entries(tmp_path / "elsewhere")


def test_it_is_fetched_once_and_anew_when_it_changed(server, cache):
    url, data = put(server, "a.bin")
    first = fetch(url, cache)
    assert fetch(url, cache) == first
    assert server.served == len(data)
    url, changed = put(server, "a.bin", seed=1)
    second = fetch(url, cache)
    assert first != second
    assert (first.read_bytes(), second.read_bytes()) == (data, changed)


def test_twenty_cuts_lose_nothing_and_fetch_nothing_twice(server, cache):
    url, data = put(server, "a.bin")
    server.cuts = np.random.default_rng(3).integers(1, 4000, 20).tolist()
    assert fetch(url, cache).read_bytes() == data
    assert not server.cuts
    assert server.served == len(data)
    assert [name for name in entries(cache) if name.endswith(".part")] == []


def _fetch_in_child(url, cache):
    transport.BLOCK_BYTES = 1000
    write = remote.open if hasattr(remote, "open") else open
    left = [int(os.environ["DIES_AFTER"])]

    class Dying:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.handle.close()

        def write(self, block):
            self.handle.write(block[: left[0]])
            left[0] -= len(block)
            if left[0] <= 0:
                self.handle.flush()
                os._exit(9)

    remote.open = lambda path, mode: Dying(write(path, mode)) if mode == "ab" else write(path, mode)
    fetch(url, cache)


def test_a_killed_fetch_goes_on_where_it_was(server, cache, monkeypatch):
    url, data = put(server, "a.bin")
    monkeypatch.setenv("DIES_AFTER", "30000")
    child = multiprocessing.get_context("fork").Process(target=_fetch_in_child, args=(url, cache))
    child.start()
    child.join()
    assert child.exitcode == 9
    (part,) = entries(cache)
    assert part.endswith(".part")
    have = (cache / "remote" / part).stat().st_size
    assert have == 30_000
    server.asked.clear()
    assert fetch(url, cache).read_bytes() == data
    assert [first for method, _, first in server.asked if method == "GET"] == [have]


def test_a_server_without_ranges_is_asked_from_the_beginning(server, cache, caplog):
    url, data = put(server, "a.bin")
    server.ranges, server.cuts = False, [5000, 7000]
    assert fetch(url, cache).read_bytes() == data
    assert "sends whole files only" in caplog.text
    assert server.served == len(data) + 12_000


def test_a_server_that_takes_no_head(server, cache):
    url, data = put(server, "a.bin")
    server.head = False
    assert fetch(url, cache).read_bytes() == data


def test_two_at_once_fetch_it_once(server, cache):
    url, data = put(server, "a.bin", 2_000_000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(url, cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert found[0].read_bytes() == data
    assert server.served == len(data)


def test_the_longest_unused_goes_but_nothing_of_this_run(server, cache, caplog):
    urls = [put(server, f"{i}.bin", 1_000_000, seed=i)[0] for i in range(4)]
    paths = [fetch(url, cache) for url in urls[:3]]
    for age, path in zip((300, 100, 200), paths, strict=True):
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    remote._in_use -= {paths[0], paths[2]}
    with caplog.at_level(logging.INFO):
        new = fetch(urls[3], cache, limit_gb=0.0031)
    assert [path.exists() for path in paths] == [False, True, True]
    assert new.exists()
    assert f"Removing '{paths[0]}'" in caplog.text
    fetch(urls[1], cache, limit_gb=0.0001)
    assert [path.exists() for path in paths] == [False, True, False]
    assert new.exists(), "of this run"
    assert "more than its limit (data.cache_size_gb: 0.0001), all of it in use" in caplog.text


def test_a_checksum_that_does_not_fit(server, cache):
    url, data = put(server, "a.bin")
    server.md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    fetch(url, cache)
    url, _ = put(server, "b.bin", seed=1)
    with pytest.raises(DataError, match="does not have the md5 that the server gives; it was thrown away"):
        fetch(url, cache)
    assert len(entries(cache)) == 1


def test_a_file_that_changes_while_it_comes(server, cache):
    url, _ = put(server, "a.bin")
    file = transport.connect(url)
    put(server, "a.bin", seed=1)
    with pytest.raises(DataError, match=r"a\.bin' was changed while it was fetched"):
        remote.download(file, cache.parent / "x.part", cache.parent / "x")


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "does not exist"), (403, "may not be read"), (401, "may not be read"), (500, "answers 500")],
)
def test_refusals_are_sentences(server, cache, status, message):
    url, _ = put(server, "a.bin")
    server.status = status
    with pytest.raises(DataError, match=message):
        fetch(url, cache)


def test_nobody_answers(cache):
    with pytest.raises(DataError, match=r"'http://127\.0\.0\.1:9/a\.h5ad' cannot be reached"):
        fetch("http://127.0.0.1:9/a.h5ad", cache)


def test_a_server_that_always_breaks_off(server, cache):
    url, _ = put(server, "a.bin")
    server.cuts = [10, *[0] * 50]
    with pytest.raises(DataError, match=r"5 times in a row\. 10 bytes of it are kept"):
        fetch(url, cache)


def test_no_room(server, cache, monkeypatch):
    url, _ = put(server, "a.bin")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"Point data\.cache_dir .* to a larger disk"):
        fetch(url, cache)


def test_unknown_protocols(cache):
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=r"'nonsense://x/a\.h5ad' is not an address that can be read"):
        fetch("nonsense://x/a.h5ad", cache)


def test_a_protocol_whose_package_is_missing(cache, monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def lacks(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacks)
    with pytest.raises(MissingExtraError, match=r"Install s3fs to access S3.\n.*scmodelforge\[cloud\]"):
        fetch("s3://bucket/a.h5ad", cache)


# --- protocols of fsspec --------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """The file system in memory, which can break off and notes the ranges that it is asked for."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(transport, "RANGE_BYTES", 10_000)
    system = fsspec.filesystem("memory")
    system.store.clear()
    whole, system.asked, system.fails = type(system).cat_file, [], []

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append((start, end))
        if self.fails and self.fails.pop(0):
            raise OSError("connection reset")
        return whole(self, path, start=start, end=end)

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    yield system
    system.store.clear()


def test_ranges_through_fsspec(memory, cache):
    data = np.random.default_rng(0).bytes(45_678)
    memory.pipe_file("/bucket/a.h5ad", data)
    memory.fails = [False, False, True, False, True]
    assert fetch("memory://bucket/a.h5ad", cache).read_bytes() == data
    firsts = [start for start, _ in memory.asked]
    assert firsts == [0, 10_000, 20_000, 20_000, 30_000, 30_000, 40_000]


def test_missing_through_fsspec(memory, cache):
    with pytest.raises(DataError, match=r"'memory://bucket/a\.h5ad' does not exist"):
        fetch("memory://bucket/a.h5ad", cache)
    with pytest.raises(DataError, match=r"'memory://bucket/a\.zarr' does not exist"):
        fetch("memory://bucket/a.zarr", cache)


@pytest.mark.parametrize("scheme", ["http", "memory"])
def test_zarr_stores_are_mirrored(server, cache, scheme, request):
    pytest.importorskip("zarr")
    make_adata(COUNTS, np.arange(15)).write_zarr(server.folder / "a.zarr")
    url = f"{server.url}/a.zarr"
    if scheme == "memory":
        memory = request.getfixturevalue("memory")
        memory.put(str(server.folder / "a.zarr"), "/bucket/a.zarr", recursive=True)
        url = "memory://bucket/a.zarr"
    server.cuts = [3, 5, 1]
    source = Remote(url, str(cache))
    store = open_store([source], make_vocab(15), NO_MINIMUM)
    np.testing.assert_array_equal(as_dense(store.read(np.arange(20)), 15), COUNTS)
    served = server.served
    assert open_matrix(Remote(url, str(cache))).n_cells == 20
    assert server.served == served, "the objects are there"


# --- configs --------------------------------------------------------------------------------------------


def test_configs_take_urls_and_no_patterns_of_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  paths: [https://example.org/a.h5ad, s3://bucket/b.zarr]\n")
    assert load_config(path, require_data=True).data.paths == [
        "https://example.org/a.h5ad",
        "s3://bucket/b.zarr",
    ]
    path.write_text("data:\n  paths: ['s3://bucket/*.h5ad', s3://b/c.h5ad, s3://b/c.h5ad]\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, require_data=True)
    assert "'s3://bucket/*.h5ad' is a pattern; list the URLs one by one" in str(error.value)
    assert "'s3://b/c.h5ad' is listed twice" in str(error.value)


def test_an_empty_object_is_fetched_as_one(server, cache):
    (server.folder / "empty.h5ad").write_bytes(b"")
    assert fetch(f"{server.url}/empty.h5ad", cache).read_bytes() == b""
