"""`training.optimizer.name: muon`: Muon for the matrices of the blocks, AdamW for all else, as one optimizer.

Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it steps, which means something for the
matrices between hidden states only: embeddings, heads, norms and biases stay with AdamW. Steps are scaled to the size
that AdamW's have (Liu et al. 2025), so one learning rate and weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from scmodelforge.config_training import OptimizerConfig


class MuonAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers behind the interface of one; parameter groups and state are theirs.

    Parameters
    ----------
    matrices
        Groups whose parameters have two dimensions, for Muon.
    others
        Groups for AdamW.
    config
        betas and eps of AdamW.
    """

    def __init__(self, matrices: list[dict], others: list[dict], config: OptimizerConfig) -> None:
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw") if matrices else None
        self.adamw = (
            torch.optim.AdamW(others, betas=config.betas, eps=config.eps, fused=True) if others else None
        )
        self.parts = [part for part in (self.muon, self.adamw) if part is not None]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state of the whole, which schedulers and checkpoints see."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state, start = self.param_groups[start:end], self.state, end

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; `closure` computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch; groups and state are new objects then, so the parts get them again."""
        super().load_state_dict(state_dict)
        self._share()
