"""Which tokens of a packed batch read which (`Sequences`), and which of them are read at the end (`Queries`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Sequences:
    """Which tokens of a packed batch read which.

    Attributes
    ----------
    cu_seqlens
        int32 (n_sequences + 1): where each sequence begins, and the end of the last.
    max_length
        No sequence is longer.
    causal
        A token reads only what comes before it, and itself.
    key_bias
        float32 (total): added to the score of a token wherever it is read; None: nothing.
    biases_itself
        Whether `key_bias` of a token is added where the token reads itself, too.
    read_by_all
        bool (total): a token that is not is read by itself alone. None: all are.
    blocks
        What FlexAttention needs to know of all this, see `with_blocks`.
    """

    cu_seqlens: torch.Tensor
    max_length: int
    causal: bool = False
    key_bias: torch.Tensor | None = None
    biases_itself: bool = True
    read_by_all: torch.Tensor | None = None
    blocks: BlockMask | None = None

    @property
    def plain(self) -> bool:
        """Whether scores are those of the queries and keys, with at most a bias of the keys."""
        return self.read_by_all is None and (self.key_bias is None or self.biases_itself)


@dataclass(frozen=True)
class Queries:
    """The tokens whose states alone are read after the last block: the others need not be computed there.

    Attributes
    ----------
    places
        int64 (m): flat places of the tokens, ascending.
    cu_seqlens
        int32 (n_sequences + 1): which of them lie in which sequence.
    """

    places: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def at(cls, places: torch.Tensor, sequences: Sequences) -> Self:
        """Queries at `places`, ascending."""
        return cls(places, torch.searchsorted(places, sequences.cu_seqlens, out_int32=True))


def pieces(*cu_seqlens: torch.Tensor) -> Iterator[tuple[slice, ...]]:
    """The place of each sequence in each packing; none of those that are empty in the first."""
    starts = [ends.tolist() for ends in cu_seqlens]
    bounds = zip(*(itertools.pairwise(of_one) for of_one in starts), strict=True)
    return (tuple(slice(*bound) for bound in of_all) for of_all in bounds if of_all[0][1] > of_all[0][0])
