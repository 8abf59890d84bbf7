"""`robust_reconstruction`: tell hidden values, with a loss that is linear far from the truth (Huber 1964)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field
from torch.nn import functional as F

from scmodelforge.config import Config, Section
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import LossTerm, ModelOutput, PackedBatch, TrainingBatch
from scmodelforge.models.objectives.masked import MaskedPrediction


class HuberParams(Section):
    """`model.task_params` of a config with pretraining_task robust_reconstruction."""

    delta: float = Field(1.0, gt=0, description="Error from which on the loss is linear.")


class RobustReconstruction(MaskedPrediction):
    """What is hidden, asked and counted is as in expression_reconstruction."""

    like = "expression_reconstruction"
    Params = HuberParams

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        assert isinstance(config.model.task_params, HuberParams)
        self.delta = config.model.task_params.delta

    @staticmethod
    def misfit(config: Config) -> str:
        """Why it does not work with this config; "" if it does."""
        if config.model.architecture_like != "transformer_encoder":
            return "it is written for models that are like a transformer_encoder: set model.architecture"
        if config.value_loss != "mse" or config.model.objective.zero_probability:
            return "it has a loss of its own: leave out value_loss and zero_probability of model.objective"
        return ""

    def __call__(self, model: Any, batch: TrainingBatch | PackedBatch) -> ModelOutput:
        """Predictions and loss terms."""
        batch = self.pack(batch)
        output = super().__call__(model, batch)
        assert output.expression is not None
        asked = batch.genes != self.vocab.pad_id
        losses = F.huber_loss(
            output.expression[:, 0].float(), batch.values, reduction="none", delta=self.delta
        )
        term = LossTerm((losses * asked).sum(), asked.sum(), self.config.model.objective.value_weight)
        return replace(output, terms=output.terms | {"expression": term})
