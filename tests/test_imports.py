"""What must stay fast and light: importing the package, and reading a config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "scanpy", "lightning", "anndata", "numpy", "pandas"}


@pytest.mark.parametrize("module", ["scmodelforge", "scmodelforge.config_io"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


MISTAKE = """
import json, sys
from scmodelforge import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["scmodelforge", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 2, arguments
assert "torch" not in sys.modules
"""


def test_mistakes_in_paths_and_names_are_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "cells.h5ad").touch()
    (tmp_path / "c.yaml").write_text("data: {gene_vocab: from_data}\n")
    data, output = ["--data", f"{tmp_path}/cells.h5ad"], ["--output", f"{tmp_path}/out.h5ad"]
    model, config = ["--model", str(tmp_path)], ["--config", f"{tmp_path}/c.yaml"]
    here = "--set", f"data.paths=[{tmp_path}/cells.h5ad]"
    commands = [
        ["embed", "--model", "nomodel", *data, *output],
        ["embed", *model, "--data", "none.h5ad", *output],
        ["embed", *model, *data, "--output", f"{tmp_path}/e.csv"],
        ["annotate", "--model", "nomodel", *data, *output],
        ["perturb", "--model", "nomodel", *data, *output, "--genes", "A"],
        ["benchmark", "--model", "nomodel", *data],
        ["benchmark", *model, "--data", "none.h5ad"],
        ["benchmark", *model, *data, "--output", f"{tmp_path}/cells.h5ad/r.json"],
        ["benchmark", *model, *data, "--set", "eval.benchmarks=[{name: linear_prob}]"],
        ["finetune", "--checkpoint", "nomodel", *config, *here],
        ["train", "--resume", "nomodel", *config, *here],
        ["train", *config, "--set", "training.max_epoch=3"],
        ["check", "none.h5ad"],
        ["tokens", "none.h5ad"],
        ["init", "none.h5ad"],
        ["genes", "--model", "nomodel", *output],
        ["attention", "--model", "nomodel", *data, *output],
    ]
    done = subprocess.run(
        [sys.executable, "-c", MISTAKE, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Error: ") == len(commands)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "cells.h5ad"]
