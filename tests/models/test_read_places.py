"""States that nobody reads are not computed in the last block, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.models import transformer
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import PackedBatch
from scmodelforge.tokenizers.base import build_tokenizer
from tests.helpers import make_cells, make_vocab

VOCAB = make_vocab(60)


def made(model: dict[str, Any], ratio: float = 0.15) -> tuple[Any, Any, PackedBatch]:
    """A model, its task, and a packed batch of cells of 3 to 50 tokens, of which some are asked nothing."""
    config = Config.model_validate(
        {
            "tokenizer": {"max_genes": 50, "masking": {"mask_ratio": ratio}},
            "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0, **model},
        }
    )
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (12, 60)) * (rng.random((12, 60)) < np.linspace(0.05, 1, 12)[:, None])
    task = build_objective(config, VOCAB)
    tokens = build_tokenizer(config, VOCAB)(make_cells(counts.astype(np.float32)), 1, 0)
    return build_model(config, VOCAB, seed=0), task, task.pack(task.corrupt(tokens, 1, 0), n_asked=1)


def loss_and_gradients(model: Any, task: Any, batch: PackedBatch) -> list[torch.Tensor]:
    model.zero_grad()
    output = task(model, batch)
    output.loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.loss.detach(), task.count(output, batch).float(), *found]


@pytest.mark.parametrize("norm", ["pre", "post", "normed_residual"])
@pytest.mark.parametrize("ratio", [0.02, 0.3])
@pytest.mark.parametrize("model", [{}, {"qk_norm": True}, {"num_layers": 1, "bias": False}], ids=str)
def test_loss_figures_and_gradients_are_those_of_whole_blocks(
    norm: str, ratio: float, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, batch = made({"norm": norm, **model}, ratio)
    n_asked = torch.bincount(batch.cell[: batch.n_asked], minlength=12)
    assert ratio > 0.1 or (n_asked == 0).any()
    ours = loss_and_gradients(model, task, batch)
    monkeypatch.setattr(transformer, "may_leave_out", lambda *_: False)
    for found, expected in zip(ours, loss_and_gradients(model, task, batch), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_the_last_block_computes_the_asked_positions_alone(half: bool) -> None:
    model, task, batch = made({})
    seen: list[int] = []
    for block in model.transformer.blocks:
        block.feed_forward.register_forward_hook(lambda module, given, result: seen.append(len(result)))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss_and_gradients(model, task, batch)
    assert seen == [len(batch.tokens.input_ids), batch.n_asked]


@pytest.mark.parametrize(
    "model",
    [
        {"attention_dropout": 0.1},
        {"objective": {"ecs_weight": 1.0}},
    ],
    ids=["dropout of weights", "a loss that pools all"],
)
def test_whole_blocks_are_computed_where_all_is_read_or_attention_cannot(model: dict[str, Any]) -> None:
    net, task, batch = made(model)
    seen: list[int] = []
    net.transformer.blocks[1].feed_forward.register_forward_hook(
        lambda module, given, result: seen.append(len(result))
    )
    loss_and_gradients(net.train(), task, batch)
    assert seen == [len(batch.tokens.input_ids)]


def test_activations_may_be_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, batch = made({})
    expected = loss_and_gradients(model, task, batch)
    model.transformer.recomputes = True
    for found, kept in zip(loss_and_gradients(model, task, batch), expected, strict=True):
        torch.testing.assert_close(found, kept)


def test_an_architecture_that_replaces_the_transformer_computes_all() -> None:
    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor, sequences: Any) -> torch.Tensor:
            return x

    model, task, batch = made({})
    model.transformer = Other()
    assert torch.isfinite(task(model, batch).loss)


def test_asked_places_may_come_in_any_order() -> None:
    model, task, batch = made({})
    expected = task(model, batch).loss
    order = torch.randperm(batch.n_asked, generator=torch.Generator().manual_seed(0))
    mixed = {name: getattr(batch, name)[order] for name in ("asked", "genes", "values", "cell")}
    torch.testing.assert_close(task(model, replace(batch, **mixed)).loss, expected)


def test_whoever_listens_to_a_layer_hears_it() -> None:
    model, task, batch = made({})
    heard: list[int] = []
    model.transformer.blocks[0].attention.k.register_forward_hook(
        lambda layer, given, result: heard.append(len(result))
    )
    task(model, batch)
    assert heard == [len(batch.tokens.input_ids)]
