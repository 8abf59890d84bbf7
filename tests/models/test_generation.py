"""scGPT's generative mode: the split of a cell, what generated genes may read, and prediction of any gene."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.models.bundle import build_model
from scmodelforge.models.generative import GenerativeTransformer
from scmodelforge.models.objectives.generation import ExpressionGeneration
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import pack_queries
from tests.helpers import make_vocab

N_GENES = 60
VOCAB = make_vocab(N_GENES, layout="scgpt")
FIRST = VOCAB.first_gene_token


def config(**objective: Any) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"strategy": "binned_expression", "vocab_layout": "scgpt"},
            "model": {
                "architecture": "autoregressive_transformer",
                "pretraining_task": "expression_reconstruction",
                "hidden_dim": 16,
                "num_layers": 2,
                "num_heads": 2,
                "pooling": "cls",
                "objective": objective,
            },
        }
    )


def model(**objective: Any) -> GenerativeTransformer:
    built = build_model(config(**objective), VOCAB, seed=0).eval()
    assert isinstance(built, GenerativeTransformer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return built


def some_tokens(n_cells: int = 6, first_row: int = 0) -> TokenBatch:
    """Ragged cells; those of a row number are always the same."""
    lengths = np.array([5 + (7 * row) % 30 for row in range(first_row, first_row + n_cells)])
    ids, values = np.zeros((n_cells, lengths.max()), dtype=np.int64), np.zeros((n_cells, lengths.max()))
    for cell, length in enumerate(lengths):
        rng = np.random.default_rng(first_row + cell)
        ids[cell, 0] = VOCAB.cls_id
        ids[cell, 1:length] = rng.choice(N_GENES, length - 1, replace=False) + FIRST
        values[cell, 1:length] = rng.integers(1, 51, length - 1)
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(values.astype(np.float32)),
        torch.from_numpy(lengths),
        torch.arange(first_row, first_row + n_cells),
        True,
    )


def test_each_gene_is_either_perceived_or_asked() -> None:
    tokens = some_tokens()
    batch = ExpressionGeneration(config(generated_share=0.4), VOCAB).corrupt(tokens, 1, 0)
    assert batch.queries is not None
    assert (batch.tokens.input_ids[:, 0] == VOCAB.cls_id).all()
    for cell, length in enumerate(tokens.lengths.tolist()):
        shown = batch.tokens.input_ids[cell, 1 : batch.tokens.lengths[cell]]
        asked = batch.genes[batch.cell == cell]
        assert len(asked) == int((length - 1) * 0.4)
        assert torch.equal(batch.queries[cell, : len(asked)], asked)
        assert (batch.queries[cell, len(asked) :] == VOCAB.pad_id).all()
        together = torch.cat([shown, asked])
        assert sorted(together.tolist()) == sorted(tokens.input_ids[cell, 1:length].tolist())
        truth = dict(zip(tokens.input_ids[cell].tolist(), tokens.values[cell].tolist(), strict=True))
        assert batch.values[batch.cell == cell].tolist() == [truth[gene] for gene in asked.tolist()]
    assert batch.tokens.has_padding
    assert batch.n_tokens == int(tokens.lengths.sum())


def test_the_split_of_a_cell_depends_on_seed_epoch_and_cell_alone() -> None:
    task = ExpressionGeneration(config(), VOCAB)
    together, alone = task.corrupt(some_tokens(), 1, 0), task.corrupt(some_tokens(1, first_row=4), 1, 0)
    assert torch.equal(alone.genes, together.genes[together.cell == 4])
    assert torch.equal(task.corrupt(some_tokens(), 1, 0).genes, together.genes)
    assert not torch.equal(task.corrupt(some_tokens(), 1, 1).genes, together.genes)
    assert not torch.equal(task.corrupt(some_tokens(), 2, 0).genes, together.genes)


def test_about_the_share_of_genes_is_asked_whatever_gene_it_is() -> None:
    tokens = some_tokens(600)
    batch = ExpressionGeneration(config(generated_share=0.5), VOCAB).corrupt(tokens, 1, 0)
    seen = np.bincount(tokens.input_ids[tokens.input_ids >= FIRST].numpy() - FIRST, minlength=N_GENES)
    asked = np.bincount(batch.genes.numpy() - FIRST, minlength=N_GENES)
    assert np.abs(asked / seen - asked.sum() / seen.sum()).max() < 5 * np.sqrt(0.25 / seen.min())


@pytest.mark.parametrize("reference", [True, False])
def test_hidden_values_and_other_queries_change_no_answer(reference: bool) -> None:
    transformer = model(reference=reference)
    tokens = some_tokens()
    batch = ExpressionGeneration(config(), VOCAB).corrupt(tokens, 1, 0)
    assert batch.queries is not None
    packed = ExpressionGeneration(config(), VOCAB).pack(batch)
    is_first = torch.diff(packed.cell, prepend=torch.tensor([-1])) != 0
    fewer = pack_queries(packed.tokens, packed.genes[is_first], packed.cell[is_first])
    with torch.no_grad():
        hidden, states = transformer.generated_states(packed.tokens, packed.queries)
        _, first = transformer.generated_states(packed.tokens, fewer)
        plain = transformer(packed.tokens)
    torch.testing.assert_close(states[is_first], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, plain, atol=1e-5, rtol=0)
    values = tokens.values.clone()
    places = (tokens.input_ids[:, :, None] == batch.queries[:, None, :]).any(dim=2)
    values[places & (tokens.input_ids >= FIRST)] += 5
    again = ExpressionGeneration(config(), VOCAB).corrupt(dataclasses.replace(tokens, values=values), 1, 0)
    assert torch.equal(again.tokens.values, batch.tokens.values)
    assert not torch.equal(again.values, batch.values)


def test_generated_genes_read_all_that_is_perceived_and_no_padding() -> None:
    transformer = model()
    batch = ExpressionGeneration(config(), VOCAB).corrupt(some_tokens(), 1, 0)
    packed = ExpressionGeneration(config(), VOCAB).pack(batch)
    tokens, cell = packed.tokens, int(packed.tokens.lengths.argmin())
    assert int(tokens.lengths.sum()) == len(tokens.input_ids)
    last = int(tokens.starts[cell] + tokens.lengths[cell]) - 1
    with torch.no_grad():
        before = transformer.generated_states(tokens, packed.queries)[1]
        values = tokens.values.clone()
        values[last] += 7
        after = transformer.generated_states(dataclasses.replace(tokens, values=values), packed.queries)[1]
    difference = (after - before).abs().amax(dim=1)
    assert torch.equal(difference > 1e-6, packed.cell == cell)


def test_any_genes_can_be_asked() -> None:
    transformer = model()
    tokens = some_tokens()
    genes = torch.tensor([FIRST, FIRST + 7, FIRST + 3])
    with torch.no_grad():
        predicted = transformer.generate(tokens, genes)
        other_order = transformer.generate(tokens, genes[[2, 0, 1]])
        for_each_cell = transformer.generate(tokens, genes.expand(tokens.n_cells, -1))
        alone = transformer.generate(some_tokens(1, first_row=3), genes)
    assert predicted.shape == (tokens.n_cells, 3)
    torch.testing.assert_close(predicted[:, [2, 0, 1]], other_order, atol=1e-5, rtol=0)
    torch.testing.assert_close(predicted, for_each_cell)
    torch.testing.assert_close(predicted[3:4], alone, atol=1e-5, rtol=0)


def test_the_second_pass_reads_the_cell_embedding_and_gives_it_no_gradient() -> None:
    transformer = model(second_pass_weight=2.0)
    task = ExpressionGeneration(config(second_pass_weight=2.0), VOCAB)
    batch = task.corrupt(some_tokens(), 1, 0)
    output = task(transformer, batch)
    assert output.losses.keys() == {"expression", "second_pass"}
    torch.testing.assert_close(output.loss, output.losses["expression"] + 2 * output.losses["second_pass"])
    packed = task.pack(batch)
    cells = output.hidden[packed.tokens.starts].detach()
    _, states = transformer.generated_states(packed.tokens, packed.queries, cells)
    outputs = transformer.expression_of(states, batch.genes, packed.tokens, packed.cell)
    expected = (outputs[:, 0] - batch.values).square().mean()
    torch.testing.assert_close(output.losses["second_pass"], expected)
    gradient = torch.autograd.grad(expected, transformer.embedding.tokens.weight)[0]
    assert not gradient[VOCAB.cls_id].any()
    metrics = task.metrics(task.count(output, batch))
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert metrics["second_pass_loss"] == pytest.approx(output.losses["second_pass"].item(), rel=1e-5)


def test_a_batch_in_which_nothing_can_be_asked_has_zero_loss() -> None:
    ids = torch.tensor([[VOCAB.cls_id, FIRST], [VOCAB.cls_id, VOCAB.pad_id]])
    tokens = TokenBatch(ids, torch.tensor([[0.0, 3], [0, 0]]), torch.tensor([2, 1]), torch.arange(2), True)
    task = ExpressionGeneration(config(), VOCAB)
    batch = task.corrupt(tokens, 1, 0)
    assert len(batch.asked) == 0
    output = task(model(), batch)
    assert output.loss.item() == 0
    assert torch.isfinite(output.hidden).all()
    assert np.isnan(task.metrics(task.count(output, batch))["loss"])
