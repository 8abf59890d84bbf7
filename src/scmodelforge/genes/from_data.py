"""The genes that some files have together: what a vocabulary "from_data" is made of.

Files of two species share one gene space where `data.species` says whose genes each has: the vocabulary is of the
species of most files, and the others join it by one-to-one orthologs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pandas as pd

from scmodelforge.errors import ConfigError
from scmodelforge.genes.identifiers import NOT_MEASURED, GeneMatch, match_species
from scmodelforge.genes.names import clean_ensembl_ids
from scmodelforge.genes.orthologs import orthologs_of
from scmodelforge.genes.tables import SPECIES, known_genes, species_of

logger = logging.getLogger(__name__)


def genes_of_files(
    var_frames: Sequence[pd.DataFrame], column: str | None, species: Sequence[str | None]
) -> tuple[pd.DataFrame, str]:
    """Return the union of the genes of several var, and its species.

    Parameters
    ----------
    var_frames
        The var of each file.
    column
        `data.gene_column`.
    species
        Of each file, or None: the species of the union where any file has one, else by its names.

    Returns
    -------
    gene_id (unique, ascending), symbol and biotype: genes that the tables know as they have them, others under
    their own names; and "human", "mouse" or "unknown".

    Raises
    ------
    ConfigError
        If there is no file.
    """
    if not var_frames:
        raise ConfigError(
            "data.gene_vocab: from_data takes the genes from the data, but data.paths is empty."
        )
    found, matches = zip(
        *(_match(var, of, column) for var, of in zip(var_frames, species, strict=True)), strict=True
    )
    shared = _shared_species(species, found)
    parts, n_left_out = [], 0
    for match, of in zip(matches, species, strict=True):
        if of in (None, shared):
            parts.append(_own_genes(match))
        else:
            parts.append(_as_orthologs(match, str(of)))
            n_left_out += match.n_columns - len(parts[-1])
    union = pd.concat(parts).drop_duplicates("gene_id").sort_values("gene_id", ignore_index=True)
    biotypes = known_genes().biotype.reindex(union.gene_id)
    union["biotype"] = biotypes.fillna("").to_numpy(object)
    union_species = shared or species_of(union.gene_id.to_numpy(object))

    n_known, n_files = int(biotypes.notna().sum()), len(var_frames)
    files = f"{n_files} file{'s' * (n_files > 1)}"
    logger.info(f"from_data: {len(union):,} genes of {files}, {n_known:,} known ({union_species})")
    if shared and set(species) - {None, shared}:
        logger.info(
            f"from_data: {n_left_out:,} genes of files of another species than {shared} have no one-to-one "
            "ortholog there, and are left out"
        )
    elif not shared and len(set(found)) > 1:
        logger.warning(
            "from_data: some files have human genes and some mouse genes, so that they share none. Say which file is "
            "of which species in data.species to join them by one-to-one orthologs."
        )
    return union, union_species


def _match(var: pd.DataFrame, species: str | None, column: str | None) -> tuple[str, GeneMatch]:
    """The species of a file, as given or as its names fit best, and its match with all genes of that species."""
    matches = {name: match_species(var, name, column) for name in ([species] if species else SPECIES)}
    best = max(matches, key=lambda name: matches[name].n_genes)
    return best, matches[best]


def _shared_species(species: Sequence[str | None], found: Sequence[str]) -> str | None:
    """The species of the vocabulary; None where no file has one given.

    Files without one are of the vocabulary's species, so they decide; else most files do, and human where it is even.
    """
    if not any(species):
        return None
    unnamed = [best for best, given in zip(found, species, strict=True) if given is None]
    return max(SPECIES, key=list(unnamed or found).count)


def _own_genes(match: GeneMatch) -> pd.DataFrame:
    """gene_id and symbol of all genes of a file; what no table knows keeps its name."""
    table, known = match.table, match.gene_index >= 0
    own = clean_ensembl_ids(table.used)
    genes = pd.DataFrame(
        {"gene_id": table.gene_id.where(known, own), "symbol": table.symbol.where(known, own)}
    )
    return genes[(genes.gene_id != "") & (table.reason != NOT_MEASURED)]


def _as_orthologs(match: GeneMatch, species: str) -> pd.DataFrame:
    """gene_id and symbol of the one-to-one orthologs of a file's genes."""
    measured = match.table[match.table.reason != NOT_MEASURED]
    ids = orthologs_of(measured.gene_id.to_numpy(object), species)
    ids = ids[ids != ""]
    return pd.DataFrame({"gene_id": ids, "symbol": known_genes().symbol.loc[ids].to_numpy(object)})
