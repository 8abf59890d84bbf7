"""What only a GPU can show: its kernels give the same, a step never waits for the device, and a run learns there.

The cells are drawn at random, so that a machine with nothing but torch, Lightning and anndata can run this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from scmodelforge import inference_batches
from scmodelforge.config import Config
from scmodelforge.inference import embed_store, open_for
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import Objective, PackedBatch
from scmodelforge.strategies import TABLE, Combination
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.module import loss_terms
from scmodelforge.training.run import train
from tests.helpers import make_cells, make_vocab, marker_cells, tiny_config, untrained_annotator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")

ALLOWED = [row for row in TABLE.values() if row.allowed]
N_GENES, N_CELLS = 400, 24


def made(row: Combination, **model: Any) -> tuple[CellTransformer, Objective, PackedBatch]:
    """A model, its task and a packed batch of cells between 20 and 300 genes, on the CPU."""
    config = Config.model_validate(
        {
            "tokenizer": {"strategy": row.tokenizer, "max_genes": 256},
            "model": {
                "architecture": row.architecture,
                "pretraining_task": row.task,
                "hidden_dim": 64,
                "num_layers": 2,
                "num_heads": 2,
                "dropout": 0.0,
                "decoder": {"num_layers": 1},
                **model,
            },
        }
    )
    rng, vocab = np.random.default_rng(0), make_vocab(N_GENES)
    counts = rng.poisson(rng.gamma(0.5, 2.0, N_GENES) * rng.uniform(0.2, 3, (N_CELLS, 1)))
    task = build_objective(config, vocab)
    tokens = build_tokenizer(config, vocab)(make_cells(counts.astype(np.float32)), 1, 0)
    return build_model(config, vocab, seed=0), task, task.pack(task.corrupt(tokens, 1, 0), n_asked=1)


def loss_and_gradient(
    model: CellTransformer, task: Objective, batch: PackedBatch, half: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and all gradients in one vector, both float32 on the CPU."""
    model.zero_grad()
    with torch.autocast(batch.asked.device.type, torch.bfloat16, enabled=half):
        loss = task(model.train(), batch).loss
    loss.backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach().float().cpu(), torch.cat(gradients).cpu()


def named(row: Combination) -> str:
    return f"{row.tokenizer}-{row.architecture}-{row.task}"


@pytest.mark.parametrize("row", ALLOWED, ids=named)
def test_a_gpu_gives_the_loss_and_gradients_of_the_cpu(row: Combination) -> None:
    model, task, batch = made(row)
    loss, gradient = loss_and_gradient(model, task, batch)
    model, batch = model.cuda(), batch.to(torch.device("cuda"))
    on_gpu, its_gradient = loss_and_gradient(model, task, batch)
    assert on_gpu == pytest.approx(float(loss), rel=1e-4)
    assert (its_gradient - gradient).norm() < 1e-3 * gradient.norm()
    in_half, half_gradient = loss_and_gradient(model, task, batch, half=True)
    assert in_half == pytest.approx(float(loss), rel=2e-2)
    cosine = torch.nn.functional.cosine_similarity(half_gradient, gradient, dim=0)
    assert cosine > 0.98, "bfloat16 kernels point where float32 points"


@pytest.mark.parametrize("row", ALLOWED, ids=named)
def test_a_step_never_waits_for_the_gpu(row: Combination) -> None:
    model, task, batch = made(row)
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = batch.pin_memory()

    def step() -> None:
        there = batch.arriving(torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            terms = loss_terms(task, model, there)
            loss = torch.stack([term.weight * term.mean for term in terms.values()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # what is compiled at its first use may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHANGED = TABLE["continuous_projection", "autoregressive_transformer", "dual_prediction"]


def test_a_compiled_step_is_the_same_where_scores_are_changed() -> None:
    model, task, batch = made(CHANGED, soft_cap=5.0)
    loss, gradient = loss_and_gradient(model, task, batch)
    model, batch = model.cuda(), batch.to(torch.device("cuda"))
    on_gpu, its_gradient = loss_and_gradient(model, torch.compile(task), batch)
    assert on_gpu == pytest.approx(float(loss), rel=1e-4)
    assert (its_gradient - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_a_gpu_learns_and_reports(tmp_path: Path, compiled: bool) -> None:
    config = tiny_config(
        tmp_path / "run",
        training={"num_gpus": 1, "max_epochs": 6, "precision": "bf16-mixed", "compile": compiled},
    )
    result = train(config, data=marker_cells())
    losses = pd.read_csv(tmp_path / "run/metrics.csv")["train_loss"].dropna().to_numpy()
    assert losses[-1] < losses[0]
    assert result.performance["mfu"] > 0
    assert result.performance["peak_memory_of"] == "allocated on the GPU"
    store = open_for(result.model, marker_cells())
    in_float, in_half, on_cpu = (
        embed_store(result.model, store, precision=precision, device=device)
        for precision, device in (("32", "cuda"), ("bf16", "cuda"), ("32", "cpu"))
    )
    np.testing.assert_allclose(in_float, on_cpu, atol=1e-4)
    np.testing.assert_allclose(in_half, on_cpu, atol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_cells_are_embedded_by_a_model_that_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    model = {"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "activation": "relu"}
    bundle = untrained_annotator(model=model)
    store = open_for(bundle, marker_cells(50, seed=7))
    expected = embed_store(bundle, store, 8, precision=precision)
    monkeypatch.setattr(inference_batches, "COMPILED_FROM", 0)
    torch.compiler.reset()
    embed_store(bundle, store, 7, rows=np.arange(14), precision=precision)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch_size in (4, 8, 9):  # of which none leaves a cell alone, for which torch compiles again
            found = embed_store(bundle, store, batch_size, precision=precision)
            np.testing.assert_allclose(found, expected, atol=0.05)
