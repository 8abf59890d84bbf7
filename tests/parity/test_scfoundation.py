"""Our masked autoencoder against scFoundation's formulas, computed with torch's own layers cell by cell.

golden/scfoundation.npz is written by make_golden_scfoundation.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.models.masked_autoencoder import MaskedAutoencoder
from scmodelforge.models.objectives.batch import TrainingBatch, pack
from scmodelforge.models.objectives.reconstruction import MaskedReconstruction
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import make_vocab

pytestmark = pytest.mark.parity

GOLDEN = {
    name: torch.from_numpy(array)
    for name, array in np.load(Path(__file__).parent / "golden" / "scfoundation.npz").items()
}
N_CELLS, FIRST, LAYERS = 3, 4, 2
VOCAB = make_vocab(len(GOLDEN["weight.genes"]))
CONFIG = Config.model_validate(
    {
        "tokenizer": {"strategy": "continuous_projection", "prepend_cls": False},
        "model": {
            "architecture": "masked_autoencoder",
            "pretraining_task": "expression_reconstruction",
            "hidden_dim": 16,
            "num_layers": LAYERS,
            "num_heads": 4,
            "soft_bins": 7,
            "activation": "relu",
            "norm": "post",
            "final_norm": True,
            "layer_norm_eps": 1e-5,
            "decoder": {"hidden_dim": 8, "num_layers": LAYERS, "num_heads": 2},
        },
    }
)


def ours(kind: str) -> dict[str, torch.Tensor]:
    """Weights or gradients of the golden file under our names; special tokens have no vector there: zeros."""
    golden = {
        name.removeprefix(f"{kind}."): array for name, array in GOLDEN.items() if name.startswith(f"{kind}.")
    }
    genes = golden.pop("genes")
    named = {
        "embedding.tokens.weight": torch.cat([torch.zeros(FIRST, genes.shape[1]), genes]),
        "embedding.values.linear1.weight": golden.pop("w1")[:, None],
        "embedding.values.linear1.bias": golden.pop("b1"),
        "embedding.values.linear2.weight": golden.pop("w2"),
        "embedding.values.linear2.bias": golden.pop("b2"),
        "embedding.values.bins.weight": golden.pop("bins"),
        "embedding.values.masked.weight": golden.pop("mask_vector")[None],
    }
    for part, mine in (("weight", "weight"), ("bias", "bias")):
        named[f"to_decoder.{mine}"] = golden.pop(f"embed.{part}")
        named[f"head.{mine}"] = golden.pop(f"final.{part}")
        for theirs, stack in (("encoder", "transformer"), ("decoder", "decoder")):
            named[f"{stack}.final_norm.{mine}"] = golden.pop(f"{theirs}.norm.{part}")
            for layer in range(LAYERS):
                old, new = f"{theirs}.layers.{layer}", f"{stack}.blocks.{layer}"
                packed = golden.pop(f"{old}.self_attn.in_proj_{part}").chunk(3)
                for name, tensor in zip("qkv", packed, strict=True):
                    named[f"{new}.attention.{name}.{mine}"] = tensor
                for a, b in (
                    ("self_attn.out_proj", "attention.out"),
                    ("norm1", "attention_norm"),
                    ("linear1", "feed_forward.fc1"),
                    ("linear2", "feed_forward.fc2"),
                    ("norm2", "feed_forward_norm"),
                ):
                    named[f"{new}.{b}.{mine}"] = golden.pop(f"{old}.{a}.{part}")
    assert not golden
    return named


def padded(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def cells(name: str) -> list[torch.Tensor]:
    return [GOLDEN[f"cell{cell}.{name}"] for cell in range(N_CELLS)]


@pytest.fixture
def model() -> MaskedAutoencoder:
    model = MaskedAutoencoder(CONFIG, VOCAB).eval()
    model.load_state_dict(ours("weight"))
    return model


@pytest.fixture
def batch() -> TrainingBatch:
    """The golden cells side by side, with pads at tokens and at queries."""
    visible = [genes + FIRST for genes in cells("visible")]
    asked = [genes + FIRST for genes in cells("asked")]
    queries = padded(asked, VOCAB.pad_id)
    tokens = TokenBatch(
        input_ids=padded(visible, VOCAB.pad_id),
        values=padded(cells("values"), 0.0),
        lengths=torch.tensor([len(genes) for genes in visible]),
        cell_index=torch.arange(N_CELLS),
        has_padding=True,
    )
    flat = torch.nonzero(queries.flatten() != VOCAB.pad_id)[:, 0]
    return TrainingBatch(tokens, flat, torch.cat(asked), torch.cat(cells("truth")), 0, 0, queries)


def test_encoder_states_and_cell_embeddings_are_the_golden_ones(model, batch) -> None:
    hidden, embedding = model(batch.tokens), model.encode(batch.tokens, "mean")
    for cell, states in enumerate(cells("states")):
        torch.testing.assert_close(hidden[cell, : len(states)], states, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding, torch.stack(cells("embedding")), atol=1e-5, rtol=0)


def test_decoder_states_and_values_are_the_golden_ones(model, batch) -> None:
    packed = pack(batch, model.packing, VOCAB.pad_id)
    decoded = model.decode(model(packed.tokens), packed.tokens, packed.queries)
    torch.testing.assert_close(decoded, torch.cat(cells("decoded")), atol=1e-5, rtol=0)
    output = MaskedReconstruction(CONFIG, VOCAB)(model, batch)
    torch.testing.assert_close(output.expression[:, 0], torch.cat(cells("predicted")), atol=1e-5, rtol=0)


def test_loss_and_gradients_are_the_golden_ones(model, batch) -> None:
    output = MaskedReconstruction(CONFIG, VOCAB)(model, batch)
    torch.testing.assert_close(output.loss, GOLDEN["loss"], atol=1e-5, rtol=1e-6)
    output.loss.backward()
    gradients = ours("gradient")
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5, msg=name)
