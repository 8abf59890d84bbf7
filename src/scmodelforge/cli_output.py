"""What commands print: results as text and tables, messages without the chatter of other libraries."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
import warnings
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from scmodelforge.evaluation.harness import BenchmarkResult, Evaluation
    from scmodelforge.report.run_folder import Run
    from scmodelforge.training.plan import Plan
    from scmodelforge.training.run import RunResult

TOKEN_BUDGETS = (8_192, 32_768, 131_072)  # for which `plan` tells the memory


def is_first_process() -> bool:
    """Whether this is the one of the processes of a run (torchrun, Lightning's DDP, srun) that speaks for all."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def finish_run(result: RunResult, again: str, overrides: list[str] | None) -> None:
    if result.performance and is_first_process():
        print(speed_line(result.performance))
    if result.interrupted:
        sets = "".join(f" --set {shlex.quote(override)}" for override in overrides or [])
        last = shlex.quote(str(result.checkpoint_dir / "last.ckpt"))
        if is_first_process():
            print(f"Stopped. To go on:\n  {again}{sets} --resume {last}")
        raise typer.Exit(130)
    if not is_first_process():
        return
    from scmodelforge.report.run_folder import read_run

    lines = validation_lines(read_run(result.run_dir))
    print(" ".join(["Done.", *lines[:1]]), *(f"      {line}" for line in lines[1:]), sep="\n")
    print(f"Best checkpoint: {result.checkpoint_dir / 'best.ckpt'}")
    print(f"Model folder:    {result.run_dir / 'model'}")
    print(f"Run folder:      {result.run_dir}")
    from scmodelforge.report.run_page import write_report

    print(f"Report:          {write_report(result.run_dir)}")


def validation_lines(run: Run) -> list[str]:
    """Validation figures of the best and of the last model, each with its epoch; one line if they are the same."""
    names = {run.best_step: "Best"} if run.best_step is not None else {}
    if run.last_step is not None:
        names[run.last_step] = "Best and last" if run.last_step in names else "Last"
    return [
        f"{name}, {run.epoch(step)}: "
        + "  ".join(f"{key} {value:.4g}" for key, value in run.validation(step).items())
        for step, name in names.items()
    ]


def speed_line(figures: dict[str, Any]) -> str:
    """Figures of a run in one line; what they are is in docs/performance.md."""
    parts = [
        f"{figures['cells_per_second']:,.0f} cells/s",
        f"{figures['tokens_per_second']:,.0f} tokens/s",
        f"padding {figures['padding_share']:.1%}",
        f"waiting for data {figures['data_wait_share']:.1%}",
    ]
    if "mfu" in figures:
        peak = figures["matmul_flops_per_second"] / 1e12
        parts.append(f"MFU {figures['mfu']:.1%} of {peak:,.0f} TFLOP/s (measured)")
    parts.append(f"peak memory {figures['peak_memory_gib']:.2f} GiB")
    parts.append(f"first step after {figures['first_step_seconds']:.1f} s")
    return "Speed: " + ", ".join(parts)


def print_results(evaluation: Evaluation) -> None:
    """A table for each benchmark with 95 % intervals, and the test against the best baseline below it.

    Notes were said when they arose (on stderr), and are in the JSON file and on the page.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, dataset in dict.fromkeys((result.benchmark, result.dataset) for result in evaluation.results):
        rows = [row for row in evaluation.results if (row.benchmark, row.dataset) == (name, dataset)]
        columns = [
            key
            for key, value in rows[0].metrics.items()
            if isinstance(value, float) and not key.endswith("_std")
        ]
        table = Table("method", *columns, title=f"{name} ({dataset})")
        for row in rows:
            table.add_row(row.method, *(_figure(row, key) for key in columns))
        facts = {key: value for key, value in rows[0].metrics.items() if not isinstance(value, float)}
        table.caption = ", ".join(f"{key} {value}" for key, value in facts.items())
        console.print(table)
        for row in rows:
            if row.comparison:
                console.print(_comparison_line(row.comparison))


def _figure(row: BenchmarkResult, key: str) -> str:
    """A figure with its 95 % interval, or else with its standard deviation."""
    if key not in row.metrics:
        return ""
    text = f"{row.metrics[key]:.3f}"
    if key in row.intervals:
        low, high = row.intervals[key]
        return rf"{text} \[{low:.3f}, {high:.3f}]"
    return f"{text} ± {row.metrics[f'{key}_std']:.3f}" if f"{key}_std" in row.metrics else text


def _comparison_line(comparison: dict[str, Any]) -> str:
    low, high = comparison["interval"]
    return (
        f"model − {comparison['baseline']}, {comparison['metric']}: {comparison['difference']:+.3f} "
        rf"\[{low:+.3f}, {high:+.3f}], p = {comparison['p_value']:.2g} (paired, same test cells)"
    )


def print_plan(plan: Plan) -> None:
    """What a run will cost, as a table."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for name, value in {
        "parameters": f"{plan.parameters:,}",
        f"tokens of a cell ({len(plan.tokens):,} sampled)": f"mean {plan.tokens.mean():,.0f}, "
        f"median {np.median(plan.tokens):,.0f}, max {plan.tokens.max():,}",
        "steps": f"{plan.optimizer_steps:,} ({plan.steps_per_epoch:,} batches an epoch"
        + (f", {plan.processes} processes)" if plan.processes > 1 else ")"),
        "FLOPs": f"{_si(plan.flops_per_cell)} a cell, {_si(plan.flops_per_epoch)} an epoch",
        "memory: weights, gradients, optimizer": _bytes(plan.fixed_bytes),
        f"memory: a batch of {plan.batch_tokens:,} tokens": f"{_bytes(plan.batch_bytes)} by formula"
        + ("" if plan.batch_bytes_measured is None else f", {_bytes(plan.batch_bytes_measured)} measured"),
        **{
            f"memory: all, {budget:,} tokens a batch": _bytes(
                plan.fixed_bytes + budget * plan.bytes_per_token
            )
            for budget in TOKEN_BUDGETS
        },
        "memory: free on this machine": _bytes(plan.available_bytes),
    }.items():
        table.add_row(name, value)
    if plan.seconds is not None:
        figures = plan.performance
        table.add_row("measured steps", f"{figures['steps']} of {figures['seconds_per_step']:.3g} s")
        table.add_row(
            "speed of one process", speed_line(figures).removeprefix("Speed: ").partition(", first")[0]
        )
        table.add_row("time to finish", _duration(plan.seconds))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _si(number: float) -> str:
    """A number with the prefix of its thousands, e.g. 3.2 G."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = min(int(math.log10(max(number, 1)) // 3), len(prefixes) - 1)
    return f"{number / 1000**power:.3g} {prefixes[power]}FLOP"


def _bytes(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


class _MessageFormat(logging.Formatter):
    """Warnings say that they are; everything else is the sentence alone."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


class _Once(logging.Filter):
    """Nothing is said twice: each embedding of a benchmark meets the same unlabelled cells."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


def set_up_messages() -> None:
    """Our own messages go to stderr; what other libraries chat about stays out."""
    handler = logging.StreamHandler()
    handler.setFormatter(_MessageFormat("%(message)s"))
    handler.addFilter(_Once())
    ours = logging.getLogger("scmodelforge")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    ours.propagate = False
    warnings.filterwarnings(
        "ignore", module=r"(lightning|torch|anndata|scanpy|umap|numba|torchmetrics|sklearn)\b"
    )
