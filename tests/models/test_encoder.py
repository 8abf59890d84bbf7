"""A cell's embedding is its own: not its batch's, not its padding's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scmodelforge.config import Config, Preprocessing
from scmodelforge.models.bundle import build_model
from scmodelforge.models.transformer import linear_relu
from tests.helpers import make_cells, make_vocab, rank_tokenizer

VOCAB = make_vocab(200)
COUNTS = np.random.default_rng(0).poisson(np.linspace(0.05, 1.5, 12)[:, None], (12, 200))


def encoder(norm: str, **tokenizer):
    config = Config.model_validate(
        {
            "model": {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "norm": norm},
            "tokenizer": {"max_genes": 128, **tokenizer},
        }
    )
    model = build_model(config, VOCAB, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model, rank_tokenizer(config.tokenizer, Preprocessing(), VOCAB)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embeddings_do_not_depend_on_company(norm: str, pooling: str) -> None:
    model, tokenizer = encoder(norm)
    together = model.encode(tokenizer(make_cells(COUNTS)), pooling)
    alone = torch.cat([model.encode(tokenizer(make_cells(COUNTS[i : i + 1])), pooling) for i in range(12)])
    shuffled = model.encode(tokenizer(make_cells(COUNTS[::-1])), pooling).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, shuffled, atol=1e-5, rtol=0)
    assert together.std(0).max() > 1e-3  # and they do differ between cells


def test_the_mean_is_over_genes_alone() -> None:
    model, tokenizer = encoder("pre", append_eos=True)
    tokens = tokenizer(make_cells(COUNTS[:1]))
    hidden = model(tokens)[0, 1 : int(tokens.lengths[0]) - 1]
    torch.testing.assert_close(model.encode(tokens, "mean")[0], hidden.mean(0))


@pytest.mark.parametrize("prepend_cls", [True, False])
def test_an_empty_cell_gives_finite_numbers_and_disturbs_nobody(prepend_cls: bool) -> None:
    model, tokenizer = encoder("pre", prepend_cls=prepend_cls)
    with_empty = COUNTS.copy()
    with_empty[3] = 0
    embedded = model.encode(tokenizer(make_cells(with_empty)), "mean")
    assert torch.isfinite(embedded).all()
    assert (embedded[3] == 0).all()
    others = np.arange(12) != 3
    expected = model.encode(tokenizer(make_cells(COUNTS)), "mean")[others]
    torch.testing.assert_close(embedded[others], expected, atol=1e-5, rtol=0)


def test_a_layer_and_its_relu_in_one_are_the_two() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (6, 8), (6,)))
    expected = torch.relu(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(linear_relu(x, weight, bias), expected)
    torch.library.opcheck(linear_relu, (x, weight, bias))


def test_a_layer_and_its_relu_are_compiled_once_for_all_sizes() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: linear_relu(x, weight, bias) + 1, dynamic=True, backend="eager")
    compiled(torch.randn(5, 8))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (7, 16, 1000):
            assert compiled(torch.randn(n, 8)).shape == (n, 6)
