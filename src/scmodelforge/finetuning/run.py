"""Fine-tuning, from top to bottom: model, labels, head, fit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.cache import cached_sources, warn_if_slow
from scmodelforge.data.sources import sources_of
from scmodelforge.data.split import split_cells
from scmodelforge.data.state import evenly
from scmodelforge.data.store import CellStore
from scmodelforge.errors import ConfigError, DataError, ModelError, require_extra
from scmodelforge.evaluation.splits import obs_column, usable_labels
from scmodelforge.finetuning.frozen import embed_once, embeds_once
from scmodelforge.finetuning.lora import add_lora, trainable_share
from scmodelforge.finetuning.module import FinetuningModule, LabelledBatch
from scmodelforge.inference import embed_store, open_for
from scmodelforge.models.bundle import (
    CHECKPOINT_KEY,
    Labels,
    build_head,
    load_model,
    with_model_of,
)
from scmodelforge.models.extension import extend_vocabulary, measure_new_medians
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.data import TrainingData
from scmodelforge.training.run import RunResult, check_same_cells, fit, read_resumable
from scmodelforge.training.setup import check_environment, choose_folders, collected_notes

log = logging.getLogger(__name__)

CELLS_FOR_SCALE = 2_000


@dataclass(frozen=True)
class Targets:
    """Labels of all cells of a store.

    Attributes
    ----------
    rows
        int64: global rows of the cells that have a usable label.
    values
        int64 (n_cells in the store) class numbers, or float32 values as they are; only `rows` mean something.
    classes
        Class names, sorted; empty for regression.
    """

    rows: np.ndarray
    values: np.ndarray
    classes: tuple[str, ...]


def finetune(
    config: Config,
    checkpoint: str | Path,
    data: AnnData | None = None,
    resume: str | Path | None = None,
) -> RunResult:
    """Teach a pretrained model a label.

    Vocabulary, tokenizer, architecture and preprocessing are the checkpoint's; a config that contradicts
    them is refused.

    Parameters
    ----------
    config
        The whole config; `finetune`, `training` and `data` are read.
    checkpoint
        A pretrained checkpoint or model folder.
    data
        Cells in memory instead of `data.paths`.
    resume
        A checkpoint of an interrupted fine-tuning run.

    Raises
    ------
    UserError
        If config, labels, data or checkpoint do not allow the run.
    """
    with collected_notes() as notes:
        check_environment(config.training)
        if config.training.tokens_per_batch == "auto":
            raise ConfigError(
                "training.tokens_per_batch: auto is for train. Fine-tuning takes a number of tokens, or null for "
                "batches of training.batch_size cells."
            )
        if config.finetune.lora.enabled:
            require_extra("peft", "peft", "finetune.lora")
        pretrained = load_model(checkpoint)
        config = with_model_of(config, pretrained, str(checkpoint))
        _warn_of_no_effect(config)
        resumed = read_resumable(config, resume, fine_tuned=True) if resume else None
        plain = resumed[CHECKPOINT_KEY] if resumed else None
        folders = choose_folders(config.training, plain)

        sources: list = [data] if data is not None else sources_of(config.data)
        if not sources:
            raise DataError("There are no cells to fine-tune on: data.paths is empty.")
        n_genes = pretrained.vocab.n_genes
        pretrained = extend_vocabulary(pretrained, sources, config)
        selected = pretrained.config.data.preprocessing.hvg is not None
        sources = cached_sources(sources, pretrained.vocab, config.data, selected)
        store = open_for(pretrained, sources, config.data)
        warn_if_slow(store.matrices)
        targets = read_targets(store, config)
        labelled = targets.values[targets.rows]
        train, val = split_cells(
            store.obs.iloc[targets.rows],
            config.data.split,
            config.training.seed,
            np.array(targets.classes)[labelled] if targets.classes else None,
        )
        vocab = measure_new_medians(pretrained.vocab, n_genes, store, targets.rows[train], config)
        pretrained = replace(pretrained, vocab=vocab)
        prepared = TrainingData(store, vocab, targets.rows[train], targets.rows[val])
        if plain:
            check_same_cells(prepared, plain, str(resume))
        labels, values = _describe(targets, prepared, config)
        if plain and list(plain["labels"]["classes"]) != list(labels.classes):
            raise ModelError(
                f"The run in '{resume}' learned the classes {', '.join(plain['labels']['classes'])}; the data now "
                f"have {', '.join(labels.classes)}."
            )

        seed = config.training.seed
        bundle = replace(pretrained, config=config, labels=labels, head=build_head(config, labels, seed))
        once = embeds_once(config, vocab, len(prepared.train_rows))
        scale_rows = None if resume else _rows_for_scale(prepared, seed)
        if scale_rows is not None and not once:
            some = embed_store(bundle, prepared.store, rows=scale_rows)
            bundle.head.fit_scale(torch.from_numpy(some))  # type: ignore[union-attr]
        bundle.model.train()
        bundle.model.requires_grad_(not config.finetune.freeze_backbone)
        for head in bundle.model.pretraining_heads:
            head.requires_grad_(False)
        if config.finetune.lora.enabled:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                add_lora(bundle.model, config.finetune.lora)
        trainable, total = trainable_share(bundle.model, bundle.head)  # type: ignore[arg-type]
        log.info(
            "%s training and %s validation cells; %s of %s parameters train (%.2f %%).",
            f"{len(prepared.train_rows):,}",
            f"{len(prepared.val_rows):,}",
            f"{trainable:,}",
            f"{total:,}",
            100 * trainable / total,
        )
        tokenizer = build_tokenizer(config, vocab)

        module = FinetuningModule(bundle)
        if once:
            rows = np.sort(np.concatenate([prepared.train_rows, prepared.val_rows]))
            embed = partial(embed_once, bundle, prepared.store, rows, folders.run)
            module = FinetuningModule(bundle, embed, scale_rows)

        def make_batch(cells: CellBatch, epoch: int, batch_seed: int) -> LabelledBatch:
            tokens = tokenizer(cells, seed, epoch)
            packed = bundle.model.readable(tokens, config.training.token_budget)
            wanted = torch.from_numpy(values[cells.rows])
            return LabelledBatch(packed, wanted, int(tokens.lengths.sum()), batch_seed)

        is_classification = labels.task == "classification"
        return fit(
            module,
            bundle,
            prepared,
            make_batch,
            folders,
            known_batch=partial(module.embedded_batch, values),
            monitor="val_macro_f1" if is_classification else "val_loss",
            mode="max" if is_classification else "min",
            resume=resume,
            checkpoint=resumed,
            ddp="ddp_find_unused_parameters_true" if config.finetune.freeze_backbone_epochs else "ddp",
            notes=notes,
        )


def _warn_of_no_effect(config: Config) -> None:
    finetune, training, epochs = config.finetune, config.training, config.training.max_epochs
    if training.tokens_per_batch is not None and "batch_size" in training.model_fields_set:
        log.warning("training.batch_size has no effect: training.tokens_per_batch says what a batch holds.")
    if training.compile:
        log.warning("training.compile has no effect: only pretraining is compiled.")
    if finetune.freeze_backbone and finetune.backbone_lr is not None:
        log.warning("finetune.backbone_lr has no effect: freeze_backbone is true.")
    if finetune.freeze_backbone_epochs >= epochs and not finetune.freeze_backbone:
        log.warning(
            "finetune.freeze_backbone_epochs is %d and training.max_epochs %d: the backbone never trains.",
            finetune.freeze_backbone_epochs,
            epochs,
        )


def _rows_for_scale(prepared: TrainingData, seed: int) -> np.ndarray:
    """int64, ascending: some training cells, whose pretrained embeddings tell the head their spread."""
    chosen = np.random.default_rng(seed).permutation(prepared.train_rows)[:CELLS_FOR_SCALE]
    if any(matrix.shuffle_buffer for matrix in prepared.store.matrices):
        chosen = prepared.train_rows[evenly(len(prepared.train_rows), CELLS_FOR_SCALE, in_runs=True)]
    return np.sort(chosen)


def read_targets(store: CellStore, config: Config) -> Targets:
    """Labels of the cells of a store.

    Raises
    ------
    DataError
        If the column is missing, has gaps (unless `drop_unlabelled`), one class only, a class with a single
        cell, or is no number where a regression is asked.
    """
    finetune = config.finetune
    where = ", ".join(str(name) for name in store.files)
    if finetune.head.task == "regression":
        return _regression_targets(store, config, where)
    mask, names = usable_labels(
        store.obs,
        finetune.label_key,
        where,
        drop_unlabelled=finetune.drop_unlabelled,
        section="finetune",
    )
    classes, codes = np.unique(names, return_inverse=True)
    values = np.zeros(store.n_cells, dtype=np.int64)
    values[mask] = codes
    return Targets(np.flatnonzero(mask), values, tuple(str(name) for name in classes))


def _regression_targets(store: CellStore, config: Config, where: str) -> Targets:
    key = config.finetune.label_key
    column = obs_column(store.obs, key, where)
    values = pd.to_numeric(store.obs[key].astype(object), errors="coerce").to_numpy(dtype=np.float32)
    missing = np.asarray(column.codes) < 0
    wrong = np.flatnonzero(~np.isfinite(values) & ~missing)
    if len(wrong):
        raise DataError(
            f"obs['{key}'] of {where} is no number in {len(wrong):,} cells, e.g. {store.obs[key].iloc[wrong[0]]!r}: "
            "a regression needs numbers. Use finetune.head.task: classification, or another label_key."
        )
    if missing.any() and not config.finetune.drop_unlabelled:
        raise DataError(
            f"{missing.sum():,} of {len(missing):,} cells of {where} have no label in obs['{key}'].\n"
            "Every cell needs one: fill them in, or set finetune.drop_unlabelled: true to leave these cells out."
        )
    if missing.any():
        log.warning("%s cells without a label in obs['%s'] are left out.", f"{missing.sum():,}", key)
    rows = np.flatnonzero(~missing)
    if len(rows) < 2 or np.ptp(values[rows]) == 0:
        raise DataError(
            f"obs['{key}'] of {where} has fewer than two different values: there is nothing to learn."
        )
    return Targets(rows, values, ())


def _describe(targets: Targets, prepared: TrainingData, config: Config) -> tuple[Labels, np.ndarray]:
    """What travels with the model, and the targets as the loss takes them."""
    finetune = config.finetune
    if finetune.head.task == "regression":
        training = targets.values[prepared.train_rows].astype(np.float64)
        mean, std = float(training.mean()), float(training.std()) or 1.0
        standardized = ((targets.values - mean) / std).astype(np.float32)
        return Labels(finetune.label_key, "regression", mean=mean, std=std), standardized
    asked = finetune.head.n_classes
    if asked is not None and asked != len(targets.classes):
        raise DataError(
            f"finetune.head.n_classes is {asked}, but obs['{finetune.label_key}'] has {len(targets.classes)} "
            f"classes: {', '.join(targets.classes[:20])}. Set it to null to take the number from the data."
        )
    missing = np.setdiff1d(np.arange(len(targets.classes)), targets.values[prepared.train_rows])
    if len(missing):
        raise DataError(
            "After the split no training cell has the class "
            + ", ".join(f"'{targets.classes[code]}'" for code in missing)
            + f" (data.split.group_key: {config.data.split.group_key}). Use another group_key or seed, or null."
        )
    return Labels(finetune.label_key, "classification", classes=targets.classes), targets.values
