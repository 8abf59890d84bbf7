"""Pretraining, from top to bottom: check, data, model, fit, what is left behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData
from lightning import Trainer

from scmodelforge.config import Config
from scmodelforge.config_idle import say_idle_keys
from scmodelforge.config_reading import plain_value
from scmodelforge.data.batch import CellBatch
from scmodelforge.data.module import CellDataModule, training_order
from scmodelforge.errors import ConfigError, ModelError
from scmodelforge.files import atomic_path
from scmodelforge.genes.embeddings import read_gene_embeddings
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import (
    CHECKPOINT_KEY,
    ModelBundle,
    build_model,
    config_of,
    load_model,
    read_checkpoint,
    save_bundle,
    with_gene_width_of,
    with_model_of,
)
from scmodelforge.models.embeddings import ExternalGenes
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import TrainingBatch
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.callbacks import Interrupted, MetricsFile
from scmodelforge.training.data import TrainingData, prepare_data, prepare_given
from scmodelforge.training.module import PretrainingModule, TrainingModule
from scmodelforge.training.setup import (
    RunFolders,
    build_trainer,
    check_environment,
    choose_folders,
    collected_notes,
    create_folders,
    n_processes,
    write_provenance,
)

log = logging.getLogger(__name__)

# What a resumed run must share with the interrupted one, beside data, tokenizer and model.
# Where the cells lie, which may have changed; that they are the same is checked by itself.
MAY_DIFFER = ("data.paths", "data.cache_dir", "data.cache_size_gb", "data.census.uri")
FIXED_TRAINING_KEYS = tuple(
    f"training.{key}"
    for key in (
        "batch_size",
        "seed",
        "precision",
        "optimizer.",
        "scheduler.",
        "gradient_clip_val",
        "accumulate_grad_batches",
    )
)


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


def train(
    config: Config,
    resume: str | Path | None = None,
    data: AnnData | None = None,
    checkpoint: str | Path | None = None,
) -> RunResult:
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
    checkpoint
        A model to start from, checkpoint or folder: its weights, and with them its vocabulary, tokenizer, architecture
        and preprocessing; a config that contradicts them is refused.

    Raises
    ------
    UserError
        If config, data, checkpoint or machine do not allow the run; nothing has been trained then.
    """
    with collected_notes() as notes:
        check_environment(config.training)
        say_idle_keys(config)
        given = _given_model(config, checkpoint, resume)
        if given is not None:
            config = with_model_of(config, given, str(checkpoint))
        resumed = read_resumable(config, resume, fine_tuned=False) if resume else None
        plain = resumed[CHECKPOINT_KEY] if resumed else None
        folders = choose_folders(config.training, plain)
        if given is not None:
            given, prepared = prepare_given(config, data, given)
        else:
            prepared = prepare_data(config, data, GeneVocab.from_plain(plain["vocab"]) if plain else None)
        if plain:
            check_same_cells(prepared, plain, str(resume))

        if given is not None:
            model = given.model.train()
        else:
            config, model = _start(config, prepared.vocab, resumed, str(resume))
        bundle = ModelBundle(config, prepared.vocab, model)
        tokenizer = build_tokenizer(config, prepared.vocab)
        task = build_objective(config, prepared.vocab)

        def make_batch(cells: CellBatch, epoch: int, batch_seed: int) -> TrainingBatch:
            seed = config.training.seed
            return task.corrupt(tokenizer(cells, seed, epoch), seed, epoch, batch_seed)

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
            checkpoint=resumed,
            notes=notes,
        )


def _given_model(
    config: Config, checkpoint: str | Path | None, resume: str | Path | None
) -> ModelBundle | None:
    """The model that training starts from, if there is one."""
    if checkpoint is None:
        if config.data.extend_vocab is not None and resume is None:
            raise ConfigError(
                "data.extend_vocab adds genes to a model that training starts from, and none is given (--checkpoint)."
                "\nA new model takes its genes from data.gene_vocab; from_data is all genes of the data."
            )
        return None
    given = load_model(checkpoint)
    if given.labels is not None:
        log.info("The head that predicts '%s' stays behind: pretraining has no use for it.", given.labels.key)
    return given


def _start(
    config: Config, vocab: GeneVocab, checkpoint: dict[str, Any] | None, where: str
) -> tuple[Config, CellTransformer]:
    """The model before its first step, with given gene vectors if any; and the config with their width.

    A resumed run takes the vectors from its checkpoint, with all other weights.
    """
    seed = config.training.seed
    if checkpoint is not None:
        config = with_gene_width_of(config, config_of(checkpoint, where))
        return config, build_model(config, vocab, seed)
    settings = config.model
    if settings.gene_embeddings is None:
        if settings.gene_embedding_dim is not None and not settings.train_gene_embeddings:
            raise ConfigError(
                "model.gene_embedding_dim asks for given gene vectors, but model.gene_embeddings names no file.\n"
                "Name one, set model.train_gene_embeddings: true to learn such vectors, or "
                "model.gene_embedding_dim: null to learn gene embeddings of the model's own width."
            )
        return config, build_model(config, vocab, seed)
    vectors, _ = read_gene_embeddings(settings.gene_embeddings, vocab)
    width = vectors.shape[1]
    if settings.gene_embedding_dim not in (None, width):
        raise ConfigError(
            f"model.gene_embedding_dim is {settings.gene_embedding_dim}, but the vectors in "
            f"'{settings.gene_embeddings}' have {width} numbers. Leave the key out, or use another file."
        )
    config = config.model_copy(update={"model": settings.model_copy(update={"gene_embedding_dim": width})})
    model = build_model(config, vocab, seed)
    genes = model.embedding.tokens
    assert isinstance(genes, ExternalGenes)
    genes.load_vectors(torch.from_numpy(vectors))
    return config, model


def fit(
    module: TrainingModule,
    bundle: ModelBundle,
    prepared: TrainingData,
    make_batch: Any,
    folders: RunFolders,
    *,
    known_batch: Any = None,
    monitor: str,
    mode: str = "min",
    resume: str | Path | None = None,
    checkpoint: dict[str, Any] | None = None,
    strategy: str = "ddp",
    notes: list[str],
) -> RunResult:
    """Run Lightning's trainer and write what a run leaves behind; shared with fine-tuning."""
    training = bundle.config.training
    order = training_order(prepared.store, prepared.train_rows, bundle.config.data, training.seed)
    if checkpoint is None:
        prepared.read_through()
    module.description |= {
        "run_dir": str(folders.run),
        "data": prepared.facts,
        "devices": n_processes(training),
        "cpu_threads": torch.get_num_threads(),
    }
    cells = CellDataModule(
        prepared.store,
        order,
        prepared.val_rows,
        make_batch,
        training.batch_size,
        training.seed,
        training.loader_threads,
        known_batch,
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
        resumed_step=checkpoint["global_step"] if checkpoint else 0,
        strategy=strategy,
    )
    if trainer.is_global_zero:
        create_folders(folders, resumed=checkpoint is not None)
        with atomic_path(folders.run / "gene_match.csv") as temporary:
            prepared.store.gene_report().to_csv(temporary, index=False)
        write_provenance(folders, bundle.config, {"data": prepared.facts, "notes": notes})
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
    if not metrics and not interrupted:
        log.warning("All %d epochs of this run were done already: nothing was trained.", training.max_epochs)
        metrics = _last_figures(trainer)
    if trainer.is_global_zero:
        facts = {"data": prepared.facts, "notes": notes, "metrics": metrics, "interrupted": interrupted}
        write_provenance(folders, bundle.config, facts)
    if interrupted:
        return RunResult(folders.run, folders.checkpoints, bundle, metrics, interrupted=True)
    trainer.strategy.barrier("run is written")
    best = load_model(folders.best if folders.best.exists() else folders.last)
    if trainer.is_global_zero:
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


def _last_figures(trainer: Trainer) -> dict[str, float]:
    """The newest value of each column of metrics.csv."""
    figures: dict[str, float] = {}
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            for _, row in sorted(logger.rows.items()):
                figures |= {name: float(value) for name, value in row.items()}
    return figures


def read_resumable(config: Config, resume: str | Path, *, fine_tuned: bool) -> dict[str, Any]:
    """Read the checkpoint of an interrupted run.

    Raises
    ------
    ModelError
        If it is of another kind of run, or was started with other settings: a run can only go on as what it was.
    """
    checkpoint = read_checkpoint(resume)
    plain = checkpoint[CHECKPOINT_KEY]
    if fine_tuned != bool(plain["labels"]):
        kind, command = ("pretraining", "train") if fine_tuned else ("fine-tuning", "finetune")
        raise ModelError(f"'{resume}' is of a {kind} run: resume it with 'scmodelforge {command}'.")
    had_config = config_of(checkpoint, str(resume))
    asked = _flat(with_gene_width_of(config, had_config).model_dump(mode="json"))
    had = _flat(had_config.model_dump(mode="json"))
    sections = ("data.", "tokenizer.", "model.", *(("finetune.",) if fine_tuned else ()))
    problems = [
        f"{key}: {plain_value(asked.get(key))} in the config, {plain_value(had.get(key))} in the run"
        for key in asked | had  # a section that only one of them has is no key of the other
        if ((key.startswith(sections) and key not in MAY_DIFFER) or key.startswith(FIXED_TRAINING_KEYS))
        and asked.get(key) != had.get(key)
    ]
    devices = n_processes(config.training)
    if devices != plain["devices"]:
        problems.append(f"devices: {devices} here, {plain['devices']} in the run")
    if problems:
        raise ModelError(
            f"The run in '{resume}' cannot go on with this config:\n  "
            + "\n  ".join(problems)
            + "\nUse the config, the --set options and the --checkpoint (if any) it was started with, or start a new "
            "run without --resume."
        )
    if plain["cpu_threads"] != torch.get_num_threads():
        log.warning(
            "The run used %d CPU threads and has %d now: on the CPU its weights will differ in the last bits.",
            plain["cpu_threads"],
            torch.get_num_threads(),
        )
    for key in ("training.max_epochs", "training.max_steps"):
        if asked[key] != had[key]:
            log.warning(
                "%s is %s now and was %s: the learning rate follows the new length.",
                key,
                asked[key],
                had[key],
            )
    return checkpoint


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_same_cells(prepared: TrainingData, plain: dict[str, Any], where: str) -> None:
    """Refuse to go on with other training cells than `plain`, the description in a checkpoint, names."""
    had, have = plain["data"], prepared.facts
    if had["vocabulary"] != have["vocabulary"]:
        raise ModelError(
            f"The run in '{where}' has another gene vocabulary than the model it should start from. Resume with the "
            "--checkpoint it was started with."
        )
    if had["train_cells"] != have["train_cells"]:
        raise ModelError(
            f"The run in '{where}' trained on {had['n_train']:,} of {had['n_cells']:,} cells; this config gives "
            f"{have['n_train']:,} of {have['n_cells']:,}, and not the same ones. Resume with the same data.paths (or "
            "data.census), data.split and training.seed."
        )
