"""Memory of a training step: the formula against what autograd keeps, and the search for the largest batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.errors import UserError
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.memory import (
    LOGIT_COPIES,
    activation_bytes,
    available_bytes,
    fits,
    fixed_bytes,
    largest_that_fits,
    saved_bytes,
)
from tests.helpers import make_cells, make_vocab

SIZES = {"hidden_dim": 64, "num_layers": 3, "num_heads": 4, "dropout": 0.1}
ENCODER = {"tokenizer": {"max_genes": 256}, "model": SIZES}
AUTOENCODER = {
    "tokenizer": {"strategy": "continuous_projection", "max_genes": 256},
    "model": {
        **SIZES,
        "architecture": "masked_autoencoder",
        "pretraining_task": "expression_reconstruction",
        "objective": {"zero_mask_ratio": 0.1},
    },
}


@pytest.mark.parametrize(("sections", "gene_head"), [(ENCODER, True), (AUTOENCODER, False)])
def test_the_formula_is_near_what_autograd_keeps(sections: dict, gene_head: bool) -> None:
    config, vocab = Config.model_validate(sections), make_vocab(400, np.ones(400))
    counts = np.zeros((1, 400))
    counts[0, :200] = 1 + np.arange(200) % 7  # one cell, so that nothing is padded
    model, task = build_model(config, vocab, seed=0).train(), build_objective(config, vocab)
    batch = task.corrupt(build_tokenizer(config, vocab)(make_cells(counts), 0, 0), 0, 0)
    tokens, asked = batch.tokens.input_ids.numel(), len(batch.asked)
    estimate = activation_bytes(config, vocab, tokens, asked)
    if gene_head:
        estimate -= asked * vocab.n_tokens * 4 * (LOGIT_COPIES - 1)  # one copy stays, the others pass
    measured = saved_bytes(model, lambda: task(model, batch).loss)
    assert estimate == pytest.approx(measured, rel=0.25)


def test_what_autograd_keeps_is_counted_once() -> None:
    layer = torch.nn.Linear(10, 10, bias=False)
    x = torch.ones(100, 10, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x).sum()) == 4 * 1000, "x, not the weights"
    assert saved_bytes(layer, lambda: (x * 2 * x).sum()) == 2 * 4 * 1000, "x and 2x"


def test_half_precision_keeps_less_and_frozen_weights_have_no_moments() -> None:
    full = Config.model_validate(ENCODER)
    half = Config.model_validate({**ENCODER, "training": {"precision": "bf16-mixed"}})
    vocab = make_vocab(400, np.ones(400))
    ratio = activation_bytes(half, vocab, 1000, 0) / activation_bytes(full, vocab, 1000, 0)
    assert 0.5 < ratio < 0.75
    layer = torch.nn.Linear(9, 11, bias=False)
    assert fixed_bytes(layer) == 16 * 99
    assert fixed_bytes(layer.requires_grad_(False)) == 4 * 99


@pytest.mark.parametrize("limit", [2_100, 5_000, 16_384, 40_000, 777_777])
@pytest.mark.parametrize("start", [1024, 16_384, 500_000])
def test_the_search_ends_just_below_the_limit(limit: int, start: int) -> None:
    tried: list[int] = []

    def step(tokens: int) -> None:
        tried.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError

    found = largest_that_fits(fits(step), start, least=2048, most=10**9)
    assert found <= limit
    assert found >= 0.9 * limit - 1024
    assert found in tried, "what is answered was tried"
    assert len(tried) < 20


def test_no_more_is_tried_than_there_are_cells() -> None:
    assert largest_that_fits(lambda tokens: tokens <= 30_000, 4096, least=100, most=30_000) == 30_000
    assert largest_that_fits(lambda tokens: True, 4096, least=100, most=700) == 700


def test_a_cell_that_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match=r"2,048 tokens, the longest cell alone, does not fit.*smaller model"):
        largest_that_fits(lambda tokens: False, 16_384, least=2048, most=10**9)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(tokens: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fits(broken)(100)


def test_this_machine_has_memory() -> None:
    assert 2**27 < available_bytes(torch.device("cpu")) < 2**50
