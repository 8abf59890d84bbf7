"""`plan`: what a run will cost, told before it starts and without leaving anything behind."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from scmodelforge.cli_output import print_plan
from scmodelforge.errors import UserError
from scmodelforge.training import plan as planning
from scmodelforge.training import setup
from scmodelforge.training.plan import Plan, plan
from scmodelforge.training.run import train
from tests.helpers import marker_cells, tiny_config
from tests.journeys.command import files_below

N_TRAIN, EPOCHS = 180, 2


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = plan(tiny_config(folder / "run"), marker_cells())
    assert files_below(folder) == [], "nothing is written"
    return found


def test_a_plan_is_what_the_run_turns_out_to_be(planned: Plan, tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path / "run"), data=marker_cells())
    assert planned.parameters == result.model.n_parameters
    assert planned.steps_per_epoch == 6
    assert planned.optimizer_steps == 6 * EPOCHS
    record = result.performance
    assert len(planned.tokens) == N_TRAIN, "all training cells, as there are few"
    assert planned.tokens.mean() == pytest.approx(record["tokens"] / record["cells"], rel=0.03)
    assert planned.tokens.max() <= 32
    assert planned.flops_per_epoch == pytest.approx(N_TRAIN * planned.flops_per_cell)


def test_steps_are_measured(planned: Plan) -> None:
    assert 2 <= planned.performance["steps"] < 6 * EPOCHS
    cells = EPOCHS * (N_TRAIN + 60 / 3)
    assert planned.seconds == pytest.approx(cells / planned.performance["cells_per_second"])
    assert planned.batch_bytes_measured is not None
    assert planned.fixed_bytes == pytest.approx(16 * planned.parameters, rel=0.01)
    assert any("An epoch has only 6 steps, and so the run 12" in note for note in planned.notes)


def test_the_same_cells_are_sampled_again(planned: Plan, tmp_path: Path) -> None:
    again = plan(tiny_config(tmp_path), marker_cells())
    np.testing.assert_array_equal(again.tokens, planned.tokens)
    assert again.flops_per_cell == planned.flops_per_cell


def test_the_table_has_it_all(planned: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(planned)
    out = capsys.readouterr().out
    for words in ("180 sampled", "12 (6 batches an epoch)", "by formula", "cells/s", "time to finish"):
        assert words in out
    assert f"{planned.parameters:,}" in out


def test_a_warm_up_longer_than_a_tenth_is_said(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"scheduler": {"warmup_steps": 500}})
    notes = plan(config, marker_cells()).notes
    assert any("warmup_steps is 500, but this run has 12 steps" in note for note in notes)


def test_a_batch_too_large_for_memory_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda device: 10_000)
    monkeypatch.setattr(planning, "_try_steps", None)  # calling it would be an error
    found = plan(tiny_config(tmp_path), marker_cells())
    assert found.seconds is None
    assert found.performance == {}
    (note,) = (note for note in found.notes if "it was not tried" in note)
    assert "A batch of 30 cells needs about" in note
    assert "training.accumulate_grad_batches" in note


def test_a_batch_that_the_gpu_cannot_hold_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(planning, "saved_bytes", full)
    with pytest.raises(
        UserError, match=r"A batch of 30 cells \([\d,]+ tokens\) does not fit into the memory"
    ):
        plan(tiny_config(tmp_path), marker_cells())


def test_compiling_a_short_run_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class Compiled:
        compile, max_epochs, max_steps, accumulate_grad_batches = True, 3, None, 1

    with caplog.at_level(logging.WARNING):
        planning._warn(Compiled, 1000, seconds=4000.0)  # type: ignore[arg-type]
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        planning._warn(Compiled, 1000, seconds=40.0)  # type: ignore[arg-type]
    assert "training.compile costs up to 30 s at its start and will hardly pay" in caplog.text


@pytest.mark.parametrize("has_it", [True, False])
def test_half_precision_on_a_processor_without_it_is_said(
    has_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(setup, "bf16_on_cpu", lambda: has_it)
    with caplog.at_level(logging.WARNING):
        setup.check_environment(tiny_config(tmp_path, training={"precision": "bf16-mixed"}).training)
    assert ("neither AVX512-BF16 nor AMX" in caplog.text) is not has_it


def test_the_processor_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False)
    assert not setup.bf16_on_cpu()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert setup.bf16_on_cpu()
