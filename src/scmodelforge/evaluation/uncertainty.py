"""How sure a figure is: bootstrap intervals, and a paired test of two methods on the same units.

A unit is what was drawn from the world: a test cell, or a whole donor where the split keeps donors together, since
cells of a donor are alike (cluster bootstrap; Field & Welsh, J. R. Stat. Soc. B 2007). Intervals are percentiles over
units drawn with replacement (Efron 1979). Units with the same outcome are drawn together, by their multinomial number,
so that the cost depends on how many outcomes there are and not on how many cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import sparse

N_RESAMPLES = 2_000
N_FLIPS = 9_999
EXACT_UNITS = 12  # up to so many units all 2^n patterns of signs are tried
LEVEL = 0.95
CHUNK = 10_000_000  # numbers drawn at a time
FEW_UNITS = 10  # below it a percentile interval is known to be too narrow


class PairedTest(NamedTuple):
    """How much better the first of two methods is.

    Attributes
    ----------
    difference
        Mean score of the first minus that of the second.
    interval
        95 % bootstrap interval of the difference.
    p_value
        Two-sided, of no difference.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def bootstrap(
    sums: np.ndarray | sparse.csr_matrix,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Compute a statistic of sums over units for resampled units.

    Parameters
    ----------
    sums
        float64 (n_outcomes, m): what one unit adds to each sum.
    statistic
        (n, m) sums → (n, ...) figures, never NaN.
    seed
        The same seed and counts draw the same units.
    counts
        int64 (n_outcomes): how many units have this outcome; None: one each.

    Returns
    -------
    numpy.ndarray
        float64 (N_RESAMPLES, ...).
    """
    counts = np.ones(sums.shape[0], np.int64) if counts is None else counts
    rng, n_units = np.random.default_rng(seed), int(counts.sum())
    size = max(1, CHUNK // len(counts))
    parts = [
        statistic(np.asarray(rng.multinomial(n_units, counts / n_units, size=min(size, n)) @ sums))
        for n in range(N_RESAMPLES, 0, -size)
    ]
    return np.concatenate(parts)


def resampled(n_units: int, seed: int) -> np.ndarray:
    """How often each unit is drawn, float64 (N_RESAMPLES, n_units), for figures that no sums over units give."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=N_RESAMPLES).astype(np.float64)


def interval(figures: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled figures (n_resamples)."""
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(scores: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of float64 (n_units) scores."""
    values, counts = np.unique(scores, return_counts=True)
    return interval(bootstrap(values[:, None], lambda sums: sums[:, 0] / len(scores), seed, counts))


def paired_test(first: np.ndarray, second: np.ndarray, seed: int) -> PairedTest:
    """Test whether two methods differ on the same units.

    The interval is a percentile bootstrap of the mean difference over units. The p-value is of a sign-flip permutation
    test: were the methods alike, the difference of each unit could as well have the other sign (Fisher 1935). All
    patterns of signs are tried with up to 12 units that differ, else 9,999 random ones, the observed one counted in
    (Phipson & Smyth 2010). So n units cannot give a p-value below 2 / 2**n.

    Parameters
    ----------
    first, second
        float64 (n_units): scores of the same units, in the same order.
    seed
        Of the resampling.
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    p_value = _sign_flips(differences[differences != 0], seed)
    return PairedTest(float(differences.mean()), mean_interval(differences, seed), p_value)


def _sign_flips(differences: np.ndarray, seed: int) -> float:
    observed = abs(differences.sum()) * (1 - 1e-9)  # sums in another order differ in the last bits
    if len(differences) <= EXACT_UNITS:
        signs = 1 - 2 * ((np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))) & 1)
        return float((np.abs(signs @ differences) >= observed).mean())
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    rng, chunk = np.random.default_rng(seed), max(1, CHUNK // len(sizes))
    extreme = 0
    for n in range(N_FLIPS, 0, -chunk):
        positive = rng.binomial(counts, 0.5, size=(min(chunk, n), len(sizes)))
        extreme += int((np.abs((2 * positive - counts) @ sizes) >= observed).sum())
    return (1 + extreme) / (1 + N_FLIPS)
