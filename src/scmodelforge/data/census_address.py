"""Where a Census is: the address of a release of the public one, or that of a copy."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from scmodelforge.config_census import CensusConfig
from scmodelforge.errors import DataError

# The directory that the package cellxgene-census reads too; both files are a few kB.
DIRECTORY = "https://census.cellxgene.cziscience.com/cellxgene-census/v1"
TIMEOUT = 30  # seconds


class Address(NamedTuple):
    """Where a Census is, what release that is ("" for a copy), and settings of TileDB to read it with."""

    uri: str
    release: str
    settings: dict[str, str]


def address_of(config: CensusConfig) -> Address:
    """Return the address of the copy that a config names, or look up that of the public release.

    Raises
    ------
    DataError
        If the directory of the public releases cannot be reached, or has no such release.
    """
    if config.uri is not None:
        remote = "://" in config.uri
        return Address(config.uri if remote else os.path.abspath(os.path.expanduser(config.uri)), "", {})
    releases, mirrors = _directory("release.json"), _directory("mirrors.json")
    release = config.version
    while isinstance(releases.get(release), str):  # stable and latest name a date
        release = releases[release]
    if release not in releases:
        there = sorted(releases, reverse=True)
        raise DataError(
            f"data.census.version: there is no Census '{config.version}'; there are {', '.join(there[:12])}"
            f"{' and older ones' if len(there) > 12 else ''}."
        )
    place, mirror = releases[release]["soma"], mirrors[mirrors["default"]]
    relative = place.get("relative_uri")
    uri = f"{mirror['base_uri'].rstrip('/')}/{relative.lstrip('/')}" if relative else place["uri"]
    region = mirror["region"] if relative else place["s3_region"]
    return Address(uri, release, {"vfs.s3.region": region, "vfs.s3.no_sign_request": "true"})


def _directory(name: str) -> dict[str, Any]:
    url = f"{DIRECTORY}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DataError(
            f"The list of the public Census releases cannot be read: {url} ({reason}).\n"
            "Check the connection, or name a copy of the Census that you have: data.census.uri."
        ) from error
