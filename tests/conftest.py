"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of public data sets beside the repository; without it the test is skipped."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs the real cells in {REAL_DATA}, which is not there")
    return REAL_DATA
