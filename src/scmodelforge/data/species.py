"""Whose genes does each file have? `data.species`, read for the files at hand."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from scmodelforge.config import DataConfig
from scmodelforge.data.matrix import Matrix
from scmodelforge.data.sources import Source
from scmodelforge.errors import ConfigError
from scmodelforge.genes.tables import SPECIES, species_of


def named_species(sources: Sequence[Source], config: DataConfig) -> list[str | None]:
    """Return what `data.species` says of each source: "human", "mouse", or None for the vocabulary's own.

    A file is named by its path, by its file name, or by a pattern of either. An AnnData in memory has no name.

    Raises
    ------
    ConfigError
        If a name fits none of the sources and none of `data.paths`, or two names give a file two species.
    """
    if not isinstance(config.species, dict):
        return [config.species] * len(sources)
    found: dict[str, dict[str, str]] = {}  # file -> name that fits it -> species
    paths = [str(source) for source in sources if not isinstance(source, AnnData)]
    for name, species in config.species.items():
        pattern = os.path.expanduser(name)
        there = {os.path.realpath(match) for match in (pattern, *glob.glob(pattern, recursive=True))}
        fits = [path for path in {*paths, *config.paths} if _fits(path, pattern, there)]
        if not fits:
            files = ", ".join(list(dict.fromkeys([*config.paths, *paths]))[:5]) or "cells in memory"
            raise ConfigError(f"data.species: '{name}' fits no file. Files: {files}.")
        for path in fits:
            found.setdefault(path, {})[name] = species
    for path, names in found.items():
        if len(set(names.values())) > 1:
            both = " and ".join(f"'{name}' says {species}" for name, species in names.items())
            raise ConfigError(f"data.species: of '{path}' {both}. Name each file once.")
    return [next(iter(found.get(str(source), {}).values()), None) for source in sources]


def species_of_matrices(matrices: Sequence[Matrix], config: DataConfig) -> list[str | None]:
    """As `named_species`, for files that are open; a shard has the genes of the vocabulary that it was made with.

    So a config with the species of the sources serves for their shards too.
    """
    named = named_species([matrix.source for matrix in matrices], config)
    return [
        species if species is None or matrix.library_size is None else _held_species(matrix)
        for matrix, species in zip(matrices, named, strict=True)
    ]


def _fits(path: str, pattern: str, there: set[str]) -> bool:
    return os.path.realpath(path) in there or fnmatch.fnmatchcase(Path(path).name, pattern)


def _held_species(matrix: Matrix) -> str | None:
    species = species_of(matrix.var.index.to_numpy(object))
    return species if species in SPECIES else None
