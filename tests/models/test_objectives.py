"""Masking: what is hidden, in what shares, and that nothing of it leaks into the input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scmodelforge.config import Config, Masking, Preprocessing, TokenizerConfig
from scmodelforge.models.bundle import build_model
from scmodelforge.models.embeddings import MASKED_VALUE
from scmodelforge.models.objectives.batch import TrainingBatch
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells, make_vocab, masked_genes, rank_tokenizer

N_GENES = 300
VOCAB = make_vocab(N_GENES)


def some_tokens(n_cells: int = 64, seed: int = 0, first_row: int = 0) -> TokenBatch:
    counts = np.random.default_rng(seed).poisson(0.5, (n_cells, N_GENES))
    config = TokenizerConfig(append_eos=True)
    return rank_tokenizer(config, Preprocessing(), VOCAB)(make_cells(counts, first_row=first_row))


def corrupt(tokens: TokenBatch, seed: int = 1, epoch: int = 0, **masking) -> TrainingBatch:
    return masked_genes(Masking(**masking), VOCAB).corrupt(tokens, seed, epoch)


def test_shares_are_30_and_80_10_10() -> None:
    tokens = some_tokens(2000)
    batch = corrupt(tokens)
    n_genes = int((tokens.input_ids >= VOCAB.first_gene_token).sum())
    n_asked = len(batch.asked)
    shown = batch.tokens.input_ids.flatten()[batch.asked]

    def close(count: int, expected: float, out_of: int) -> bool:  # within four standard deviations
        return abs(count - expected * out_of) < 4 * np.sqrt(out_of * expected * (1 - expected))

    assert close(n_asked, 0.3, n_genes)
    assert close(int((shown == VOCAB.mask_id).sum()), 0.8, n_asked)
    random_or_same = shown != VOCAB.mask_id
    same = int((shown == batch.genes).sum())
    assert close(same, 0.1 + 0.1 / N_GENES, n_asked)
    assert int(random_or_same.sum()) - same > 0
    replaced = shown[random_or_same & (shown != batch.genes)]
    counts = np.bincount(replaced.numpy() - VOCAB.first_gene_token, minlength=N_GENES)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi2 - (N_GENES - 1)) < 5 * np.sqrt(2 * (N_GENES - 1))


def test_special_tokens_are_neither_hidden_nor_inserted() -> None:
    tokens = some_tokens(500)
    batch = corrupt(tokens, mask_ratio=0.9, mask_token_share=0.0, random_share=1.0)
    special = tokens.input_ids < VOCAB.first_gene_token
    assert torch.equal(batch.tokens.input_ids[special], tokens.input_ids[special])
    assert (batch.tokens.input_ids[~special] >= VOCAB.first_gene_token).all()


def test_the_reference_collator_may_hide_and_insert_them_but_not_pads() -> None:
    tokens = some_tokens(500)
    batch = corrupt(tokens, mask_ratio=0.9, mask_token_share=0.5, random_share=0.5, reference=True)
    asked_tokens = set(batch.genes.tolist())
    assert {VOCAB.cls_id, VOCAB.eos_id} <= asked_tokens
    assert not {VOCAB.pad_id, VOCAB.mask_id} & asked_tokens
    shown = batch.tokens.input_ids.flatten()[batch.asked]
    assert {0, 2, 3} <= set(shown.tolist())
    pads = tokens.input_ids == VOCAB.pad_id
    assert torch.equal(batch.tokens.input_ids[pads], tokens.input_ids[pads])


def test_the_values_of_hidden_ranks_are_hidden_too() -> None:
    tokens = some_tokens()
    batch = corrupt(tokens, mask_token_share=1.0, random_share=0.0)
    values = batch.tokens.values.flatten()
    assert (values[batch.asked] == MASKED_VALUE).all()
    others = torch.ones(len(values), dtype=torch.bool)
    others[batch.asked] = False
    assert torch.equal(values[others], tokens.values.flatten()[others])


def test_changing_a_hidden_gene_leaves_the_input_unchanged() -> None:
    """The answer cannot be read off the input: another gene at a masked position gives the same input."""
    tokens = some_tokens()
    batch = corrupt(tokens, mask_token_share=1.0, random_share=0.0)
    other = tokens.input_ids.clone().flatten()
    other[batch.asked] = (other[batch.asked] - VOCAB.first_gene_token + 1) % N_GENES + VOCAB.first_gene_token
    values = tokens.values.clone().flatten()
    values[batch.asked] += 3.0
    changed = TokenBatch(
        other.view_as(tokens.input_ids),
        values.view_as(tokens.values),
        tokens.lengths,
        tokens.cell_index,
        True,
    )
    again = corrupt(changed, mask_token_share=1.0, random_share=0.0)
    assert torch.equal(again.tokens.input_ids, batch.tokens.input_ids)
    assert torch.equal(again.tokens.values, batch.tokens.values)
    assert not torch.equal(again.genes, batch.genes)


def test_a_cell_s_mask_depends_on_seed_epoch_and_cell_alone() -> None:
    together = corrupt(some_tokens(8))
    counts = np.random.default_rng(0).poisson(0.5, (8, N_GENES))
    alone_tokens = rank_tokenizer(TokenizerConfig(append_eos=True), Preprocessing(), VOCAB)(
        make_cells(counts[5:6], first_row=5)
    )
    alone = corrupt(alone_tokens)
    length = int(alone_tokens.lengths[0])
    assert torch.equal(alone.tokens.input_ids[0, :length], together.tokens.input_ids[5, :length])
    for change in ({"epoch": 1}, {"seed": 2}):
        assert not torch.equal(corrupt(some_tokens(8), **change).tokens.input_ids, together.tokens.input_ids)
    assert not torch.equal(
        corrupt(some_tokens(8, first_row=2**33)).tokens.input_ids, together.tokens.input_ids
    )


def test_loss_and_counts_are_plain_cross_entropy_over_the_asked() -> None:
    config = Config.model_validate(
        {"model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}, "tokenizer": {"append_eos": True}}
    )
    model = build_model(config, VOCAB, seed=0).eval()
    batch = corrupt(some_tokens(4))
    task = masked_genes(Masking(), VOCAB)
    output = task(model, batch)
    everywhere = model.head(model(batch.tokens), model.embedding.tokens).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(everywhere[batch.asked], batch.genes)
    torch.testing.assert_close(output.loss, expected)
    metrics = task.metrics(task.count(output, batch) + task.count(output, batch))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(expected.item()), rel=1e-5)
    assert metrics["n_asked"] == 2 * len(batch.genes)
    predicted = everywhere[batch.asked].argmax(1)
    assert metrics["top1_accuracy"] == pytest.approx((predicted == batch.genes).float().mean().item())


def test_a_batch_without_a_question_has_zero_loss() -> None:
    model = build_model(
        Config.model_validate({"model": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}}), VOCAB, seed=0
    )
    tokens = rank_tokenizer(TokenizerConfig(), Preprocessing(), VOCAB)(make_cells(np.zeros((2, N_GENES))))
    task = masked_genes(Masking(), VOCAB)
    batch = task.corrupt(tokens, 0, 0)
    output = task(model, batch)
    assert output.loss.item() == 0
    assert torch.isfinite(output.hidden).all()
    assert np.isnan(task.metrics(task.count(output, batch))["loss"])
