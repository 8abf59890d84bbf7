"""The Lightning module of fine-tuning: a head on cell embeddings, and a backbone that may be frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from lightning import Trainer
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from scmodelforge.data.batch import REPEAT
from scmodelforge.finetuning.frozen import CellEmbeddings, frozen_epochs
from scmodelforge.models.bundle import Labels, ModelBundle
from scmodelforge.models.flops import TRAINING_OVER_FORWARD, encoding_flops
from scmodelforge.models.objectives.batch import LossTerm
from scmodelforge.tokenizers.batch import DeviceBatch
from scmodelforge.tokenizers.packed import PackedTokens
from scmodelforge.training.module import TrainingModule
from scmodelforge.training.optim import parameter_groups


@dataclass(frozen=True)
class EmbeddedCells(DeviceBatch):
    """What a frozen backbone made of the tokens of some cells, in their place.

    Attributes
    ----------
    vectors
        float32 (n_cells, hidden_dim): cell embeddings.
    """

    vectors: torch.Tensor

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.vectors)


@dataclass(frozen=True)
class LabelledBatch(DeviceBatch):
    """Tokens, or the embeddings that a frozen backbone made of them, with the label of each cell.

    Attributes
    ----------
    tokens
        What the model reads, or has read.
    targets
        int64 (n_cells) class numbers, or float32 (n_cells) standardized values.
    n_tokens
        Real tokens in the batch; 0 where they were read before.
    seed
        Seed of the randomness inside the model (dropout) at this step.
    """

    tokens: PackedTokens | EmbeddedCells
    targets: torch.Tensor
    n_tokens: int
    seed: int

    @property
    def n_padding(self) -> int:
        """Places without a token."""
        return self.tokens.n_padding if isinstance(self.tokens, PackedTokens) else 0


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
    """Classification or regression on cell embeddings, with a learning rate each for backbone and head.

    Parameters
    ----------
    bundle
        Model and head.
    embed
        Embeds all cells for the frozen epochs; None: the backbone reads them in each epoch.
    scale_rows
        int64: cells whose embeddings give the head its scale, where that is not done yet; only with `embed`.

    Attributes
    ----------
    frozen
        Whether the backbone does not train in this epoch.
    embedded
        While it is frozen, the embeddings of all cells, where they are computed once.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        embed: Callable[[Trainer], CellEmbeddings] | None = None,
        scale_rows: np.ndarray | None = None,
    ) -> None:
        super().__init__(bundle, bundle.config.training)
        assert bundle.head is not None
        assert bundle.labels is not None
        self.head = bundle.head
        self.labels = bundle.labels
        self.finetune = bundle.config.finetune
        self.frozen_epochs = frozen_epochs(bundle.config)
        self.frozen = self.frozen_epochs > 0
        self.embed = embed
        self.scale_rows = scale_rows
        self.embedded: CellEmbeddings | None = None
        self.metrics = validation_metrics(bundle.labels)

    def parameter_groups(self) -> list[dict]:
        """Backbone groups, then head groups. A backbone that unfreezes later is in from the start."""
        optimizer = self.training_config.optimizer
        backbone = parameter_groups([self.model], self.finetune.backbone_lr or optimizer.lr, optimizer)
        return backbone + parameter_groups([self.head], self.finetune.head_lr or optimizer.lr, optimizer)

    def forward(self, tokens: PackedTokens | EmbeddedCells) -> torch.Tensor:
        """Outputs of the head, float (n_cells, n_outputs). A frozen backbone runs without dropout."""
        if isinstance(tokens, EmbeddedCells):
            return self.head(tokens.vectors)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            embedding = self.model.encode(tokens)
        return self.head(embedding)

    def flops(self, batch: LabelledBatch) -> torch.Tensor:
        """Of the backbone; the head is nothing beside it. Adapters spare the gradients of the weights."""
        if isinstance(batch.tokens, EmbeddedCells):
            return torch.zeros((), dtype=torch.float64, device=batch.targets.device)
        passes = 1 if self.frozen else 2 if self.finetune.lora.enabled else TRAINING_OVER_FORWARD
        return passes * encoding_flops(self.model, batch.tokens.lengths.double())

    def embedded_batch(self, values: np.ndarray, cell_index: np.ndarray, seed: int) -> LabelledBatch | None:
        """The batch of some cells, with targets out of the `values` of all, while their embeddings are known."""
        embedded = self.embedded
        if embedded is None:
            return None
        rows = cell_index & (REPEAT - 1)
        return LabelledBatch(EmbeddedCells(embedded.of(rows)), torch.from_numpy(values[rows]), 0, seed)

    def on_fit_start(self) -> None:
        """Embed, before the clock of throughput runs and before Ctrl-C waits for the end of a step."""
        epoch = self.trainer.datamodule.state_dict()["epoch"]  # type: ignore[attr-defined]
        if self.embed is None or epoch >= self.frozen_epochs:
            return
        self.embedded = self.embed(self.trainer)
        self.model.train()  # Lightning warns of models that begin in evaluation mode
        if self.scale_rows is not None:
            self.head.fit_scale(self.embedded.of(self.scale_rows))

    def _update_frozen(self) -> None:
        self.frozen = self.current_epoch < self.frozen_epochs
        self.model.train(not self.frozen)
        if not self.frozen:
            self.embedded = None

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
        self.log("val_loss", loss, on_epoch=True, sync_dist=True, batch_size=batch.tokens.n_cells)
