"""The rows of `training.py` that need a GPU: how much of its arithmetic is used, and how fast BERT is beside it.

Ours is `scmodelforge train` and `embed_store` as they are, from memory-mapped shards on the disk. The peer,
`transformers.BertForMaskedLM`, finds its padded batches on the GPU already. Both compute in bfloat16, have the same
weights, cells and hidden genes, and are counted in real tokens. Each figure comes from a process of its own; rivals
take turns.

    python benchmarks/training_gpu.py --data cells.h5ad more.h5ad
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness

LARGE = {"hidden_dim": 512, "num_layers": 12, "num_heads": 8, "ffn_dim": 2048, "max_genes": 2048}
V1_10M = {"hidden_dim": 256, "num_layers": 6, "num_heads": 4, "ffn_dim": 512, "max_genes": 2048}
MODELS = {"12 × 512": LARGE, "V1-10M": V1_10M}
TOKENS, CELLS = 131_072, 64  # of a batch: ours, the peer's
PEER_BATCHES = 16
STEPS = {"12 × 512": 75, "V1-10M": 250}
EMBEDDED_TIMES = 120  # so that some seconds are measured
STARTED = time.perf_counter()


def config_of(folder: str, name: str, **training: Any) -> Any:
    """Geneformer's recipe with the sizes of a model, on the shards."""
    from scmodelforge.config_io import check_paths, parse_config

    sizes = dict(MODELS[name])
    longest = sizes.pop("max_genes")
    return check_paths(
        parse_config(
            {
                "data": {
                    "paths": [f"{folder}/shards"],
                    "split": {"val_split": 0.0},
                    "gene_vocab": "human_protein_coding",
                },
                "tokenizer": {"max_genes": longest, "gene_medians": "none"},
                "model": {"preset": "geneformer-v1-10m", "dropout": 0.0, "attention_dropout": 0.0, **sizes},
                "training": {
                    "tokens_per_batch": TOKENS,
                    "max_epochs": 100,
                    "num_gpus": 1,
                    "precision": "bf16-mixed",
                    "loader_threads": 6,
                    "log_every_n_steps": 20,
                    **training,
                },
            }
        )
    )


def prepare(folder: str, data: list[str]) -> dict[str, Any]:
    """Write shards, weights in both formats and the peer's batches; return both losses and the cells' sizes."""
    import numpy as np
    import torch
    import yaml
    from transformers import BertForMaskedLM

    from scmodelforge.models.bundle import save_bundle
    from scmodelforge.models.published import export_model
    from scmodelforge.training.pretraining import set_up

    config = Path(folder) / "shard.yaml"
    config.write_text(yaml.safe_dump({"data": {"paths": data, "gene_vocab": "human_protein_coding"}}))
    command = [sys.executable, "-m", "scmodelforge.cli", "shard", "--config", str(config)]
    subprocess.run([*command, "--output", f"{folder}/shards"], check=True)
    facts: dict[str, Any] = {}
    for name in MODELS:
        place = Path(folder) / name
        run = set_up(config_of(folder, name))
        save_bundle(run.bundle, place / "ours")
        export_model(run.bundle, "huggingface-bert", place / "bert")
        rows = np.random.default_rng(0).permutation(run.prepared.train_rows)
        real = padded = 0
        for step in range(PEER_BATCHES):
            cells = run.prepared.store.read(rows[step * CELLS : (step + 1) * CELLS])
            plain = run.tokenizer(cells, 0, 0)
            batch = run.task.corrupt(plain, 0, 0)
            labels = torch.full_like(batch.tokens.input_ids, -100)
            labels.view(-1)[batch.asked] = batch.genes
            tokens = {
                "input_ids": batch.tokens.input_ids,
                "attention_mask": batch.tokens.attention_mask.long(),
            }
            saved = {**tokens, "labels": labels, "plain": plain.input_ids, "n_tokens": batch.n_tokens}
            torch.save(saved, place / f"batch_{step}.pt")
            real, padded = real + batch.n_tokens, padded + labels.numel()
        bert = BertForMaskedLM.from_pretrained(place / "bert").eval().cuda()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            packed = run.task.pack(batch).to(torch.device("cuda"))
            ours = run.task(run.bundle.model.eval().cuda(), packed).loss.item()
            whole = {**tokens, "labels": labels}
            parts = [
                {key: value[i : i + 8].cuda() for key, value in whole.items()} for i in range(0, CELLS, 8)
            ]
            n_asked = [int((part["labels"] != -100).sum()) for part in parts]
            losses = [bert(**part).loss.item() for part in parts]
            theirs = float(np.average(losses, weights=n_asked))
        facts[name] = {
            "ours": ours,
            "theirs": theirs,
            "tokens": real / (PEER_BATCHES * CELLS),
            "padding": 1 - real / padded,
        }
    return facts


def train_ours(folder: str, name: str, **training: Any) -> dict[str, float]:
    """`train` after its first step: real tokens/s, share of the GPU's own matrix rate, memory, waiting for data."""
    from scmodelforge.training.run import train

    with tempfile.TemporaryDirectory() as run:
        figures = train(config_of(folder, name, max_steps=STEPS[name], run_dir=run, **training)).performance
    return {
        "rate": figures["tokens_per_second"],
        "mfu": figures["mfu"],
        "matmul": figures["matmul_flops_per_second"],
        "memory": figures["peak_memory_gib"],
        "wait": figures["data_wait_share"],
        "padding": figures["padding_share"],
        "start": figures["first_step_seconds"],
    }


def on_the_gpu(place: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The peer's batches, and the real tokens of each."""
    import torch

    batches = [torch.load(place / f"batch_{step}.pt", weights_only=True) for step in range(PEER_BATCHES)]
    tokens = [batch.pop("n_tokens") for batch in batches]
    return [{key: value.cuda() for key, value in batch.items()} for batch in batches], tokens


def train_theirs(folder: str, name: str, cells: int = CELLS) -> dict[str, float]:
    """BertForMaskedLM: real tokens/s on padded batches of `cells` cells after three steps of warm-up."""
    import torch
    from transformers import BertForMaskedLM

    place = Path(folder) / name
    bert = BertForMaskedLM.from_pretrained(place / "bert").train().cuda()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batches, tokens = on_the_gpu(place)
    for step in range(3 + len(batches)):
        if step == 3:
            torch.cuda.synchronize()
            started = time.perf_counter()
        batch = batches[step % len(batches)]
        for first in range(0, CELLS, cells):
            with torch.autocast("cuda", torch.bfloat16):
                loss = bert(
                    **{key: value[first : first + cells] for key, value in batch.items() if key != "plain"}
                ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"rate": sum(tokens) / seconds, "memory": torch.cuda.max_memory_allocated() / 2**30}


def embed_ours(folder: str, name: str, precision: str, compiled: bool) -> dict[str, float]:
    """`embed_store` from the shards: real tokens/s, reading and tokenizing included.

    `compiled`: as for so many cells that the model is compiled, without the seconds that this takes.
    """
    import numpy as np
    import torch

    from scmodelforge import inference_batches
    from scmodelforge.inference import embed_store
    from scmodelforge.models.bundle import load_model
    from scmodelforge.training.pretraining import set_up

    inference_batches.COMPILED_FROM = 0 if compiled else sys.maxsize
    bundle = load_model(Path(folder) / name / "ours")
    store = set_up(config_of(folder, name)).prepared.store
    rows = np.random.default_rng(0).permutation(store.n_cells)
    n_tokens = sum(
        torch.load(Path(folder) / name / f"batch_{step}.pt", weights_only=True)["n_tokens"]
        for step in range(PEER_BATCHES)
    )
    part = rows[: PEER_BATCHES * CELLS]
    # In another order each time, so that batches differ in size, as they do for users.
    again = np.random.default_rng(1).permutation(np.tile(part, EMBEDDED_TIMES - 1))
    embed_store(bundle, store, rows=np.concatenate([part, again[:2048]]), precision=precision)  # warm-up
    started = time.perf_counter()
    embeddings = embed_store(bundle, store, rows=np.concatenate([part, again]), precision=precision)
    seconds = time.perf_counter() - started
    np.save(Path(folder) / name / f"{precision}.npy", embeddings[: len(part)])
    return {"rate": EMBEDDED_TIMES * n_tokens / seconds, "first": started - STARTED}


def embed_theirs(folder: str, name: str) -> dict[str, float]:
    """BERT's encoder in bfloat16, and the mean over tokens: real tokens/s on batches that are on the GPU."""
    import torch
    from transformers import BertForMaskedLM

    place = Path(folder) / name
    bert = BertForMaskedLM.from_pretrained(place / "bert").eval().bert.bfloat16().cuda()
    batches, tokens = on_the_gpu(place)

    @torch.inference_mode()
    def embed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"]
        hidden = bert(batch["plain"], attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    for batch in batches[:3]:
        embed(batch)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        found = [embed(batch) for batch in batches]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    torch.save([part.float().cpu() for part in found], place / "theirs.pt")
    return {"rate": 4 * sum(tokens) / seconds}


LARGE_NAME, SMALL_NAME = MODELS
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "large compiled": (train_ours, {"name": LARGE_NAME, "compile": True}),
    "train compiled": (train_ours, {"name": SMALL_NAME, "compile": True}),
    "train bert": (train_theirs, {"name": SMALL_NAME, "cells": 32}),
    "embed compiled, bf16-true": (
        embed_ours,
        {"name": SMALL_NAME, "precision": "bf16-true", "compiled": True},
    ),
    "embed compiled, bf16": (embed_ours, {"name": SMALL_NAME, "precision": "bf16", "compiled": True}),
    "embed bert": (embed_theirs, {"name": SMALL_NAME}),
    "embed, bf16": (embed_ours, {"name": SMALL_NAME, "precision": "bf16", "compiled": False}),
    "train": (train_ours, {"name": SMALL_NAME}),
    "large": (train_ours, {"name": LARGE_NAME}),
}
EMBEDDED = {
    "embed compiled, bf16-true",
    "embed compiled, bf16",
    "embed bert",
}  # whose embeddings are compared


def rows_of(folder: str, data: list[str], rounds: int, only: list[str]) -> list[harness.Row]:
    """The figures of the calls in `only`."""
    for name, facts in harness.fresh(prepare, folder=folder, data=data).items():
        print(
            f"{name}: {facts['tokens']:,.0f} tokens a cell, {facts['padding']:.1%} of the peer's places are padding; "
            f"loss {facts['ours']:.5f} (ours), {facts['theirs']:.5f} (theirs)",
            flush=True,
        )
        if abs(facts["ours"] - facts["theirs"]) > 5e-3:  # bfloat16 rounds both
            raise SystemExit("The losses differ: the models are not the same.")
    seen: dict[str, list[dict[str, float]]] = {}

    def noted(key: str, call: Any) -> float:
        seen.setdefault(key, []).append(call())
        print(key, {name: round(value, 4) for name, value in seen[key][-1].items()}, flush=True)
        return seen[key][-1]["rate"]

    calls = {
        key: partial(noted, key, partial(harness.fresh, function, folder=folder, **arguments))
        for key, (function, arguments) in CALLS.items()
        if key in only
    }
    rate = harness.medians(calls, rounds)
    rows = []
    for key in (key for key in only if key.startswith("large")):
        best = max(seen[key], key=lambda figures: figures["mfu"])
        rows += [
            harness.Row(f"12 × 512, {key}: share of the GPU's own matrix rate", best["mfu"], ""),
            harness.Row(f"12 × 512, {key}: pretraining", rate[key], "tokens/s"),
            harness.Row(f"12 × 512, {key}: waiting for data", best["wait"], ""),
        ]
    for what in ("train", "embed"):
        for key in (key for key in only if key.startswith(what) and not key.endswith("bert")):
            rows.append(harness.Row(f"V1-10M: {key}", rate[key], "tokens/s", rate.get(f"{what} bert")))
    if set(only) >= EMBEDDED:
        for name, most in harness.fresh(distances, folder=folder).items():
            rows.append(harness.Row(f"V1-10M: largest cosine distance of {name} to float32", most, ""))
    return rows


def distances(folder: str) -> dict[str, float]:
    """How far embeddings in half precision are from those in float32, 1 - cosine, at worst."""
    import numpy as np
    import torch

    from scmodelforge.inference import embed_store
    from scmodelforge.models.bundle import load_model
    from scmodelforge.training.pretraining import set_up

    place = Path(folder) / "V1-10M"
    store = set_up(config_of(folder, "V1-10M")).prepared.store
    rows = np.random.default_rng(0).permutation(store.n_cells)[: PEER_BATCHES * CELLS]
    exact = torch.from_numpy(embed_store(load_model(place / "ours"), store, rows=rows, precision="32"))
    found = {name: torch.from_numpy(np.load(place / f"{name}.npy")) for name in ("bf16", "bf16-true")}
    found["BERT in bfloat16"] = torch.cat(torch.load(place / "theirs.pt", weights_only=True))
    return {
        name: float(1 - torch.nn.functional.cosine_similarity(x.double(), exact.double()).min())
        for name, x in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, nargs="+", help=".h5ad files with raw human counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(folder, options.data, options.rounds, options.only)
    import torch

    versions = harness.versions("torch", "lightning", "transformers")
    versions |= {"GPU": torch.cuda.get_device_name(), "precision": "bf16-mixed"}
    harness.report("training and embedding on a GPU", rows, versions, options.json)


if __name__ == "__main__":
    main()
