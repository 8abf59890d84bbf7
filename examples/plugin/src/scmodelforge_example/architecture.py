"""`deep_sets`: tokens that hear of each other through the mean of their cell only (Zaheer et al. 2017).

It costs as much for long cells as for short ones, token by token, and shows what attention is worth.
"""

from __future__ import annotations

import torch
from torch import nn

from scmodelforge.config import Config, ModelConfig
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.encoder import TransformerEncoder
from scmodelforge.models.sequences import Sequences
from scmodelforge.models.transformer import initialize


class SetBlock(nn.Module):
    """x + W₂ ReLU(W₁ [x, mean of the cell]), on normed x."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.hidden_dim
        self.norm = nn.LayerNorm(width, eps=model.layer_norm_eps)
        self.linear1 = nn.Linear(2 * width, model.feed_forward_dim)
        self.linear2 = nn.Linear(model.feed_forward_dim, width)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: torch.Tensor, cell: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Float (total, width), the cell of each token, tokens of each cell → float (total, width)."""
        normed = self.norm(x)
        sums = normed.new_zeros(len(lengths), normed.shape[1]).index_add(0, cell, normed)
        mean = (sums / lengths.clamp(min=1)[:, None]).index_select(0, cell)
        hidden = torch.relu(self.linear1(torch.cat([normed, mean], dim=1)))
        return x + self.dropout(self.linear2(hidden))


class SetTransformer(nn.Module):
    """In the place of `models.transformer.Transformer`, with the same two calls."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SetBlock(model) for _ in range(model.num_layers))

    def states(self, x: torch.Tensor, sequences: Sequences) -> list[torch.Tensor]:
        """The input and the output of each block, float (total, width) each."""
        # What a batch of fixed size has behind its last cell is one more cell.
        ends = torch.cat([sequences.cu_seqlens[1:], sequences.cu_seqlens.new_tensor([len(x)])])
        cell = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
        lengths = torch.diff(ends, prepend=ends.new_zeros(1))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], cell, lengths))
        return states

    def forward(self, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Float (total, width) → float (total, width)."""
        return self.states(x, sequences)[-1]


class DeepSets(TransformerEncoder):
    """A transformer_encoder with its blocks replaced; embeddings, heads and pooling are the same."""

    like = "transformer_encoder"
    ignores = tuple(
        f"model.{key}"
        for key in ("num_heads", "attention_dropout", "norm", "final_norm", "bias", "qk_norm", "soft_cap")
    )

    def __init__(self, config: Config, vocab: GeneVocab) -> None:
        super().__init__(config, vocab)
        self.transformer = SetTransformer(config.model)  # type: ignore[assignment]
        self.transformer.apply(initialize)
