"""Auxiliary losses: formulas by hand, unknown batches, and the way they come into a task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.auxiliary import AuxiliaryHeads, ReversedGradient
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import PackedBatch, TrainingBatch, pack
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import Packing
from tests.helpers import make_vocab

WIDTH, N_CELLS = 8, 5
BATCH = {"batch_key": "donor", "batch_weight": 1.0}


def config(architecture: str = "transformer_encoder", **objective: Any) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {
                "strategy": "binned_expression",
                "vocab_layout": "scgpt",
                "include_zero_genes": objective.get("zero_probability", False),
                "masking": {"mask_ratio": 0.5},
            },
            "model": {
                "architecture": architecture,
                "pretraining_task": "expression_reconstruction",
                "hidden_dim": WIDTH,
                "num_layers": 1,
                "num_heads": 2,
                "objective": objective,
            },
        }
    )


def vocab() -> GeneVocab:
    return make_vocab(20, layout="scgpt").with_obs_categories({"assay": ["x"], "donor": ["a", "b"]})


def tokens(donors: list[int]) -> TokenBatch:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(20, 9, replace=False) + 4 for _ in donors])
    values = rng.integers(0, 7, ids.shape).astype(np.float32)
    obs = torch.tensor([[1, donor] for donor in donors])
    ids[:, 0] = 2
    lengths = torch.full((len(donors),), 9)
    return TokenBatch(
        torch.from_numpy(ids), torch.from_numpy(values), lengths, torch.arange(len(donors)), False, obs
    )


def heads(**objective: Any) -> AuxiliaryHeads:
    torch.manual_seed(0)
    built = AuxiliaryHeads.build(config(**objective), vocab())
    assert built is not None
    return built


def batch(donors: tuple[int, ...] = (1, 2, 2, 1, 0)) -> PackedBatch:
    asked = torch.tensor([1, 2, 10, 30, 40])
    some = tokens(list(donors))
    values = torch.tensor([3.0, 0, 1, 0, 6])
    padded = TrainingBatch(some, asked, some.input_ids.flatten()[asked], values, 0, 0)
    return pack(padded, Packing.of(config(), vocab()), vocab().pad_id)


def test_there_are_no_heads_without_weights() -> None:
    assert AuxiliaryHeads.build(config(), vocab()) is None
    only = heads(ecs_weight=1.0)
    assert not list(only.parameters())


def test_values_are_told_from_the_cell_and_the_gene() -> None:
    aux = heads(cell_weight=3.0, zero_probability=True)
    cells, genes, asked = torch.randn(N_CELLS, WIDTH), torch.randn(5, WIDTH), batch()
    terms = aux.terms(cells, genes, asked)
    head = aux.cell_expression
    assert head is not None
    assert head.nonzero is not None
    query = torch.sigmoid(F.linear(genes, head.query.weight, head.query.bias))
    cell = cells[torch.tensor([0, 0, 1, 3, 4])]
    value = torch.einsum("md,dw,mw->m", query, head.value.weight.T, cell)
    logit = torch.einsum("md,dw,mw->m", query, head.nonzero.weight.T, cell) + cell @ head.nonzero.bias
    torch.testing.assert_close(terms["cell_expression"].mean, (value - asked.values).square().mean())
    p = torch.sigmoid(logit)
    likelihood = torch.where(asked.values > 0, p, 1 - p)
    torch.testing.assert_close(terms["cell_nonzero"].mean, -likelihood.log().mean())
    assert {term.weight for term in terms.values()} == {3.0}


def test_similar_cells_are_drawn_together_and_others_apart() -> None:
    aux = heads(ecs_weight=10.0, ecs_threshold=0.6)
    angles = torch.tensor([0.0, 0.3, 2.0], requires_grad=True)
    cells = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [4.0], [2.0]])
    term = aux.terms(cells, torch.empty(0, WIDTH), batch())["ecs"]
    expected = 0.0
    for i in range(3):
        for j in range(3):
            cosine = 0.0 if i == j else max(float((angles[i] - angles[j]).detach().cos()), 0.0)
            expected += (1 - (cosine - 0.6) ** 2) / 9
    assert term.mean.item() == pytest.approx(expected, rel=1e-5)
    assert (term.count, term.weight) == (9, 10.0)
    term.mean.backward()
    assert angles.grad is not None
    assert angles.grad[1] > 0  # downhill, the second cell turns to the first


def test_batches_are_named_behind_a_reversed_gradient() -> None:
    aux = heads(**BATCH)
    classifier = aux.batch
    assert classifier is not None
    cells = torch.randn(N_CELLS, WIDTH, requires_grad=True)
    asked = batch(donors=(1, 2, 2, 1, 0))  # the last one is unknown
    term = aux.terms(cells, torch.empty(5, WIDTH), asked)["batch"]
    plain = classifier.out(classifier.layers(cells))
    expected = F.cross_entropy(plain[:4], torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(term.mean, expected)
    assert term.count == 4
    reversed_gradient = torch.autograd.grad(term.mean, cells, retain_graph=True)[0]
    torch.testing.assert_close(reversed_gradient, -torch.autograd.grad(expected, cells)[0])
    assert not reversed_gradient[4].any()


def test_only_unknown_batches_have_no_loss() -> None:
    term = heads(**BATCH).terms(torch.randn(5, WIDTH), torch.empty(5, WIDTH), batch(donors=(0,) * 5))["batch"]
    assert (term.count, term.mean.item()) == (0, 0.0)


def test_validation_cells_of_unknown_batches_leave_a_loss_to_compare() -> None:
    settings = config(**BATCH)
    model, task = build_model(settings, vocab(), seed=0), build_objective(settings, vocab())
    training = task.corrupt(tokens([0, 0]), 1, 0)
    metrics = task.metrics(task.count(task(model, training), training))
    assert metrics["loss"] == metrics["expression_loss"]
    assert np.isnan(metrics["batch_loss"])


def test_the_identity_keeps_values() -> None:
    x = torch.randn(3)
    assert torch.equal(ReversedGradient.apply(x), x)


@pytest.mark.parametrize("architecture", ["transformer_encoder", "autoregressive_transformer"])
def test_a_task_adds_and_reports_all_terms(architecture: str) -> None:
    everything: dict[str, Any] = {"cell_weight": 0.5, "ecs_weight": 2.0, "zero_probability": True}
    settings = config(architecture, **everything, **BATCH, batch_labels=True)
    model, task = build_model(settings, vocab(), seed=0), build_objective(settings, vocab())
    training = task.corrupt(tokens([1, 2, 2, 1, 0]), 1, 0)
    output = task(model, training)
    weights = {"expression": 1.0, "nonzero": 1.0, "cell_expression": 0.5, "cell_nonzero": 0.5}
    weights |= {"ecs": 2.0, "batch": 1.0}
    assert output.losses.keys() == weights.keys()
    expected = sum(weight * output.losses[name] for name, weight in weights.items())
    torch.testing.assert_close(output.loss, expected)
    metrics = task.metrics(task.count(output, training))
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    for name, loss in output.losses.items():
        assert metrics[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_normalized_embeddings_leave_the_losses_alone() -> None:
    losses = []
    for normalize in (False, True):
        settings = config(cell_weight=1.0)
        settings = settings.model_copy(
            update={"model": settings.model.model_copy(update={"normalize_embedding": normalize})}
        )
        model, task = build_model(settings, vocab(), seed=0), build_objective(settings, vocab())
        losses.append(task(model.eval(), task.corrupt(tokens([1, 2]), 1, 0)).loss)
    assert losses[0] == losses[1]
