"""`training.strategy: fsdp`: weights, gradients and optimizer state are divided over the processes (FSDP2).

Each process keeps its share of every tensor and gathers a block's weights when it computes the block (Zhao et al.
2023; torch's `fully_shard`). What is computed is what DDP computes; it takes less memory and more communication.
Checkpoints hold whole tensors, so that one process can load them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from scmodelforge.models.transformer import Block


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, with one file a checkpoint, which is never unpickled."""

    def __init__(self, n_processes: int) -> None:
        super().__init__(
            data_parallel_size=n_processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read with `weights_only=True`, whatever was asked."""
        return super().load_checkpoint(checkpoint_path, weights_only=True)


def shard(module: LightningModule, strategy: ShardedStrategy) -> None:
    """Divide the parameters of `module` over the processes: each block by itself, and the rest together.

    The rest (embeddings, heads) is gathered at the start of a training or validation step, because tasks use it
    outside of the model's `forward`.
    """
    mesh = strategy.device_mesh["data_parallel"]
    for part in module.modules():
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, step)
