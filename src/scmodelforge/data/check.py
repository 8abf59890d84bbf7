"""What is in this file, and can we train on it? The report behind `scmodelforge check`.

Every cell is looked at once, in blocks, so memory stays flat; nothing here raises because of what the cells
hold: all problems are collected into one report, with what to do about each.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from scmodelforge.config import DataConfig, TokenizerConfig
from scmodelforge.config_io import Suggestions
from scmodelforge.data.matrix import Matrix
from scmodelforge.data.obs import no_labels
from scmodelforge.data.sources import Source, located, matrix_places, open_matrix
from scmodelforge.data.species import species_of_matrices
from scmodelforge.data.state import layer_settings, locate, matrix_state
from scmodelforge.data.statistics import quantiles
from scmodelforge.data.store import missing_obs_column, to_vocabulary, warn_if_few
from scmodelforge.genes.identifiers import GeneMatch, likely_cause, match_genes
from scmodelforge.genes.vocab import GeneVocab, predefined, resolve_vocab

log = logging.getLogger(__name__)

BLOCK_CELLS = 1024
MAX_CLASSES = 200  # a column with more distinct values is no label
SHOWN_CLASSES = 8
SHOWN_COLUMNS = 20
MISSING = "(missing)"
LABEL_WORDS = ("cell_type", "celltype", "cell_label", "label", "annotation", "cluster", "louvain", "leiden")
GROUP_WORDS = ("donor", "patient", "subject", "individual", "sample", "batch", "library")
BATCH_WORDS = ("batch", "library", "dataset", "sample", "donor", "patient")
SMALL_DATA = 20_000  # cells; below, a small transformer is suggested
SMALL_MODEL = {"hidden_dim": 128, "num_layers": 4, "num_heads": 4}


@dataclass(frozen=True)
class CheckReport:
    """What `check_data` found.

    Attributes
    ----------
    name, n_cells, n_genes, storage
        The matrix that training would read.
    counted
        The place that the figures below are of: the same, or another one of the file if only that holds raw counts.
    states
        Place ("X", "layer 'NAME'", "raw") → what it holds.
    genes
        How its genes meet the vocabulary, in a sentence.
    share
        Share of the counts that is on genes of the vocabulary.
    n_duplicates
        Columns whose gene another column has as well; their counts are summed.
    n_empty, n_without_genes
        Cells without any count, and cells without a count on a gene of the vocabulary.
    n_vocabulary, n_measured
        Genes of the vocabulary, and how many of them the file measured.
    genes_per_cell, library_size
        Quantiles over the cells: vocabulary genes with a count, and counts over all genes.
    n_doubled_names
        Cells whose name (obs_names) another cell has as well.
    columns
        obs columns with few distinct values → cells of each value, "(missing)" for none.
    other_columns
        The other obs columns → what they hold, in words.
    problems
        What stands in the way of training, each with what to do; empty if nothing does.
    suggestions
        Values for a starter config.
    """

    name: str
    n_cells: int
    n_genes: int
    storage: str
    counted: str
    states: dict[str, str]
    genes: str
    share: float
    n_duplicates: int
    n_empty: int
    n_without_genes: int
    n_vocabulary: int
    n_measured: int
    genes_per_cell: dict[str, float]
    library_size: dict[str, float]
    n_doubled_names: int
    columns: dict[str, dict[str, int]]
    other_columns: dict[str, str]
    problems: list[str]
    suggestions: Suggestions

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain types."""
        return asdict(
            replace(self, suggestions=replace(self.suggestions, model=dict(self.suggestions.model)))
        )

    def lines(self, tokenizer: TokenizerConfig | None = None) -> list[str]:
        """Return the report for people; with a tokenizer section also how many tokens its cells become."""
        out = [f"{self.name}: {_cells_text(self.n_cells)} × {self.n_genes:,} genes ({self.storage})"]
        out += [f"  {place}: {state}" for place, state in self.states.items()]
        if self.counted != next(iter(self.states)):
            out += [f"  all that follows is of {self.counted}, where the raw counts are:"]
        out += [f"  genes: {self.genes}", f"  counts on vocabulary genes: {self.share:.1%}"]
        out += [f"  vocabulary genes measured: {self.n_measured:,} of {self.n_vocabulary:,}"]
        out += [f"  vocabulary genes per cell: {_quantile_text(self.genes_per_cell)}"]
        if tokenizer is not None:
            special = tokenizer.prepend_cls + tokenizer.append_eos
            longest = tokenizer.max_genes
            if tokenizer.include_zero_genes and tokenizer.strategy_like != "rank_value":
                n = min(self.n_measured + special, longest)
                out += [f"  tokens per cell, at most {longest:,}: {n:,}, with the genes without a count"]
            else:
                tokens = {name: min(n + special, longest) for name, n in self.genes_per_cell.items()}
                out += [f"  tokens per cell, at most {longest:,}: {_quantile_text(tokens)}"]
        out += [f"  library size (all genes):  {_quantile_text(self.library_size)}"]
        if self.n_empty:
            out.append(f"  {_cells_text(self.n_empty)} without any count")
        if self.n_without_genes > self.n_empty:
            out.append(f"  {_cells_text(self.n_without_genes)} without a count on a gene of the vocabulary")
        if self.n_doubled_names:
            out.append(
                f"  {_cells_text(self.n_doubled_names)} with a name (obs_names) that another cell has too"
            )
        out += [f"  obs['{column}']: {_class_text(counts)}" for column, counts in self.columns.items()]
        if self.other_columns:
            held = [f"{column} ({what})" for column, what in self.other_columns.items()]
            more = f" and {len(held) - SHOWN_COLUMNS} more" if len(held) > SHOWN_COLUMNS else ""
            out.append(f"  other columns of obs: {', '.join(held[:SHOWN_COLUMNS])}{more}")
        if not self.problems:
            return [*out, "Ready to train."]
        return [*out, "Not ready to train:", *(f"  - {problem}" for problem in self.problems)]


def check(source: Source, config: DataConfig | None = None, obs_columns: Sequence[str] = ()) -> CheckReport:
    """Look at every cell of one file or AnnData, with the vocabulary that the config names.

    `obs_columns` are those that the model is to read (`Config.obs_columns`); a missing one is a problem.

    Raises
    ------
    UserError
        If the file cannot be read, or the vocabulary or gene column does not exist.
    """
    config = config or DataConfig()
    source = located(source, config)
    matrix = open_matrix(source, config.layer)
    species = species_of_matrices([matrix], config)
    vocab = resolve_vocab(config.gene_vocab, [matrix.var], config.gene_column, species)
    report = check_data(source, vocab, config)
    if problem := missing_obs_column(matrix.obs, obs_columns):
        report.problems.append(problem)
    return report


def check_data(source: Source, vocab: GeneVocab, config: DataConfig) -> CheckReport:
    """Look at every cell of one file.

    Parameters
    ----------
    source
        Path of an .h5ad file, or an AnnData.
    vocab
        The vocabulary to train with.
    config
        `layer`, `gene_column`, `species` and `min_gene_overlap` are read.

    Raises
    ------
    DataError
        If the file cannot be read, or the layer or gene column does not exist.
    """
    matrix = open_matrix(source, config.layer)
    matrices = [matrix] + [open_matrix(source, p) for p in matrix_places(source) if p != config.layer]
    states = {each.place: matrix_state(each) for each in matrices}
    counted = [each.layer for each in matrices if states[each.place].kind == "counts"]

    best_layer = config.layer if config.layer in counted or not counted else counted[0]
    best = next(each for each in matrices if each.layer == best_layer)
    match = match_genes(best.var, vocab, config.gene_column, species_of_matrices([best], config)[0])
    cells = _full_pass(best, match)
    share = float(cells.inside / cells.library.sum()) if cells.library.sum() > 0 else 0.0
    problems = []
    if config.layer not in counted:
        remedy = "No other place in the file holds raw counts: use it as it was before normalization."
        if counted:
            remedy = f"Raw counts are in the same file: set {layer_settings(counted[:1])}."
        elif states[matrix.place].kind in ("invalid", "empty"):
            remedy = "Mend or remove these cells, or name a layer that holds the counts (data.layer)."
        problems.append(
            f"{matrix.place} does not hold raw counts, but {states[matrix.place].detail}. {remedy}"
        )
    elif cells.n_bad:
        problems.append(
            f"{cells.n_bad:,} values of {matrix.place} are no counts (negative, fractional, NaN, …), the "
            f"first is {cells.first_bad}: mend or remove these cells."
        )
    if share < config.min_gene_overlap:
        problems.append(
            f"only {share:.1%} of the counts are on genes of the vocabulary '{vocab.name}', below "
            f"data.min_gene_overlap ({config.min_gene_overlap:.1%}). {likely_cause(match, vocab, best.var)}"
        )
    else:
        warn_if_few(best, match, vocab, share)
    if matrix.n_cells < 2 and config.split.val_split:
        problems.append(
            "one cell cannot be split into training and validation: give more cells, or set data.split.val_split: 0."
        )
    columns = _columns(matrix.obs)
    _warn_of_no_labels(columns, matrix.name)
    return CheckReport(
        name=matrix.name,
        n_cells=matrix.n_cells,
        n_genes=matrix.n_genes,
        storage=matrix.storage,
        counted=best.place,
        states={place: state.detail for place, state in states.items()},
        genes=match.summary(),
        share=share,
        n_duplicates=match.n_duplicates,
        n_empty=int((cells.library == 0).sum()),
        n_without_genes=int((cells.n_genes == 0).sum()),
        n_vocabulary=vocab.n_genes,
        n_measured=match.n_genes,
        genes_per_cell=quantiles(cells.n_genes),
        library_size=quantiles(cells.library),
        n_doubled_names=int(matrix.obs.index.duplicated(keep=False).sum()),
        columns=columns,
        other_columns={
            str(name): _column_text(matrix.obs[name])
            for name in matrix.obs.columns
            if str(name) not in columns
        },
        problems=problems,
        suggestions=_suggest(matrix, best_layer, columns),
    )


@dataclass(frozen=True)
class _Cells:
    """Over all cells: library sizes, vocabulary genes, counts on these, and values that are no counts."""

    library: np.ndarray
    n_genes: np.ndarray
    inside: float
    n_bad: int
    first_bad: str


def _full_pass(matrix: Matrix, match: GeneMatch) -> _Cells:
    library, n_genes = np.zeros(matrix.n_cells), np.zeros(matrix.n_cells, dtype=np.int32)
    inside, n_bad, first_bad = 0.0, 0, ""
    for start in range(0, matrix.n_cells, BLOCK_CELLS):
        rows = np.arange(start, min(start + BLOCK_CELLS, matrix.n_cells))
        block = matrix.read(rows)
        good = (block.data > 0) & (block.data < np.inf)
        bad = ~good | (block.data != np.rint(block.data))
        if bad.any():
            first_bad = first_bad or locate(matrix, rows, block, bad)
            n_bad += int(bad.sum())
            block = block.keep(good)
        whole = to_vocabulary(block, np.arange(len(rows)), match.gene_index)
        assert whole is not None  # only good entries are left
        mapped, library[rows] = whole
        n_genes[rows] = np.diff(mapped.indptr)
        inside += float(mapped.data.sum(dtype=np.float64))
    return _Cells(library, n_genes, inside, n_bad, first_bad)


def _quantile_text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in values.items())


def _cells_text(n: int) -> str:
    return f"{n:,} cell{'s' * (n != 1)}"


def _column_text(values: pd.Series) -> str:
    """What an obs column holds that is no label: one value, numbers, or as many texts as cells."""
    missing = f", {values.isna().sum():,} missing" if values.isna().any() else ""
    distinct = values.dropna().unique()
    if len(distinct) < 2:
        return f"'{distinct[0]}' throughout{missing}" if len(distinct) else "nothing"
    if pd.api.types.is_numeric_dtype(values.dtype):
        return f"numbers from {values.min():,.4g} to {values.max():,.4g}{missing}"
    return f"{len(distinct):,} values{missing}"


def _warn_of_no_labels(columns: dict[str, dict[str, int]], name: str) -> None:
    """Say which columns of labels have texts that look like none, and what to do with the cells."""
    found = [
        f"obs['{column}'] '{label}' ({_cells_text(counts[label])})"
        for column, counts in columns.items()
        if any(word in column.lower() for word in LABEL_WORDS)
        for label in no_labels(label for label in counts if label != MISSING)
    ]
    if found:
        log.warning(
            "'%s': some values look like no label, and would be learned and scored as classes: %s. To leave these "
            "cells out, make their labels missing (NaN) in the file and set finetune.drop_unlabelled: true (for a "
            "benchmark params.drop_unlabelled: true in eval.benchmarks).",
            name,
            ", ".join(found),
        )


def _class_text(counts: dict[str, int]) -> str:
    classes = [f"{name} {n:,}" for name, n in counts.items() if name != MISSING]
    shown = ", ".join(classes[:SHOWN_CLASSES]) + (", …" if len(classes) > SHOWN_CLASSES else "")
    missing = f"; {counts[MISSING]:,} missing" if MISSING in counts else ""
    return f"{len(classes)} values ({shown}){missing}"


def _columns(obs: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return cells of each value, for the obs columns that have few of them."""
    out = {}
    for name in obs.columns:
        values = obs[name]
        if pd.api.types.is_float_dtype(values.dtype):
            continue
        counts = values.value_counts()
        counts = counts[counts > 0]
        if 2 <= len(counts) <= min(MAX_CLASSES, max(2, len(obs) // 2)):
            out[str(name)] = {str(value): int(n) for value, n in counts.items()}
            if missing := int(values.isna().sum()):
                out[str(name)][MISSING] = missing
    return out


def likely_column(columns: Sequence[str], words: Sequence[str]) -> str | None:
    """Return the first column that is one of the words, else the first that contains one."""
    exact = (c for word in words for c in columns if c.lower() == word)
    inside = (c for word in words for c in columns if word in c.lower())
    return next(exact, None) or next(inside, None)


def _suggest(matrix: Matrix, layer: str | None, columns: dict[str, dict[str, int]]) -> Suggestions:
    vocabs = [predefined(f"{species}_protein_coding") for species in ("human", "mouse")]
    matches = [match_genes(matrix.var, vocab) for vocab in vocabs]
    best, known = max(zip(vocabs, matches, strict=True), key=lambda pair: pair[1].n_matched)
    label = likely_column(list(columns), LABEL_WORDS)
    others = [column for column in columns if column != label]
    return Suggestions(
        layer=layer,
        gene_vocab=best.name if known.n_matched >= 0.1 * known.n_columns else "from_data",
        label_key=label,
        batch_key=likely_column(others, BATCH_WORDS),
        group_key=likely_column(others, GROUP_WORDS),
        model=SMALL_MODEL if matrix.n_cells < SMALL_DATA else {},
    )
