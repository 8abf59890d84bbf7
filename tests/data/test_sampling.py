"""Weighted draws: shares to the draw, no cell twice before all others, the same for any number of ranks."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scmodelforge.config import DataConfig, Sampling
from scmodelforge.data.order import draw_key, n_steps, permutation
from scmodelforge.data.sampling import (
    WeightedDraws,
    class_shares,
    draw_cells,
    fill_shares,
    weighted_draws,
    whole_draws,
)
from scmodelforge.data.shards import write_shards
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from scmodelforge.manifest import shard_paths
from tests.helpers import make_vocab, marker_cells

sizes_of_strata = st.lists(st.integers(1, 40), min_size=1, max_size=6)


class Cells:
    """What the order asks of a store: files, where each begins, and annotations."""

    def __init__(self, labels: list[list[str | None]], names: list[str] | None = None) -> None:
        self.files = names or [f"folder/{'abcdef'[i]}.h5ad" for i in range(len(labels))]
        self.offsets = np.cumsum([0, *map(len, labels)])
        self.obs = pd.DataFrame(
            {"kind": pd.Series([label for file in labels for label in file], dtype=object)}
        )
        self.rows = np.arange(len(self.obs))


def epoch_of(
    order: WeightedDraws, epoch: int, batch_size: int = 16, rank: int = 0, world: int = 1
) -> np.ndarray:
    steps = n_steps(order.n_draws, batch_size, world)
    batches = [order.batch(epoch, step, batch_size, rank, world).rows for step in range(steps)]
    return np.concatenate([np.zeros(0, np.int64), *batches])


# --- shares ---------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    limits=st.lists(st.one_of(st.just(np.inf), st.floats(0.5, 200)), min_size=8, max_size=8),
    share=st.floats(0.001, 1),
)
def test_what_a_limit_cuts_goes_to_the_others_in_proportion(weights, limits, share):
    weights, limits = np.array(weights), np.array(limits[: len(weights)])
    total = share * min(limits.sum(), 1000.0)
    shares = fill_shares(total, weights, limits)
    assert shares.sum() == pytest.approx(total)
    assert (shares <= limits * (1 + 1e-9)).all()
    free = shares < limits * (1 - 1e-9)
    if free.any():
        rate = shares[free] / weights[free]
        np.testing.assert_allclose(rate, rate[0])
        assert (shares[~free] <= rate[0] * weights[~free] * (1 + 1e-6)).all(), "none is cut for nothing"


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=8),
    total=st.integers(1, 500),
    epochs=st.integers(1, 60),
)
def test_whole_draws_follow_the_shares(weights, total, epochs):
    shares = total * np.array(weights) / sum(weights)
    drawn = np.array([whole_draws(shares, epoch) for epoch in range(epochs)])
    assert (drawn.sum(axis=1) == total).all()
    assert (drawn >= np.floor(shares - 1e-5)).all()
    assert (drawn <= np.ceil(shares + 1e-5)).all()
    assert abs(drawn.sum(axis=0) - epochs * shares).max() < 4, "none is left behind for long"


def test_a_stratum_with_less_than_one_draw_an_epoch_comes_in_some():
    drawn = np.array([whole_draws(np.array([0.2, 99.8]), epoch) for epoch in range(50)])
    assert drawn[:, 0].sum() == pytest.approx(10, abs=2)


def test_power_goes_from_as_it_is_to_all_alike():
    sizes = np.array([10, 30, 60])
    np.testing.assert_allclose(class_shares(sizes, 100.0, 0.0, np.inf), sizes)
    np.testing.assert_allclose(class_shares(sizes, 90.0, 1.0, np.inf), [30, 30, 30])
    half = class_shares(sizes, 100.0, 0.5, np.inf)
    np.testing.assert_allclose(half / half[0], np.sqrt([1, 3, 6]))
    np.testing.assert_allclose(class_shares(sizes, 90.0, 1.0, 2.0), [20, 35, 35])


# --- the order ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(sizes=sizes_of_strata, data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_no_cell_of_a_stratum_comes_again_before_all_others_have(sizes, data, seed):
    n_draws = data.draw(st.integers(1, 150))
    weights = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))))
    offsets = np.cumsum([0, *sizes])
    rows = np.arange(offsets[-1]) * 2 + 1
    order = WeightedDraws(rows, offsets, (n_draws * weights / weights.sum())[None], seed)
    seen = np.zeros(len(rows), dtype=int)
    for epoch in range(4):
        drawn = epoch_of(order, epoch)
        assert len(drawn) == n_draws
        seen += np.bincount((drawn - 1) // 2, minlength=len(rows))
        for begin, end in pairwise(offsets):
            assert np.ptp(seen[begin:end]) <= 1
    total = sum(order.quotas(epoch) for epoch in range(4))
    np.testing.assert_array_equal(np.add.reduceat(seen, offsets[:-1]), total)


@settings(deadline=None, max_examples=40)
@given(
    sizes=sizes_of_strata,
    n_draws=st.integers(1, 150),
    world=st.integers(1, 5),
    batch_size=st.integers(1, 33),
    epoch=st.integers(0, 5),
)
def test_ranks_share_the_draws_that_one_would_make(sizes, n_draws, world, batch_size, epoch):
    offsets = np.cumsum([0, *sizes])
    shares = np.full((1, len(sizes)), n_draws / len(sizes))
    order = WeightedDraws(np.arange(offsets[-1]), offsets, shares, 5)
    alone = epoch_of(order, epoch)
    ranks = [epoch_of(order, epoch, batch_size, rank, world) for rank in range(world)]
    together = np.stack(ranks, axis=1).ravel()
    np.testing.assert_array_equal(together, alone[: n_draws // world * world])


def test_a_batch_needs_no_earlier_one():
    offsets, shares = np.array([0, 5, 40]), np.array([[10.0, 30.0], [20.0, 20.0], [30.0, 10.0]])
    whole, fresh = (WeightedDraws(np.arange(40), offsets, shares, 5) for _ in range(2))
    for epoch in range(5):
        latest = whole.batch(epoch, 2, 8, 0, 1)
    np.testing.assert_array_equal(fresh.batch(4, 2, 8, 0, 1).rows, latest.rows)
    np.testing.assert_array_equal(fresh.batch(4, 2, 8, 0, 1).repeats, latest.repeats)
    other = WeightedDraws(np.arange(40), offsets, shares, 6)
    assert not np.array_equal(other.batch(4, 2, 8, 0, 1).rows, latest.rows)


def test_draws_of_one_cell_in_an_epoch_are_told_apart():
    order = WeightedDraws(np.arange(5), np.array([0, 5]), np.array([[23.0]]), 5)
    for epoch in range(3):
        batches = [order.batch(epoch, step, 8, 0, 1) for step in range(3)]
        draws = [pair for batch in batches for pair in zip(batch.rows, batch.repeats, strict=True)]
        assert len(set(draws)) == 23
    once = WeightedDraws(np.arange(5), np.array([0, 2, 5]), np.array([[2.0, 3.0]]), 5)
    assert all(not once.batch(epoch, 0, 5, 0, 1).repeats.any() for epoch in range(3))


@settings(deadline=None, max_examples=60)
@given(sizes=sizes_of_strata, data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_the_compiled_draws_are_the_slow_ones(sizes, data, seed):
    quotas = data.draw(st.lists(st.integers(0, 60), min_size=len(sizes), max_size=len(sizes)))
    earlier = data.draw(st.lists(st.integers(0, 10**12), min_size=len(sizes), max_size=len(sizes)))
    assume(sum(quotas))
    positions = np.array(data.draw(st.lists(st.integers(0, sum(quotas) - 1), min_size=1, max_size=10)))
    bounds, offsets = np.cumsum([0, *quotas]), np.cumsum([0, *sizes])
    places, laps = np.empty_like(positions), np.empty_like(positions)
    draw_cells(positions, bounds, np.array(earlier), offsets, seed, places, laps)
    stratum = np.repeat(np.arange(len(sizes)), quotas)
    for position, place, lap in zip(positions.tolist(), places, laps, strict=True):
        k = int(stratum[position])
        drawn = earlier[k] + position - int(bounds[k])
        order = permutation(np.arange(sizes[k]), sizes[k], draw_key(seed, drawn // sizes[k], k, 3))
        assert place == offsets[k] + order[drawn % sizes[k]]
        assert lap == drawn // sizes[k] - earlier[k] // sizes[k]


# --- from a config --------------------------------------------------------------------------------


def kinds(cells: Cells, rows: np.ndarray) -> Counter:
    return Counter(cells.obs["kind"].iloc[rows])


def test_classes_come_equally_often() -> None:
    cells = Cells([["B"] * 10 + ["T"] * 80, ["NK"] * 30])
    order = weighted_draws(cells, cells.rows, Sampling(label_key="kind"), 1)
    assert kinds(cells, epoch_of(order, 0)) == {"B": 40, "NK": 40, "T": 40}


def test_as_it_is_every_cell_comes_once() -> None:
    cells = Cells([["B"] * 7 + ["T"] * 61, ["NK"] * 33])
    rows = cells.rows[::2]
    for sampling in (Sampling(label_key="kind", label_power=0), Sampling(cells_per_epoch=len(rows))):
        order = weighted_draws(cells, rows, sampling, 1)
        for epoch in range(4):
            np.testing.assert_array_equal(np.sort(epoch_of(order, epoch)), rows)


def test_the_curriculum_goes_from_as_it_is_to_balanced() -> None:
    cells = Cells([["B"] * 20 + ["T"] * 80])
    order = weighted_draws(cells, cells.rows, Sampling(label_key="kind", curriculum_epochs=2), 1)
    drawn = [kinds(cells, epoch_of(order, epoch))["B"] for epoch in range(4)]
    assert drawn[0] == 20
    assert drawn[1] in (33, 34)  # 100 * sqrt(0.2) / (sqrt(0.2) + sqrt(0.8))
    assert drawn[2:] == [50, 50]


def test_a_mixture_decides_between_files_and_the_label_within_them() -> None:
    cells = Cells([["B"] * 10 + ["T"] * 30, ["T"] * 40, ["T"] * 20])
    sampling = Sampling(label_key="kind", mixture={"a.h5ad": 2, "folder/b*": 1, "*": 1}, cells_per_epoch=80)
    order = weighted_draws(cells, cells.rows, sampling, 1)
    drawn = epoch_of(order, 0)
    file = np.searchsorted(cells.offsets, drawn, side="right") - 1
    assert np.bincount(file).tolist() == [40, 20, 20]
    assert kinds(cells, drawn[file == 0]) == {"B": 20, "T": 20}


def test_caps_bound_a_data_set_and_repeats_a_class(caplog: pytest.LogCaptureFixture) -> None:
    cells = Cells([["B"] * 100, ["T"] * 100])
    mixture = {"a.h5ad": 3.0, "b.h5ad": 1.0}
    order = weighted_draws(cells, cells.rows, Sampling(mixture=mixture, caps={"a.h5ad": 60}), 1)
    assert kinds(cells, epoch_of(order, 0)) == {"B": 60, "T": 140}
    order = weighted_draws(cells, cells.rows, Sampling(mixture=mixture, max_repeats=1.2), 1)
    assert kinds(cells, epoch_of(order, 0)) == {"B": 120, "T": 80}
    assert "draws an epoch instead" not in caplog.text
    sampling = Sampling(mixture=mixture, caps={"a.h5ad": 60}, max_repeats=1.2)
    order = weighted_draws(cells, cells.rows, sampling, 1)
    assert kinds(cells, epoch_of(order, 0)) == {"B": 60, "T": 120}
    assert "the caps leave 180 draws an epoch instead of 200" in caplog.text


def test_validation_cells_are_never_drawn() -> None:
    cells = Cells([["B"] * 20 + ["T"] * 80])
    train = np.flatnonzero(cells.rows % 5)
    order = weighted_draws(cells, train, Sampling(label_key="kind", cells_per_epoch=500), 1)
    np.testing.assert_array_equal(np.unique(epoch_of(order, 0)), train)


def test_it_says_what_each_stratum_gets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cells = Cells([["B"] * 10 + ["T"] * 30, [f"type{i % 20}" for i in range(400)]])
    sampling = Sampling(label_key="kind", mixture={"a.h5ad": 1, "b.h5ad": 1}, max_repeats=8)
    weighted_draws(cells, cells.rows, sampling, 1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "data.sampling: 440 draws an epoch from 440 cells:"
    assert lines[1] == "  a.h5ad, T: 140 draws of 30 cells (4.67 each)"
    assert lines[2] == "  a.h5ad, B: 80 draws of 10 cells (8 each)"
    assert lines[-2] == "  and 12 more."
    assert lines[-1] == "  1 of them are at max_repeats 8; the others share what that cuts."


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"label_key": "kinds"}, r"label_key is 'kinds', but obs has no such column\. Did you mean 'kind'"),
        (
            {"mixture": {"a.h5ad": 1}},
            r"no weight to folder/b\.h5ad\.\nIt names a\.h5ad\. Add these files.*'\*'",
        ),
        ({"mixture": {"*": 1, "c.h5ad": 1}}, r"no file is left for c\.h5ad"),
        ({"mixture": {"*": 1, "a.h5ad": 1}}, r"no file is left for a\.h5ad.*\n.*first key that fits"),
        ({"max_repeats": 0.01, "cells_per_epoch": 5}, "max_repeats 0.01 leaves no draw of 9 cells"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(sampling: dict, message: str) -> None:
    cells = Cells([["B"] * 4, ["T"] * 5])
    with pytest.raises(DataError, match=message):
        weighted_draws(cells, cells.rows, Sampling(**sampling), 1)


def test_cells_without_a_label_are_counted() -> None:
    cells = Cells([["B"] * 4 + [None, None], ["T"] * 5])
    with pytest.raises(
        DataError, match=r"has no value for 2 of 11 cells\.\nFill them in, .* to balance no label"
    ):
        weighted_draws(cells, cells.rows, Sampling(label_key="kind"), 1)
    order = weighted_draws(cells, np.array([0, 1, 9, 10]), Sampling(label_key="kind"), 1)
    assert order.n_draws == 4, "cells that do not train need none"


def test_a_data_set_that_only_validates_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cells = Cells([["B"] * 4, ["T"] * 5])
    order = weighted_draws(cells, np.arange(4), Sampling(mixture={"a.h5ad": 1, "b.h5ad": 3}), 1)
    assert "b.h5ad has no training cells" in caplog.text
    np.testing.assert_array_equal(np.sort(epoch_of(order, 0)), np.arange(4))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({}, "names no label_key, mixture or cells_per_epoch"),
        ({"mixture": {"a": 1}, "caps": {"b": 5}}, "caps has b, which mixture has not"),
        ({"mixture": {"a": 0}}, "greater than 0"),
        ({"mixture": {}}, "at least 1"),
        ({"label_key": "kind", "label_power": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_means_nothing_is_refused(sampling: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sampling(**sampling)


def test_a_shard_belongs_to_the_key_of_the_file_it_was_made_of(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        marker_cells(40, seed).write_h5ad(tmp_path / f"{name}.h5ad")
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    vocab = make_vocab(40)
    write_shards(files, vocab, DataConfig(), tmp_path / "shards")
    store = open_store(shard_paths(tmp_path / "shards"), vocab, DataConfig())
    sampling = Sampling(mixture={"a.h5ad": 3, "b.h5ad": 1}, cells_per_epoch=80)
    order = weighted_draws(store, np.arange(80), sampling, 0)
    drawn = np.concatenate([order.batch(0, step, 20, 0, 1).rows for step in range(4)])
    assert (drawn < 40).sum() == 60
