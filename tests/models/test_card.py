"""Model cards say what was measured and nothing else, and the Hub can read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from scmodelforge.errors import ModelError
from scmodelforge.models.bundle import save_bundle
from scmodelforge.models.card import add_results, model_card
from scmodelforge.training.run import RunResult
from tests.journeys.command import done, refused

RESULTS: dict[str, Any] = {
    "model": "model",
    "data": "cells.h5ad",
    "n_cells": 700,
    "seed": 0,
    "versions": {"torch": "2.6"},
    "notes": ["30 cells without a label were left out."],
    "seen_cells": {"n": 7, "share": 0.01},
    "results": [
        {
            "benchmark": "linear_probe",
            "dataset": "pbmc",
            "method": "model",
            "is_baseline": False,
            "metrics": {"macro_f1": 0.71, "accuracy": 0.8, "accuracy_std": 0.02, "split": "by donor"},
            "intervals": {"macro_f1": [0.65, 0.77]},
            "comparison": {
                "metric": "macro_f1",
                "baseline": "pca",
                "difference": 0.05,
                "interval": [0.01, 0.09],
                "p_value": 0.012,
            },
        },
        {
            "benchmark": "linear_probe",
            "dataset": "pbmc",
            "method": "pca",
            "is_baseline": True,
            "metrics": {"macro_f1": 0.66, "split": "by donor"},
            "intervals": {"macro_f1": [0.6, 0.72]},
            "comparison": None,
        },
    ],
}


@pytest.fixture
def folder(pretrained: RunResult, tmp_path: Path) -> Path:
    """A model folder with a card as a run writes it, to be changed."""
    text = (pretrained.run_dir / "model" / "model_card.md").read_text()
    save_bundle(pretrained.model, tmp_path / "model")
    (tmp_path / "model" / "model_card.md").write_text(text)
    return tmp_path / "model"


def test_a_card_tells_what_the_run_measured(pretrained: RunResult) -> None:
    card = (pretrained.run_dir / "model" / "model_card.md").read_text()
    run = json.loads((pretrained.run_dir / "run.json").read_text())
    assert "240 cells; 180 trained and 60 validated, split by cell (seed 42)" in card
    assert "100.0% of their genes are in the vocabulary" in card
    assert f"{run['steps']:,} optimizer steps in 4 epochs" in card
    assert f"val_loss {run['metrics']['val_loss']:.4g}" in card
    assert f"best model of the run: val_loss {run['best']['value']:.4g}" in card
    assert f"{run['performance']['cells_per_second']:,.0f} cells/s" in card
    assert run["hardware"]["platform"] in card
    assert f"torch {run['versions']['torch']}" in card
    assert f"{pretrained.model.n_parameters:,} parameters" in card
    assert pretrained.model.vocab.fingerprint[:16] in card


def test_a_card_without_a_run_says_that_nothing_is_known(pretrained: RunResult) -> None:
    card = model_card(pretrained.model, "Weights from elsewhere.")
    assert "Weights from elsewhere." in card
    assert "Not recorded" in card
    assert "not recorded" in card
    assert "cells/s" not in card


def test_the_hub_reads_the_head_and_no_license_is_invented(annotator: RunResult) -> None:
    text = (annotator.run_dir / "model" / "model_card.md").read_text()
    head = ModelCard(text).data.to_dict()
    assert head["library_name"] == "scmodelforge"
    assert {"single-cell", "species:human", "transformer_encoder"} <= set(head["tags"])
    assert "license" not in head
    licensed = text.replace("# license: not given yet.", "license: cc-by-4.0 #")
    assert ModelCard(licensed).data.to_dict()["license"] == "cc-by-4.0"
    assert "its 3 classes" in text


def test_results_come_with_intervals_and_replace_earlier_ones(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS))
    before = (folder / "model_card.md").read_text()
    done("card", "--model", folder, "--results", file)
    once = (folder / "model_card.md").read_text()
    assert "| method | macro_f1 | accuracy |" in once
    assert "| model | 0.710 [0.650, 0.770] | 0.800 ± 0.020 |" in once
    assert "| pca (baseline) | 0.660 [0.600, 0.720] |  |" in once
    assert "against the best baseline (pca): macro_f1 +0.050 [0.010, 0.090], p = 0.012." in once
    assert "split by donor" in once
    assert "30 cells without a label" in once
    assert "7 of these cells (1.0%) were seen in pretraining" in once
    assert "None is recorded here" not in once
    add_results(folder, RESULTS)
    assert (folder / "model_card.md").read_text() == once
    assert before.partition("## Benchmarks")[0] == once.partition("## Benchmarks")[0]
    assert before.partition("## Intended use")[2] == once.partition("## Intended use")[2]


def test_what_is_no_card_or_no_results(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    refused("card", "--model", folder, "--results", empty, words=("no benchmark results", "--output"))
    refused(
        "card", "--model", folder, "--results", tmp_path / "gone.json", words=("gone.json", "cannot be read")
    )
    (folder / "model_card.md").write_text("# my own words\n")
    with pytest.raises(ModelError, match="no sections '## Benchmarks'"):
        add_results(folder, RESULTS)
