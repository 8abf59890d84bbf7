"""`TokenBatch`: cells as the model reads them, right-padded to the longest of the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences of some cells.

    Attributes
    ----------
    input_ids
        int64 (n_cells, length): token ids, `<pad>` on the right.
    values
        float32 (n_cells, length): the expression value of each gene token; 0 at special tokens (`<cls>`:
        `tokenizer.cls_value`) and pads.
    lengths
        int64 (n_cells): tokens of each cell, special ones included.
    cell_index
        int64 (n_cells): global row of each cell in the store.
    has_padding
        Whether any cell is shorter than the batch; known on the host, so the model need not ask the device.
    obs
        int64 (n_cells, n_columns): category of each cell in each column of `GeneVocab.obs_categories`, counted
        from 1; 0 is unknown. None if the vocabulary has no such column.
    bin_edges
        float32 (n_cells, n_bins - 1): the quantiles between the bins of `binned_expression`; else None.
    left_out
        int64 (n_cells, n), `<pad>` on the right: genes with a count that did not fit into `tokenizer.max_genes`
        (of `binned_expression` and `continuous_projection`); None if all fit.
    """

    input_ids: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    cell_index: torch.Tensor
    has_padding: bool
    obs: torch.Tensor | None = None
    bin_edges: torch.Tensor | None = None
    left_out: torch.Tensor | None = None

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
        return replace(self, **tensors_to(self, device, non_blocking))


def tensors_to(batch: object, device: torch.device | str, non_blocking: bool = False) -> dict[str, Any]:
    """Return the fields of a batch that live on a device (tensors and batches), copied there."""
    return {
        field.name: value.to(device, non_blocking=non_blocking)
        for field in fields(batch)  # type: ignore[arg-type]
        if isinstance(value := getattr(batch, field.name), torch.Tensor | TokenBatch)
    }
