"""Embeddings and labels for the cells of an .h5ad file of any size, written into a copy of it, or into itself.

No file is loaded whole. Results are kept on disk as they come (`inference_partial`), so a stopped run goes on where it
was; the output appears under its name only when it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from scmodelforge.config import Config
from scmodelforge.data.zarr import is_zarr
from scmodelforge.errors import DataError
from scmodelforge.files import atomic_path, require_target
from scmodelforge.inference import (
    EMBEDDING_KEY,
    PROVENANCE_KEY,
    bundle_for,
    embeddings_of,
    labels_of,
    open_for,
    outputs_of,
    provenance,
    require_labels,
)
from scmodelforge.inference_batches import Computed, default_device, precision_for, warn_of_empty
from scmodelforge.inference_partial import kept_rows
from scmodelforge.models.bundle import ModelBundle


def embed_file(
    source: str | Path,
    output: str | Path,
    model: ModelBundle | str | Path,
    *,
    key_added: str = EMBEDDING_KEY,
    batch_size: int = 256,
    pooling: str | None = None,
    precision: str | None = None,
    config: Config | None = None,
) -> int:
    """Write a copy of an .h5ad file with the embedding in `obsm[key_added]`; returns the number of cells.

    Where it came from is in `uns["scmodelforge"][key_added]`, see `provenance`.

    `output` may be `source`: the file is replaced when the new one is complete. Started again after it was stopped,
    with the same file, model, pooling and precision, it goes on where it was.
    """
    if "/" in key_added:  # HDF5 would make a group of it, which is no embedding
        raise DataError(f"The key '{key_added}' holds a '/', which no name in obsm of a file can.")
    _require_h5ad(source)
    output = require_target(output)
    precision = precision_for(precision, default_device())
    bundle = bundle_for(model, config)
    store = open_for(bundle, source, config.data if config else None)
    made_of = partial(
        _made_of, source, bundle, config, pooling=pooling or bundle.model.pooling, precision=precision
    )

    def compute(done: int) -> Iterator[Computed]:
        rows = np.arange(done, store.n_cells)
        return embeddings_of(bundle, store, rows, batch_size, pooling, precision=precision)

    shape = store.n_cells, bundle.model.hidden_dim
    with kept_rows(output, shape, made_of, compute) as (embeddings, n_empty):
        warn_of_empty(n_empty, "embedding")
        with _edited_copy(source, output) as handle:
            write_elem(handle.require_group("obsm"), key_added, embeddings)
            _note(handle, key_added, provenance(bundle, store, pooling, precision))
    return store.n_cells


def annotate_file(
    source: str | Path,
    output: str | Path,
    model: ModelBundle | str | Path,
    *,
    batch_size: int = 256,
    precision: str | None = None,
    config: Config | None = None,
) -> pd.DataFrame:
    """Write a copy of an .h5ad file with predicted labels in `obs`; returns them. It goes on as `embed_file`."""
    _require_h5ad(source)
    output = require_target(output)
    precision = precision_for(precision, default_device())
    bundle = bundle_for(model, config)
    labels, _ = require_labels(bundle)
    store = open_for(bundle, source, config.data if config else None)
    made_of = partial(_made_of, source, bundle, config, label=labels.key, precision=precision)

    def compute(done: int) -> Iterator[Computed]:
        return outputs_of(bundle, store, np.arange(done, store.n_cells), batch_size, precision=precision)

    shape = store.n_cells, 1 if labels.task == "regression" else 2
    with kept_rows(output, shape, made_of, compute) as (outputs, n_empty):
        warn_of_empty(n_empty, "label")
        predictions = labels_of(bundle, outputs, store.obs.index)
        with _edited_copy(source, output) as handle:
            obs = anndata.io.read_elem(handle["obs"])
            for name, column in predictions.items():
                obs[name] = column.to_numpy() if column.dtype != "category" else pd.Categorical(column)
            write_elem(handle, "obs", obs)
    return predictions


def _require_h5ad(source: str | Path) -> None:
    """Refuse, before any work, what could not be copied: zarr stores and URLs."""
    if "://" in str(source):
        raise DataError(
            f"'{source}' is not on this machine, and results are written into a copy of it: fetch it first."
        )
    if is_zarr(source):
        raise DataError(
            f"'{source}' is a zarr store, and results are written into a copy of an .h5ad file.\n"
            "In Python: adata = anndata.read_zarr(...), then scmodelforge.embed(adata, model) or annotate."
        )


def _made_of(source: str | Path, bundle: ModelBundle, config: Config | None, **how: str) -> dict[str, Any]:
    """What decides over the results for a file."""
    held = Path(source).stat()
    where = (
        {}
        if config is None
        else config.data.model_dump(mode="json", include={"layer", "gene_column", "species"})
    )
    return {
        "source": [str(Path(source).resolve()), held.st_size, held.st_mtime_ns],
        "model": bundle.sha256(),
        "data": where,
        **how,
    }


def _note(handle: h5py.File, key: str, record: dict[str, Any]) -> None:
    """Write the provenance of an embedding beside those that the file has."""
    if "uns" not in handle:
        write_elem(handle, "uns", {})
    held = anndata.io.read_elem(handle["uns"][PROVENANCE_KEY]) if PROVENANCE_KEY in handle["uns"] else {}
    write_elem(handle["uns"], PROVENANCE_KEY, {**held, key: record})


@contextmanager
def _edited_copy(source: str | Path, output: str | Path) -> Iterator[h5py.File]:
    """Copy a file and yield the copy, open for editing; it takes the name `output` when all went well."""
    with atomic_path(output) as temporary:
        try:
            shutil.copyfile(source, temporary)
        except OSError as error:
            raise DataError(
                f"'{source}' cannot be copied to '{output}': {error.strerror or error}."
            ) from error
        with h5py.File(temporary, "r+") as handle:
            yield handle
