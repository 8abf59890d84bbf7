"""The statistics of perturbations are those of scipy and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, ranksums
from statsmodels.stats.multitest import multipletests

from scmodelforge.errors import DataError
from scmodelforge.perturbation.statistics import compare


def shifts(n: int, decimals: int, seed: int) -> np.ndarray:
    """Numbers with ties."""
    return np.random.default_rng(seed).normal(size=n).round(decimals)


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_against_a_pool(decimals: int) -> None:
    group = np.random.default_rng(1).permutation(np.repeat(np.arange(20), np.arange(1, 21)))
    own, pool = shifts(len(group), decimals, 2) + (group == 7), shifts(500, decimals, 3)
    found = compare(own, group, pool)
    each = [own[group == number] for number in range(20)]
    np.testing.assert_array_equal(found.n, np.arange(1, 21))
    np.testing.assert_allclose(found.mean, [values.mean() for values in each])
    np.testing.assert_allclose(found.p_value, [ranksums(values, pool).pvalue for values in each], rtol=1e-9)
    u = np.array([mannwhitneyu(values, pool).statistic for values in each])
    np.testing.assert_allclose(found.effect, 2 * u / (found.n * 500) - 1, atol=1e-12)
    np.testing.assert_allclose(found.fdr, multipletests(found.p_value, method="fdr_bh")[1], rtol=1e-9)


def test_against_the_same_group_in_other_cells() -> None:
    group, of_others = np.arange(60) % 4, np.arange(100) % 4
    own, others = shifts(60, 1, 4), shifts(100, 1, 5) - (of_others == 2)
    found = compare(own, group, others, of_others)
    expected = [ranksums(own[group == g], others[of_others == g]).pvalue for g in range(4)]
    np.testing.assert_allclose(found.p_value, expected, rtol=1e-9)
    assert found.effect[2] > 0.3


def test_what_cannot_be_compared() -> None:
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(DataError, match="not finite numbers: the model gave an embedding with NaN"):
        compare(np.array([np.nan]), one, np.ones(3))
    with pytest.raises(DataError, match="no perturbations to compare with: give more cells"):
        compare(np.ones(1), one, np.ones(0))
