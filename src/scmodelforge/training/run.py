"""Pretraining, from top to bottom: check, set up, fit, what is left behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData
from lightning import Callback, Trainer

from scmodelforge.config import Config, TrainingConfig
from scmodelforge.config_idle import say_idle_keys
from scmodelforge.config_reading import plain_value
from scmodelforge.data.module import CellDataModule
from scmodelforge.data.training_cells import CellRecorder
from scmodelforge.errors import ModelError
from scmodelforge.evaluation.shown_cells import shown_cells, write_cells
from scmodelforge.files import atomic_path
from scmodelforge.models.bundle import (
    CHECKPOINT_KEY,
    TRAINING_CELLS,
    ModelBundle,
    config_of,
    load_model,
    read_checkpoint,
    save_bundle,
    with_gene_width_of,
    with_model_of,
)
from scmodelforge.training.auto_budget import with_chosen_budget
from scmodelforge.training.batches import choose_batches
from scmodelforge.training.callbacks import Interrupted, MetricsFile
from scmodelforge.training.data import TrainingData
from scmodelforge.training.evaluation import evaluation_callbacks
from scmodelforge.training.module import TrainingModule
from scmodelforge.training.pretraining import given_model, set_up, with_budget
from scmodelforge.training.setup import (
    RunFolders,
    build_trainer,
    check_environment,
    choose_folders,
    collected_notes,
    create_folders,
    n_processes,
    read_record,
    write_provenance,
)
from scmodelforge.training.throughput import throughput_of

log = logging.getLogger(__name__)

# What a resumed run must share with the interrupted one, beside data, tokenizer and model.
# Where the cells lie, which may have changed; that they are the same is checked by itself.
MAY_DIFFER = ("data.paths", "data.cache_dir", "data.cache_size_gb", "data.census.uri")
FIXED_TRAINING_KEYS = tuple(
    f"training.{key}"
    for key in (
        "batch_size",
        "tokens_per_batch",
        "seed",
        "precision",
        "strategy",
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
    performance
        Rates, shares, memory and time to the first step, as in run.json; empty if the run had been finished before.
    """

    run_dir: Path
    checkpoint_dir: Path
    model: ModelBundle
    metrics: dict[str, float]
    interrupted: bool = False
    performance: dict[str, Any] = field(default_factory=dict)


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
        given = given_model(config, checkpoint, resume)
        if given is not None:
            config = with_model_of(config, given, str(checkpoint))
        resumed = read_resumable(config, resume, fine_tuned=False) if resume else None
        if resumed and config.training.tokens_per_batch == "auto":
            chosen = config_of(resumed, str(resume)).training.token_budget
            config = with_budget(config, chosen)
        plain = resumed[CHECKPOINT_KEY] if resumed else None
        folders = choose_folders(config.training, plain)
        run = set_up(config, data, given, resumed, str(resume))
        if plain:
            check_same_cells(run.prepared, plain, str(resume))
        run = with_chosen_budget(run)
        run.announce()
        return fit(
            run.module,
            run.bundle,
            run.prepared,
            run.make_batch,
            folders,
            monitor="val_loss",
            resume=resume,
            checkpoint=resumed,
            callbacks=evaluation_callbacks(config, run.bundle, run.prepared),
            notes=notes,
        )


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
    ddp: str = "ddp",
    callbacks: tuple[Callback, ...] = (),
    notes: list[str],
) -> RunResult:
    """Run Lightning's trainer and write what a run leaves behind; shared with fine-tuning."""
    training = bundle.config.training
    record = read_record(folders.run) if checkpoint else {}
    if checkpoint and _is_done(checkpoint, training):
        log.warning("All %d epochs of this run were done already: nothing was trained.", training.max_epochs)
        if "epochs" in record and not record["interrupted"] and (folders.run / "model").is_dir():
            metrics = _last_figures(MetricsFile(folders.run / "metrics.csv", checkpoint["global_step"]))
            best = load_model(folders.best if folders.best.exists() else folders.last)
            return RunResult(folders.run, folders.checkpoints, best, metrics)
    earlier = checkpoint[CHECKPOINT_KEY].get(TRAINING_CELLS) if checkpoint else None
    if earlier:
        module.description[TRAINING_CELLS] = earlier[:-1]  # the last are those of this run
    prepared.store.recorder = CellRecorder(
        prepared.train_rows, bundle.vocab.n_genes, earlier[-1] if earlier else None
    )
    train_batches, val_batches = choose_batches(bundle, prepared, read_through=checkpoint is None)
    module.description |= {
        "run_dir": str(folders.run),
        "data": prepared.facts,
        "devices": n_processes(training),
        "cpu_threads": torch.get_num_threads(),
    }
    cells = CellDataModule(
        prepared.store,
        train_batches,
        val_batches,
        make_batch,
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
        ddp=ddp,
        callbacks=callbacks,
    )
    about = {"data": prepared.facts, "model": _model_facts(bundle), "notes": notes}
    if checkpoint:
        record = record or read_record(Path(checkpoint[CHECKPOINT_KEY]["run_dir"]))
        about["earlier_commands"] = [
            *record.get("earlier_commands", []),
            *([record["command"]] if "command" in record else []),
        ]
    if trainer.is_global_zero:
        create_folders(folders, resumed=checkpoint is not None)
        with atomic_path(folders.run / "gene_match.csv") as temporary:
            prepared.store.gene_report().to_csv(temporary, index=False)
        write_provenance(folders, bundle.config, about)
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
        (file,) = (logger for logger in trainer.loggers if isinstance(logger, MetricsFile))
        metrics = _last_figures(file)
    performance = throughput_of(trainer).performance(trainer) or record.get("performance", {})
    if trainer.is_global_zero:
        facts = about | {"metrics": metrics, "interrupted": interrupted}
        facts |= {"steps": trainer.global_step, "epochs": trainer.current_epoch, "best": _best(trainer)}
        record = write_provenance(folders, bundle.config, facts | {"performance": performance})
    if interrupted:
        return RunResult(folders.run, folders.checkpoints, bundle, metrics, True, performance)
    trainer.strategy.barrier("run is written")
    best = load_model(folders.best if folders.best.exists() else folders.last)
    if trainer.is_global_zero:
        save_bundle(best, folders.run / "model", run=record)
        if has_validation:
            device = trainer.strategy.root_device.type
            cells = shown_cells(best, prepared.store, prepared.val_rows, "validation cells", device=device)
            write_cells(cells, folders.run / "validation_cells.h5ad")
    return RunResult(folders.run, folders.checkpoints, best, metrics, performance=performance)


def _wait_seconds(trainer: Trainer) -> float:
    return trainer.train_dataloader.wait_seconds  # type: ignore[union-attr]


def _model_facts(bundle: ModelBundle) -> dict[str, Any]:
    """What run.json says of the model beside its config."""
    labels = bundle.describe()["labels"]
    return {"n_parameters": bundle.n_parameters, "n_genes": bundle.vocab.n_genes, "labels": labels}


def _best(trainer: Trainer) -> dict[str, Any] | None:
    """The figure that decided which model is the best, and its value; None without validation."""
    callback = trainer.checkpoint_callback
    score = getattr(callback, "best_model_score", None)
    return {"monitor": callback.monitor, "value": float(score)} if score is not None else None  # type: ignore[union-attr]


def _is_done(checkpoint: dict[str, Any], training: TrainingConfig) -> bool:
    """Whether a checkpoint is of the end of the run, as Lightning's fit loop decides it."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return epochs >= training.max_epochs or 0 < (training.max_steps or 0) <= checkpoint["global_step"]


def _last_figures(file: MetricsFile) -> dict[str, float]:
    """The newest value of each column of metrics.csv."""
    figures: dict[str, float] = {}
    for _, row in sorted(file.rows.items()):
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
    if asked["training.tokens_per_batch"] == "auto":
        asked["training.tokens_per_batch"] = had["training.tokens_per_batch"]
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
