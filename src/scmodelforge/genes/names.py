"""Which known gene does a name mean? Ensembl ids and symbols, as files really spell them.

Known are the genes of the tables (of the vocabulary's species) and the vocabulary's own. A name goes through
these steps and stops at the first that knows it: Ensembl id (version, `_PAR_Y` and all around it removed),
symbol, earlier symbol, the same with what scanpy or R did to it repaired, and at last without regard to case.
What names several genes is not matched.

All steps look up whole columns: 33,000 names take about 0.3 s, the first use of a vocabulary 1 s more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scmodelforge.genes.tables import ID_PREFIX, SPECIES, load_table

if TYPE_CHECKING:
    from scmodelforge.genes.vocab import GeneVocab

ENSEMBL_ID = r"(ENS[A-Z]{0,4}G\d{11}|ENSGR\d{10})"  # ENSGR: old ids of the pseudoautosomal genes on Y
GENOME_PREFIX = r"^(?:GRCh3[78]|hg19|hg38|GRCm3[89]|mm10|mm39)_+"
AMBIGUOUS = -2


def clean_ensembl_ids(names: pd.Series) -> pd.Series:
    """Return names with the version (`.12`) and `_PAR_Y` of Ensembl gene ids removed, others as they are."""
    return names.str.replace(rf"^{ENSEMBL_ID}(?:\.\d+)?(?:_PAR_Y)?$", r"\1", regex=True).str.replace(
        r"^ENSGR(?=\d{10}$)", "ENSG0", regex=True
    )


@dataclass(frozen=True, eq=False)
class Names:
    """Unique names, and the row of the reference each stands for, or AMBIGUOUS."""

    names: pd.Index
    rows: np.ndarray

    @classmethod
    def build(cls, names: pd.Series, priority: pd.Series) -> Names:
        """Index `names` (whose index are reference rows); the gene of highest priority has the name."""
        frame = pd.DataFrame(
            {"name": names.to_numpy(), "row": names.index, "priority": priority.loc[names.index]}
        )
        frame = frame[frame.name != ""].drop_duplicates(["name", "row"])
        frame = frame[frame.priority == frame.groupby("name").priority.transform("max")]
        frame.loc[frame.duplicated("name", keep=False), "row"] = AMBIGUOUS
        frame = frame.drop_duplicates("name")
        return cls(pd.Index(frame.name), frame.row.to_numpy())

    def find(self, names: pd.Series) -> np.ndarray:
        """Return the row of each name, -1 if it is not here, AMBIGUOUS if it stands for several."""
        at = self.names.get_indexer(pd.Index(names))
        return np.where(at >= 0, self.rows[at], -1) if len(self.rows) else at


@dataclass(frozen=True, eq=False)
class Reference:
    """All known genes (`genes`: as in the tables, and `vocab_row`, -1 if not there) and their names."""

    genes: pd.DataFrame
    foreign: pd.Index

    @cached_property
    def _ids(self) -> pd.Index:
        return pd.Index(self.genes.gene_id)

    def find_ids(self, ids: pd.Series) -> np.ndarray:
        """Return the row of each gene id, -1 if it is not here."""
        return self._ids.get_indexer(pd.Index(ids))

    @cached_property
    def priority(self) -> pd.Series:
        """Who has a symbol that several genes bear: vocabulary, then protein coding, then HGNC's choice."""
        genes = self.genes
        return 4 * (genes.vocab_row >= 0) + 2 * (genes.biotype == "protein_coding") + genes.hgnc.astype(int)

    @cached_property
    def earlier(self) -> pd.Series:
        """Earlier symbols, one a row; index: reference rows."""
        names = self.genes.previous.str.split("|", regex=False).explode()
        return names[names != ""]

    @cached_property
    def symbols(self) -> Names:
        return Names.build(self.genes.symbol, self.priority)

    @cached_property
    def previous(self) -> Names:
        return Names.build(self.earlier, self.priority)

    @cached_property
    def mangled(self) -> Names:
        """Names as R's make.names writes them: other signs become dots, X before a leading digit."""
        return self._changed(
            lambda names: names.str.replace(r"[^\w.]", ".", regex=True).str.replace(
                r"^(?=\d)", "X", regex=True
            )
        )

    @cached_property
    def folded(self) -> Names:
        """Names in capitals."""
        return self._changed(lambda names: names.str.upper())

    def _changed(self, change: Callable[[pd.Series], pd.Series]) -> Names:
        """Symbols and earlier symbols after `change`; where they meet, symbols win."""
        current = Names.build(change(self.genes.symbol), self.priority)
        earlier = change(self.earlier)
        earlier_names = Names.build(earlier[~earlier.isin(current.names)], self.priority)
        return Names(
            current.names.append(earlier_names.names), np.concatenate([current.rows, earlier_names.rows])
        )


@lru_cache(maxsize=8)
def reference_of(vocab: GeneVocab) -> Reference:
    """The vocabulary's genes, then the other genes of the species whose Ensembl ids it has."""
    own = pd.DataFrame({"gene_id": vocab.gene_ids, "symbol": vocab.symbols, "biotype": vocab.biotypes})
    own["vocab_row"] = np.arange(len(own))
    present = [s for s in SPECIES if own.gene_id.str.startswith(ID_PREFIX[s]).any()]
    tables = pd.concat([load_table(s) for s in present] or [load_table("human").head(0)], ignore_index=True)
    genes = own.merge(tables.drop(columns="biotype"), how="left", on="gene_id", suffixes=("", "_today"))
    # a vocabulary may be older than the tables: what the gene is called today is one more name of it
    genes["previous"] = genes.previous.fillna("") + "|" + genes.pop("symbol_today").fillna("")
    others = tables[~tables.gene_id.isin(own.gene_id)].assign(vocab_row=-1)
    genes = pd.concat([genes, others], ignore_index=True)
    genes["hgnc"] = genes.hgnc.eq(True)
    return Reference(genes, _foreign_symbols(present))


@lru_cache
def reference_of_species(species: str) -> Reference:
    """All genes of one table, each a row of the "vocabulary"."""
    table = load_table(species)
    return Reference(table.assign(vocab_row=np.arange(len(table))), _foreign_symbols([species]))


def _foreign_symbols(present: list[str]) -> pd.Index:
    """Symbols of the species that are not there, if any is."""
    absent = [load_table(s).symbol for s in SPECIES if present and s not in present]
    return pd.Index(pd.concat(absent)) if absent else pd.Index([])


def recognise(names: pd.Series, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Return for each name (distinct, index 0, 1, …) the reference row, negative if none, and the reason."""
    rows = np.full(len(names), -1)
    reasons = np.full(len(names), "unknown name", dtype=object)
    left = names

    def step(tried: pd.Series, find: Callable[[pd.Series], np.ndarray], reason: str) -> None:
        """Look up what is left as `tried` spells it (same index)."""
        nonlocal left
        found = find(tried)
        at = tried.index[found != -1]
        rows[at] = found[found != -1]
        reasons[at] = np.where(rows[at] == AMBIGUOUS, "ambiguous symbol", reason)
        left = left[rows[left.index] == -1]

    ids = (
        left[left.str.contains("ENS", case=False, regex=False)]
        .str.upper()
        .str.extract(ENSEMBL_ID)[0]
        .dropna()
    )
    step(clean_ensembl_ids(ids), reference.find_ids, "Ensembl id")
    step(left, reference.find_ids, "own name")
    step(left, reference.symbols.find, "symbol")
    step(left, reference.previous.find, "previous symbol")

    bare = _bare(left)
    step(bare, reference.symbols.find, "repaired name")
    step(bare[left.index], reference.previous.find, "repaired name")
    # scanpy and R tell duplicates apart by a number at the end; the first one keeps its name
    base = left.str.replace(r"[-.]\d+$", "", regex=True)
    base = _bare(base[(base != left) & base.isin(names)])
    step(base, reference.symbols.find, "repaired name")
    step(base[rows[base.index] == -1], reference.previous.find, "repaired name")
    step(bare[left.index], reference.mangled.find, "repaired name")

    # 'Cd3e' is a mouse gene, not a human one in another case
    other = bare[left.index]
    step(other[~other.isin(reference.foreign)].str.upper(), reference.folded.find, "other case")

    reasons[ids.index[rows[ids.index] == -1]] = "unknown Ensembl id"
    reasons[left.index[left == ""]] = "no name"
    return rows, reasons


def _bare(names: pd.Series) -> pd.Series:
    """Names without a genome before them and without an Ensembl id after them."""
    names = names.str.replace(GENOME_PREFIX, "", regex=True)
    return names.str.replace(rf"[-._|;:]?{ENSEMBL_ID}.*$", "", regex=True)
