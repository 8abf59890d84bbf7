"""How fast does a model learn and embed, and in how much memory, against Hugging Face's BERT?

Both have the same sizes, weights, cells, hidden genes and arithmetic, and the batches come in order. Ours is
`scmodelforge train` as it is: reading, tokenizing, masking, packing, clipping, logging. The peer is Geneformer's way,
`transformers.BertForMaskedLM` on batches padded to their longest cell, which are handed to it ready made. Its memory
stands for any graph that computes logits over all genes at all positions. Each measurement has a process of its own,
rivals take turns, and medians are told. Before, both compute the loss of the same hidden genes, and the embeddings of
the same cells, with the same weights: speed that changes the result does not count.

    python benchmarks/training.py --data ../shared/data/pbmc3k.h5ad
    python benchmarks/training.py --data ../shared/data/pbmc3k.h5ad --only small --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness

SMALL = {"hidden_dim": 128, "num_layers": 2, "num_heads": 4, "ffn_dim": 512, "max_genes": 512, "batch": 64}
V1_10M = {"hidden_dim": 256, "num_layers": 6, "num_heads": 4, "ffn_dim": 512, "max_genes": 2048, "batch": 12}
MODELS = {"small": SMALL, "v1-10m": V1_10M}
STEPS = {"small": 8, "v1-10m": 4}  # of the peer; the first is not counted
ON_A_GPU_ONLY = (
    "utilization of the GPU (12 × 512)",
    "V1-10M tokens/s on a GPU",
    "embedding on a GPU",
    "no host sync in the step",
)
GIB = 2**30


def config_of(data: str, name: str, bf16: bool, **training: Any) -> Any:
    """Geneformer's recipe with the sizes of a model."""
    from scmodelforge.config import Config

    sizes = dict(MODELS[name])
    batch, longest = sizes.pop("batch"), sizes.pop("max_genes")
    return Config.model_validate(
        {
            "data": {"paths": [data], "split": {"val_split": 0.0}, "gene_vocab": "human_protein_coding"},
            "tokenizer": {"max_genes": longest, "gene_medians": "none"},
            "model": {"preset": "geneformer-v1-10m", "dropout": 0.0, "attention_dropout": 0.0, **sizes},
            "training": {
                "batch_size": batch,
                "max_epochs": 1,
                "num_gpus": 0,
                "precision": "bf16-mixed" if bf16 else "32-true",
                **training,
            },
        }
    )


def prepare(folder: str, data: str, name: str, bf16: bool) -> dict[str, float]:
    """Write weights in both formats and the peer's batches; return what the cells are like, and what both compute.

    That is the loss of the last batch, in float32 and in the precision that is measured, and how far apart embeddings
    of its cells are in the latter.
    """
    import numpy as np
    import torch
    from transformers import BertForMaskedLM

    from scmodelforge.inference import embed_store
    from scmodelforge.models.bundle import save_bundle
    from scmodelforge.models.published import export_model
    from scmodelforge.training.pretraining import set_up

    place = Path(folder) / name
    run = set_up(config_of(data, name, bf16=False))
    save_bundle(run.bundle, place / "ours")
    export_model(run.bundle, "huggingface-bert", place / "bert")
    size, rows = MODELS[name]["batch"], run.prepared.train_rows
    rows = np.random.default_rng(0).permutation(rows)
    real = padded = 0
    for step in range(STEPS[name]):
        some = rows[step * size : (step + 1) * size]
        seen = run.tokenizer(run.prepared.store.read(some), 0, 0)
        batch = run.task.corrupt(seen, 0, 0)
        labels = torch.full_like(batch.tokens.input_ids, -100)
        labels.view(-1)[batch.asked] = batch.genes
        tokens = {"input_ids": batch.tokens.input_ids, "attention_mask": batch.tokens.attention_mask.long()}
        torch.save({**tokens, "labels": labels}, place / f"batch_{step}.pt")
        real, padded = real + batch.n_tokens, padded + labels.numel()
    bert = BertForMaskedLM.from_pretrained(place / "bert").eval()
    run.bundle.model.eval()

    def losses(bf16: bool) -> tuple[float, float]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return run.task(run.bundle.model, batch).loss.item(), bert(**tokens, labels=labels).loss.item()

    ours = torch.from_numpy(
        embed_store(run.bundle, run.prepared.store, rows=some, precision="bf16" if bf16 else "32")
    )
    theirs = mean_state(
        bert.bert, {"input_ids": seen.input_ids, "attention_mask": seen.attention_mask.long()}, bf16
    )
    return {
        **dict(zip(("ours", "theirs"), losses(False), strict=True)),
        **dict(zip(("ours as measured", "theirs as measured"), losses(bf16), strict=True)),
        "distance": float(1 - torch.cosine_similarity(ours, theirs).min()),
        "tokens": real / (STEPS[name] * size),
        "padding": 1 - real / padded,
    }


def mean_state(bert: Any, batch: dict[str, Any], bf16: bool) -> Any:
    """BERT's embedding of padded cells, (n, width): the mean over tokens."""
    import torch

    mask = batch["attention_mask"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = bert(batch["input_ids"], attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def train_ours(folder: str, data: str, name: str, bf16: bool, compiled: bool = False) -> dict[str, float]:
    """`scmodelforge train`: cells/s after the first step, peak memory, seconds from start to first step."""
    from scmodelforge.config_io import to_yaml

    with tempfile.TemporaryDirectory() as place:
        run, config = Path(place) / "run", Path(place) / "config.yaml"
        training = {"max_steps": 2 * STEPS[name], "run_dir": str(run), "compile": compiled}
        config.write_text(to_yaml(config_of(str(Path(data).resolve()), name, bf16, **training)))
        command = [sys.executable, "-m", "scmodelforge.cli", "train", "--config", str(config)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures = json.loads((run / "run.json").read_text())["performance"]
    return {
        "rate": figures["cells_per_second"],
        "memory": figures["peak_memory_gib"],
        "start": figures["first_step_seconds"],
        "padding": figures["padding_share"],
    }


def train_theirs(folder: str, data: str, name: str, bf16: bool) -> dict[str, float]:
    """BertForMaskedLM on padded batches that are in memory: cells/s after the first step, and peak memory."""
    import resource

    import torch
    from transformers import BertForMaskedLM

    place = Path(folder) / name
    bert = BertForMaskedLM.from_pretrained(place / "bert").train()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batches = [torch.load(place / f"batch_{step}.pt", weights_only=True) for step in range(STEPS[name])]
    moments = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = bert(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        moments.append(time.perf_counter())
    cells = MODELS[name]["batch"] * (len(moments) - 1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rate": cells / (moments[-1] - moments[0]), "memory": memory}


def embed_ours(folder: str, data: str, name: str, bf16: bool) -> dict[str, float]:
    """`embed_store` on as many cells as the peer embeds, reading and tokenizing included."""
    import numpy as np

    from scmodelforge.inference import embed_store, open_for
    from scmodelforge.models.bundle import load_model

    bundle = load_model(Path(folder) / name / "ours")
    store = open_for(bundle, data)
    n = MODELS[name]["batch"] * STEPS[name]
    rows = np.random.default_rng(0).permutation(store.n_cells)[: 2 * n]
    precision = "bf16" if bf16 else "32"
    embed_store(bundle, store, rows=rows[:8], precision=precision)
    started = time.perf_counter()
    embed_store(bundle, store, rows=rows, precision=precision)
    return {"rate": len(rows) / (time.perf_counter() - started)}


def embed_theirs(folder: str, data: str, name: str, bf16: bool) -> dict[str, float]:
    """BERT's encoder on padded batches that are in memory, and the mean over tokens: cells/s."""
    import torch
    from transformers import BertForMaskedLM

    place = Path(folder) / name
    bert = BertForMaskedLM.from_pretrained(place / "bert").eval().bert
    batches = [torch.load(place / f"batch_{step}.pt", weights_only=True) for step in range(STEPS[name])]

    mean_state(bert, {key: value[:2] for key, value in batches[0].items()}, bf16)
    started = time.perf_counter()
    for batch in batches:
        mean_state(bert, batch, bf16)
    return {"rate": len(batches) * MODELS[name]["batch"] / (time.perf_counter() - started)}


def two_processes(data: str) -> dict[str, float]:
    """Largest difference of the loss to one process with the same global batch, and the imbalance of tokens."""
    import pandas as pd
    import yaml

    def run(folder: str, processes: int, **training: Any) -> pd.DataFrame:
        config = config_of(
            data, "small", bf16=False, max_steps=6, log_every_n_steps=1, run_dir=folder, **training
        )
        path = Path(folder) / "config.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        command = [sys.executable, *launch, "-m", "scmodelforge.cli", "train", "--config", str(path)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return pd.read_csv(Path(folder) / "metrics.csv")

    with tempfile.TemporaryDirectory() as folder:
        one = run(f"{folder}/one", 1, batch_size=32)["train_loss"].dropna()
        two = run(f"{folder}/two", 2, batch_size=16)["train_loss"].dropna()
        budget = run(f"{folder}/budget", 2, tokens_per_batch=16_384)["token_imbalance"].dropna()
    return {"difference": float((one - two).abs().max()), "imbalance": float(budget.mean())}


def compare(options: argparse.Namespace, name: str, folder: str) -> list[harness.Row]:
    """Rows of one model."""
    facts = harness.fresh(prepare, folder=folder, data=options.data, name=name, bf16=options.bf16)
    print(
        f"{name}: {facts['tokens']:,.0f} tokens a cell, {facts['padding']:.1%} of the peer's positions are padding; "
        f"loss in float32 {facts['ours']:.6f} (ours), {facts['theirs']:.6f} (theirs), as measured "
        f"{facts['ours as measured']:.4f}, {facts['theirs as measured']:.4f}; largest cosine distance of embeddings as "
        f"measured {facts['distance']:.1e}"
    )
    differ = abs(facts["ours"] - facts["theirs"]) > 1e-4
    differ |= abs(facts["ours as measured"] - facts["theirs as measured"]) > 5e-3  # bfloat16 rounds both
    if differ or facts["distance"] > 1e-3:
        raise SystemExit("Losses or embeddings differ: the models are not the same.")
    given = {"folder": folder, "data": options.data, "name": name, "bf16": options.bf16}
    seen: dict[str, list[dict[str, float]]] = {}

    def noted(key: str, call: Any) -> float:
        seen.setdefault(key, []).append(call())
        return seen[key][-1]["rate"]

    calls = {
        "train": partial(harness.fresh, train_ours, **given),
        "train bert": partial(harness.fresh, train_theirs, **given),
        "embed": partial(harness.fresh, embed_ours, **given),
        "embed bert": partial(harness.fresh, embed_theirs, **given),
    }
    if options.compile:
        calls["train compiled"] = partial(harness.fresh, train_ours, compiled=True, **given)
    rate = harness.medians({key: partial(noted, key, call) for key, call in calls.items()}, options.rounds)
    memory = {key: max(figures["memory"] for figures in seen[key]) for key in ("train", "train bert")}
    rows = [
        harness.Row(f"{name}: pretraining", rate["train"], "cells/s", rate["train bert"]),
        harness.Row(f"{name}: pretraining, peak memory", memory["train"], "GiB", memory["train bert"]),
        harness.Row(f"{name}: embedding", rate["embed"], "cells/s", rate["embed bert"]),
        harness.Row(
            f"{name}: process start to first step", statistics.median(f["start"] for f in seen["train"]), "s"
        ),
        harness.Row(f"{name}: padding of ours", seen["train"][-1]["padding"], ""),
    ]
    if options.compile:
        rows.append(
            harness.Row(
                f"{name}: pretraining, compiled", rate["train compiled"], "cells/s", rate["train bert"]
            )
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="an .h5ad file with raw human counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*MODELS, "processes"], help="a part of it")
    parser.add_argument(
        "--float32", action="store_true", help="float32 in both, also where there is bfloat16"
    )
    parser.add_argument("--compile", action="store_true", help="also with training.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.bf16 = not options.float32 and harness.fresh(has_bf16)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            if options.only in (None, name):
                rows += compare(options, name, folder)
    if options.only in (None, "processes"):
        seen = harness.fresh(two_processes, data=options.data)
        rows.append(
            harness.Row("two processes: largest difference of the loss to one", seen["difference"], "")
        )
        rows.append(harness.Row("two processes: most tokens over the mean", seen["imbalance"], ""))
    precision = "bf16-mixed" if options.bf16 else "32-true"
    versions = harness.versions("lightning", "transformers") | {"precision": precision}
    harness.report("training and embedding", rows, versions, options.json)
    print("Frozen fine-tuning: benchmarks/frozen.py")
    print("Left out, as they need a GPU: " + ", ".join(ON_A_GPU_ONLY))


def has_bf16() -> bool:
    """Whether this processor computes bfloat16."""
    from scmodelforge.training.setup import bf16_on_cpu

    return bf16_on_cpu()


if __name__ == "__main__":
    main()
