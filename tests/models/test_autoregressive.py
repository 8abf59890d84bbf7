"""The causal model: what it reads, what it is asked, its losses, and the cells that it writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from scmodelforge.config import Config
from scmodelforge.errors import ModelError
from scmodelforge.models.autoregressive import AutoregressiveTransformer
from scmodelforge.models.bundle import ModelBundle, build_model
from scmodelforge.models.objectives import build_objective
from scmodelforge.models.objectives.counts import count_nll, count_rates, draw_counts, expected_counts
from scmodelforge.models.sampling import generate
from scmodelforge.tokenizers.base import build_tokenizer
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_cells, make_vocab

N_GENES = 40
COUNTS = {"data": {"preprocessing": {"normalize": "none", "log1p": False}}}
BINS = {"tokenizer": {"strategy": "binned_expression", "n_bins": 7}}


def make_config(**sections: dict[str, Any]) -> Config:
    """dual_prediction on values; `sections` are laid over, key by key."""
    tree: dict[str, Any] = {
        "tokenizer": {"strategy": "continuous_projection", "max_genes": 12, "overlong": "first"},
        "model": {
            "architecture": "autoregressive_transformer",
            "pretraining_task": "dual_prediction",
            "hidden_dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "dropout": 0.0,
        },
    }
    return Config.model_validate({k: tree.get(k, {}) | sections.get(k, {}) for k in {**tree, **sections}})


def make_bundle(spread: float = 0.3, **sections: dict[str, Any]) -> ModelBundle:
    config = make_config(**sections)
    vocab = make_vocab(N_GENES)
    if config.tokenizer.obs_tokens:
        vocab = vocab.with_obs_categories({"assay": ("a", "b")})
    model = build_model(config, vocab, seed=0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=spread)
    return ModelBundle(config, vocab, model)


def some_tokens(bundle: ModelBundle, n_cells: int = 6, share: float = 0.2, seed: int = 0) -> TokenBatch:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(4, (n_cells, N_GENES)) * (rng.random((n_cells, N_GENES)) < share)
    counts[:, 3] = 2
    tokens = build_tokenizer(bundle.config, bundle.vocab)(make_cells(counts))
    if bundle.config.tokenizer.obs_tokens:
        tokens = replace(tokens, obs=torch.from_numpy(rng.integers(0, 3, (n_cells, 1))))
    return tokens


def autoregressive(bundle: ModelBundle) -> AutoregressiveTransformer:
    assert isinstance(bundle.model, AutoregressiveTransformer)
    return bundle.model


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {},
        BINS,
        COUNTS | {"model": {"count_bias": True, "soft_cap": 10.0}},
        {"tokenizer": {"obs_tokens": ["assay"]}},
        {"tokenizer": {"strategy": "rank_value"}, "model": {"pretraining_task": "next_gene"}},
    ],
    ids=["values", "bins", "counts", "obs", "ranks"],
)
@pytest.mark.parametrize("embed", [False, True])
def test_a_state_sees_what_came_before_and_nothing_else(sections: dict, embed: bool) -> None:
    bundle = make_bundle(**sections)
    model = autoregressive(bundle)
    tokens = model.readable(some_tokens(bundle, share=0.9))
    ids, values = tokens.input_ids.clone(), tokens.values.clone()
    changed, earlier = tokens.positions == 6, tokens.positions < 6
    assert changed.sum() == tokens.n_cells
    ids[changed] = bundle.vocab.first_gene_token + N_GENES - 1
    values[changed] += 1
    with torch.no_grad():
        before = model(tokens, embed)
        after = model(replace(tokens, input_ids=ids, values=values), embed)
    assert torch.equal(before[earlier], after[earlier])
    assert (before[~earlier] != after[~earlier]).any(dim=1).all()


def test_a_count_draws_attention_from_later_genes_and_while_embedding_from_its_own() -> None:
    bundle = make_bundle(model={"count_bias": True}, **COUNTS)
    model = autoregressive(bundle)
    tokens = model.readable(some_tokens(bundle, share=0.9))
    place = tokens.positions
    assert (place == 6).sum() == tokens.n_cells
    changed = replace(tokens, values=tokens.values + 5.0 * (place == 6))
    with torch.no_grad():
        differs = {
            embed: (model(tokens, embed) != model(changed, embed)).any(dim=1) for embed in (False, True)
        }
    assert not differs[False][place <= 6].any()
    assert differs[False][place > 6].all()
    assert not differs[True][place < 6].any()
    assert differs[True][place >= 6].all()


def test_an_unknown_category_is_read_by_nobody() -> None:
    bundle = make_bundle(tokenizer={"obs_tokens": ["assay"]})
    model = autoregressive(bundle)
    tokens = replace(some_tokens(bundle), obs=torch.tensor([[0], [0], [0], [1], [1], [2]]))
    with torch.no_grad():
        before = model.encode(tokens)
        model.obs_embedding.columns[0].weight[0] += 3.0
        after = model.encode(tokens)
        model.obs_embedding.columns[0].weight[1] += 3.0
        again = model.encode(tokens)
    assert torch.equal(before, after)
    assert torch.isfinite(before).all()
    assert (after != again).any(dim=1).tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("pooling", ["mean", "window"])
def test_embeddings_leave_out_eos_and_what_exceeds_the_window(pooling: str) -> None:
    with_eos, without = make_bundle(tokenizer={"append_eos": True}), make_bundle()
    cells = [some_tokens(bundle, share=0.1) for bundle in (with_eos, without)]
    with torch.no_grad():
        embeddings = [without.model.encode(tokens, pooling) for tokens in cells[1:]]
        embeddings.append(with_eos.model.encode(cells[0], pooling))
    torch.testing.assert_close(embeddings[0], embeddings[1])
    full = some_tokens(without, share=0.9)
    assert full.input_ids.shape[1] == 12
    shorter = replace(full, input_ids=full.input_ids[:, :11], values=full.values[:, :11])
    hidden = autoregressive(without)(shorter, embed=True)
    expected = hidden[:, 1:].mean(dim=1) if pooling == "mean" else hidden.sum(dim=1) / 11
    torch.testing.assert_close(without.model.encode(full, pooling), expected, atol=1e-5, rtol=1e-5)


def test_cls_pooling_is_refused_with_what_works() -> None:
    bundle = make_bundle()
    with pytest.raises(ModelError, match="Use pooling 'mean' or 'window'"):
        bundle.model.encode(some_tokens(bundle), "cls")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"pooling": "cls"}}, "has seen no gene"),
        (
            {"model": {"objective": {"reference": True}}, "tokenizer": {"append_eos": True}},
            "append_eos: false",
        ),
        ({"model": {}, "tokenizer": {"include_zero_genes": True}} | COUNTS, "include_zero_genes: false"),
        ({"model": {"objective": {"ecs_weight": 1.0}}}, "ecs_weight"),
        (
            {"model": {"objective": {"batch_labels": True, "batch_key": "b"}}} | COUNTS,
            "batch_labels: this model has no expression head",
        ),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(sections: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**sections)


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("append_eos", [False, True])
def test_every_token_but_the_first_is_asked_where_the_one_before_is(append_eos: bool) -> None:
    bundle = make_bundle(tokenizer={"append_eos": append_eos})
    tokens = some_tokens(bundle)
    batch = build_objective(bundle.config, bundle.vocab).corrupt(tokens, 0, 0)
    n = tokens.input_ids.shape[1] - 1
    assert batch.tokens.input_ids.shape == (6, n)
    assert len(batch.asked) == int((tokens.lengths - 1).sum())
    cell, place = batch.asked // n, batch.asked % n
    assert torch.equal(batch.genes, tokens.input_ids[cell, place + 1])
    assert torch.equal(batch.values, tokens.values[cell, place + 1])
    assert torch.equal(batch.tokens.input_ids[cell, place], tokens.input_ids[cell, place])
    assert torch.equal(batch.tokens.lengths, tokens.lengths - 1)
    assert (batch.genes == bundle.vocab.eos_id).sum() == 6 * append_eos


def test_a_batch_of_empty_cells_has_no_loss() -> None:
    bundle = make_bundle()
    tokens = build_tokenizer(bundle.config, bundle.vocab)(make_cells(np.zeros((3, N_GENES))))
    task = build_objective(bundle.config, bundle.vocab)
    batch = task.corrupt(tokens, 0, 0)
    output = task(bundle.model, batch)
    assert output.loss.item() == 0
    assert np.isnan(task.metrics(task.count(output, batch))["loss"])
    assert torch.isfinite(bundle.model.encode(tokens)).all()


@pytest.mark.parametrize("kind", ["values", "bins", "counts"])
def test_losses_are_those_of_the_genes_and_of_their_values(kind: str) -> None:
    sections = {"values": {}, "bins": BINS, "counts": COUNTS}[kind]
    bundle = make_bundle(**sections | {"tokenizer": {"append_eos": True} | sections.get("tokenizer", {})})
    model, task = autoregressive(bundle), build_objective(bundle.config, bundle.vocab)
    batch = task.corrupt(some_tokens(bundle), 0, 0)
    output = task(model, batch)
    states = model(batch.tokens).flatten(0, 1)[batch.asked]
    logits = model.head(states, model.embedding.tokens).logits
    torch.testing.assert_close(output.losses["gene"], F.cross_entropy(logits, batch.genes))

    is_gene = batch.genes != bundle.vocab.eos_id
    assert int(is_gene.sum()) == len(batch.asked) - 6
    values, told = batch.values[is_gene], output.expression[is_gene]
    if kind == "values":
        expected = F.mse_loss(told[:, 0], values)
    elif kind == "bins":
        expected = F.cross_entropy(told, values.long())
    else:
        rates = told[:, 0].double()
        poisson = stats.poisson(rates.detach().numpy())
        probability = poisson.pmf(values.numpy()) / (1 - poisson.pmf(0))
        expected = torch.tensor(-np.log(probability).mean(), dtype=torch.float32)
        totals = torch.zeros(6).index_add(0, batch.cell[is_gene], told[:, 0])
        torch.testing.assert_close(totals, torch.zeros(6).index_add(0, batch.cell[is_gene], values))
    torch.testing.assert_close(output.losses["expression"], expected, atol=1e-5, rtol=1e-5)

    metrics = task.metrics(task.count(output, batch) + task.count(output, batch))
    assert metrics["perplexity"] == pytest.approx(output.losses["gene"].exp().item(), rel=1e-4)
    assert metrics["n_asked"] == 2 * len(batch.genes)
    assert metrics["n_values"] == 2 * int(is_gene.sum())
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert ("bin_accuracy" in metrics) == (kind == "bins")
    if kind == "counts":
        assert metrics["count_nll"] == pytest.approx(output.losses["expression"].item(), rel=1e-4)


# --- counts ---------------------------------------------------------------------------------------


def test_the_exact_likelihood_sums_to_one_and_the_reference_does_not() -> None:
    rates = torch.tensor([0.01, 0.5, 3.0, 20.0], dtype=torch.float64)[:, None]
    counts = torch.arange(1, 200, dtype=torch.float64)
    exact = torch.exp(-count_nll(rates, counts))
    torch.testing.assert_close(exact.sum(dim=1), torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close((exact * counts).sum(dim=1), expected_counts(rates)[:, 0], atol=1e-4, rtol=0)
    reference = torch.exp(-count_nll(rates, counts, reference=True)).sum(dim=1)
    assert (reference[:2] - 1).abs().min() > 0.3
    assert abs(reference[3].item() - 1) < 1e-4


def test_tiny_and_huge_rates_have_finite_likelihoods_and_gradients() -> None:
    rates = torch.tensor([0.0, 1e-8, 1e-3, 50.0, 1e5], requires_grad=True)
    nll = count_nll(rates, torch.tensor([1.0, 3.0, 1.0, 40.0, 30.0]))
    nll.sum().backward()
    assert torch.isfinite(nll).all()
    assert torch.isfinite(rates.grad).all()


def test_rates_share_out_the_counts_of_each_cell() -> None:
    cell, asked = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([True] * 5 + [False])
    scores, counts = torch.tensor([0.0, 1.0, 2.0, 0.3, 0.3, 9]), torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 7.0])
    rates = count_rates(scores, counts, cell, 3, asked)
    expected = torch.cat([scores[:3].softmax(0) * 9, torch.tensor([3.0, 3.0, 0.0])])
    torch.testing.assert_close(rates, expected)


def test_drawn_counts_follow_the_distribution() -> None:
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    rates = torch.full_like(uniforms, 2.0)
    drawn = draw_counts(rates, uniforms, None)
    assert drawn.min() == 1
    expected = torch.exp(-count_nll(torch.tensor(2.0), torch.arange(1, 6).float()))
    shares = torch.stack([(drawn == c).float().mean() for c in range(1, 6)])
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)
    assert draw_counts(rates, uniforms, 3.0).max() == 3


# --- cells that it writes -------------------------------------------------------------------------

KINDS = {
    "values": {},
    "bins": BINS,
    "counts": COUNTS | {"model": {"count_bias": True}},
    "ranks": {"tokenizer": {"strategy": "rank_value"}, "model": {"pretraining_task": "next_gene"}},
}


def writer(kind: str, **tokenizer: Any) -> ModelBundle:
    sections: dict[str, Any] = KINDS[kind]
    return make_bundle(**sections | {"tokenizer": sections.get("tokenizer", {}) | tokenizer})


@pytest.mark.parametrize("kind", KINDS)
def test_written_cells_continue_the_prompt_with_new_genes(kind: str) -> None:
    bundle = writer(kind)
    prompt = some_tokens(bundle, share=0.1)
    cells = generate(bundle, prompt, seed=3)
    first = bundle.vocab.first_gene_token
    assert cells.input_ids.shape == (6, 12)
    assert (cells.lengths == 12).all()
    for row in range(6):
        n = int(prompt.lengths[row])
        assert torch.equal(cells.input_ids[row, :n], prompt.input_ids[row, :n])
        assert torch.equal(cells.values[row, :n], prompt.values[row, :n])
        genes = cells.input_ids[row, 1:]
        assert (genes >= first).all()
        assert len(genes.unique()) == len(genes)
        if kind == "counts":
            assert (cells.values[row, 1:] >= 1).all()
        if kind in ("counts", "bins"):
            assert torch.equal(cells.values[row].round(), cells.values[row])


@pytest.mark.parametrize("kind", KINDS)
def test_written_cells_depend_on_seed_and_cell_alone(kind: str) -> None:
    bundle = writer(kind)
    prompt = some_tokens(bundle, share=0.1)
    together, again = (generate(bundle, prompt, seed=3, top_k=10) for _ in range(2))
    assert torch.equal(together.input_ids, again.input_ids)
    alone = generate(bundle, build_single(prompt, 4), seed=3, top_k=10)
    assert torch.equal(alone.input_ids[0], together.input_ids[4])
    torch.testing.assert_close(alone.values[0], together.values[4], atol=1e-5, rtol=0)
    assert not torch.equal(generate(bundle, prompt, seed=4, top_k=10).input_ids, together.input_ids)


def build_single(tokens: TokenBatch, row: int) -> TokenBatch:
    n = int(tokens.lengths[row])
    return TokenBatch(
        tokens.input_ids[row : row + 1, :n],
        tokens.values[row : row + 1, :n],
        tokens.lengths[row : row + 1],
        tokens.cell_index[row : row + 1],
        False,
    )


def test_top_1_follows_the_likeliest_gene_and_max_genes_ends_it() -> None:
    bundle = writer("values")
    model, prompt = autoregressive(bundle), some_tokens(bundle, share=0.1)
    cells = generate(bundle, prompt, top_k=1, max_genes=9)
    assert torch.equal(cells.lengths, prompt.lengths.clamp(min=9))
    with torch.no_grad():
        hidden = model(cells)
        for row in range(6):
            for place in range(int(prompt.lengths[row]), 9):
                logits = model.genes_at(hidden, torch.tensor([row * hidden.shape[1] + place - 1])).logits[0]
                logits[cells.input_ids[row, :place]] = -torch.inf
                logits[: bundle.vocab.first_gene_token] = -torch.inf
                assert cells.input_ids[row, place] == logits.argmax()


def test_cells_end_with_eos_where_training_taught_it() -> None:
    bundle = writer("values", append_eos=True)
    prompt = some_tokens(bundle, share=0.1)
    with torch.no_grad():
        autoregressive(bundle).head.bias[bundle.vocab.eos_id] = 2.0
    cells = generate(bundle, prompt, seed=1)
    last = cells.input_ids[torch.arange(6), cells.lengths - 1]
    ended = last == bundle.vocab.eos_id
    assert ended.any()
    assert (cells.input_ids == bundle.vocab.eos_id).sum(dim=1).tolist() == ended.long().tolist()
    assert (cells.values[torch.arange(6), cells.lengths - 1][ended] == 0).all()
    pads = torch.arange(cells.input_ids.shape[1]) >= cells.lengths[:, None]
    assert (cells.input_ids[pads] == bundle.vocab.pad_id).all()


def test_what_cannot_write_cells_says_so() -> None:
    next_gene = make_bundle(model={"pretraining_task": "next_gene"})
    with pytest.raises(ModelError, match="dual_prediction"):
        generate(next_gene, some_tokens(next_gene))
    counts = writer("counts")
    empty = build_tokenizer(counts.config, counts.vocab)(make_cells(np.zeros((2, N_GENES))))
    with pytest.raises(ModelError, match="at least one gene"):
        generate(counts, empty)
