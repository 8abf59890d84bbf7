"""Which shards a folder holds: `manifest.json`, written when all of them are there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scmodelforge.errors import DataError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises
    ------
    DataError
        If there is none, it cannot be read, or it is of another version.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        names = [record["name"] for record in manifest["shards"]]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"'{folder}' is no folder of shards: it has no {MANIFEST}. 'scmodelforge shard' writes one when all shards "
            "are there; start it again with the same options to go on."
        ) from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is damaged; start 'scmodelforge shard' again.") from error
    if version != FORMAT_VERSION:
        raise DataError(f"'{folder}' has shards of format {version}, this version reads {FORMAT_VERSION}.")
    if not names:
        raise DataError(f"'{path}' names no shard; start 'scmodelforge shard' again.")
    return manifest


def shard_paths(folder: str | Path) -> list[Path]:
    """The shards of a folder, in the order of its manifest; raises as `read_manifest` does."""
    return [Path(folder) / record["name"] for record in read_manifest(folder)["shards"]]


def shards_or_problem(folder: str) -> tuple[list[str], str | None]:
    """The shards of a folder, and None; or what keeps the folder from being one, in half a sentence."""
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        example = os.path.join(folder, "*.h5ad")
        return (
            [],
            f"'{folder}' is a folder without {MANIFEST}, so not of shards; name its files, for example {example}",
        )
    try:
        paths = [str(path) for path in shard_paths(folder)]
    except DataError as error:
        return [], str(error)
    if gone := [path for path in paths if not os.path.exists(path)]:
        return [], f"the shard '{gone[0]}' is missing; start 'scmodelforge shard' again"
    return paths, None
