"""Tables of genes that a user brings (vocabularies, medians): read once, with every mistake named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scmodelforge.errors import DataError
from scmodelforge.genes.names import clean_ensembl_ids


def read_gene_table(path: Path, what: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read a table with a column `gene_id`, and perhaps `median`, from .parquet, .csv or .tsv.

    Parameters
    ----------
    path
        The file; its ending says how it is read.
    what
        What it is, for messages.

    Returns
    -------
    The table, `gene_id` as str without version and `median` (if there) as float64, NaN where empty; and the
    metadata of a parquet schema.

    Raises
    ------
    DataError
        If the file is missing or cannot be read, has no rows or no `gene_id`, an empty id, or a median that
        is not positive and finite.
    """
    frame, metadata = _read(path, what)
    if "gene_id" not in frame:
        columns = ", ".join(map(str, frame.columns))
        raise DataError(f"The {what} '{path}' has no column 'gene_id'; it has: {columns}.")
    if frame.empty:
        raise DataError(f"The {what} '{path}' holds no genes.")
    ids = frame["gene_id"].fillna("").astype(str).str.strip()
    if (empty := (ids == "").to_numpy()).any():
        raise DataError(
            f"The {what} '{path}' has no gene_id in row {int(empty.argmax()) + 1} of {len(ids):,}."
        )
    # what `GeneVocab.save` wrote stays as it is
    frame = frame.assign(gene_id=ids if "fingerprint" in metadata else clean_ensembl_ids(ids))
    if "median" in frame:
        medians = pd.to_numeric(frame["median"], errors="coerce").astype(np.float64)
        wrong = (medians.isna() & frame["median"].notna()) | (medians <= 0) | np.isinf(medians)
        if wrong.any():
            first = frame[wrong].iloc[0]
            raise DataError(
                f"The {what} '{path}' has {int(wrong.sum()):,} medians that are not positive and finite "
                f"(first: {first['median']} of {first['gene_id']}). Leave out genes that have none."
            )
        frame = frame.assign(median=medians)
    return frame, metadata


def _read(path: Path, what: str) -> tuple[pd.DataFrame, dict[str, str]]:
    if not path.is_file():
        raise DataError(f"There is no {what} at '{path}'.")
    if path.suffix not in (".parquet", ".csv", ".tsv"):
        raise DataError(f"The {what} '{path}' must be a .parquet, .csv or .tsv file.")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            return table.to_pandas(), metadata
        # "NA" may be a symbol; only an empty median is missing
        frame = pd.read_csv(
            path,
            sep="," if path.suffix == ".csv" else "\t",
            keep_default_na=False,
            na_values={"median": ["", "NA", "NaN", "nan"]},
        )
        return frame, {}
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"The {what} '{path}' cannot be read: {error}") from error
