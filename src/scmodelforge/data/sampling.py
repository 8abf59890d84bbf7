"""Cells drawn by weight: classes of an obs label, data sets, or both, as one mechanism.

The cells are cut into strata (a class within a data set), and each stratum gets a whole number of the draws of an
epoch: the floor or the ceiling of its share, by systematic sampling with an offset that moves on with the epochs (Madow
1949), so that over the epochs each gets its share to the draw, and none is so small that it never comes. The
positions of an epoch are permuted; a position says the stratum and the number of the draw in it; a stratum gives its
cells in an order that is new each time that all have come. So after any epoch no cell of a stratum has come twice more
often than another, and a batch is a pure function of (seed, epoch, step), whatever the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from os.path import basename, expanduser

import numba
import numpy as np

from scmodelforge.config import Sampling
from scmodelforge.data.order import (
    FEISTEL_ROUNDS,
    Draws,
    draw_key,
    fill_round_keys,
    local_positions,
    permutation,
    permuted,
)
from scmodelforge.data.shards import source_of_shard
from scmodelforge.data.split import obs_classes
from scmodelforge.data.store import CellStore
from scmodelforge.errors import DataError

log = logging.getLogger(__name__)

STRATUM = 3  # fourth word of a key: what is permuted
GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly, however many there are (Weyl 1916)
SHOWN = 10  # strata that are named in the log


# --- the order --------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def draw_cells(
    positions: np.ndarray,
    bounds: np.ndarray,
    earlier: np.ndarray,
    offsets: np.ndarray,
    seed: int,
    places: np.ndarray,
    laps: np.ndarray,
) -> None:
    """Say which cell is drawn at each position of an epoch.

    Parameters
    ----------
    positions
        int64 (n): positions after the permutation of the epoch.
    bounds
        int64 (n_strata + 1): stratum `k` has the positions `bounds[k]:bounds[k + 1]`.
    earlier
        int64 (n_strata): its draws in earlier epochs.
    offsets
        int64 (n_strata + 1): its cells are `offsets[k]:offsets[k + 1]`.
    seed
        Decides the order within a stratum.
    places, laps
        int64 (n), filled: the cell, and how often its stratum had begun anew in this epoch.
    """
    round_keys = np.empty(FEISTEL_ROUNDS, np.uint64)
    for i in range(len(positions)):
        k = np.searchsorted(bounds, positions[i], side="right") - 1
        size = offsets[k + 1] - offsets[k]
        number = earlier[k] + positions[i] - bounds[k]
        lap = number // size
        fill_round_keys(draw_key(seed, lap, k, STRATUM), round_keys)
        places[i] = offsets[k] + permuted(number % size, size, round_keys)
        laps[i] = lap - earlier[k] // size


class WeightedDraws:
    """Cells drawn by stratum; an `Order`.

    Parameters
    ----------
    rows
        int64 (n): the cells, stratum after stratum.
    offsets
        int64 (n_strata + 1): stratum `k` has the cells `rows[offsets[k]:offsets[k + 1]]`, at least one.
    shares
        float64 (n_stages, n_strata): draws of each stratum in the first epochs, the last row in all later ones; each
        row has the same whole sum.
    seed
        Decides the order, with the epoch.

    Attributes
    ----------
    n_draws
        Draws of an epoch.
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, shares: np.ndarray, seed: int) -> None:
        self.rows, self.offsets, self.shares, self.seed = rows, offsets, shares, seed
        self.n_draws = round(shares[0].sum())
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    def quotas(self, epoch: int) -> np.ndarray:
        """Draws of each stratum in an epoch: int64 (n_strata) with the sum `n_draws`."""
        return whole_draws(self.shares[min(epoch, len(self.shares) - 1)], epoch)

    def largest_sum(self, values: np.ndarray) -> float:
        """A sum of `values` (n_cells of the store, by global row) over the draws that hardly any epoch exceeds.

        The mean of the epoch with the highest, and four standard deviations (as if each draw were independent).
        """
        of_draws, sizes = values[self.rows].astype(np.float64), np.diff(self.offsets)
        means = np.add.reduceat(of_draws, self.offsets[:-1]) / sizes
        variances = np.add.reduceat((of_draws - np.repeat(means, sizes)) ** 2, self.offsets[:-1]) / sizes
        return float((self.shares @ means + 4 * np.sqrt(self.shares @ variances)).max())

    def batch(self, epoch: int, step: int, batch_size: int, rank: int, world: int) -> Draws:
        """See `Order`."""
        plan = self._plan  # kept, as all batches of an epoch share it; threads see the old one or the new one
        if plan is None or plan[0] != epoch:
            earlier = sum((self.quotas(e) for e in range(epoch)), np.zeros(self.shares.shape[1], np.int64))
            self._plan = plan = (epoch, np.concatenate([[0], np.cumsum(self.quotas(epoch))]), earlier)
        _, bounds, earlier = plan
        positions = local_positions(self.n_draws, step, batch_size, world) * world + rank
        positions = permutation(positions, self.n_draws, draw_key(self.seed, epoch, 0, 0))
        places, laps = np.empty_like(positions), np.empty_like(positions)
        draw_cells(positions, bounds, earlier, self.offsets, self.seed, places, laps)
        return Draws(self.rows[places], laps)


# --- how many draws each stratum gets -------------------------------------------------------------


def whole_draws(shares: np.ndarray, epoch: int) -> np.ndarray:
    """Round shares (float64 with a whole sum) to int64 with the same sum; the mean over epochs is `shares`."""
    bounds = np.round(np.cumsum(shares), 6)  # whole numbers stay whole, whatever the sum lost
    bounds[-1] = round(bounds[-1])
    return np.diff(np.floor(bounds + epoch * GOLDEN % 1).astype(np.int64), prepend=0)


def fill_shares(total: float, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Share out `total` in proportion to `weights`, no more than its limit to each.

    Parameters
    ----------
    total
        At most the sum of the limits.
    weights, limits
        float64 (n), positive; a limit may be infinite.

    Returns
    -------
    float64 (n) with the sum `total`: what a limit cuts is given to the others in proportion.
    """
    full = np.zeros(len(weights), dtype=bool)
    while not full.all():
        left = total - limits[full].sum()
        shares = np.where(full, limits, left * weights / weights[~full].sum())
        over = ~full & (shares > limits)
        if not over.any():
            return shares
        full |= over
    return limits.copy()


def class_shares(sizes: np.ndarray, total: float, power: float, max_repeats: float) -> np.ndarray:
    """Draws of each class of a data set: in proportion to frequency ** (1 - power), capped; float64 (n)."""
    return fill_shares(total, (sizes / sizes.sum()) ** (1 - power), max_repeats * sizes)


# --- from a config to the order -------------------------------------------------------------------


def weighted_draws(store: CellStore, rows: np.ndarray, sampling: Sampling, seed: int) -> WeightedDraws:
    """Cut cells into strata and share out the draws of an epoch, as `data.sampling` says.

    Raises
    ------
    DataError
        If the label is missing for the whole or for some cells, or `mixture` does not fit the files.
    """
    datasets, dataset = _datasets(store, rows, sampling)
    classes, label = _classes(store, rows, sampling)
    stratum, code = np.unique(dataset * len(classes) + label, return_inverse=True)
    sizes = np.bincount(code)
    of_dataset = stratum // len(classes)

    max_repeats = np.inf if sampling.max_repeats is None else sampling.max_repeats
    there, n_cells = np.unique(dataset, return_counts=True)
    weights = np.array([(sampling.mixture or {"": 1.0})[datasets[d]] for d in there])
    caps = np.array([(sampling.caps or {}).get(datasets[d], np.inf) for d in there])
    limits = np.minimum(caps, max_repeats * n_cells)
    wanted = sampling.cells_per_epoch or len(rows)
    total = int(min(wanted, np.floor(limits.sum())))
    if total < wanted:
        log.warning(
            "data.sampling: the caps leave %s draws an epoch instead of %s; raise max_repeats or caps for more.",
            f"{total:,}",
            f"{wanted:,}",
        )
    if not total:
        raise DataError(
            f"data.sampling.max_repeats {max_repeats:g} leaves no draw of {len(rows):,} cells; raise it."
        )

    of_datasets = fill_shares(total, weights, limits)
    stages = []
    for epoch in range(sampling.curriculum_epochs + 1):
        power = sampling.label_power * (
            epoch / sampling.curriculum_epochs if sampling.curriculum_epochs else 1
        )
        parts = [
            class_shares(sizes[of_dataset == d], share, power, max_repeats)
            for d, share in zip(there, of_datasets, strict=True)
        ]
        stages.append(np.concatenate(parts))
    pairs = [(datasets[s // len(classes)], classes[s % len(classes)]) for s in stratum]
    names = [", ".join(filter(None, pair)) or "all" for pair in pairs]
    _announce(names, sizes, stages, max_repeats, total)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return WeightedDraws(rows[np.argsort(code, kind="stable")], offsets, np.stack(stages), seed)


def _datasets(store: CellStore, rows: np.ndarray, sampling: Sampling) -> tuple[list[str], np.ndarray]:
    """The keys of the mixture, and int64 (n) which of them each cell belongs to."""
    if sampling.mixture is None:
        return [""], np.zeros(len(rows), dtype=np.int64)
    keys = list(sampling.mixture)
    of_file = np.array([_key_of_file(str(name), keys) for name in store.files])
    if (of_file < 0).any():
        nameless = [str(store.files[i]) for i in np.flatnonzero(of_file < 0)]
        more = f" and {len(nameless) - 5} more" if len(nameless) > 5 else ""
        raise DataError(
            f"data.sampling.mixture gives no weight to {', '.join(nameless[:5])}{more}.\n"
            f"It names {', '.join(keys)}. Add these files, a pattern that fits them, or '*' for all that is not named."
        )
    dataset = of_file[np.searchsorted(store.offsets, rows, side="right") - 1]
    files, cells = set(of_file.tolist()), set(np.unique(dataset).tolist())
    if idle := [key for number, key in enumerate(keys) if number not in files]:
        raise DataError(
            f"data.sampling.mixture: no file is left for {', '.join(idle)}.\n"
            f"The files are {', '.join(map(str, store.files[:5]))}{', ...' if len(store.files) > 5 else ''}; each "
            "belongs to the first key that fits it. Correct these keys, or remove them."
        )
    if empty := [keys[number] for number in sorted(files - cells)]:
        log.warning("data.sampling.mixture: %s has no training cells; its weight is idle.", ", ".join(empty))
    return keys, dataset


def _key_of_file(name: str, keys: list[str]) -> int:
    """As `_key_of`; a shard also belongs to the key of the file that it was made of."""
    found, source = _key_of(name, keys), source_of_shard(name)
    of_source = _key_of(source, keys) if source else -1
    return min((key for key in (found, of_source) if key >= 0), default=-1)


def _key_of(name: str, keys: Sequence[str]) -> int:
    """The number of the first key that is the path or name of a file, or a pattern of either; -1 if none is."""
    names = (name, basename(name))
    for number, key in enumerate(map(expanduser, keys)):
        if key in names or any(fnmatchcase(one, key) for one in names):
            return number
    return -1


def _classes(store: CellStore, rows: np.ndarray, sampling: Sampling) -> tuple[list[str], np.ndarray]:
    """The classes of the label, and int64 (n) the class of each cell."""
    if sampling.label_key is None:
        return [""], np.zeros(len(rows), dtype=np.int64)
    codes, names = obs_classes(
        store.obs.iloc[rows], sampling.label_key, "data.sampling.label_key", "to balance no label"
    )
    return list(names), codes


def _announce(
    names: Sequence[str], sizes: np.ndarray, stages: Sequence[np.ndarray], max_repeats: float, total: int
) -> None:
    """Log what each stratum gets, the largest first."""
    shares, later = stages[-1], f" from epoch {len(stages)} on" if len(stages) > 1 else ""
    log.info("data.sampling: %s draws an epoch from %s cells%s:", f"{total:,}", f"{sizes.sum():,}", later)
    for k in np.argsort(-shares, kind="stable")[:SHOWN]:
        log.info(
            "  %s: %.0f draws of %s cells (%.3g each)",
            names[k] or "all",
            shares[k],
            f"{sizes[k]:,}",
            shares[k] / sizes[k],
        )
    if len(names) > SHOWN:
        log.info("  and %s more.", f"{len(names) - SHOWN:,}")
    if capped := int((shares >= max_repeats * sizes * (1 - 1e-9)).sum()):
        log.info("  %s of them are at max_repeats %g; the others share what that cuts.", capped, max_repeats)
