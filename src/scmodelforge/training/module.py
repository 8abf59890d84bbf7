"""The Lightning module of pretraining: loss, metrics, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import nn
from torch.distributed.tensor import DTensor

from scmodelforge.config import TrainingConfig
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import CHECKPOINT_KEY, TRAINING_CELLS, ModelBundle
from scmodelforge.models.flops import training_flops
from scmodelforge.models.objectives.batch import LossTerm, Objective, PackedBatch
from scmodelforge.models.transformer import Transformer
from scmodelforge.training.global_loss import global_loss
from scmodelforge.training.optim import (
    build_optimizer,
    parameter_groups,
    resolve_warmup,
    schedule,
    total_steps,
)
from scmodelforge.training.sharded import ShardedStrategy, shard


class TrainingModule(LightningModule):
    """What pretraining and fine-tuning share: optimizer, schedule, clipping, seeds, what a checkpoint holds.

    `start_seed` of a batch seeds dropout, so a step is a pure function of weights and (seed, epoch, step):
    a resumed run needs no generator state.
    """

    def __init__(self, bundle: ModelBundle, training: TrainingConfig) -> None:
        super().__init__()
        self.model = bundle.model
        self.training_config = training
        self.description = bundle.describe()
        for part in bundle.model.modules():
            if isinstance(part, Transformer):
                part.recomputes = training.activation_checkpointing
        self.gradient_norm: torch.Tensor | None = None

    def parameter_groups(self) -> list[dict]:
        """Optimizer groups; one learning rate for all."""
        return parameter_groups(
            [self.model], self.training_config.optimizer.lr, self.training_config.optimizer
        )

    def configure_model(self) -> None:
        """Divide the model over the processes, where that is the strategy."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            shard(self, self.trainer.strategy)

    def configure_optimizers(self) -> Any:
        fused = self.training_config.precision != "16-mixed"
        optimizer = build_optimizer(self.parameter_groups(), self.training_config.optimizer, fused)
        total = total_steps(self.training_config, self.trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]
        warmup = resolve_warmup(self.training_config.scheduler, total)
        factor = schedule(self.training_config.scheduler, total, warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by global norm, and keep the norm on the device for the log."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch.seed)

    def shared_loss(self, terms: Mapping[str, LossTerm], n_tokens: int) -> torch.Tensor:
        """This process's share of the loss over the cells of all; logs the loss of all and its terms."""
        loss = global_loss(terms, n_tokens)
        self.log("train_loss", loss.mean, batch_size=1)
        if len(terms) > 1:
            for name, mean in loss.terms.items():
                self.log(f"train_{name}_loss", mean, batch_size=1)
        if self.trainer.world_size > 1:
            self.log("token_imbalance", loss.token_imbalance, batch_size=1)
        return loss.share

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        earlier, now = self.description[TRAINING_CELLS], self.trainer.datamodule.store.recorder  # type: ignore[attr-defined]
        checkpoint[CHECKPOINT_KEY] = {**self.description, TRAINING_CELLS: [*earlier, now.to_plain()]}

    def flops(self, batch: Any) -> torch.Tensor:
        """FLOPs of a training step, float64 on the device of the batch (see `models/flops.py`)."""
        raise NotImplementedError

    def log_metrics(self, prefix: str, metrics: dict[str, float]) -> None:
        """Log figures that are already reduced over ranks, as PREFIX_NAME."""
        for name, value in metrics.items():
            self.log(f"{prefix}_{name}", value, rank_zero_only=True, batch_size=1)


def loss_terms(task: Objective, model: CellTransformer, batch: PackedBatch) -> dict[str, LossTerm]:
    """From tokens to loss terms by name: blocks, gather and losses, the region that is compiled."""
    return task(model, batch).terms


def any_number_of_cells(batch: PackedBatch) -> None:
    """Let the compiler take the number of cells for a variable at once: all else is the same in batches of a budget."""
    tokens = batch.tokens
    for x in (tokens.cu_seqlens, tokens.starts, tokens.lengths, tokens.cell_index, tokens.obs):
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)


class PretrainingModule(TrainingModule):
    """Pretraining on one task."""

    def __init__(self, bundle: ModelBundle, training: TrainingConfig, task: Objective) -> None:
        super().__init__(bundle, training)
        self.task = task
        self.loss_terms = torch.compile(loss_terms) if training.compile else loss_terms

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(len(self.task.sums), dtype=torch.float64, device=self.device)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        if self.training_config.compile:
            any_number_of_cells(batch)
        return self.shared_loss(self.loss_terms(self.task, self.model, batch), batch.n_tokens)

    def flops(self, batch: PackedBatch) -> torch.Tensor:
        lengths = batch.tokens.lengths.double()
        cell = batch.cell[: batch.n_asked]
        asked = torch.zeros_like(lengths).index_add_(0, cell, torch.ones_like(cell).double())
        return training_flops(self.model, lengths, asked)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self.sums += self.task.count(self.task(self.model, batch), batch)

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        self.log_metrics("val", self.task.metrics(sums))
