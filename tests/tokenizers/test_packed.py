"""Packed cells hold every token once, in its place, and know where cells begin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import Config
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import NO_TOKEN, Packing, pack_queries, unpack
from tests.helpers import make_vocab

LONGEST = 12


def batch(lengths: list[int], obs: list[tuple[int, int]] | None = None) -> TokenBatch:
    n, width = len(lengths), max(*lengths, 1)
    ids = torch.arange(1, n * width + 1).view(n, width)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    return TokenBatch(
        input_ids=ids.where(real, 0),
        values=ids.float().where(real, 0.0) / 10,
        lengths=torch.tensor(lengths),
        cell_index=torch.arange(n),
        has_padding=True,
        obs=None if obs is None else torch.tensor(obs),
    )


cells = st.lists(st.integers(0, LONGEST - 2), min_size=1, max_size=8)


@settings(deadline=None)
@given(lengths=cells, surplus=st.integers(0, 40))
def test_packing_and_unpacking_gives_the_tokens_back(lengths: list[int], surplus: int) -> None:
    tokens = batch(lengths)
    n_real = sum(max(n, 1) for n in lengths)  # an empty cell keeps one <pad>
    packed = Packing((), (), False, LONGEST)(tokens, n_real + surplus)
    assert len(packed.input_ids) == n_real + surplus == int(packed.cu_seqlens[-1])
    assert packed.n_padding == surplus
    assert torch.equal(unpack(packed.input_ids, packed, tokens.input_ids.shape[1]), tokens.input_ids)
    assert torch.equal(unpack(packed.values, packed, tokens.values.shape[1]), tokens.values)
    sizes = packed.cu_seqlens.diff()
    assert sizes[: len(lengths)].tolist() == [max(n, 1) for n in lengths]
    assert sizes.min() >= 0
    assert sizes.max() <= LONGEST == packed.max_length
    assert (packed.positions[n_real:] == NO_TOKEN).all()
    assert torch.equal(packed.positions[packed.starts], torch.zeros(len(lengths), dtype=torch.int64))
    assert torch.equal(packed.cell[packed.starts], torch.arange(len(lengths)))
    assert packed.lengths.tolist() == sizes[: len(lengths)].tolist()
    assert torch.equal(packed.cell_index, tokens.cell_index)
    assert not packed.input_ids[n_real:].any()
    assert not packed.values[n_real:].any()
    states = torch.randn(len(packed.input_ids), 3)
    padded = unpack(states, packed, LONGEST)
    for row, (start, length) in enumerate(zip(packed.starts.tolist(), sizes.tolist(), strict=False)):
        assert torch.equal(padded[row, :length], states[start : start + length])
        assert not padded[row, length:].any()


def test_cells_longer_than_the_budget_are_packed_as_they_are() -> None:
    packed = Packing((), (), False, LONGEST)(batch([4, 5]), total=6)
    assert packed.cu_seqlens.tolist() == [0, 4, 9]
    assert packed.n_padding == 0


@settings(deadline=None)
@given(lengths=cells, data=st.data())
def test_obs_columns_come_before_the_tokens_of_their_cell(lengths: list[int], data: st.DataObject) -> None:
    category = st.tuples(st.integers(0, 3), st.integers(0, 2))
    obs = data.draw(st.lists(category, min_size=len(lengths), max_size=len(lengths)))
    for known_only in (False, True):
        packed = Packing((1, 0), (3, 4), known_only, LONGEST)(batch(lengths, obs))
        expected = [  # cell, row of the category: those of column 1 come first
            (cell, first + value)
            for cell, (second_column, first_column) in enumerate(obs)
            for first, value in ((0, first_column), (3, second_column))
            if value or not known_only
        ]
        found = list(zip(packed.cell[packed.obs_places].tolist(), packed.obs_rows.tolist(), strict=True))
        assert found == expected
        assert (packed.positions[packed.obs_places] == NO_TOKEN).all()
        n_obs = torch.tensor([sum(row == cell for row, _ in expected) for cell in range(len(lengths))])
        assert torch.equal(packed.starts, packed.cu_seqlens[: len(lengths)] + n_obs)
        assert torch.equal(packed.cu_seqlens.diff(), packed.lengths + n_obs)
        assert torch.equal(packed.obs, torch.tensor(obs))
        assert not packed.input_ids[packed.obs_places].any()
        tokens = batch(lengths)
        assert torch.equal(unpack(packed.input_ids, packed, tokens.input_ids.shape[1]), tokens.input_ids)
        assert packed.max_length >= packed.cu_seqlens.diff().max()


@settings(deadline=None)
@given(lengths=cells, data=st.data())
def test_queries_stand_behind_the_tokens_of_their_cell(lengths: list[int], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    packed = Packing((0,), (4,), False, LONGEST)(batch(lengths, [(1, 0)] * len(lengths)))
    cell = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(numbers))
    for with_obs in (True, False):
        queries = pack_queries(packed, 1000 + torch.arange(len(cell)), cell, with_obs)
        places = torch.cat([queries.token_places, queries.places])
        assert torch.equal(places.sort().values, torch.arange(int(queries.cu_seqlens[-1])))
        sizes = [max(n, 1) + with_obs + m for n, m in zip(lengths, numbers, strict=True)]
        assert queries.cu_seqlens.diff().tolist() == sizes
        assert queries.max_length == max(sizes)
        number = torch.searchsorted(queries.cu_seqlens, queries.places.int(), right=True) - 1
        assert torch.equal(number, cell)
        number = torch.searchsorted(queries.cu_seqlens, queries.token_places.int(), right=True) - 1
        assert torch.equal(number, packed.cell[queries.tokens])
        sequences = torch.zeros(len(places), dtype=torch.int64)
        sequences[queries.token_places] = packed.input_ids[queries.tokens]
        sequences[queries.places] = queries.ids
        asked = iter(range(1000, 1000 + len(cell)))
        for row, found in enumerate(sequences.split(sizes)):
            tokens = packed.input_ids[packed.cell == row]
            assert found.tolist() == tokens[1 - with_obs :].tolist() + [
                next(asked) for _ in range(numbers[row])
            ]


@pytest.mark.parametrize(
    ("architecture", "task", "known_only"),
    [
        ("transformer_encoder", "expression_reconstruction", False),
        ("autoregressive_transformer", "next_gene", True),
        ("autoregressive_transformer", "expression_reconstruction", False),
    ],
)
def test_a_model_s_packing_knows_its_columns(architecture: str, task: str, known_only: bool) -> None:
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": "binned_expression", "max_genes": 20, "obs_tokens": ["donor", "assay"]},
            "model": {"architecture": architecture, "pretraining_task": task},
        }
    )
    vocab = make_vocab(5).with_obs_categories({"assay": ["x"], "site": ["y"], "donor": ["a", "b"]})
    assert Packing.of(config, vocab) == Packing((2, 0), (3, 2), known_only, 22)
