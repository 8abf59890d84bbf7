"""Are the embeddings any good? One small model and its baselines on every labelled real data set.

One model is pretrained on the unlabelled union of all data sets, mouse genes standing in by their one-to-one human
orthologs, and `evaluate` scores its embeddings beside all baselines on the same cells and splits: macro F1 of logistic
regression, with 95 % intervals, and a paired test against the best baseline. Whole donors or batches are held out
where a data set has some, else cells.

No cell that tests in any split is in the pretraining. Where three splits of three libraries test every cell, the model
has seen nothing of that data set. It is checked twice: by the hashes of training cells that the model carries, and for
data sets that share cells over other gene sets, which hashes do not see, by leaving one of the two out.

    python benchmarks/quality.py --data ../shared/data --json quality.json --markdown
    python benchmarks/quality.py --only pbmc3k --steps 20          # a quick look
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import harness
import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from scmodelforge.models.bundle import ModelBundle

MIN_CELLS_PER_CLASS = 10  # as in the stated figures
N_SPLITS = 3
METRIC = "macro_f1"


@dataclass(frozen=True)
class Dataset:
    """A labelled data set and what is known about it.

    Attributes
    ----------
    name
        Of the file.
    stated
        Macro F1 of 5-fold logistic regression on 50 principal components, from the README of the data sets.
    label
        obs column to predict.
    group_key
        obs column that a split keeps whole; auto: donors, else batches, if there are any.
    species
        Whose genes it has.
    unlabelled
        A label that means that there is none.
    at_most
        More cells are subsampled at random to so many.
    shares_cells
        Its cells are also in another data set, over other genes, so that they are not pretrained on.
    """

    name: str
    stated: float | None = None
    label: str = "cell_type"
    group_key: str | None = "auto"
    species: str = "human"
    unlabelled: str | None = None
    at_most: int | None = None
    shares_cells: bool = False


DATASETS = (
    Dataset("pbmc3k", 0.915, unlabelled="unknown"),
    Dataset("pbmc_sorted_zheng", 0.883),
    Dataset("pbmc_kang_12k", 0.830),
    # Donors are known for control cells only, so it is split by cell, as the stated figure is.
    Dataset("pbmc_ifnb_kang", 0.869, group_key=None, shares_cells=True),
    Dataset("cell_lines_mixology", 0.954),
    Dataset("pancreas_baron_human", 0.954),
    Dataset("pancreas_baron_mouse", species="mouse"),
    Dataset("pancreas_baron_orthologs", shares_cells=True),
    Dataset("gut_crohns_kong", 0.885),
    Dataset("census_placenta"),
    Dataset("mouse_brain_merfish", 0.819, species="mouse"),
    Dataset("crispr_papalexi", 0.064, label="perturbation", at_most=5_000),
)
UNLABELLED = ("pbmc_frozen_a", "tenx_v3_pbmc_sample")
METHODS = {  # as `evaluate` calls them, and as the tables do
    "majority": "largest class",
    "untrained": "untrained",
    "model": "pretrained",
    "pca": "PCA-50",
    "log_normalized": "all genes",
}

CONFIG: dict[str, Any] = {
    "data": {
        "preprocessing": {"hvg": {"n_top_genes": 6000, "flavor": "cell_ranger"}},
        "split": {"val_split": 0.02},
    },
    "tokenizer": {"max_genes": 160, "masking": {"mask_ratio": 0.2}},
    "model": {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.1},
    "training": {"batch_size": 64, "optimizer": {"lr": 3e-3, "weight_decay": 0.01}},
}


def labelled_cells(dataset: Dataset, folder: Path, seed: int = 0) -> anndata.AnnData:
    """The cells of classes with enough cells, at most so many."""
    adata = anndata.read_h5ad(folder / f"{dataset.name}.h5ad")
    labels = adata.obs[dataset.label].astype("string")
    if dataset.unlabelled:
        labels = labels.mask(labels == dataset.unlabelled)
    enough = (labels.map(labels.value_counts()) >= MIN_CELLS_PER_CLASS).fillna(False)
    rows = np.flatnonzero(enough.to_numpy(dtype=bool))
    if dataset.at_most is not None and len(rows) > dataset.at_most:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[: dataset.at_most])
    return adata[rows].copy()


def evaluation(dataset: Dataset, seed: int, scib: bool) -> dict[str, Any]:
    """The config of one evaluation."""
    label = {"cell_type_key": dataset.label}
    probe = label | {
        "group_key": dataset.group_key,
        "n_splits": N_SPLITS,
        "min_cells_per_class": 2,
        "drop_small_classes": True,  # of a subsample
    }
    benchmarks = [{"name": "linear_probe", "dataset": dataset.name, "params": probe}]
    if scib:
        quality = label | {"max_cells": 2_000}
        benchmarks.append({"name": "embedding_quality", "dataset": dataset.name, "params": quality})
    return {"data": {"species": dataset.species}, "eval": {"seed": seed, "benchmarks": benchmarks}}


def tested(cells: anndata.AnnData, dataset: Dataset, seed: int) -> tuple[np.ndarray, int]:
    """Rows that test in any split of `evaluation`, and how many groups they come from (0: split by cell)."""
    from scmodelforge.config_eval import LinearProbeSpec
    from scmodelforge.config_io import parse_config
    from scmodelforge.evaluation.linear_probe import probe_cells

    spec = parse_config(evaluation(dataset, seed, scib=False)).eval.benchmarks[0]
    assert isinstance(spec, LinearProbeSpec)
    used = probe_cells(cells.obs, spec.params, seed, dataset.name)
    rows = np.unique(np.concatenate([test for _, test in used.splits]))
    n_groups = 0 if used.groups is None else len(np.unique(used.groups[rows]))
    return np.flatnonzero(used.mask)[rows], n_groups


def barcodes(cells: anndata.AnnData) -> np.ndarray:
    """What of the names of cells stays the same from file to file."""
    return np.array(
        [match[0] if (match := re.search("[ACGT]{10,}", name)) else name for name in cells.obs_names]
    )


def pretrain(
    cells: dict[str, anndata.AnnData], test: dict[str, np.ndarray], folder: Path, seed: int, steps: int
) -> ModelBundle:
    """Train on the cells of all data sets that never test, without their labels."""
    from scmodelforge.config_io import parse_config
    from scmodelforge.training.run import train

    twins = np.concatenate([barcodes(cells[one.name]) for one in DATASETS if one.shares_cells])
    with tempfile.TemporaryDirectory() as scratch:
        paths, species = [str(folder / f"{name}.h5ad") for name in UNLABELLED], {}
        for one in DATASETS:
            adata = cells[one.name]
            unseen = np.ones(adata.n_obs, dtype=bool)
            unseen[test[one.name]] = False
            unseen &= ~np.isin(barcodes(adata), twins)
            print(f"pretraining: {unseen.sum():,} of {adata.n_obs:,} cells of {one.name}", flush=True)
            if unseen.sum() > 1:
                paths.append(f"{scratch}/{one.name}.h5ad")
                species[paths[-1]] = one.species
                part = adata[unseen].copy()
                part.obs = part.obs[[]]
                part.write_h5ad(paths[-1])
        config = CONFIG | {
            "data": CONFIG["data"] | {"paths": paths, "species": species},
            "training": CONFIG["training"] | {"seed": seed, "max_steps": steps, "run_dir": f"{scratch}/run"},
        }
        return train(parse_config(config)).model


def require_unseen(model: ModelBundle, cells: anndata.AnnData, rows: np.ndarray, dataset: Dataset) -> None:
    """Stop if the model has seen the counts of one of these cells."""
    from scmodelforge.config_io import parse_config
    from scmodelforge.inference import open_for

    config = parse_config(evaluation(dataset, 0, scib=False))
    block = open_for(model, cells, config.data).read(rows)
    if seen := sum(int(training.contain(block).sum()) for training in model.trained_on):
        raise SystemExit(f"{seen} of {len(rows)} test cells of {dataset.name} were in the pretraining.")


def one_seed(seed: int, folder: Path, chosen: Sequence[Dataset], steps: int, scib: bool) -> dict[str, Any]:
    """Pretrain once and score every chosen data set; figures, notes and seconds, ready for JSON."""
    from scmodelforge.config_io import parse_config
    from scmodelforge.evaluation.harness import evaluate

    cells = {one.name: labelled_cells(one, folder, seed) for one in DATASETS}
    tests = {one.name: tested(cells[one.name], one, seed) for one in DATASETS}
    started = time.perf_counter()
    model = pretrain(cells, {name: rows for name, (rows, _) in tests.items()}, folder, seed, steps)
    record: dict[str, Any] = {
        "seed": seed,
        "pretraining": {
            "cells": sum(training.n_cells for training in model.trained_on),
            "steps": steps,
            "parameters": model.n_parameters,
            "seconds": time.perf_counter() - started,
        },
        "datasets": {},
    }
    print(record["pretraining"], flush=True)
    for one in chosen:
        started = time.perf_counter()
        rows, n_groups = tests[one.name]
        require_unseen(model, cells[one.name], rows, one)
        found = evaluate(parse_config(evaluation(one, seed, scib)), model, cells[one.name])
        record["datasets"][one.name] = {
            "label": one.label,
            "stated": one.stated,
            "n_test_groups": n_groups,
            "results": [vars(result) | {"details": {}} for result in found.results],
            "notes": found.notes,
            "seconds": time.perf_counter() - started,
        }
        print("  ".join(row(one.name, record["datasets"][one.name])), flush=True)
    return record


HEADINGS = ("data", "cells", "classes", "held out", *METHODS.values(), "stated", "pretrained − best baseline")


def row(name: str, record: dict[str, Any]) -> list[str]:
    """One data set in the columns of `HEADINGS`."""
    results = {one["method"]: one for one in record["results"] if one["benchmark"] == "linear_probe"}
    facts, test = results["model"]["metrics"], results["model"]["comparison"]
    unit = facts["split"].removeprefix("by ").removesuffix(", stratified")
    where = f"{unit} ({record['n_test_groups']})" if record["n_test_groups"] else unit
    return [
        name if record["label"] == "cell_type" else f"{name} ({record['label']})",
        f"{facts['n_cells']:,}",
        str(facts["n_classes"]),
        where,
        *(_figure(results[method]) for method in METHODS),
        "–" if record["stated"] is None else f"{record['stated']:.3f}",
        f"{test['difference']:+.3f} ({METHODS[test['baseline']]}), p = {test['p_value']:.2g}",
    ]


def _figure(result: dict[str, Any]) -> str:
    low, high = result["intervals"][METRIC]
    return f"{result['metrics'][METRIC]:.3f} [{low:.3f}, {high:.3f}]"


def scib_rows(record: dict[str, Any]) -> list[list[str]]:
    """scIB totals (biology) of each data set that has them: name, then the methods that have an embedding."""
    rows = []
    for name, one in record["datasets"].items():
        totals = {
            found["method"]: found["metrics"]["total"]
            for found in one["results"]
            if found["benchmark"] == "embedding_quality"
        }
        if totals:
            rows.append([name, *(f"{totals[method]:.3f}" for method in METHODS if method in totals)])
    return rows


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], as_markdown: bool) -> None:
    """Print a table for the terminal, or one for Markdown."""
    if as_markdown:
        print("\n".join(f"| {' | '.join(cells)} |" for cells in [headings, ["---"] * len(headings), *rows]))
        return
    table = Table(*headings, title=title)
    for cells in rows:
        table.add_row(*cells)
    Console(width=max(Console().width, 200)).print(table)


def main() -> None:
    """Run all seeds and print a table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the data sets")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in DATASETS], help="score these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps of 64 cells")
    parser.add_argument("--scib", action="store_true", help="also the scIB totals")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    chosen = [one for one in DATASETS if options.only is None or one.name in options.only]
    logging.getLogger("scmodelforge").setLevel(logging.WARNING)
    found: dict[str, Any] = {
        "versions": harness.versions("scanpy", "scikit-learn", "scib-metrics"),
        "runs": [],
    }
    for seed in options.seeds:
        record = one_seed(seed, options.data, chosen, options.steps, options.scib)
        found["runs"].append(record)
        rows = [row(name, one) for name, one in record["datasets"].items()]
        show(f"macro F1 [95 % interval], seed {seed}", HEADINGS, rows, options.markdown)
        if options.scib:
            embeddings = ("data", "untrained", "pretrained", "PCA-50")
            show(f"scIB total (biology), seed {seed}", embeddings, scib_rows(record), options.markdown)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
