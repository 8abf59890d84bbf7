"""Fixtures that many tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scmodelforge.training.run import RunResult

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers share the cores; set before torch is imported, and inherited
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of public data sets beside the repository; without it the test is skipped."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs the real cells in {REAL_DATA}, which is not there")
    return REAL_DATA


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A tiny model that `train` pretrained on `helpers.marker_cells`; nobody changes it."""
    import torch

    from scmodelforge.training.run import train
    from tests.helpers import marker_cells, tiny_config

    torch.set_num_threads(1)
    return train(
        tiny_config(tmp_path_factory.mktemp("pretrained"), training={"max_epochs": 4}), data=marker_cells()
    )


@pytest.fixture(scope="session")
def annotator(pretrained: RunResult, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The same model after `finetune` taught it the cell types; nobody changes it."""
    from scmodelforge.finetuning.run import finetune
    from tests.helpers import finetune_config, marker_cells

    config = finetune_config(tmp_path_factory.mktemp("annotator"))
    return finetune(config, pretrained.checkpoint_dir / "best.ckpt", data=marker_cells())


@pytest.fixture(scope="session")
def example_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed examples/plugin; only processes that are given it see the package."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(
        Path(__file__).parents[1] / "examples/plugin", folder / "source"
    )  # built in place
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True)
    return folder / "site"
