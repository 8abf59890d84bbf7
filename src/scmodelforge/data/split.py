"""Which cells validate and never train: whole groups (donors, batches) where a column is named, else cells.

The split is a pure function of the annotations and the seed. Groups stay whole because cells of one donor
resemble each other: a model that has seen some of them is not tested by the rest.
"""

from __future__ import annotations

import difflib
import logging

import numpy as np
import pandas as pd

from scmodelforge.config import Split
from scmodelforge.data.order import permutation
from scmodelforge.errors import DataError

logger = logging.getLogger(__name__)


def split_cells(
    obs: pd.DataFrame, split: Split, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide all cells into those that train and those that validate.

    Parameters
    ----------
    obs
        Annotations of all cells.
    split
        Share of cells to hold out, and the column whose groups stay whole (None: split by cell).
    seed
        Decides which cells or groups are held out.
    labels
        Class of each cell (n_cells), to spread each class over both sides when splitting by cell; each class
        keeps at least one training cell.

    Returns
    -------
    Training rows and validation rows, int64, ascending; together all cells. Without validation
    (`val_split` 0) the second is empty.

    Raises
    ------
    DataError
        If the column is missing, lacks values or has a single group, or there are too few cells to split.
    """
    n_cells = len(obs)
    if not split.val_split:
        return np.arange(n_cells), np.zeros(0, dtype=np.int64)
    if n_cells < 2:
        raise DataError(
            f"{n_cells} cell cannot be split into training and validation.\n"
            "Give more cells, or set data.split.val_split: 0."
        )
    if split.group_key is not None:
        held_out = _whole_groups(_groups(obs, split.group_key), split, seed)
        _warn_unseen(labels, held_out)
    else:
        held_out = _single_cells(n_cells, split.val_split, seed, labels)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _single_cells(n_cells: int, share: float, seed: int, labels: np.ndarray | None) -> np.ndarray:
    """Return the mask of cells held out: systematic sampling of the shuffled cells, class after class."""
    shuffled = permutation(np.arange(n_cells), n_cells, seed)
    codes = np.zeros(n_cells, dtype=np.int64) if labels is None else pd.factorize(np.asarray(labels))[0]
    shuffled = shuffled[np.argsort(codes[shuffled], kind="stable")]
    ordered = codes[shuffled]
    spare = shuffled[np.r_[False, ordered[1:] == ordered[:-1]]]  # the first of each class always trains
    if not len(spare):
        raise DataError(
            f"The {n_cells} cells all have different labels: whichever validates, its class does not train.\n"
            "Give more cells of each class, or set data.split.val_split: 0."
        )
    n_held_out = min(max(1, round(n_cells * share)), len(spare))
    picked = (np.arange(1, len(spare) + 1) * n_held_out) // len(spare)
    held_out = np.zeros(n_cells, dtype=bool)
    held_out[spare[np.diff(picked, prepend=0) > 0]] = True
    return held_out


def obs_classes(obs: pd.DataFrame, key: str, setting: str, instead: str) -> tuple[np.ndarray, pd.Index]:
    """Return the class of each cell in an obs column as codes (int64), and the names, sorted.

    `setting` is the config key that names the column, and `instead` what happens without it ("to split by cell").

    Raises
    ------
    DataError
        If there is no such column, or a cell has no value in it.
    """
    if key not in obs.columns:
        near = difflib.get_close_matches(key, map(str, obs.columns), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
        raise DataError(
            f"{setting} is '{key}', but obs has no such column.{hint}\n"
            f"Columns of obs: {', '.join(map(str, obs.columns)) or 'none'}."
        )
    if missing := int(obs[key].isna().sum()):
        raise DataError(
            f"obs['{key}'] ({setting}) has no value for {missing:,} of {len(obs):,} cells.\n"
            f"Fill them in, remove these cells, or set {setting}: null {instead}."
        )
    return pd.factorize(obs[key].astype(str), sort=True)


def _groups(obs: pd.DataFrame, key: str) -> np.ndarray:
    """Return the group of each cell as codes, groups in the order of their names."""
    codes, names = obs_classes(obs, key, "data.split.group_key", "to split by cell")
    if len(names) < 2:
        raise DataError(
            f"obs['{key}'] (data.split.group_key) has only the group '{names[0]}'; at least two are needed.\n"
            "Name another column, or set data.split.group_key: null to split by cell."
        )
    return codes


def _whole_groups(codes: np.ndarray, split: Split, seed: int) -> np.ndarray:
    """Return the mask of cells held out: groups in random order, each taken if it brings the share nearer."""
    sizes = np.bincount(codes)
    wanted = split.val_split * len(codes)
    chosen: list[int] = []
    for group in permutation(np.arange(len(sizes)), len(sizes), seed).tolist():
        missing = wanted - sizes[chosen].sum()
        if abs(missing - sizes[group]) < abs(missing) and len(chosen) < len(sizes) - 1:
            chosen.append(group)
    chosen = chosen or [int(np.argmin(sizes))]
    held_out = np.isin(codes, chosen)
    share = held_out.mean()
    level = logging.WARNING if abs(share - split.val_split) > split.val_split / 2 else logging.INFO
    logger.log(
        level,
        "Validation holds %d of %d groups of obs['%s'] with %.1f%% of the cells (data.split.val_split asks "
        "for %.1f%%; groups stay whole).",
        len(chosen),
        len(sizes),
        split.group_key,
        100 * share,
        100 * split.val_split,
    )
    return held_out


def _warn_unseen(labels: np.ndarray | None, held_out: np.ndarray) -> None:
    if labels is None:
        return
    values = pd.Series(np.asarray(labels))
    unseen = sorted(set(values[held_out].dropna()) - set(values[~held_out].dropna()), key=str)
    if unseen:
        logger.warning(
            "Classes that are only in validation groups cannot be learned: %s.", ", ".join(map(str, unseen))
        )
