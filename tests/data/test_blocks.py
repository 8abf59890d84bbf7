"""Blocks in memory: what comes out is what the source holds, in bounded memory, whatever threads ask."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.data.blocks import BlockCache, by_runs
from scmodelforge.data.matrix import Rows
from scmodelforge.errors import DataError

N_ROWS, BLOCK = 1000, 10


class Source:
    """Rows that tell their number: row `r` holds `r % 4` entries of value `r`; remembers what was read."""

    def __init__(self, n_rows: int = N_ROWS) -> None:
        lengths = np.arange(n_rows) % 4
        indptr = np.r_[0, np.cumsum(lengths)]
        indices = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
        self.rows = Rows(indptr, indices.astype(np.int32), np.repeat(np.arange(n_rows), lengths))
        self.reads: list[np.ndarray] = []
        self.error: Exception | None = None

    def read(self, rows: np.ndarray) -> Rows:
        self.reads.append(rows)
        if self.error:
            raise self.error
        return self.rows.take(rows)

    def cache(self, **sizes: int) -> BlockCache:
        return BlockCache(self.read, len(self.rows.indptr) - 1, BLOCK, **sizes)

    def n_read(self) -> int:
        return sum(map(len, self.reads))


def assert_same(got: Rows, expected: Rows) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, N_ROWS - 1), max_size=80), min_size=1, max_size=6),
    st.integers(1, 400),
    st.integers(1, 300),
    st.booleans(),
)
def test_rows_come_as_they_are_in_any_order_and_size(asked, capacity, read_cells, ahead):
    source = Source()
    cache = source.cache(capacity_cells=capacity, read_cells=read_cells)
    for rows in asked:
        if ahead:
            cache.prefetch(np.array(rows[::-1], dtype=np.int64))
        assert_same(
            cache.take(np.array(rows, dtype=np.int64)), source.rows.take(np.array(rows, dtype=np.int64))
        )
    cache.close()
    assert cache.most_held <= max(capacity, BLOCK)
    assert max(map(len, source.reads)) <= max(read_cells, BLOCK)
    assert all((np.diff(rows) > 0).all() for rows in source.reads)


def test_a_pass_in_order_reads_every_row_once_in_large_reads():
    source = Source()
    cache = source.cache(capacity_cells=400, read_cells=200)
    for start in range(0, N_ROWS, 16):
        cache.take(np.arange(start, min(start + 16, N_ROWS))[::2])  # every other row: half of each block
    np.testing.assert_array_equal(np.concatenate(source.reads), np.arange(N_ROWS))
    assert len(source.reads) <= N_ROWS / 200 + 1


def test_scattered_rows_of_large_data_are_read_by_themselves():
    source = Source(100_000)
    cache = BlockCache(source.read, 100_000, 64, capacity_cells=8192)
    few = np.linspace(0, 99_999, 100).astype(np.int64)
    assert_same(cache.take(few), source.rows.take(few))
    assert source.n_read() == 100
    assert cache.n_held == 0


def test_what_was_asked_ahead_is_not_read_again():
    source = Source()
    cache = source.cache(capacity_cells=300, read_cells=100)
    rows = np.r_[500:600, 20:40, 800:830]
    cache.prefetch(rows)
    taken = cache.take(np.random.default_rng(0).permutation(rows))
    assert len(taken.indptr) == len(rows) + 1
    cache.close()
    assert sorted(np.concatenate(source.reads).tolist()) == sorted(rows.tolist())
    assert max(map(len, source.reads)) <= 100


def test_the_next_buffer_drives_out_the_last_one_and_not_itself():
    source = Source()
    cache = source.cache(capacity_cells=200, read_cells=100)
    buffers = [np.arange(start, start + 100) for start in range(0, N_ROWS, 100)]
    cache.prefetch(buffers[0])
    for now, following in zip(buffers, [*buffers[1:], buffers[0][:0]], strict=True):
        cache.prefetch(following)
        for some in np.random.default_rng(0).permutation(now).reshape(-1, 10):
            assert_same(cache.take(some), source.rows.take(some))
    cache.close()
    assert source.n_read() == N_ROWS  # nothing twice
    assert cache.most_held <= 200


def test_threads_share_one_read():
    source = Source()
    begun, go_on = threading.Event(), threading.Event()

    def read(rows: np.ndarray) -> Rows:
        begun.set()
        go_on.wait()
        return source.read(rows)

    cache = BlockCache(read, N_ROWS, BLOCK, capacity_cells=N_ROWS)
    with ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(cache.take, np.arange(20, 50)) for _ in range(4)]
        begun.wait()
        go_on.set()
        for future in taken:
            assert_same(future.result(), source.rows.take(np.arange(20, 50)))
    assert len(source.reads) == 1


def test_threads_that_need_more_than_fits_still_end():
    source = Source()
    cache = source.cache(capacity_cells=60, read_cells=60)

    def take(seed: int) -> bool:
        generator = np.random.default_rng(seed)
        for _ in range(30):
            rows = generator.integers(0, N_ROWS, 40)
            cache.prefetch(generator.integers(0, N_ROWS, 40))
            assert_same(cache.take(rows), source.rows.take(rows))
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(take, range(6)))
    cache.close()
    assert cache.most_held <= 60


def test_an_error_reaches_all_who_wait_and_the_next_try_reads_again():
    source = Source()
    begun, go_on = threading.Event(), threading.Event()

    def read(rows: np.ndarray) -> Rows:
        begun.set()
        go_on.wait()
        return source.read(rows)

    cache = BlockCache(read, N_ROWS, BLOCK, capacity_cells=N_ROWS)
    source.error = DataError("The line is down.")
    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(cache.take, np.arange(20, 50)) for _ in range(3)]
        begun.wait()
        go_on.set()
        for future in taken:
            with pytest.raises(DataError, match="The line is down"):
                future.result()
    source.error = None
    assert_same(cache.take(np.arange(20, 50)), source.rows.take(np.arange(20, 50)))


def test_an_error_of_reading_ahead_is_raised_by_take():
    source = Source()
    cache = source.cache(capacity_cells=N_ROWS)
    source.error = DataError("The line is down.")
    cache.prefetch(np.arange(100))
    with pytest.raises(DataError, match="The line is down"):
        cache.take(np.arange(30))
    cache.close()
    source.error = None
    assert_same(cache.take(np.arange(30)), source.rows.take(np.arange(30)))


def test_ranges_are_read_run_by_run():
    source, ranges = Source(), []

    def read(first: int, last: int) -> Rows:
        ranges.append((first, last))
        return source.rows.take(np.arange(first, last))

    rows = np.r_[0:20, 50:60, 90:100]
    assert_same(by_runs(read)(rows), source.rows.take(rows))
    assert ranges == [(0, 20), (50, 60), (90, 100)]
    assert_same(
        BlockCache(by_runs(read), N_ROWS, BLOCK).take(np.zeros(0, np.int64)), source.rows.take(rows[:0])
    )
