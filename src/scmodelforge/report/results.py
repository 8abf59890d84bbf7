"""The results that `benchmark --output` writes as JSON, read for a page.

What is optional may be missing: results of an earlier version, or of a benchmark without intervals, are shown as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from scmodelforge.errors import DataError


class Comparison(BaseModel):
    """The model against its best baseline, on the same cells."""

    metric: str
    baseline: str
    difference: float
    interval: tuple[float, float]
    p_value: float


class MethodResult(BaseModel):
    """One method in one benchmark."""

    benchmark: str
    dataset: str = ""
    method: str
    is_baseline: bool | None = None
    metrics: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    comparison: Comparison | None = None
    details: dict[str, Any] = {}

    @property
    def is_rival(self) -> bool:
        """Whether the model has to beat it; where this is not written, all but "model" are."""
        return self.method != "model" if self.is_baseline is None else self.is_baseline


class SeenCells(BaseModel):
    """Cells of the benchmark that the model was trained on."""

    n: int
    share: float


class Results(BaseModel):
    """The whole file."""

    model: str
    data: str = ""
    n_cells: int | None = None
    seed: int | None = None
    command: list[str] | None = None
    versions: dict[str, str] = {}
    notes: list[str] | None = None
    seen_cells: SeenCells | None = None
    results: list[MethodResult]


def is_results(path: Path) -> bool:
    """Whether a JSON file holds benchmark results at all."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and isinstance(content.get("results"), list)


def read_results(path: str | Path) -> Results:
    """Read a results file.

    Raises
    ------
    DataError
        If it is missing, no JSON, or holds no benchmark results; what is wrong is named.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"The results file '{path}' does not exist.")
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' holds no benchmark results: it is no text file.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"'{path}' holds no benchmark results: {first['msg']}"
            + (f" (at {place})." if place else ".")
            + "\n"
            "Give the file that 'scmodelforge benchmark --output FILE' wrote."
        ) from error
