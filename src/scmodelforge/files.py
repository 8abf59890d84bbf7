"""Files are written whole or not at all: a temporary name beside the target, fsync, then rename."""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scmodelforge.errors import DataError, ModelError, UserError

log = logging.getLogger(__name__)

URL = re.compile(r"\w[\w+.-]+:/")  # a Path folds the two slashes into one


def require_data(*paths: str | Path) -> None:
    """Raise `DataError` if one of these files is not there, naming the one most like it; URLs are not looked up."""
    for path in map(Path, paths):
        if URL.match(str(path)) or os.path.exists(
            path
        ):  # path.exists() raises where a folder may not be read
            continue
        others = {other.stem: other for other in path.parent.glob("*.h5ad")}
        near = difflib.get_close_matches(path.stem, others, n=1)
        hint = f" Did you mean '{others[near[0]]}'?" if near else ""
        raise DataError(
            f"The data file '{path}' does not exist.{hint}\nCheck the path (working folder: {Path.cwd()})."
        )


def require_model(path: str | Path) -> None:
    """Raise `ModelError` if no checkpoint or model folder of this name is there; the Hub is not asked."""
    if not str(path).startswith("hf:/") and not os.path.exists(path):
        raise ModelError(
            f"The checkpoint or model folder '{path}' does not exist (working folder: {Path.cwd()}).\n"
            "A run of 'scmodelforge train' or 'finetune' leaves RUN/model and RUN/checkpoints/best.ckpt; give one of "
            "them, or hf://USER/NAME of the Hub."
        )


def require_writable(folder: str | Path) -> Path:
    """Return `folder` if it can be created and written, without creating anything.

    Raises
    ------
    UserError
        If the nearest existing parent is no folder, or may not be written.
    """
    folder = Path(folder)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "may not be written" if parent.is_dir() else "is a file"
        raise UserError(
            f"Cannot write into the folder '{folder}': '{parent}' {why}.\n"
            "Choose another output folder, or change its permissions."
        )
    return folder


def ensure_writable(folder: str | Path) -> Path:
    """Create `folder` if needed and return it; raise `UserError` if no file can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (FileExistsError, NotADirectoryError) as error:
        file = next(part for part in (folder, *folder.parents) if part.exists())
        raise UserError(
            f"Cannot write into the folder '{folder}': '{file}' is a file.\nChoose another output folder."
        ) from error
    except OSError as error:
        raise UserError(
            f"Cannot write into the folder '{folder}': {error.strerror or error}.\n"
            "Choose another output folder, or change its permissions."
        ) from error


def require_target(target: str | Path, suffix: str = "") -> Path:
    """Return `target` if a file can be written under this name, which must end with `suffix`; writes nothing.

    Commands ask this before long work, so that its result is not lost for want of a place.

    Raises
    ------
    UserError
        If it is a folder, has another suffix, or its folder cannot be written.
    """
    target = Path(target)
    if target.is_dir():
        raise UserError(f"'{target}' is a folder; the output must be the name of a file in it.")
    if not target.name.endswith(suffix):
        raise UserError(
            f"The output is an {suffix} file, and '{target}' is the name of another kind.\n"
            f"Give it a name that ends with {suffix}, such as '{target.with_suffix(suffix)}'."
        )
    require_writable(target.parent)
    return target


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` when the block ends without an error.

    The temporary file lies in the target's folder, so the rename is atomic; it is removed on error.

    Raises
    ------
    UserError
        If the folder cannot be created or written, or `target` is a folder.
    """
    target = require_target(target)
    ensure_writable(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Let one process at a time write into `folder`; others wait. What a killed one left half-written is removed.

    The lock is on the folder itself and is gone when the process is. File systems without locks go without.
    """
    handle = os.open(folder, os.O_RDONLY)
    import fcntl  # not on Windows

    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process that writes into '%s'.", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # NFS may refuse
            log.debug("'%s' cannot be locked.", folder)
        for left_over in Path(folder).glob(".*.tmp"):
            left_over.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error; else it is removed.

    Raises
    ------
    UserError
        If `target` exists and is not an empty folder, or its parent cannot be created or written.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "exists already and is not empty" if target.is_dir() else "is a file"
        raise UserError(f"'{target}' {what}. Choose another output folder.")
    parent = ensure_writable(target.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=parent) as outer:
        temporary = Path(outer) / target.name
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rmdir()
        shutil.move(temporary, target)


def write_text(target: str | Path, text: str) -> None:
    """Write `text` to `target` atomically, as UTF-8."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
