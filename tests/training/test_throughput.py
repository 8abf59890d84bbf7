"""Figures of a run: real tokens and padding, time to the first step, memory, utilization of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scmodelforge.cli_output import speed_line
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.models.flops import TRAINING_OVER_FORWARD, encoding_flops, training_flops
from scmodelforge.training import throughput
from scmodelforge.training.callbacks import ProgressBar
from scmodelforge.training.run import RunResult, train
from scmodelforge.training.throughput import Throughput, Work, peak_memory
from tests.helpers import finetune_config, marker_cells, tiny_config

FIGURES = ("cells_per_second", "tokens_per_second", "data_wait_share", "padding_share", "peak_memory_gib")


def batch(lengths: list[int], n_padding: int) -> SimpleNamespace:
    """What `Work.count` reads of a batch of so many tokens a cell."""
    tokens = SimpleNamespace(n_cells=len(lengths))
    return SimpleNamespace(tokens=tokens, n_tokens=sum(lengths), n_padding=n_padding)


def test_padding_is_what_was_computed_for_nothing() -> None:
    work = Work()
    work.count(batch([10, 6], 4))
    assert work.figures(1)["padding_share"] == pytest.approx(4 / 20)
    work.count(batch([5], 0))
    assert work.figures(1)["padding_share"] == pytest.approx(4 / 25)


def test_rates_are_those_of_all_ranks_and_of_real_tokens() -> None:
    work = Work(seconds=2.0, waited=0.5)
    work.count(batch([10, 6], 4))
    figures = (work + Work(seconds=2.0)).figures(world=3)
    assert figures["cells_per_second"] == pytest.approx(2 * 3 / 4)
    assert figures["tokens_per_second"] == pytest.approx(16 * 3 / 4)
    assert figures["data_wait_share"] == pytest.approx(0.5 / 4)
    assert figures["seconds_per_step"] == pytest.approx(4)


def test_nothing_done_gives_no_error() -> None:
    assert Work().figures(1)["cells_per_second"] == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_time_counts_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.4)\n"
        "from scmodelforge.training.throughput import seconds_since_start as s; print(*s(), sep='|')"
    )
    before = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, since = answer.stdout.strip().split("|")
    assert 0.4 <= float(seconds) <= time.perf_counter() - before + 0.1
    assert since == "start of the process"


def test_memory_of_the_process_grows_with_what_it_holds() -> None:
    before, of = peak_memory(torch.device("cpu"))
    held = torch.ones(100 * 2**20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu"))[0] - before > 0 or before > held.numel()
    assert of == "resident memory of the process"


def test_a_run_reports_its_figures(pretrained: RunResult) -> None:
    record = json.loads((pretrained.run_dir / "run.json").read_text())["performance"]
    assert record == pretrained.performance
    assert record["steps"] == 4 * 6 - 1, "the first step warms up"
    assert record["cells"] == 4 * 180 - 30
    assert record["cells"] / record["seconds"] == pytest.approx(record["cells_per_second"])
    assert record["padding_share"] == 0, "cells are packed"
    assert 0 <= record["data_wait_share"] <= 1
    assert record["peak_memory_gib"] > 0.1
    assert record["first_step_since"] == "start of the process"
    assert "mfu" not in record, "a CPU has none"
    table = pd.read_csv(pretrained.run_dir / "metrics.csv")
    for name in FIGURES:
        assert (table[name].dropna() >= 0).all(), name
        assert table[name].notna().sum() == 12, "every other step"


def test_fine_tuning_reports_them_too(annotator: RunResult) -> None:
    assert set(FIGURES) <= set(annotator.performance)


def test_the_summary_is_one_line() -> None:
    figures = {
        "cells_per_second": 1234.5,
        "tokens_per_second": 98765.4,
        "padding_share": 0.123,
        "data_wait_share": 0.001,
        "peak_memory_gib": 1.5,
        "first_step_seconds": 3.21,
    }
    rest = "padding 12.3%, waiting for data 0.1%, {}peak memory 1.50 GiB, first step after 3.2 s"
    assert speed_line(figures) == "Speed: 1,234 cells/s, 98,765 tokens/s, " + rest.format("")
    gpu = figures | {"mfu": 0.412, "matmul_flops_per_second": 790e12}
    assert speed_line(gpu).endswith(rest.format("MFU 41.2% of 790 TFLOP/s (measured), "))


def test_utilization_is_flops_over_those_of_matrix_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Throughput.on_train_start

    def as_if_on_a_gpu(self, trainer, module):
        start(self, trainer, module)
        self.matmul_rate = 1e9

    monkeypatch.setattr(Throughput, "on_train_start", as_if_on_a_gpu)
    counted: list[float] = []

    def noted(*arguments):
        counted.append(float(training_flops(*arguments)))
        return training_flops(*arguments)

    monkeypatch.setattr("scmodelforge.training.module.training_flops", noted)
    result = train(tiny_config(tmp_path / "run"), data=marker_cells())
    record = result.performance
    assert record["mfu"] == pytest.approx(sum(counted[1:]) / record["seconds"] / 1e9)
    assert record["mfu_of"].startswith("bfloat16 matrix products")
    assert pd.read_csv(tmp_path / "run/metrics.csv")["mfu"].notna().any()


@pytest.mark.parametrize(
    ("settings", "passes"), [({}, TRAINING_OVER_FORWARD), ({"freeze_backbone": True}, 1)]
)
def test_a_frozen_backbone_is_counted_forward_only(
    pretrained: RunResult, tmp_path: Path, settings: dict, passes: int
) -> None:
    from scmodelforge.finetuning.module import FinetuningModule
    from scmodelforge.models.bundle import Labels, build_head

    config = finetune_config(tmp_path, **settings)
    config = pretrained.model.config.model_copy(update={"finetune": config.finetune})
    labels = Labels("cell_type", "classification", classes=("a", "b"))
    bundle = ModelBundle(
        config, pretrained.model.vocab, pretrained.model.model, labels, build_head(config, labels)
    )
    module = FinetuningModule(bundle)
    lengths = torch.tensor([5, 7])
    flops = module.flops(SimpleNamespace(tokens=SimpleNamespace(lengths=lengths)))
    assert float(flops) == passes * float(encoding_flops(bundle.model, lengths.double()))


def test_without_proc_the_import_is_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "Path", lambda _: Path("/nowhere/at/all"))
    assert throughput.seconds_since_start()[1] == "import of scmodelforge.training"
    assert peak_memory(torch.device("cpu"))[0] > 2**20


class CountReads(TorchDispatchMode):
    """Counts how often the host reads a number from a tensor, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.n_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n_reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_reads_from_the_device(tmp_path: Path) -> None:
    """Also what Lightning does around a step: it reads whatever is logged for its progress bar."""
    reads = []
    for n_steps in (4, 24):
        training = {"max_steps": n_steps, "max_epochs": 4, "batch_size": 10, "log_every_n_steps": 1000}
        config = tiny_config(tmp_path / str(n_steps), data={"split": {"val_split": 0.0}}, training=training)
        with CountReads() as counter:
            assert train(config, data=marker_cells(300)).performance["steps"] == n_steps - 1
        reads.append(counter.n_reads)
    assert reads[0] == reads[1]


def test_the_progress_bar_reads_where_figures_are_logged() -> None:
    bar, trainer = ProgressBar(), SimpleNamespace(log_every_n_steps=10, is_last_batch=False, max_steps=-1)
    trainer.progress_bar_metrics, trainer.loggers = {}, []
    shown = []
    for step in (10, 13, 20):
        loss = torch.tensor(float(step))
        trainer.global_step = step
        trainer.callback_metrics = {
            "train_loss": loss,
            "cells_per_second": torch.tensor(7.0),
            "grad_norm": loss,
        }
        shown.append(bar.get_metrics(trainer, None))
    assert shown == [{"loss": float(step), "cells/s": 7.0} for step in (10, 10, 20)]
