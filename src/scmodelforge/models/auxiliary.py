"""Auxiliary losses on the cell embedding, and their heads (scGPT): MVC, ECS, DAB."""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import LossTerm, TrainingBatch


class AuxiliaryHeads(nn.Module):
    """Placeholder until the heads are here."""

    @classmethod
    def build(cls, config: Config, vocab: GeneVocab) -> AuxiliaryHeads | None:
        """The heads that the config asks for; None if there are none."""
        return None

    def terms(self, cells: torch.Tensor, genes: torch.Tensor, batch: TrainingBatch) -> dict[str, LossTerm]:
        """Loss terms."""
        raise NotImplementedError
