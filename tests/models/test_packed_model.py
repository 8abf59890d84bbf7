"""A packed batch is nothing but its cells: alone, in company or with a tail, loss and gradients are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scmodelforge.config import Config
from scmodelforge.data.batch import CellBatch
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.models.base import CellTransformer
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.batch import Objective, PackedBatch
from scmodelforge.models.objectives.counts import EPSILON
from scmodelforge.models.transformer import Block, Transformer
from scmodelforge.strategies import TABLE
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.training.global_loss import global_loss
from tests.helpers import make_cells, make_vocab
from tests.models.test_strategies import ALLOWED, N_GENES, batch_of, config_of, named, real_counts

Names = tuple[str, str, str]  # tokenizer, architecture, task
COLUMNS = {"obs_tokens": ["donor", "assay"], "vocab_layout": "transcriptformer"}
COUNTS = {"preprocessing": {"normalize": "none", "log1p": False}}
BATCHES = {"batch_key": "donor", "batch_weight": 0.5}
CASES: dict[str, tuple[Names, dict[str, Any]]] = {
    named(row): ((row.tokenizer, row.architecture, row.task), {}) for row in ALLOWED
} | {
    "columns, cap, cls, last norm": (
        ("binned_expression", "transformer_encoder", "dual_prediction"),
        {
            "tokenizer": COLUMNS | {"prepend_cls": True},
            "model": {"soft_cap": 8.0, "pooling": "cls", "norm": "post", "qk_norm": True},
        },
    ),
    "zeros, cells and batches": (
        ("binned_expression", "transformer_encoder", "expression_reconstruction"),
        {
            "tokenizer": {"include_zero_genes": True, "max_genes": 210},
            "model": {
                "objective": BATCHES | {"zero_probability": True, "cell_weight": 0.7, "batch_labels": True}
            },
        },
    ),
    "generated twice": (
        ("binned_expression", "autoregressive_transformer", "expression_reconstruction"),
        {
            "tokenizer": {"prepend_cls": True, "obs_tokens": ["donor"]},
            "model": {
                "pooling": "cls",
                "objective": BATCHES | {"reference": True, "second_pass_weight": 0.5, "cell_weight": 0.7},
            },
        },
    ),
    "columns that the decoder does not read": (
        ("continuous_projection", "masked_autoencoder", "expression_reconstruction"),
        {
            "tokenizer": {"obs_tokens": ["donor", "assay"]},
            "model": {"objective": BATCHES | {"zero_mask_ratio": 0.05, "cell_weight": 0.7}},
        },
    ),
    "counts that bias, columns and a cap": (
        ("continuous_projection", "autoregressive_transformer", "dual_prediction"),
        {
            "data": COUNTS,
            "tokenizer": COLUMNS | {"prepend_cls": True, "max_genes": 60},
            "model": {
                "soft_cap": 10.0,
                "count_bias": True,
                "pooling": "window",
                "norm": "normed_residual",
                "objective": {"reference": True},
            },
        },
    ),
    "counts that bias": (
        ("continuous_projection", "autoregressive_transformer", "next_gene"),
        {"data": COUNTS, "tokenizer": {"append_eos": True}, "model": {"count_bias": True}},
    ),
}
SIMILAR = (  # a loss that compares cells, which therefore come together
    ("binned_expression", "transformer_encoder", "dual_prediction"),
    {"model": {"objective": {"ecs_weight": 0.5}}},
)
N_CELLS = 6
everywhere = pytest.mark.parametrize("case", CASES)


def made(case: str, **model: Any) -> tuple[Config, GeneVocab, CellTransformer, Objective]:
    """Config, vocabulary, model and task, with weights so large that attention tells tokens apart."""
    names, sections = (CASES | {"similar cells": SIMILAR})[case]
    tree = config_of(TABLE[names]).model_dump(exclude_unset=True)
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    tree["model"] |= model
    config = Config.model_validate(tree)
    vocab = make_vocab(N_GENES, layout=config.tokenizer.vocab_layout)
    vocab = vocab.with_obs_categories({"assay": ["x", "y"], "donor": ["a", "b", "c"]})
    built = build_model(config, vocab, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25, generator=generator)
    return config, vocab, built, build_objective(config, vocab)


def some_cells(first: int = 0, last: int = N_CELLS) -> CellBatch:
    """Cells by number, each with its columns; number 2 is of an unknown donor and assay, number 4 has no counts."""
    counts = np.array(real_counts()[:N_CELLS])
    counts[4] = 0
    obs = np.array([[1, 1], [2, 3], [0, 0], [1, 0], [2, 2], [0, 1]])
    return replace(make_cells(counts[first:last], first_row=first), obs=obs[first:last])


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Of a gradient that is zero by nature, as that of the keys' bias, only rounding is left.
        allowed = 1e-4 * float(gradient.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(found[name], gradient, atol=allowed, rtol=0, msg=name)


@everywhere
def test_cells_together_give_the_loss_and_gradients_of_each_alone(case: str) -> None:
    config, vocab, model, task = made(case)
    whole = task(model, batch_of(config, vocab, task, some_cells(), 0))
    expected = gradients(model, whole.loss)
    total, sums = torch.zeros(()), dict.fromkeys(whole.terms, 0.0)
    for cell in range(N_CELLS):
        alone = task(model, batch_of(config, vocab, task, some_cells(cell, cell + 1), 0))
        for name, term in alone.terms.items():
            total = total + term.weight * term.total / whole.terms[name].count
            sums[name] += float(term.count)
    assert sums == {name: float(term.count) for name, term in whole.terms.items()}
    torch.testing.assert_close(total, whole.loss, atol=1e-5, rtol=1e-5)
    same(gradients(model, total), expected)


@pytest.mark.parametrize("case", [*CASES, "similar cells"])
def test_a_tail_and_questions_about_nothing_change_nothing(case: str) -> None:
    config, vocab, model, task = made(case)
    batch = batch_of(config, vocab, task, some_cells(), 0)
    packed = task.pack(batch)
    plain = task(model, packed)
    expected = gradients(model, plain.loss)
    n_tokens = len(packed.tokens.input_ids)
    # What is asked beside the tokens has its own sequences, which know no tail.
    total = n_tokens if packed.queries is not None else n_tokens + 300
    filled: PackedBatch = task.pack(batch, total=total, n_asked=packed.n_asked + 50)
    output = task(model, filled)
    assert filled.n_padding == total - n_tokens
    assert filled.n_asked == packed.n_asked
    if packed.queries is None:
        assert len(filled.asked) % 128 == 0
    torch.testing.assert_close(output.loss, plain.loss, atol=1e-5, rtol=1e-5)
    same(gradients(model, global_loss(output.terms, filled.n_tokens).share), expected)
    figures = task.count(output, filled)
    torch.testing.assert_close(figures, task.count(plain, packed), atol=1e-4, rtol=1e-5)


@everywhere
def test_an_embedding_is_the_same_alone_in_company_and_before_a_tail(case: str) -> None:
    config, vocab, model, _ = made(case)
    model.eval()
    tokenizer = build_tokenizer(config, vocab)
    tokens = tokenizer(some_cells())
    with torch.no_grad():
        together = model.encode(tokens)
        alone = torch.cat([model.encode(tokenizer(some_cells(cell, cell + 1))) for cell in range(N_CELLS)])
        before_tail = model.encode(model.readable(tokens, total=2000))
    assert together[0].abs().max() > 0.01
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before_tail, together, atol=1e-5, rtol=1e-5)


@everywhere
def test_what_is_computed_again_is_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, vocab, model, task = made(case, dropout=0.2, attention_dropout=0.1)
    batch = task.pack(batch_of(config, vocab, task, some_cells(), 0))
    compute, results, losses, n_computed = Block.forward, [], [], [0, 0]
    for again in (False, True):

        def noted(self: Block, *given: Any, again: bool = again) -> torch.Tensor:
            n_computed[again] += 1
            return compute(self, *given)

        monkeypatch.setattr(Block, "forward", noted)
        for part in model.modules():
            if isinstance(part, Transformer):
                part.recomputes = again
        torch.manual_seed(0)
        losses.append(task(model.train(), batch).loss)
        results.append(gradients(model, losses[-1]))
    assert torch.equal(*losses)
    same(*results)
    assert n_computed[1] == 2 * n_computed[0] > 0


def test_what_is_no_gene_biases_as_a_count_of_one() -> None:
    config, vocab, model, _ = made("counts that bias, columns and a cap")
    tokens = model.readable(build_tokenizer(config, vocab)(some_cells()), total=400)
    bias = model.sequences(tokens).key_bias
    is_gene = tokens.input_ids >= vocab.first_gene_token
    assert bias is not None
    assert is_gene.any()
    assert (~is_gene).sum() > tokens.n_padding + N_CELLS, "<cls>, columns and a tail"
    torch.testing.assert_close(bias[is_gene], torch.log1p(tokens.values[is_gene] + EPSILON))
    torch.testing.assert_close(bias[~is_gene], torch.full_like(bias[~is_gene], 1 + EPSILON).log1p())


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for its GPU: reading a number, and results whose size only the data tell."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITING), name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index"
        return function(*args, **(kwargs or {}))


@everywhere
def test_no_step_waits_for_the_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "scmodelforge.models.transformer.attend", lambda q, k, v, *_: q + k + v
    )  # the GPU has its own
    monkeypatch.setattr(
        "scmodelforge.models.transformer.may_leave_out", lambda *_: False
    )  # which computes whole blocks
    config, vocab, model, task = made(case)
    batch = task.pack(batch_of(config, vocab, task, some_cells(), 0))
    model.train()
    with NoWaiting():
        global_loss(task(model, batch).terms, batch.n_tokens).share.backward()


def test_waiting_is_noticed() -> None:
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting():
        torch.nonzero(torch.ones(3))
    with pytest.raises(AssertionError, match="scalar"), NoWaiting():
        torch.ones(1).item()


def test_padded_cells_give_padded_states() -> None:
    config, vocab, model, task = made("columns, cap, cls, last norm")
    tokens = batch_of(config, vocab, task, some_cells(), 0).tokens
    with torch.no_grad():
        padded, packed = model.eval()(tokens), model(model.packed(tokens))
        packed = packed[model.packed(tokens).positions >= 0]
    assert padded.shape[:2] == tokens.input_ids.shape
    torch.testing.assert_close(padded[tokens.attention_mask], packed)
    assert not padded[~tokens.attention_mask].any()
