"""Is a shift more than what any perturbation does? Wilcoxon's rank-sum test and the false discovery rate.

As Geneformer's `InSilicoPerturberStats`: the shifts of a gene in all its cells against those of random perturbations
pooled (goal_state_shift), or against those of the same gene in other cells (vs_null). The rank sums of all genes come
from one sorted pool, so thousands of genes cost one search.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control, norm

from scmodelforge.errors import DataError


class Comparison(NamedTuple):
    """Shifts of each group against others.

    Attributes
    ----------
    n
        int64 (n_groups): shifts of the group.
    mean
        float64 (n_groups): their mean.
    effect
        float64 (n_groups): rank-biserial correlation, P(larger than one of the others) - P(smaller); -1 to 1.
    p_value
        float64 (n_groups): two-sided, of Wilcoxon's rank-sum test, as `scipy.stats.ranksums`.
    fdr
        float64 (n_groups): after Benjamini and Hochberg (1995), over all groups.
    """

    n: np.ndarray
    mean: np.ndarray
    effect: np.ndarray
    p_value: np.ndarray
    fdr: np.ndarray


def compare(
    shifts: np.ndarray,
    group: np.ndarray,
    others: np.ndarray,
    group_of_others: np.ndarray | None = None,
) -> Comparison:
    """Compare the shifts of each group with others.

    Parameters
    ----------
    shifts
        float (n): finite.
    group
        int64 (n): group of each, 0 to n_groups - 1, none of them empty.
    others
        float (m): the shifts to compare with.
    group_of_others
        int64 (m): each group is compared with the others of its own number; None: with all of them.

    Raises
    ------
    DataError
        If a shift is not finite, or a group has nothing to be compared with.
    """
    shifts, others = np.asarray(shifts, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if not (np.isfinite(shifts).all() and np.isfinite(others).all()):
        raise DataError(
            "Some shifts are not finite numbers: the model gave an embedding with NaN or infinity.\n"
            "Check that the model was trained (its metrics.csv), and embed these cells with scmodelforge embed."
        )
    n = np.bincount(group)
    if group_of_others is None:
        n_others = np.full(len(n), len(others))
        own, pool = shifts, np.sort(others)
    else:
        n_others = np.bincount(group_of_others, minlength=len(n))[: len(n)]
        own, pool = _keys(group, shifts), np.sort(_keys(group_of_others, others))
    if not n_others.all():
        raise DataError("There are no perturbations to compare with: give more cells.")
    below, not_above = (np.searchsorted(pool, own, side=side) for side in ("left", "right"))
    if group_of_others is not None:
        first = (np.cumsum(n_others) - n_others)[group]
        below, not_above = below - first, not_above - first
    larger = np.bincount(group, weights=(below + not_above) / 2)  # Mann and Whitney's U, ties count half
    spread = np.sqrt(n * n_others * (n + n_others + 1) / 12)
    p_value = 2 * norm.sf(np.abs(larger - n * n_others / 2) / spread)
    return Comparison(
        n=n,
        mean=np.bincount(group, weights=shifts) / n,
        effect=2 * larger / (n * n_others) - 1,
        p_value=p_value,
        fdr=false_discovery_control(p_value),
    )


def _keys(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """complex128: numbers that sort by group, then by value."""
    keys = np.empty(len(values), dtype=np.complex128)
    keys.real, keys.imag = group, values
    return keys
