"""The harness that all benchmark scripts share."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


harness = load("benchmark_harness", Path(__file__).parents[1] / "benchmarks" / "harness.py")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "some_benchmark.py"
    path.write_text(
        "import os, sys, helper_beside_the_script\n"
        "def process(scale):\n    print('chatter')\n    return {'pid': os.getpid(), 'value': 2 * scale}\n"
        "def broken():\n    sys.exit(3)\n"
    )
    (tmp_path / "helper_beside_the_script.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    yield load("some_benchmark", path)
    sys.path.remove(str(tmp_path))


def test_each_call_runs_in_its_own_process(script):
    first, second = (harness.fresh(script.process, scale=n) for n in (1.5, 2))
    assert (first["value"], second["value"]) == (3.0, 4)
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


def test_a_failing_process_ends_the_benchmark(script):
    with pytest.raises(SystemExit, match=r"some_benchmark.py: broken\({}\) failed with exit code 3"):
        harness.fresh(script.broken)


def test_rounds_are_interleaved_and_the_median_is_taken():
    order: list[str] = []
    answers = {"ours": iter([1.0, 9.0, 2.0]), "peer": iter([4.0, 5.0, 6.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(answers[name])

    result = harness.medians({name: partial(run, name) for name in answers}, rounds=3)
    assert result == {"ours": 2.0, "peer": 5.0}
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_report_prints_a_table_and_writes_json(tmp_path, capsys):
    rows = [harness.Row("tokens", 3000.0, "cells/s", peer=1500.0), harness.Row("memory", 12.5, "MiB")]
    versions = harness.versions("numpy", "no-such-package")
    harness.report("speed", rows, versions, tmp_path / "out" / "speed.json")
    printed = capsys.readouterr().out
    assert "3,000" in printed
    assert "memory" in printed
    written = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert written["rows"] == [
        {"name": "tokens", "value": 3000.0, "unit": "cells/s", "peer": 1500.0, "ratio": 2.0},
        {"name": "memory", "value": 12.5, "unit": "MiB", "peer": None, "ratio": None},
    ]
    assert written["versions"]["no-such-package"] is None
    assert {"python", "scmodelforge", "torch", "numpy", "cpu", "cores"} <= set(written["versions"])


def test_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--json", "a.json", "--rounds", "2"])
    options = harness.options("what it measures")
    assert (options.json, options.rounds) == (Path("a.json"), 2)
