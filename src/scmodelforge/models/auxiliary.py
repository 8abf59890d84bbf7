"""Auxiliary losses on the cell embedding, and their heads (scGPT): MVC, ECS, DAB.

- `cell_expression` (MVC; GEPC in fine-tuning): tell the asked values from the cell embedding and the gene alone;
- `ecs` (elastic cell similarity): cells that are more alike than a threshold get more alike, others less;
- `batch` (domain adaptation by back-propagation): a classifier learns the cell's batch, and the reversed gradient
  takes the batch out of the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.objectives.batch import LossTerm, PackedBatch


class CellExpressionHead(nn.Module):
    """Value of a gene from the cell embedding c and the gene vector g: (W · sigmoid(Q g + b)) · c.

    With `zero_probability` a second matrix, with a bias, gives the logit of being more than zero the same way. With
    `batch_labels` c is the cell embedding and the vector of the cell's batch, one after the other.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, objective = config.model.hidden_dim, config.model.objective
        n_inputs = width * (1 + objective.batch_labels)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, n_inputs, bias=False)
        self.nonzero = nn.Linear(width, n_inputs) if objective.zero_probability else None

    def forward(self, cells: torch.Tensor, genes: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """Cells (n_cells, n_inputs), gene vectors (m, width) of cells `cell` (int64 m) → (m, 1 or 2)."""
        query = torch.sigmoid(self.query(genes))
        heads = [self.value] if self.nonzero is None else [self.value, self.nonzero]
        asked = cells[cell]
        return torch.stack([(head(query) * asked).sum(dim=1) for head in heads], dim=1)


class ReversedGradient(torch.autograd.Function):
    """The identity, whose gradient has the other sign (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


class BatchClassifier(nn.Module):
    """Names the batch of a cell, behind a reversed gradient: twice Linear → LeakyReLU → LayerNorm, then Linear."""

    def __init__(self, config: Config, n_batches: int) -> None:
        super().__init__()
        width, eps = config.model.hidden_dim, config.model.layer_norm_eps
        self.layers = nn.Sequential(
            nn.Linear(width, width),
            nn.LeakyReLU(),
            nn.LayerNorm(width, eps=eps),
            nn.Linear(width, width),
            nn.LeakyReLU(),
            nn.LayerNorm(width, eps=eps),
        )
        self.out = nn.Linear(width, n_batches)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """(n_cells, width) → logits (n_cells, n_batches)."""
        return self.out(self.layers(ReversedGradient.apply(cells)))


class AuxiliaryHeads(nn.Module):
    """The heads whose losses have a weight in `model.objective`, and the losses.

    Attributes
    ----------
    cell_expression
        None without cell_weight.
    batch
        None without batch_weight.
    """

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__()
        self.objective, self.pad_id = config.model.objective, vocab.pad_id
        objective = self.objective
        self.cell_expression = CellExpressionHead(config) if objective.cell_weight else None
        self.batch: BatchClassifier | None = None
        if objective.batch_weight and objective.batch_key is not None:
            self.batch_place = list(vocab.obs_categories).index(objective.batch_key)
            self.batch = BatchClassifier(config, len(vocab.obs_categories[objective.batch_key]))

    @classmethod
    def build(cls, config: Config, vocab: GeneVocab) -> AuxiliaryHeads | None:
        """The heads that the config asks for; None if it asks for no auxiliary loss."""
        objective = config.model.objective
        wanted = objective.cell_weight or objective.ecs_weight or objective.batch_weight
        return cls(config, vocab) if wanted else None

    def terms(
        self,
        cells: torch.Tensor,
        genes: torch.Tensor,
        batch: PackedBatch,
        batch_vectors: torch.Tensor | None = None,
    ) -> dict[str, LossTerm]:
        """Loss terms by name.

        Parameters
        ----------
        cells
            float (n_cells, width): cell embeddings, not normalized.
        genes
            float (m, width): vectors of the asked genes, without value.
        batch
            What is asked, and the batch of each cell in `batch.tokens.obs`; an unknown batch counts nowhere.
        batch_vectors
            float (n_cells, width): vector of each cell's batch, with `batch_labels`.
        """
        terms: dict[str, LossTerm] = {}
        if self.cell_expression is not None:
            terms |= self._cell_expression(cells, genes, batch, batch_vectors)
        if self.objective.ecs_weight:
            terms["ecs"] = self._similarity(cells)
        if self.batch is not None:
            assert batch.tokens.obs is not None
            labels = batch.tokens.obs[:, self.batch_place] - 1  # 0 is unknown
            total = F.cross_entropy(self.batch(cells).float(), labels, ignore_index=-1, reduction="sum")
            terms["batch"] = LossTerm(total, (labels >= 0).sum(), self.objective.batch_weight)
        return terms

    def _cell_expression(
        self,
        cells: torch.Tensor,
        genes: torch.Tensor,
        batch: PackedBatch,
        batch_vectors: torch.Tensor | None,
    ) -> dict[str, LossTerm]:
        assert self.cell_expression is not None
        given = cells if batch_vectors is None else torch.cat([cells, batch_vectors], dim=1)
        outputs = self.cell_expression(given, genes, batch.cell).float()
        asked, weight = batch.genes != self.pad_id, self.objective.cell_weight
        count = asked.sum()
        losses = (outputs[:, 0] - batch.values).square()
        terms = {"cell_expression": LossTerm((losses * asked).sum(), count, weight)}
        if self.cell_expression.nonzero is not None:
            more = (batch.values > 0).float()
            losses = F.binary_cross_entropy_with_logits(outputs[:, 1], more, reduction="none")
            terms["cell_nonzero"] = LossTerm((losses * asked).sum(), count, weight)
        return terms

    def _similarity(self, cells: torch.Tensor) -> LossTerm:
        """Mean over all pairs, those of a cell with itself as 0, of 1 - (relu(cos) - threshold)²."""
        normed = F.normalize(cells.float(), dim=1)
        cosine = (normed @ normed.T).fill_diagonal_(0.0).relu()
        loss = 1 - (cosine - self.objective.ecs_threshold).square()
        return LossTerm(loss.sum(), loss.numel(), self.objective.ecs_weight)
