"""The masked autoencoder: what is asked is nowhere in its input, zeros are true zeros, and only the encoder embeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scmodelforge.config import Config, LoraConfig
from scmodelforge.config_io import parse_config
from scmodelforge.data.order import VALIDATION_EPOCH
from scmodelforge.errors import ConfigError
from scmodelforge.models.bundle import build_model
from scmodelforge.models.objectives.batch import TrainingBatch
from scmodelforge.models.objectives.reconstruction import MaskedReconstruction
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from scmodelforge.tokenizers.packed import pack_queries
from tests.helpers import make_cells, make_vocab

N_GENES = 400
VOCAB = make_vocab(N_GENES)
FIRST = VOCAB.first_gene_token


def settings(tokenizer: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    return {
        "tokenizer": {"strategy": "continuous_projection", "max_genes": N_GENES + 1, **(tokenizer or {})},
        "model": {
            "architecture": "masked_autoencoder",
            "pretraining_task": "expression_reconstruction",
            "hidden_dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "dropout": 0.0,
            "decoder": {"hidden_dim": 8, "num_layers": 1, "num_heads": 2},
            **model,
        },
    }


def config_of(tokenizer: dict[str, Any] | None = None, **model: Any) -> Config:
    return Config.model_validate(settings(tokenizer, **model))


def some_counts(n_cells: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(0.5, (n_cells, N_GENES))


def tokens_of(counts: np.ndarray, config: Config | None = None, first_row: int = 0) -> TokenBatch:
    return build_tokenizer(config or config_of(), VOCAB)(make_cells(counts, first_row=first_row))


def corrupt(
    counts: np.ndarray, config: Config | None = None, seed: int = 1, epoch: int = 0, first_row: int = 0
) -> TrainingBatch:
    config = config or config_of()
    return MaskedReconstruction(config, VOCAB).corrupt(tokens_of(counts, config, first_row), seed, epoch)


def close(count: int, expected: float, out_of: int) -> bool:
    """Within four standard deviations."""
    return abs(count - expected * out_of) < 4 * np.sqrt(out_of * expected * (1 - expected))


@pytest.mark.parametrize("epoch", [0, VALIDATION_EPOCH])
def test_expressed_genes_and_zeros_are_asked_by_their_shares(epoch: int) -> None:
    counts = some_counts(500)
    config = config_of({"masking": {"mask_ratio": 0.3}})
    batch = corrupt(counts, config, epoch=epoch)
    n_expressed = int((counts > 0).sum())
    assert close(int((batch.values > 0).sum()), 0.3, n_expressed)
    assert close(int((batch.values == 0).sum()), 0.03, counts.size - n_expressed)
    zeros = (batch.genes[batch.values == 0] - FIRST).numpy()
    per_gene = np.bincount(zeros, minlength=N_GENES) / (counts == 0).sum(axis=0)
    assert per_gene.std() == pytest.approx(np.sqrt(0.03 * 0.97 / 300), rel=0.2)  # no gene is favoured
    assert np.corrcoef(np.arange(N_GENES), per_gene)[0, 1] == pytest.approx(0, abs=0.2)


def test_answers_are_the_values_and_asked_genes_are_nowhere_in_the_input() -> None:
    counts = some_counts()
    tokens, batch = tokens_of(counts), corrupt(counts)
    assert batch.queries is not None
    assert torch.equal(batch.queries.flatten()[batch.asked], batch.genes)
    assert int((batch.queries != VOCAB.pad_id).sum()) == len(batch.asked)
    dense = torch.zeros(len(counts), VOCAB.n_tokens).scatter_(1, tokens.input_ids, tokens.values)
    dense[:, :FIRST] = 0
    torch.testing.assert_close(batch.values, dense[batch.cell, batch.genes])
    visible = torch.zeros_like(dense).scatter_(1, batch.tokens.input_ids, batch.tokens.values)
    visible[:, :FIRST] = 0
    assert (visible[batch.cell, batch.genes] == 0).all()
    visible[batch.cell, batch.genes] = batch.values
    assert torch.equal(visible, dense)
    assert (batch.tokens.input_ids[:, 0] == VOCAB.cls_id).all()
    after = torch.arange(batch.tokens.input_ids.shape[1]) >= batch.tokens.lengths[:, None]
    assert (batch.tokens.input_ids[after] == VOCAB.pad_id).all()
    assert (batch.tokens.input_ids[~after] != VOCAB.pad_id).all()


@pytest.mark.parametrize("strategy", ["continuous_projection", "binned_expression"])
def test_swapping_the_values_of_asked_genes_changes_the_answers_only(strategy: str) -> None:
    config = config_of({"strategy": strategy})
    counts = some_counts()
    counts = np.where(counts > 0, counts.argsort(axis=1).argsort(axis=1) + 1, 0)  # no two are equal
    batch, changed = corrupt(counts, config), counts.copy()
    for cell in range(len(counts)):
        genes = (batch.genes[(batch.cell == cell) & (batch.values > 0)] - FIRST).numpy()
        changed[cell, genes] = np.roll(counts[cell, genes], 1)
    again = corrupt(changed, config)
    assert torch.equal(batch.tokens.input_ids, again.tokens.input_ids)
    assert torch.equal(batch.tokens.values, again.tokens.values)
    assert torch.equal(batch.queries, again.queries)
    assert not torch.equal(batch.values, again.values)


def test_what_a_cell_is_asked_depends_on_seed_epoch_and_cell_alone() -> None:
    counts = some_counts(8)
    together, alone = corrupt(counts), corrupt(counts[5:6], first_row=5)
    assert torch.equal(together.genes[together.cell == 5], alone.genes)
    assert torch.equal(together.values[together.cell == 5], alone.values)
    for change in ({"epoch": 1}, {"seed": 2}, {"first_row": 2**33}):
        other = corrupt(counts, **change)
        assert other.genes.tolist() != together.genes.tolist()
        zeros = other.genes[other.values == 0]
        assert zeros.tolist() != together.genes[together.values == 0].tolist()


def test_genes_that_did_not_fit_are_no_zeros() -> None:
    counts = np.random.default_rng(0).poisson(3.0, (50, N_GENES))
    batch = corrupt(counts, config_of({"max_genes": 60}, objective={"zero_mask_ratio": 0.5}))
    zeros = batch.values == 0
    assert int(zeros.sum()) > 100
    assert (counts[batch.cell[zeros].numpy(), batch.genes[zeros].numpy() - FIRST] == 0).all()
    assert close(int(zeros.sum()), 0.5, int((counts == 0).sum()))


def test_no_zeros_are_asked_with_ratio_0_nor_genes_that_were_never_seen() -> None:
    counts = some_counts()
    assert (corrupt(counts, config_of(objective={"zero_mask_ratio": 0})).values > 0).all()
    medians = np.where(np.arange(N_GENES) % 2, 1.0, np.nan)
    config = config_of(objective={"zero_mask_ratio": 0.2})
    task = MaskedReconstruction(config, VOCAB.with_medians(medians))
    batch = task.corrupt(tokens_of(counts), 0, 0)
    zeros = (batch.genes[batch.values == 0] - FIRST).numpy()
    assert len(zeros)
    assert (zeros % 2 == 1).all()


def test_zeros_are_asked_of_measured_genes_alone() -> None:
    measured = np.random.default_rng(1).random((300, N_GENES)) < np.linspace(0.05, 0.95, 300)[:, None]
    counts = some_counts(300) * measured
    config = config_of({"max_genes": 60}, objective={"zero_mask_ratio": 0.2})
    tokenizer, task = build_tokenizer(config, VOCAB), MaskedReconstruction(config, VOCAB)
    batch = task.corrupt(tokenizer(make_cells(counts, measured=measured)), 3, 1)
    cell, genes = batch.cell.numpy(), batch.genes.numpy() - FIRST
    assert measured[cell, genes].all()
    zeros = (batch.values == 0).numpy()
    assert (counts[cell[zeros], genes[zeros]] == 0).all()
    assert close(int(zeros.sum()), 0.2, int(((counts == 0) & measured).sum()))
    assert batch.tokens.measured is None, "the model does not need it"

    alone = task.corrupt(tokenizer(make_cells(counts[7:8], None, 7, measured[7:8])), 3, 1)
    assert alone.genes.tolist() == batch.genes[batch.cell == 7].tolist()
    whole = task.corrupt(tokenizer(make_cells(counts, measured=np.ones_like(measured))), 3, 1)
    before = task.corrupt(tokenizer(make_cells(counts)), 3, 1)
    assert torch.equal(whole.queries, before.queries)
    assert torch.equal(whole.values, before.values)


def test_empty_cells_have_a_finite_loss() -> None:
    config = config_of({"prepend_cls": False})
    model, task = build_model(config, VOCAB, seed=0), MaskedReconstruction(config, VOCAB)
    counts = some_counts(3)
    counts[1] = 0
    output = task(model, task.corrupt(tokens_of(counts, config), 0, 0))
    assert torch.isfinite(output.loss)
    none = task.corrupt(tokens_of(np.zeros((2, N_GENES)), config_of({"prepend_cls": False})), 0, 0)
    none = MaskedReconstruction(config_of(objective={"zero_mask_ratio": 0}), VOCAB).corrupt(none.tokens, 0, 0)
    assert len(none.asked) == 0
    assert task(model, none).loss.item() == 0
    assert np.isnan(task.metrics(task.count(task(model, none), none))["loss"])


def test_predictions_do_not_depend_on_company() -> None:
    config = config_of()
    model, task = build_model(config, VOCAB, seed=0).eval(), MaskedReconstruction(config, VOCAB)
    counts = some_counts(6)
    counts[::2, 100:] = 0
    with torch.no_grad():
        together = corrupt(counts)
        predicted = task(model, together).expression
        for cell in range(6):
            alone = task(model, corrupt(counts[cell : cell + 1], first_row=cell)).expression
            torch.testing.assert_close(predicted[together.cell == cell], alone, atol=1e-5, rtol=0)


def test_an_answer_depends_on_which_gene_is_asked() -> None:
    config = config_of()
    model = build_model(config, VOCAB, seed=0).eval()
    tokens = tokens_of(some_counts(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        packed, genes = model.packed(tokens), torch.tensor([FIRST, FIRST + 1, FIRST + 2])
        hidden, cell = model(packed), torch.zeros(3, dtype=torch.int64)
        predicted, swapped = (
            model.expression(hidden, packed, pack_queries(packed, ids, cell))[:, 0]
            for ids in (genes, genes.flip(0))
        )
    assert predicted.unique().numel() == 3
    torch.testing.assert_close(swapped, predicted.flip(0))


@pytest.mark.parametrize(
    "model",
    [
        {"value_embedding": "continuous"},
        {"objective": {"value_loss": "cross_entropy"}},
        {"norm": "post", "final_norm": True, "decoder": {"num_layers": 1}},
        {"objective": {"cell_weight": 1.0, "ecs_weight": 1.0}},
    ],
    ids=["continuous", "bins", "scfoundation", "auxiliary"],
)
def test_options_train(model: dict[str, Any]) -> None:
    config = config_of({"strategy": "binned_expression"}, **model)
    net, task = build_model(config, VOCAB, seed=0), MaskedReconstruction(config, VOCAB)
    batch = corrupt(some_counts(30), config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = task(net, batch)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.95 * losses[0]
    metrics = task.metrics(task.count(output, batch))
    assert metrics["loss"] == pytest.approx(losses[-1], rel=1e-4)


def test_the_decoder_has_its_own_sizes() -> None:
    config = config_of(ffn_dim=48, decoder={"hidden_dim": 8, "num_layers": 3, "num_heads": 4})
    model = build_model(config, VOCAB, seed=0)
    assert len(model.decoder.blocks) == 3
    assert model.decoder.blocks[0].attention.num_heads == 4
    assert model.decoder.blocks[0].feed_forward.fc1.weight.shape == (24, 8)
    assert model.head.weight.shape == (1, 8)


def test_adapters_are_on_the_encoder_only() -> None:
    pytest.importorskip("peft")
    from scmodelforge.finetuning.lora import add_lora

    model = build_model(config_of(), VOCAB, seed=0)
    add_lora(model, LoraConfig(enabled=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 6 * 2
    assert all(name.startswith("transformer.blocks.") for name in trained)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer": {"include_zero_genes": True}}, "include_zero_genes"),
        ({"value_embedding": "scaling"}, "value_embedding"),
        ({"decoder": {"hidden_dim": 9, "num_heads": 2}}, "decoder"),
        ({"objective": {"zero_probability": True}}, "zero_probability"),
        ({"objective": {"batch_key": "donor", "batch_labels": True}}, "batch_labels"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(settings(**changes))
