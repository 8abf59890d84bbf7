"""Intervals cover the truth as often as they say, and the paired test is right and exact where it can be."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from scmodelforge.evaluation.classification import UNTESTED, label_scores
from scmodelforge.evaluation.uncertainty import bootstrap, interval, mean_interval, paired_test

CLASSES = np.array(["a", "b", "c"])


def noisy(truth: np.ndarray, right: float | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Predictions that are right with a probability, else random."""
    return np.where(rng.random(len(truth)) < right, truth, rng.integers(0, len(CLASSES), len(truth)))


def test_intervals_over_cells_cover_the_truth_19_times_out_of_20():
    rng, covered, truth_is = np.random.default_rng(0), 0, 0.7 + 0.3 / 3
    for seed in range(200):
        truth = rng.integers(0, 3, 300)
        scores = label_scores(truth, noisy(truth, 0.7, rng)[:, None], CLASSES, None, seed)
        low, high = scores.intervals["accuracy"]
        covered += low <= truth_is <= high
    assert covered / 200 == pytest.approx(0.95, abs=0.035)


def test_intervals_over_donors_are_wide_where_donors_differ_and_those_over_cells_too_narrow():
    rng, by_donor, by_cell, donors = np.random.default_rng(1), 0, 0, np.repeat(np.arange(40), 25)
    for seed in range(150):
        truth = rng.integers(0, 3, len(donors))
        right = rng.uniform(0.0, 1.0, 40)[donors]
        predicted = noisy(truth, right, rng)[:, None]
        for groups in (donors, None):
            low, high = label_scores(truth, predicted, CLASSES, groups, seed).intervals["accuracy"]
            inside = low <= 0.5 + 0.5 / 3 <= high
            by_donor, by_cell = (
                (by_donor + inside, by_cell) if groups is donors else (by_donor, by_cell + inside)
            )
    assert by_donor / 150 == pytest.approx(0.95, abs=0.045)
    assert by_cell / 150 < 0.75


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), n_splits=st.integers(1, 3), seed=st.integers(0, 999), grouped=st.booleans())
def test_units_average_to_the_figures_and_nothing_is_nan(n, n_splits, seed, grouped):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 3, n), rng.integers(-1, 3, (n, n_splits))
    predicted[rng.integers(n, size=n_splits), np.arange(n_splits)] = 0  # each split tests
    groups = rng.integers(0, 5, n) if grouped else None
    scores = label_scores(truth, predicted, CLASSES, groups, seed)
    for name, figure in (("accuracy", accuracy_score), ("macro_f1", macro)):
        tested = [column != UNTESTED for column in predicted.T]
        expected = np.mean(
            [figure(truth[t], column[t]) for t, column in zip(tested, predicted.T, strict=True)]
        )
        assert scores.metrics[name] == pytest.approx(expected)
        assert scores.units[name].mean() == pytest.approx(expected)
    assert np.isfinite([*scores.metrics.values(), *np.ravel(list(scores.intervals.values()))]).all()


def macro(truth: np.ndarray, predicted: np.ndarray) -> float:
    return f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0)


def test_resampling_outcomes_equals_resampling_cells():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 150)
    predicted = noisy(truth, 0.5, rng)
    drawn = rng.integers(0, 150, (500, 150))
    slow = [macro(truth[rows], predicted[rows]) for rows in drawn]
    fast = label_scores(truth, predicted[:, None], CLASSES, None, 0).intervals["macro_f1"]
    assert fast == pytest.approx(interval(np.array(slow)), abs=0.015)


def test_contributions_tell_the_spread_of_macro_f1():
    rng, truth = np.random.default_rng(3), np.random.default_rng(4).integers(0, 3, 400)
    predicted = noisy(truth, 0.5, rng)
    scores = label_scores(truth, predicted[:, None], CLASSES, None, 0)
    resampled = [macro(truth[rows], predicted[rows]) for rows in rng.integers(0, 400, (400, 400))]
    assert scores.units["macro_f1"].std() / 20 == pytest.approx(np.std(resampled), rel=0.15)


def test_bootstrap_of_a_mean_equals_scipy():
    scores = np.random.default_rng(5).exponential(size=80)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=5000, random_state=0)
    assert mean_interval(scores, 0) == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)
    ours = bootstrap(scores[:, None], lambda sums: sums[:, 0] / 80, 0)
    assert ours.std() == pytest.approx(scores.std() / np.sqrt(80), rel=0.1)


def test_few_units_are_tested_exactly():
    differences = np.array([0.3, 0.1, -0.05, 0.2, 0.0])
    flips = [abs(np.dot(signs, differences)) for signs in product([1, -1], repeat=5)]
    expected = np.mean([total >= abs(differences.sum()) - 1e-12 for total in flips])
    test = paired_test(differences + 0.5, np.full(5, 0.5), 0)
    assert test.p_value == pytest.approx(expected)
    assert test.difference == pytest.approx(differences.mean())


def test_many_units_are_tested_as_scipy_does():
    rng = np.random.default_rng(6)
    first, second = rng.random(60), rng.random(60) - 0.1
    theirs = stats.permutation_test(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", rng=0
    )
    test = paired_test(first, second, 0)
    assert test.p_value == pytest.approx(theirs.pvalue, abs=0.02)
    low, high = test.interval
    assert low < test.difference < high


def test_p_values_are_uniform_without_a_difference_and_small_with_one():
    rng, p_values = np.random.default_rng(7), []
    for seed in range(120):
        truth = rng.integers(0, 3, 200)
        pair = [
            label_scores(truth, noisy(truth, 0.6, rng)[:, None], CLASSES, None, seed).units["macro_f1"]
            for _ in range(2)
        ]
        p_values.append(paired_test(*pair, seed).p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.05)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    better = label_scores(truth, noisy(truth, 0.9, rng)[:, None], CLASSES, None, 0).units["macro_f1"]
    assert paired_test(better, pair[0], 0).p_value < 0.001


def test_methods_that_agree_do_not_differ():
    same = np.random.default_rng(8).random(30)
    assert paired_test(same, same, 0) == (0.0, (0.0, 0.0), 1.0)


def test_a_group_that_tests_alone_counts_by_the_score_of_its_split():
    rng = np.random.default_rng(0)
    groups, shares = np.repeat([0, 1, 2], 200), (0.9, 0.7, 0.4)
    truth = rng.integers(0, len(CLASSES), 600)
    predicted = np.full((600, 3), UNTESTED)
    for group, share in enumerate(shares):
        chosen = groups == group
        predicted[chosen, group] = noisy(truth[chosen], share, rng)
    scores = label_scores(truth, predicted, CLASSES, groups, 0)
    alone = [
        f1_score(truth[groups == group], predicted[groups == group, group], average="macro")
        for group in range(3)
    ]
    np.testing.assert_allclose(scores.units["macro_f1"], alone)
    test = paired_test(scores.units["macro_f1"], np.full(3, 0.5), 0)
    assert test.interval[0] < test.difference < test.interval[1]
