"""Compiled code is kept on disk, so that a second start does not compile again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json
import numpy as np
from scmodelforge.config import Config
from scmodelforge.data import kernels
from scmodelforge.models.objectives import build_objective, kernels as questions
from scmodelforge.tokenizers import kernels as tokens
from scmodelforge.tokenizers.base import build_tokenizer
from tests.helpers import make_cells, make_vocab
from scmodelforge.data.matrix import Rows
from scmodelforge.data.store import to_vocabulary

vocab = make_vocab(20)
held = Rows(np.array([0, 2]), np.array([1, 3], np.int32), np.array([2, 1], np.uint16))
to_vocabulary(held, np.array([0]), np.arange(20, dtype=np.int32))
config = Config()
batch = build_tokenizer(config, vocab)(make_cells(np.ones((2, 20))))
build_objective(config, vocab).corrupt(batch, 0, 0)
used = [kernels.cells_to_vocabulary, tokens.rank_genes, questions.mask_tokens]
print(json.dumps([[sum(each.stats.cache_hits.values()), sum(each.stats.cache_misses.values())] for each in used]))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    seen = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", SCRIPT],
                capture_output=True,
                text=True,
                check=True,
                cwd=root,
                env=environment,
            ).stdout
        )
        for _ in range(2)
    ]
    assert all(hits == 0 and misses > 0 for hits, misses in seen[0])
    assert all(hits > 0 and misses == 0 for hits, misses in seen[1])
