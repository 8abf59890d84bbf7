"""Which cells have a label that can be used, and which of them train and which test a probe.

Cells of one donor resemble each other, so a split by cell flatters every method: with a group column whole
groups are held out, and the score says what happens on a donor never seen. Both parts are pure functions
of their arguments, so every embedding that is compared meets the same cells in the same splits.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from scmodelforge.config_eval import LinearProbeParams
from scmodelforge.data.obs import no_labels
from scmodelforge.errors import DataError
from scmodelforge.evaluation.collapse import collapse

log = logging.getLogger(__name__)

GROUP_COLUMNS = {  # obs columns that are known by their names, in lower case; the first kind that there is decides
    "donor": (
        "donor_id",
        "donor",
        "individual_id",
        "individual",
        "patient_id",
        "patient",
        "subject_id",
        "subject",
    ),
    "batch": ("batch", "batch_id", "library_id", "library", "sample_id", "sample", "channel", "run"),
    "dataset": ("dataset_id", "dataset", "study_id", "study"),
}
AUTO = "auto"
DRAWS_COMPARED = (
    5  # of these the most even one is kept; of more, with few groups, it would always be the same
)
DRAWS_PER_SPLIT = 50  # group splits tried for each one kept, to find one that trains on every class


def obs_column(obs: pd.DataFrame, key: str, where: str) -> pd.Categorical:
    """Return the column `key` of `obs` as categories; empty strings count as missing.

    Raises
    ------
    DataError
        If there is no such column; the message names the nearest ones.
    """
    if key not in obs.columns:
        columns = [str(column) for column in obs.columns]
        near = difflib.get_close_matches(key, columns, n=3)
        hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
        raise DataError(
            f"{where} has no obs column '{key}'.{hint}\nColumns: {', '.join(columns) or 'none'}.\n"
            "Name one of them in the config, or add the column to the file."
        )
    column = pd.Categorical(obs[key])
    return column.remove_categories([""]) if "" in column.categories else column


def usable_labels(
    obs: pd.DataFrame,
    key: str,
    where: str,
    *,
    drop_unlabelled: bool,
    section: str = "params",
    min_cells: int = 2,
    drop_small: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the cells whose label can be learned or scored.

    A label is missing where it is NaN, None or an empty string; any other text is a class, and "unknown" and the like
    with a warning.

    Parameters
    ----------
    obs
        One row per cell.
    key
        Column with the labels.
    where
        What the messages call these data, such as the file's name.
    drop_unlabelled
        Leave out cells without a label instead of refusing.
    section
        Where messages say that the options are: "finetune", "eval.benchmarks[linear_probe].params".
    min_cells
        Smallest class that is accepted.
    drop_small
        Leave out the cells of smaller classes instead of refusing; None where the user has no such option.

    Returns
    -------
    mask
        bool (n_cells): the cells to use.
    labels
        str (mask.sum()): their labels.

    Raises
    ------
    DataError
        If the column is missing, cells have no label, a class is too small, or fewer than two classes remain.
    """
    column = obs_column(obs, key, where)
    codes = np.asarray(column.codes)
    names = column.categories.to_numpy().astype(str)
    mask = codes >= 0
    unlabelled = len(mask) - int(mask.sum())
    if unlabelled and not drop_unlabelled:
        raise DataError(
            f"{unlabelled:,} of {len(mask):,} cells of {where} have no label in obs['{key}'].\n"
            f"Every cell needs one: fill them in, or set {section}.drop_unlabelled: true to leave these cells out."
        )
    if unlabelled:
        log.info("%s: %s of %s cells without a label in '%s' are left out", where, unlabelled, len(mask), key)

    counts = np.bincount(codes[mask], minlength=len(names))
    if missing := no_labels(names[counts > 0]):
        log.warning(
            "obs['%s'] of %s has values that look like no label, and count as classes: %s. To leave these cells out, "
            "make their labels missing (NaN) in the file and set %s.drop_unlabelled: true.",
            key,
            where,
            ", ".join(f"'{name}' ({counts[names == name].sum():,} cells)" for name in missing),
            section,
        )
    small = np.flatnonzero((counts > 0) & (counts < min_cells))
    if len(small):
        listed = ", ".join(f"'{names[code]}' ({counts[code]})" for code in small[:10])
        listed += f" and {len(small) - 10} more" if len(small) > 10 else ""
        if not drop_small:
            remedy = (
                "" if drop_small is None else f"set {section}.drop_small_classes: true to leave them out, or "
            )
            remedy = (
                f"To go on, {remedy}merge them into other classes, or empty their labels and set "
                f"{section}.drop_unlabelled: true."
            )
            if pd.api.types.is_numeric_dtype(column.categories):
                instead = (
                    "to learn the number, set finetune.head.task: regression"
                    if section == "finetune"
                    else "choose a column of labels"
                )
                remedy = f"Its values are numbers: {instead}. If they are classes:\n{remedy}"
            raise DataError(
                f"obs['{key}'] of {where} has classes with fewer than {min_cells} cells: {listed}.\n{remedy}"
            )
        mask &= ~np.isin(codes, small)
        log.warning(
            "%s: %s cells of classes below %s are left out: %s", where, counts[small].sum(), min_cells, listed
        )
    labels = names[codes[mask]]
    classes = np.unique(labels)
    if len(classes) < 2:
        seen = (
            f"only one class ('{classes[0]}', {len(labels):,} cells)" if len(classes) else "no labelled cells"
        )
        raise DataError(
            f"obs['{key}'] of {where} has {seen}; at least two classes are needed.\n"
            "Choose another label column, or add cells of other classes."
        )
    return mask, labels


def usable_groups(obs: pd.DataFrame, key: str, where: str) -> np.ndarray:
    """Return int64 (n_cells) group numbers of the column `key`.

    Raises
    ------
    DataError
        If the column is missing, a cell has no group, or there is one group only.
    """
    column = obs_column(obs, key, where)
    if missing := int((column.codes < 0).sum()):
        raise DataError(
            f"{missing:,} of {len(obs):,} cells of {where} have no group in obs['{key}'].\n"
            "Fill them in, or choose another column."
        )
    groups = np.unique(column.codes, return_inverse=True)[1]
    if not groups.any():
        raise DataError(
            f"obs['{key}'] of {where} has one group only ('{column[0]}'), and two or more are needed.\n"
            "Choose another column, or set it to null."
        )
    return groups


def group_column(obs: pd.DataFrame, kinds: Sequence[str] = tuple(GROUP_COLUMNS)) -> str | None:
    """The first column of `obs` that is known to name donors, batches or data sets and has two or more of them.

    Columns with missing values are passed over, which is said; None if there is none.
    """
    by_name = {str(column).lower(): str(column) for column in obs.columns}
    for key in (by_name[name] for kind in kinds for name in GROUP_COLUMNS[kind] if name in by_name):
        column = pd.Categorical(obs[key])
        if missing := int((column.codes < 0).sum()):
            log.info("obs['%s'] is empty for %s cells, so it is not taken for groups", key, missing)
        elif len(np.unique(column.codes)) > 1:
            return key
    return None


def probe_groups(
    obs: pd.DataFrame, labels: np.ndarray, params: LinearProbeParams, where: str
) -> tuple[str | None, np.ndarray | None]:
    """Decide what a split keeps whole: the column and int64 (n_cells) group numbers, or (None, None) for cells.

    With `group_key: auto` it is the first known column of donors, batches or data sets; a column that says as much as
    the labels (less than two classes occur in two groups) is no use. What is decided is said.

    Raises
    ------
    DataError
        If a column that was named cannot be used.
    """
    if params.group_key != AUTO and params.group_key is not None:
        return params.group_key, usable_groups(obs, params.group_key, where)
    key = group_column(obs) if params.group_key == AUTO else None
    if key is not None:
        groups = usable_groups(obs, key, where)
        recurring = (pd.crosstab(labels, groups).to_numpy() > 0).sum(axis=1) > 1
        if recurring.sum() > 1:
            log.info(
                "%s: split by obs['%s'] (%s groups), whole groups are held out; group_key names another column, null "
                "splits by cell",
                where,
                key,
                groups.max() + 1,
            )
            return key, groups
        log.warning("obs['%s'] of %s goes with the labels, so it is not taken for the split", key, where)
    reason = "no usable column of donors, batches or data sets" if params.group_key == AUTO else "as asked"
    log.warning(
        "%s: split by cell (%s). Cells of one donor are alike, so that all figures flatter; name a column of donors as "
        "group_key if there is one.",
        where,
        reason,
    )
    return None, None


def probe_splits(
    labels: np.ndarray, params: LinearProbeParams, groups: np.ndarray | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw `params.n_splits` random splits into training and test cells.

    By cell, each class keeps its share on both sides. By group, whole groups are drawn at random and never the same
    ones twice; of many draws the one is kept that takes the fewest classes from training and, of these, whose test
    cells have most nearly `test_size` of each class.

    Parameters
    ----------
    labels
        str (n_cells): class of each cell.
    params
        `test_size` (share of cells, or of groups) and `n_splits`.
    groups
        int64 (n_cells) numbers from 0 without gaps, as from `usable_groups`; or None to split by cell.
    seed
        The same seed gives the same splits.

    Returns
    -------
    list of (train, test)
        int64 rows, ascending, disjoint, together all cells. Fewer than `n_splits` where the groups do not
        give as many different ones.

    Raises
    ------
    DataError
        If the cells are too few for a test cell of each class.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    if groups is not None:
        return _group_splits(codes, groups, params, seed)
    n_test = int(np.ceil(params.test_size * len(labels)))
    if min(n_test, len(labels) - n_test) < len(classes):
        raise DataError(
            f"{len(labels):,} cells split with test_size {params.test_size:g} leave {n_test:,} test and "
            f"{len(labels) - n_test:,} training cells for {len(classes)} classes; each side needs one "
            "of each.\nChange test_size, take more cells, or leave out small classes "
            "(min_cells_per_class with drop_small_classes: true)."
        )
    from sklearn.model_selection import StratifiedShuffleSplit

    splitter = StratifiedShuffleSplit(params.n_splits, test_size=params.test_size, random_state=seed)
    return [(np.sort(train), np.sort(test)) for train, test in splitter.split(codes, codes)]


def _group_splits(
    codes: np.ndarray, groups: np.ndarray, params: LinearProbeParams, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    n_groups = int(groups.max()) + 1
    n_test = min(n_groups - 1, max(1, round(params.test_size * n_groups)))
    present = np.zeros((n_groups, int(codes.max()) + 1), dtype=np.int64)
    np.add.at(present, (groups, codes), 1)

    rng = np.random.default_rng(seed)
    splits: list[tuple[np.ndarray, np.ndarray]] = []
    used: set[bytes] = set()
    lost = 0
    for _ in range(params.n_splits):
        draws = rng.permuted(np.tile(np.arange(n_groups), (DRAWS_PER_SPLIT, 1)), axis=1)[:, :n_test]
        draws.sort(axis=1)
        untrained = (present[draws].sum(1) == present.sum(0)).sum(
            1
        )  # classes that a draw takes from training
        share = present[draws].sum(1) / present.sum(0)  # of each class that a draw tests
        uneven = np.abs(share - params.test_size).mean(1)
        repeated = np.array([draw.tobytes() in used for draw in draws])
        first = np.lexsort((repeated, untrained))[:DRAWS_COMPARED]  # stable: of equals those drawn first
        best = first[np.lexsort((uneven[first], repeated[first], untrained[first]))[0]]
        if repeated[best]:
            log.info("%s groups give %s different splits, not %s", n_groups, len(splits), params.n_splits)
            break
        used.add(draws[best].tobytes())
        lost = max(lost, int(untrained[best]))
        test = np.isin(groups, draws[best])
        splits.append((np.flatnonzero(~test), np.flatnonzero(test)))
    if lost:
        log.warning("up to %s classes have no training cell in a split by group: they count as errors", lost)
    return splits


def check_embedding(embedding: np.ndarray, n_cells: int, method: str = "model") -> None:
    """Raise `DataError` unless `embedding` is (n_cells, d), finite and not collapsed (see `collapse`)."""
    if embedding.ndim != 2 or len(embedding) != n_cells:
        raise DataError(
            f"An embedding of shape {embedding.shape} does not fit {n_cells:,} cells: one row each."
        )
    bad = np.flatnonzero(~np.isfinite(embedding).all(1))
    if len(bad):
        raise DataError(
            f"The embedding of {len(bad):,} of {n_cells:,} cells is NaN or infinite (first: row {bad[0]}).\n"
            "The model has probably diverged: look at its training loss, lower the learning rate, or train "
            "with precision 32-true."
        )
    if reason := collapse(embedding):
        remedy = (
            "Look at the model's training loss: train longer, or with a lower learning rate."
            if method == "model"
            else f"Leave '{method}' out of eval.baselines."
        )
        raise DataError(
            f"The embedding of '{method}' has collapsed: {reason}.\nScores of it would say nothing. {remedy}"
        )
