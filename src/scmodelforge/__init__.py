"""scModelForge: pretrain, fine-tune and evaluate single-cell foundation models.

The public names are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from scmodelforge.config import Config as Config
    from scmodelforge.config_io import load_config as load_config
    from scmodelforge.data.check import check as check
    from scmodelforge.errors import UserError as UserError
    from scmodelforge.evaluation.harness import benchmark as benchmark
    from scmodelforge.evaluation.perturbation_metrics import score_perturbations as score_perturbations
    from scmodelforge.finetuning.run import finetune as finetune
    from scmodelforge.genes.vocab import GeneVocab as GeneVocab
    from scmodelforge.inference import annotate as annotate
    from scmodelforge.inference import embed as embed
    from scmodelforge.inference import tokens as tokens
    from scmodelforge.inference_genes import attention as attention
    from scmodelforge.inference_genes import gene_embeddings as gene_embeddings
    from scmodelforge.models.bundle import ModelBundle as ModelBundle
    from scmodelforge.models.bundle import load_model as load_model
    from scmodelforge.models.bundle import save_bundle as save_bundle
    from scmodelforge.models.hub import pull as pull
    from scmodelforge.models.hub import push as push
    from scmodelforge.models.published import export_model as export_model
    from scmodelforge.models.published import import_model as import_model
    from scmodelforge.perturbation.run import perturb as perturb
    from scmodelforge.report.benchmark_page import write_benchmark_report as write_benchmark_report
    from scmodelforge.report.comparison import compare as compare
    from scmodelforge.report.run_page import write_report as write_report
    from scmodelforge.training.run import train as train


__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "GeneVocab": "genes.vocab",
    "ModelBundle": "models.bundle",
    "UserError": "errors",
    "annotate": "inference",
    "attention": "inference_genes",
    "benchmark": "evaluation.harness",
    "check": "data.check",
    "compare": "report.comparison",
    "embed": "inference",
    "export_model": "models.published",
    "finetune": "finetuning.run",
    "gene_embeddings": "inference_genes",
    "import_model": "models.published",
    "load_config": "config_io",
    "load_model": "models.bundle",
    "pull": "models.hub",
    "push": "models.hub",
    "perturb": "perturbation.run",
    "save_bundle": "models.bundle",
    "score_perturbations": "evaluation.perturbation_metrics",
    "tokens": "inference",
    "train": "training.run",
    "write_benchmark_report": "report.benchmark_page",
    "write_report": "report.run_page",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scmodelforge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"scmodelforge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
