"""Each command on real cells, and the same from Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import scmodelforge
from scmodelforge.config_io import load_config
from tests.journeys.command import BASELINES, call, checkpoint, done, files_below, refused, sets

TINY = sets(
    model__hidden_dim=16,
    model__num_layers=1,
    model__num_heads=2,
    tokenizer__max_genes=32,
    training__max_epochs=1,
)


def test_the_console_script_answers() -> None:
    script = Path(sys.executable).with_name("scmodelforge")
    answer = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout == f"scmodelforge {scmodelforge.__version__}\n"


def test_help_loads_neither_torch_nor_scanpy() -> None:
    code = (
        "import sys\nfrom scmodelforge import cli\nsys.argv = ['scmodelforge', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'scanpy', 'lightning', 'anndata', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("set()\n")
    for command in (
        "train",
        "plan",
        "slurm",
        "finetune",
        "benchmark",
        "embed",
        "annotate",
        "perturb",
        "check",
        "tokens",
        "init",
        "config",
    ):
        assert f"\n  {command} " in answer.stdout


@pytest.mark.parametrize(
    "command",
    ["train", "plan", "slurm", "finetune", "benchmark", "embed", "annotate", "perturb", "check", "tokens"],
)
def test_every_command_explains_itself(command: str) -> None:
    text = done(command, "--help").out
    assert "--config" in text
    assert "--set" in text


def test_a_run_folder_holds_what_is_needed(trained: Path) -> None:
    assert {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "gene_match.csv",
        "metrics.csv",
        "model/config.yaml",
        "model/genes.parquet",
        "model/model.safetensors",
        "run.json",
    } <= set(files_below(trained))
    record = json.loads((trained / "run.json").read_text())
    assert record["metrics"]["val_loss"] > 0
    assert not record["interrupted"]


def test_a_run_tells_its_speed(config: Path, tmp_path: Path) -> None:
    answer = done(
        "train", "--config", config, *sets(training__run_dir=tmp_path / "run", training__max_epochs=1)
    )
    (line,) = (line for line in answer.out.splitlines() if line.startswith("Speed: "))
    for words in ("cells/s", "tokens/s", "padding", "waiting for data", "peak memory", "first step after"):
        assert words in line
    assert json.loads((tmp_path / "run/run.json").read_text())["performance"]["cells_per_second"] > 0


def test_plan_says_what_training_will_cost(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = done("plan", "--config", config, *sets(training__run_dir=tmp_path / "planned"))
    for words in ("parameters", "tokens of a cell (630 sampled)", "max 48", "FLOP a cell", "time to finish"):
        assert words in answer.out
    assert files_below(tmp_path) == []


def test_slurm_writes_a_script_for_the_config(
    config: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = done("slurm", "--config", config, "--time", "30", *sets(training__max_epochs=7))
    assert answer.out == "job.sbatch is ready; submit it with: sbatch job.sbatch\n"
    script = (tmp_path / "job.sbatch").read_text()
    assert f"train --config {config} --set training.max_epochs=7" in script
    assert f"last={folder / 'trained/checkpoints/last.ckpt'}" in script
    refused("slurm", "--config", config, "--time", "soon", "--output", "b", words=("--time is 'soon'",))


def test_embed_writes_a_copy_and_leaves_the_input(trained: Path, cells: Path, tmp_path: Path) -> None:
    before, output = cells.read_bytes(), tmp_path / "new" / "embedded.h5ad"
    answer = done("embed", "--model", checkpoint(trained), "--data", cells, "--output", output)
    assert answer.out == f"700 cells embedded: obsm['X_scmodelforge'] of {output}\n"
    assert cells.read_bytes() == before
    embedded, source = anndata.read_h5ad(output), anndata.read_h5ad(cells)
    assert embedded.obsm["X_scmodelforge"].shape == (700, 16)
    assert np.ptp(embedded.obsm["X_scmodelforge"], axis=0).all()
    assert (embedded.X != source.X).nnz == 0
    assert embedded.obs.equals(source.obs)
    assert files_below(tmp_path) == ["new/embedded.h5ad"]


def test_embed_in_place_under_another_key(trained: Path, adata: AnnData, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    model = trained / "model"
    for pooling in ("mean", "cls"):
        done(
            "embed",
            "--model",
            model,
            "--data",
            path,
            "--in-place",
            "--key",
            f"X_{pooling}",
            "--pooling",
            pooling,
        )
    embedded = anndata.read_h5ad(path)
    assert set(embedded.obsm) == {"X_mean", "X_cls"}
    assert not np.allclose(embedded.obsm["X_mean"], embedded.obsm["X_cls"])
    assert files_below(tmp_path) == ["cells.h5ad"]


def test_perturb_writes_a_table_and_a_picture(trained: Path, cells: Path, tmp_path: Path) -> None:
    states = ("--state-key", "cell_type", "--start", "CD19+ B", "--goal", "Dendritic", "--alt", "CD34+")
    how = ("--how", "overexpress", "--max-cells", "20")
    perturb = ("perturb", "--model", trained / "model", "--data", cells, *how, *states, "--output")
    answer = done(*perturb, tmp_path / "one", "--genes", "CD74, LYZ")
    table = pd.read_csv(tmp_path / "one" / "perturbations.csv")
    assert set(table["symbol"]) == {"CD74", "LYZ"}
    assert table["n_cells"].tolist() == [20, 20]
    assert {"mean_shift", "effect", "p_value", "fdr", "mean_shift_to_CD34+"} <= set(table.columns)
    assert "of 2 perturbations with a false discovery rate below 0.05" in answer.out
    assert "20 of 95 cells are perturbed (max_cells)." in answer.err
    assert (tmp_path / "one" / "volcano.png").read_bytes().startswith(b"\x89PNG")
    done(*perturb, tmp_path / "set", "--set-of-genes", "CD74,LYZ")
    assert pd.read_csv(tmp_path / "set" / "perturbations.csv")["symbol"].tolist() == ["CD74+LYZ"]
    adata = anndata.read_h5ad(cells)
    same = {
        "how": "overexpress",
        "max_cells": 20,
        "state_key": "cell_type",
        "start": "CD19+ B",
        "goal": "Dendritic",
    }
    again = scmodelforge.perturb(adata, trained / "model", ["CD74", "LYZ"], alt=["CD34+"], **same)
    pd.testing.assert_frame_equal(again, table, rtol=1e-4)


def test_perturb_says_what_is_missing(trained: Path, cells: Path, tmp_path: Path) -> None:
    perturb = ("perturb", "--model", trained / "model", "--data", cells, "--output", tmp_path / "out")
    refused(*perturb, words=("either --genes A,B (or all) or --set-of-genes A,B",))
    refused(*perturb, "--genes", "CD74", "--set-of-genes", "LYZ", words=("either --genes",))
    refused(*perturb, "--genes", "CD74A", words=("CD74A: unknown name; did you mean CD74",))
    refused(*perturb, "--genes", "CD74", "--how", "foo", words=("how is 'foo'",))
    refused(*perturb, "--genes", "CD74", "--state-key", "nothing", "--start", "B", words=("no obs column",))
    assert not (tmp_path / "out").exists()


def test_annotate_twice_overwrites(tuned: Path, cells: Path, tmp_path: Path) -> None:
    output = tmp_path / "annotated.h5ad"
    first = done("annotate", "--model", checkpoint(tuned), "--data", cells, "--output", output)
    again = done("annotate", "--model", tuned / "model", "--data", output, "--in-place")
    assert first.out == again.out  # checkpoint and model folder are the same model
    assert "700 cells annotated: obs['scmodelforge_cell_type']" in first.out
    obs = anndata.read_h5ad(output).obs
    assert list(obs.columns) == ["cell_type", "scmodelforge_cell_type", "scmodelforge_cell_type_probability"]
    assert set(obs["scmodelforge_cell_type"].cat.categories) == set(obs["cell_type"].cat.categories)
    assert obs["scmodelforge_cell_type_probability"].between(0.1, 1).all()


def test_benchmark_writes_model_and_baselines(
    trained: Path, config: Path, cells: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    arguments = ("--config", config, "--model", checkpoint(trained), "--data", cells, "--output", output)
    answer = done("benchmark", *arguments)
    assert "macro_f1" in answer.out
    record = json.loads(output.read_text())
    assert [row["method"] for row in record["results"]] == ["model", *BASELINES]
    assert all(0 < row["metrics"]["macro_f1"] < 1 for row in record["results"])
    assert [row["is_baseline"] for row in record["results"]] == [False, True, True, True, True]
    model = record["results"][0]
    comparison = model["comparison"]
    assert comparison["metric"] == "macro_f1"
    assert f"model − {comparison['baseline']}, macro_f1: {comparison['difference']:+.3f}" in answer.out
    low, high = model["intervals"]["macro_f1"]
    assert f"{model['metrics']['macro_f1']:.3f} [{low:.3f}, {high:.3f}]" in answer.out
    assert any("split by cell" in note for note in record["notes"])
    assert "split by cell" in answer.out
    assert (record["n_cells"], record["seed"]) == (700, 0)
    seen = "were in the training of this model, which flatters it."
    assert (answer.out + answer.err).count(seen) == 1
    assert any(note.endswith(seen) for note in record["notes"])
    took = re.findall(r"^linear_probe: (\w+) took [\d.]+ s$", answer.err, re.MULTILINE)
    assert took == ["model", *BASELINES]
    embedded = re.findall(r"^(\w+): embedded in [\d.]+ s$", answer.err, re.MULTILINE)
    assert embedded == ["model", "pca", "untrained"]
    assert not any("took" in note or "embedded in" in note for note in record["notes"])
    done("benchmark", *arguments, *sets(**{"eval__baselines": "[]"}))
    assert [row["method"] for row in json.loads(output.read_text())["results"]] == ["model"]


def test_a_benchmark_names_the_methods_that_it_scores(trained: Path, cells: Path, tmp_path: Path) -> None:
    spec = "eval.benchmarks=[{name: knn_annotation, params: {n_splits: 1, held_out_classes: []}}]"
    answer = done(
        *("benchmark", "--model", trained / "model", "--data", cells, "--set", spec),
        *("--output", tmp_path / "r.json"),
    )
    scored = [row["method"] for row in json.loads((tmp_path / "r.json").read_text())["results"]]
    assert "log_normalized" not in scored
    assert re.search(rf"knn_annotation on test took [\d.]+ s: {', '.join(scored)}\n", answer.err)


def test_finetune_with_adapters_goes_on_to_annotate(
    trained: Path, config: Path, cells: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    answer = done(
        *("finetune", "--config", config, "--checkpoint", trained / "model"),
        *sets(training__run_dir=tmp_path / "lora", training__max_epochs=1, finetune__lora__enabled="true"),
    )
    assert "parameters train" in answer.err
    done("annotate", "--model", tmp_path / "lora/model", "--data", cells, "--output", tmp_path / "a.h5ad")
    assert "scmodelforge_cell_type" in anndata.read_h5ad(tmp_path / "a.h5ad").obs


def test_check_describes_a_file(cells: Path) -> None:
    answer = done("check", cells)
    assert "700 cells × 765 genes" in answer.out
    assert "X: raw counts" in answer.out
    assert "obs['cell_type']: 10 values" in answer.out
    assert answer.out.endswith("Ready to train.\n")


def test_check_says_what_is_wrong_with_exit_code_2(cells: Path) -> None:
    answer = call("check", cells, *sets(data__gene_vocab="mouse_protein_coding"))
    assert answer.code == 2
    assert "Not ready to train:" in answer.out
    assert "The genes look like human" in answer.out


def test_tokens_of_a_model_and_without_one(trained: Path, cells: Path, adata: AnnData) -> None:
    with_model = done(
        "tokens", cells, "--cell", adata.obs_names[0], "--model", checkpoint(trained), "--rows", 5
    )
    lines = with_model.out.splitlines()
    assert lines[0].split()[:4] == ["position", "token", "name", "gene_id"]
    assert "<cls>" in lines[1]
    assert len(lines) == 1 + 5 + 1
    assert lines[-1] == "… 48 tokens in all"
    alone = done("tokens", cells, *sets(tokenizer__max_genes=16))
    assert "gene medians are unknown" in alone.err
    assert len(alone.out.splitlines()) == 1 + 16


def test_init_writes_a_config_that_trains_as_it_is(cells: Path, tmp_path: Path) -> None:
    starter = tmp_path / "starter.yaml"
    answer = done("init", cells, "--output", starter)
    assert f"scmodelforge train --config {starter}" in answer.out
    done("train", "--config", starter, *TINY, *sets(training__run_dir=tmp_path / "run"))
    assert checkpoint(tmp_path / "run").is_file()


def test_init_takes_overrides(cells: Path, tmp_path: Path) -> None:
    done("init", cells, "--output", tmp_path / "c.yaml", "--set", "training.max_epochs=3")
    text = (tmp_path / "c.yaml").read_text()
    assert "max_epochs: 3" in text
    assert "# Passes over the training cells" in text


def test_check_says_how_many_tokens_the_cells_become(cells: Path) -> None:
    out = done("check", cells, "--set", "tokenizer.max_genes=200").out
    assert "tokens per cell, at most 200: min 182, 5% 200" in out


def test_init_says_when_the_cells_cannot_be_trained_on(adata: AnnData, tmp_path: Path) -> None:
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "log.h5ad")
    answer = done("init", tmp_path / "log.h5ad", "--output", tmp_path / "c.yaml")
    assert "Warning: These cells cannot be trained on yet: X does not hold raw counts" in answer.err


def test_config_schema_is_json() -> None:
    schema = json.loads(done("config", "schema").out)
    assert set(schema["properties"]) == {"data", "tokenizer", "model", "training", "eval", "finetune"}


def test_a_key_without_effect_is_said(cells: Path) -> None:
    answer = done("check", cells, *sets(training__max_epochs=3))
    assert "Warning: --set: not used by this command: training." in answer.err


def test_python_does_what_the_commands_do(
    trained: Path, tuned: Path, config: Path, adata: AnnData, tmp_path: Path
) -> None:
    best = checkpoint(trained)
    assert scmodelforge.check(adata, load_config(config).data).problems == []
    table = scmodelforge.tokens(adata, 3, model=best)
    assert len(table) == 48

    copied = scmodelforge.embed(adata, best, copy=True)
    assert "X_scmodelforge" not in adata.obsm
    scmodelforge.embed(adata, scmodelforge.load_model(best), batch_size=7)
    np.testing.assert_allclose(adata.obsm["X_scmodelforge"], copied.obsm["X_scmodelforge"], atol=1e-5)
    scmodelforge.annotate(adata, checkpoint(tuned))
    assert adata.obs["scmodelforge_cell_type"].notna().all()

    small = [f"training.run_dir={tmp_path / 'a'}", "training.max_epochs=1", "data.paths=[]"]
    run = scmodelforge.train(load_config(config, small), data=adata)
    results = scmodelforge.benchmark(load_config(config), run.model, adata)
    assert [result.method for result in results] == ["model", *BASELINES]
    small[0] = f"training.run_dir={tmp_path / 'b'}"
    fine = scmodelforge.finetune(load_config(config, small), checkpoint(run.run_dir), data=adata)
    assert fine.model.labels is not None
    assert len(fine.model.labels.classes) == 2
