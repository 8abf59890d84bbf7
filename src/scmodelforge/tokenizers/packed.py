"""`PackedTokens`: cells one after the other without padding, the one format that the model computes on.

A padded batch spends its time on `<pad>`: a third of all tokens at 2,048 of them, and half and more where cells are
small. Packed, every token is one that was measured, and attention learns from `cu_seqlens` where cells begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.tokenizers.batch import DeviceBatch, TokenBatch

NO_TOKEN = -1  # position of what is no token: obs columns, and the tail of a batch of fixed size


@dataclass(frozen=True)
class PackedTokens(DeviceBatch):
    """Token sequences of some cells, one after the other: of each cell its obs columns, then its tokens.

    Attributes
    ----------
    input_ids
        int64 (total): token ids; 0, a special token, where there is none.
    values
        float32 (total): as in `TokenBatch`; 0 where there is no token.
    positions
        int64 (total): place of the token in its cell, from 0; `NO_TOKEN` for obs columns and the tail.
    cell
        int64 (total): row in the batch of the cell; 0 in the tail.
    cu_seqlens
        int32 (n_sequences + 1): where each sequence begins, and the end. The first `n_cells` are the cells; those after
        them cut the tail.
    starts, lengths
        int64 (n_cells): flat place of a cell's first token, and how many tokens it has. A cell without tokens keeps
        one of `<pad>`.
    cell_index
        int64 (n_cells): as in `TokenBatch`.
    max_length
        No sequence is longer. A fixed number, so that nobody has to ask the device.
    n_padding
        Length of the tail.
    obs
        int64 (n_cells, n_columns): as in `TokenBatch`.
    obs_places, obs_rows
        int64 (n): flat place of each obs column, and the row of its category in the table of all categories of all
        columns that are read; None if no column is read.
    """

    input_ids: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    cell: torch.Tensor
    cu_seqlens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    cell_index: torch.Tensor
    max_length: int
    n_padding: int = 0
    obs: torch.Tensor | None = None
    obs_places: torch.Tensor | None = None
    obs_rows: torch.Tensor | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.lengths.shape[0]


@dataclass(frozen=True)
class Packing:
    """How the cells of a model are packed.

    Attributes
    ----------
    obs_places
        Columns of `TokenBatch.obs` that are read as tokens before the genes.
    obs_sizes
        Categories of each of them, the unknown one included.
    known_obs_only
        Leave out columns whose category is unknown (causal models: nobody reads them).
    longest
        The longest sequence there can be.
    """

    obs_places: tuple[int, ...]
    obs_sizes: tuple[int, ...]
    known_obs_only: bool
    longest: int

    @classmethod
    def of(cls, config: Config, vocab: GeneVocab) -> Self:
        """The packing of a config's model."""
        names = list(vocab.obs_categories)
        read = config.tokenizer.obs_tokens
        places = tuple(names.index(column) for column in read)
        sizes = tuple(len(vocab.obs_categories[column]) + 1 for column in read)
        causal = config.model.architecture_like == "autoregressive_transformer"
        known_only = causal and config.model.task_like != "expression_reconstruction"
        return cls(places, sizes, known_only, config.tokenizer.max_genes + len(places))

    def __call__(self, tokens: TokenBatch, total: int | None = None) -> PackedTokens:
        """Pack cells.

        Parameters
        ----------
        tokens
            The cells, padded.
        total
            Length of the result, whose tail belongs to no cell; None: as long as the cells.
        """
        device, n_cells = tokens.input_ids.device, tokens.n_cells
        lengths = tokens.lengths.clamp(1, tokens.input_ids.shape[1])
        read = tokens.input_ids.new_zeros(n_cells, 0)
        if self.obs_places:
            assert tokens.obs is not None
            read = tokens.obs[:, list(self.obs_places)]
        shown = read != 0 if self.known_obs_only else torch.ones_like(read, dtype=torch.bool)
        n_obs = shown.sum(dim=1)
        ends = (lengths + n_obs).cumsum(0)
        first = ends - lengths - n_obs
        cell = torch.repeat_interleave(torch.arange(n_cells, device=device), lengths + n_obs)
        position = torch.arange(len(cell), device=device) - (first + n_obs)[cell]
        is_token = position >= 0
        source = cell * tokens.input_ids.shape[1] + position.clamp(min=0)
        tail = 0 if total is None else max(total - len(cell), 0)
        return PackedTokens(
            input_ids=F.pad(tokens.input_ids.flatten()[source].where(is_token, 0), (0, tail)),
            values=F.pad(tokens.values.flatten()[source].where(is_token, 0.0), (0, tail)),
            positions=F.pad(position.clamp(min=NO_TOKEN), (0, tail), value=NO_TOKEN),
            cell=F.pad(cell, (0, tail)),
            cu_seqlens=_boundaries(ends, tail, self.longest),
            starts=first + n_obs,
            lengths=lengths,
            cell_index=tokens.cell_index,
            max_length=max(self.longest, tokens.input_ids.shape[1] + read.shape[1]),
            n_padding=tail,
            obs=tokens.obs,
            obs_places=torch.nonzero(~is_token)[:, 0] if self.obs_places else None,
            obs_rows=(read + self._first_rows(device))[shown] if self.obs_places else None,
        )

    def _first_rows(self, device: torch.device) -> torch.Tensor:
        """int64 (n_read): row of the unknown category of each column."""
        sizes = torch.tensor(self.obs_sizes, device=device)
        return sizes.cumsum(0) - sizes


def _boundaries(ends: torch.Tensor, tail: int, longest: int) -> torch.Tensor:
    """int32 `cu_seqlens` of cells that end at `ends`, and of a tail cut into pieces."""
    last = int(ends[-1])
    cuts = torch.arange(last + longest, last + tail + longest, longest, device=ends.device)
    return torch.cat([ends.new_zeros(1), ends, cuts.clamp(max=last + tail)]).int()


def unpack(x: torch.Tensor, tokens: PackedTokens, length: int) -> torch.Tensor:
    """What belongs to the tokens of packed cells (total, …), padded with zeros: (n_cells, length, …)."""
    real = torch.nonzero(tokens.positions >= 0)[:, 0]
    padded = x.new_zeros(tokens.n_cells, length, *x.shape[1:])
    return padded.index_put((tokens.cell[real], tokens.positions[real]), x[real])


@dataclass(frozen=True)
class PackedQueries(DeviceBatch):
    """Genes that are asked without being among a cell's tokens, packed behind these.

    Attributes
    ----------
    ids
        int64 (m): token of each asked gene.
    cell
        int64 (m): row in the batch of its cell, ascending.
    places
        int64 (m): flat place of each in the sequences of tokens and queries.
    tokens
        int64 (t): which entries of the packed tokens are in these sequences.
    token_places
        int64 (t): flat place of each.
    cu_seqlens, max_length
        As in `PackedTokens`, of the sequences of tokens and queries.
    """

    ids: torch.Tensor
    cell: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    token_places: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int


def pack_queries(
    tokens: PackedTokens, ids: torch.Tensor, cell: torch.Tensor, with_obs: bool = True
) -> PackedQueries:
    """Put asked genes behind the tokens of their cells.

    Parameters
    ----------
    tokens
        The cells, without a tail.
    ids, cell
        int64 (m): asked genes, and the row of each one's cell, ascending.
    with_obs
        Whether obs columns are in the sequences.
    """
    assert tokens.n_padding == 0, "a tail would be read as tokens of the first cell"
    n_cells, device = tokens.n_cells, ids.device
    n_queries = torch.bincount(cell, minlength=n_cells)
    before = tokens.starts - tokens.cu_seqlens[:n_cells] if with_obs else torch.zeros_like(tokens.lengths)
    n_tokens = tokens.lengths + before
    ends = (n_tokens + n_queries).cumsum(0)
    first = ends - n_tokens - n_queries
    kept = torch.arange(len(tokens.input_ids), device=device)
    place = kept - tokens.cu_seqlens[tokens.cell]
    if not with_obs:
        kept = torch.nonzero(tokens.positions >= 0)[:, 0]
        place = tokens.positions[kept]
    earlier = n_queries.cumsum(0) - n_queries
    rank = torch.arange(len(ids), device=device) - earlier[cell]
    return PackedQueries(
        ids=ids,
        cell=cell,
        places=first[cell] + n_tokens[cell] + rank,
        tokens=kept,
        token_places=first[tokens.cell[kept]] + place,
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).int(),
        max_length=int((n_tokens + n_queries).max()),
    )
