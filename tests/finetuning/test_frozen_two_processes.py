"""Two processes share the frozen backbone's work, and learn what they would if it were at work in every epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from scmodelforge.models.bundle import read_checkpoint
from scmodelforge.training.run import RunResult
from tests.helpers import finetune_config, marker_cells

# The command itself, with a note of the cells of each pass through the backbone.
NOTED = """
import os
from scmodelforge import cli
from scmodelforge.finetuning import run
from scmodelforge.models.base import CellTransformer
if os.environ["ONCE"] == "0":
    run.embeds_once = lambda *_: False
encode = CellTransformer.encode
def noted(self, tokens, pooling=None):
    with open(f"{os.environ['NOTES']}/{os.environ['RANK']}", "a") as file:
        file.write(f"{tokens.n_cells}\\n")
    return encode(self, tokens, pooling)
CellTransformer.encode = noted
cli.main()
"""


@pytest.mark.slow
def test_two_processes_embed_a_share_each_and_learn_the_same_head(
    pretrained: RunResult, tmp_path: Path
) -> None:
    marker_cells(241).write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "noted.py").write_text(NOTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launcher += [str(tmp_path / "noted.py"), "finetune"]
    heads = []
    for once in ("1", "0"):
        run = tmp_path / once
        run.mkdir()
        config = finetune_config(run, {"batch_size": 15}, freeze_backbone=True, head_lr=0.1)
        sections = config.model_dump(mode="json", exclude_unset=True)
        sections["data"]["paths"] = [str(tmp_path / "cells.h5ad")]
        (run / "config.yaml").write_text(yaml.safe_dump(sections))
        answer = subprocess.run(
            [
                *launcher,
                "--config",
                str(run / "config.yaml"),
                "--checkpoint",
                str(pretrained.run_dir / "model"),
            ],
            env={**os.environ, "NOTES": str(run), "ONCE": once, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,  # a hang would be a mistake
        )
        assert answer.returncode == 0, answer.stderr
        heads.append(read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]["head.linear.weight"])
    passed = [sum(json.loads(n) for n in (tmp_path / "1" / rank).read_text().split()) for rank in "01"]
    assert passed == [121 + 60, 121], (
        "of 241 cells, the last by both; the first embeds the 60 of the report, too"
    )
    np.testing.assert_allclose(heads[0], heads[1], rtol=0, atol=1e-6)
