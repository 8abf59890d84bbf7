"""Embeddings of many files: one output for each, here or on a Dask cluster; what is done already is not done again."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scmodelforge.config import Config
from scmodelforge.data.shard_file import file_sha256
from scmodelforge.errors import DataError
from scmodelforge.files import ensure_writable, sole_writer, write_text
from scmodelforge.inference import EMBEDDING_KEY
from scmodelforge.inference_files import embed_file
from scmodelforge.models.bundle import load_model
from scmodelforge.models.hub import is_address, local_path
from scmodelforge.parallel import map_files

log = logging.getLogger(__name__)

DONE = "embedded.json"  # in the output folder: what each file of it was made from


def embed_files(
    sources: Sequence[str | Path],
    output: str | Path,
    model: str | Path,
    *,
    key_added: str = EMBEDDING_KEY,
    batch_size: int = 256,
    pooling: str | None = None,
    precision: str | None = None,
    config: Config | None = None,
    dask: str | None = None,
) -> dict[str, int]:
    """Write a copy of each .h5ad file with its embedding into the folder `output`, under the file's own name.

    A file that is there already, of the same source (by size and time of change), model and settings, stays.

    Parameters
    ----------
    model
        Checkpoint or model folder.
    key_added, batch_size, pooling, precision, config
        As `embed_file` takes them.
    dask
        Address of a Dask scheduler whose workers do it; they see the same paths.

    Returns
    -------
    Source → cells embedded now; files that were done already are not in it.

    Raises
    ------
    UserError
        If two files have one name, or files could not be embedded (the others are).
    """
    names = Counter(Path(source).name for source in sources)
    if twice := [name for name, n in names.items() if n > 1]:
        raise DataError(
            f"{names[twice[0]]} files are called '{twice[0]}', and their outputs would replace each other.\n"
            "Embed the files of each folder into a folder of its own."
        )
    folder = ensure_writable(output)
    for source in sources:
        target = folder / Path(source).name
        if target.exists() and Path(source).exists() and target.samefile(source):
            raise DataError(
                f"'{source}' would be replaced by its own output.\nChoose another output folder than that of the files."
            )
    made_by = {
        "model": _content_of(local_path(model)),
        "key": key_added,
        "pooling": pooling,
        "precision": precision,
    }
    if config is not None:
        made_by |= config.data.model_dump(mode="json", include={"layer", "gene_column", "species"})
    origin = {str(source): _origin(source, made_by) for source in sources}
    with sole_writer(folder):
        finished = _read_done(folder / DONE)
        todo = {
            source: folder / Path(source).name
            for source, now in origin.items()
            if finished.get(Path(source).name) != now or not (folder / Path(source).name).is_file()
        }
        if len(todo) < len(origin):
            log.info("%d of %d files are embedded already.", len(origin) - len(todo), len(origin))
        path = str(model) if is_address(model) else str(Path(model).absolute())
        held = path if dask else load_model(model)
        call = partial(
            embed_file,
            key_added=key_added,
            batch_size=batch_size,
            pooling=pooling,
            precision=precision,
            config=config,
        )

        def done(source: str, n_cells: int) -> None:
            finished[Path(source).name] = origin[source]
            write_text(folder / DONE, json.dumps(finished, indent=2) + "\n")
            log.info("%s: %s cells", todo[source], f"{n_cells:,}")

        jobs = {
            source: (os.path.abspath(source), os.path.abspath(target), held)
            for source, target in todo.items()
        }
        return map_files(call, jobs, dask=dask, done=done)


def files_of(patterns: Sequence[str]) -> list[str]:
    """The files that names and patterns name together, each once, in that order.

    Raises
    ------
    DataError
        If one of them names no file.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            what = (
                f"No file matches '{name}'"
                if glob.has_magic(name)
                else f"The data file '{name}' does not exist"
            )
            raise DataError(f"{what}.\nCheck the path (working folder: {Path.cwd()}).")
        found |= dict.fromkeys(matches)
    return list(found)


def _origin(source: str | Path, made_by: dict[str, Any]) -> dict[str, Any]:
    try:
        held = Path(source).stat()
    except OSError as error:
        raise DataError(f"The data file '{source}' cannot be read: {error.strerror}.") from error
    return {"n_bytes": held.st_size, "mtime_ns": held.st_mtime_ns, **made_by}


def _content_of(model: Path) -> dict[str, str]:
    """Checksums of a checkpoint, or of the files of a model folder."""
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else [model]
    return {path.name: file_sha256(path) for path in files}


def _read_done(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or not readable: all is done anew
        return {}
