"""report.html of a run: what it learned, how fast, its validation cells, what was dropped, and how to repeat it."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePath
from typing import Any

from scmodelforge.evaluation.shown_cells import write_cells
from scmodelforge.report.benchmark_view import Headline, heading, headlines, pretty, view_benchmarks
from scmodelforge.report.cells_view import CellsView, view_cells, with_layout
from scmodelforge.report.charts import LEAST_SPAN, Curve, LineChart, line_chart, number, smoothed
from scmodelforge.report.render import write_page
from scmodelforge.report.run_folder import COUNTS, Run, read_run

SHARES = ("accuracy", "f1", "auroc")  # ends of the names of figures between 0 and 1
NO_CURVES = ("val_loss", *COUNTS)
OWN_COMMANDS = ("scmodelforge", "cli.py", "__main__.py")


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into a run folder, from what the run left there.

    Parameters
    ----------
    run_dir
        Folder of a run of `train` or `finetune`, finished or stopped.

    Returns
    -------
    Path of the page: one file, which needs no network.

    Raises
    ------
    UserError
        If the folder is no run folder, or a file in it is damaged.
    """
    run = read_run(run_dir)
    results = [(path.name, found) for path, found in run.benchmarks]
    learning, single = learning_charts(run)
    return write_page(
        "run.html",
        run.folder / "report.html",
        title=run.name,
        kind=kind_of(run),
        lede=_lede(run),
        interrupted=bool(run.record.get("interrupted")),
        written=run.record.get("written"),
        headlines=headline_figures(run),
        learning=learning,
        single=single,
        speed=speed_charts(run),
        frozen=frozen_until(run),
        log_every=(run.config.get("training") or {}).get("log_every_n_steps"),
        performance=run.record.get("performance") or {},
        cells=_cells(run),
        label_key=(run.labels or {}).get("key"),
        benchmarks=[(name, found, view_benchmarks(found), headlines(found)) for name, found in results],
        notes=run.record.get("notes"),
        genes=run.genes,
        data=run.record.get("data", {}),
        config_text=run.config_text,
        provenance=provenance(run),
        **command_of(run),
    )


def kind_of(run: Run) -> str:
    """What kind of run it is, as a heading."""
    if run.labels:
        return f"Fine-tuning for {run.labels['key']}"
    return "Fine-tuning" if "finetune" in run.record.get("command", [])[1:2] else "Pretraining"


def headline_figures(run: Run) -> list[Headline]:
    """The figures that a reader asks for first."""
    figures = []
    best, last = run.validation(run.best_step), run.validation(run.last_step)
    for name, label in (
        ("val_macro_f1", "validation macro F1"),
        ("val_accuracy", "validation accuracy"),
        ("val_loss", "validation loss"),
        ("val_perplexity", "validation perplexity"),
    ):
        if run.best_step is not None and name in best:
            when = f"best model, {run.epoch(run.best_step)}"
            same = run.best_step == run.last_step or name not in last
            at_end = "" if same else f"; {number(last[name])} at the end"
            figures.append(Headline(label, number(best[name]), when + at_end))
    performance, data, model = (run.record.get(key) or {} for key in ("performance", "data", "model"))
    if "n_train" in data:
        figures.append(
            Headline("training cells", number(data["n_train"]), f"{number(data['n_val'])} validate")
        )
    if "n_parameters" in model:
        figures.append(
            Headline("parameters", number(model["n_parameters"]), f"{number(model['n_genes'])} genes")
        )
    if "cells_per_second" in performance:
        rate, tokens = performance["cells_per_second"], performance["tokens_per_second"]
        figures.append(Headline("cells per second", number(rate), f"{number(tokens)} tokens per second"))
        wait, padding = performance["data_wait_share"], performance["padding_share"]
        figures.append(Headline("waiting for data", f"{100 * wait:.1f} %", f"padding {100 * padding:.1f} %"))
        memory = performance["peak_memory_gib"]
        figures.append(
            Headline("peak memory", f"{memory:.2f} GiB", str(performance.get("peak_memory_of", "")))
        )
    if "mfu" in performance:
        figures.append(
            Headline("model FLOPs utilization", f"{100 * performance['mfu']:.1f} %", performance["mfu_of"])
        )
    return figures


def learning_charts(run: Run) -> tuple[list[LineChart], list[Headline]]:
    """Losses, every validation figure, learning rate and gradient norm; figures of one step only are no charts."""
    train, validation = (
        run.curve("train_loss", "training", "train"),
        run.curve("val_loss", "validation", "val"),
    )
    losses = []
    if train is not None:
        mean = smoothed(train.y)
        if mean is not None:
            losses = [Curve("training", train.x, train.y, "train", faint=True)]
            train = Curve("training (running mean)", train.x, mean, "train")
        losses.append(train)
    losses += [validation] if validation is not None else []
    charts: dict[str, tuple[list[Curve], dict[str, Any]]] = {"Loss": (losses, {})}
    for name in run.metrics:
        if name.startswith("val_") and name not in NO_CURVES:
            title = heading(name.removeprefix("val_"))
            charts[title] = [run.curve(name, "validation", "val")], span_of(name)
    for name, title in (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm")):
        if name in run.metrics:
            charts[title] = [run.curve(name, title.lower(), "train")], {"from_zero": True}
    drawn, single = [], []
    for title, (curves, how) in charts.items():
        chart = line_chart(title, curves, **how)
        if chart is not None:
            drawn.append(chart)
            continue
        for curve in curves:
            name = f"{title}, {curve.name}" if len(curves) > 1 else title
            single.append(Headline(name, number(float(curve.y[-1])), f"at step {int(curve.x[-1]):,}"))
    return drawn, single


def span_of(name: str) -> dict[str, Any]:
    """How wide the axis of a figure must be for `line_chart`: of shares, so that noise does not look like a trend."""
    return {"least_span": LEAST_SPAN} if name.endswith(SHARES) else {}


def frozen_until(run: Run) -> int | None:
    """The last logged step at which the backbone was frozen and read no tokens; None if it never was."""
    cells, tokens = run.metrics.get("cells_per_second"), run.metrics.get("tokens_per_second")
    if cells is None or tokens is None or not run.labels or not (tokens[:, 1] == 0).any():
        return None
    return int(tokens[tokens[:, 1] == 0, 0].max())


def speed_charts(run: Run) -> list[LineChart]:
    """Rates, shares and memory over the steps."""
    asked: tuple[tuple[str, bool, list[tuple[str, str, str]]], ...] = (
        ("Cells per second", False, [("cells_per_second", "cells/s", "train")]),
        ("Tokens per second", False, [("tokens_per_second", "tokens/s", "train")]),
        (
            "Waiting and padding",
            True,
            [("data_wait_share", "waiting for data", "train"), ("padding_share", "padding", "val")],
        ),
        ("Model FLOPs utilization", True, [("mfu", "MFU", "train")]),
        ("Peak memory, GiB", False, [("peak_memory_gib", "memory", "train")]),
    )
    charts = []
    for title, percent, columns in asked:
        curves = [curve for column in columns if (curve := run.curve(*column)) is not None]
        charts.append(line_chart(title, curves, from_zero=True, percent=percent))
    return [chart for chart in charts if chart is not None]


def provenance(run: Run) -> list[tuple[str, str]]:
    """Versions, machine, data and seed, as rows of a table."""
    record = run.record
    data, hardware = record.get("data") or {}, record.get("hardware") or {}
    rows = {
        "run folder": str(run.folder),
        "written": record.get("written"),
        "seed": record.get("seed"),
        "data": ", ".join(map(str, (data.get("files") or [])[:5]))
        + (f" and {len(data['files']) - 5:,} more" if len(data.get("files") or []) > 5 else ""),
        "training cells (sha256)": data.get("train_cells"),
        "vocabulary (sha256)": data.get("vocabulary"),
        "git commit": record.get("git") or "none: the working folder is no git repository",
        "platform": hardware.get("platform"),
        "GPUs": ", ".join(hardware.get("gpus") or []) or "none",
        "CPU threads": hardware.get("cpu_threads"),
        **(record.get("versions") or {}),
    }
    return [(name, str(value) if value not in (None, "") else "not recorded") for name, value in rows.items()]


def shell_line(command: list[str] | None) -> str | None:
    """A command line of ours as it is typed; None if this was none (Python, a notebook)."""
    if not command or PurePath(command[0]).name not in OWN_COMMANDS:
        return None
    return shlex.join(["scmodelforge", *map(str, command[1:])])


def command_of(run: Run) -> dict[str, Any]:
    """The commands to repeat the run, in their order, or why there is none."""
    typed = [*run.record.get("earlier_commands", []), run.record.get("command")]
    lines = list(dict.fromkeys(line for line in map(shell_line, typed) if line is not None))
    if lines:
        words = "The run was resumed. These commands made it, in this order." if len(lines) > 1 else ""
        if None in map(shell_line, typed):
            words += " Other parts of it were started from Python."
        return {
            "command": "\n".join(lines),
            "command_folder": run.record.get("folder"),
            "command_words": words,
        }
    files = (run.record.get("data") or {}).get("files") or []
    words = "The run was started from Python, not by a command."
    if "AnnData" in files:
        return {
            "command": None,
            "command_folder": None,
            "command_words": f"{words} Its cells were in memory.",
        }
    words += " Its config.yaml holds every setting, so a pretraining can be repeated from it."
    line = shlex.join(["scmodelforge", "train", "--config", str(run.folder / "config.yaml")])
    return {"command": None if run.labels else line, "command_folder": None, "command_words": words}


def _lede(run: Run) -> str:
    """The model and its task in a sentence."""
    model = run.config.get("model") or {}
    parts = [
        f"{pretty(str(model.get('architecture', 'model of unknown architecture')))}",
        f"{model.get('num_layers', '?')} layers of width {model.get('hidden_dim', '?')}",
    ]
    if not run.labels:
        parts.append(pretty(str(model.get("pretraining_task", "unknown task"))))
    strategy = (run.config.get("tokenizer") or {}).get("strategy")
    if strategy:
        parts.append(f"{pretty(str(strategy))} tokens")
    sentence = ", ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _cells(run: Run) -> CellsView:
    if run.cells is None:
        n_val = (run.record.get("data") or {}).get("n_val")
        why = (
            "No cells validate in this run (data.split.val_split is 0), so none are drawn."
            if n_val == 0
            else "The run left no validation_cells.h5ad (it was stopped before its end, or is of an earlier version)."
        )
        return CellsView("", [], None, why)
    if with_layout(run.cells):
        write_cells(run.cells, run.folder / "validation_cells.h5ad")
    return view_cells(run.cells)
