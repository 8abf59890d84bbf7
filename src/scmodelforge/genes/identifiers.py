"""Which gene of the vocabulary is each row of `var`? Ensembl ids and symbols, as files really spell them.

Every name is first recognised among all genes that are known (the tables of the vocabulary's species and the
vocabulary's own genes), then looked up in the vocabulary: so a gene that is left out is told from a name that
nobody knows. A name goes through these steps and stops at the first that knows it: Ensembl id (version, `_PAR_Y`
and anything around it removed), symbol, earlier symbol, the same with what scanpy or R did to it repaired, and at
last without regard to case. What names several genes is not matched.

All steps are look-ups of whole columns; 36,000 names take about 0.1 s, the first use of a vocabulary 0.5 s more.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scmodelforge.errors import DataError
from scmodelforge.genes.tables import ID_PREFIX, SPECIES, load_table

if TYPE_CHECKING:
    from scmodelforge.genes.vocab import GeneVocab

logger = logging.getLogger(__name__)

PREFERRED_COLUMNS = (
    "feature_id",
    "ensembl_id",
    "gene_ids",
    "gene_id",
    "index",
    "feature_name",
    "gene_symbols",
    "gene_name",
    "gene_short_name",
    "symbol",
)
ENSEMBL_ID = r"(ENS[A-Z]{0,4}G\d{11}|ENSGR\d{10})"  # ENSGR: the Y copies of pseudoautosomal genes, before 2021
GENOME_PREFIX = r"^(?:GRCh3[78]|hg19|hg38|GRCm3[89]|mm10|mm39)_+"
AMBIGUOUS = -2


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of one file meet a vocabulary.

    Attributes
    ----------
    column
        The column of var that was read; "index" for var_names.
    kind
        "ensembl" or "symbol": what most of the matched names are.
    gene_index
        int32 (n_var): row of the vocabulary, or -1.
    table
        One row per var entry: `var_name` (as in var_names), `used` (the name that was looked up), `gene_id` and
        `symbol` of the gene recognised ("" if none), and `reason`. Reasons of a match: "Ensembl id", "symbol",
        "previous symbol", "repaired name", "other case", "own name" (a name of the vocabulary that is neither).
        Reasons against: "not in the vocabulary: BIOTYPE", "ambiguous symbol", "unknown Ensembl id",
        "unknown name", "no name".
    """

    column: str
    kind: str
    gene_index: np.ndarray
    table: pd.DataFrame

    @property
    def n_matched(self) -> int:
        """Number of var entries that have a gene in the vocabulary."""
        return int((self.gene_index >= 0).sum())

    @property
    def n_genes(self) -> int:
        """Number of distinct vocabulary genes among them."""
        return len(np.unique(self.gene_index[self.gene_index >= 0]))

    @property
    def n_duplicates(self) -> int:
        """Number of var entries whose gene an earlier entry already has; their counts are summed."""
        return self.n_matched - self.n_genes

    def summary(self) -> str:
        """Return one readable line: what matched, how, and why the rest did not."""
        hit = self.gene_index >= 0
        how = self.table.reason[hit].value_counts()
        against = self.table.reason[~hit].str.removeprefix("not in the vocabulary: ").value_counts()
        main = "Ensembl id" if self.kind == "ensembl" else "symbol"
        text = f"matched {self.n_matched:,} of {len(hit):,} genes by {main} in {_place(self.column)}"
        if len(extra := how.drop(main, errors="ignore")):
            text += f" ({_counts(extra)})"
        if len(against):
            text += f"; {int(against.sum()):,} not: {_counts(against)}"
        if self.n_duplicates:
            text += f"; {self.n_duplicates:,} share a gene with another row and are summed"
        return text


def match_genes(var: pd.DataFrame, vocab: GeneVocab, column: str | None = None) -> GeneMatch:
    """Find the vocabulary gene of each row of `var`.

    Parameters
    ----------
    var
        The genes of a file, as in `AnnData.var`.
    vocab
        The vocabulary to match with.
    column
        Column with Ensembl ids or symbols, "index" for var_names. By default the index and all text columns are
        tried, and the one that finds most vocabulary genes is taken (Ensembl ids first if several do).

    Raises
    ------
    DataError
        If `column` does not exist.
    """
    reference = _reference(vocab)
    best: tuple[tuple[int, bool, int], GeneMatch] | None = None
    for name in _candidates(var, column):
        match = _match_column(var, name, reference)
        rank = -PREFERRED_COLUMNS.index(name) if name in PREFERRED_COLUMNS else -len(PREFERRED_COLUMNS)
        score = (match.n_genes, match.kind == "ensembl", rank)
        if best is None or score > best[0]:
            best = score, match
    assert best is not None  # the index is always a candidate
    return best[1]


def likely_cause(match: GeneMatch, vocab: GeneVocab, var: pd.DataFrame) -> str:
    """Say in a sentence or two why so few genes matched, and which key of the config to change.

    Parameters
    ----------
    match
        What `match_genes(var, vocab)` returned.
    vocab, var
        What it was called with.
    """
    from scmodelforge.genes.vocab import predefined, whole_table

    n_var = max(len(var), 1)
    if (free := match_genes(var, vocab)).n_genes > max(2 * match.n_genes, 0.1 * n_var):
        return (
            f"{_place(match.column)} matches {match.n_genes:,} genes, but {_place(free.column)} matches "
            f"{free.n_genes:,}: set data.gene_column: {free.column}, or leave it out."
        )
    known = {species: match_genes(var, whole_table(species)) for species in SPECIES}
    species = max(SPECIES, key=lambda name: known[name].n_matched)
    found = known[species]
    kind = "Ensembl ids" if found.kind == "ensembl" else "symbols"
    if found.n_matched < 0.1 * n_var:
        shown = ", ".join(repr(str(name)) for name in match.table.used.head(3))
        return (
            f"The names in {_place(match.column)} ({shown}, …) are neither Ensembl ids nor symbols of human or mouse "
            "genes. Name the var column that holds them with data.gene_column; if the genes are of another "
            "species or of your own, set data.gene_vocab: from_data."
        )
    coding = predefined(f"{species}_protein_coding")
    if vocab.species in SPECIES and vocab.species != species:
        return (
            f"The genes look like {species} ({found.n_matched:,} of {len(var):,} are known {species} {kind}, in "
            f"{_place(found.column)}), but the vocabulary '{vocab.name}' is {vocab.species}: set data.gene_vocab: "
            f"{coding.name}."
        )
    return (
        f"{found.n_matched:,} of {len(var):,} genes are known {species} {kind}, but the vocabulary '{vocab.name}' "
        f"has only {match.n_genes:,} of them (its size is {vocab.n_genes:,}): it is too small or made for other genes. "
        f"Set data.gene_vocab: {coding.name} or from_data."
    )


def _place(column: str) -> str:
    return "var_names" if column == "index" else f"var['{column}']"


def _counts(numbers: pd.Series) -> str:
    """Write "12,000 lncRNA, 300 unknown name", the five largest first."""
    parts = [f"{n:,} {name}" for name, n in numbers.head(5).items()]
    if len(numbers) > 5:
        parts.append(f"{int(numbers[5:].sum()):,} other")
    return ", ".join(parts)


def _candidates(var: pd.DataFrame, column: str | None) -> list[str]:
    if column is None:
        text = [c for c in var.columns if isinstance(c, str) and c != "index" and _is_text(var[c])]
        return ["index", *text]
    if column != "index" and column not in var.columns:
        near = difflib.get_close_matches(column, [*map(str, var.columns), "index"], n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        there = ", ".join(map(str, var.columns)) or "none"
        raise DataError(
            f"data.gene_column is '{column}', but var has no such column.{hint}\n"
            f"Columns of var: {there}; 'index' stands for var_names."
        )
    return [column]


def _is_text(values: pd.Series) -> bool:
    kind = values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype
    return bool(pd.api.types.is_string_dtype(kind) or pd.api.types.is_object_dtype(kind))


# --- the genes that are known ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Names:
    """Unique names, and the row of the reference each stands for, or AMBIGUOUS."""

    names: pd.Index
    rows: np.ndarray

    @classmethod
    def build(cls, names: pd.Series, priority: pd.Series) -> _Names:
        """Index `names` (its index: reference rows); of several genes the one of highest priority has a name."""
        frame = pd.DataFrame({"name": names.to_numpy(), "row": names.index, "priority": priority.loc[names.index]})
        frame = frame[frame.name != ""].drop_duplicates(["name", "row"])
        frame = frame[frame.priority == frame.groupby("name").priority.transform("max")]
        frame.loc[frame.duplicated("name", keep=False), "row"] = AMBIGUOUS
        frame = frame.drop_duplicates("name")
        return cls(pd.Index(frame.name), frame.row.to_numpy())

    def find(self, names: pd.Series) -> np.ndarray:
        """Return the row of each name, -1 if it is not here, AMBIGUOUS if it stands for several."""
        at = self.names.get_indexer(names)
        return np.where(at >= 0, self.rows[at], -1) if len(self.rows) else at


@dataclass(frozen=True, eq=False)
class _Reference:
    """All known genes (`genes`: gene_id, symbol, biotype, previous, vocab_row) and their names."""

    genes: pd.DataFrame
    foreign: pd.Index

    @cached_property
    def ids(self) -> pd.Index:
        return pd.Index(self.genes.gene_id)

    @cached_property
    def priority(self) -> pd.Series:
        """Who has a symbol that several genes bear: vocabulary, then protein coding, then HGNC's choice."""
        genes = self.genes
        return 4 * (genes.vocab_row >= 0) + 2 * (genes.biotype == "protein_coding") + genes.hgnc.astype(int)

    @cached_property
    def earlier(self) -> pd.Series:
        """Earlier symbols, one a row; index: reference rows."""
        previous = self.genes.previous
        return previous[previous != ""].str.split("|", regex=False).explode()

    @cached_property
    def symbols(self) -> _Names:
        return _Names.build(self.genes.symbol, self.priority)

    @cached_property
    def previous(self) -> _Names:
        return _Names.build(self.earlier, self.priority)

    @cached_property
    def mangled(self) -> _Names:
        """Names as R's make.names writes them: other signs become dots, X before a leading digit."""
        return self._changed(lambda names: names.str.replace(r"[^\w.]", ".", regex=True).str.replace(r"^(?=\d)", "X", regex=True))

    @cached_property
    def folded(self) -> _Names:
        return self._changed(lambda names: names.str.upper())

    def _changed(self, change) -> _Names:
        current, earlier = change(self.genes.symbol), change(self.earlier)
        first = _Names.build(current, self.priority)
        second = _Names.build(earlier[~earlier.isin(first.names)], self.priority)
        return _Names(first.names.append(second.names), np.concatenate([first.rows, second.rows]))


@lru_cache(maxsize=8)
def _reference(vocab: GeneVocab) -> _Reference:
    own = pd.DataFrame({"gene_id": vocab.gene_ids, "symbol": vocab.symbols, "biotype": vocab.biotypes})
    own["vocab_row"] = np.arange(len(own))
    present = [s for s in SPECIES if own.gene_id.str.startswith(ID_PREFIX[s]).any()]
    tables = pd.concat([load_table(s) for s in present] or [load_table("human").head(0)], ignore_index=True)
    genes = own.merge(tables[["gene_id", "previous", "hgnc"]], how="left", on="gene_id")
    others = tables[~tables.gene_id.isin(own.gene_id)].assign(vocab_row=-1)
    genes = pd.concat([genes, others], ignore_index=True)
    genes["previous"] = genes.previous.fillna("")
    genes["hgnc"] = genes.hgnc.eq(True)
    foreign = [load_table(s).symbol for s in SPECIES if s not in present] if present else []
    return _Reference(genes, pd.Index(pd.concat(foreign).unique() if foreign else []))


# --- one column -----------------------------------------------------------------------------------


def _match_column(var: pd.DataFrame, column: str, reference: _Reference) -> GeneMatch:
    """Match the names of one column, each distinct name once."""
    raw = var.index.to_series() if column == "index" else var[column]
    used = raw.astype(object).where(raw.notna().to_numpy(), "").astype(str).str.strip().to_numpy()
    at, unique = pd.factorize(used)
    rows, reasons = _recognise(pd.Series(unique, dtype=object), reference)
    genes = reference.genes
    found = rows >= 0
    index = np.where(found, genes.vocab_row.to_numpy()[rows], -1)
    outside = found & (index < 0)
    biotypes = genes.biotype.to_numpy()[rows[outside]]
    reasons[outside] = [f"not in the vocabulary: {biotype or 'unknown biotype'}" for biotype in biotypes]
    table = pd.DataFrame(
        {
            "var_name": var.index.astype(str),
            "used": used,
            "gene_id": np.where(found, genes.gene_id.to_numpy()[rows], "")[at],
            "symbol": np.where(found, genes.symbol.to_numpy()[rows], "")[at],
            "reason": reasons[at],
        }
    )
    gene_index = index[at].astype(np.int32)
    recognised = table.reason[(rows >= 0)[at]] if not (gene_index >= 0).any() else table.reason[gene_index >= 0]
    by_id = (recognised == "Ensembl id").mean() if len(recognised) else 0.0
    return GeneMatch(column, "ensembl" if by_id >= 0.5 else "symbol", gene_index, table)


def _recognise(names: pd.Series, reference: _Reference) -> tuple[np.ndarray, np.ndarray]:
    """Return for each distinct name the row of the reference (negative if none) and the reason."""
    rows = np.full(len(names), -1)
    reasons = np.full(len(names), "unknown name", dtype=object)

    def step(found: np.ndarray, reason: str | np.ndarray) -> None:
        new = (rows == -1) & (found != -1)
        rows[new] = found[new]
        reasons[new] = np.where(found == AMBIGUOUS, "ambiguous symbol", reason)[new]

    ids = names.str.extract(ENSEMBL_ID, expand=False).str.replace(r"^ENSGR", "ENSG0", regex=True)
    step(reference.ids.get_indexer(ids), "Ensembl id")
    step(reference.ids.get_indexer(names), "own name")

    bare = names.str.replace(GENOME_PREFIX, "", regex=True).str.replace(rf"[_|;:]?{ENSEMBL_ID}.*$", "", regex=True)
    repaired = (bare != names).to_numpy()
    step(reference.symbols.find(bare), np.where(repaired, "repaired name", "symbol"))
    step(reference.previous.find(bare), np.where(repaired, "repaired name", "previous symbol"))

    # scanpy and R tell duplicates apart by a number at the end; the first one keeps its name
    base = bare.str.replace(r"[-.]\d+$", "", regex=True)
    base = base.where((base != bare) & base.isin(bare), "")
    step(reference.symbols.find(base), "repaired name")
    step(reference.previous.find(base), "repaired name")

    step(reference.mangled.find(bare), "repaired name")
    # 'Cd3e' is a mouse gene, not a human one in another case
    step(reference.folded.find(bare.str.upper().where(~bare.isin(reference.foreign), "")), "other case")

    lost = rows == -1
    reasons[lost & ids.notna().to_numpy()] = "unknown Ensembl id"
    reasons[lost & (names == "").to_numpy()] = "no name"
    return rows, reasons
