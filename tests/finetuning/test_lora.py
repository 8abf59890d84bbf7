"""Adapters: where they are, that they learn while the rest stays, and that merging changes nothing."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scmodelforge.config import LoraConfig
from scmodelforge.errors import MissingExtraError
from scmodelforge.finetuning.lora import add_lora, trainable_share
from scmodelforge.finetuning.run import finetune
from scmodelforge.inference import open_for
from scmodelforge.models.bundle import ModelBundle, load_model, read_checkpoint
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.training.run import RunResult
from tests.helpers import finetune_config, marker_cells

pytest.importorskip("peft")

CELLS = marker_cells(40, seed=2)
LORA = LoraConfig(enabled=True, rank=4, alpha=8)
LAYERS = {
    f"transformer.blocks.{block}.{layer}"
    for block in range(2)
    for layer in (
        *(f"attention.{name}" for name in ("q", "k", "v", "out")),
        *(f"feed_forward.{name}" for name in ("fc1", "fc2")),
    )
}


def tokens_of(bundle: ModelBundle) -> TokenBatch:
    return build_tokenizer(bundle.config, bundle.vocab)(open_for(bundle, CELLS).read(np.arange(CELLS.n_obs)))


@pytest.fixture(scope="module")
def adapted(pretrained: RunResult, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = finetune_config(
        tmp_path_factory.mktemp("lora"), {"optimizer": {"lr": 0.03}}, lora=LORA.model_dump()
    )
    return finetune(config, pretrained.checkpoint_dir / "best.ckpt", data=marker_cells())


def test_adapters_are_no_parameters_of_the_model(adapted: RunResult, annotator: RunResult) -> None:
    record = json.loads((adapted.run_dir / "run.json").read_text())
    assert record["model"]["n_parameters"] == adapted.model.n_parameters == annotator.model.n_parameters


def test_adapters_are_on_every_projection_and_all_else_is_frozen(pretrained: RunResult) -> None:
    model = load_model(pretrained.run_dir / "model").model
    add_lora(model, LORA)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{layer}.lora_{side}.default.weight" for layer in LAYERS for side in "AB"}


def test_each_adapter_gets_a_gradient(pretrained: RunResult) -> None:
    bundle = load_model(pretrained.run_dir / "model")
    tokens, model = tokens_of(bundle), bundle.model
    add_lora(model, LORA)
    target = torch.randn(len(CELLS), model.hidden_dim, generator=torch.Generator().manual_seed(0))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(adapters.values(), lr=0.1)

    def step() -> set[str]:
        optimizer.zero_grad()
        F.mse_loss(model.encode(tokens), target).backward()
        optimizer.step()
        return {name for name, p in adapters.items() if p.grad is not None and p.grad.abs().max() > 0}

    assert step() == {name for name in adapters if ".lora_B." in name}, "A waits behind a B of zeros"
    assert step() == set(adapters)


def test_before_training_adapters_change_nothing(pretrained: RunResult) -> None:
    bundle = load_model(pretrained.run_dir / "model")
    tokens = tokens_of(bundle)
    with torch.no_grad():
        before = bundle.model.encode(tokens)
        add_lora(bundle.model, LORA)
        assert torch.equal(bundle.model.eval().encode(tokens), before)


def test_a_run_moves_the_adapters_and_not_the_base(adapted: RunResult, pretrained: RunResult) -> None:
    assert adapted.metrics["val_accuracy"] > 0.9
    state = read_checkpoint(adapted.checkpoint_dir / "last.ckpt")["state_dict"]
    start = pretrained.model.model.state_dict()
    for name, tensor in state.items():
        if ".lora_B." in name:
            assert tensor.abs().max() > 0, name
        elif name.startswith("model.") and ".lora_" not in name:
            assert torch.equal(tensor, start[name.removeprefix("model.").replace(".base_layer.", ".")]), name


def test_merged_model_equals_adapted_model_and_pefts_own_merge(
    adapted: RunResult, pretrained: RunResult
) -> None:
    state = read_checkpoint(adapted.checkpoint_dir / "best.ckpt")["state_dict"]
    bundle = load_model(pretrained.run_dir / "model")
    tokens = tokens_of(bundle)
    wrapped = add_lora(bundle.model, LORA)
    bundle.model.load_state_dict(
        {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    )
    with torch.no_grad():
        with_adapters = bundle.model.eval().encode(tokens)
        by_peft = wrapped.merge_and_unload().eval().encode(tokens)
        for ours in (adapted.checkpoint_dir / "best.ckpt", adapted.run_dir / "model"):
            merged = load_model(ours)
            assert not any("lora" in name for name in merged.model.state_dict())
            torch.testing.assert_close(merged.model.encode(tokens), with_adapters, atol=1e-5, rtol=0)
            torch.testing.assert_close(merged.model.encode(tokens), by_peft, atol=1e-5, rtol=0)
        plain = pretrained.model.model.encode(tokens)
    assert (with_adapters - plain).abs().max() > 1e-2, "and the adapters did learn something"


def test_a_merged_model_can_be_finetuned_again(adapted: RunResult, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, {"max_epochs": 1}, label_key="donor")
    again = finetune(config, adapted.checkpoint_dir / "best.ckpt", data=marker_cells())
    assert again.model.labels.classes == ("d0", "d1", "d2", "d3")


def test_without_peft_the_model_loads_and_training_names_the_extra(
    adapted: RunResult, pretrained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "peft", None)
    load_model(adapted.checkpoint_dir / "best.ckpt")
    load_model(adapted.run_dir / "model")
    config = finetune_config(tmp_path / "run", lora={"enabled": True})
    with pytest.raises(MissingExtraError, match=r"finetune.lora needs the package 'peft'.*\n.*\[peft\]"):
        finetune(config, pretrained.run_dir / "model", data=marker_cells())
    assert not (tmp_path / "run").exists()


def test_the_trained_share_is_reported(
    pretrained: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "scmodelforge"):
        finetune(
            finetune_config(tmp_path, {"max_steps": 1}, lora=LORA.model_dump()),
            pretrained.run_dir / "model",
            data=marker_cells(),
        )
    # rank 4: 2 blocks × (4 squares of 16, and 16 × 24 twice), and the head of 3 classes
    expected = 2 * (4 * 4 * (16 + 16) + 2 * 4 * (16 + 24)) + 3 * 16 + 3
    assert any(
        f"{expected:,} of " in message and "parameters train (" in message for message in caplog.messages
    )


def test_trainable_share_counts() -> None:
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert trainable_share(layer) == (6, 8)
