"""Where cells come from: what kind of source it is, and who opens it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import anndata as ad
import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset

from scmodelforge.config import DataConfig
from scmodelforge.config_census import CensusConfig
from scmodelforge.data.census import open_census
from scmodelforge.data.h5ad import CACHE_BYTES, h5ad_places, held_on_disk, open_h5ad
from scmodelforge.data.matrix import LIBRARY_SIZE, Matrix, held_in_memory, no_matrix, place_of
from scmodelforge.data.remote import Remote, is_url
from scmodelforge.data.zarr import is_zarr, open_zarr, zarr_members, zarr_places

Source: TypeAlias = str | Path | Remote | ad.AnnData | CensusConfig


def sources_of(config: DataConfig) -> list[Source]:
    """The sources that a config names: remote ones with the folder to keep them in, collections as their members."""
    if config.source == "census" and config.census is not None:
        return [config.census]
    return [member for path in config.paths for member in members(located(path, config))]


def located(source: Source, config: DataConfig) -> Source:
    """Give a URL the cache folder of the config; anything else stays what it is."""
    if isinstance(source, str) and is_url(source):
        return Remote(source, config.cache_dir, config.cache_size_gb)
    return source


def members(source: Source) -> list[Source]:
    """The AnnData stores in a zarr collection; of anything else the source alone."""
    if isinstance(source, ad.AnnData | CensusConfig) or not _is_zarr(source):
        return [source]
    names = zarr_members(local_path(source), str(source))
    if isinstance(source, Remote):
        return [replace(source, member=name) for name in names] or [source]
    return [str(Path(source) / name) for name in names] or [source]


def open_matrix(source: Source, layer: str | None = None, cache_bytes: int = CACHE_BYTES) -> Matrix:
    """Open one matrix of a source without reading it.

    Parameters
    ----------
    source
        Path or URL of an .h5ad file or a .zarr store, an AnnData (in memory, backed, or a view), or cells of the
        Census.
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
    if _is_zarr(source):
        return open_zarr(local_path(source), source, layer, cache_bytes)
    return open_h5ad(local_path(source), source, layer, cache_bytes)


def matrix_places(source: Source) -> list[str | None]:
    """Return what `layer` can be for this source: None for X, names of layers, "raw"; only what is there."""
    if isinstance(source, CensusConfig):
        return [None]
    if not isinstance(source, ad.AnnData):
        places = zarr_places if _is_zarr(source) else h5ad_places
        return places(local_path(source), str(source))
    layers, has_raw = list(source.layers), source.raw is not None
    names = [layer for layer in layers if layer != "raw" or not has_raw]
    return [None] * (source.X is not None) + names + ["raw"] * has_raw


def _is_zarr(source: str | Path | Remote) -> bool:
    """Told from the name where there is nothing to look at."""
    if isinstance(source, Remote) or is_url(source):
        return str(source).partition("?")[0].rstrip("/").endswith(".zarr") or bool(
            getattr(source, "member", "")
        )
    return is_zarr(source) or (Path(source).suffix == ".zarr" and not Path(source).is_file())


def local_path(source: str | Path | Remote) -> Path:
    """Where a file lies on this machine; a remote one is fetched first."""
    if is_url(source):
        source = Remote(str(source))
    return source.local if isinstance(source, Remote) else Path(source)


def _open_anndata(adata: ad.AnnData, layer: str | None) -> Matrix:
    raw = layer == "raw" and adata.raw is not None
    value = adata.raw.X if raw else adata.X if layer is None else adata.layers.get(layer)  # of a view: a copy
    if value is None:
        raise no_matrix("AnnData", layer, matrix_places(adata))
    if isinstance(value, CSRDataset | CSCDataset):
        value = value.group
    read = held_on_disk if isinstance(value, h5py.Group | h5py.Dataset) else held_in_memory
    held = read(value, "AnnData", place_of(layer))
    library = None
    if LIBRARY_SIZE in adata.obs:  # a shard that was read
        library = adata.obs[LIBRARY_SIZE].to_numpy(np.float64)
    var = adata.raw.var if raw else adata.var
    return Matrix(adata, layer, held, var, obs=lambda: adata.obs, library_size=lambda: library)
