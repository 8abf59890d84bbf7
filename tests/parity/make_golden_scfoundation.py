"""Write golden/scfoundation.npz: a masked autoencoder computed the plain way, with torch's own transformer layers.

scFoundation's formulas (Hao et al. 2024, `MaeAutobin` of biomap-research/scFoundation) with a softmax decoder, one
cell at a time, over vectors that lie at their gene's place; no padding, no batching, none of our modules. Run:

    python tests/parity/make_golden_scfoundation.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

N_GENES, WIDTH, BINS, LAYERS, HEADS = 37, 16, 7, 2, 4
DECODER_WIDTH, DECODER_LAYERS, DECODER_HEADS = 8, 2, 2
EPS = 1e-5


def stack(width: int, heads: int, layers: int) -> nn.TransformerEncoder:
    """Post-norm layers with ReLU and a feed-forward layer of four times the width, then one more LayerNorm."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="relu", layer_norm_eps=EPS, batch_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width, eps=EPS), enable_nested_tensor=False)


class Reference(nn.Module):
    """Values → soft bins; visible genes → encoder; visible and asked genes → decoder → value."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.empty(BINS)), nn.Parameter(torch.empty(BINS))
        self.w2, self.b2 = nn.Parameter(torch.empty(BINS, BINS)), nn.Parameter(torch.empty(BINS))
        self.bins = nn.Parameter(torch.empty(BINS, WIDTH))
        self.mask_vector = nn.Parameter(torch.empty(WIDTH))
        self.genes = nn.Parameter(torch.empty(N_GENES, WIDTH))
        self.encoder = stack(WIDTH, HEADS, LAYERS)
        self.embed = nn.Linear(WIDTH, DECODER_WIDTH)
        self.decoder = stack(DECODER_WIDTH, DECODER_HEADS, DECODER_LAYERS)
        self.final = nn.Linear(DECODER_WIDTH, 1)

    def soft_bin(self, value: torch.Tensor) -> torch.Tensor:
        """One number → its vector: h = LeakyReLU(v w1 + b1), softmax(h + W2 h + b2) · E."""
        h = value * self.w1 + self.b1
        h = torch.where(h > 0, h, 0.1 * h)
        score = h + self.w2 @ h + self.b2
        weight = torch.exp(score - score.max())
        return (weight / weight.sum()) @ self.bins

    def encode(self, genes: list[int], values: list[float]) -> torch.Tensor:
        """The states of one cell's visible genes."""
        vectors = [self.soft_bin(torch.tensor(v)) + self.genes[g] for g, v in zip(genes, values, strict=True)]
        return self.encoder(torch.stack(vectors)[None])[0]

    def decode(self, states: torch.Tensor, visible: list[int], asked: list[int]) -> torch.Tensor:
        """The states of one cell's asked genes."""
        places = sorted([*visible, *asked])
        vectors = [
            (states[visible.index(gene)] if gene in visible else self.mask_vector) + self.genes[gene]
            for gene in places
        ]
        out = self.decoder(self.embed(torch.stack(vectors))[None])[0]
        return torch.stack([out[places.index(gene)] for gene in asked])


def main() -> None:
    torch.manual_seed(0)
    model = Reference().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    rng = np.random.default_rng(0)
    saved: dict[str, np.ndarray] = {}
    total, n_asked = torch.zeros(()), 0
    for cell, (n_visible, n_hidden) in enumerate([(20, 7), (3, 1), (11, 12)]):
        drawn = rng.choice(N_GENES, n_visible + n_hidden, replace=False)
        visible, asked = sorted(map(int, drawn[:n_visible])), sorted(map(int, drawn[n_visible:]))
        values = rng.gamma(2.0, 1.0, n_visible).astype(np.float32)
        truth = np.where(rng.random(n_hidden) < 0.3, 0, rng.gamma(2.0, 1.0, n_hidden)).astype(np.float32)
        states = model.encode(visible, values.tolist())
        decoded = model.decode(states, visible, asked)
        predicted = model.final(decoded)[:, 0]
        total = total + ((predicted - torch.from_numpy(truth)) ** 2).sum()
        n_asked += n_hidden
        saved |= {
            f"cell{cell}.visible": np.array(visible),
            f"cell{cell}.values": values,
            f"cell{cell}.asked": np.array(asked),
            f"cell{cell}.truth": truth,
            f"cell{cell}.states": states.detach().numpy(),
            f"cell{cell}.embedding": states.mean(dim=0).detach().numpy(),
            f"cell{cell}.decoded": decoded.detach().numpy(),
            f"cell{cell}.predicted": predicted.detach().numpy(),
        }
    loss = total / n_asked
    loss.backward()
    saved["loss"] = loss.detach().numpy()
    for name, parameter in model.named_parameters():
        saved[f"weight.{name}"] = parameter.detach().numpy()
        saved[f"gradient.{name}"] = parameter.grad.numpy()
    target = Path(__file__).parent / "golden" / "scfoundation.npz"
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, **saved)


if __name__ == "__main__":
    main()
