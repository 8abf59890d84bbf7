"""Randomness and order: published test vectors, bijections, and who sees which cell when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.data.order import batch_rows, n_steps, permutation
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


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection_that_can_be_asked_anywhere(n, key):
    whole = permutation(np.arange(n), n, key)
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    some = np.array([n - 1, 0, n // 2])
    np.testing.assert_array_equal(permutation(some, n, key), whole[some])


@settings(deadline=None)
@given(n=st.integers(10**9, 10**12), key=st.integers(0, 2**64 - 1))
def test_permutation_of_a_trillion(n, key):
    out = permutation(np.array([0, 1, 2, n - 2, n - 1]), n, key)
    assert len(set(out.tolist())) == 5
    assert out.min() >= 0
    assert out.max() < n


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


def test_permutation_refuses_positions_outside():
    with pytest.raises(IndexError):
        permutation(np.array([5]), 5, 0)


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
