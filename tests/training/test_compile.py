"""A compiled step learns the same, and is compiled in the first epoch only."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters

from scmodelforge.config_io import parse_config
from scmodelforge.training import setup
from scmodelforge.training.run import train
from tests.helpers import marker_cells

pytestmark = pytest.mark.slow


class NothingIsCompiledLater(Callback):
    """From the second epoch on a recompilation is an error."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            torch.compiler.set_stance("fail_on_recompile")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("sizes", [{"batch_size": 16}, {"tokens_per_batch": 256}])
def test_a_compiled_run_learns_the_same_and_compiles_nothing_later(
    sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, losses = setup.build_trainer, {}
    monkeypatch.setattr(
        "scmodelforge.training.run.build_trainer",
        lambda *args, callbacks=(), **options: build(
            *args, **options, callbacks=(*callbacks, NothingIsCompiledLater())
        ),
    )
    torch.compiler.reset()
    counters.clear()
    for compiled in (True, False):
        config = {
            "data": {"gene_vocab": "from_data"},
            "tokenizer": {"max_genes": 32},
            "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
            "training": {
                "max_epochs": 3,
                "run_dir": str(tmp_path / str(compiled)),
                "log_every_n_steps": 1,
                "compile": compiled,
                **sizes,
            },
        }
        train(parse_config(config), data=marker_cells(100))
        losses[compiled] = pd.read_csv(tmp_path / str(compiled) / "metrics.csv")["train_loss"].dropna()
        if compiled and "tokens_per_batch" in sizes:
            assert counters["stats"]["unique_graphs"] == 1, "whatever the number of cells"
    assert len(losses[True]) >= 9
    assert losses[True].to_numpy() == pytest.approx(losses[False].to_numpy(), abs=2e-5)
