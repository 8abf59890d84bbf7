"""The buffered shuffle: every cell once, in stretches of few blocks, and the store hears what comes next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.config import DataConfig
from scmodelforge.data.buffered import BLOCK, BufferedShuffle, buffered_shuffle
from scmodelforge.data.module import CellDataModule, training_order
from scmodelforge.data.order import FixedSize, draw_key, n_steps, permutation
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from tests.data.files import NO_MINIMUM, make_adata
from tests.helpers import make_vocab

VOCAB = make_vocab(6)


def epoch_of(
    order: BufferedShuffle, epoch: int, batch_size: int, rank: int = 0, world: int = 1
) -> np.ndarray:
    steps = n_steps(order.n_draws, batch_size, world)
    batches = [order.batch(epoch, step, batch_size, rank, world).rows for step in range(steps)]
    return np.concatenate([np.zeros(0, np.int64), *batches])


def slow_sequence(n: int, block: int, buffer: int, seed: int, epoch: int) -> np.ndarray:
    """The whole order by lists of blocks and buffers."""
    cells, n_full = np.arange(n), n // block
    blocks = permutation(np.arange(n_full), n_full, draw_key(seed, epoch, 0, 1)) if n_full else []
    sequence = [cells[b * block : (b + 1) * block] for b in blocks] + [cells[n_full * block :]]
    sequence = np.concatenate(sequence)
    out = []
    for number, start in enumerate(range(0, n, buffer)):
        held = sequence[start : start + buffer]
        key = draw_key(seed, epoch, number, 2)
        out.append(held[permutation(np.arange(len(held)), len(held), key)])
    return np.concatenate(out)


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 300),
    block=st.integers(1, 40),
    blocks=st.integers(1, 5),
    batch_size=st.integers(1, 33),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_ranks_share_an_epoch_in_stretches(n, block, blocks, batch_size, world, epoch):
    rows = np.arange(n) * 3 + 1
    order = BufferedShuffle(rows, 7, block * blocks, block)
    shares = [epoch_of(order, epoch, batch_size, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {n // world}
    seen = np.concatenate(shares)
    expected = rows[slow_sequence(n, block, block * blocks, 7, epoch)]
    np.testing.assert_array_equal(seen, expected[: len(seen)])
    assert len(np.unique(seen)) == len(seen) == n - n % world
    assert len(order.batch(epoch, n_steps(n, batch_size, world), batch_size, 0, world).rows) == 0


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 300), block=st.integers(1, 40), blocks=st.integers(1, 5), world=st.integers(1, 4))
def test_the_buffers_of_a_rank_are_what_it_reads(n, block, blocks, world):
    order = BufferedShuffle(np.arange(n) * 2, 7, block * blocks, block)
    for rank in range(world):
        told = [order.buffer_rows(1, number, rank, world) for number in range(-(-n // order.buffer) + 1)]
        assert all((np.diff(rows) > 0).all() for rows in told)
        np.testing.assert_array_equal(
            np.sort(np.concatenate(told)), np.sort(epoch_of(order, 1, 16, rank, world))
        )


def test_a_buffer_holds_few_blocks_and_mixes_them():
    order = buffered_shuffle(np.arange(100_000), 3, 2560)
    first = epoch_of(order, 0, 64)[:2560]
    assert len(np.unique(first // BLOCK)) == 10
    assert len(np.unique(first[:64] // BLOCK)) > 5
    assert abs(np.corrcoef(np.arange(2560), first)[0, 1]) < 0.1
    assert set(first) != set(epoch_of(order, 1, 64)[:2560])


def test_every_cell_of_a_trillion_has_its_place():
    n = 10**12 + 77

    class Rows:  # as a range, whose places are its values
        def __len__(self):
            return n

        def __getitem__(self, places):
            return places

    order = BufferedShuffle(Rows(), 3, 65_536, 256)
    steps = n_steps(n, 64)
    for step in (0, steps // 3, steps - 2):
        rows = order.batch(0, step, 64, 0, 1).rows
        assert len(np.unique(rows)) == 64
        assert 0 <= rows.min() <= rows.max() < n
    assert order.batch(0, steps - 1, 64, 0, 1).rows.shape == (n - (steps - 1) * 64,)


@pytest.mark.parametrize(
    ("cells", "block", "expected"),
    [
        (1000, None, (768, 256)),
        (100, None, (100, 100)),
        (1, None, (1, 1)),
        (1000, 64, (960, 64)),
        (10, 64, (64, 64)),
    ],
)
def test_a_buffer_is_made_of_whole_blocks(cells, block, expected):
    order = buffered_shuffle(np.arange(5000), 0, cells, block)
    assert (order.buffer, order.block) == expected


# --- in the data module ---------------------------------------------------------------------------


def open_slow(n_cells: int = 100, buffer: int | None = 20, block: int | None = 5):
    """A store whose matrix wants a buffered shuffle, and the list of what it was told to fetch."""
    counts = np.ones((n_cells // 2, 4), dtype=np.int64)
    store = open_store(
        [make_adata(counts, np.arange(4)), make_adata(counts, np.arange(4))], VOCAB, NO_MINIMUM
    )
    told: list[tuple[int, np.ndarray]] = []
    for number, matrix in enumerate(store.matrices):
        matrix.shuffle_buffer, matrix.block_cells = buffer, block
        matrix.prefetch = lambda rows, number=number: told.append((number, rows))
    return store, told


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("resume_at", [0, 4])
def test_the_store_hears_of_each_buffer_once_before_it_is_read(threads: int, resume_at: int) -> None:
    store, told = open_slow()
    order = training_order(store, np.arange(100), DataConfig(), 3)
    assert (order.buffer, order.block) == (20, 5)
    read = []

    def make_batch(cells, epoch, batch_seed):
        read.append((len(told), cells.rows))
        return cells

    module = CellDataModule(store, FixedSize(order, 8), None, make_batch, 3, threads)
    module.load_state_dict({"epoch": 0, "step": resume_at})
    assert len(list(module.train_dataloader())) == 13 - resume_at
    fetched = np.concatenate([rows + 50 * number for number, rows in told])
    first = ((resume_at + 1) * 8 - 1) // 20 * 20  # where the buffer begins in which the first batch ends
    np.testing.assert_array_equal(np.sort(fetched), np.sort(epoch_of(order, 0, 8)[first:]))
    assert all((np.diff(rows) > 0).all() for _, rows in told)
    if threads == 1:
        for n_told, rows in read[1:]:
            known = np.concatenate([rows + 50 * number for number, rows in told[:n_told]])
            assert np.isin(rows, known).all()


def test_batches_that_are_known_are_neither_announced_nor_read() -> None:
    store, told = open_slow()
    order = training_order(store, np.arange(100), DataConfig(), 3)

    def make_batch(cells, epoch, batch_seed):
        return cells.cell_index

    def known_batch(cell_index, batch_seed):
        return cell_index if known else None

    module = CellDataModule(store, FixedSize(order, 8, 1), None, make_batch, 3, 1, known_batch)
    loader, known = module.train_dataloader(), True
    np.testing.assert_array_equal(np.concatenate(list(loader)), epoch_of(order, 0, 8))
    assert not told
    known = False
    np.testing.assert_array_equal(np.concatenate(list(loader)), epoch_of(order, 1, 8))
    assert told, "the next epoch is read as ever"


def test_a_setting_goes_before_the_wish_of_the_store() -> None:
    store, _ = open_slow(buffer=20, block=None)
    assert training_order(store, np.arange(100), DataConfig(shuffle_buffer=50), 3).buffer == 50
    usual, _ = open_slow(buffer=None, block=None)
    assert training_order(usual, np.arange(100), DataConfig(), 3).n_draws == 100
    assert not isinstance(training_order(usual, np.arange(100), DataConfig(), 3), BufferedShuffle)
    assert training_order(usual, np.arange(100), DataConfig(shuffle_buffer=50), 3).buffer == 50


def test_sampling_from_a_source_that_cannot_is_refused() -> None:
    store, _ = open_slow()
    config = DataConfig(sampling={"cells_per_epoch": 10})
    with pytest.raises(DataError, match=r"blocks of neighbours.*\n.*scmodelforge shard"):
        training_order(store, np.arange(100), config, 3)
