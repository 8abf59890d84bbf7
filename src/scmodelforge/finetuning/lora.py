"""Low-rank adapters through peft, on q, k, v, out and both feed-forward layers of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from scmodelforge.config import LoraConfig

if TYPE_CHECKING:
    from peft import LoraModel

TARGETS = r"transformer\.blocks\..*\.(q|k|v|out|fc1|fc2)"  # not the decoder of a masked autoencoder


def add_lora(model: nn.Module, config: LoraConfig) -> LoraModel:
    """Put adapters into `model`, in place, and freeze everything else in it.

    Returns
    -------
    peft's `LoraModel` around the same layers; its `merge_and_unload()` gives the plain model back.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number; the scale is alpha / rank
        lora_dropout=config.dropout,
        target_modules=TARGETS,
        init_lora_weights=True,
    )
    return peft.LoraModel(model, settings, "default")


def trainable_share(*modules: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters of some modules."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
