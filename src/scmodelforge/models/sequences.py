"""`Sequences`: which tokens of a packed batch read which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

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


def pieces(cu_seqlens: torch.Tensor) -> Iterator[slice]:
    """The sequences that are not empty."""
    starts = cu_seqlens.tolist()
    return (slice(a, b) for a, b in itertools.pairwise(starts) if b > a)
