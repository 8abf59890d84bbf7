"""Results and run folders as commands write them, small and made by hand, some with names that attack a page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scmodelforge.evaluation.shown_cells import FACTS

ATTACK = "<script>window.attacked = 1</script>\"'><img src=x onerror='window.attacked = 1'>{{ 7 * 7 }}"


def _result(method: str, macro_f1: float, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": "linear_probe",
        "dataset": "blood",
        "method": method,
        "is_baseline": method != "model",
        "metrics": {"macro_f1": macro_f1, "macro_f1_std": 0.01, "n_cells": 200, "split": "by donor"},
        "intervals": {"macro_f1": [macro_f1 - 0.05, macro_f1 + 0.05]},
        "comparison": None,
        "details": {},
    } | more


RESULTS: dict[str, Any] = {
    "model": "runs/mine/model",
    "data": "cells.h5ad",
    "n_cells": 200,
    "seed": 42,
    "command": [
        "/some/where/bin/scmodelforge",
        "benchmark",
        "--model",
        "runs/mine/model",
        "--data",
        "my cells.h5ad",
    ],
    "versions": {"scmodelforge": "0.1.0"},
    "notes": ["3 cells without a label are left out."],
    "seen_cells": {"n": 50, "share": 0.25},
    "results": [
        _result("pca", 0.70),
        _result(
            "model",
            0.80,
            comparison={
                "metric": "macro_f1",
                "baseline": "pca",
                "difference": 0.1,
                "interval": [0.04, 0.16],
                "p_value": 0.0004,
            },
            details={
                "per_class": [
                    {"label": "B", "n": 30, "precision": 0.9, "recall": 0.8, "f1": 0.847},
                    {"label": "T", "n": 10, "precision": 0.5, "recall": 0.6, "f1": 0.545},
                ],
                "confusion": {"labels": ["B", "T"], "counts": [[24, 6], [4, 6]]},
            },
        ),
        _result("untrained", 0.55),
    ],
}


def results_file(path: Path, **changes: Any) -> Path:
    """Write `RESULTS`, with other values for some keys (None: without that key)."""
    record = copy.deepcopy(RESULTS) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    return path


def hostile_results(path: Path) -> Path:
    """Results in which every name attacks."""
    text = path.with_suffix(".tmp")
    record = json.loads(results_file(text).read_text())
    text.unlink()
    record |= {"model": ATTACK, "data": ATTACK, "notes": [ATTACK], "versions": {ATTACK: ATTACK}}
    for row in record["results"]:
        row |= {"dataset": ATTACK, "benchmark": ATTACK}
        row["metrics"][ATTACK] = 0.5
        row["method"] += ATTACK if row["method"] != "model" else ""
        for item in row["details"].get("per_class", []):
            item["label"] += ATTACK
            item[ATTACK] = 0.5
        if "confusion" in row["details"]:
            row["details"]["confusion"]["labels"] = [ATTACK, "T" + ATTACK]
    path.write_text(json.dumps(record))
    return path


def cells(n: int = 60, labels: tuple[str, ...] = ("B", "T"), kind: str = "validation cells") -> AnnData:
    """Cells with a layout already; each third one is predicted as the next class."""
    rng = np.random.default_rng(0)
    truth = np.arange(n) % len(labels)
    predicted = np.where(np.arange(n) % 3 == 0, (truth + 1) % len(labels), truth)
    names = np.array(labels, dtype=object)
    return AnnData(
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(names[truth]), "predicted": pd.Categorical(names[predicted])},
            index=[f"cell{i}" for i in range(n)],
        ),
        obsm={
            "X_scmodelforge": rng.normal(size=(n, 4)).astype(np.float32),
            "X_umap": (rng.normal(size=(n, 2)) + 6 * truth[:, None]).astype(np.float32),
        },
        uns={FACTS: {"kind": kind, "n_all": n, "label": "cell_type", "prediction": "predicted"}},
    )


def run_folder(folder: Path, record: dict[str, Any] | None = None, **config: Any) -> Path:
    """A run folder with curves, as `train` writes one; keys of `record` are laid over run.json."""
    folder.mkdir(parents=True)
    tree = {
        "data": {"paths": ["cells.h5ad"]},
        "tokenizer": {"strategy": "rank_value"},
        "model": {
            "architecture": "transformer_encoder",
            "num_layers": 2,
            "hidden_dim": 16,
            "pretraining_task": "masked_gene_prediction",
        },
        "training": {"seed": 1, "run_dir": str(folder)},
    } | config
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    facts = {
        "written": "2030-01-02T03:04:05+0000",
        "command": ["/bin/scmodelforge", "train", "--config", "my config.yaml"],
        "folder": "/home/me",
        "git": None,
        "versions": {"torch": "2.6"},
        "hardware": {"platform": "Linux", "cpu_threads": 2, "gpus": []},
        "seed": 1,
        "data": {"files": ["cells.h5ad"], "n_cells": 100, "n_train": 80, "n_val": 15, "train_cells": "abc"},
        "model": {"n_parameters": 1234, "n_genes": 40, "labels": None},
        "notes": ["5 cells have no count."],
        "interrupted": False,
        "performance": {
            "steps": 99,
            "seconds": 12.5,
            "cells": 1000,
            "cells_per_second": 80.0,
            "tokens_per_second": 2000.0,
            "data_wait_share": 0.125,
            "padding_share": 0.0,
            "peak_memory_gib": 0.5,
            "peak_memory_of": "resident memory of the process",
            "first_step_seconds": 3.0,
            "first_step_since": "start of the process",
        },
    } | (record or {})
    (folder / "run.json").write_text(json.dumps(facts))
    rows = ["step,train_loss,learning_rate,cells_per_second,data_wait_share,val_loss,val_top1_accuracy"]
    for step in range(1, 101):
        val = f"{3 + 2 / step + (0.5 if step == 100 else 0)},{step / 200}" if step % 25 == 0 else ","
        rows.append(f"{step},{2 + 3 / step},0.001,{70 + step % 7},0.1,{val}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "gene_match.csv").write_text(
        "file,var_name,used,gene_id,symbol,ortholog,reason\n"
        "c,A,A,ENSG1,A,,symbol\nc,B,B,ENSG2,B,,symbol\nc,C,C,,,,unknown name\n"
    )
    return folder
