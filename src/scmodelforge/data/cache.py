"""`data.cache_dir`: files that are slow to read cell by cell are converted into shards once, and read from there.

A file's shards lie under a name made of its bytes, the vocabulary and the settings that shape them, so a changed file
or another vocabulary gets new ones, and runs share what is equal. Nothing is ever deleted here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from scmodelforge.config import DataConfig
from scmodelforge.data.matrix import Matrix
from scmodelforge.data.remote import Remote
from scmodelforge.data.shard_file import file_sha256
from scmodelforge.data.shards import (
    is_untouched_shard,
    shard_settings,
    shard_vocabulary,
    write_shards,
)
from scmodelforge.data.sources import Source, local_path, open_matrix
from scmodelforge.data.species import named_species
from scmodelforge.errors import DataError
from scmodelforge.files import ensure_writable, write_text
from scmodelforge.genes.vocab import GeneVocab
from scmodelforge.manifest import MANIFEST, shard_paths

log = logging.getLogger(__name__)

FEW_CELLS = 10_000  # a file with fewer is read quickly enough to say nothing


def cached_sources(
    sources: Sequence[Source], vocab: GeneVocab, config: DataConfig, selected_genes: bool = False
) -> list[Source]:
    """Return what to train from: with `data.cache_dir`, shards in the place of .h5ad files that cannot be mapped.

    Parameters
    ----------
    vocab, selected_genes
        As `open_store` takes them.

    Raises
    ------
    UserError
        If the cache cannot be written, or a file cannot be converted.
    """
    if config.cache_dir is None:
        return list(sources)
    cache = ensure_writable(Path(config.cache_dir).expanduser())
    found: list[Source] = []
    for source in sources:
        if isinstance(source, str | Path | Remote) and local_path(source).is_file():
            matrix = open_matrix(source, config.layer)
            matrix.close()
            if not matrix.is_mapped:
                found += _shards_of(source, matrix, cache, vocab, config, selected_genes)
                continue
        found.append(source)
    return found


def _shards_of(
    source: str | Path | Remote,
    matrix: Matrix,
    cache: Path,
    vocab: GeneVocab,
    config: DataConfig,
    selected_genes: bool,
) -> list[Path]:
    (species,) = named_species([source], config)
    shaping = [
        _known_sha256(local_path(source), cache),
        shard_vocabulary(vocab).fingerprint,
        shard_settings(config) | {"species": species},
    ]
    key = hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:20]
    folder = cache / "shards" / key
    if not _is_complete(folder):
        log.info("'%s' (%s) is converted once into shards: %s", source, matrix.storage, folder)
        write_shards([source], vocab, config, folder, selected_genes=selected_genes)
    else:
        log.info("'%s' is read from its shards: %s", source, folder)
    return shard_paths(folder)


def _is_complete(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return all(map(is_untouched_shard, shard_paths(folder)))
    except DataError:  # a damaged manifest: made again
        return False


def _known_sha256(path: Path, cache: Path) -> str:
    """The sha256 of a file, remembered while its size and time of change stay the same."""
    held, place = path.expanduser().stat(), str(path.expanduser().resolve())
    note = cache / "checksums" / f"{hashlib.sha256(place.encode()).hexdigest()[:20]}.json"
    now = {"path": place, "n_bytes": held.st_size, "mtime_ns": held.st_mtime_ns}
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if {name: known[name] for name in now} == now:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not known, or not readable: taken anew
    sha256 = file_sha256(path.expanduser())
    write_text(note, json.dumps({**now, "sha256": sha256}) + "\n")
    return sha256


def warn_if_slow(matrices: Sequence[Matrix]) -> None:
    """Name in one warning the files whose cells cost decompression, whole dense rows or a conversion."""
    slow = [matrix for matrix in matrices if _is_slow(matrix)]
    if slow:
        others = f" and {len(slow) - 1:,} more" if len(slow) > 1 else ""
        log.warning(
            "'%s'%s (%s) cannot be mapped into memory, so training may wait for its cells. Set data.cache_dir: "
            "FOLDER to convert such files once on the way, or do it with 'scmodelforge shard --config FILE --output "
            "FOLDER' and train on the shards.",
            slow[0].name,
            others,
            slow[0].storage,
        )


def _is_slow(matrix: Matrix) -> bool:
    plain = matrix.storage.startswith("CSR") and "uncompressed" in matrix.storage
    is_file = isinstance(matrix.source, str | Path | Remote) and matrix.shuffle_buffer is None
    return is_file and not matrix.is_mapped and not plain and matrix.n_cells >= FEW_CELLS
