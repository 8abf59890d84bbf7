"""Questions find their truth in a packed batch, and batches of a fixed size hold what they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import ASKED_MULTIPLE, PackedBatch, TrainingBatch
from scmodelforge.strategies import TABLE
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.pretraining import fixed_sizes
from tests.helpers import make_cells, make_vocab
from tests.models.test_strategies import N_GENES, config_of, real_counts

Names = tuple[str, str, str]  # tokenizer, architecture, task
MASKED = ("rank_value", "transformer_encoder", "masked_gene_prediction")
VALUES = ("binned_expression", "transformer_encoder", "expression_reconstruction")
NEXT = ("rank_value", "autoregressive_transformer", "next_gene")
GENERATED = ("binned_expression", "autoregressive_transformer", "expression_reconstruction")
HIDDEN = ("continuous_projection", "masked_autoencoder", "expression_reconstruction")


def made(names: Names, first: int = 0, **training: Any) -> tuple[Config, Any, TrainingBatch]:
    """Config, task, and a batch of seven real cells that has not been packed."""
    config, vocab = config_of(TABLE[names], training=training), make_vocab(N_GENES)
    task = build_objective(config, vocab)
    cells = make_cells(np.array(real_counts()[first : first + 7]), first_row=first)
    return config, task, task.corrupt(build_tokenizer(config, vocab)(cells), 1, 0)


@pytest.mark.parametrize("names", [MASKED, VALUES, NEXT])
def test_questions_are_asked_where_they_were_asked_of_padded_cells(names: Names) -> None:
    _, task, batch = made(names)
    packed, width = task.pack(batch), batch.tokens.input_ids.shape[1]
    tokens = packed.tokens
    assert torch.equal(tokens.cell[packed.asked], batch.cell)
    assert torch.equal(tokens.positions[packed.asked], batch.asked % width)
    for name in ("input_ids", "values"):
        shown = getattr(batch.tokens, name).flatten()[batch.asked]
        assert torch.equal(getattr(tokens, name)[packed.asked], shown)
    for name in ("genes", "values", "cell", "seed", "n_tokens"):
        ours, theirs = getattr(packed, name), getattr(batch, name)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs, name
    assert packed.n_asked == len(packed.asked) == len(batch.asked) > 50
    assert packed.n_padding == 0
    assert task.pack(packed, total=10_000) is packed


@pytest.mark.parametrize("names", [GENERATED, HIDDEN])
def test_what_is_not_among_the_tokens_is_asked_behind_them(names: Names) -> None:
    _, task, batch = made(names)
    packed = task.pack(batch)
    assert packed.queries is not None
    assert torch.equal(packed.queries.ids, batch.genes)
    assert torch.equal(packed.queries.cell, batch.cell)
    assert torch.equal(packed.asked, torch.arange(len(batch.genes)))
    assert len(task.pack(batch, n_asked=5000).asked) == packed.n_asked, (
        "there is no place to ask about nothing"
    )


@pytest.mark.parametrize("n_asked", [1, 127, 128, 129, 5000])
def test_the_surplus_asks_about_nothing(n_asked: int) -> None:
    _, task, batch = made(NEXT)
    plain, filled = task.pack(batch), task.pack(batch, n_asked=n_asked)
    size = max(n_asked, plain.n_asked)
    assert len(filled.asked) % ASKED_MULTIPLE == 0
    assert size <= len(filled.asked) < size + ASKED_MULTIPLE
    assert filled.n_asked == plain.n_asked
    for name in ("asked", "genes", "values", "cell"):
        real, surplus = getattr(filled, name).split([plain.n_asked, len(filled.asked) - plain.n_asked])
        assert torch.equal(real, getattr(plain, name))
        assert not surplus.any(), f"{name}: <pad> is 0 here"


@pytest.mark.parametrize("names", [VALUES, NEXT])
def test_questions_stand_behind_the_columns_of_their_cell(names: Names) -> None:
    config = config_of(TABLE[names], tokenizer={"obs_tokens": ["donor", "assay"]})
    vocab = make_vocab(N_GENES).with_obs_categories({"assay": ["x"], "donor": ["a", "b"]})
    cells = make_cells(np.array(real_counts()[:5]))
    obs = np.array([[1, 2], [0, 1], [0, 0], [1, 0], [1, 1]])
    task = build_objective(config, vocab)
    batch = task.corrupt(build_tokenizer(config, vocab)(replace(cells, obs=obs)), 1, 0)
    packed, width = task.pack(batch), batch.tokens.input_ids.shape[1]
    assert torch.equal(packed.tokens.cell[packed.asked], batch.cell)
    assert torch.equal(packed.tokens.positions[packed.asked], batch.asked % width)


def sizes(batch: PackedBatch) -> tuple[int, int]:
    return len(batch.tokens.input_ids), len(batch.asked)


@pytest.mark.parametrize("names", [MASKED, VALUES, NEXT])
def test_batches_of_a_budget_are_all_of_one_size(names: Names) -> None:
    found, budget = set(), 2600
    for first in range(0, 280, 7):
        config, task, batch = made(names, first, tokens_per_batch=budget)
        found.add(sizes(task.pack(batch, **fixed_sizes(config))))
    assert len(found) == 1
    n_tokens, n_asked = found.pop()
    assert n_tokens == budget
    share = 1.0 if names == NEXT else config.tokenizer.masking.mask_ratio
    deviation = (budget * share * (1 - share)) ** 0.5
    assert 2 * deviation <= n_asked - budget * share < 6 * deviation + ASKED_MULTIPLE, "room in nearly all"


def test_without_a_budget_only_questions_are_rounded() -> None:
    config, task, batch = made(NEXT, batch_size=7)
    packed = task.pack(batch, **fixed_sizes(config))
    assert packed.n_padding == 0
    assert len(packed.asked) == packed.n_asked + -packed.n_asked % ASKED_MULTIPLE > packed.n_asked


@pytest.mark.parametrize("names", [GENERATED, HIDDEN])
def test_batches_with_questions_behind_their_tokens_are_as_long_as_they_are(names: Names) -> None:
    assert fixed_sizes(made(names, tokens_per_batch=3000)[0]) == {}
