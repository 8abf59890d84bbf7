"""Which gene of the vocabulary is each row of `var`? Ensembl ids and symbols, as files really spell them.

Every name is first recognised among all known genes (`names.py` says how), then looked up in the vocabulary:
so a gene that is left out is told from a name that nobody knows.

One column is chosen for the file; rows that it leaves unknown are looked up in the file's other columns of
names, since Ensembl retires ids (CCL5 and SOD2 had others in 2014) and some tools leave them blank.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scmodelforge.errors import DataError
from scmodelforge.genes.names import ENSEMBL_ID, Reference, recognise, reference_of, reference_of_species
from scmodelforge.genes.orthologs import orthologs_of
from scmodelforge.genes.tables import SPECIES, known_genes

if TYPE_CHECKING:
    from scmodelforge.genes.vocab import GeneVocab

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
MEASURED = "scmodelforge_measured"  # var column of shards: whether the source measured the gene
NOT_MEASURED = "not measured"
TRAINED = "A trained model keeps its genes: take another one, or add genes in train or finetune (data.extend_vocab)."
NEARLY_ALL = 0.95  # Ensembl ids are taken when they find this share of what the best column finds


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of one file meet a vocabulary.

    Attributes
    ----------
    column
        The column of var that was chosen; "index" for var_names.
    kind
        "ensembl" or "symbol": what this column holds.
    gene_index
        int32 (n_var): row of the vocabulary, or -1.
    table
        One row per var entry: `var_name`, `used` (the name that was looked up), `gene_id` and `symbol` of the
        gene recognised ("" if none), `ortholog` (id of the gene of the vocabulary's species that stands for
        it, "" if it needs or has none), and `reason`. Reasons of a match: "Ensembl id", "symbol", "previous
        symbol", "repaired name", "other case", "own name" (the vocabulary's own, neither of these). Reasons
        against: "not in the vocabulary: BIOTYPE", "no one-to-one ortholog", "ambiguous symbol", "unknown
        Ensembl id", "unknown name", "no name", and "not measured" for a gene that a shard has a column for and
        its source had not.
    species
        Where the genes are of another species than the vocabulary, and meet it through orthologs: that
        species; else None.
    """

    column: str
    kind: str
    gene_index: np.ndarray
    table: pd.DataFrame
    species: str | None = None

    @property
    def n_columns(self) -> int:
        """Number of var entries that were measured."""
        return int((self.table.reason != NOT_MEASURED).sum())

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

    def measured(self, n_genes: int) -> np.ndarray:
        """bool (n_genes): the genes of the vocabulary that some var entry is; of the others the file says nothing."""
        genes = np.zeros(n_genes, dtype=bool)
        genes[self.gene_index[self.gene_index >= 0]] = True
        return genes

    def summary(self) -> str:
        """Return one readable line: what matched, how, and why the rest did not."""
        hit = self.gene_index >= 0
        how = self.table.reason[hit].value_counts()
        against = self.table.reason[~hit].str.removeprefix("not in the vocabulary: ").value_counts()
        against = against.drop(NOT_MEASURED, errors="ignore")
        main = "Ensembl id" if self.kind == "ensembl" else "symbol"
        text = f"matched {self.n_matched:,} of {self.n_columns:,} genes by {main} in {_place(self.column)}"
        if self.species:
            text += f" through one-to-one orthologs of {self.species}"
        if len(extra := how.drop(main, errors="ignore")):
            text += f" ({_counts(extra)})"
        if len(against):
            text += f"; {int(against.sum()):,} not: {_counts(against)}"
        if n_others := len(hit) - self.n_columns:
            text += f"; {n_others:,} genes have a column and were not measured"
        if self.n_duplicates:
            text += f"; {self.n_duplicates:,} share a gene with another row and are summed"
        return text


def match_genes(
    var: pd.DataFrame, vocab: GeneVocab, column: str | None = None, species: str | None = None
) -> GeneMatch:
    """Find the vocabulary gene of each row of `var`.

    Parameters
    ----------
    var
        The genes of a file, as in `AnnData.var`.
    vocab
        The vocabulary to match with.
    column
        Column with Ensembl ids or symbols, "index" for var_names; nothing else is read then. By default the
        index and all text columns are tried: the one that finds most vocabulary genes is taken, or Ensembl
        ids if they find nearly as many, and names that it leaves unknown are looked up in the others.
    species
        Whose genes these are, "human" or "mouse". If it is not the vocabulary's, they are recognised among all
        genes of their own species, then looked up in the vocabulary, as they are or by one-to-one orthologs.
        None: the vocabulary's.

    Raises
    ------
    DataError
        If `column` does not exist, or a shard does not say which genes were measured.
    """
    if species is None or species == vocab.species:
        return _match_own_ids(var, vocab, column) or _match(var, reference_of(vocab), column)
    return _through_orthologs(match_species(var, species, column), vocab, species)


def match_species(var: pd.DataFrame, species: str, column: str | None = None) -> GeneMatch:
    """Find each row of `var` among all genes of `load_table(species)`, as `match_genes` does."""
    return _match(var, reference_of_species(species), column)


def _match_own_ids(var: pd.DataFrame, vocab: GeneVocab, column: str | None) -> GeneMatch | None:
    """The match of a file whose var_names are Ensembl ids of the vocabulary, as those of shards; None for any other.

    It is what the long way finds, without the gene tables and their indexes (100 MB).
    """
    if column not in (None, "index") or not len(var):
        return None
    names = pd.Series(var.index.astype(str))
    gene_index = pd.Index(vocab.gene_ids).get_indexer(pd.Index(names)).astype(np.int32)
    if (gene_index < 0).any() or not names.str.fullmatch(ENSEMBL_ID).all():
        return None
    measured, ids = measured_columns(var), names.to_numpy(object)
    table = pd.DataFrame(
        {
            "var_name": ids,
            "used": ids,
            "gene_id": ids,
            "symbol": vocab.symbols[gene_index],
            "ortholog": "",
            "reason": np.where(measured, "Ensembl id", NOT_MEASURED).astype(object),
        }
    )
    return GeneMatch("index", "ensembl", np.where(measured, gene_index, -1).astype(np.int32), table)


def _through_orthologs(match: GeneMatch, vocab: GeneVocab, species: str) -> GeneMatch:
    """`match`, which is to the genes of `species`, carried over to a vocabulary."""
    table, in_vocab = match.table, pd.Index(vocab.gene_ids)
    ids = table.gene_id.where(table.reason != NOT_MEASURED, "").to_numpy(object)
    own = in_vocab.get_indexer(pd.Index(ids))  # a vocabulary may have genes of both species
    orthologs = np.where(own >= 0, "", orthologs_of(ids, species))
    gene_index = np.where(own >= 0, own, in_vocab.get_indexer(pd.Index(orthologs))).astype(np.int32)
    reasons = table.reason.to_numpy(object).copy()
    reasons[(ids != "") & (orthologs == "") & (own < 0)] = "no one-to-one ortholog"
    outside = (orthologs != "") & (gene_index < 0)
    reasons[outside] = "not in the vocabulary: " + known_genes().biotype.loc[orthologs[outside]].to_numpy()
    table = table.assign(ortholog=orthologs, reason=reasons)
    return replace(match, gene_index=gene_index, table=table, species=species)


def likely_cause(match: GeneMatch, vocab: GeneVocab, var: pd.DataFrame, of_model: bool = False) -> str:
    """Say in a sentence or two why so few genes matched, and which key of the config to change.

    Parameters
    ----------
    match
        What `match_genes(var, vocab)` returned.
    vocab, var
        What it was called with.
    of_model
        The vocabulary is that of a trained model, which keeps it.
    """
    var = var[measured_columns(var)]
    if (free := match_genes(var, vocab, species=match.species)).n_genes > max(
        2 * match.n_genes, 0.1 * len(var)
    ):
        return (
            f"{_place(match.column)} matches {match.n_genes:,} genes, but {_place(free.column)} matches "
            f"{free.n_genes:,}: set data.gene_column: {free.column}, or leave it out."
        )
    known = {species: match_species(var, species) for species in SPECIES}
    species = max(SPECIES, key=lambda name: known[name].n_genes)
    found = known[species]
    if found.n_genes < 0.1 * len(var):
        shown = ", ".join(repr(str(name)) for name in match.table.used.head(3))
        return (
            f"The names in {_place(match.column)} ({shown}, …) are neither Ensembl ids nor symbols of human "
            "or mouse genes. Name the var column that holds them with data.gene_column; if the genes are of "
            "another species or your own, "
            + (f"this model does not know them. {TRAINED}" if of_model else "set data.gene_vocab: from_data.")
        )
    kind = "Ensembl ids" if found.kind == "ensembl" else "symbols"
    n_known, by = f"{found.n_matched:,} of {len(var):,}", f"by {kind} in {_place(found.column)}"
    if match.species and match.species != species:
        return f"{n_known} genes are known {species} genes ({by}); data.species says {match.species}: correct it."
    if not match.species and vocab.species in SPECIES and vocab.species != species:
        return (
            f"The genes look like {species} ({n_known} are known {species} genes, {by}), but the vocabulary "
            f"'{vocab.name}' is {vocab.species}: "
            + (
                f"keep the {vocab.species} genes of the model"
                if of_model
                else f"set data.gene_vocab: {species}_protein_coding. Or keep the {vocab.species} genes, as a trained "
                "model must,"
            )
            + f" and set data.species: {species}, so that one-to-one orthologs stand for them."
        )
    carried = match.species and vocab.species in SPECIES
    return (
        f"{n_known} genes are known {species} genes ({by}), but the vocabulary '{vocab.name}' has only "
        f"{match.n_genes:,} of {'their orthologs' if carried else 'them'}: with {vocab.n_genes:,} genes it is too "
        "small, or made for other data. "
        + (
            TRAINED
            if of_model
            else f"Set data.gene_vocab: {vocab.species if carried else species}_protein_coding or from_data."
        )
    )


def measured_columns(var: pd.DataFrame) -> np.ndarray:
    """bool (n_var): the genes that were measured; all, unless `var` is that of a shard and says otherwise.

    Raises
    ------
    DataError
        If it says so in other words than true and false.
    """
    if MEASURED not in var:
        return np.ones(len(var), dtype=bool)
    if not pd.api.types.is_bool_dtype(var[MEASURED]) or var[MEASURED].isna().any():
        raise DataError(
            f"var['{MEASURED}'] says which genes of a shard were measured, but does not hold true and false alone.\n"
            "Write the shard anew; or, if all genes were measured, remove the column."
        )
    return var[MEASURED].to_numpy(dtype=bool)


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


# --- the columns of one file ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """What the names of one column are: for each row of var the reference row (or negative) and why."""

    name: str
    used: np.ndarray
    rows: np.ndarray
    reasons: np.ndarray
    n_genes: int

    @property
    def kind(self) -> str:
        """ "ensembl" if at least half of the recognised names are such ids, else "symbol"."""
        found = self.reasons[self.rows >= 0]
        return "ensembl" if len(found) and (found == "Ensembl id").mean() >= 0.5 else "symbol"

    @property
    def score(self) -> tuple[int, int, int]:
        """Vocabulary genes, known genes, and how usual the name of the column is."""
        usual = (
            PREFERRED_COLUMNS.index(self.name) if self.name in PREFERRED_COLUMNS else len(PREFERRED_COLUMNS)
        )
        return self.n_genes, len(np.unique(self.rows)), -usual


def _match(var: pd.DataFrame, reference: Reference, column: str | None) -> GeneMatch:
    """Choose the column, fill what it does not know from the others, and look up the vocabulary."""
    columns = [_read_column(var, name, reference) for name in _candidates(var, column)]
    columns.sort(key=lambda c: c.score, reverse=True)
    most = columns[0].n_genes
    chosen = next((c for c in columns if c.kind == "ensembl" and c.n_genes >= NEARLY_ALL * most), columns[0])

    used, rows, reasons = chosen.used.copy(), chosen.rows.copy(), chosen.reasons.copy()
    for other in columns:
        if 2 * other.n_genes >= most:  # a column of names, not of remarks
            fill = (rows < 0) & ((other.rows >= 0) | (used == ""))
            used[fill], rows[fill], reasons[fill] = other.used[fill], other.rows[fill], other.reasons[fill]

    measured = measured_columns(var)
    genes, found = reference.genes, rows >= 0
    gene_index = np.where(found, genes.vocab_row.to_numpy()[rows], -1).astype(np.int32)
    outside = found & (gene_index < 0)
    biotypes = genes.biotype.to_numpy()[rows[outside]]
    reasons[outside] = [f"not in the vocabulary: {biotype or 'unknown biotype'}" for biotype in biotypes]
    gene_index[~measured], reasons[~measured] = -1, NOT_MEASURED
    table = pd.DataFrame(
        {
            "var_name": var.index.astype(str),
            "used": used,
            "gene_id": np.where(found, genes.gene_id.to_numpy()[rows], ""),
            "symbol": np.where(found, genes.symbol.to_numpy()[rows], ""),
            "ortholog": "",
            "reason": reasons,
        }
    )
    return GeneMatch(chosen.name, chosen.kind, gene_index, table)


def _read_column(var: pd.DataFrame, column: str, reference: Reference) -> _Column:
    """Recognise the names of one column, each distinct name once."""
    raw = var.index.to_series() if column == "index" else var[column]
    used = raw.astype(object).where(raw.notna().to_numpy(), "").astype(str).str.strip().to_numpy(object)
    at, names = pd.factorize(used)
    rows, reasons = recognise(pd.Series(names, dtype=object), reference)
    in_vocab = reference.genes.vocab_row.to_numpy()[rows[rows >= 0]]
    return _Column(column, used, rows[at], reasons[at], len(np.unique(in_vocab[in_vocab >= 0])))
