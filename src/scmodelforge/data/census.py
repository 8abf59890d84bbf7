"""Cells of a CELLxGENE Census, read in blocks through TileDB-SOMA (CZI Cell Science Program et al. 2025).

Opening reads the obs columns of the query and none of its counts: 8 bytes and a code for each column a cell. Counts
come thousands of cells at a time and are kept by `BlockCache` as long as they are of use, at 3 or 4 bytes a count.
So the memory for counts follows what is asked for ahead at once (`data.shuffle_buffer`), not the size of the query.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from scmodelforge.config_census import LISTS, CensusConfig
from scmodelforge.data.blocks import READ_CELLS, BlockCache
from scmodelforge.data.census_address import address_of
from scmodelforge.data.matrix import Held, Matrix, Rows
from scmodelforge.errors import DataError, require_extra

log = logging.getLogger(__name__)

SHUFFLE_BUFFER = 65_536  # cells, as TileDB-SOMA-ML, the Census' own loader, has it (io_batch_size)
# Cells that an order keeps together. The Census stores counts in tiles of 2,048 cells × 2,048 genes, so that few cells
# cost nearly as much as many: of a local copy blocks of 64 came at 3,400 cells a second of one core, blocks of 512 at
# 7,800 and cells in order at 13,800 (1,000 counts each).
NEIGHBOURS = 512
STEP_BYTES = 16 * 2**20  # of each column that TileDB hands over at a time
GENES = ["feature_id", "feature_name"]


def open_census(config: CensusConfig) -> Matrix:
    """Open the cells that a config chooses, with the raw counts of all genes.

    The index of `obs` is the Census' own number of each cell (`soma_joinid`), ascending.

    Raises
    ------
    MissingExtraError
        If the package tiledbsoma is not installed.
    DataError
        If the Census cannot be opened, has no such organism or column, or the filter is wrong or fits no cell.
    """
    query = _query_of(config)
    reader = _Reader(query)
    return Matrix(
        config,
        None,
        Held(reader, (len(query.obs), len(query.var)), "Census, read in blocks"),
        query.var,
        lambda: query.obs,
        shuffle_buffer=SHUFFLE_BUFFER,
        block_cells=NEIGHBOURS,
        close=reader.cache.close,
    )


def census_facts(config: CensusConfig) -> dict[str, Any]:
    """What a run should record of its cells: address, release, filter, numbers of cells and data sets."""
    return dict(_query_of(config).facts)


def census_sha256(config: CensusConfig) -> str:
    """Stand for the cells as a file's checksum does: release, organism, the cells' numbers, and columns of obs.

    Not where a copy lies, and not how the cells were asked for.
    """
    query = _query_of(config)
    about = [query.facts[key] for key in ("release", "schema", "organism")]
    digest = hashlib.sha256(json.dumps([*about, list(query.obs)]).encode())
    digest.update(query.obs.index.to_numpy().tobytes())
    return digest.hexdigest()


class _Query(NamedTuple):
    """An open query.

    Attributes
    ----------
    obs
        Its cells, ascending by soma_joinid, which is the index.
    var
        All genes of the organism.
    column_of
        int32: the row of `var` of each soma_joinid of a gene.
    counts
        The SOMA array of raw counts.
    facts
        For run.json.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    column_of: np.ndarray
    counts: Any
    facts: dict[str, Any]

    def read(self, rows: np.ndarray) -> Rows:
        """Read cells (int64, ascending, distinct); indices and counts come in the smallest types that hold them."""
        if not len(rows):
            return Rows(np.zeros(1, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint8))
        cells = self.obs.index.to_numpy()[rows]
        places, genes, counts = [], [], []
        with _explained(
            "Counts of the Census cannot be read", "Check the connection; a run goes on with --resume."
        ):
            for table in self.counts.read((cells, slice(None))).tables():
                cell = table["soma_dim_0"].to_numpy()
                first = np.flatnonzero(np.diff(cell, prepend=-1))  # of each run of entries of one cell
                lengths = np.diff(first, append=len(cell))
                places.append(np.repeat(np.searchsorted(cells, cell[first]).astype(np.int32), lengths))
                genes.append(self.column_of[table["soma_dim_1"].to_numpy()])
                counts.append(_smallest(table["soma_data"].to_numpy()))
        entries = (np.concatenate(counts), (np.concatenate(places), np.concatenate(genes)))
        matrix = sparse.coo_array(entries, shape=(len(rows), len(self.var))).tocsr()
        matrix.sort_indices()
        narrow = np.uint16 if len(self.var) <= 2**16 else np.int32
        return Rows(matrix.indptr.astype(np.int64), matrix.indices.astype(narrow), matrix.data)


class _Reader:
    """Rows of a query by way of blocks in memory, two shuffle buffers of them at most."""

    def __init__(self, query: _Query) -> None:
        self.cache = BlockCache(
            query.read, len(query.obs), capacity_cells=2 * READ_CELLS, read_cells=READ_CELLS
        )

    def take(self, rows: np.ndarray) -> Rows:
        found = self.cache.take(rows)
        return Rows(found.indptr, found.indices.astype(np.int32), found.data.astype(np.float32))

    def prefetch(self, rows: np.ndarray) -> None:
        self.cache.make_room_for(rows)
        self.cache.prefetch(rows)


def _query_of(config: CensusConfig) -> _Query:
    require_extra("tiledbsoma", "census", "data.source: census")
    return _query(config.model_dump_json())


@functools.lru_cache(maxsize=2)  # a run opens its sources several times
def _query(settings: str) -> _Query:
    import tiledbsoma

    config = CensusConfig.model_validate_json(settings)
    address = address_of(config)
    context = tiledbsoma.SOMATileDBContext(
        tiledb_config={"soma.init_buffer_bytes": STEP_BYTES, **address.settings}
    )
    remedy = "Check the connection and data.census.uri, the folder or address that holds census_data and census_info."
    with _explained(f"The Census at '{address.uri}' cannot be opened", remedy):
        census: Any = tiledbsoma.Collection.open(address.uri, context=context)
        experiment = _experiment(census, config.organism, address.uri)
        summary = _summary(census)
        measured = experiment.ms["RNA"]
        counts = tiledbsoma.SparseNDArray.open(measured.X["raw"].uri, context=context)  # stays open by itself
        var = measured.var.read(column_names=["soma_joinid", *GENES]).concat().to_pandas()
    release = address.release or summary.get("census_build_date", "unknown")
    obs = _cells(experiment.obs, config)
    column_of = np.full(var.soma_joinid.max() + 1, -1, dtype=np.int32)
    column_of[var.soma_joinid] = np.arange(len(var))
    facts = {
        "uri": address.uri,
        "release": release,
        "schema": summary.get("census_schema_version", "unknown"),
        "organism": config.organism,
        "filter": config.value_filter,
        "n_cells": len(obs),
        "n_datasets": int(obs["dataset_id"].nunique()) if "dataset_id" in obs else None,
    }
    log.info(
        "Census of %s, %s: %s cells%s; %s. Each pass over them reads them anew: for many epochs make shards first "
        "(scmodelforge shard).",
        release,
        config.organism,
        f"{len(obs):,}",
        f" of {facts['n_datasets']:,} data sets" if facts["n_datasets"] else "",
        config.value_filter or "no filter",
    )
    if address.release not in ("", config.version):
        log.warning(
            "data.census.version %s is the Census of %s now, and another one later: write the date, so that the run "
            "can be repeated and resumed.",
            config.version,
            release,
        )
    return _Query(obs, var[GENES].set_index("feature_id", drop=False), column_of, counts, facts)


def _experiment(census: Any, organism: str, uri: str) -> Any:
    if "census_data" not in census:
        raise DataError(
            f"'{uri}' is no Census: it has no 'census_data'.\n"
            "data.census.uri is the folder or address above census_data and census_info."
        )
    organisms = census["census_data"]
    if organism not in organisms:
        raise DataError(
            f"data.census.organism: the Census has no '{organism}'{_near(organism, list(organisms))}; it has "
            f"{', '.join(sorted(organisms))}."
        )
    return organisms[organism]


def _summary(census: Any) -> dict[str, str]:
    """What the Census says of itself; a copy may say nothing."""
    if "census_info" not in census or "summary" not in census["census_info"]:
        return {}
    table = census["census_info"]["summary"].read(column_names=["label", "value"]).concat().to_pydict()
    return dict(zip(table["label"], table["value"], strict=True))


# --- the cells of a query -----------------------------------------------------------------------------


def _cells(obs: Any, config: CensusConfig) -> pd.DataFrame:
    """Read the annotations of the cells that the filter lets through."""
    there = [name for name in obs.keys() if name != "soma_joinid"]  # noqa: SIM118 (a SOMA frame is no dictionary)
    listed = [column for column in LISTS if getattr(config, column)]
    _require_columns(config, listed, there)
    columns = [name for name in config.columns if name in there]  # dataset_id may be missing in a copy
    value_filter = config.value_filter
    remedy = (
        "Correct data.census.obs_value_filter: conditions such as sex == 'female', joined by 'and' and 'or', on the "
        f"columns {', '.join(there)}."
    )
    with _explained(f"The filter of the Census is not valid: {value_filter}", remedy):
        read = obs.read(column_names=["soma_joinid", *columns], value_filter=value_filter)
        tables = [_encoded(table) for table in read]
    unknown = [
        f"data.census.{column}: no cell has '{value}'{_near(value, _values(obs, column))}"
        for column in listed
        for value in _unmatched(getattr(config, column), tables, column)
    ]
    if not sum(map(len, tables)):
        found = "".join(f"\n{text}." for text in unknown)
        raise DataError(f"No cell of the Census fits the filter: {value_filter}.{found}\nWiden it.")
    for text in unknown:
        log.warning("%s that fits the other conditions.", text)
    whole = pa.concat_tables(tables).unify_dictionaries()
    frame = whole.select(columns).to_pandas()
    frame.index = pd.Index(whole["soma_joinid"].to_numpy(), name="soma_joinid")
    for column in frame.select_dtypes("category"):
        frame[column] = frame[column].cat.remove_unused_categories()
    return frame if frame.index.is_monotonic_increasing else frame.sort_index()


def _require_columns(config: CensusConfig, listed: Sequence[str], there: list[str]) -> None:
    wanted = dict.fromkeys(config.obs_columns, "data.census.obs_columns names")
    wanted |= {column: f"data.census.{column} needs" for column in listed}
    if config.is_primary_data is not None:
        wanted["is_primary_data"] = "data.census.is_primary_data (null: do without) needs"
    for column, who in wanted.items():
        if column not in there:
            raise DataError(
                f"{who} the obs column '{column}', which the Census has not{_near(column, there)}; it has "
                f"{', '.join(there)}."
            )


def _encoded(table: pa.Table) -> pa.Table:
    """Text columns as codes of their values."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            table = table.set_column(place, field.name, table[field.name].dictionary_encode())
    return table


def _unmatched(wanted: Sequence[str], tables: Sequence[pa.Table], column: str) -> list[str]:
    """The values that no cell has."""
    found = {value for table in tables for value in table[column].unique().to_pylist()}
    return [value for value in wanted if value not in found]


def _values(obs: Any, column: str) -> list[str]:
    """All values of a column, where the Census keeps a list of them."""
    if not pa.types.is_dictionary(obs.schema.field(column).type):
        return []
    return obs.get_enumeration_values([column])[column].to_pylist()


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _smallest(counts: np.ndarray) -> np.ndarray:
    """Return counts in the smallest type that holds them: whole numbers in one or two bytes, else float32."""
    for dtype in (np.uint8, np.uint16):
        if 0 <= counts.min(initial=0) <= counts.max(initial=0) <= np.iinfo(dtype).max:
            small = counts.astype(dtype)
            if (small == counts).all():
                return small
    return counts.astype(np.float32)


@contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Put TileDB-SOMA's errors into a sentence that says what to do."""
    import tiledbsoma

    try:
        yield
    except (tiledbsoma.SOMAError, KeyError) as error:  # KeyError: a part of the Census is not there
        words = str(error).partition("\n")[0].removeprefix("SOMAError: ").strip("'. ")
        raise DataError(f"{what} ({words}).\n{remedy}") from error
