"""From a config to cells that are ready to train on: store, vocabulary, split, statistics."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from scmodelforge.config import Config
from scmodelforge.config_census import CensusConfig
from scmodelforge.data.cache import cached_sources, warn_if_slow
from scmodelforge.data.census import census_facts
from scmodelforge.data.shards import is_untouched_shard
from scmodelforge.data.sources import Source, sources_of
from scmodelforge.data.split import split_cells
from scmodelforge.data.state import evenly
from scmodelforge.data.statistics import gene_medians
from scmodelforge.data.store import CellStore, missing_obs_column, obs_categories, open_store, vocabulary_of
from scmodelforge.data.variable_genes import select_hvg
from scmodelforge.errors import DataError
from scmodelforge.genes.vocab import GeneVocab, read_medians
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.models.extension import extend_vocabulary, measure_new_medians

log = logging.getLogger(__name__)

CELLS_TO_HASH = 256
BLOCK_CELLS = 512


@dataclass(frozen=True)
class TrainingData:
    """Cells, the vocabulary they are aligned to, and who trains and who validates."""

    store: CellStore
    vocab: GeneVocab
    train_rows: np.ndarray
    val_rows: np.ndarray

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Plain facts for run.json and checkpoints; `train_cells` tells other training cells apart.

        It hashes the names of all training cells and the counts of some of them.
        """
        digest = hashlib.sha256("\n".join(self.store.obs.index[self.train_rows].astype(str)).encode())
        chosen = self.train_rows[:: max(1, len(self.train_rows) // CELLS_TO_HASH)]
        if any(matrix.shuffle_buffer for matrix in self.store.matrices):
            chosen = self.train_rows[evenly(len(self.train_rows), CELLS_TO_HASH, in_runs=True)]
        some = self.store.read(chosen)
        digest.update(some.library_size.tobytes())
        digest.update(some.counts.tobytes())
        return {
            "files": [str(name) for name in self.store.files],
            **self._census,
            "n_cells": self.store.n_cells,
            "n_train": len(self.train_rows),
            "n_val": len(self.val_rows),
            "train_cells": digest.hexdigest(),
            "vocabulary": self.vocab.fingerprint,
            "genes_matched": self.store.matched_share,
            "vocabulary_measured": self.store.measured_share,
        }

    @property
    def _census(self) -> dict[str, Any]:
        sources = [matrix.source for matrix in self.store.matrices]
        facts = [census_facts(source) for source in sources if isinstance(source, CensusConfig)]
        return {"census": facts[0]} if facts else {}

    def read_through(self) -> None:
        """Read every cell once, so that a broken one is found before training starts.

        Not those of the Census, which would take long and are checked as training reads them, nor those of shards,
        which were read when they were made: they are trusted as `is_untouched_shard` says.

        Raises
        ------
        DataError
            If a count is negative or not finite; file, cell and gene are named.
        """
        rows = np.sort(np.concatenate([self.train_rows, self.val_rows]))
        unread = np.array([_must_be_read(matrix.source) for matrix in self.store.matrices])
        rows = rows[unread[np.searchsorted(self.store.offsets, rows, side="right") - 1]]
        for start in range(0, len(rows), BLOCK_CELLS):
            self.store.read(rows[start : start + BLOCK_CELLS])


def _must_be_read(source: Source) -> bool:
    if isinstance(source, CensusConfig):
        return False
    return not isinstance(source, str | Path) or not is_untouched_shard(source)


def prepare_data(
    config: Config,
    data: AnnData | None = None,
    vocab: GeneVocab | None = None,
) -> TrainingData:
    """Open the cells of a config, split them, and measure what the tokenizer needs on the training cells.

    Parameters
    ----------
    config
        The sections `data`, `tokenizer` and `training.seed` are read.
    data
        Cells in memory instead of `data.paths`.
    vocab
        A vocabulary that is already complete (a checkpoint's); None: made as the config says.

    Raises
    ------
    DataError
        If files, genes or counts cannot be used, or no cell is left to train on.
    """
    sources: list[Source] = [data] if data is not None else sources_of(config.data)
    if not sources:
        raise DataError("There are no cells to train on: data.paths is empty.")
    selected = config.data.preprocessing.hvg is not None
    if vocab is not None:
        sources = cached_sources(sources, vocab, config.data, selected_genes=selected)
        store = open_store(sources, vocab, config.data, selected_genes=selected, of_model=True)
        warn_if_slow(store.matrices)
        return _split(config, store, vocab)

    vocab = vocabulary_of(config, sources)
    sources = cached_sources(sources, vocab, config.data)
    store = open_store(sources, vocab, config.data)
    warn_if_slow(store.matrices)
    if problem := missing_obs_column(store.obs, config.obs_columns):
        raise DataError(problem[0].upper() + problem[1:])
    prepared = _split(config, store, vocab)

    preprocessing, threads = config.data.preprocessing, config.training.loader_threads
    if preprocessing.hvg is not None:
        kept = select_hvg(store, prepared.train_rows, preprocessing.hvg, preprocessing, threads)
        vocab = vocab.subset(kept)
        prepared = replace(
            prepared, store=open_store(sources, vocab, config.data, selected_genes=True), vocab=vocab
        )
    if config.obs_columns:
        training_cells = prepared.store.obs.iloc[prepared.train_rows]
        vocab = vocab.with_obs_categories(obs_categories(training_cells, config.obs_columns))
        prepared = replace(prepared, vocab=vocab)
        prepared.store.obs_categories = vocab.obs_categories
    if config.tokenizer.gene_medians == "none" or config.tokenizer.strategy_like != "rank_value":
        return replace(prepared, vocab=vocab.with_medians(None))
    if config.tokenizer.gene_medians == "from_data":
        log.info("Measuring gene medians on %s training cells.", f"{len(prepared.train_rows):,}")
        if config.data.source == "census":
            log.warning(
                "For the gene medians all training cells are read three times over. To spare that, train on shards of "
                "these cells (scmodelforge shard), or name a table: tokenizer.gene_medians."
            )
        medians, statistics = gene_medians(
            prepared.store, prepared.train_rows, preprocessing.target_sum, preprocessing.normalize, threads
        )
        n_empty = len(statistics.empty_rows)
        if n_empty == len(prepared.train_rows):
            raise DataError("No training cell has a single count on a gene of the vocabulary.")
        if n_empty:
            log.warning(
                "%s training cells have no gene of the vocabulary: they teach nothing.", f"{n_empty:,}"
            )
        unseen = int(np.isnan(medians).sum())
        if unseen:
            log.info(
                "%s of %s vocabulary genes are in no training cell: the model will leave them out of its input.",
                f"{unseen:,}",
                f"{vocab.n_genes:,}",
            )
    else:
        medians = read_medians(config.tokenizer.gene_medians, prepared.vocab)
    return replace(prepared, vocab=prepared.vocab.with_medians(medians))


def prepare_given(
    config: Config, data: AnnData | None, given: ModelBundle
) -> tuple[ModelBundle, TrainingData]:
    """As `prepare_data`, for a model that brings its vocabulary; with `data.extend_vocab` it gets new genes."""
    n_genes = given.vocab.n_genes
    given = extend_vocabulary(given, [data] if data is not None else sources_of(config.data), config)
    prepared = prepare_data(config, data, given.vocab)
    vocab = measure_new_medians(given.vocab, n_genes, prepared.store, prepared.train_rows, config)
    return replace(given, vocab=vocab), replace(prepared, vocab=vocab)


def _split(config: Config, store: CellStore, vocab: GeneVocab) -> TrainingData:
    if config.data.source == "census" and config.data.split.val_split and config.data.split.group_key is None:
        log.warning(
            "Single cells from everywhere validate (data.split.group_key: null), and to read them nearly all cells of "
            "the Census are read. Name a column whose groups lie together: dataset_id or donor_id."
        )
    train_rows, val_rows = split_cells(store.obs, config.data.split, config.training.seed)
    return TrainingData(store, vocab, train_rows, val_rows)
