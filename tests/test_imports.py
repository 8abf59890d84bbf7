"""What must stay fast and light: importing the package, and reading a config."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "scanpy", "lightning", "anndata", "numpy", "pandas"}


@pytest.mark.parametrize("module", ["scmodelforge", "scmodelforge.config_io"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
