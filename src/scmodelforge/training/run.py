"""Pretraining, from top to bottom: check, data, model, fit, what is left behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anndata import AnnData
from lightning import Trainer

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.config_io import differences
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.module import CellDataModule
from scmodelforge.errors import ModelError
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.bundle import (
    CHECKPOINT_KEY,
    ModelBundle,
    build_model,
    load_model,
    read_checkpoint,
    save_bundle,
)
from scmodelforge.models.objectives import TrainingBatch
from scmodelforge.training.callbacks import Interrupted
from scmodelforge.training.data import TrainingData, prepare_data
from scmodelforge.training.module import PretrainingModule, TrainingModule
from scmodelforge.training.setup import (
    RunFolders,
    build_trainer,
    check_environment,
    collected_notes,
    prepare_folders,
    write_provenance,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes
    ----------
    run_dir, checkpoint_dir
        Its folders.
    model
        The best model.
    metrics
        The last logged figures.
    interrupted
        Whether it was stopped by a signal before its end.
    """

    run_dir: Path
    checkpoint_dir: Path
    model: ModelBundle
    metrics: dict[str, float]
    interrupted: bool = False


def train(config: Config, resume: str | Path | None = None, data: AnnData | None = None) -> RunResult:
    """Pretrain a model.

    Parameters
    ----------
    config
        The whole config.
    resume
        A checkpoint of an interrupted run. Training goes on with its vocabulary and weights, and on the same
        machine ends with the weights that an uninterrupted run would have.
    data
        Cells in memory instead of `data.paths`.

    Raises
    ------
    UserError
        If config, data, checkpoint or machine do not allow the run; nothing has been trained then.
    """
    with collected_notes() as notes:
        check_environment(config.training)
        checkpoint = read_checkpoint(resume) if resume else None
        if checkpoint:
            _check_resumable(config, checkpoint, str(resume))
        folders = prepare_folders(config.training, checkpoint and checkpoint[CHECKPOINT_KEY])
        vocab = GeneVocab.from_plain(checkpoint[CHECKPOINT_KEY]["vocab"]) if checkpoint else None
        prepared = prepare_data(config, data, vocab)
        if checkpoint:
            _check_same_cells(prepared, checkpoint, str(resume))

        bundle = ModelBundle(
            config, prepared.vocab, build_model(config, prepared.vocab, config.training.seed)
        )
        tokenizer = registry.TOKENIZERS.load(config.tokenizer.strategy)(
            config.tokenizer, config.data.preprocessing, prepared.vocab
        )
        task = registry.TASKS.load(config.model.pretraining_task)(config.tokenizer.masking, prepared.vocab)

        def make_batch(cells: CellBatch, epoch: int, batch_seed: int) -> TrainingBatch:
            return task.corrupt(tokenizer(cells), config.training.seed, epoch, batch_seed)

        module = PretrainingModule(bundle, config.training, task)
        _announce(bundle, prepared)
        return fit(
            module,
            bundle,
            prepared,
            make_batch,
            folders,
            monitor="val_loss",
            resume=resume,
            resumed_step=checkpoint["global_step"] if checkpoint else 0,
            notes=notes,
        )


def fit(
    module: TrainingModule,
    bundle: ModelBundle,
    prepared: TrainingData,
    make_batch: Any,
    folders: RunFolders,
    *,
    monitor: str,
    mode: str = "min",
    resume: str | Path | None = None,
    resumed_step: int = 0,
    notes: list[str],
    callbacks: tuple = (),
) -> RunResult:
    """Run Lightning's trainer and write what a run leaves behind; shared with fine-tuning."""
    training = bundle.config.training
    module.description |= {"run_dir": str(folders.run), "data": prepared.facts()}
    cells = CellDataModule(
        prepared.store,
        prepared.train_rows,
        prepared.val_rows,
        make_batch,
        training.batch_size,
        training.seed,
        training.loader_threads,
    )
    has_validation = len(prepared.val_rows) > 0
    if not has_validation:
        log.warning("No cells validate (data.split.val_split is 0): best.ckpt is the last epoch.")
    trainer = build_trainer(
        training,
        folders,
        monitor=monitor if has_validation else None,
        mode=mode,
        wait_seconds=lambda: _wait_seconds(trainer),
        resumed_step=resumed_step,
        callbacks=callbacks,
    )
    prepared.store.gene_report().to_csv(folders.run / "gene_match.csv", index=False)
    write_provenance(folders, bundle.config, {"data": prepared.facts(), "notes": notes})
    interrupted = False
    try:
        trainer.fit(
            module,
            train_dataloaders=None,
            datamodule=cells,
            ckpt_path=str(resume) if resume else None,
        )
    except Interrupted:
        interrupted = True
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    write_provenance(
        folders,
        bundle.config,
        {"data": prepared.facts(), "notes": notes, "metrics": metrics, "interrupted": interrupted},
    )
    if interrupted:
        return RunResult(folders.run, folders.checkpoints, bundle, metrics, interrupted=True)
    best = load_model(folders.best if folders.best.exists() else folders.last)
    save_bundle(best, folders.run / "model", f"Best validation: {_best(trainer)}")
    return RunResult(folders.run, folders.checkpoints, best, metrics)


def _wait_seconds(trainer: Trainer) -> float:
    return trainer.train_dataloader.wait_seconds  # type: ignore[union-attr]


def _best(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    score = getattr(callback, "best_model_score", None)
    return f"{callback.monitor} {float(score):.4f}" if score is not None else "none"  # type: ignore[union-attr]


def _announce(bundle: ModelBundle, prepared: TrainingData) -> None:
    for line in prepared.store.describe():
        log.info(line)
    log.info(
        "%s training and %s validation cells, %s genes, %s parameters.",
        f"{len(prepared.train_rows):,}",
        f"{len(prepared.val_rows):,}",
        f"{bundle.vocab.n_genes:,}",
        f"{bundle.n_parameters:,}",
    )
    if bundle.config.data.preprocessing.log1p:
        log.info(
            "data.preprocessing.log1p: ranks are taken before the logarithm, so it does not change them."
        )


def _check_resumable(config: Config, checkpoint: dict[str, Any], where: str) -> None:
    """A run can only go on as what it was: same tokenizer, model, data section, batches and seed."""
    plain = checkpoint[CHECKPOINT_KEY]
    if plain["labels"]:
        raise ModelError(f"'{where}' is a fine-tuned model: it cannot be resumed by 'train'.")
    have = Config.model_validate(plain["config"])
    problems = [
        line
        for section in ("data", "tokenizer", "model")
        for line in differences(getattr(config, section), getattr(have, section), section)
        if not line.startswith("data.paths")  # the cells themselves are compared, files may have moved
    ]
    for key in ("batch_size", "seed", "accumulate_grad_batches"):
        asked, had = getattr(config.training, key), getattr(have.training, key)
        if asked != had:
            problems.append(f"training.{key}: {asked} in the config, {had} in the checkpoint")
    if problems:
        raise ModelError(
            f"The run in '{where}' cannot go on with this config:\n  "
            + "\n  ".join(problems)
            + "\nUse the config it was started with, or start a new run without --resume."
        )


def _check_same_cells(prepared: TrainingData, checkpoint: dict[str, Any], where: str) -> None:
    had, have = checkpoint[CHECKPOINT_KEY]["data"], prepared.facts()
    if had["train_cells"] != have["train_cells"]:
        raise ModelError(
            f"The run in '{where}' trained on {had['n_train']:,} of {had['n_cells']:,} cells; this config gives "
            f"{have['n_train']:,} of {have['n_cells']:,}, and not the same ones. Resume with the same data.paths, "
            "data.split and training.seed."
        )
