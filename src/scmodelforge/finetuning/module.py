"""The Lightning module of fine-tuning: a head on cell embeddings, and a backbone that may be frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from scmodelforge.models.bundle import Labels, ModelBundle
from scmodelforge.models.flops import TRAINING_OVER_FORWARD, encoding_flops
from scmodelforge.models.objectives.batch import LossTerm
from scmodelforge.tokenizers.batch import DeviceBatch, TokenBatch
from scmodelforge.training.module import TrainingModule
from scmodelforge.training.optim import parameter_groups


@dataclass(frozen=True)
class LabelledBatch(DeviceBatch):
    """Tokens with the label of each cell.

    Attributes
    ----------
    tokens
        What the model reads.
    targets
        int64 (n_cells) class numbers, or float32 (n_cells) standardized values.
    n_tokens
        Real tokens in the batch.
    seed
        Seed of the randomness inside the model (dropout) at this step.
    """

    tokens: TokenBatch
    targets: torch.Tensor
    n_tokens: int
    seed: int


def validation_metrics(labels: Labels) -> MetricCollection:
    """Accuracy and macro F1, or mean absolute error and R² of the standardized label."""
    if labels.task == "classification":
        n_classes = len(labels.classes)
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(n_classes, average="micro"),
                "macro_f1": MulticlassF1Score(n_classes, average="macro"),
            },
            prefix="val_",
        )
    return MetricCollection({"mae": MeanAbsoluteError(), "r2": R2Score()}, prefix="val_")


class FinetuningModule(TrainingModule):
    """Classification or regression on cell embeddings, with a learning rate each for backbone and head."""

    def __init__(self, bundle: ModelBundle) -> None:
        super().__init__(bundle, bundle.config.training)
        assert bundle.head is not None
        assert bundle.labels is not None
        self.head = bundle.head
        self.labels = bundle.labels
        self.finetune = bundle.config.finetune
        self.frozen = self.finetune.freeze_backbone
        self.metrics = validation_metrics(bundle.labels)

    def parameter_groups(self) -> list[dict]:
        """Backbone groups, then head groups. A backbone that unfreezes later is in from the start."""
        optimizer = self.training_config.optimizer
        backbone = parameter_groups([self.model], self.finetune.backbone_lr or optimizer.lr, optimizer)
        return backbone + parameter_groups([self.head], self.finetune.head_lr or optimizer.lr, optimizer)

    def forward(self, tokens: TokenBatch) -> torch.Tensor:
        """Outputs of the head, float (n_cells, n_outputs). A frozen backbone runs without dropout."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            embedding = self.model.encode(tokens)
        return self.head(embedding)

    def flops(self, batch: LabelledBatch) -> torch.Tensor:
        """Of the backbone; the head is nothing beside it. Adapters spare the gradients of the weights."""
        passes = 1 if self.frozen else 2 if self.finetune.lora.enabled else TRAINING_OVER_FORWARD
        return passes * encoding_flops(self.model, batch.tokens.lengths.double())

    def _update_frozen(self) -> None:
        head_only_epochs = self.finetune.freeze_backbone_epochs
        self.frozen = self.finetune.freeze_backbone or self.current_epoch < head_only_epochs
        self.model.train(not self.frozen)

    def on_train_start(self) -> None:
        self._update_frozen()  # a run that resumes within an epoch has no epoch start

    def on_train_epoch_start(self) -> None:
        self._update_frozen()

    def _loss(self, outputs: torch.Tensor, batch: LabelledBatch) -> LossTerm:
        if self.labels.task == "classification":
            total = F.cross_entropy(outputs.float(), batch.targets, reduction="sum")
        else:
            total = F.mse_loss(outputs[:, 0].float(), batch.targets, reduction="sum")
        return LossTerm(total, len(batch.targets))

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> torch.Tensor:
        return self.shared_loss({"label": self._loss(self(batch.tokens), batch)}, batch.n_tokens)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        outputs = self(batch.tokens).float()
        self.metrics.update(outputs if self.labels.task == "classification" else outputs[:, 0], batch.targets)
        self.log_dict(self.metrics, on_epoch=True, batch_size=batch.tokens.n_cells)
        loss = self._loss(outputs, batch).mean
        self.log(
            "val_loss", loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=batch.tokens.n_cells
        )
