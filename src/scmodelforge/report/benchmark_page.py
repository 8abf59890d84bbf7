"""The page of a benchmark: the model against its baselines, its cells, and what the figures rest on."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import numpy as np

from scmodelforge.config import Config
from scmodelforge.evaluation.seen import SEEN
from scmodelforge.report.benchmark_view import headlines, view_benchmarks
from scmodelforge.report.cells_view import CellsView, view_cells, with_layout
from scmodelforge.report.render import write_page
from scmodelforge.report.results import Results, read_results
from scmodelforge.report.run_page import shell_line

NO_CELLS = "The page was written from the results alone, so no cells are drawn."


def write_benchmark_report(
    results: str | Path,
    model: Any = None,
    data: Any = None,
    config: Config | None = None,
) -> Path:
    """Write the page of a results file beside it: metrics.json gets metrics.html.

    Parameters
    ----------
    results
        JSON that `benchmark` wrote.
    model, data, config
        As `benchmark` took them: at most 2,000 of the cells are embedded once more, and drawn. Without model and data
        the page has no cells.

    Raises
    ------
    UserError
        If the file holds no results, or model or data cannot be read.
    """
    path = Path(results)
    found = read_results(path)
    cells = (
        CellsView("", [], None, NO_CELLS) if model is None or data is None else _cells(model, data, config)
    )
    command = shell_line(found.command)
    made = "The command is not in these results." if found.command is None else "They were made from Python."
    return write_page(
        "benchmark.html",
        path.with_suffix(".html"),
        title=f"{short_name(found.model)} on {PurePath(found.data).name or 'data that are not named'}",
        kind="Benchmark",
        lede=f"{found.model} on {found.data or 'data that are not named'}.",
        written=None,
        headlines=headlines(found),
        views=view_benchmarks(found),
        results=found,
        notes=_notes(found),
        cells=cells,
        provenance=_provenance(found),
        command=command,
        command_words="" if command else made,
    )


def short_name(model: str) -> str:
    """What a model is called: of one in a run folder the name of the run, else the end of its path."""
    parts = PurePath(model).parts
    while len(parts) > 1 and parts[-1].endswith((".ckpt", "checkpoints", "model")):
        parts = parts[:-1]
    return parts[-1] if parts else model


def _notes(results: Results) -> list[str] | None:
    """The notes without the one that the page makes itself of the cells that the model has seen."""
    if results.notes is None or results.seen_cells is None:
        return results.notes
    return [note for note in results.notes if SEEN not in note]


def _cells(model: Any, data: Any, config: Config | None) -> CellsView:
    from scmodelforge.evaluation.shown_cells import shown_cells
    from scmodelforge.inference import as_bundle, open_for

    config = config or Config()
    bundle = as_bundle(model)
    store = open_for(bundle, data, config.data)
    rows = np.arange(store.n_cells)
    cells = shown_cells(bundle, store, rows, "cells of the benchmark", config, config.eval.batch_size)
    store.close()
    with_layout(cells)
    return view_cells(cells)


def _provenance(results: Results) -> list[tuple[str, str]]:
    rows = {
        "model": results.model,
        "data": results.data or "not recorded",
        "cells": "not recorded" if results.n_cells is None else f"{results.n_cells:,}",
        "seed": "not recorded" if results.seed is None else str(results.seed),
        **results.versions,
    }
    return list(rows.items())
