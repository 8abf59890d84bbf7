"""The example package, installed by pip and used by real commands: train, resume's checkpoint, benchmark, tokens.

The commands run in one process of their own that sees the installed package; this process does not see it, as a
colleague's would who gets the model folder.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from scmodelforge import load_model
from scmodelforge.errors import PluginError
from tests.helpers import marker_cells, tiny_config
from tests.journeys.command import calls_with, refused

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def journey(example_plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The commands of the plugin's README on small cells, and what they left."""
    folder = tmp_path_factory.mktemp("journey")
    cells = folder / "cells.h5ad"
    marker_cells(120).write_h5ad(cells)
    example = yaml.safe_load((ROOT / "examples/plugin/config.yaml").read_text("utf-8"))
    small = tiny_config(folder / "run").model_dump(mode="json", exclude_unset=True)
    config = {name: example.get(name, {}) | small.get(name, {}) for name in (*example, *small)}
    config["data"] |= {"paths": [str(cells)]}
    config["model"] |= {"value_embedding": "continuous"}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), "utf-8")
    model, results = str(folder / "run/model"), str(folder / "results.json")
    wrong = ["--set", "tokenizer.params.power=7", "--set", "model.task_params={delt: 1}"]
    wrong += ["--set", "eval.benchmarks.0.params.n_neighbours=many"]
    names = {
        "strategies": ["strategies"],
        "train": ["train", "--config", str(file), "--set", "model.bias=false"],
        "benchmark": [
            *("benchmark", "--config", str(file), "--model", model, "--data", str(cells)),
            *("--output", results, "--set", "model.bias=false"),
        ],
        "tokens": ["tokens", str(cells), "--model", model, "--rows", "3"],
        "wrong": ["train", "--config", str(file), *wrong],
        "logarithm": ["train", "--config", str(file), "--set", "data.preprocessing.log1p=true"],
        "causal": [
            *("train", "--config", str(file), "--set", "model.architecture=autoregressive_transformer"),
            *("--set", "model.bias=true"),
        ],
        "schema": ["config", "schema"],
    }
    found = dict(zip(names, calls_with(example_plugin, *names.values()), strict=True))
    return found | {"folder": folder, "results": results}


def test_strategies_lists_what_the_package_brings(journey: dict[str, Any]) -> None:
    lines = [line.split() for line in journey["strategies"].out.splitlines()]
    for name in ("root_expression", "deep_sets", "robust_reconstruction", "neighbour_purity"):
        (line,) = [line for line in lines if line[:1] == [name]]
        assert line[-2:] == ["scmodelforge-example", "0.1.0"]


def test_a_model_of_a_plugin_learns(journey: dict[str, Any]) -> None:
    answer = journey["train"]
    assert answer.code == 0, answer.err
    assert (
        "tokenizer.strategy root_expression is a plugin (scmodelforge-example 0.1.0), in the place of "
        "continuous_projection." in answer.err
    )
    assert (
        "model.bias has no effect: model.architecture deep_sets does not read it." in answer.err
    )  # `ignores`
    losses = [float(word) for word in _after(answer.err, "val_loss")]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]


def _after(text: str, name: str) -> list[str]:
    words = text.split()
    return [after for word, after in itertools.pairwise(words) if word == name]


def test_the_model_says_which_package_it_needs(journey: dict[str, Any]) -> None:
    folder = journey["folder"] / "run"
    card = (folder / "model/model_card.md").read_text("utf-8")
    assert "- Needs scmodelforge-example 0.1.0 (tokenizer.strategy root_expression)" in card
    written = yaml.safe_load((folder / "model/config.yaml").read_text("utf-8"))
    assert written["tokenizer"]["params"] == {"power": 0.5}
    assert written["model"]["task_params"] == {"delta": 1.0}
    assert written["model"]["params"] is None


@pytest.mark.parametrize("part", ["model", "checkpoints/best.ckpt"])
def test_without_the_package_the_model_says_what_to_install(journey: dict[str, Any], part: str) -> None:
    model = journey["folder"] / "run" / part
    with pytest.raises(PluginError) as caught:
        load_model(model)
    assert str(caught.value) == (
        f"The model '{model}' needs the tokenizer strategy 'root_expression' of the package 'scmodelforge-example' "
        "(version 0.1.0), which is not installed.\n"
        "If you trust that package, install it (pip install scmodelforge-example==0.1.0, or from where its authors "
        "keep it) and try again."
    )
    cells = journey["folder"] / "cells.h5ad"
    refused("tokens", cells, "--model", model, words=("'scmodelforge-example'", "is not installed"))


def test_the_tokens_are_roots_of_normalized_counts(journey: dict[str, Any]) -> None:
    header, _, first, _, _ = journey["tokens"].out.splitlines()
    row = dict(zip(header.split()[-2:], map(float, first.split()[-2:]), strict=True))
    cell = marker_cells(120)[0]
    assert row["value"] == pytest.approx(math.sqrt(row["counts"] / cell.X.sum() * 10_000), rel=1e-3)


def test_the_benchmark_scores_the_model_and_its_baselines(journey: dict[str, Any]) -> None:
    assert journey["benchmark"].code == 0, journey["benchmark"].err
    results = json.loads(Path(journey["results"]).read_text("utf-8"))["results"]
    purity = {row["method"]: row["metrics"]["purity"] for row in results}
    assert purity.keys() >= {"model", "untrained", "pca", "chance"}
    assert purity["pca"] > 0.8  # the types have markers that PCA finds
    assert 0.2 < purity["chance"] < 0.5 < purity["pca"]
    assert all(row["benchmark"] == "neighbour_purity" for row in results)
    assert "neighbour_purity" in journey["benchmark"].out


def test_wrong_params_are_mistakes_with_their_place(journey: dict[str, Any]) -> None:
    answer = journey["wrong"]
    assert answer.code == 2
    for words in (
        "--set tokenizer.params.power: must be at most 1, not 7",
        "--set model.task_params: robust_reconstruction has no delt; it has delta",
        "--set eval.benchmarks.0.params.n_neighbours: must be a whole number, not 'many'",
    ):
        assert words in answer.err


def test_a_plugin_refuses_what_it_does_not_fit(journey: dict[str, Any]) -> None:
    assert journey["logarithm"].code == journey["causal"].code == 2
    assert (
        "tokenizer.strategy root_expression (of scmodelforge-example 0.1.0): the root stands in the place of the "
        "logarithm: set data.preprocessing.log1p: false" in journey["logarithm"].err
    )
    assert "it is written for models that are like a transformer_encoder" in journey["causal"].err


def test_the_schema_knows_the_names(journey: dict[str, Any]) -> None:
    schema = json.loads(journey["schema"].out)
    assert "root_expression" in schema["$defs"]["TokenizerConfig"]["properties"]["strategy"]["enum"]
