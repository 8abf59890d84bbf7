"""What a model computes for a file, kept on disk as it comes, so that stopped work goes on where it was.

Beside the output lies a folder `OUTPUT.partial` while it is made: `rows.f32`, to which rows are added, and
`record.json`, which says how many of them are safe and what they are of. Memory holds one batch of rows. The record is
written every half minute; a run that is stopped before the first one leaves nothing.
"""

from __future__ import annotations

import functools
import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scmodelforge.errors import DataError
from scmodelforge.files import ensure_writable, sole_writer, write_text
from scmodelforge.inference_batches import Computed

log = logging.getLogger(__name__)

ROWS, RECORD = "rows.f32", "record.json"
SECONDS = 30.0  # between two records: what a killed run can lose


@contextmanager
def kept_rows(
    output: Path,
    shape: tuple[int, int],
    made_of: Callable[[], dict[str, Any]],
    compute: Callable[[int], Iterator[Computed]],
) -> Iterator[Computed]:
    """Compute the rows that `output` is to hold, or those that are missing, and yield all, mapped into memory.

    When the block ends without an error they are removed, else they are kept.

    Parameters
    ----------
    shape
        Number of rows, and their width.
    made_of
        What decides over the rows, as plain types: rows of anything else are computed anew. Asked for long work only.
    compute
        Called with the number of rows that are there already; gives the others, some at a time.

    Raises
    ------
    UserError
        If the folder or rows cannot be written.
    """
    folder = output.with_name(f"{output.name}.partial")
    made_of = functools.cache(made_of)
    ensure_writable(folder)
    with sole_writer(folder):
        ensure_writable(folder)  # the process that was waited for has removed it
        for left_over in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
            left_over.unlink(missing_ok=True)
        complete = False
        try:
            n_empty = _write_missing(folder, shape, made_of, compute)
            yield Computed(np.asarray(np.memmap(folder / ROWS, np.float32, "r", shape=shape)), n_empty)
            complete = True
        finally:
            if complete or not (folder / RECORD).exists():
                shutil.rmtree(folder)
            else:
                log.info("What is done is kept in '%s'; start again to go on.", folder)


def _write_missing(
    folder: Path,
    shape: tuple[int, int],
    made_of: Callable[[], dict[str, Any]],
    compute: Callable[[int], Iterator[Computed]],
) -> int:
    """Add the rows that are not there yet; returns how many cells of all are empty."""
    n_rows, width = shape
    done, n_empty = _rows_there(folder, shape, made_of)
    with open(folder / ROWS, "ab") as file:
        file.truncate(done * width * 4)
        recorded, rows_then = time.monotonic(), done
        for part in compute(done):
            _write(file, part.values)
            done, n_empty = done + len(part.values), n_empty + part.n_empty
            seconds = time.monotonic() - recorded
            if seconds < SECONDS:
                continue
            os.fsync(file.fileno())
            record = {**made_of(), "shape": list(shape), "rows": done, "n_empty": n_empty}
            write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
            rate = (done - rows_then) / max(seconds, 1e-9)
            log.info("%s of %s cells (%s a second)", f"{done:,}", f"{n_rows:,}", f"{rate:,.0f}")
            recorded, rows_then = time.monotonic(), done
    return n_empty


def _write(file: Any, values: np.ndarray) -> None:
    try:
        file.write(np.ascontiguousarray(values, dtype=np.float32).data)
        file.flush()
    except OSError as error:
        raise DataError(f"'{file.name}' cannot be written: {error.strerror or error}.") from error


def _rows_there(
    folder: Path, shape: tuple[int, int], made_of: Callable[[], dict[str, Any]]
) -> tuple[int, int]:
    """How many rows an earlier run left that can be used, and how many of their cells are empty."""
    if not (folder / RECORD).exists():
        return 0, 0
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        rows, n_empty = int(record.pop("rows")), int(record.pop("n_empty"))
        whole = (folder / ROWS).stat().st_size >= rows * shape[1] * 4
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        record, rows, n_empty, whole = {}, 0, 0, False
    now = {**made_of(), "shape": list(shape)}
    if whole and record == now:
        log.info("Going on after %s of %s cells, which '%s' holds.", f"{rows:,}", f"{shape[0]:,}", folder)
        return rows, n_empty
    other = [name for name in now if record.get(name) != now[name]] if whole else []
    why = f"is of another {', '.join(other)}" if other else "is damaged"
    log.warning("'%s' %s, so all cells are computed anew.", folder, why)
    (folder / RECORD).unlink()
    return 0, 0
