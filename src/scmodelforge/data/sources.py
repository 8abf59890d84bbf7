"""Where cells come from: what kind of source it is, and who opens it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import anndata as ad
import h5py
from anndata.abc import CSCDataset, CSRDataset

from scmodelforge.config import DataConfig
from scmodelforge.config_census import CensusConfig
from scmodelforge.data.census import open_census
from scmodelforge.data.h5ad import CACHE_BYTES, h5ad_places, held_on_disk, open_h5ad
from scmodelforge.data.matrix import Matrix, held_in_memory, no_matrix, place_of

Source: TypeAlias = str | Path | ad.AnnData | CensusConfig


def sources_of(config: DataConfig) -> list[Source]:
    """The sources that a config names."""
    return [config.census] if config.source == "census" and config.census else list(config.paths)


def open_matrix(source: Source, layer: str | None = None, cache_bytes: int = CACHE_BYTES) -> Matrix:
    """Open one matrix of a source without reading it.

    Parameters
    ----------
    source
        Path of an .h5ad file, an AnnData (in memory, backed, or a view), or cells of the Census.
    layer
        None for X, "raw" for `.raw.X` (where there is none, a layer of that name), else the name of a layer.
    cache_bytes
        Largest size of the decompressed chunks kept in memory, for each of the arrays of a sparse matrix.

    Raises
    ------
    DataError
        If the file is missing, damaged or no AnnData, or has no such matrix, no cells or no genes.
    """
    if isinstance(source, CensusConfig):
        return open_census(source)
    if isinstance(source, ad.AnnData):
        return _open_anndata(source, layer)
    return open_h5ad(source, layer, cache_bytes)


def matrix_places(source: Source) -> list[str | None]:
    """Return what `layer` can be for this source: None for X, names of layers, "raw"; only what is there."""
    if isinstance(source, CensusConfig):
        return [None]
    if not isinstance(source, ad.AnnData):
        return h5ad_places(source)
    layers, has_raw = list(source.layers), source.raw is not None
    names = [layer for layer in layers if layer != "raw" or not has_raw]
    return [None] * (source.X is not None) + names + ["raw"] * has_raw


def _open_anndata(adata: ad.AnnData, layer: str | None) -> Matrix:
    raw = layer == "raw" and adata.raw is not None
    value = adata.raw.X if raw else adata.X if layer is None else adata.layers.get(layer)  # of a view: a copy
    if value is None:
        raise no_matrix("AnnData", layer, matrix_places(adata))
    if isinstance(value, CSRDataset | CSCDataset):
        value = value.group
    read = held_on_disk if isinstance(value, h5py.Group | h5py.Dataset) else held_in_memory
    held = read(value, "AnnData", place_of(layer))
    return Matrix(adata, layer, held, adata.raw.var if raw else adata.var, obs=lambda: adata.obs)
