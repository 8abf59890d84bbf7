"""Shards: cells in the gene space of a vocabulary, as ordinary .h5ad files whose bytes are mapped into memory.

A shard's `X` is CSR with contiguous, uncompressed arrays (`shard_file`), so any reader of AnnData opens it and ours
maps it. Genes outside of the vocabulary are gone; the library size over all genes measured is kept in obs. Beside each
shard lies its record (sources, checksum), and `manifest.json` holds all of them.

Conversion reads each cell once and needs memory for one block of cells, and 8 bytes for each cell of a file. A shard
appears under its name when it is whole, then its record, when all are there the manifest; what is there already, of
the same source and vocabulary, is not made again. Checksums are taken in threads beside the conversion.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from scmodelforge.config import DataConfig
from scmodelforge.config_census import CensusConfig
from scmodelforge.data.census import census_sha256
from scmodelforge.data.shard_file import file_sha256, write_shard
from scmodelforge.data.sources import Source, local_path, located
from scmodelforge.data.species import named_species
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from scmodelforge.files import ensure_writable, sole_writer, write_text
from scmodelforge.genes.vocab import VOCAB_LAYOUTS, GeneVocab
from scmodelforge.manifest import FORMAT_VERSION, MANIFEST, read_manifest
from scmodelforge.parallel import map_files

CELLS_PER_SHARD = 100_000
THREADS = 2  # that hash


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
        What else shaped it: where the counts were, which obs columns were kept.
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
    dask: str | None = None,
    selected_genes: bool = False,
) -> list[ShardRecord]:
    """Convert files or cells of the Census into shards in the folder `output`; what is there already is kept.

    Parameters
    ----------
    sources
        The files, local or remote; their genes may differ. Or cells of the Census.
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
    dask
        Address of a Dask scheduler whose workers convert the files instead; they see the same paths.
    selected_genes
        As `open_store` takes it.

    Raises
    ------
    UserError
        If a file cannot be read, does not hold raw counts, or lacks a column (the others are converted); or if
        `output` holds shards of other files, of another vocabulary or of other settings.
    """
    folder = ensure_writable(output)
    vocab = shard_vocabulary(vocab)
    settings = shard_settings(config, obs_columns, cells_per_shard)
    sources = [located(source, config) for source in sources]
    stems = _shard_names(sources)
    jobs = {
        str(source): (
            os.path.abspath(source) if isinstance(source, str | Path) else source,
            stem,
            vocab,
            config.model_copy(update={"species": species}),
            os.path.abspath(folder),
            settings | {"species": species},
            selected_genes,
        )
        for source, stem, species in zip(sources, stems, named_species(sources, config), strict=True)
    }
    with sole_writer(folder):
        census = {
            stem: _name_of(of)
            for stem, of in zip(stems, sources, strict=True)
            if isinstance(of, CensusConfig)
        }
        _require_same_kind(folder, vocab, settings, set(stems), census)
        converted = map_files(_convert_file, jobs, processes, dask)
        records = [record for part in converted.values() for record in part]
        manifest = {
            "format_version": FORMAT_VERSION,
            "vocabulary": {"name": vocab.name, "species": vocab.species, "fingerprint": vocab.fingerprint},
            "n_cells": sum(record.n_cells for record in records),
            "settings": settings,
            "shards": [asdict(record) for record in records],
        }
        text = json.dumps(manifest, indent=2) + "\n"
        if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_text(encoding="utf-8") != text:
            write_text(folder / MANIFEST, text)
        for name in _shards_there(folder) - {record.name for record in records}:
            (folder / name).unlink(missing_ok=True)  # of a source that had more cells before
            _record_of(folder / name).unlink(missing_ok=True)
    return records


def shard_vocabulary(vocab: GeneVocab) -> GeneVocab:
    """The vocabulary of shards: its genes alone, whatever model and tokenizer ask for it."""
    plain = vocab.with_special_tokens(VOCAB_LAYOUTS["geneformer_v2"])
    return plain.with_medians(None).with_obs_categories({})


def shard_settings(
    config: DataConfig, obs_columns: Sequence[str] | None = None, cells_per_shard: int = CELLS_PER_SHARD
) -> dict[str, Any]:
    """What shapes shards beside source and vocabulary."""
    return {
        "layer": config.layer,
        "gene_column": config.gene_column,
        "obs_columns": None if obs_columns is None else list(obs_columns),
        "cells_per_shard": cells_per_shard,
    }


def verify_shards(folder: str | Path) -> list[str]:
    """Read every byte of the shards of a folder; one sentence for each that is missing, cut off or changed."""
    records = read_manifest(folder)["shards"]
    with ThreadPoolExecutor(THREADS) as pool:
        problems = [problem for problem in pool.map(lambda r: _problem(Path(folder), r), records) if problem]
    known = {record["name"] for record in records}
    extra = sorted(path for path in Path(folder).glob("*.h5ad") if path.name not in known)
    return problems + [f"'{path}' is not in {MANIFEST}: it is no shard of these." for path in extra]


def _problem(folder: Path, record: dict[str, Any]) -> str | None:
    path = folder / record["name"]
    if not path.is_file():
        return f"'{path}' is missing."
    if (size := path.stat().st_size) != record["n_bytes"]:
        return f"'{path}' was cut off or changed: it has {size:,} bytes instead of {record['n_bytes']:,}."
    if file_sha256(path) != record["sha256"]:
        return f"'{path}' was changed: its bytes do not have the checksum of the manifest."
    return None


def source_of_shard(path: str | Path) -> str | None:
    """The file that a shard was made of; None for what is no shard."""
    record = _read_record(Path(path))
    return record.source if record else None


def is_untouched_shard(path: str | Path) -> bool:
    """Whether a file is a shard that nobody wrote to since it was made, as far as size and times tell.

    Its values were checked when it was made, so they need not be read through again. What is trusted: the size in its
    record, and that the file is not younger than the record. A flipped byte is found by `verify_shards` alone.
    """
    path = Path(path)
    record = _read_record(path)
    if record is None or not path.is_file():
        return False
    held = path.stat()
    return record.n_bytes == held.st_size and held.st_mtime_ns <= _record_of(path).stat().st_mtime_ns


def _require_same_kind(
    folder: Path, vocab: GeneVocab, settings: dict[str, Any], stems: set[str], census: dict[str, str]
) -> None:
    for name in sorted(_shards_there(folder)):
        record = _read_record(folder / name)
        if name.rpartition("-")[0] not in stems:
            wrong = f"'{name}' is of a file that is not among those to convert now"
        elif record is not None and census.get(name.rpartition("-")[0], record.source) != record.source:
            wrong = f"'{name}' was made of other cells of the Census"
        elif record is not None and record.vocabulary != vocab.fingerprint:
            wrong = f"'{name}' was made with other gene vocabulary"
        elif record is not None and _of_all(record.settings) != settings:
            wrong = f"'{name}' was made with other settings"
        else:
            continue
        raise DataError(
            f"'{folder}' holds shards of another kind: {wrong}.\n"
            "Choose another output folder, or delete this one."
        )


def _of_all(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all shards of a folder share; the species is each file's own."""
    return {name: value for name, value in settings.items() if name != "species"}


def _shard_names(sources: Sequence[Source]) -> list[str]:
    """A distinct stem for each source."""
    stems = [
        f"census-{source.organism}" if isinstance(source, CensusConfig) else Path(str(source)).stem
        for source in sources
    ]
    several = Counter(stems)
    return [
        stem if several[stem] == 1 else f"{stem}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
        for stem, source in zip(stems, sources, strict=True)
    ]


def _name_of(source: Source) -> str:
    """What a record calls a source: a file by its path, cells of the Census by what chose them."""
    if isinstance(source, CensusConfig):
        return f"census {source.model_dump_json(exclude={'uri', 'obs_columns'})}"
    return str(source)


def _content_sha256(source: Source) -> str:
    """The sha256 of what a source holds: a file's bytes, all files of a zarr store, the cells of the Census."""
    if isinstance(source, CensusConfig):
        return census_sha256(source)
    assert not isinstance(source, AnnData)
    path = local_path(source)
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for part in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{part.relative_to(path)} {file_sha256(part)}\n".encode())
    return digest.hexdigest()


def _convert_file(
    source: Source,
    stem: str,
    vocab: GeneVocab,
    config: DataConfig,
    folder: str,
    settings: dict[str, Any],
    selected_genes: bool,
) -> list[ShardRecord]:
    """Write all shards of one file that are not there yet."""
    store = open_store([source], vocab, config, selected_genes=selected_genes)
    (matrix,) = store.matrices
    columns, size = settings["obs_columns"], settings["cells_per_shard"]
    if missing := [name for name in columns or () if name not in matrix.obs_columns]:
        raise DataError(
            f"'{matrix.name}' has no obs column {', '.join(missing)}; there are: {', '.join(matrix.obs_columns)}."
        )
    records: list[ShardRecord | Future[ShardRecord]] = []
    with ThreadPoolExecutor(THREADS) as hashing:
        content = hashing.submit(_content_sha256, source)

        def record_of(target: Path, first: int, n_cells: int, n_entries: int) -> ShardRecord:
            sha256, n_bytes = file_sha256(target), target.stat().st_size
            record = ShardRecord(
                target.name,
                n_cells,
                n_entries,
                sha256,
                n_bytes,
                _name_of(source),
                content.result(),
                first,
                vocab.fingerprint,
                settings,
            )
            write_text(_record_of(target), json.dumps(asdict(record), indent=2) + "\n")
            return record

        for part, first in enumerate(range(0, store.n_cells, size)):
            target = Path(folder) / f"{stem}-{part:05d}.h5ad"
            finished = _read_record(target)
            if (
                finished is not None
                and _is_whole(target, finished)
                and finished.settings == settings
                and finished.source_sha256 == content.result()
            ):
                records.append(finished)
                continue
            (Path(folder) / MANIFEST).unlink(missing_ok=True)  # it speaks of what is replaced now
            _record_of(target).unlink(missing_ok=True)
            rows = np.arange(first, min(first + size, store.n_cells))
            obs = matrix.obs_rows(first, first + len(rows), columns)
            n_entries = write_shard(target, store, rows, obs, config.gene_column)
            records.append(hashing.submit(record_of, target, first, len(rows), n_entries))
    store.close()
    return [record.result() if isinstance(record, Future) else record for record in records]


def _record_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def _read_record(shard: Path) -> ShardRecord | None:
    """The record of a shard; None where there is none, or one that cannot be read."""
    try:
        return ShardRecord(**json.loads(_record_of(shard).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_whole(shard: Path, record: ShardRecord) -> bool:
    return shard.is_file() and shard.stat().st_size == record.n_bytes


def _shards_there(folder: Path) -> set[str]:
    """Names of the shards in a folder that have a record."""
    return {path.name.removesuffix(".json") for path in folder.glob("*.h5ad.json")}
