"""`TokenBatch`: cells as the model reads them, right-padded to the longest of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences of some cells.

    Attributes
    ----------
    input_ids
        int64 (n_cells, length): token ids, `<pad>` on the right.
    values
        float32 (n_cells, length): the expression value of each gene token, 0 at special tokens and pads.
    lengths
        int64 (n_cells): tokens of each cell, special ones included.
    cell_index
        int64 (n_cells): global row of each cell in the store.
    has_padding
        Whether any cell is shorter than the batch; known on the host, so the model need not ask the device.
    """

    input_ids: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    cell_index: torch.Tensor
    has_padding: bool

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> torch.Tensor:
        """bool (n_cells, length): True at real tokens. Position 0 of an empty cell counts as real."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < self.lengths.clamp(min=1)[:, None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """Copy to a device."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device, non_blocking=non_blocking)
                for name in ("input_ids", "values", "lengths", "cell_index")
            },
        )
