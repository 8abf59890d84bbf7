"""What a config may name: tokenizers, architectures, tasks, benchmarks, and where each one lives.

A name maps to "module:attribute" and is imported when it is used, so reading a config loads no torch.
To add one, write the class and add its line here.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing, and the import path of each."""

    kind: str
    entries: dict[str, str]

    def check(self, name: str) -> str:
        """Return `name` if it is known; raise `ValueError` naming what there is otherwise."""
        if name in self.entries:
            return name
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"the {self.kind} '{name}' does not exist in this version.{hint} "
            f"Available: {', '.join(sorted(self.entries))}"
        )

    def load(self, name: str) -> Any:
        """Import and return what `name` stands for."""
        module, attribute = self.entries[self.check(name)].split(":")
        return getattr(importlib.import_module(module), attribute)


TOKENIZERS = Registry(
    "tokenizer strategy",
    {
        "rank_value": "scmodelforge.tokenizers.rank_value:RankValueTokenizer",
        "binned_expression": "scmodelforge.tokenizers.binned_expression:BinnedExpressionTokenizer",
        "continuous_projection": "scmodelforge.tokenizers.continuous_projection:ContinuousTokenizer",
    },
)
ARCHITECTURES = Registry(
    "model architecture",
    {
        "transformer_encoder": "scmodelforge.models.encoder:TransformerEncoder",
        "autoregressive_transformer": "scmodelforge.models.autoregressive:autoregressive_transformer",
        "masked_autoencoder": "scmodelforge.models.masked_autoencoder:MaskedAutoencoder",
    },
)
TASKS = Registry(
    "pretraining task",
    dict.fromkeys(
        ("masked_gene_prediction", "expression_reconstruction", "dual_prediction", "next_gene"),
        "scmodelforge.models.objectives:build_objective",
    ),
)
BENCHMARKS = Registry(
    "benchmark",
    {
        "linear_probe": "scmodelforge.evaluation.linear_probe:linear_probe",
        "embedding_quality": "scmodelforge.evaluation.embedding_quality:embedding_quality",
        "perturbation": "scmodelforge.evaluation.perturbation:perturbation",
        "masked_prediction": "scmodelforge.evaluation.masked_prediction:masked_prediction",
        "gene_embedding": "scmodelforge.evaluation.gene_embedding:gene_embedding",
    },
)
