"""Gene tables of human and mouse; `scripts/build_gene_tables.py` writes them, SOURCES.md says from what."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

SPECIES = ("human", "mouse")
ID_PREFIX = {"human": "ENSG0", "mouse": "ENSMUSG0"}


@cache
def load_table(species: str) -> pd.DataFrame:
    """Return the genes of `species` ("human" or "mouse"), ascending by id; treat it as read-only.

    Columns, all str but the last: `gene_id` (Ensembl, no version), `symbol`, `biotype`, `previous` (earlier
    symbols separated by "|", "" if none), and `hgnc` (bool: HGNC gives this very id to the symbol).
    """
    with as_file(files(__name__) / f"{species}.parquet") as path:
        table = pq.ParquetFile(path).read(use_threads=False)
    # by way of lists: to_pandas takes 40 MB more than the strings themselves
    text = {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names[:-1]}
    return pd.DataFrame(text | {"hgnc": table["hgnc"].to_numpy()})


@cache
def known_genes() -> pd.DataFrame:
    """Return the genes of all species, indexed by `gene_id`; treat it as read-only."""
    return pd.concat([load_table(species) for species in SPECIES]).set_index("gene_id")


def species_of(ids: np.ndarray) -> str:
    """Species of Ensembl ids; "unknown" if there are none of human and mouse, or of both."""
    text = pd.Series(ids)
    present = [s for s in SPECIES if text.str.startswith(ID_PREFIX[s]).any()]
    return present[0] if len(present) == 1 else "unknown"
