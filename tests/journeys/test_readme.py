"""Each command of the README, in its order, on real cells; only sizes are made small."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import pytest
import torch

from tests.helpers import marker_cells
from tests.journeys.command import done, sets

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = sets(
    training__max_epochs=1,
    training__batch_size=64,
    tokenizer__max_genes=48,
    model__hidden_dim=16,
    model__num_layers=1,
    model__num_heads=2,
    data__gene_vocab="from_data",
)
# Commands that take a model take its sizes from it.
TRAINING_ONLY = sets(training__max_epochs=1, training__batch_size=64)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_readme(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(cells, "cells.h5ad")
    commands = commands_of(blocks("bash")[0])
    assert [arguments[0] for arguments in commands] == [
        *(
            "check",
            "tokens",
            "init",
            "plan",
            "train",
            "train",
            "slurm",
            "benchmark",
            "finetune",
            "finetune",
            "annotate",
            "embed",
            "perturb",
            "compare",
        )
    ]
    for arguments in commands:
        if arguments[0] in ("plan", "train"):
            arguments += SMALL
        if arguments[0] == "finetune":
            _without_sizes(Path("my.yaml"))
            arguments += TRAINING_ONLY
        if arguments[0] == "benchmark":
            _without_sizes(Path("my.yaml"))
        done(*arguments)
    annotated, embedded = anndata.read_h5ad("annotated.h5ad"), anndata.read_h5ad("embedded.h5ad")
    assert annotated.obs["scmodelforge_cell_type_probability"].between(0, 1).all()
    assert embedded.obsm["X_scmodelforge"].shape == (700, 16)
    for written in (
        "runs/mine/benchmark.json",
        "runs/mine/benchmark.html",
        "perturbed/volcano.png",
        "comparison.html",
    ):
        assert Path(written).exists(), written
    subprocess.run(["bash", "-n", "my.sbatch"], check=True)
    _large_data_of_the_readme()
    said = README.partition("## What a run leaves behind")[2]
    for name in re.findall(r"^  (\S+)\s{2,}", said.partition("```\n\n")[0], flags=re.MULTILINE):
        assert Path("runs/mine", name).exists(), name

    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), names := {})
    assert "neighbors" in names["cells"].uns


def _large_data_of_the_readme() -> None:
    """The commands about shards and many files, after those of the first block."""
    for name in ("one", "two"):
        Path("more").mkdir(exist_ok=True)
        shutil.copy("cells.h5ad", f"more/{name}.h5ad")
    names = []
    for arguments in commands_of(blocks("bash")[1]):
        names.append(arguments[0])
        if arguments[0] == "train":
            arguments += SMALL
        done(*arguments)
    assert names == ["shard", "shard", "train", "embed"]
    for name in ("one", "two"):
        assert anndata.read_h5ad(f"embedded/{name}.h5ad").obsm["X_scmodelforge"].shape == (700, 16)


def commands_of(block: str) -> list[list[str]]:
    """Arguments of each `scmodelforge` line."""
    return [shlex.split(line)[1:] for line in block.splitlines() if not line.startswith("#")]


def test_the_commands_about_published_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny folder with the published layout."""
    pytest.importorskip("transformers", reason="needs the dev extra (transformers)")
    from tests.models.published_files import geneformer_folder

    monkeypatch.chdir(tmp_path)
    geneformer_folder(Path("Geneformer-V2-104M"), "v2", dictionaries=Path("dictionaries"))
    marker_cells().write_h5ad("cells.h5ad")
    (_, _, block) = blocks("bash")
    names = []
    for arguments in commands_of(block):
        names.append(arguments[0])
        done(*arguments)
    assert names == ["strategies", "import", "embed", "export"]
    assert anndata.read_h5ad("embedded_gf104m.h5ad").obsm["X_scmodelforge"].shape[0] == 240
    assert Path("gf104m-bert/model.safetensors").is_file()


def test_the_families_of_the_readme_have_their_configs() -> None:
    named = set(re.findall(r"`configs/(\w+\.yaml)`", README.partition("## Published models")[2]))
    assert len(named) == 5
    assert all((ROOT / "configs" / name).is_file() for name in named)


def _without_sizes(config: Path) -> None:
    """The model was made small by --set, so the file must not ask for the large one."""
    import yaml

    values = yaml.safe_load(config.read_text())
    for section in ("tokenizer", "model"):
        values.pop(section, None)
    values["data"].pop("gene_vocab", None)
    config.write_text(yaml.safe_dump(values))


def test_make_knows_the_targets_of_the_readme() -> None:
    targets = re.findall(r"^make (\w+)$", "\n".join(blocks("")), flags=re.MULTILINE)
    assert targets == ["quickstart", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    """The script behind `make quickstart`, with fewer epochs, as its own process."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = tmp_path / "configs/quickstart.yaml"
    config.write_text(re.sub(r"max_epochs: \d+", "max_epochs: 1", config.read_text()))
    script = ROOT / "examples/quickstart.py"
    answer = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    listed = answer.stdout.partition("Everything is in quickstart/:")[2]
    names = re.findall(r"^  (\S+)\s{2,}", listed, flags=re.MULTILINE)
    assert len(names) >= 6
    for name in names:
        assert (tmp_path / "quickstart" / name).exists(), name
    report = (tmp_path / "quickstart/pretrained/report.html").resolve()
    assert answer.stdout.splitlines()[-1] == f"Open in a browser: {report.as_uri()}"
    assert torch.load(tmp_path / "quickstart/finetuned/checkpoints/best.ckpt", weights_only=True)
