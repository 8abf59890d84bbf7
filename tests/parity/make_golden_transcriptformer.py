"""Write golden/transcriptformer.npz: a tiny random TranscriptFormer, run by its own package on the CPU.

    pip install --no-deps transcriptformer==0.6.1
    python -m tests.parity.make_golden_transcriptformer

The package needs torch, pytorch-lightning, anndata and h5py; its pins need not hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden" / "transcriptformer.npz"
SPECIAL_TOKENS = ("unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]")
ASSAYS = ("unknown", "assay a", "assay b", "assay c")
N_GENES, WINDOW, VECTOR_DIM = 29, 15, 10
# The keys of a published config.json that say how the model computes.
SETTINGS: dict[str, dict[str, Any]] = {
    "model_config": {
        "log_counts_eps": 1e-6,
        "num_heads": 2,
        "num_layers": 2,
        "model_dim": 24,
        "embed_dim": 16,
        "dropout": 0.1,
        "activation": "gelu",
        "attn_bias": False,
        "fw_bias": False,
        "mu_link_fn": "softmax",
        "softcap": 10,
        "seq_len": WINDOW,
        "aux_len": 1,
        "block_len": WINDOW + 1,
        "gene_head_hidden_dim": 12,
        "use_aux": True,
        "compile_block_mask": False,
    },
    "data_config": {
        "aux_vocab_path": "vocabs",
        "pin_memory": False,
        "aux_cols": "assay",
        "gene_col_name": "ensembl_id",
        "clip_counts": 30,
        "filter_to_vocabs": True,
        "filter_outliers": 0.0,
        "pad_zeros": True,
        "normalize_to_scale": 0,
        "n_data_workers": 0,
        "sort_genes": False,
        "randomize_genes": False,
        "min_expressed_genes": 0,
        "gene_pad_token": "[PAD]",
        "aux_pad_token": "unknown",
        "esm2_mappings": ["human_gene.h5"],
        "esm2_mappings_path": "vocabs",
        "special_tokens": list(SPECIAL_TOKENS),
    },
    "loss_config": {"gene_id_loss_weight": 1.0, "softplus_approx": True},
    "inference_config": {
        "output_keys": ["embeddings"],
        "batch_size": 4,
        "obs_keys": ["all"],
        "data_files": None,
        "load_checkpoint": None,
        "output_path": None,
    },
}


def cells() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gene tokens int64 and counts float32 (5, WINDOW), padded, and assays int64 (5, 1).

    Two cells fill the window; one assay is unknown.
    """
    rng = np.random.default_rng(7)
    tokens, counts = np.ones((5, WINDOW), dtype=np.int64), np.zeros((5, WINDOW), dtype=np.float32)
    for cell, length in enumerate((WINDOW, 4, 11, 1, WINDOW)):
        genes = np.sort(rng.choice(N_GENES, length, replace=False))
        tokens[cell, :length] = genes + len(SPECIAL_TOKENS)
        counts[cell, :length] = np.clip(1 + rng.negative_binomial(1, 0.15, length), 1, 30)
    return torch.from_numpy(tokens), torch.from_numpy(counts), torch.tensor([[1], [0], [3], [2], [2]])


def run() -> dict[str, np.ndarray]:
    """Weights, inputs, outputs and gradients of the original by name."""
    from torch.nn.attention import flex_attention
    from transcriptformer.data import dataclasses as original  # type: ignore[import-not-found]
    from transcriptformer.model.model import Transcriptformer  # type: ignore[import-not-found]

    # torch runs the plain version of flex attention on the CPU, backward too, but refuses to by this check.
    flex_attention._validate_device = lambda *_: None
    names = [*SPECIAL_TOKENS, *(f"ENSG{i:011d}" for i in range(N_GENES))]
    model = Transcriptformer(
        data_config=original.DataConfig(**SETTINGS["data_config"]),
        model_config=original.ModelConfig(**SETTINGS["model_config"]),
        loss_config=original.LossConfig(**SETTINGS["loss_config"]),
        inference_config=original.InferenceConfig(**SETTINGS["inference_config"]),
        gene_vocab_dict={name: i for i, name in enumerate(names)},
        aux_vocab_dict={"assay": {name: i for i, name in enumerate(ASSAYS)}},
        emb_matrix=torch.zeros(len(names), VECTOR_DIM),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    tokens, counts, assay = cells()
    batch = original.BatchData(gene_counts=counts, gene_token_indices=tokens, aux_token_indices=assay)
    states: list[torch.Tensor] = []
    handle = model.transformer_encoder.register_forward_hook(lambda *call: states.append(call[2][:, 1:]))
    output = model(batch)
    handle.remove()
    count_loss = model.criterion(**output)
    gene_loss = model.gene_id_criterion(
        logits=output["gene_logit"], input_ids=output["input_gene_token_indices"], mask=output["mask"]
    )
    (count_loss + gene_loss).backward()
    results = {
        "tokens": tokens,
        "counts": counts,
        "assay": assay,
        "hidden": states[0],
        "gene_logit": output["gene_logit"],
        "mu": output["mu"],
        "count_loss": count_loss,
        "gene_loss": gene_loss,
        "embeddings": model(batch, embed=True)["embeddings"],
    }
    results |= {f"weight/{name}": tensor for name, tensor in model.state_dict().items()}
    results |= {f"gradient/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **run())  # type: ignore[arg-type]
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")
