"""Randomness and order: published test vectors, bijections, and who sees which cell when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.data.order import FEISTEL_ROUNDS, ORDER_STREAM, batch_rows, n_steps, permutation
from scmodelforge.data.random import below, philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES << 32 | ONES, (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0 << 32 | 0xA4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    """The known answers that Random123 publishes for philox4x32-10."""
    words = philox(key, *counter)
    assert tuple(int(word) for word in words) == expected
    assert all(word.dtype == np.uint32 for word in words)


def test_philox_draws_do_not_depend_on_company():
    cells = np.arange(100)
    together = philox(7, cells[:, None], np.arange(5))
    assert together[0].shape == (100, 5)
    alone = philox(7, 42, 3)
    assert [int(word[42, 3]) for word in together] == [int(word) for word in alone]


def test_uniform_and_below_cover_their_range():
    bits = philox(1, np.arange(100_000))[0]
    u = uniform(bits)
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert uniform(np.array([ONES], dtype=np.uint32))[0] < 1
    counts = np.bincount(below(bits, 7), minlength=7)
    assert len(counts) == 7
    assert abs(counts - 100_000 / 7).max() < 600
    assert (below(bits[:4], np.array([1, 2, 3, 4])) < [1, 2, 3, 4]).all()


def slow_permutation(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """The Feistel network in plain whole numbers, one position after the other."""
    bits = max(2, (n - 1).bit_length())
    half = bits // 2
    low_mask, high_mask = (1 << half) - 1, (1 << (bits - half)) - 1
    first, second, _, _ = philox(key, np.arange(FEISTEL_ROUNDS), c3=ORDER_STREAM)
    keys = [int(a) << 32 | int(b) for a, b in zip(first, second, strict=True)]

    def mix(x: int, key: int) -> int:
        x = (x + key) % 2**64
        x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) % 2**64
        x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) % 2**64
        return x ^ (x >> 33)

    def network(x: int) -> int:
        low, high = x & low_mask, x >> half
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            low ^= mix(high, first) & low_mask
            high ^= mix(low, second) & high_mask
        return high << half | low

    out = []
    for x in positions.tolist():
        x = network(x)
        while x >= n:
            x = network(x)
        out.append(x)
    return np.array(out, dtype=np.int64)


@settings(deadline=None)
@given(
    n=st.one_of(st.integers(1, 300), st.integers(1, 10**12), st.just(2**62)),
    key=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_the_compiled_permutation_is_the_slow_one(n, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    np.testing.assert_array_equal(permutation(positions, n, key), slow_permutation(positions, n, key))


def test_positions_of_any_shape_and_kind_are_permuted():
    table = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(permutation(table.T, 12, 5), permutation(table, 12, 5).T)
    np.testing.assert_array_equal(permutation(table.astype(np.int32), 12, 5), permutation(table, 12, 5))
    assert permutation(np.array([], dtype=np.int64), 12, 5).shape == (0,)


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection_that_can_be_asked_anywhere(n, key):
    whole = permutation(np.arange(n), n, key)
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    some = np.array([n - 1, 0, n // 2])
    np.testing.assert_array_equal(permutation(some, n, key), whole[some])


@settings(deadline=None)
@given(n=st.integers(10**9, 10**12), key=st.integers(0, 2**64 - 2), start=st.integers(0, 10**9 - 2000))
def test_permutation_of_a_trillion(n, key, start):
    positions = np.concatenate([np.arange(start, start + 1000), n - 1 - np.arange(1000)])
    out = permutation(positions, n, key)
    assert len(np.unique(out)) == len(np.unique(positions))
    assert out.min() >= 0
    assert out.max() < n
    assert not np.array_equal(out, permutation(positions, n, key + 1))


def test_permutation_looks_random():
    n = 50_000
    order = permutation(np.arange(n), n, 3)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert not np.array_equal(order, permutation(np.arange(n), n, 4))
    seen = np.zeros((6, 6))
    for key in range(2000):
        seen[np.arange(6), permutation(np.arange(6), 6, key)] += 1
    assert abs(seen - 2000 / 6).max() < 90, "each value at each place equally often"


@pytest.mark.parametrize("position", [5, -1])
def test_permutation_refuses_positions_outside(position):
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        permutation(np.array([0, position]), 5, 0)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 200),
    batch_size=st.integers(1, 33),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_ranks_share_an_epoch(n, batch_size, world, epoch, shuffle):
    rows = np.arange(n) * 3 + 1
    steps = n_steps(n, batch_size, world)
    shares = [
        np.concatenate(
            [np.zeros(0, np.int64)]
            + [batch_rows(rows, s, batch_size, 5, epoch, shuffle, rank, world) for s in range(steps)]
        )
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {n // world}
    seen = np.concatenate(shares)
    assert len(np.unique(seen)) == len(seen) == n - n % world
    assert np.isin(seen, rows).all()
    assert len(batch_rows(rows, steps, batch_size, 5, epoch, shuffle, 0, world)) == 0
    if not shuffle and world == 1:
        np.testing.assert_array_equal(seen, rows)


def test_order_changes_with_epoch_and_seed_only():
    rows = np.arange(1000)
    first = batch_rows(rows, 3, 64, seed=1, epoch=0, shuffle=True)
    np.testing.assert_array_equal(first, batch_rows(rows, 3, 64, seed=1, epoch=0, shuffle=True))
    assert not np.array_equal(first, batch_rows(rows, 3, 64, seed=1, epoch=1, shuffle=True))
    assert not np.array_equal(first, batch_rows(rows, 3, 64, seed=2, epoch=0, shuffle=True))
