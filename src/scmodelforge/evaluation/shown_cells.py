"""Cells that a report shows: at most 2,000 of them with embedding, label, batch and, of a fine-tuned model, prediction.

They are an ordinary AnnData, so that they are drawn without the model and the data, and open in scanpy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scmodelforge.config import Config
from scmodelforge.data.check import BATCH_WORDS, LABEL_WORDS, MAX_CLASSES, likely_column
from scmodelforge.data.state import evenly
from scmodelforge.data.store import CellStore
from scmodelforge.files import atomic_path
from scmodelforge.inference import EMBEDDING_KEY, embed_store, head_outputs, labels_of
from scmodelforge.models.bundle import ModelBundle

MOST_CELLS = 2_000
FACTS = "scmodelforge"  # in uns: which columns are what, and how many cells these were drawn from


def shown_cells(
    bundle: ModelBundle,
    store: CellStore,
    rows: np.ndarray,
    kind: str,
    config: Config | None = None,
    batch_size: int = 256,
    device: str | None = None,
) -> AnnData:
    """Embed at most 2,000 cells, evenly spaced among `rows`; the model stays on the CPU.

    Parameters
    ----------
    rows
        int64: rows of the store to choose from.
    kind
        What these cells are, for the page: "validation cells".
    config
        Where label and batch columns are named (`eval`, `data.split.group_key`); None: the model's.

    Returns
    -------
    AnnData with the embedding in `obsm["X_scmodelforge"]`, the columns in `obs`, and in `uns["scmodelforge"]`:
    `kind`, `n_all`, and the names of the columns that there are (`label`, `batch`, `prediction`). Label and batch have
    the categories of all cells of the store, by which a page chooses colours, shown or not.
    """
    n_all, in_runs = len(rows), any(matrix.shuffle_buffer for matrix in store.matrices)
    rows = rows[evenly(n_all, MOST_CELLS, in_runs)]
    embedding = embed_store(bundle, store, batch_size, device=device, rows=rows)
    bundle.model.cpu()
    obs = store.obs.iloc[rows]
    label, batch = _columns(obs, bundle, config or bundle.config)
    facts: dict[str, str | int] = {"kind": kind, "n_all": n_all}
    columns: dict[str, object] = {}
    for role, name in (("label", label), ("batch", batch)):
        if name is not None:
            facts[role] = name.replace("/", "_")  # a slash would be a folder in the file
            numeric = bundle.labels is not None and bundle.labels.task == "regression" and role == "label"
            values = obs[name]
            columns[str(facts[role])] = (
                values.to_numpy(np.float64)
                if numeric
                else pd.Categorical(
                    values.astype(str).where(values.notna().to_numpy()),
                    sorted(store.obs[name].dropna().astype(str).unique()),
                )
            )
    if bundle.labels is not None and bundle.head is not None:
        with torch.inference_mode():
            output = head_outputs(bundle.labels, bundle.head.cpu().eval(), torch.from_numpy(embedding))
        predicted = labels_of(bundle, output.numpy(), obs.index)
        columns |= {str(column).replace("/", "_"): predicted[column].array for column in predicted}
        facts["prediction"] = f"scmodelforge_{bundle.labels.key}".replace("/", "_")
    index = obs.index.astype(str)
    return AnnData(
        obs=pd.DataFrame(columns, index=index), obsm={EMBEDDING_KEY: embedding}, uns={FACTS: facts}
    )


def write_cells(cells: AnnData, path: Path) -> None:
    """Write them as .h5ad, atomically."""
    with atomic_path(path) as temporary:
        cells.write_h5ad(temporary)


def _columns(obs: pd.DataFrame, bundle: ModelBundle, config: Config) -> tuple[str | None, str | None]:
    """The obs columns that hold labels and batches: those that the config names, else those that look so."""
    few = [str(name) for name in obs.columns if 2 <= obs[name].nunique() <= MAX_CLASSES]
    params = [spec.params for spec in config.eval.benchmarks]
    named = [getattr(p, key, None) for p in params for key in ("cell_type_key", "label_key")]
    label = bundle.labels.key if bundle.labels is not None and bundle.labels.key in obs else None
    label = label or next((name for name in named if name in few), None) or likely_column(few, LABEL_WORDS)
    batches = [*(getattr(p, "batch_key", None) for p in params), config.data.split.group_key]
    others = [name for name in few if name != label]
    batch = next((name for name in batches if name in others), None) or likely_column(others, BATCH_WORDS)
    return label, batch
