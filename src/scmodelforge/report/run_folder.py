"""What a run left behind, read for a page: figures, curves, genes, cells and benchmark results.

A run may have been stopped, moved, or written by another version, so whatever is missing is None, and the page says so.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from scmodelforge.errors import DataError, UserError
from scmodelforge.report.results import Results, is_results, read_results

if TYPE_CHECKING:
    from anndata import AnnData

MATCHES = ("Ensembl id", "symbol", "previous symbol", "repaired name", "other case", "own name")
NOT_RESULTS = ("run.json",)
COUNTS = ("val_n_asked", "val_n_values")  # what a validation figure rests on, no figures themselves


@dataclass(frozen=True)
class GeneMatches:
    """How the genes of the data met the vocabulary: number of genes by reason, most first."""

    matched: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes
    ----------
    folder
        Where it is.
    config, config_text
        config.yaml, as a tree and as written.
    record
        run.json.
    metrics
        metrics.csv: float64 (n, 2) of optimizer step and value, by name of the figure; cells left empty are no values.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    record: dict[str, Any]
    metrics: dict[str, np.ndarray] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def labels(self) -> dict[str, Any] | None:
        """Key, task and classes of a fine-tuned model."""
        return self.record.get("model", {}).get("labels")

    def curve(self, name: str, label: str, look: str) -> Any:
        """A column of metrics.csv as a curve; None if there is none."""
        from scmodelforge.report.charts import Curve

        if name not in self.metrics:
            return None
        return Curve(label, self.metrics[name][:, 0], self.metrics[name][:, 1], look)

    @property
    def best_step(self) -> float | None:
        """Step of the best model by what training watches: macro F1 of classes, else the loss."""
        watched = "val_macro_f1" if "val_macro_f1" in self.metrics else "val_loss"
        values = self.metrics.get(watched)
        if values is None or not np.isfinite(values[:, 1]).any():
            return None
        place = np.nanargmax(values[:, 1]) if watched == "val_macro_f1" else np.nanargmin(values[:, 1])
        return float(values[place, 0])

    @property
    def last_step(self) -> float | None:
        """Step of the last validation; None if there was none."""
        values = self.metrics.get("val_loss")
        return None if values is None else float(values[-1, 0])

    def epoch(self, step: float) -> str:
        """The epoch of a step, counted from 1, in words; where it is not known, the step."""
        epochs = dict(self.metrics["epoch"].tolist()) if "epoch" in self.metrics else {}
        return f"epoch {int(epochs[step]) + 1}" if step in epochs else f"step {int(step):,}"

    def validation(self, step: float | None) -> dict[str, float]:
        """The validation figures of a step, without what only counts."""
        return {
            name: float(values[values[:, 0] == step, 1][0])
            for name, values in self.metrics.items()
            if name.startswith("val_") and name not in COUNTS and (values[:, 0] == step).any()
        }

    @cached_property
    def genes(self) -> GeneMatches | None:
        """Summary of gene_match.csv."""
        path = self.folder / "gene_match.csv"
        if not path.exists():
            return None
        counts: dict[str, int] = {}
        with open(path, newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                counts[row.get("reason", "")] = counts.get(row.get("reason", ""), 0) + 1
        ordered = sorted(counts.items(), key=lambda pair: -pair[1])
        return GeneMatches(
            {reason: n for reason, n in ordered if reason in MATCHES},
            {reason: n for reason, n in ordered if reason not in MATCHES},
        )

    @cached_property
    def cells(self) -> AnnData | None:
        """The validation cells that training left to look at."""
        path = self.folder / "validation_cells.h5ad"
        if not path.exists():
            return None
        from anndata import read_h5ad

        try:
            return read_h5ad(path)
        except OSError as error:
            raise DataError(
                f"Cannot read '{path}': {error}.\nDelete it to write the report without it."
            ) from error

    @cached_property
    def benchmarks(self) -> list[tuple[Path, Results]]:
        """Results of `benchmark --output` that lie in the folder."""
        found = [path for path in sorted(self.folder.glob("*.json")) if path.name not in NOT_RESULTS]
        return [(path, read_results(path)) for path in found if is_results(path)]


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises
    ------
    UserError
        If it is none, or one of its files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"The run folder '{folder}' does not exist, or is a file. Give the folder that a run wrote."
        )
    missing = [name for name in ("run.json", "config.yaml") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"'{folder}' is no run folder: it has no {' and no '.join(missing)}.\n"
            "Give the folder that train or finetune named at its end (training.run_dir)."
        )
    try:
        config_text = (folder / "config.yaml").read_text(encoding="utf-8")
        config, record = (
            yaml.safe_load(config_text),
            json.loads((folder / "run.json").read_text(encoding="utf-8")),
        )
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"A file in the run folder '{folder}' is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(record, dict):
        raise UserError(f"'{folder}' is no run folder: run.json and config.yaml must hold keys and values.")
    return Run(folder, config, config_text, record, _read_metrics(folder / "metrics.csv"))


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    columns: dict[str, list[tuple[float, float]]] = {}
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            try:
                step = float(row["step"])
                for name, value in row.items():
                    if value and name != "step":
                        columns.setdefault(name, []).append((step, float(value)))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"'{path}' is damaged: a row without a step, or with text for a number."
                ) from error
    return {name: np.array(pairs) for name, pairs in columns.items()}
