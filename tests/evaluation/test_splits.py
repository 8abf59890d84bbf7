"""Which cells can be used, and how they are split."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.errors import DataError
from scmodelforge.evaluation.splits import (
    check_embedding,
    group_column,
    probe_groups,
    probe_splits,
    usable_groups,
    usable_labels,
)


def labels_of(values, **options):
    options = {"drop_unlabelled": False, "section": "finetune"} | options
    return usable_labels(pd.DataFrame({"cell_type": values}), "cell_type", "cells.h5ad", **options)


@pytest.mark.parametrize("dtype", ["object", "category"])
def test_labels_come_back_as_text_in_the_order_of_the_cells(dtype):
    mask, labels = labels_of(pd.Series(["T", "B", "T", "B"], dtype=dtype))
    assert mask.all()
    assert labels.tolist() == ["T", "B", "T", "B"]
    assert labels.dtype.kind == "U"
    assert labels_of([1, 0, 1, 0])[1].tolist() == ["1", "0", "1", "0"]


def test_missing_column_names_the_nearest_and_all():
    obs = pd.DataFrame({"cell_types": ["a"], "donor": ["b"]})
    with pytest.raises(DataError, match=r"cells.h5ad has no obs column 'cell_type'.*'cell_types'") as caught:
        usable_labels(obs, "cell_type", "cells.h5ad", drop_unlabelled=False, section="finetune")
    assert "Columns: cell_types, donor" in str(caught.value)


def test_unlabelled_cells_are_refused_or_left_out(caplog):
    values = ["T", None, "B", np.nan, "", "T", "B", "unknown", "unknown"]
    with pytest.raises(
        DataError, match=r"3 of 9 cells of cells.h5ad have no label(.|\n)*set finetune\.drop_unlabelled: true"
    ):
        labels_of(values)
    with caplog.at_level(logging.INFO):
        mask, labels = labels_of(values, drop_unlabelled=True)
    assert "3 of 9 cells without a label" in caplog.text
    assert np.flatnonzero(~mask).tolist() == [1, 3, 4]
    assert labels.tolist() == ["T", "B", "T", "B", "unknown", "unknown"]


def test_small_classes_are_refused_or_left_out(caplog):
    values = ["T"] * 5 + ["B"] * 5 + ["rare"]
    with pytest.raises(DataError, match=r"fewer than 2 cells: 'rare' \(1\)") as caught:
        labels_of(values)
    assert "drop_small_classes" not in str(caught.value)  # not an option of this caller
    section = "eval.benchmarks[linear_probe].params"
    with pytest.raises(DataError) as caught:
        labels_of(values, drop_small=False, section=section)
    assert f"set {section}.drop_small_classes: true" in str(caught.value)
    assert f"set {section}.drop_unlabelled: true" in str(caught.value)
    mask, labels = labels_of(values, drop_small=True)
    assert mask.tolist() == [True] * 10 + [False]
    assert set(labels) == {"T", "B"}
    assert "'rare' (1)" in caplog.text


def test_numbers_are_not_advised_to_be_merged():
    ages = np.random.default_rng(0).uniform(20, 80, 30)
    with pytest.raises(
        DataError, match=r"values are numbers: to learn the number, set finetune\.head\.task: regr"
    ):
        labels_of(ages)
    with pytest.raises(DataError, match="values are numbers: choose a column of labels"):
        labels_of(ages, section="eval.benchmarks[linear_probe].params", drop_small=False)
    with pytest.raises(DataError) as caught:
        labels_of([f"class{i}" for i in range(25)])
    assert "number" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["unknown", "Unassigned", "nan", "NA", "N/A", "doublet", "Low quality", "not_assigned"]
)
def test_classes_that_look_like_no_label_are_said(name, caplog):
    labels_of(["T"] * 5 + ["B"] * 5 + [name] * 3)
    (said,) = caplog.messages
    assert (
        f"obs['cell_type'] of cells.h5ad has values that look like no label, and count as classes: '{name}' (3"
        in said
    )
    assert "make their labels missing (NaN) in the file and set finetune.drop_unlabelled: true" in said
    caplog.clear()
    labels_of(["NK", "NKT", "Native", "Nonclassical", "None of these"] * 2)
    assert not caplog.messages


def test_many_small_classes_are_not_all_listed():
    with pytest.raises(DataError, match="and 15 more"):
        labels_of([f"class{i}" for i in range(25)])


def test_one_class_and_no_class_are_refused():
    with pytest.raises(DataError, match=r"only one class \('T', 4 cells\)"):
        labels_of(["T"] * 4)
    with pytest.raises(DataError, match="no labelled cells"):
        labels_of([None] * 4, drop_unlabelled=True)


def test_groups():
    obs = pd.DataFrame({"donor": ["b", "a", "b"], "one": "x", "gap": ["a", None, "b"]})
    assert usable_groups(obs, "donor", "cells.h5ad").tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"obs\['one'\] of cells.h5ad has one group only \('x'\)"):
        usable_groups(obs, "one", "cells.h5ad")
    with pytest.raises(DataError, match=r"1 of 3 cells of cells.h5ad have no group"):
        usable_groups(obs, "gap", "cells.h5ad")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"batch": "xyxy", "Donor_ID": "aabb"}, "Donor_ID"),  # donors before batches, whatever the case
        ({"dataset": "aabb", "library": "xyxy"}, "library"),
        ({"dataset": "aabb", "donor": "aaaa"}, "dataset"),  # one donor is no group
        ({"patient": ["a", None, "b", "b"], "batch": "xyxy"}, "batch"),  # gaps
        ({"cell_type": "abab", "n_genes": "1234"}, None),
    ],
)
def test_columns_of_groups_are_known_by_their_names(columns, expected):
    obs = pd.DataFrame({name: list(values) for name, values in columns.items()})
    assert group_column(obs) == expected


def auto(obs: pd.DataFrame, labels: str, **params: str | None) -> str | None:
    return probe_groups(obs, np.array(list(labels)), LinearProbeParams(**params), "cells.h5ad")[0]  # type: ignore[arg-type]


def test_what_a_split_keeps_whole_is_found_and_said(caplog):
    obs = pd.DataFrame({"donor": list("aabbcc"), "lane": list("xyxyxy")})
    with caplog.at_level(logging.INFO):
        assert auto(obs, "TBTBTB") == "donor"
    assert "split by obs['donor'] (3 groups), whole groups are held out" in caplog.text
    assert auto(obs, "TBTBTB", group_key="lane") == "lane"
    caplog.clear()
    assert auto(obs, "TBTBTB", group_key=None) is None
    assert "split by cell (as asked). Cells of one donor are alike" in caplog.text
    caplog.clear()
    assert auto(obs[["lane"]], "TBTBTB") is None
    assert "no usable column of donors, batches or data sets" in caplog.text


def test_a_column_that_says_as_much_as_the_labels_is_no_use(caplog):
    obs = pd.DataFrame({"batch": list("aabbcc")})
    assert auto(obs, "TTBBKK") is None
    assert "obs['batch'] of cells.h5ad goes with the labels" in caplog.text
    assert auto(obs, "TTBBKK", group_key="batch") == "batch"  # who names it gets it


def test_group_splits_differ_by_seed_and_test_classes_evenly():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 15)
    labels = np.where(rng.random(300) < np.repeat(rng.random(20), 15), "a", "b")
    params = LinearProbeParams(n_splits=4)
    by_seed = [probe_splits(labels, params, groups, seed) for seed in range(10)]
    assert len({test.tobytes() for splits in by_seed for _, test in splits}) > 30
    share = [(labels[test] == "a").sum() / (labels == "a").sum() for splits in by_seed for _, test in splits]
    assert np.abs(np.array(share) - 0.2).mean() < 0.03  # 0.05 where the first draw is taken


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(5, 40), min_size=2, max_size=6),
    test_size=st.floats(0.2, 0.6),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_by_cell_are_stratified_partitions(sizes, test_size, seed):
    labels = np.repeat([f"c{i}" for i in range(len(sizes))], sizes)
    params = LinearProbeParams(test_size=test_size, n_splits=3)
    for (train, test), (train2, _) in zip(
        probe_splits(labels, params, None, seed), probe_splits(labels, params, None, seed), strict=True
    ):
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
        np.testing.assert_array_equal(train, train2)
        for name, size in zip(np.unique(labels), sizes, strict=True):
            assert abs((labels[test] == name).sum() - size * test_size) <= 1.5


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(0, 6), min_size=4, max_size=60).filter(lambda found: len(set(found)) > 1),
    test_size=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_by_group_keep_groups_whole_and_differ(groups, test_size, seed):
    numbers = np.unique(groups, return_inverse=True)[1]
    labels = np.resize(["a", "b"], len(groups))
    splits = probe_splits(labels, LinearProbeParams(test_size=test_size, n_splits=4), numbers, seed)
    assert 1 <= len(splits) <= 4
    assert len({test.tobytes() for _, test in splits}) == len(splits)
    for train, test in splits:
        assert len(train)
        assert len(test)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(groups)))
        assert not set(numbers[train]) & set(numbers[test])


def test_a_class_in_one_donor_always_trains():
    groups = np.repeat(np.arange(8), 10)
    labels = np.where(np.arange(80) % 2, "a", "b").astype("<U4")
    labels[:5] = "rare"
    for train, test in probe_splits(labels, LinearProbeParams(n_splits=5), groups, 0):
        assert "rare" in labels[train]
        assert len(np.unique(groups[test])) == 2  # a fifth of eight


def test_too_few_cells_for_a_stratified_split():
    labels = np.repeat(["a", "b", "c"], 2)
    with pytest.raises(
        DataError, match=r"6 cells split with test_size 0.2 leave 2 test(.|\n)*Change test_size"
    ):
        probe_splits(labels, LinearProbeParams(), None, 0)


def test_a_broken_embedding_is_refused():
    embedding = np.eye(4, 3, dtype=np.float32)
    check_embedding(embedding, 4)
    with pytest.raises(DataError, match="one row each"):
        check_embedding(embedding, 5)
    embedding[2, 1] = np.nan
    with pytest.raises(DataError, match=r"1 of 4 cells is NaN or infinite \(first: row 2\)"):
        check_embedding(embedding, 4)
