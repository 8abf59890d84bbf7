"""Parameter groups and learning-rate schedules; the schedule is as long as the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from scmodelforge.config_training import OptimizerConfig, SchedulerConfig, TrainingConfig
from scmodelforge.models.transformer import Block
from scmodelforge.training.muon import MuonAdamW

log = logging.getLogger(__name__)

DEFAULT_WARMUP_STEPS = 2_000
WARMUP_SHARE = 10  # a warm-up takes at most a tenth of the run


def parameter_groups(modules: Sequence[nn.Module], lr: float, config: OptimizerConfig) -> list[dict]:
    """Split trainable parameters into those that decay and those that do not; with muon also by their optimizer.

    Biases, norms and (unless `decay_embeddings`) embedding tables do not decay. Every trainable parameter is
    in exactly one group; empty groups are left out. Groups with `muon` true hold the matrices of the blocks.
    """
    blocks = [part for root in modules for part in root.modules() if isinstance(part, Block)]
    in_blocks = {id(part) for block in blocks for part in block.modules()} if config.name == "muon" else set()
    matrices: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                is_embedding = isinstance(module, nn.Embedding)
                is_matrix = isinstance(module, nn.Linear) and name != "bias"
                decays = is_matrix or (is_embedding and config.decay_embeddings)
                of_muon = is_matrix and id(module) in in_blocks
                (matrices if of_muon else decay if decays else keep).append(parameter)
    groups = [
        {"params": matrices, "lr": lr, "weight_decay": config.weight_decay, "muon": True},
        {"params": decay, "lr": lr, "weight_decay": config.weight_decay},
        {"params": keep, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict], config: OptimizerConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer over the groups of `parameter_groups`.

    `fused` updates all parameters in one compiled loop, six times as fast on a CPU. Where losses are scaled (precision
    16-mixed) a fused optimizer takes the scale out by itself, after gradients were clipped: not to be used there.
    """
    if config.name == "muon":
        matrices = [group for group in groups if group.get("muon")]
        others = [group for group in groups if not group.get("muon")]
        return MuonAdamW(matrices, others, config)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def total_steps(training: TrainingConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a whole run; the last step of an epoch may accumulate fewer batches.

    Lightning's own estimate would create the loaders before a resumed run has restored their state.
    """
    total = training.max_epochs * math.ceil(batches_per_epoch / training.accumulate_grad_batches)
    return min(total, training.max_steps or total)


def resolve_warmup(config: SchedulerConfig, total_steps: int) -> int:
    """Warm-up steps of a run; one longer than a tenth of the run is shortened, and said."""
    longest = total_steps // WARMUP_SHARE
    if config.warmup_steps is None:
        return min(DEFAULT_WARMUP_STEPS, longest) if config.name == "cosine_warmup" else 0
    if config.warmup_steps > longest:
        log.warning(
            "training.scheduler.warmup_steps is %s, but this run has %s steps: shortened to a tenth of it, %s.",
            f"{config.warmup_steps:,}",
            f"{total_steps:,}",
            f"{longest:,}",
        )
    return min(config.warmup_steps, longest)


def schedule(config: SchedulerConfig, total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up to 1, then the decay, which ends with the run."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        if config.name == "constant":
            return 1.0
        decay = 1 - progress if config.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay

    return factor
