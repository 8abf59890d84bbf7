"""A packed batch is nothing but its cells: alone, in company or with a tail, loss and gradients are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scmodelforge.models.base import CellTransformer
from scmodelforge.models.objectives.batch import PackedBatch
from scmodelforge.models.transformer import Transformer
from scmodelforge.strategies import Combination
from scmodelforge.training.global_loss import global_loss
from tests.helpers import make_cells
from tests.models.test_strategies import ALLOWED, batch_of, each, parts, real_counts


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@each(ALLOWED)
def test_cells_together_give_the_loss_and_gradients_of_each_alone(row: Combination) -> None:
    config, vocab, model, task = parts(row)
    whole = task(model, batch_of(config, vocab, task, make_cells(real_counts()[:6]), 0))
    expected = gradients(model, whole.loss)
    total, sums = torch.zeros(()), dict.fromkeys(whole.terms, 0.0)
    for cell in range(6):
        cells = make_cells(real_counts()[cell : cell + 1], first_row=cell)
        alone = task(model, batch_of(config, vocab, task, cells, 0))
        for name, term in alone.terms.items():
            total = total + term.weight * term.total / whole.terms[name].count
            sums[name] += float(term.count)
    assert sums == {name: float(term.count) for name, term in whole.terms.items()}
    torch.testing.assert_close(total, whole.loss, atol=1e-5, rtol=1e-5)
    same(gradients(model, total), expected)


@each(ALLOWED)
def test_a_tail_and_questions_about_nothing_change_nothing(row: Combination) -> None:
    config, vocab, model, task = parts(row)
    batch = batch_of(config, vocab, task, make_cells(real_counts()[:6]), 0)
    packed = task.pack(batch)
    expected = gradients(model, task(model, packed).loss)
    n_tokens = len(packed.tokens.input_ids)
    # What is asked beside the tokens has its own sequences, which know no tail.
    total = n_tokens if packed.queries is not None else n_tokens + 300
    filled: PackedBatch = task.pack(batch, total=total, n_sequences=20, n_asked=packed.n_asked + 50)
    output = task(model, filled)
    assert filled.n_padding == total - n_tokens
    assert filled.n_asked == packed.n_asked
    if packed.queries is None:
        assert len(filled.asked) % 128 == 0
    same(gradients(model, global_loss(output.terms, filled.n_tokens).share), expected)
    figures, plain = task.count(output, filled), task.count(task(model, packed), packed)
    torch.testing.assert_close(figures, plain, atol=1e-4, rtol=1e-5)


@each(ALLOWED)
def test_what_is_computed_again_is_the_same(row: Combination) -> None:
    config, vocab, model, task = parts(row)
    batch = task.pack(batch_of(config, vocab, task, make_cells(real_counts()[:4]), 0))
    results = []
    for again in (False, True):
        for part in model.modules():
            if isinstance(part, Transformer):
                part.recomputes = again
        torch.manual_seed(0)
        results.append(gradients(model.train(), task(model, batch).loss))
    same(*results)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for its GPU: reading a number, and results whose size only the data tell."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITING), name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index"
        return function(*args, **(kwargs or {}))


@each(ALLOWED)
def test_no_step_waits_for_the_device(row: Combination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "scmodelforge.models.transformer.attend", lambda q, k, v, *_: q + k + v
    )  # the GPU has its own
    config, vocab, model, task = parts(row)
    batch = task.pack(batch_of(config, vocab, task, make_cells(real_counts()[:4]), 0))
    model.train()
    with NoWaiting():
        global_loss(task(model, batch).terms, batch.n_tokens).share.backward()


def test_waiting_is_noticed() -> None:
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting():
        torch.nonzero(torch.ones(3))
    with pytest.raises(AssertionError, match="scalar"), NoWaiting():
        torch.ones(1).item()


def test_padded_cells_give_padded_states() -> None:
    row = next(row for row in ALLOWED if row.architecture == "transformer_encoder")
    config, vocab, model, task = parts(row)
    assert isinstance(model, CellTransformer)
    tokens = batch_of(config, vocab, task, make_cells(real_counts()[:5]), 0).tokens
    with torch.no_grad():
        padded, packed = model.eval()(tokens), model(model.packed(tokens))
    assert padded.shape[:2] == tokens.input_ids.shape
    torch.testing.assert_close(padded[tokens.attention_mask], packed)
    assert not padded[~tokens.attention_mask].any()
