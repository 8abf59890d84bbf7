"""Validation cells never train, groups stay whole, and the seed alone decides."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Split
from scmodelforge.data.split import split_cells
from scmodelforge.errors import DataError


def frame(groups) -> pd.DataFrame:
    return pd.DataFrame({"donor": groups}, index=[f"cell{i}" for i in range(len(groups))])


@settings(deadline=None)
@given(
    n=st.integers(2, 300),
    share=st.floats(0.01, 0.95),
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(1, 5),
)
def test_cells_are_divided(n, share, seed, classes):
    labels = np.arange(n) % min(classes, max(1, n - 1))
    train, val = split_cells(frame(["a"] * n), Split(val_split=share), seed, labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(n))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    assert set(labels[train]) == set(labels), "each class trains"
    assert len(val) == min(max(1, round(n * share)), n - len(set(labels)))


def test_labels_are_spread_over_both_sides():
    labels = np.repeat(["rare", "common"], [20, 980])
    _, val = split_cells(frame(["a"] * 1000), Split(val_split=0.1), 0, labels)
    assert abs((labels[val] == "rare").sum() - 2) <= 1


def test_a_single_cell_of_a_class_trains():
    labels = np.array(["one"] + ["many"] * 9)
    for seed in range(20):
        train, _ = split_cells(frame(["a"] * 10), Split(val_split=0.5), seed, labels)
        assert 0 in train


@settings(deadline=None)
@given(
    groups=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=200).filter(lambda g: len(set(g)) > 1),
    share=st.floats(0.01, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_stay_whole(groups, share, seed):
    train, val = split_cells(frame(groups), Split(val_split=share, group_key="donor"), seed)
    groups = np.array(groups)
    assert len(train)
    assert len(val)
    assert not set(groups[train]) & set(groups[val])
    assert len(train) + len(val) == len(groups)


def test_many_groups_come_near_the_share():
    groups = np.repeat([f"d{i}" for i in range(60)], np.arange(10, 70))
    for seed in range(5):
        _, val = split_cells(frame(groups), Split(val_split=0.2, group_key="donor"), seed)
        assert abs(len(val) / len(groups) - 0.2) < 0.02


def test_the_seed_decides():
    obs = frame(["a"] * 500)
    again = [split_cells(obs, Split(), seed)[1].tolist() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_no_validation():
    train, val = split_cells(frame(["a"] * 5), Split(val_split=0), 0)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert val.dtype == train.dtype == np.int64
    assert not len(val)


def test_a_share_that_groups_cannot_give_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        split_cells(frame(["a"] * 50 + ["b"] * 50), Split(val_split=0.1, group_key="donor"), 0)
    assert "Validation holds 1 of 2 groups of obs['donor'] with 50.0% of the cells" in caplog.text


def test_classes_only_in_validation_are_said(caplog):
    obs = frame(["a", "a", "b", "b"])
    with caplog.at_level(logging.WARNING):
        split_cells(obs, Split(val_split=0.5, group_key="donor"), 0, np.array(["x", "x", "y", "y"]))
    assert "only in validation groups" in caplog.text


@pytest.mark.parametrize(
    ("obs", "key", "message"),
    [
        (frame(["a", "b"]), "doner", r"no such column\. Did you mean 'donor'\?\nColumns of obs: donor"),
        (frame(["a", None, "b"]), "donor", r"no value for 1 of 3 cells"),
        (frame(["a", "a"]), "donor", r"only the group 'a'; at least two"),
    ],
)
def test_unusable_groups(obs, key, message):
    with pytest.raises(DataError, match=message):
        split_cells(obs, Split(group_key=key), 0)


def test_too_few_cells():
    with pytest.raises(DataError, match="cannot be split"):
        split_cells(frame(["a"]), Split(), 0)
    with pytest.raises(DataError, match="all have different labels"):
        split_cells(frame(["a", "b"]), Split(), 0, np.array(["x", "y"]))
