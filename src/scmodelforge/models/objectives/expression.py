"""Losses of expression values, and the value that a prediction stands for."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.models.objectives.batch import LossTerm


def expression_terms(
    config: Config, outputs: torch.Tensor, values: torch.Tensor, asked: torch.Tensor
) -> dict[str, LossTerm]:
    """Loss terms of the outputs (m, n_outputs) of an `ExpressionHead` for the true values (m).

    "expression" is the squared error, or the cross-entropy over bins. With `zero_probability` there is also
    "nonzero", the negative log-likelihood of being more than zero or not (scGPT). Only what is `asked` (bool m) counts.
    """
    objective = config.model.objective
    outputs, terms, count = outputs.float(), {}, asked.sum()
    if objective.zero_probability:
        logit, outputs = outputs[:, -1], outputs[:, :-1]
        losses = F.binary_cross_entropy_with_logits(logit, (values > 0).float(), reduction="none")
        terms["nonzero"] = LossTerm((losses * asked).sum(), count, objective.value_weight)
    if config.value_loss == "cross_entropy":
        losses = F.cross_entropy(outputs, values.long(), reduction="none")
    else:
        losses = (outputs[:, 0] - values).square()
    return {"expression": LossTerm((losses * asked).sum(), count, objective.value_weight)} | terms


def predicted_values(config: Config, outputs: torch.Tensor) -> torch.Tensor:
    """The values (m) that outputs (m, n_outputs) stand for.

    The number itself (0 where `zero_probability` gives zero the better odds), or the most likely bin.
    """
    outputs = outputs.float()
    nonzero = None
    if config.model.objective.zero_probability:
        nonzero, outputs = outputs[:, -1] > 0, outputs[:, :-1]
    values = outputs.argmax(dim=1).float() if config.value_loss == "cross_entropy" else outputs[:, 0]
    return values if nonzero is None else torch.where(nonzero, values, 0.0)
