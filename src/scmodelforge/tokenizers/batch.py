"""`TokenBatch`: cells as the model reads them, right-padded to the longest of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

import numpy as np
import torch

from scmodelforge.data.batch import MeasuredGenes
from scmodelforge.tokenizers.kernels import count_kept, move_left


class DeviceBatch:
    """A frozen dataclass of tensors, and of such batches, that moves to a device as one."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy into pinned memory (torch keeps and reuses it), from which a GPU takes it while it computes."""
        return self._each(lambda part: part.pin_memory())

    def arriving(self, device: torch.device) -> Self:
        """Copy to a device; to a GPU, from pinned memory, while it computes what it was asked for before."""
        if device.type != "cuda":
            return self.to(device)
        computing = torch.cuda.current_stream(device)
        copying = _copying_stream(computing.device)
        with torch.cuda.stream(copying):
            copy = self.to(device, non_blocking=True)
        computing.wait_stream(copying)
        copy.record_stream(computing)
        return copy

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As `Tensor.record_stream`: the memory is not used again before `stream` has done its work on it."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _each(self, change: Callable[[Any], Any]) -> Self:
        changed = {name: change(part) for name, part in self._parts().items()}
        return replace(self, **changed)  # type: ignore[type-var]

    def _parts(self) -> dict[str, Any]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor | DeviceBatch)}


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class TokenBatch(DeviceBatch):
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
    measured
        As in `CellBatch`, on the host, for tasks that ask about genes without a count.
    """

    input_ids: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    cell_index: torch.Tensor
    has_padding: bool
    obs: torch.Tensor | None = None
    bin_edges: torch.Tensor | None = None
    left_out: torch.Tensor | None = None
    measured: MeasuredGenes | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> torch.Tensor:
        """bool (n_cells, length): True at real tokens. Position 0 of an empty cell counts as real."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < self.lengths.clamp(min=1)[:, None]


def keep_tokens(tokens: TokenBatch, kept: np.ndarray, pad_id: int) -> TokenBatch:
    """`tokens` on the CPU with only the real ones where `kept` (bool (n_cells, length)), moved to the left."""
    lengths, length = np.empty(tokens.n_cells, dtype=np.int64), count_kept(kept, tokens.lengths.numpy())
    ids = np.empty((tokens.n_cells, max(length, 1)), dtype=np.int64)
    values = np.empty(ids.shape, dtype=np.float32)
    move_left(
        tokens.input_ids.numpy(),
        tokens.values.numpy(),
        tokens.lengths.numpy(),
        kept,
        pad_id,
        ids,
        values,
        lengths,
    )
    return replace(
        tokens,
        input_ids=torch.from_numpy(ids),
        values=torch.from_numpy(values),
        lengths=torch.from_numpy(lengths),
        has_padding=bool((lengths < ids.shape[1]).any()),
        left_out=None,
        measured=None,
    )
