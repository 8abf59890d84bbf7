"""Real cells, and models that the commands made of them, each by the files that the one before really wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import anndata
import pytest
import torch

from tests.journeys.command import checkpoint, done, sets

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
CONFIG = """\
data:
  gene_vocab: from_data
  paths: [{cells}]
tokenizer:
  max_genes: 48
model:
  hidden_dim: 16
  num_layers: 1
  num_heads: 2
training:
  batch_size: 64
  max_epochs: 2
  num_gpus: 0
  optimizer: {{lr: 0.01}}
  run_dir: {run}
eval:
  benchmarks:
    - name: linear_probe
      params: {{cell_type_key: cell_type, n_splits: 2}}
finetune:
  label_key: cell_type
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the journey takes place."""
    return tmp_path_factory.mktemp("journey")


@pytest.fixture(scope="session")
def cells(folder: Path) -> Path:
    """The 700 labelled PBMCs that the quickstart writes."""
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    assert spec is not None
    assert spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    quickstart.CELLS = folder / "pbmc.h5ad"
    quickstart.write_cells()
    return quickstart.CELLS


@pytest.fixture
def adata(cells: Path) -> anndata.AnnData:
    """120 of them, in memory, of the two largest types."""
    everything = anndata.read_h5ad(cells)
    largest = everything.obs["cell_type"].value_counts().index[:2]
    return everything[everything.obs["cell_type"].isin(largest)][:120].copy()


@pytest.fixture(scope="session")
def config(folder: Path, cells: Path) -> Path:
    """One YAML file for all commands."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(cells=cells, run=folder / "trained"))
    return path


@pytest.fixture(scope="session")
def trained(folder: Path, config: Path) -> Path:
    """Run folder of `scmodelforge train`."""
    done("train", "--config", config)
    return folder / "trained"


@pytest.fixture(scope="session")
def tuned(folder: Path, config: Path, trained: Path) -> Path:
    """Run folder of `scmodelforge finetune`."""
    run = folder / "tuned"
    done("finetune", "--config", config, "--checkpoint", checkpoint(trained), *sets(training__run_dir=run))
    return run
