"""What fits together: tokenizer × architecture × pretraining task, in one table.

What is not in the table is refused, with the reason and the nearest combination that works.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from scmodelforge import registry

TOKENIZERS = ("rank_value", "binned_expression", "continuous_projection")
ARCHITECTURES = ("transformer_encoder", "autoregressive_transformer", "masked_autoencoder")
TASKS = ("masked_gene_prediction", "expression_reconstruction", "dual_prediction", "next_gene")


@dataclass(frozen=True)
class Combination:
    """One row of the table.

    Attributes
    ----------
    tokenizer, architecture, task
        Names as in a config.
    refusal
        Why they do not fit together; "" if they do.
    """

    tokenizer: str
    architecture: str
    task: str
    refusal: str

    @property
    def allowed(self) -> bool:
        """Whether the three work together."""
        return not self.refusal


def _refusal(tokenizer: str, architecture: str, task: str) -> str:
    if task == "masked_gene_prediction" and architecture == "autoregressive_transformer":
        return "a causal model reads no masked genes; it predicts the gene that comes next"
    if task == "next_gene" and architecture != "autoregressive_transformer":
        return "only a causal model has a next gene; this one sees the whole cell"
    if architecture == "masked_autoencoder" and task != "expression_reconstruction":
        return "its decoder is told which gene is asked, so it can only be asked for the value"
    if tokenizer == "rank_value" and task in ("expression_reconstruction", "dual_prediction"):
        return "the rank of a gene gives its value away, between those of its neighbours"
    return ""


TABLE: dict[tuple[str, str, str], Combination] = {
    names: Combination(*names, refusal=_refusal(*names))
    for names in product(TOKENIZERS, ARCHITECTURES, TASKS)
}


def nearest(tokenizer: str, architecture: str, task: str) -> Combination:
    """Return the allowed combination that shares most, architecture first, then tokenizer, then task."""

    def likeness(candidate: Combination) -> int:
        return (
            4 * (candidate.architecture == architecture)
            + 3 * (candidate.tokenizer == tokenizer)
            + 2 * (candidate.task == task)
        )

    return max((row for row in TABLE.values() if row.allowed), key=likeness)


def require_allowed(tokenizer: str, architecture: str, task: str) -> None:
    """Raise `ValueError` with the reason and the nearest combination that works, if the three do not fit.

    A plugin's name stands for the built-in that it is like.
    """
    kinds = (registry.TOKENIZERS, registry.ARCHITECTURES, registry.TASKS)
    names = [kind.like(name) for kind, name in zip(kinds, (tokenizer, architecture, task), strict=True)]
    row = TABLE[names[0], names[1], names[2]]
    if row.allowed:
        return
    near = nearest(*names)
    raise ValueError(
        f"tokenizer.strategy {tokenizer}, model.architecture {architecture} and model.pretraining_task {task} do "
        f"not fit together: {row.refusal}. Nearest that works: strategy {near.tokenizer}, architecture "
        f"{near.architecture}, pretraining_task {near.task} ('scmodelforge strategies' lists all)"
    )
