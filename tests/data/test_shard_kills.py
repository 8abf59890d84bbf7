"""`kill -9` at random moments: conversion and training go on where they were, and end as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.test_harness import load

kill = load("kill", Path(__file__).parents[2] / "benchmarks/kill.py")


@pytest.mark.slow
def test_a_killed_conversion_and_training_lose_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    assert kill.kill_shard(tmp_path, 5, rng) > 0
    assert kill.kill_train(tmp_path, 2, rng) > 0
