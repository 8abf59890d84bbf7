"""The three configs that users already have, word for word, with data where they say that data are.

Only sizes are overridden on the command line, so that it takes seconds; 4 GPUs, bf16, wandb and 2,000 warm-up
steps stay as they are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest

from tests.journeys.command import BASELINES, Answer, done, files_below, refused, sets

CONTRACT = Path(__file__).parents[1] / "config" / "contract"
SMALLER = {
    "tokenizer__max_genes": 32,
    "model__hidden_dim": 16,
    "model__num_layers": 1,
    "model__num_heads": 2,
}


@pytest.fixture(scope="module")
def place(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the configs and three files of cells; it is the current one."""
    pytest.importorskip("wandb")
    place = tmp_path_factory.mktemp("contract")
    for path in CONTRACT.glob("*.yaml"):
        shutil.copy(path, place)
    (place / "data").mkdir()
    adata = anndata.read_h5ad(cells)
    adata.obs["batch"] = [f"b{number % 2}" for number in range(adata.n_obs)]
    adata[::2].copy().write_h5ad(place / "data" / "pbmc_10k.h5ad")
    adata[::2].copy().write_h5ad(place / "data" / "labeled_pbmc.h5ad")
    adata[1::2].copy().write_h5ad(place / "data" / "unseen.h5ad")
    adata.write_h5ad(place / "data" / "test_dataset.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("WANDB_MODE", "offline")
        yield place


@pytest.fixture(scope="module")
def training(place: Path) -> Answer:
    return done(
        *("train", "--config", "train_config.yaml"),
        *sets(**SMALLER, training__max_epochs=2, training__batch_size=32),
    )


@pytest.fixture(scope="module")
def finetuning(training: Answer) -> Answer:
    return done(
        *("finetune", "--config", "finetune_config.yaml", "--checkpoint", "checkpoints/best.ckpt"),
        *sets(**SMALLER, training__max_epochs=3),
    )


def test_train(training: Answer, place: Path) -> None:
    assert "training.num_gpus is 4, but only the CPU can be used here" in training.err
    assert "training.scheduler.warmup_steps is 2,000, but this run has 20 steps" in training.err
    assert {"best.ckpt", "last.ckpt"} <= set(files_below(place / "checkpoints"))
    (run,) = (place / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file()
    assert any(name.startswith("wandb/offline-run-") for name in files_below(run))
    assert "num_gpus" in json.dumps(json.loads((run / "run.json").read_text())["notes"])


def test_benchmark_linear_probe(training: Answer, place: Path) -> None:
    text = (place / "eval_config.yaml").read_text()
    (place / "probe.yaml").write_text(text[: text.index("    - name: embedding_quality")])
    answer = done(
        *("benchmark", "--config", "probe.yaml", "--model", "checkpoints/best.ckpt"),
        *("--data", "data/test_dataset.h5ad", "--output", "results/probe.json", *sets(**SMALLER)),
    )
    assert "linear_probe (test)" in answer.out
    rows = json.loads((place / "results" / "probe.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["model", *BASELINES]
    score = {row["method"]: row["metrics"]["macro_f1"] for row in rows}
    assert score["pca"] > 0.4


@pytest.mark.slow
def test_benchmark_word_for_word(training: Answer, place: Path) -> None:
    pytest.importorskip("scib_metrics")
    done(
        *("benchmark", "--config", "eval_config.yaml", "--model", "checkpoints/best.ckpt"),
        *("--data", "data/test_dataset.h5ad", "--output", "results/metrics.json"),
        *sets(**SMALLER, eval__baselines="[untrained]"),  # PCA has another width: compiled once more
    )
    rows = json.loads((place / "results" / "metrics.json").read_text())["results"]
    assert {(row["benchmark"], row["method"]) for row in rows} == {
        (benchmark, method)
        for benchmark in ("linear_probe", "embedding_quality")
        for method in ("model", "untrained")
    }
    quality = [row["metrics"] for row in rows if row["benchmark"] == "embedding_quality"]
    assert all(np.isfinite(metrics["batch_correction"]) for metrics in quality)


def test_finetune_and_annotate(finetuning: Answer, place: Path) -> None:
    assert {"best.ckpt", "last.ckpt"} <= set(files_below(place / "checkpoints_finetuned"))
    done(
        *("annotate", "--model", "checkpoints_finetuned/best.ckpt"),
        *("--data", "data/unseen.h5ad", "--output", "results/annotated.h5ad"),
    )
    annotated = anndata.read_h5ad(place / "results" / "annotated.h5ad")
    assert annotated.obs["scmodelforge_cell_type"].notna().all()
    assert annotated.n_obs == 350


def test_embed(training: Answer, place: Path) -> None:
    done(
        *("embed", "--model", "checkpoints/best.ckpt"),
        *("--data", "data/unseen.h5ad", "--output", "results/embedded.h5ad"),
    )
    embedded = anndata.read_h5ad(place / "results" / "embedded.h5ad")
    assert embedded.obsm["X_scmodelforge"].shape == (350, 16)
    assert np.isfinite(embedded.obsm["X_scmodelforge"]).all()


CONTRADICTIONS = (
    "tokenizer.max_genes: 2048 in the config, 32 in the model",
    "model.hidden_dim: 512 in the config, 16 in the model",
    "model.num_layers: 12 in the config, 1 in the model",
    "model.num_heads: 8 in the config, 2 in the model",
    "Take these keys out of the config",
)


def test_benchmark_lists_what_contradicts_the_model(training: Answer, place: Path) -> None:
    refused(
        *("benchmark", "--config", "eval_config.yaml", "--model", "checkpoints/best.ckpt"),
        *("--data", "data/test_dataset.h5ad", "--output", "refused/metrics.json"),
        words=CONTRADICTIONS,
    )
    assert files_below(place / "refused") == []


def test_finetune_lists_what_contradicts_the_model(training: Answer, place: Path) -> None:
    refused(
        *("finetune", "--config", "finetune_config.yaml", "--checkpoint", "checkpoints/best.ckpt"),
        *sets(training__checkpoint_dir="refused", training__run_dir="refused"),
        words=CONTRADICTIONS,
    )
    assert files_below(place / "refused") == []


def test_embed_refuses_the_same(training: Answer) -> None:
    refused(
        *("embed", "--config", "eval_config.yaml", "--model", "checkpoints/best.ckpt"),
        *("--data", "data/unseen.h5ad", "--output", "refused/e.h5ad"),
        words=CONTRADICTIONS,
    )
