"""Human and mouse in one gene space: one-to-one orthologs, as Ensembl calls them (`tables/SOURCES.md`).

Genes that have several orthologs, or none, are not carried from one species to the other: a count cannot be
divided among genes. What that costs depends on the tissue: in a mouse brain 2% of the counts of a panel, in a mouse
pancreas a quarter, of which two thirds are insulin's two mouse genes.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from scmodelforge.genes.tables import SPECIES
from scmodelforge.genes.tables import __name__ as TABLES


@cache
def orthologs() -> pd.DataFrame:
    """Return all one-to-one pairs, ascending by human id; treat it as read-only.

    Columns `human` and `mouse`: Ensembl ids without version, each once, and each in its species' table.
    """
    with as_file(files(TABLES) / "orthologs.parquet") as path:
        return pq.read_table(path).to_pandas()


def orthologs_of(gene_ids: np.ndarray, species: str) -> np.ndarray:
    """Return the one-to-one ortholog of each gene in the other species.

    Parameters
    ----------
    gene_ids
        object (n) of str: Ensembl ids without version.
    species
        The species of these genes, "human" or "mouse".

    Returns
    -------
    object (n) of str: Ensembl ids, "" for a gene without such an ortholog.
    """
    return pd.Series(gene_ids, dtype=object).map(_partners(species)).fillna("").to_numpy(object)


@cache
def _partners(species: str) -> pd.Series:
    """The genes of the other species, by the ids of this one."""
    return orthologs().set_index(species)[other_species(species)]


def other_species(species: str) -> str:
    """Return the other of the two species."""
    return SPECIES[1 - SPECIES.index(species)]
