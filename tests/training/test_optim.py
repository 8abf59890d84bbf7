"""Who decays, and how the learning rate runs: groups, optimizers, schedules and the shortened warm-up."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from scmodelforge.config import Config, LoraConfig
from scmodelforge.config_training import OptimizerConfig, SchedulerConfig, TrainingConfig
from scmodelforge.errors import ConfigError
from scmodelforge.finetuning.lora import add_lora
from scmodelforge.models.bundle import build_model
from scmodelforge.models.encoder import TransformerEncoder
from scmodelforge.models.heads import PredictionHead
from scmodelforge.training.optim import build_optimizer, parameter_groups, resolve_warmup, schedule
from scmodelforge.training.setup import check_environment
from tests.helpers import make_vocab

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 or newer")

NAMES = ("cosine_warmup", "cosine", "linear", "constant")


def tiny_model(norm: str = "pre") -> TransformerEncoder:
    model = {"hidden_dim": 8, "num_layers": 2, "num_heads": 2, "norm": norm}
    return build_model(
        Config.model_validate({"model": model, "tokenizer": {"max_genes": 16}}), make_vocab(20), 0
    )


def ids(parameters: list[nn.Parameter]) -> list[int]:
    return sorted(map(id, parameters))


def members(groups: list[dict]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_trainable_parameter_is_in_exactly_one_group(norm: str) -> None:
    model, head = tiny_model(norm), PredictionHead(8, 3, 0.1)
    groups = parameter_groups([model, head], 1e-3, OptimizerConfig())
    assert ids(members(groups)) == ids([*model.parameters(), *head.parameters()])


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model, head = tiny_model().requires_grad_(False), PredictionHead(8, 3, 0.1)
    assert parameter_groups([model], 1e-3, OptimizerConfig()) == []
    assert ids(members(parameter_groups([model, head], 1e-3, OptimizerConfig()))) == ids([*head.parameters()])


def test_with_lora_only_the_adapters_train() -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    add_lora(model, LoraConfig())
    adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert ids(members(parameter_groups([model], 1e-3, OptimizerConfig()))) == ids(adapters)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_biases_norms_and_embeddings_do_not_decay(decay_embeddings: bool) -> None:
    model = tiny_model()
    config = OptimizerConfig(weight_decay=0.3, decay_embeddings=decay_embeddings)
    decaying = {
        id(p)
        for group in parameter_groups([model], 1e-3, config)
        if group["weight_decay"]
        for p in group["params"]
    }
    assert {group["weight_decay"] for group in parameter_groups([model], 1e-3, config)} == {0.3, 0.0}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decaying}
    matrices = {
        f"transformer.blocks.{block}.{layer}.weight"
        for block in range(2)
        for layer in (
            *(f"attention.{n}" for n in ("q", "k", "v", "out")),
            "feed_forward.fc1",
            "feed_forward.fc2",
        )
    } | {"head.dense.weight"}
    tables = {"embedding.tokens.weight", "embedding.ranks.weight"} if decay_embeddings else set()
    assert names == matrices | tables


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_optimizer_gets_what_the_config_says(name: str, kind: type) -> None:
    config = OptimizerConfig(name=name, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    groups = parameter_groups([nn.Linear(2, 2)], 0.2, config)
    optimizer = build_optimizer(groups, config)
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.9), 1e-6)}


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_without_a_gradient_only_weights_that_decay_move(name: str) -> None:
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, 0.5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    config = OptimizerConfig(name=name, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups([layer], 0.1, config), config)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.bias, before["bias"])
    assert (layer.weight.abs() < before["weight"].abs()).all()
    if name == "adamw":  # decoupled: exactly (1 - lr × decay), whatever the gradient's scale
        torch.testing.assert_close(layer.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    """Parameters after some steps with gradients that are the same for the same step and parameter."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_the_fused_optimizer_steps_as_the_plain_one(name: str) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.1)
    ways = []
    for fused in (True, False):
        model = tiny_model()
        optimizer = build_optimizer(parameter_groups([model], 1e-2, config), config, fused)
        ways.append(trained(model, optimizer, 5))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


MUON = OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))


def muon_of(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(parameter_groups([model], MUON.lr, MUON), MUON)


@needs_muon
def test_muon_steps_the_matrices_of_the_blocks_and_adamw_all_else() -> None:
    model = tiny_model()
    optimizer = muon_of(model)
    assert ids(members(optimizer.param_groups)) == ids([*model.parameters()])
    trained(model, optimizer, 1)
    by_muon = {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    layers = (*(f"attention.{n}" for n in ("q", "k", "v", "out")), "feed_forward.fc1", "feed_forward.fc2")
    assert by_muon == {f"transformer.blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    others = [p for name, p in model.named_parameters() if name not in by_muon]
    assert all("exp_avg_sq" in optimizer.state[parameter] for parameter in others)


@needs_muon
def test_muon_and_adamw_step_as_they_do_alone() -> None:
    together, apart = tiny_model(), tiny_model()
    trained(together, muon_of(together), 3)
    groups = parameter_groups([apart], MUON.lr, MUON)
    optimizers = [
        torch.optim.Muon([g for g in groups if g.get("muon")], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([g for g in groups if not g.get("muon")], betas=MUON.betas, fused=True),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in apart.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for each in (*optimizers, *schedulers):
            each.step()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


@needs_muon
def test_a_restored_muon_goes_on_as_if_never_stopped() -> None:
    model, resumed = tiny_model(), tiny_model()
    optimizer, restored = muon_of(model), muon_of(resumed)
    trained(model, optimizer, 3)
    resumed.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(trained(model, optimizer, 3), trained(resumed, restored, 3), strict=True):
        assert torch.equal(one, other)


def test_muon_and_sharding_do_not_go_together() -> None:
    with pytest.raises(ValidationError, match="muon needs whole matrices, and strategy fsdp divides them"):
        TrainingConfig.model_validate({"strategy": "fsdp", "optimizer": {"name": "muon"}})


def test_an_older_torch_without_muon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    training = TrainingConfig.model_validate({"optimizer": {"name": "muon"}})
    with pytest.raises(ConfigError, match=r"training\.optimizer\.name muon needs torch 2\.9 or newer"):
        check_environment(training)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", NAMES)
def test_schedules_at_start_end_of_warmup_middle_and_end(name: str, warmup: int, floor: float) -> None:
    factor = schedule(SchedulerConfig(name=name, min_lr_ratio=floor), 110, warmup)
    assert factor(0) == pytest.approx(1 / warmup if warmup else 1.0)
    assert factor(warmup - 1 if warmup else 0) == factor(warmup) == 1.0
    middle, end = (1.0, 1.0) if name == "constant" else ((1 + floor) / 2, floor)
    assert factor(warmup + (110 - warmup) // 2) == pytest.approx(middle)
    assert factor(110) == pytest.approx(end)
    assert factor(1000) == factor(110)


def test_the_cosine_is_a_cosine() -> None:
    factor = schedule(SchedulerConfig(name="cosine"), 100, 0)
    assert factor(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule(SchedulerConfig(name="linear"), 100, 0)(25) == pytest.approx(0.75)


@given(name=st.sampled_from(NAMES), total=st.integers(1, 300), share=st.floats(0, 0.5), floor=st.floats(0, 1))
def test_a_schedule_rises_to_one_then_never_rises_again(
    name: str, total: int, share: float, floor: float
) -> None:
    warmup = int(total * share)
    factor = schedule(SchedulerConfig(name=name, min_lr_ratio=floor), total, warmup)
    values = [factor(step) for step in range(total + 1)]
    assert max(values) <= 1 + 1e-12
    assert values[:warmup] == sorted(values[:warmup])
    assert all(a >= b - 1e-12 for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    assert all(value > 0 for value in values[:-1])


@pytest.mark.parametrize(
    ("name", "asked", "total", "expected"),
    [
        ("cosine_warmup", None, 1_000, 100),
        ("cosine_warmup", None, 100_000, 2_000),
        ("cosine_warmup", 50, 1_000, 50),
        ("cosine_warmup", 100, 1_000, 100),
        ("cosine_warmup", 0, 1_000, 0),
        ("cosine", None, 1_000, 0),
        ("linear", 20, 1_000, 20),
        ("constant", None, 1_000, 0),
        ("cosine_warmup", None, 5, 0),
    ],
)
def test_warmup_that_fits_is_kept_in_silence(
    name: str, asked: int | None, total: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_warmup(SchedulerConfig(name=name, warmup_steps=asked), total) == expected
    assert not caplog.messages


def test_a_warmup_longer_than_a_tenth_is_shortened_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_warmup(SchedulerConfig(warmup_steps=2_000), 1_480) == 148
    assert caplog.messages == [
        "training.scheduler.warmup_steps is 2,000, but this run has 1,480 steps: "
        "shortened to a tenth of it, 148."
    ]
