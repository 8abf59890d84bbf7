"""Annotations of some cells of a file, without reading those of the others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import h5py
import pandas as pd
from anndata.io import read_elem

# Texts that annotators write where they have no label; compared in lower case, without spaces, dashes and the like.
NO_LABELS = frozenset(
    {"unknown", "unknowns", "unk", "unassigned", "notassigned", "unannotated", "unlabelled", "unlabeled"}
    | {"unclassified", "undetermined", "undefined", "ambiguous", "nan", "na", "none", "null", "notavailable"}
    | {"doublet", "doublets", "multiplet", "multiplets", "lowquality"}
)


def no_labels(labels: Iterable[str]) -> list[str]:
    """Those of some labels that say that there is none, such as "Unassigned", "NA" or "doublet"."""
    return [label for label in labels if re.sub(r"[\W_]", "", label).lower() in NO_LABELS]


def column_names(frame: Any) -> list[str]:
    """Names of the columns of a DataFrame, or of one in an HDF5 group."""
    if isinstance(frame, pd.DataFrame):
        return [str(name) for name in frame.columns]
    if not _by_columns(frame):  # of anndata before 0.7
        return [str(name) for name in read_elem(frame).columns]
    return [str(name) for name in frame.attrs["column-order"]]


def read_rows(frame: Any, start: int, stop: int, columns: list[str] | None = None) -> pd.DataFrame:
    """Return the rows `start:stop` of a DataFrame, or of one in an HDF5 group; `columns` None: all.

    A category stays one that no row has, so that parts can be put together again; unless there are more of
    them than rows.
    """
    if isinstance(frame, pd.DataFrame) or not _by_columns(frame):
        whole = frame if isinstance(frame, pd.DataFrame) else read_elem(frame)
        return whole.iloc[start:stop] if columns is None else whole[columns].iloc[start:stop]
    key = frame.attrs["_index"]
    index = pd.Index(_slice(frame[key], start, stop), name=None if key == "_index" else key)
    names = column_names(frame) if columns is None else columns
    return pd.DataFrame({name: _slice(frame[name], start, stop) for name in names}, index=index)


def _by_columns(frame: Any) -> bool:
    return isinstance(frame, h5py.Group) and {"_index", "column-order"} <= set(frame.attrs)


def _slice(column: h5py.Dataset | h5py.Group, start: int, stop: int) -> Any:
    kind = column.attrs.get("encoding-type")
    if kind == "string-array":
        return column.asstr()[start:stop]
    if kind == "array":
        return column[start:stop]
    if kind == "categorical":
        categories = read_elem(column["categories"])
        values = pd.Categorical.from_codes(
            column["codes"][start:stop], categories, ordered=bool(column.attrs["ordered"])
        )
        return values.remove_unused_categories() if len(categories) > stop - start else values
    return read_elem(column)[start:stop]  # nullable arrays and old encodings: one column whole
