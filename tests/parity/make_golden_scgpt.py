"""Write tests/parity/golden/scgpt_*.npz: what the published scGPT code computes for tiny random models.

    python tests/parity/make_golden_scgpt.py FOLDER

FOLDER holds the unpacked wheel scgpt-0.2.4 (MIT licence). Only its model code is imported, over empty packages, so
none of its dependencies but torch and tqdm is needed.

The generative mode needs flash-attention kernels in the original, so its golden file comes from a dense formula:
torch's own multi-head attention over perceived and generated genes with a mask, and no out projection for the
generated ones.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"
N_TOKENS, WIDTH, HEADS, FFN, LAYERS, N_BINS, N_BATCHES = 23, 8, 2, 12, 2, 7, 3
PAD, CLS = 0, 2
FIRST_GENE = 4
ECS_THRESHOLD = 0.3


def import_scgpt(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """scgpt.model.model and scgpt.loss, without what the packages around them import."""
    for name, place in (("scgpt", "scgpt"), ("scgpt.model", "scgpt/model")):
        module = types.ModuleType(name)
        module.__path__ = [str(folder / place)]
        sys.modules[name] = module
    return importlib.import_module("scgpt.model.model"), importlib.import_module("scgpt.loss")


def draw(model: nn.Module, seed: int) -> None:
    """Draw every parameter at standard deviation 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)


def cells(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and bins (5, 12) with ragged padding and `<cls>`, and lengths (5)."""
    rng = np.random.default_rng(seed)
    lengths = np.array([12, 5, 9, 3, 7])
    ids, values = np.full((5, 12), PAD), np.zeros((5, 12), dtype=np.float32)
    for row, length in enumerate(lengths):
        ids[row, 0] = CLS
        ids[row, 1:length] = rng.choice(N_TOKENS - FIRST_GENE, length - 1, replace=False) + FIRST_GENE
        values[row, 1:length] = rng.integers(0, N_BINS, length - 1)
    return torch.from_numpy(ids), torch.from_numpy(values), torch.from_numpy(lengths)


def save(name: str, state: dict[str, torch.Tensor], grads: dict[str, torch.Tensor | None], **arrays) -> None:
    """Write one golden file: arrays, weights as "state/NAME", gradients as "grad/NAME"."""
    content = {key: torch.as_tensor(value).detach().numpy() for key, value in arrays.items()}
    content |= {f"state/{key}": value.detach().numpy() for key, value in state.items()}
    content |= {f"grad/{key}": value.numpy() for key, value in grads.items() if value is not None}
    np.savez_compressed(GOLDEN / f"{name}.npz", **content)


def encoder(
    style: str, everything: bool, seed: int, model_code: types.ModuleType, loss_code: types.ModuleType
) -> None:
    """`TransformerModel` with masked values; `everything`: batch labels, explicit zeros, DAB, GEPC and ECS."""
    model = model_code.TransformerModel(
        ntoken=N_TOKENS,
        d_model=WIDTH,
        nhead=HEADS,
        d_hid=FFN,
        nlayers=LAYERS,
        vocab={"<pad>": PAD},
        dropout=0.0,
        pad_token="<pad>",
        pad_value=N_BINS,
        do_mvc=True,
        do_dab=everything,
        use_batch_labels=everything,
        num_batch_labels=N_BATCHES if everything else None,
        input_emb_style=style,
        n_input_bins=N_BINS + 2,
        ecs_threshold=ECS_THRESHOLD,
        explicit_zero_prob=everything,
    ).eval()
    draw(model, seed)
    ids, truth, lengths = cells(seed)
    padding = ids == PAD
    masked = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.4) & (
        ids >= FIRST_GENE
    )
    hidden_value = N_BINS + 1 if style == "category" else -1.0
    values = truth.masked_fill(masked, hidden_value).masked_fill(
        padding, N_BINS if style == "category" else 0.0
    )
    batches = torch.tensor([0, 2, 1, 1, 0]) if everything else None
    out = model(ids, values, padding, batches, MVC=True, ECS=everything)
    hidden = model._encode(ids, values, padding, batches)
    losses = {"expression": loss_code.masked_mse_loss(out["mlm_output"], truth, masked)}
    losses["cell_expression"] = loss_code.masked_mse_loss(out["mvc_output"], truth, masked)
    if everything:
        bernoulli = loss_code.criterion_neg_log_bernoulli
        losses["nonzero"] = bernoulli(out["mlm_zero_probs"], truth, masked)
        losses["cell_nonzero"] = bernoulli(out["mvc_zero_probs"], truth, masked)
        losses["ecs"] = out["loss_ecs"]
        losses["batch"] = F.cross_entropy(out["dab_output"], batches)
    total = sum(losses.values()) + 9 * losses.get("ecs", torch.tensor(0.0))  # ECS has weight 10
    total.backward()
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith("cls_decoder.")}
    extra = {"batches": batches, "zero_probs": out["mlm_zero_probs"]} if everything else {}
    save(
        f"scgpt_{style}{'_all' if everything else ''}",
        kept,
        {key: parameter.grad for key, parameter in model.named_parameters() if key in kept},
        ids=ids,
        truth=truth,
        lengths=lengths,
        masked=masked,
        hidden=hidden,
        prediction=out["mlm_output"],
        loss=total,
        **{f"loss/{key}": value for key, value in losses.items()},
        **extra,
    )


class DenseGenerator(nn.Module):
    """scGPT's generative pretraining as one masked attention per layer; names as in the published weights."""

    def __init__(self, model_code: types.ModuleType) -> None:
        super().__init__()
        self.encoder = model_code.GeneEncoder(N_TOKENS, WIDTH, padding_idx=PAD)
        self.flag_encoder = nn.Embedding(2, WIDTH)
        self.value_encoder = model_code.ContinuousValueEncoder(WIDTH, 0.0)
        layers = (nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, 0.0, batch_first=True) for _ in range(LAYERS))
        self.transformer_encoder = nn.Module()
        self.transformer_encoder.layers = nn.ModuleList(layers)
        self.decoder = model_code.ExprDecoder(WIDTH)
        self.mvc_decoder = model_code.MVCDecoder(WIDTH)

    def forward(
        self, ids: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, cell: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        perceived = self.encoder(ids) + self.value_encoder(values)
        if cell is not None:
            perceived = torch.cat([cell[:, None], perceived[:, 1:]], dim=1)
        x = torch.cat([perceived, self.encoder(queries) + self.flag_encoder.weight[1]], dim=1)
        n_perceived, n_all = ids.shape[1], x.shape[1]
        forbidden = torch.ones(len(ids), n_all, n_all, dtype=torch.bool)
        forbidden[:, :, :n_perceived] = (ids == PAD)[:, None, :]
        for place in range(n_perceived, n_all):
            forbidden[:, place, place] = False
        forbidden = forbidden.repeat_interleave(HEADS, dim=0)
        identity, zeros = torch.eye(WIDTH), torch.zeros(WIDTH)
        for layer in self.transformer_encoder.layers:
            attention = layer.self_attn
            context, _ = F.multi_head_attention_forward(
                *[x.transpose(0, 1)] * 3,
                WIDTH,
                HEADS,
                attention.in_proj_weight,
                attention.in_proj_bias,
                None,
                None,
                False,
                0.0,
                identity,
                zeros,
                training=False,
                attn_mask=forbidden,
            )
            context = context.transpose(0, 1)
            mixed = torch.cat([attention.out_proj(context[:, :n_perceived]), context[:, n_perceived:]], dim=1)
            x = layer.norm1(x + mixed)
            x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
        return x[:, :n_perceived], x[:, n_perceived:]


def generator(seed: int, model_code: types.ModuleType) -> None:
    """Generated values, the losses of both passes and MVC, and their gradients."""
    model = DenseGenerator(model_code).eval()
    draw(model, seed)
    all_ids, all_values, _ = cells(seed)
    rng = np.random.default_rng(seed)
    is_query = torch.from_numpy(rng.random(all_ids.shape) < 0.5) & (all_ids >= FIRST_GENE)

    def left(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            (ids[chosen], values[chosen])
            for ids, values, chosen in zip(all_ids, all_values, keep, strict=True)
        ]
        return tuple(nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*rows, strict=True))

    ids, values = left(~is_query & (all_ids != PAD))
    queries, answers = left(is_query)
    asked = queries != PAD
    hidden, states = model(ids, values, queries)
    cell = hidden[:, 0]
    prediction = model.decoder(states)["pred"]
    mvc = model.mvc_decoder(cell, model.encoder(queries))["pred"]
    again = model.decoder(model(ids, values, queries, cell.detach())[1])["pred"]
    losses = {
        "expression": F.mse_loss(prediction[asked], answers[asked]),
        "cell_expression": F.mse_loss(mvc[asked], answers[asked]),
        "second_pass": F.mse_loss(again[asked], answers[asked]),
    }
    total = sum(losses.values())
    total.backward()
    save(
        "scgpt_generative",
        model.state_dict(),
        {key: parameter.grad for key, parameter in model.named_parameters()},
        ids=ids,
        values=values,
        queries=queries,
        answers=answers,
        hidden=hidden,
        prediction=prediction,
        loss=total,
        **{f"loss/{key}": value for key, value in losses.items()},
    )


def main() -> None:
    """Write all files."""
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path gives zeros at pads
    model_code, loss_code = import_scgpt(Path(sys.argv[1]))
    GOLDEN.mkdir(exist_ok=True)
    encoder("continuous", False, 0, model_code, loss_code)
    encoder("continuous", True, 1, model_code, loss_code)
    encoder("category", False, 2, model_code, loss_code)
    encoder("scaling", False, 3, model_code, loss_code)
    generator(4, model_code)


if __name__ == "__main__":
    main()
