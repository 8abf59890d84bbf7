"""Bootstrap intervals (Efron 1979): cells, genes or other units are drawn with replacement, figures computed anew."""

from __future__ import annotations

import numpy as np

N_DRAWS = 1000
PERCENTILES = (2.5, 97.5)


def resampled(n_units: int, seed: int) -> np.ndarray:
    """How often each unit is drawn: float64 (`N_DRAWS`, n_units), each row adds up to `n_units`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=N_DRAWS).astype(np.float64)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a figure, from what it was in each draw."""
    low, high = np.percentile(draws, PERCENTILES)
    return float(low), float(high)


def mean_interval(units: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % interval of a mean over units."""
    return interval(resampled(len(units), seed) @ units / len(units))
