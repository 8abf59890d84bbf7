"""What all benchmarks share: fresh processes, interleaved rounds, medians, ratios, versions.

A figure is believed when each measurement starts in its own process (no warm caches of a rival), rivals take
turns (so a busy minute of the machine hits all of them), and the median of the rounds is told. A script:

    def ours(n: int) -> float: ...          # imports inside; returns a rate, a time, a score
    def theirs(n: int) -> float: ...

    if __name__ == "__main__":
        options = harness.options(__doc__)
        runs = {"ours": partial(harness.fresh, ours, n=10), "theirs": partial(harness.fresh, theirs, n=10)}
        rate = harness.medians(runs, options.rounds)
        rows = [harness.Row("tokens", rate["ours"], "cells/s", peer=rate["theirs"])]
        harness.report("tokenizers", rows, harness.versions("transformers"), options.json)
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Runs FUNCTION of the script FILE with keyword arguments, and leaves what it returns as JSON.
CHILD = """
import json, pathlib, runpy, sys
script, function, arguments, answer = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(script).parent))
value = runpy.run_path(script, run_name="benchmark")[function](**json.loads(arguments))
pathlib.Path(answer).write_text(json.dumps(value))
"""


@dataclass(frozen=True)
class Row:
    """One figure: ours, and the peer's where there is one. A ratio above 1 means more, not better."""

    name: str
    value: float
    unit: str
    peer: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.value / self.peer if self.peer else None


def options(description: str | None) -> argparse.Namespace:
    """Parse the options that every benchmark has: `--json FILE` and `--rounds N`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write versions and rows to this file")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken")
    return parser.parse_args()


def fresh(function: Callable[..., Any], *, python: str = sys.executable, **arguments: Any) -> Any:
    """Call a top-level `function` of a script in a new process and return its JSON-like result.

    `python` may be the interpreter of another environment, for a peer that cannot live in ours. What the
    function prints goes to the terminal.
    """
    script = Path(inspect.getfile(function)).resolve()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [python, "-c", CHILD, str(script), function.__name__, json.dumps(arguments), str(answer)]
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{script.name}: {function.__name__}({arguments}) failed with exit code {code}.")
        return json.loads(answer.read_text())


def medians(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Call all `runs` once a round, each round beginning with the next of them; return their medians."""
    names, seen = list(runs), {name: list[float]() for name in runs}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            seen[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in seen.items()}


def versions(*packages: str) -> dict[str, str | int | None]:
    """Say what was measured on what: Python, our packages and the peers (null: not installed), CPU, cores."""
    found: dict[str, str | int | None] = {"python": platform.python_version()}
    for package in ("scmodelforge", "torch", "numpy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def report(
    title: str, rows: Sequence[Row], versions: Mapping[str, str | int | None], json_path: Path | None = None
) -> None:
    """Print the rows as a table and, if asked, write them as JSON."""
    table = Table(
        "name", title=title, caption=", ".join(f"{name} {value}" for name, value in versions.items())
    )
    for heading in ("value", "peer", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for row in rows:
        table.add_row(row.name, *map(_figure, (row.value, row.peer, row.ratio)), row.unit)
    Console().print(table)
    if json_path is not None:
        content = [
            {"name": row.name, "value": row.value, "unit": row.unit, "peer": row.peer, "ratio": row.ratio}
            for row in rows
        ]
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"versions": dict(versions), "rows": content}, indent=2) + "\n")


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
