"""`CellStore`: many matrices as one, in the gene space of a vocabulary.

Cells are numbered through all files. What is read is checked, and mapped to the vocabulary one batch at a
time: genes outside are dropped after they counted for the library size, several columns of one gene summed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from scmodelforge.config import Config, DataConfig
from scmodelforge.data import state
from scmodelforge.data.batch import CellBatch, MeasuredGenes
from scmodelforge.data.h5ad import CACHE_BYTES
from scmodelforge.data.kernels import cells_to_vocabulary
from scmodelforge.data.matrix import Matrix, Rows
from scmodelforge.data.open_files import MOST_OPEN
from scmodelforge.data.sources import Source, open_matrix, sources_of
from scmodelforge.data.species import species_of_matrices
from scmodelforge.data.training_cells import CellRecorder
from scmodelforge.errors import DataError
from scmodelforge.genes.identifiers import GeneMatch, likely_cause, match_genes, match_species
from scmodelforge.genes.tables import SPECIES
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab, resolve_vocab

log = logging.getLogger(__name__)

FEW = 0.5  # share of counts on vocabulary genes below which something is probably wrong
DESCRIBED = 20  # files of which `describe` writes a line
ALL_CACHES_BYTES = 512 * 2**20  # shared by the chunk caches of all files


class CellStore:
    """Cells of one or many matrices; made by `open_store`.

    Attributes
    ----------
    vocab
        The vocabulary that `CellBatch.gene_ids` point into.
    matrices, matches
        The matrix of each file, and how its genes meet the vocabulary.
    files
        Their names.
    measured_sets
        bool (n_sets, n_genes): which genes of the vocabulary the files measured; files with the same genes share a
        row. None if all files measured all of them.
    set_of_file
        int64 (n_files): its row.
    obs_categories
        Categories of the obs columns that a batch carries, as in `GeneVocab.obs_categories`.
    offsets
        int64 (n_files + 1): file `i` holds the cells `offsets[i]:offsets[i + 1]`.
    n_cells
        Number of cells.
    recorder
        Is shown every batch that is read, where training records its cells.
    """

    def __init__(self, matrices: Sequence[Matrix], matches: Sequence[GeneMatch], vocab: GeneVocab) -> None:
        self.vocab = vocab
        self.obs_categories = vocab.obs_categories
        self.matrices, self.matches = list(matrices), list(matches)
        self.files = [matrix.name for matrix in self.matrices]
        self.offsets = np.cumsum([0, *(matrix.n_cells for matrix in self.matrices)])
        self.n_cells = int(self.offsets[-1])
        sets, self.set_of_file = _measured_sets(self.matches, vocab.n_genes)
        self.measured_sets = None if sets.all() else sets
        self.sampled: list[state.Sample] = []
        self.recorder: CellRecorder | None = None

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Annotations of all cells under their own names: the union of columns, NaN where a file has none."""
        frames = [matrix.obs for matrix in self.matrices]
        return frames[0] if len(frames) == 1 else pd.concat(frames, join="outer")

    @cached_property
    def obs_codes(self) -> np.ndarray | None:
        """int64 (n_cells, n_columns): see `CellBatch.obs`; a column that no file has is unknown everywhere."""
        if not self.obs_categories:
            return None
        codes = np.zeros((self.n_cells, len(self.obs_categories)), dtype=np.int64)
        for place, (column, categories) in enumerate(self.obs_categories.items()):
            if column not in self.obs:
                log.warning("No obs column '%s': the model is told 'unknown' for every cell.", column)
                continue
            codes[:, place] = pd.Index(categories).get_indexer(pd.Index(self.obs[column].astype(str))) + 1
            if unknown := int((codes[:, place] == 0).sum()):
                log.warning(
                    "obs['%s']: %s of %s cells have a category that the model does not know; it is told 'unknown'.",
                    column,
                    f"{unknown:,}",
                    f"{self.n_cells:,}",
                )
        return codes

    def read(self, rows: np.ndarray) -> CellBatch:
        """Read cells in the order given; callable from several threads.

        Parameters
        ----------
        rows
            int64 in [0, n_cells), in any order, repeats allowed.

        Raises
        ------
        DataError
            If a count is negative, NaN or infinite (file, cell and gene are named), or a file is damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.n_cells:
            raise IndexError(f"rows must lie in [0, {self.n_cells})")
        file_of_row = np.searchsorted(self.offsets, rows, side="right") - 1
        order = np.argsort(file_of_row, kind="stable")
        by_file = file_of_row[order]
        local = rows[order] - self.offsets[by_file]
        starts = np.flatnonzero(np.diff(by_file, prepend=-1))
        ends = [*starts[1:].tolist(), len(rows)]
        parts = [
            self._read_file(int(by_file[start]), local[start:end])
            for start, end in zip(starts.tolist(), ends, strict=False)  # without rows there is no start
        ]
        if len(parts) == 1:
            block, library_size = parts[0]
        else:
            back = np.argsort(order)
            block = _concatenate([part for part, _ in parts]).take(back)
            library_size = np.concatenate([np.zeros(0), *(library for _, library in parts)])[back]
        obs = None if self.obs_codes is None else self.obs_codes[rows]
        measured = None
        if self.measured_sets is not None:
            measured = MeasuredGenes(self.measured_sets, self.set_of_file[file_of_row])
        cells = CellBatch(
            block.indptr, block.indices, block.data, library_size.astype(np.float32), rows, obs, measured
        )
        if self.recorder is not None:
            self.recorder.record(cells)
        return cells

    def _read_file(self, file: int, rows: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Return vocabulary rows and counts of cells of one file, and their library sizes (float64)."""
        matrix = self.matrices[file]
        mapped = to_vocabulary(*matrix.arrays(rows), self.matches[file].gene_index)
        if mapped is None:
            state.require_finite(matrix, rows, matrix.read(rows))  # says what is wrong where
            raise AssertionError(f"{matrix.name}: nothing is wrong with rows that were refused")
        if matrix.library_size is not None:
            return mapped[0], matrix.library_size[rows]
        return mapped

    @property
    def shuffle_buffer(self) -> int | None:
        """Cells to shuffle at a time if a matrix cannot be read at random: the largest wish; None if all can."""
        return max((m.shuffle_buffer for m in self.matrices if m.shuffle_buffer), default=None)

    @property
    def block_cells(self) -> int | None:
        """Neighbouring cells that a slow matrix reads at once: the largest number; None if none is slow."""
        return max((m.block_cells for m in self.matrices if m.block_cells), default=None)

    def prefetch(self, rows: np.ndarray) -> None:
        """Say which rows (int64) will be read soon; returns at once, and a matrix may fetch them in the background."""
        file_of_row = np.searchsorted(self.offsets, rows, side="right") - 1
        for file in np.unique(file_of_row):
            self.matrices[file].prefetch(rows[file_of_row == file] - self.offsets[file])

    def gene_report(self) -> pd.DataFrame:
        """Return what became of each gene of each file: `file` and the columns of `GeneMatch.table`.

        Files that have the same genes are listed once, under the name of the first.
        """
        alike: dict[int, list[str]] = {}
        for file, match in zip(self.files, self.matches, strict=True):
            alike.setdefault(id(match), []).append(file)
        tables = []
        for match in {id(match): match for match in self.matches}.values():
            first, *more = alike[id(match)]
            name = f"{first} and {len(more):,} more with the same genes" if more else first
            tables.append(match.table.assign(file=name))
        report = pd.concat(tables, ignore_index=True)
        return report[["file", *report.columns.drop("file")]]

    @property
    def matched_share(self) -> float:
        """Share of the genes of all files that the vocabulary has; files with the same genes count once."""
        distinct = list({id(match): match for match in self.matches}.values())
        return sum(match.n_matched for match in distinct) / sum(match.n_columns for match in distinct)

    @property
    def measured_share(self) -> float:
        """Share of the vocabulary's genes that at least one file measured."""
        found = np.logical_or.reduce([match.measured(self.vocab.n_genes) for match in self.matches])
        return float(found.mean())

    def describe(self) -> list[str]:
        """Return a line for each file: its size, what it holds, and how much of it the vocabulary covers."""
        lines = []
        for matrix, match, sample in zip(
            self.matrices[:DESCRIBED], self.matches[:DESCRIBED], self.sampled[:DESCRIBED], strict=True
        ):
            line = (
                f"{matrix.name}: {matrix.n_cells:,} cells × {matrix.n_genes:,} genes, {matrix.place} holds "
                f"{sample.state.detail}; {match.summary()}; {sample.share:.1%} of the counts"
            )
            if missing := self.vocab.n_genes - match.n_genes:
                line += (
                    f"; {missing:,} of the {self.vocab.n_genes:,} genes of the vocabulary were not measured"
                )
            lines.append(line)
        if more := self.matrices[DESCRIBED:]:
            lines.append(f"… and {len(more):,} more files with {sum(m.n_cells for m in more):,} cells")
        return lines

    def close(self) -> None:
        """Close all files; the store cannot be read after that."""
        for matrix in self.matrices:
            matrix.close()


def open_store(
    sources: Sequence[Source],
    vocab: GeneVocab,
    config: DataConfig,
    require_counts: bool = True,
    selected_genes: bool = False,
    of_model: bool = False,
) -> CellStore:
    """Open matrices as one store, and refuse early what cannot be trained on.

    Parameters
    ----------
    sources
        Paths of .h5ad files, or AnnData objects; their genes may differ.
    vocab
        The vocabulary to align to.
    config
        `layer`, `gene_column`, `species` and `min_gene_overlap` are read.
    require_counts
        Refuse matrices that do not look like raw counts.
    selected_genes
        The vocabulary is a selection of variable genes, which hold a small share of the counts: ask that
        `min_gene_overlap` of the counts is on known genes of its species instead, or, of a species without
        a table, that so many of its genes are in the file.
    of_model
        The vocabulary is that of a trained model, so no message advises another one.

    Raises
    ------
    ConfigError
        If `data.species` names a file that is not there.
    DataError
        If a file cannot be read, does not hold raw counts (as a sample of its cells shows), or less than
        `min_gene_overlap` of its counts is on genes of the vocabulary.
    """
    if not sources:
        raise DataError("There are no cells: no data file is given (data.paths).")
    cache = min(CACHE_BYTES, ALL_CACHES_BYTES // (2 * min(len(sources), MOST_OPEN)))
    n_sampled = max(state.FEWEST_CELLS, min(state.SAMPLE_CELLS, state.SAMPLE_CELLS_OF_ALL // len(sources)))
    matrices, sampled = [open_matrix(source, config.layer, cache) for source in sources], []
    known_var: dict[
        tuple[int, str | None], GeneMatch
    ] = {}  # by the frame, which files with the same genes share
    matches = []
    for matrix, species in zip(matrices, species_of_matrices(matrices, config), strict=True):
        shared = id(matrix.var), species
        match = known_var.get(shared) or match_genes(matrix.var, vocab, config.gene_column, species)
        known_var[shared] = match
        matches.append(match)
        sample = state.sample_matrix(matrix, match, n_sampled)
        if require_counts:
            state.require_counts(matrix, sample.state)
        share, what = sample.share, "of its counts are on genes of the vocabulary"
        if selected_genes and match.n_genes and vocab.species in SPECIES:
            known = match_species(matrix.var, match.species or vocab.species, config.gene_column)
            share = state.sample_matrix(matrix, known, n_sampled).share
        elif selected_genes and match.n_genes:
            share, what = match.n_genes / vocab.n_genes, "is in it of the genes of the vocabulary"
        if share < config.min_gene_overlap:
            raise DataError(
                f"'{matrix.name}': only {share:.1%} {what} '{vocab.name}'; "
                f"data.min_gene_overlap asks for {config.min_gene_overlap:.1%}.\n"
                f"It {match.summary()}.\n{likely_cause(match, vocab, matrix.var, of_model)}"
            )
        warn_if_few(matrix, match, vocab, share, of_model)
        sampled.append(sample)
    store = CellStore(matrices, matches, vocab)
    store.sampled = sampled
    return store


def vocabulary_of(config: Config, sources: Sequence[Source] | None = None) -> GeneVocab:
    """The vocabulary that a config names, before genes are selected in it; `sources`: instead of the config's."""
    sources = sources_of(config.data) if sources is None else sources
    # Opening thousands of files takes a while.
    needed = sources if config.data.gene_vocab == "from_data" else ()
    matrices = [open_matrix(source, config.data.layer) for source in needed]
    species = species_of_matrices(matrices, config.data) if matrices else ()
    var_frames = [matrix.var for matrix in matrices]
    vocab = resolve_vocab(config.data.gene_vocab, var_frames, config.data.gene_column, species)
    return vocab.with_special_tokens(VOCAB_LAYOUTS[config.tokenizer.vocab_layout])


def missing_obs_column(obs: pd.DataFrame, columns: Sequence[str]) -> str:
    """Say which of the obs columns that a model reads is not there; "" if all are."""
    for column in columns:
        if column not in obs:
            there = ", ".join(map(str, obs.columns[:20])) or "none"
            return (
                f"there is no obs column '{column}', which the model is to read; there are: {there}. Correct "
                "tokenizer.obs_tokens (or model.objective.batch_key), or leave the column out: obs_tokens: []."
            )
    return ""


def obs_categories(obs: pd.DataFrame, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The categories of obs columns, ascending.

    Raises
    ------
    DataError
        If there is no such column.
    """
    if problem := missing_obs_column(obs, columns):
        raise DataError(problem[0].upper() + problem[1:])
    return {column: tuple(sorted(obs[column].dropna().astype(str).unique())) for column in columns}


def warn_if_few(
    matrix: Matrix, match: GeneMatch, vocab: GeneVocab, share: float, of_model: bool = False
) -> None:
    """Warn, with the likely cause, where much of a file's counts is outside the vocabulary."""
    if share < FEW:
        log.warning(
            "'%s': only %s of the counts are on genes of the vocabulary '%s'. %s",
            matrix.name,
            f"{share:.1%}",
            vocab.name,
            likely_cause(match, vocab, matrix.var, of_model),
        )


def to_vocabulary(held: Rows, places: np.ndarray, gene_index: np.ndarray) -> tuple[Rows, np.ndarray] | None:
    """Map rows of a file to vocabulary genes: others dropped, duplicates summed, genes ascending.

    Parameters
    ----------
    held, places
        Arrays, and int64 (n) the rows in them, as `Matrix.arrays` returns them.
    gene_index
        `GeneMatch.gene_index`: the vocabulary gene of each column, -1 for none.

    Returns
    -------
    Rows of n cells (int64, int32, float32), and their library sizes float64 (n) over all columns; None if a column
    lies outside of the file's genes, or a count is negative or not finite.
    """
    n_entries = int((held.indptr[places + 1] - held.indptr[places]).sum())
    indptr, library_size = np.empty(len(places) + 1, np.int64), np.empty(len(places))
    genes, counts = np.empty(n_entries, np.int32), np.empty(n_entries, np.float32)
    unsigned = held.data.dtype.kind in "bu"
    if not cells_to_vocabulary(*held, places, gene_index, unsigned, indptr, genes, counts, library_size):
        return None
    return Rows(indptr, genes[: indptr[-1]], counts[: indptr[-1]]), library_size


def _measured_sets(matches: Sequence[GeneMatch], n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sets of measured genes, bool (n_sets, n_genes), and that of each file, int64 (n_files)."""
    place: dict[bytes, int] = {}
    of_file = [place.setdefault(match.measured(n_genes).tobytes(), len(place)) for match in matches]
    sets = np.frombuffer(b"".join(place), dtype=bool).reshape(len(place), n_genes)
    return sets, np.array(of_file, dtype=np.int64)


def _concatenate(parts: Sequence[Rows]) -> Rows:
    if not parts:
        return Rows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(
        indptr,
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.data for part in parts]),
    )
