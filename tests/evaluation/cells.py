"""Cells of a benchmark from arrays, without files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scmodelforge.evaluation.benchmark import EvaluationCells, Method


def evaluation_cells(obs: pd.DataFrame, counts: Any = None) -> EvaluationCells:
    """Cells with these annotations; of the store a benchmark may ask for obs only."""
    counts = np.ones((len(obs), 3)) if counts is None else counts
    data = anndata.AnnData(csr_matrix(counts, dtype=np.float32))
    store: Any = SimpleNamespace(obs=obs, n_cells=len(obs))
    return EvaluationCells(store, data, None, "the data")


def method(embedding: np.ndarray, name: str = "model") -> Method:
    return Method(name, name != "model", embedding)
