"""Which recipe learns fastest? Validation loss over seconds and steps, over seeds, on real cells.

Recipes differ from the first in what `RECIPES` says, and in nothing else: same cells, same order, same first weights
where the model is the same. Every epoch leaves a checkpoint, and all of them are judged alike: by the mean
cross-entropy at masked positions of held-out cells, masked as the first recipe masks them, whatever a model was
trained on. Seconds are those of the training steps (data included, validation and checkpoints not; the first step,
which compiles, counts as the second). Told for each recipe: the last loss, and the steps and seconds it takes to the
last loss of the first recipe with the same seed, on a line between epochs.

    python benchmarks/recipe.py --data ../shared/data/pbmc_sorted_zheng.h5ad --json recipe.json
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np

RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"training": {"optimizer": {"name": "muon"}}},
    "qk_norm": {"model": {"qk_norm": True}},
    "mask 0.3": {"tokenizer": {"masking": {"mask_ratio": 0.3}}},
}
VALIDATION_SHARE = 0.1
BATCH = 64


def config_tree(recipe: str, options: dict[str, Any], seed: int, run: str) -> dict[str, Any]:
    """The config of a run, as it would stand in a file."""
    tree: dict[str, Any] = {
        "data": {
            "gene_vocab": "from_data",
            "preprocessing": {"hvg": {"n_top_genes": 4000}},
            "split": {"val_split": 0.02},  # only so that each epoch leaves a checkpoint
        },
        "tokenizer": {"max_genes": 256, "masking": {"mask_ratio": 0.15}},
        "model": {
            "hidden_dim": options["hidden_dim"],
            "num_layers": options["num_layers"],
            "num_heads": options["hidden_dim"] // 32,
        },
        "training": {
            "batch_size": BATCH,
            "max_epochs": options["epochs"],
            "save_top_k": options["epochs"],
            "log_every_n_steps": 1,
            "seed": seed,
            "run_dir": run,
            "optimizer": {"lr": options["lr"]},
        },
    }
    return overlaid(tree, RECIPES[recipe])


def overlaid(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with `changes` laid over it, key by key."""
    return tree | {
        key: overlaid(tree.get(key, {}), value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def validation_loss(checkpoint: Path, cells: Any, masking: dict[str, Any], seed: int) -> float:
    """Mean cross-entropy at the masked positions of `cells`, masked as `masking` (of the first recipe) says."""
    import torch

    from scmodelforge.config import Config
    from scmodelforge.data.order import VALIDATION_EPOCH
    from scmodelforge.inference import open_for
    from scmodelforge.models.bundle import load_model
    from scmodelforge.models.objectives import build_objective
    from scmodelforge.tokenizers.base import build_tokenizer

    bundle = load_model(checkpoint)
    config = Config.model_validate(overlaid(bundle.config.model_dump(), {"tokenizer": {"masking": masking}}))
    store, tokenizer = open_for(bundle, cells), build_tokenizer(config, bundle.vocab)
    task = build_objective(config, bundle.vocab)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = bundle.model.to(device)
    sums = torch.zeros(len(task.sums), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for start in range(0, store.n_cells, BATCH):
            rows = np.arange(start, min(start + BATCH, store.n_cells))
            batch = task.corrupt(tokenizer(store.read(rows), seed, VALIDATION_EPOCH), seed, VALIDATION_EPOCH)
            batch = batch.to(device)
            sums += task.count(task(model, batch), batch)
    return task.metrics(sums)["loss"]


def curve(recipe: str, data: str, seed: int, options: dict[str, Any]) -> dict[str, list[float]]:
    """Train once; step, seconds and loss after each epoch."""
    import anndata
    import pandas as pd

    from scmodelforge.config_io import parse_config
    from scmodelforge.models.bundle import read_checkpoint
    from scmodelforge.training.run import train

    logging.getLogger("scmodelforge").setLevel(logging.WARNING)
    adata = anndata.read_h5ad(data)
    order = np.random.default_rng(seed).permutation(adata.n_obs)[: options["cells"]]
    n_held_out = int(len(order) * VALIDATION_SHARE)
    held_out, learned = adata[np.sort(order[:n_held_out])].copy(), adata[np.sort(order[n_held_out:])].copy()
    masking = config_tree(next(iter(RECIPES)), options, seed, "")["tokenizer"]["masking"]
    with tempfile.TemporaryDirectory() as scratch:
        run = train(parse_config(config_tree(recipe, options, seed, f"{scratch}/run")), data=learned)
        figures = pd.read_csv(run.run_dir / "metrics.csv").set_index("step")
        per_step = figures["seconds_per_step"].copy()  # a row a step
        per_step.iloc[0] = per_step.iloc[1]
        seconds = per_step.cumsum()
        points = []
        for path in sorted(run.checkpoint_dir.glob("epoch=*.ckpt")):
            step = read_checkpoint(path)["global_step"]
            points.append((step, float(seconds[step]), validation_loss(path, held_out, masking, seed)))
    steps, times, losses = zip(*points, strict=True)
    print(f"seed {seed}, {recipe}: {losses[0]:.4f} to {losses[-1]:.4f} in {times[-1]:.0f} s", flush=True)
    return {"step": list(steps), "seconds": list(times), "val_loss": list(losses)}


def reached(points: dict[str, list[float]], goal: float, axis: str) -> float | None:
    """Where on `axis` ("step" or "seconds") a curve first comes down to `goal`, between epochs; None: nowhere."""
    x, losses = points[axis], points["val_loss"]
    place = next((i for i, loss in enumerate(losses) if loss <= goal), None)
    if place is None:
        return None
    if place == 0:
        return x[0]
    share = (losses[place - 1] - goal) / (losses[place - 1] - losses[place])
    return x[place - 1] + share * (x[place] - x[place - 1])


def rows_of(curves: dict[str, list[dict[str, list[float]]]]) -> list[harness.Row]:
    """Mean over seeds of what each recipe ends with and takes; the peer is the first recipe."""
    first = next(iter(curves))
    goals = [points["val_loss"][-1] for points in curves[first]]
    rows = []
    for recipe, runs in curves.items():
        last = np.array([points["val_loss"][-1] for points in runs])
        spread = last.std(ddof=1) if len(last) > 1 else 0.0
        rows.append(harness.Row(f"{recipe}: last loss (± {spread:.4f})", last.mean(), "nats", np.mean(goals)))
        for axis, unit in (("step", "steps"), ("seconds", "s")):
            there = [reached(points, goal, axis) for points, goal in zip(runs, goals, strict=True)]
            found = [x for x in there if x is not None]
            name = f"{recipe}: {unit} to the last loss of {first} ({len(found)} of {len(runs)} seeds)"
            peer = float(np.mean([points[axis][-1] for points in curves[first]]))
            rows.append(harness.Row(name, float(np.mean(found)) if found else float("nan"), unit, peer))
    return rows


def main() -> None:
    """Run all seeds; recipes take turns at being first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data/pbmc_sorted_zheng.h5ad", help="file of raw counts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cells", type=int, help="as many cells at most; default: all")
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="also write versions, rows and curves to this file")
    arguments = parser.parse_args()
    options = {
        name: getattr(arguments, name) for name in ("epochs", "cells", "hidden_dim", "num_layers", "lr")
    }
    recipes = list(dict.fromkeys([next(iter(RECIPES)), *arguments.recipes]))
    curves: dict[str, list[dict[str, list[float]]]] = {recipe: [] for recipe in recipes}
    for turn, seed in enumerate(arguments.seeds):
        for i in range(len(recipes)):
            recipe = recipes[(turn + i) % len(recipes)]
            curves[recipe].append(
                harness.fresh(curve, recipe=recipe, data=arguments.data, seed=seed, options=options)
            )
    rows, versions = rows_of(curves), harness.versions()
    harness.report(f"recipes; peer: {recipes[0]}", rows, versions)
    if arguments.json is not None:
        content = {
            "versions": versions,
            "options": options,
            "rows": [
                {"name": row.name, "value": None if np.isnan(row.value) else row.value, "unit": row.unit}
                for row in rows
            ],
            "curves": curves,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
