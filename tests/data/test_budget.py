"""Batches of a token budget: each draw once, none too full, ranks equally full, the same on every call."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config, DataConfig
from scmodelforge.data.budget import TokenBudget, step_windows, token_budgets, token_lengths
from scmodelforge.data.budget_kernels import LAST_WINDOW, fill_bins
from scmodelforge.data.module import training_order
from scmodelforge.data.order import GlobalShuffle, InOrder
from scmodelforge.data.store import open_store
from scmodelforge.errors import ConfigError
from scmodelforge.tokenizers.base import build_tokenizer
from tests.helpers import make_vocab, marker_cells

BUDGET = 32_768
RNG = np.random.default_rng(0)
# Shapes of length distributions that real cells have, cut to 2,048 and 4,096 tokens.
REAL = {
    "shallow": np.clip(RNG.lognormal(np.log(800), 0.4, 20_000), 50, 2048).astype(np.int32),
    "wide": np.clip(RNG.lognormal(np.log(1200), 0.6, 20_000), 50, 2048).astype(np.int32),
    "mostly cut": np.clip(RNG.lognormal(np.log(4000), 0.6, 20_000), 50, 2048).astype(np.int32),
    "long": np.clip(RNG.lognormal(np.log(2500), 0.6, 10_000), 50, 4096).astype(np.int32),
}


def shuffled(lengths: np.ndarray, tokens: int, world: int = 1) -> TokenBudget:
    return TokenBudget(GlobalShuffle(np.arange(len(lengths)), seed=3), lengths, tokens, world)


def batches(budget: TokenBudget, epoch: int) -> list[list[np.ndarray]]:
    """The rows of each batch, by step and rank."""
    return [
        [budget.batch(epoch, step, rank).rows for rank in range(budget.world)]
        for step in range(budget.n_steps)
    ]


def loads(budget: TokenBudget, epoch: int) -> np.ndarray:
    """int64 (n_steps, world): tokens of each batch."""
    return np.array([[budget.lengths[rows].sum() for rows in step] for step in batches(budget, epoch)])


# --- the packing ----------------------------------------------------------------------------------


def slow_fill(
    lengths: np.ndarray, world: int, limit: int, windows: np.ndarray
) -> tuple[list[list[int]], int]:
    """As `fill_bins`, with lists: the draws of each batch."""
    n_bins = int(windows[-1]) * world
    bins: list[list[int]] = [[] for _ in range(n_bins)]

    def load(b: int) -> int:
        return int(lengths[bins[b]].sum())

    def longest_first(draw: int) -> tuple[int, int]:
        unit = 2 ** max(0, int(lengths[draw]).bit_length() - 3)
        return -(lengths[draw] // unit * unit), draw

    def place(draws: list[int], where: range, most: float) -> list[int]:
        left = []
        for draw in sorted(draws, key=longest_first):
            least = min(where, key=lambda b: (load(b), b))
            if load(least) + lengths[draw] <= most:
                bins[least].append(draw)
            else:
                left.append(draw)
        return left

    waiting: list[int] = []
    following, n_last = 0, n_bins - int(windows[-2]) * world
    for w in range(len(windows) - 1):
        first, end = int(windows[w]) * world, int(windows[w + 1]) * world
        remaining = int(lengths.sum()) - sum(load(b) for b in range(n_bins))
        spared = 0 if end == n_bins else (1 - LAST_WINDOW) * n_last
        wanted = min(remaining * ((end - first) / (n_bins - first - spared)), (end - first) * limit)
        most = len(waiting) + len(lengths) - following - (n_bins - end)
        while following < len(lengths) and len(waiting) < most:
            if end < n_bins and lengths[waiting].sum() >= wanted and len(waiting) >= end - first:
                break
            waiting.append(following)
            following += 1
        longest = sorted(waiting, key=longest_first)
        waiting = place(longest[:most], range(first, end), limit) + longest[most:]
    over = place(waiting, range(n_bins), limit)
    place(over, range(n_bins), np.inf)
    out: list[list[int]] = []
    for w in range(len(windows) - 1):
        of_window = range(int(windows[w]) * world, int(windows[w + 1]) * world)
        out += [sorted(bins[b]) for b in sorted(of_window, key=load)]
    return out, len(over)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    limit=st.integers(60, 150),
    world=st.integers(1, 3),
    crowded=st.floats(0.3, 1.2),
    data=st.data(),
)
@settings(deadline=None)
def test_the_compiled_packing_is_the_plain_one(lengths, limit, world, crowded, data):
    tokens = np.array(lengths, dtype=np.int32)
    n_steps = min(len(lengths) // world, max(1, round(tokens.sum() / limit / world / crowded)))
    if n_steps == 0:
        return
    cuts = data.draw(st.sets(st.integers(1, max(n_steps - 1, 1)), max_size=4)) if n_steps > 1 else set()
    windows = np.array(sorted({0, n_steps} | cuts))
    starts, draws, n_over = fill_bins(tokens, world, limit, 2**62, windows)
    expected, expected_over = slow_fill(tokens, world, limit, windows)
    assert n_over == expected_over
    got = [draws[a:b].tolist() for a, b in pairwise(starts)]
    assert got == expected
    assert all(got)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60), max_cells=st.integers(2, 5))
@settings(deadline=None)
def test_batches_hold_no_more_cells_than_they_may(lengths, max_cells):
    n_steps = -(-len(lengths) // max_cells)
    starts, draws, _ = fill_bins(
        np.array(lengths, dtype=np.int32), 1, 10_000, max_cells, step_windows(n_steps)
    )
    assert np.diff(starts).max() <= max_cells
    assert sorted(draws) == list(range(len(lengths)))


@given(st.integers(1, 2000))
def test_windows_are_cut_evenly(n_steps):
    windows = step_windows(n_steps)
    assert (windows[0], windows[-1]) == (0, n_steps)
    assert len(windows) == 2 or 32 <= np.diff(windows).min() <= np.diff(windows).max() < 64


# --- the batches of an epoch ----------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 300), min_size=4, max_size=400),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    slack=st.integers(1, 20),
)
@example(lengths=[300] * 4, world=4, epoch=0, slack=1)
@settings(deadline=None)
def test_every_cell_comes_once_in_an_epoch_and_no_batch_is_too_full(lengths, world, epoch, slack):
    tokens = np.array(lengths, dtype=np.int32)
    budget = shuffled(tokens, int(tokens.max()) * slack, world)
    of_epoch = batches(budget, epoch)
    assert len(of_epoch) == budget.n_steps
    assert sorted(np.concatenate([rows for step in of_epoch for rows in step])) == list(range(len(lengths)))
    assert all(0 < len(rows) <= budget.max_cells for step in of_epoch for rows in step)
    if budget.n_steps < len(lengths) // world:  # else more steps would leave a rank without a cell
        assert loads(budget, epoch).max() <= budget.tokens_per_batch
    assert len(budget.batch(epoch, budget.n_steps, 0).rows) == 0


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", REAL)
def test_batches_are_full_and_ranks_alike(name: str, world: int) -> None:
    budget = shuffled(REAL[name], BUDGET, world)
    assert budget.fill == pytest.approx(REAL[name].sum() / (budget.n_steps * world * BUDGET))
    assert budget.fill > 0.965
    for epoch in range(4):
        of_epoch = loads(budget, epoch)
        assert of_epoch.max() <= BUDGET
        assert (of_epoch.max(axis=1) / of_epoch.mean(axis=1)).max() < 1.02
        assert (of_epoch.max(axis=1).mean() / of_epoch.mean()) < 1.002
        assert of_epoch.min() > 0.8 * of_epoch.mean(), "no step is much emptier than the others"


@pytest.mark.parametrize("world", [1, 2])
def test_cells_of_one_length_fill_every_batch(world: int) -> None:
    budget = shuffled(np.full(16 * 40 * world, 2048, dtype=np.int32), BUDGET, world)
    assert budget.n_steps == 40
    assert budget.fill == 1
    assert (loads(budget, 5) == BUDGET).all()


def test_fewer_cells_than_a_batch_are_one_step_with_a_cell_for_each_rank() -> None:
    tokens = np.array([100, 5, 30], dtype=np.int32)
    for world in (1, 3):
        budget = shuffled(tokens, 1000, world)
        assert budget.n_steps == 1
        assert [len(budget.batch(0, 0, rank).rows) for rank in range(world)] == [3 // world] * world


def test_a_batch_mixes_long_and_short_cells() -> None:
    budget = shuffled(REAL["wide"], BUDGET)
    median = np.median(REAL["wide"])
    long = np.array([(REAL["wide"][rows] > median).mean() for (rows,) in batches(budget, 0)])
    assert long.min() > 0.3
    assert long.max() < 0.7


def test_cells_have_other_company_in_each_epoch() -> None:
    """Also where all batches of an epoch are filled together: as seldom the same two as by chance."""
    tokens = REAL["wide"][:1000]
    budget = shuffled(tokens, BUDGET)
    assert 32 < budget.n_steps < 64, "one window"
    together = []
    for epoch in range(2):
        of_cell = np.empty(1000, dtype=np.int64)
        for number, (rows,) in enumerate(batches(budget, epoch)):
            of_cell[rows] = number
        together.append((of_cell[:, None] == of_cell) & ~np.eye(1000, dtype=bool))
    again = (together[0] & together[1]).sum() / together[0].sum()
    assert again < 2 * together[1].mean()


def test_a_batch_is_the_same_whatever_was_asked_before() -> None:
    tokens = REAL["wide"][:500]
    one, two = shuffled(tokens, BUDGET, 2), shuffled(tokens, BUDGET, 2)
    forward = [batches(one, epoch) for epoch in range(4)]
    for epoch in (2, 0, 3, 1, 2):
        for step in (one.n_steps - 1, 0, 3):
            for rank in (1, 0):
                rows = two.batch(epoch, step, rank).rows
                np.testing.assert_array_equal(rows, forward[epoch][step][rank])
    assert not np.array_equal(forward[0][0][0], forward[1][0][0])


def test_weighted_draws_of_all_epochs_fit(caplog: pytest.LogCaptureFixture) -> None:
    """The totals of epochs differ, as a curriculum moves on to a class of longer cells."""
    cells = marker_cells(400)
    tokens = np.where(cells.obs["cell_type"] == "B", 900, 300).astype(np.int32)
    tokens += np.arange(400, dtype=np.int32) % 37
    store = open_store([cells], make_vocab(40), DataConfig(min_gene_overlap=0))
    rare = np.flatnonzero(cells.obs["cell_type"] != "B")
    rows = np.sort(np.concatenate([rare, np.flatnonzero(cells.obs["cell_type"] == "B")[:10]]))
    sampling = {"label_key": "cell_type", "curriculum_epochs": 3, "max_repeats": 30, "cells_per_epoch": 900}
    order = training_order(store, rows, DataConfig(sampling=sampling), 3)
    budget = TokenBudget(order, tokens, 8000, 2)
    totals = []
    for epoch in range(8):
        drawn = [
            budget.batch(epoch, step, rank) for step in range(budget.n_steps) for rank in range(budget.world)
        ]
        pairs = np.concatenate([np.stack([each.rows, each.repeats]) for each in drawn], axis=1)
        whole = order.batch(epoch, 0, 900, 0, 1)
        assert sorted(pairs.T.tolist()) == sorted(np.stack([whole.rows, whole.repeats]).T.tolist())
        assert max(tokens[each.rows].sum() for each in drawn) <= 8000
        assert max(len(each.rows) for each in drawn) <= budget.max_cells
        totals.append(tokens[whole.rows].sum())
    assert totals[5] > 1.3 * totals[0]
    assert max(totals) <= order.largest_sum(tokens) < 1.1 * max(totals)
    assert "fit into no batch" not in caplog.text


def test_cells_that_fit_nowhere_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Three cells of more than half a batch on two ranks: a fourth batch would be empty."""
    budget = shuffled(np.full(3, 6, dtype=np.int32), 10, 2)
    for epoch in range(2):
        assert sorted(loads(budget, epoch).ravel()) == [6, 12]
    assert caplog.text.count("1 cells of epoch 1 fit into no batch") == 1
    assert caplog.text.count("fit into no batch") == 1


# --- what users see -------------------------------------------------------------------------------


def test_a_cell_longer_than_a_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"tokens_per_batch is 1,000, and 2 of 4 training cells have more tokens, up to 2,048\.\n.*"
        r"set training\.tokens_per_batch to 2,048 or more .*or make tokenizer\.max_genes smaller",
    ):
        shuffled(np.array([5, 2048, 1001, 1000], dtype=np.int32), 1000)


def test_fewer_cells_than_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 training cells cannot be shared by 3 processes"):
        shuffled(np.array([5, 5], dtype=np.int32), 10, 3)


def test_the_fill_is_said_and_validation_keeps_to_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    tokens, rows = REAL["wide"], np.arange(20_000)
    with caplog.at_level(logging.INFO, logger="scmodelforge"):
        train, val = token_budgets(GlobalShuffle(rows[2000:], 1), rows[:2000], tokens, BUDGET, 2)
    assert (
        f"{train.n_steps:,} batches an epoch on each of 2 processes of at most 32,768 tokens, filled to "
        f"{100 * train.fill:.1f} %" in caplog.text
    )
    assert val is not None
    assert isinstance(val.order, InOrder)
    assert loads(val, 0).max() <= BUDGET
    assert sorted(np.concatenate([r for step in batches(val, 0) for r in step])) == list(range(2000))
    assert token_budgets(GlobalShuffle(rows, 1), rows[:0], tokens, BUDGET, 1)[1] is None


@pytest.mark.parametrize("threads", [1, 3])
def test_cells_are_as_long_as_their_tokens(threads: int) -> None:
    cells = marker_cells(600)
    cells.X = cells.X.multiply(
        (np.arange(600) != 5)[:, None]
    ).tocsr()  # a cell without a token still takes a place
    config = Config.model_validate({"tokenizer": {"max_genes": 20, "prepend_cls": False}})
    store = open_store([cells], make_vocab(40), DataConfig(min_gene_overlap=0))
    tokenizer = build_tokenizer(config, make_vocab(40, layout="scgpt"))
    rows = np.arange(2, 600, 2)
    rows[0] = 5
    rows.sort()
    lengths = token_lengths(store, rows, lambda block: tokenizer(block).lengths.numpy(), threads)
    assert lengths.dtype == np.int32
    expected = np.zeros(600, dtype=np.int64)
    expected[rows] = np.maximum(tokenizer(store.read(rows), seed=9, epoch=4).lengths.numpy(), 1)
    np.testing.assert_array_equal(lengths, expected)
    assert lengths[5] == 1
    assert lengths.max() == 20
