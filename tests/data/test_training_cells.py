"""Cells are known again by their content, whatever file, row, name or order of genes they come with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.data import training_cells as module
from scmodelforge.data.training_cells import TOO_FEW_GENES, CellRecorder, TrainingCells, hash_cells
from tests.helpers import make_cells

WORD = 2**64


def slow_mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) % WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def slow_hash(counts: np.ndarray) -> int:
    genes = np.flatnonzero(counts)
    if len(genes) < 10:
        return int(TOO_FEW_GENES)
    bits = counts.astype(np.float32).view(np.uint32)
    return slow_mix(sum(slow_mix(int(gene) << 32 | int(bits[gene])) for gene in genes) % WORD)


def counts(n_cells: int, seed: int = 0, n_genes: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.0, (n_cells, n_genes)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(n_cells=st.integers(1, 20), rate=st.floats(0.05, 3), seed=st.integers(0, 99))
def test_equals_the_slow_hash(n_cells, rate, seed):
    dense = np.random.default_rng(seed).poisson(rate, (n_cells, 40)).astype(np.float32)
    assert hash_cells(make_cells(dense), 40).tolist() == [slow_hash(cell) for cell in dense]


def test_one_count_more_is_another_cell():
    dense = counts(1)
    changed = np.repeat(dense, 60, axis=0) + np.eye(60, dtype=np.float32)
    hashes = hash_cells(make_cells(np.vstack([dense, changed])), 60)
    assert len(np.unique(hashes)) == 61
    flipped = np.unpackbits((hashes[1:] ^ hashes[0]).view(np.uint8)).mean()
    assert flipped == pytest.approx(0.5, abs=0.03)


def test_there_are_no_collisions_among_many_cells():
    assert len(np.unique(hash_cells(make_cells(counts(50_000)), 60))) == 50_000


def test_genes_that_were_appended_since_do_not_matter():
    old, new = counts(30), counts(30, seed=1, n_genes=8)
    before, after = hash_cells(make_cells(old), 60), hash_cells(make_cells(np.hstack([old, new])), 60)
    np.testing.assert_array_equal(before, after)


def test_a_recorder_knows_the_training_cells_it_was_shown():
    dense, rows = counts(40), np.arange(0, 40, 2)
    dense[4] = 0  # an empty cell is nobody's
    recorder = CellRecorder(rows, 60)
    recorder.record(make_cells(dense[:20]))
    half = TrainingCells.from_plain(recorder.to_plain())
    assert (half.n_cells, half.n_known, len(half.hashes)) == (20, 10, 9)
    again = CellRecorder(rows, 60, recorder.to_plain())  # an interrupted run goes on
    again.record(make_cells(dense[20:], first_row=20))
    whole = TrainingCells.from_plain(again.to_plain())
    assert whole.n_known == 20
    expected = np.arange(40) % 2 == 0
    expected[4] = False
    np.testing.assert_array_equal(whole.contain(make_cells(dense)), expected)
    np.testing.assert_array_equal(TrainingCells.from_plain(whole.to_plain()).hashes, whole.hashes)


def test_of_very_many_cells_every_nth_is_known(monkeypatch):
    monkeypatch.setattr(module, "MOST_CELLS", 16)
    recorder = CellRecorder(np.arange(40), 60)
    recorder.record(make_cells(counts(40)))
    cells = TrainingCells.from_plain(recorder.to_plain())
    assert (cells.n_cells, cells.n_known) == (40, 14)
    assert np.flatnonzero(cells.contain(make_cells(counts(40)))).tolist() == list(range(0, 40, 3))
