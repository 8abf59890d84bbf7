"""Shards: cells in the gene space of a vocabulary, as ordinary .h5ad files whose bytes are mapped into memory.

A shard's `X` is CSR with contiguous, uncompressed arrays and counts in the smallest type that holds them, so any
reader of AnnData opens it and ours maps it. Genes outside of the vocabulary are gone; the library size over all genes
measured is kept in obs. Of the genes inside, var tells those that the source measured from those without counts
because nobody looked. Beside each shard lies its record (sources, checksum), and `manifest.json` holds all of them.

Conversion reads each cell once and needs memory for one block of cells. A shard appears under its name when it is
whole, and one that is there already, of the same source and vocabulary, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from scmodelforge.config import DataConfig
from scmodelforge.config_census import CensusConfig
from scmodelforge.data.census import census_sha256
from scmodelforge.data.matrix import LIBRARY_SIZE
from scmodelforge.data.sources import Source
from scmodelforge.data.species import named_species
from scmodelforge.data.store import CellStore, open_store
from scmodelforge.errors import DataError
from scmodelforge.files import atomic_path, ensure_writable, write_text
from scmodelforge.genes.identifiers import MEASURED
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
CELLS_PER_SHARD = 100_000
BLOCK_CELLS = 2_048
COPY_ENTRIES = 4 * 2**20
HASH_BYTES = 2**22


@dataclass(frozen=True)
class ShardRecord:
    """What a shard is made of, and how to tell that it is whole.

    Attributes
    ----------
    name
        File name of the shard.
    n_cells, n_entries
        Its cells, and the counts in them.
    sha256, n_bytes
        Of the file.
    source, source_sha256
        The file that the cells come from.
    first_cell
        Row in the source of the shard's first cell.
    vocabulary
        Fingerprint of the gene vocabulary.
    settings
        What else shaped it: where the counts were, which obs columns were kept, the species of the source where it
        was given.
    """

    name: str
    n_cells: int
    n_entries: int
    sha256: str
    n_bytes: int
    source: str
    source_sha256: str
    first_cell: int
    vocabulary: str
    settings: dict[str, Any]


def write_shards(
    sources: Sequence[Source],
    vocab: GeneVocab,
    config: DataConfig,
    output: str | Path,
    obs_columns: Sequence[str] | None = None,
    cells_per_shard: int = CELLS_PER_SHARD,
    processes: int = 1,
) -> list[ShardRecord]:
    """Convert .h5ad files or cells of the Census into shards in the folder `output`; what is there already is kept.

    Parameters
    ----------
    sources
        The files; their genes may differ. Or cells of the Census.
    vocab
        The vocabulary to align to.
    config
        `layer`, `gene_column`, `species` and `min_gene_overlap` are read.
    obs_columns
        Columns of obs to keep; None: all.
    cells_per_shard
        Cells of a shard, but for the last of a file.
    processes
        Files converted side by side.

    Raises
    ------
    DataError
        If a file cannot be read, does not hold raw counts, or lacks a column; or if `output` holds shards of another
        vocabulary or of other settings.
    """
    folder = ensure_writable(output)
    vocab = vocab.with_special_tokens(VOCAB_LAYOUTS["geneformer_v2"])  # shards hold genes, no tokens
    settings = {
        "layer": config.layer,
        "gene_column": config.gene_column,
        "obs_columns": None if obs_columns is None else list(obs_columns),
        "cells_per_shard": cells_per_shard,
    }
    _require_same_kind(folder, vocab, settings)
    jobs = [
        (
            source,
            name,
            vocab,
            config.model_copy(update={"species": species}),
            str(folder),
            settings | {"species": species},
        )
        for source, name, species in zip(
            sources, _shard_names(sources), named_species(sources, config), strict=True
        )
    ]
    if processes > 1 and len(jobs) > 1:
        spawn = multiprocessing.get_context("spawn")  # forked threads of HDF5 and torch may hang
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn) as pool:
            records = [
                record for part in pool.map(_convert_file, *zip(*jobs, strict=True)) for record in part
            ]
    else:
        records = [record for job in jobs for record in _convert_file(*job)]
    manifest = {
        "format_version": FORMAT_VERSION,
        "vocabulary": {"name": vocab.name, "species": vocab.species, "fingerprint": vocab.fingerprint},
        "n_cells": sum(record.n_cells for record in records),
        "settings": settings,
        "shards": [asdict(record) for record in records],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return records


def shard_paths(folder: str | Path) -> list[Path]:
    """The shards of a folder in the order of its manifest.

    Raises
    ------
    DataError
        If there is no manifest, or it cannot be read.
    """
    folder = Path(folder)
    return [folder / record["name"] for record in _manifest(folder)["shards"]]


def verify_shards(folder: str | Path) -> list[str]:
    """Read every byte of the shards of a folder; one sentence for each that is missing, cut off or changed."""
    problems = []
    for record in _manifest(Path(folder))["shards"]:
        path = Path(folder) / record["name"]
        if not path.is_file():
            problems.append(f"'{path}' is missing.")
        elif path.stat().st_size != record["n_bytes"]:
            problems.append(
                f"'{path}' was cut off or changed: it has {path.stat().st_size:,} bytes instead of "
                f"{record['n_bytes']:,}."
            )
        elif _sha256(path) != record["sha256"]:
            problems.append(f"'{path}' was changed: its bytes do not have the checksum of the manifest.")
    return problems


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"'{folder}' has shards of format {manifest['format_version']}, this version reads {FORMAT_VERSION}."
            )
        return manifest
    except FileNotFoundError as error:
        raise DataError(
            f"'{folder}' is no folder of shards: it has no {MANIFEST}. 'scmodelforge shard' writes one when all shards "
            "are there; start it again with the same options to go on."
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"'{folder / MANIFEST}' is damaged; start 'scmodelforge shard' again.") from error


def _require_same_kind(folder: Path, vocab: GeneVocab, settings: dict[str, Any]) -> None:
    for path in sorted(folder.glob("*.h5ad.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        what = "gene vocabulary" if record["vocabulary"] != vocab.fingerprint else "settings"
        made = {
            name: value for name, value in record["settings"].items() if name != "species"
        }  # each file's own
        if record["vocabulary"] != vocab.fingerprint or made != settings:
            raise DataError(
                f"'{folder}' holds shards of another kind: '{record['name']}' was made with other {what}.\n"
                "Choose another output folder, or delete this one."
            )


def _shard_names(paths: Sequence[Source]) -> list[str]:
    """A distinct stem for each source."""
    stems = [
        f"census-{path.organism}" if isinstance(path, CensusConfig) else Path(str(path)).stem
        for path in paths
    ]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        for stem, path in zip(stems, paths, strict=True)
    ]


def _convert_file(
    path: Source,
    stem: str,
    vocab: GeneVocab,
    config: DataConfig,
    folder: str,
    settings: dict[str, Any],
) -> list[ShardRecord]:
    """Write all shards of one file that are not there yet."""
    source_sha256 = census_sha256(path) if isinstance(path, CensusConfig) else _sha256(Path(str(path)))
    store = open_store([path], vocab, config)
    columns = settings["obs_columns"]
    if missing := [name for name in columns or () if name not in store.obs]:
        raise DataError(
            f"'{path}' has no obs column {', '.join(missing)}; there are: {', '.join(map(str, store.obs.columns))}."
        )
    obs = store.obs if columns is None else store.obs[columns]
    obs = obs.set_axis(obs.index.astype(str))  # the Census numbers its cells
    records = []
    size = settings["cells_per_shard"]
    for part, first in enumerate(range(0, store.n_cells, size)):
        target = Path(folder) / f"{stem}-{part:05d}.h5ad"
        record = _finished(target, source_sha256, settings)
        if record is None:
            rows = np.arange(first, min(first + size, store.n_cells))
            n_entries = _write_shard(target, store, rows, obs.iloc[rows])
            record = ShardRecord(
                target.name,
                len(rows),
                n_entries,
                _sha256(target),
                target.stat().st_size,
                str(path),
                source_sha256,
                first,
                vocab.fingerprint,
                settings,
            )
            write_text(_record_of(target), json.dumps(asdict(record), indent=2) + "\n")
        records.append(record)
    store.close()
    return records


def _record_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def _finished(target: Path, source_sha256: str, settings: dict[str, Any]) -> ShardRecord | None:
    """The record of a shard that is whole and of this source and species; None if it must be made."""
    if not _record_of(target).is_file() or not target.is_file():
        return None
    record = ShardRecord(**json.loads(_record_of(target).read_text(encoding="utf-8")))
    whole = record.n_bytes == target.stat().st_size and record.source_sha256 == source_sha256
    whole = whole and record.settings.get("species") == settings["species"]
    return record if whole else None


def _write_shard(target: Path, store: CellStore, rows: np.ndarray, obs: pd.DataFrame) -> int:
    """Write cells of a store of one file as one shard; returns the number of counts."""
    vocab = store.vocab
    (match,) = store.matches
    var = pd.DataFrame(
        {"symbol": vocab.symbols, "biotype": vocab.biotypes, MEASURED: match.measured(vocab.n_genes)},
        index=pd.Index(vocab.gene_ids),
    )
    lengths, libraries, largest, whole = [], [], 0.0, True
    with (
        tempfile.TemporaryFile(dir=target.parent) as genes,
        tempfile.TemporaryFile(dir=target.parent) as counts,
        atomic_path(target) as temporary,
    ):
        for start in range(0, len(rows), BLOCK_CELLS):
            cells = store.read(rows[start : start + BLOCK_CELLS])
            lengths.append(cells.n_genes_per_cell)
            libraries.append(cells.library_size)
            largest = max(largest, float(cells.counts.max(initial=0)))
            whole = whole and bool((cells.counts == np.rint(cells.counts)).all())
            genes.write(cells.gene_ids.tobytes())
            counts.write(cells.counts.tobytes())
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        ad.AnnData(obs=obs.assign(**{LIBRARY_SIZE: np.concatenate(libraries)}), var=var).write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            if "X" in file:
                del file["X"]
            group = file.create_group("X")
            shape = (len(rows), vocab.n_genes)
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
            group.create_dataset("indptr", data=indptr)
            n_entries = int(indptr[-1])
            dtype = _smallest(largest) if whole else np.dtype(np.float32)
            for name, held, kind, stored in (
                ("indices", genes, np.int32, np.dtype(np.int32)),
                ("data", counts, np.float32, dtype),
            ):
                dataset = group.create_dataset(
                    name, shape=(n_entries,), dtype=stored
                )  # no chunks: contiguous
                held.seek(0)
                for begin in range(0, n_entries, COPY_ENTRIES):
                    block = np.frombuffer(held.read(4 * COPY_ENTRIES), dtype=kind)
                    dataset[begin : begin + len(block)] = block.astype(stored)
    return n_entries


def _smallest(largest: float) -> np.dtype:
    """The smallest type that holds whole numbers from 0 to `largest` (float32 from 2**24 on, as they were read)."""
    for dtype in (np.uint8, np.uint16):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.uint32 if largest < 2**24 else np.float32)


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(HASH_BYTES):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {os.strerror(error.errno or 0)}.") from error
