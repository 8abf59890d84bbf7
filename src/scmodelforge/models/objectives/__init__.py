"""Pretraining tasks: what is hidden, what is asked, the loss and the metrics.

A task is a function of tokens and a key, so the same cell in the same epoch is hidden the same way whatever
batch, worker or machine it comes to. Predictions are made at the asked positions only.
"""

from __future__ import annotations

from scmodelforge import registry
from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import Objective
from scmodelforge.models.objectives.masked import MaskedPrediction


def build_objective(config: Config, vocab: GeneVocab) -> Objective:
    """The task of a config, in the form that fits its architecture; a plugin's is made as it is."""
    name = config.model.pretraining_task
    if registry.TASKS.plugin(name) is not None:
        return registry.TASKS.load(name)(config, vocab)
    architecture, task = config.model.architecture_like, config.model.task_like
    if architecture == "transformer_encoder":
        return MaskedPrediction(config, vocab)
    if architecture == "masked_autoencoder":
        from scmodelforge.models.objectives.reconstruction import MaskedReconstruction

        return MaskedReconstruction(config, vocab)
    if task == "expression_reconstruction":
        from scmodelforge.models.objectives.generation import ExpressionGeneration

        return ExpressionGeneration(config, vocab)
    from scmodelforge.models.objectives.next_gene import NextGene

    return NextGene(config, vocab)
