"""Which family learns most from the same cells, with the same number of parameters and the same time budget of cells?

On two labelled data sets a fifth of the cells is held out. Each family is pretrained on the same cells of the rest,
without labels, for the same number of cells, with the same width, depth and input length, so that parameters differ by
heads alone. Judged on the held-out cells: macro F1 of a linear probe fitted on the remaining cells, and the scIB total
(biology), beside PCA and each family's own model before training. Losses are on held-out pretraining cells and in the
units of each task, so they compare with themselves only.

    python benchmarks/families.py --data ../shared/data --json families.json --markdown families.md
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
from quality import DATASETS, labelled_cells
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

DATA = ("pbmc3k", "pbmc_sorted_zheng")
COUNTS = {"normalize": "none", "log1p": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "Geneformer: ranks, masked genes": {
        "tokenizer": {"strategy": "rank_value"},
        "model": {"architecture": "transformer_encoder", "pretraining_task": "masked_gene_prediction"},
    },
    "scGPT: bins, masked values": {
        "tokenizer": {"strategy": "binned_expression", "masking": {"mask_ratio": 0.4}},
        "model": {
            "architecture": "transformer_encoder",
            "pretraining_task": "expression_reconstruction",
            "objective": {"cell_weight": 1.0},
        },
    },
    "scGPT: bins, generated values": {
        "tokenizer": {"strategy": "binned_expression"},
        "model": {
            "architecture": "autoregressive_transformer",
            "pretraining_task": "expression_reconstruction",
            "objective": {"cell_weight": 1.0},
        },
    },
    "bins, masked genes and values": {
        "tokenizer": {"strategy": "binned_expression", "masking": {"mask_ratio": 0.2}},
        "model": {"architecture": "transformer_encoder", "pretraining_task": "dual_prediction"},
    },
    "TranscriptFormer: counts, next gene": {
        "data": {"preprocessing": COUNTS},
        "tokenizer": {"strategy": "continuous_projection", "gene_order": "random", "max_value": 30},
        "model": {
            "architecture": "autoregressive_transformer",
            "pretraining_task": "dual_prediction",
            "count_bias": True,
            "soft_cap": 10,
        },
    },
    "scFoundation: values, autoencoder": {
        "tokenizer": {"strategy": "continuous_projection", "masking": {"mask_ratio": 0.3}},
        "model": {
            "architecture": "masked_autoencoder",
            "pretraining_task": "expression_reconstruction",
            "decoder": {"num_layers": 1},
        },
    },
}
SHARED: dict[str, Any] = {
    "data": {
        "preprocessing": {"hvg": {"n_top_genes": 2000, "flavor": "cell_ranger"}},
        "split": {"val_split": 0.05},
    },
    "tokenizer": {"max_genes": 160},
    "model": {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.1, "pooling": "mean"},
    "training": {
        "batch_size": 64,
        "log_every_n_steps": 5,
        "optimizer": {"lr": 3e-3, "weight_decay": 0.01},
    },
}


def over(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with `changes` laid over it, section by section."""
    nested = {
        key: over(tree[key], value) for key, value in changes.items() if isinstance(tree.get(key), dict)
    }
    return tree | changes | nested


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and held-out rows: a fifth of the cells of each class."""
    learn, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return np.sort(learn), np.sort(test)


def macro_f1(embedding: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Macro F1 of a linear probe on the held-out cells."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(embedding[train], labels[train])
    truth = labels[test]
    predicted = probe.predict(embedding[test])
    return float(f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0))


def scib_total(embedding: np.ndarray, obs: pd.DataFrame, test: np.ndarray) -> float:
    """scIB total (biology) of the held-out cells."""
    from scmodelforge.config_eval import EmbeddingQualityParams
    from scmodelforge.evaluation.embedding_quality import embedding_quality

    params = EmbeddingQualityParams(max_cells=1000)
    obs = obs.iloc[test]
    common = obs["cell_type"].map(obs["cell_type"].value_counts()).astype(int).to_numpy() >= 2
    return float(embedding_quality(embedding[test][common], obs[common], params, seed=0)["total"])


def one_run(family: str, dataset: str, data: str, seed: int, cells: int, epochs: int) -> dict[str, Any]:
    """Pretrain one family on one data set; its figures, loss curve and those of PCA beside it."""
    from scmodelforge.config_io import parse_config
    from scmodelforge.evaluation.baselines import pca_embedding
    from scmodelforge.inference import embed_store, open_for
    from scmodelforge.models.bundle import ModelBundle, build_model
    from scmodelforge.training.run import train

    logging.getLogger("scmodelforge").setLevel(logging.WARNING)
    spec = next(spec for spec in DATASETS if spec.name == dataset)
    adata = labelled_cells(spec, Path(data))
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    learn, test = hold_out(labels, seed)
    chosen = np.sort(np.random.default_rng(seed).permutation(learn)[:cells])
    with tempfile.TemporaryDirectory() as scratch:
        run = {"training": {"seed": seed, "max_epochs": epochs, "run_dir": f"{scratch}/run"}}
        config = parse_config(over(over(SHARED, FAMILIES[family]), run))
        trained = train(config, data=adata[chosen].copy()).model
        with open(f"{scratch}/run/metrics.csv", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    untrained = ModelBundle(trained.config, trained.vocab, build_model(trained.config, trained.vocab, seed))
    store = open_for(trained, adata)
    embeddings = {
        "PCA": pca_embedding(adata.X, seed),
        "untrained": embed_store(untrained, store, 128),
        "pretrained": embed_store(trained, store, 128),
    }
    speeds = [float(row["cells_per_second"]) for row in rows if row.get("cells_per_second")]
    return {
        "parameters": trained.n_parameters,
        "cells/s": float(np.median(speeds)),
        "val_loss": [float(row["val_loss"]) for row in rows if row.get("val_loss")],
        **{
            f"{name}/macro F1": macro_f1(embedding, labels, learn, test)
            for name, embedding in embeddings.items()
        },
        **{
            f"{name}/scIB total": scib_total(embedding, adata.obs, test)
            for name, embedding in embeddings.items()
        },
    }


def curve(losses: list[float]) -> str:
    """A loss curve in a line of text: first value, shape, last value."""
    low, high = min(losses), max(losses)
    bars = "▁▂▃▄▅▆▇█"
    shape = "".join(bars[round((loss - low) / (high - low or 1) * (len(bars) - 1))] for loss in losses)
    return f"{losses[0]:.3g} {shape} {losses[-1]:.3g}"


def markdown(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The table for the README: one row per data set and family, mean over seeds (± their standard deviation)."""

    def figure(runs: list[dict[str, Any]], key: str) -> str:
        values = np.array([run[key] for run in runs])
        return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")

    lines = [
        "| cells | family | parameters | validation loss by epoch | macro F1: untrained | pretrained | scIB: untrained "
        "| pretrained | cells/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset, families in results.items():
        first = next(iter(families.values()))
        lines.append(
            f"| {dataset} | PCA-50 | | | | {figure(first, 'PCA/macro F1')} | | {figure(first, 'PCA/scIB total')} | |"
        )
        for family, runs in families.items():
            figures = [
                figure(runs, f"{name}/{metric}")
                for metric in ("macro F1", "scIB total")
                for name in ("untrained", "pretrained")
            ]
            speed = np.median([run["cells/s"] for run in runs])
            lines.append(
                f"| {dataset} | {family} | {runs[0]['parameters']:,} | {curve(runs[0]['val_loss'])} | "
                f"{' | '.join(figures)} | {speed:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all families on all data sets and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data", help="folder with the data sets")
    parser.add_argument("--datasets", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", type=int, default=2000, help="pretraining cells of each data set")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        dataset: {family: [] for family in options.families} for dataset in options.datasets
    }
    for seed in options.seeds:
        for dataset in options.datasets:
            for family in options.families:
                figures = harness.fresh(
                    one_run,
                    family=family,
                    dataset=dataset,
                    data=options.data,
                    seed=seed,
                    cells=options.cells,
                    epochs=options.epochs,
                )
                results[dataset][family].append(figures)
                shown = {k: round(v, 3) for k, v in figures.items() if isinstance(v, float)}
                print(seed, dataset, family, curve(figures["val_loss"]), shown, flush=True)
    rows = []
    for dataset, families in results.items():
        for family, runs in families.items():
            for key in ("parameters", "cells/s"):
                value = float(np.median([run[key] for run in runs]))
                rows.append(harness.Row(f"{dataset}/{family}/{key}", value, key))
            for metric in ("macro F1", "scIB total"):
                peer = float(np.mean([run[f"PCA/{metric}"] for run in runs]))
                for name in ("untrained", "pretrained"):
                    value = float(np.mean([run[f"{name}/{metric}"] for run in runs]))
                    rows.append(harness.Row(f"{dataset}/{family}/{name}/{metric}", value, "score", peer))
    harness.report("families; peer: PCA", rows, harness.versions("scanpy", "scib-metrics"), options.json)
    table = markdown(results)
    print(table)
    if options.markdown is not None:
        options.markdown.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
