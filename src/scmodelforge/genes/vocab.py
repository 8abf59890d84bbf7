"""`GeneVocab`: which genes a model knows, in which order, and the special tokens before them.

A vocabulary is made once, before training, and travels with the weights; data are aligned to it by gene id,
never the other way round. Token ids: the special tokens first, then the genes in their order, as in both
published Geneformer layouts. Saved as parquet, with all that is not a column in the schema's metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scmodelforge.errors import ConfigError, DataError, ModelError
from scmodelforge.files import atomic_path
from scmodelforge.genes.identifiers import match_species
from scmodelforge.genes.names import clean_ensembl_ids
from scmodelforge.genes.reading import read_gene_table
from scmodelforge.genes.tables import ID_PREFIX, SPECIES, known_genes, load_table

logger = logging.getLogger(__name__)

VOCAB_LAYOUTS: dict[str, tuple[str, ...]] = {
    "geneformer_v2": ("<pad>", "<mask>", "<cls>", "<eos>"),
    "geneformer_v1": ("<pad>", "<mask>"),
    "scgpt": ("<pad>", "<mask>", "<cls>", "<eoc>"),
    "transcriptformer": ("<unknown>", "<pad>", "<cls>", "<eos>", "<rd>", "<cell>", "<mask>"),
}
PREDEFINED = tuple(f"{species}_protein_coding" for species in SPECIES)


@dataclass(frozen=True, eq=False)
class GeneVocab:
    """The genes of a model.

    Attributes
    ----------
    gene_ids
        object (n_genes) of str: Ensembl ids without version, or a file's own names; unique.
    symbols, biotypes
        object (n_genes) of str; "" where unknown.
    species
        "human", "mouse" or "unknown" (other, or mixed).
    medians
        float64 (n_genes): non-zero median of each gene, NaN for a gene that was never seen; or None.
    special_tokens
        Names of the tokens before the genes; `<pad>` and `<mask>` at least.
    name
        What people call it; no part of its identity.
    obs_categories
        obs column → the categories that the model was told of, in the order of their numbers (from 1).
    """

    gene_ids: np.ndarray
    symbols: np.ndarray
    biotypes: np.ndarray
    species: str = "unknown"
    medians: np.ndarray | None = None
    special_tokens: tuple[str, ...] = VOCAB_LAYOUTS["geneformer_v2"]
    name: str = "vocabulary"
    obs_categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `DataError` if genes are missing or doubled, or lengths differ."""
        if not len(self.gene_ids):
            raise DataError(f"The gene vocabulary '{self.name}' is empty; it needs at least one gene.")
        ids = pd.Series(self.gene_ids)
        if (doubled := ids[ids.duplicated()].unique()).size:
            shown = ", ".join(map(str, doubled[:3]))
            raise DataError(
                f"The gene vocabulary '{self.name}' lists {len(doubled):,} gene ids more than once ({shown}"
                f"{', …' if len(doubled) > 3 else ''}); each gene must occur once."
            )
        for what in ("symbols", "biotypes", "medians"):
            values = getattr(self, what)
            if values is not None and len(values) != len(ids):
                raise DataError(
                    f"The gene vocabulary '{self.name}' has {len(ids):,} genes but {len(values):,} {what}."
                )
        if not {"<pad>", "<mask>"} <= set(self.special_tokens):
            raise DataError(
                f"The gene vocabulary '{self.name}' needs the special tokens <pad> and <mask>; it has "
                f"{' '.join(self.special_tokens) or 'none'}."
            )

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.gene_ids)

    @property
    def n_tokens(self) -> int:
        """Number of tokens: special ones and genes."""
        return self.first_gene_token + self.n_genes

    @property
    def first_gene_token(self) -> int:
        """Token id of the first gene."""
        return len(self.special_tokens)

    @property
    def pad_id(self) -> int:
        """Token id of `<pad>`."""
        return self.special_tokens.index("<pad>")

    @property
    def mask_id(self) -> int:
        """Token id of `<mask>`."""
        return self.special_tokens.index("<mask>")

    @property
    def cls_id(self) -> int | None:
        """Token id of `<cls>`, None if there is none."""
        return self.special_tokens.index("<cls>") if "<cls>" in self.special_tokens else None

    @property
    def eos_id(self) -> int | None:
        """Token id of `<eos>`, None if there is none."""
        return self.special_tokens.index("<eos>") if "<eos>" in self.special_tokens else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of gene ids, special tokens and medians: equal if models can be exchanged."""
        content = json.dumps([list(self.gene_ids), list(self.special_tokens)]).encode()
        if self.obs_categories:
            content += json.dumps(list(self.obs_categories.items())).encode()
        if self.medians is not None:
            content += np.where(np.isnan(self.medians), np.nan, self.medians).astype("<f8").tobytes()
        return hashlib.sha256(content).hexdigest()

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {gene: row for row, gene in enumerate(self.gene_ids)}

    def index_of(self) -> dict[str, int]:
        """Return the row of each gene id; treat it as read-only."""
        return self._rows

    def tokens_to_names(self, ids: Iterable[int]) -> list[str]:
        """Return what token ids stand for: special tokens, symbols (gene ids where there is none)."""
        names = np.where(self.symbols == "", self.gene_ids, self.symbols)
        names = np.concatenate([np.array(self.special_tokens, dtype=object), names])
        return list(names[np.asarray(list(ids), dtype=np.int64)])

    def subset(self, rows: np.ndarray) -> GeneVocab:
        """Return a vocabulary of the genes in `rows` (positions or bool mask), in that order."""
        medians = None if self.medians is None else self.medians[rows]
        return replace(
            self,
            gene_ids=self.gene_ids[rows],
            symbols=self.symbols[rows],
            biotypes=self.biotypes[rows],
            medians=medians,
        )

    def with_medians(self, medians: np.ndarray | None) -> GeneVocab:
        """Return the same genes with other medians (float (n_genes), NaN where unknown)."""
        return replace(self, medians=None if medians is None else np.asarray(medians, dtype=np.float64))

    def with_special_tokens(self, special_tokens: Sequence[str]) -> GeneVocab:
        """Return the same genes after other special tokens, such as `VOCAB_LAYOUTS["geneformer_v1"]`."""
        return replace(self, special_tokens=tuple(special_tokens))

    def with_obs_categories(self, categories: Mapping[str, Iterable[str]]) -> GeneVocab:
        """Return the same genes with other categories of obs columns."""
        return replace(self, obs_categories={name: tuple(values) for name, values in categories.items()})

    def to_frame(self) -> pd.DataFrame:
        """Return gene_id, symbol, biotype and, if there are any, median."""
        frame = pd.DataFrame({"gene_id": self.gene_ids, "symbol": self.symbols, "biotype": self.biotypes})
        return frame if self.medians is None else frame.assign(median=self.medians)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as parquet, atomically."""
        metadata = {
            "name": self.name,
            "species": self.species,
            "special_tokens": json.dumps(self.special_tokens),
            "obs_categories": json.dumps(self.obs_categories),
            "fingerprint": self.fingerprint,
        }
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False).replace_schema_metadata(metadata)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> GeneVocab:
        """Read a vocabulary that `save` wrote, or a table (.csv, .tsv, .parquet) of one's own.

        A table needs the column `gene_id`, and may have `symbol`, `biotype` and `median`; missing symbols and
        biotypes are taken from the tables of human and mouse where they know the id.

        Raises
        ------
        DataError
            If the file is missing, unreadable or damaged, lacks `gene_id`, or holds no or doubled genes.
        """
        path = Path(path)
        frame, metadata = read_gene_table(path, "gene vocabulary")
        ids = frame["gene_id"].to_numpy(object)
        known = known_genes().reindex(ids)
        text = {
            name: np.where(column.isna(), "", column.astype(str)).astype(object)
            for name in ("symbol", "biotype")
            for column in [frame[name] if name in frame else known[name]]
        }
        special = metadata.get("special_tokens")
        vocab = cls(
            gene_ids=ids,
            symbols=text["symbol"],
            biotypes=text["biotype"],
            species=metadata.get("species") or species_of(ids),
            medians=frame["median"].to_numpy() if "median" in frame else None,
            special_tokens=tuple(json.loads(special)) if special else VOCAB_LAYOUTS["geneformer_v2"],
            name=metadata.get("name", path.stem),
            obs_categories=_categories(json.loads(metadata.get("obs_categories", "{}"))),
        )
        if metadata.get("fingerprint", vocab.fingerprint) != vocab.fingerprint:
            raise DataError(
                f"The gene vocabulary '{path}' was changed after it was saved: its content does not have the "
                "fingerprint that is written in it. Take the original file, or write the genes as .tsv."
            )
        return vocab

    def to_plain(self) -> dict[str, Any]:
        """Return the vocabulary as plain Python lists, strings and numbers, for checkpoints."""
        return {
            "gene_ids": list(map(str, self.gene_ids)),
            "symbols": list(map(str, self.symbols)),
            "biotypes": list(map(str, self.biotypes)),
            "species": self.species,
            "medians": None if self.medians is None else self.medians.tolist(),
            "special_tokens": list(self.special_tokens),
            "name": self.name,
            "obs_categories": {name: list(values) for name, values in self.obs_categories.items()},
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> GeneVocab:
        """Return the vocabulary that `to_plain` described.

        Raises
        ------
        ModelError
            If something is missing, or the content does not have its fingerprint.
        """
        wanted = [part.name for part in fields(cls)] + ["fingerprint"]
        if missing := [key for key in wanted if key not in plain]:
            raise ModelError(
                f"The gene vocabulary of this checkpoint lacks {', '.join(missing)}; it is damaged."
            )
        vocab = cls(
            gene_ids=np.array(plain["gene_ids"], dtype=object),
            symbols=np.array(plain["symbols"], dtype=object),
            biotypes=np.array(plain["biotypes"], dtype=object),
            species=plain["species"],
            medians=None if plain["medians"] is None else np.array(plain["medians"], dtype=np.float64),
            special_tokens=tuple(plain["special_tokens"]),
            name=plain["name"],
            obs_categories=_categories(plain["obs_categories"]),
        )
        if vocab.fingerprint != plain["fingerprint"]:
            raise ModelError(
                "The gene vocabulary of this checkpoint does not have the fingerprint that is written in it; "
                "the checkpoint is damaged."
            )
        return vocab


def _categories(plain: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(values) for name, values in plain.items()}


@cache
def predefined(name: str) -> GeneVocab:
    """Return "human_protein_coding" or "mouse_protein_coding": GENCODE's coding genes, ascending by id.

    Raises
    ------
    ConfigError
        If there is no vocabulary of that name.
    """
    if name not in PREDEFINED:
        raise ConfigError(_unknown(name))
    species = name.removesuffix("_protein_coding")
    table = load_table(species)
    ids, symbols, biotypes = (
        table.loc[table.biotype == "protein_coding", column].to_numpy(object)
        for column in ("gene_id", "symbol", "biotype")
    )
    return GeneVocab(ids, symbols, biotypes, species=species, name=name)


def resolve_vocab(
    gene_vocab: str, var_frames: Sequence[pd.DataFrame] = (), column: str | None = None
) -> GeneVocab:
    """Return the vocabulary that `data.gene_vocab` names.

    Parameters
    ----------
    gene_vocab
        A predefined name, "from_data", or the path of a table that `GeneVocab.load` reads.
    var_frames
        The var of each file, for "from_data": the union of their genes, ascending by id. A gene that the
        human or mouse table knows gets its Ensembl id, any other keeps its name.
    column
        `data.gene_column`: the column of var to read, by default found for each file.

    Raises
    ------
    ConfigError
        If there is neither a vocabulary nor a file of that name.
    DataError
        If the file cannot be used.
    """
    if gene_vocab in PREDEFINED:
        return predefined(gene_vocab)
    if gene_vocab == "from_data":
        return _from_data(var_frames, column)
    if not Path(gene_vocab).is_file():
        raise ConfigError(_unknown(gene_vocab))
    return GeneVocab.load(gene_vocab)


def read_medians(path: str | Path, vocab: GeneVocab) -> np.ndarray:
    """Read non-zero medians of genes from a table (.csv, .tsv or .parquet; columns gene_id and median).

    Returns
    -------
    float64 (n_genes): in the order of `vocab`, NaN where the table has none (counted and logged).

    Raises
    ------
    DataError
        If the file is missing or unreadable, lacks a column, has doubled ids, a median that is not positive
        and finite, or no gene of the vocabulary.
    """
    frame, _ = read_gene_table(Path(path), "table of gene medians")
    if "median" not in frame:
        raise DataError(f"'{path}' has no column 'median'; it has: {', '.join(map(str, frame.columns))}.")
    ids = pd.Index(frame["gene_id"])
    if len(doubled := ids[ids.duplicated()]):
        raise DataError(f"'{path}' lists {len(doubled):,} gene ids more than once (first: {doubled[0]}).")
    rows = pd.Index(vocab.gene_ids).get_indexer(ids)
    if not (rows >= 0).any():
        raise DataError(
            f"None of the {len(ids):,} genes in '{path}' is in the vocabulary '{vocab.name}' (the table has "
            f"{ids[0]}, …; the vocabulary {vocab.gene_ids[0]}, …).\n"
            "Set data.gene_vocab to the vocabulary that the medians belong to."
        )
    medians = np.full(vocab.n_genes, np.nan)
    medians[rows[rows >= 0]] = frame["median"].to_numpy()[rows >= 0]
    if n_without := int(np.isnan(medians).sum()):
        logger.warning(f"{path} has no median for {n_without:,} of {vocab.n_genes:,} vocabulary genes")
    if n_outside := int((rows < 0).sum()):
        logger.info(f"{path}: {n_outside:,} genes are not in the vocabulary '{vocab.name}'")
    return medians


def _from_data(var_frames: Sequence[pd.DataFrame], column: str | None) -> GeneVocab:
    """Union of the genes of several var, canonical where the tables know them."""
    if not var_frames:
        raise ConfigError(
            "data.gene_vocab: from_data takes the genes from the data, but data.paths is empty."
        )
    parts = []
    for var in {id(var): var for var in var_frames}.values():  # files with the same genes share a frame
        match = max((match_species(var, species, column) for species in SPECIES), key=lambda m: m.n_genes)
        genes, known = match.table, match.gene_index >= 0
        own = clean_ensembl_ids(genes.used)
        genes = pd.DataFrame(
            {"gene_id": genes.gene_id.where(known, own), "symbol": genes.symbol.where(known, own)}
        )
        parts.append(genes[genes.gene_id != ""])
    union = pd.concat(parts).drop_duplicates("gene_id").sort_values("gene_id")
    ids = union.gene_id.to_numpy(object)
    biotypes = known_genes().biotype.reindex(ids)
    vocab = GeneVocab(
        ids,
        union.symbol.to_numpy(object),
        biotypes.fillna("").to_numpy(object),
        species_of(ids),
        name="from_data",
    )
    n_known, n_files = int(biotypes.notna().sum()), len(var_frames)
    files = f"{n_files} file{'s' * (n_files > 1)}"
    logger.info(f"from_data: {vocab.n_genes:,} genes of {files}, {n_known:,} known ({vocab.species})")
    return vocab


def species_of(ids: np.ndarray) -> str:
    """Species of Ensembl ids; "unknown" if there are none of human and mouse, or of both."""
    text = pd.Series(ids)
    present = [s for s in SPECIES if text.str.startswith(ID_PREFIX[s]).any()]
    return present[0] if len(present) == 1 else "unknown"


def _unknown(name: str) -> str:
    return (
        f"data.gene_vocab is '{name}', which is neither a known vocabulary nor an existing file.\n"
        f"Use {', '.join(PREDEFINED)}, from_data, or the path of a table (.parquet, .tsv, .csv) with a "
        "column gene_id."
    )
