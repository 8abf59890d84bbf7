"""The formula for floating-point operations against what torch counts in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scmodelforge.config import Config
from scmodelforge.models import attention, transformer
from scmodelforge.models.attention import attend_by_formula
from scmodelforge.models.bundle import build_model
from scmodelforge.models.flops import encoding_flops, forward_flops, linear_flops, training_flops
from scmodelforge.models.objectives import build_objective
from scmodelforge.tokenizers.base import build_tokenizer
from tests.helpers import make_cells, make_vocab

N_GENES, COUNTED = 300, 120
SIZES = {"hidden_dim": 32, "num_layers": 3, "num_heads": 4, "ffn_dim": 96, "dropout": 0.0}
BINS = {"strategy": "binned_expression", "n_bins": 11, "max_genes": 200}


def batch_of(config: Config):
    """One cell, so that nothing is padded."""
    rng = np.random.default_rng(0)
    counts = np.zeros((1, N_GENES))
    for row in counts:
        row[rng.choice(N_GENES, COUNTED, replace=False)] = rng.integers(1, 9, COUNTED)
    vocab = make_vocab(N_GENES, np.ones(N_GENES))
    task = build_objective(config, vocab)
    tokens = build_tokenizer(config, vocab)(make_cells(counts), 0, 0)
    return build_model(config, vocab, seed=0), task, task.corrupt(tokens, 0, 0)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Torch's counter, with attention as plain products: those of the CPU's own kernel it does not count."""
    with (
        pytest.MonkeyPatch.context() as patch,
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        patch.setattr(
            attention,
            "_fastest",
            lambda q, k, v, sequences, scale: attend_by_formula(q, k, v, sequences, scale=scale),
        )
        patch.setattr(transformer, "may_leave_out", lambda *_: False)  # the formula has whole blocks
        yield counter


def sizes(batch) -> tuple[torch.Tensor, torch.Tensor]:
    asked = torch.bincount(batch.cell, minlength=1).double()
    return batch.tokens.lengths.double(), asked


CASES = {
    "ranks": {"tokenizer": {"max_genes": 200}, "model": SIZES},
    "own gene network": {
        "tokenizer": {"max_genes": 200},
        "model": {**SIZES, "gene_head": "mlp", "gene_head_dim": 48},
    },
    "bins, genes and values": {
        "tokenizer": BINS,
        "model": {**SIZES, "pretraining_task": "dual_prediction"},
    },
    "bins, values and MVC": {
        "tokenizer": BINS,
        "model": {
            **SIZES,
            "pretraining_task": "expression_reconstruction",
            "objective": {"cell_weight": 1.0},
        },
    },
    "autoencoder": {
        "tokenizer": {"strategy": "continuous_projection", "max_genes": 200},
        "model": {
            **SIZES,
            "architecture": "masked_autoencoder",
            "pretraining_task": "expression_reconstruction",
            "decoder": {"hidden_dim": 16, "num_heads": 2},
        },
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_what_torch_counts(name: str) -> None:
    model, task, batch = batch_of(Config.model_validate(CASES[name]))
    lengths, asked = sizes(batch)
    with counting() as counter, torch.no_grad():  # with gradients, the gene loss computes its own at once
        task(model, batch)
    assert float(forward_flops(model, lengths, asked)) == pytest.approx(counter.get_total_flops(), rel=0.03)
    with counting() as counter:
        output = task(model, batch)
        output.loss.backward()
    assert float(training_flops(model, lengths, asked)) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_an_embedding_costs_the_forward_pass_without_heads() -> None:
    model, _, batch = batch_of(Config.model_validate(CASES["ranks"]))
    lengths, asked = sizes(batch)
    with counting() as counter, torch.inference_mode():
        model.encode(batch.tokens)
    assert float(encoding_flops(model, lengths)) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert float(forward_flops(model, lengths, 0 * asked)) == float(encoding_flops(model, lengths))


def test_a_causal_model_reads_half_of_the_pairs() -> None:
    causal = {"architecture": "autoregressive_transformer", "pretraining_task": "next_gene"}
    config = Config.model_validate({"tokenizer": {"max_genes": 200}, "model": {**SIZES, **causal}})
    model, task, batch = batch_of(config)
    lengths, asked = sizes(batch)
    with counting() as counter, torch.no_grad():
        task(model, batch)
    unread = 4 * SIZES["num_layers"] * SIZES["hidden_dim"] * float(lengths.square().sum()) / 2
    counted = float(forward_flops(model, lengths, asked))
    # Kernels that skip what a mask hides are counted by torch as if they did not.
    assert counted + unread == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_generated_genes_read_the_perceived_ones_only() -> None:
    generative = {
        "architecture": "autoregressive_transformer",
        "pretraining_task": "expression_reconstruction",
    }
    config = Config.model_validate({"tokenizer": BINS, "model": {**SIZES, **generative}})
    model, task, batch = batch_of(config)
    lengths, asked = sizes(batch)
    once = float(forward_flops(model, lengths, asked))
    rows = lengths + asked
    per_pair = 4 * SIZES["num_layers"] * SIZES["hidden_dim"]
    pairs = float((lengths.square() + asked * (lengths + 1)).sum())
    dense = per_pair * (float(rows.square().sum()) - pairs)
    with counting() as counter, torch.no_grad():
        task(model, batch)
    # Torch counts every pair, or those alone that are read.
    assert once <= counter.get_total_flops() * 1.03
    assert once + dense >= counter.get_total_flops() * 0.97

    twice = Config.model_validate(
        {"tokenizer": BINS, "model": {**SIZES, **generative, "objective": {"second_pass_weight": 1.0}}}
    )
    assert float(forward_flops(batch_of(twice)[0], lengths, asked)) == pytest.approx(2 * once, rel=1e-6)


def test_the_formula_of_the_documentation() -> None:
    """docs/performance.md: 2·S·L·(4d² + 2·d·f) + 4·P·L·d + m·(2d² + 2·d·V)."""
    config = Config.model_validate(CASES["ranks"])
    model, _, _ = batch_of(config)
    lengths, asked = torch.tensor([100.0, 20.0]).double(), torch.tensor([15.0, 3.0]).double()
    d, f, n_layers, vocabulary = 32, 96, 3, N_GENES + 4
    heads = 18 * (2 * d * d + 2 * d * vocabulary)
    blocks = 2 * 120 * n_layers * (4 * d * d + 2 * d * f) + 4 * (100**2 + 20**2) * n_layers * d
    assert float(forward_flops(model, lengths, asked)) == blocks + heads


def test_nothing_has_no_layers() -> None:
    assert linear_flops(None) == 0
