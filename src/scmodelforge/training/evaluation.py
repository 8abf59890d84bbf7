"""Benchmarks while training: what the embedding of the validation cells is worth, beside the loss.

Only cells that never train are looked at, by the first process alone while the others wait at the next step. Random
states and the modes of all modules are given back, so that a run with it ends with the same weights, bit for bit, as
one without. It costs what embedding the validation cells and scoring them costs; rates leave that time out.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.config_eval import EvalConfig
from scmodelforge.data.selected import SelectedCells
from scmodelforge.errors import ConfigError
from scmodelforge.evaluation.benchmark import Benchmark, EvaluationCells, Method
from scmodelforge.inference import embed_store
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.training.data import TrainingData
from scmodelforge.training.setup import n_processes
from scmodelforge.training.throughput import throughput_of

log = logging.getLogger(__name__)

OF_EMBEDDINGS = ("linear_probe", "knn_annotation", "embedding_quality")


def evaluation_callbacks(config: Config, bundle: ModelBundle, prepared: TrainingData) -> tuple[Callback, ...]:
    """What `eval.every_n_epochs` or `eval.every_n_steps` ask for; nothing where neither is set.

    Raises
    ------
    UserError
        If no cell validates, no benchmark looks at embeddings, the weights are divided over processes, or a benchmark
        cannot use the validation cells.
    """
    settings = config.eval
    key = "eval.every_n_epochs" if settings.every_n_steps is None else "eval.every_n_steps"
    if settings.every_n_epochs is None and settings.every_n_steps is None:
        return ()
    if not len(prepared.val_rows):
        raise ConfigError(
            f"{key} evaluates the validation cells, and there are none: data.split.val_split is "
            f"{config.data.split.val_split:g}.\nHold some cells out, or set {key}: null."
        )
    if config.training.strategy == "fsdp" and n_processes(config.training) > 1:
        raise ConfigError(
            f"{key} needs the whole model in one process, and training.strategy fsdp divides it. Use strategy ddp, or "
            f"set {key}: null."
        )
    left_out = sorted({spec.name for spec in settings.benchmarks} - {*OF_EMBEDDINGS})
    if left_out:
        log.warning("Training evaluates embeddings: %s is for 'scmodelforge benchmark'.", ", ".join(left_out))
    if len(left_out) == len({spec.name for spec in settings.benchmarks}):
        raise ConfigError(
            f"{key} runs the benchmarks of embeddings ({', '.join(OF_EMBEDDINGS)}), and eval.benchmarks names none."
        )
    store = prepared.store
    cells = EvaluationCells(
        SelectedCells(store, prepared.val_rows), None, None, f"the validation cells of {store.files[0]}"
    )
    return (EmbeddingEvaluation(bundle, cells, settings),)


class EmbeddingEvaluation(Callback):
    """Logs the figures of benchmarks of the current embeddings as eval/BENCHMARK/METRIC.

    Parameters
    ----------
    bundle
        The model that trains.
    cells
        Cells that do not train.
    config
        When and what.
    """

    def __init__(self, bundle: ModelBundle, cells: EvaluationCells, config: EvalConfig) -> None:
        self.bundle, self.cells, self.config = bundle, cells, config
        specs = [spec for spec in config.benchmarks if spec.name in OF_EMBEDDINGS]
        names = [spec.name for spec in specs]
        self.benchmarks: list[tuple[str, Any, Benchmark]] = [
            (
                spec.name if names.count(spec.name) == 1 else f"{spec.name}/{spec.dataset}",
                spec.params,
                registry.BENCHMARKS.load(spec.name),
            )
            for spec in specs
        ]
        for _, params, one in self.benchmarks:
            one.check(cells, params, config.seed)
        self.step_done = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step_done = trainer.global_step  # a run that resumes was evaluated there

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.config.every_n_steps, trainer.global_step
        if every is not None and step % every == 0 and step != self.step_done:
            self._evaluate(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self.config.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        self.step_done = trainer.global_step
        if not trainer.is_global_zero:
            return
        started = time.perf_counter()
        figures = self.figures(str(trainer.strategy.root_device))
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)
        log.info(
            "Validation cells at step %s: %s.",
            f"{trainer.global_step:,}",
            ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in figures.items()),
        )
        throughput_of(trainer).leave_out(time.perf_counter() - started)

    def figures(self, device: str) -> dict[str, float]:
        """Figures of the embeddings as the model is now, by name; leaves model and random states as they were."""
        modes = [(module, module.training) for module in self.bundle.model.modules()]
        figures: dict[str, float] = {}
        try:
            with isolate_rng():
                embedding = embed_store(self.bundle, self.cells.store, self.config.batch_size, device=device)
                method = Method("model", False, embedding)
                for name, params, one in self.benchmarks:
                    metrics = one.run([method], self.cells, params, self.config.seed)["model"].metrics
                    figures |= {
                        f"eval/{name}/{metric}": value
                        for metric, value in metrics.items()
                        if isinstance(value, float)
                    }
        finally:
            for module, training in modes:
                module.training = training
        return figures
