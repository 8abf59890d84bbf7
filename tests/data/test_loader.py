"""Batches made ahead by threads: their order, how far ahead, what stops them, where they go on."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from scmodelforge.config import Config
from scmodelforge.data.loader import BatchLoader
from scmodelforge.data.module import CellDataModule
from scmodelforge.data.order import FixedSize, GlobalShuffle
from scmodelforge.data.store import open_store
from scmodelforge.errors import DataError
from scmodelforge.models.objectives import build_objective
from scmodelforge.tokenizers.base import build_tokenizer
from tests.helpers import make_vocab, marker_cells


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_come_in_order_however_long_each_takes(threads: int) -> None:
    def make(epoch: int, step: int) -> tuple[int, int]:
        time.sleep(0.002 * (step % 3))
        return epoch, step

    loader = BatchLoader(make, 20, threads)
    assert list(loader) == [(0, step) for step in range(20)]
    assert list(loader) == [(1, step) for step in range(20)]


def loader_of(threads: int, strategy: str, task: str) -> BatchLoader:
    config = Config.model_validate(
        {"tokenizer": {"strategy": strategy, "max_genes": 20}, "model": {"pretraining_task": task}}
    )
    vocab = make_vocab(40)
    tokenizer, objective = build_tokenizer(config, vocab), build_objective(config, vocab)

    def make(cells, epoch: int, batch_seed: int):
        return objective.corrupt(tokenizer(cells, 7, epoch), 7, epoch, batch_seed)

    store = open_store([marker_cells(90)], vocab, config.data)
    order = GlobalShuffle(np.arange(90), seed=7)
    module = CellDataModule(store, FixedSize(order, 8), None, make, seed=7, threads=threads)
    return module.train_dataloader()


def training_batches(threads: int, strategy: str, task: str) -> list[list[torch.Tensor]]:
    loader = loader_of(threads, strategy, task)
    return [
        [batch.tokens.input_ids, batch.tokens.values, batch.tokens.cell_index, batch.asked]
        for _ in range(2)
        for batch in loader
    ]


@pytest.mark.parametrize(
    ("strategy", "task"),
    [("rank_value", "masked_gene_prediction"), ("binned_expression", "expression_reconstruction")],
)
def test_order_and_content_do_not_depend_on_the_number_of_threads(strategy: str, task: str) -> None:
    alone, many = training_batches(1, strategy, task), training_batches(4, strategy, task)
    assert len(alone) == len(many) == 2 * 12
    for one, other in zip(alone, many, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_threads_wait_while_the_model_is_busy() -> None:
    made, lock = [], threading.Lock()

    def make(epoch: int, step: int) -> int:
        with lock:
            made.append(step)
        return step

    batches = iter(BatchLoader(make, 1000, threads=3))
    for taken in range(1, 20):
        next(batches)
        time.sleep(0.002)
        assert len(made) <= taken + 2 * 3
    batches.close()
    time.sleep(0.02)
    assert len(made) <= 20 + 2 * 3


def test_what_a_thread_raises_reaches_the_model_with_its_own_message() -> None:
    def make(epoch: int, step: int) -> int:
        if step == 3:
            raise DataError("'cells.h5ad' is truncated or damaged")
        return step

    batches = iter(BatchLoader(make, 10, threads=4))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="truncated"):
        next(batches)


def test_a_loader_goes_on_where_its_state_was_taken() -> None:
    def make(epoch: int, step: int) -> tuple[int, int]:
        return epoch, step

    first = BatchLoader(make, 7, threads=2)
    batches = iter(first)
    taken = [next(batches) for _ in range(4)]
    second = BatchLoader(make, 7, threads=3)
    second.load_state_dict(first.state_dict())
    assert taken + list(second) == [(0, step) for step in range(7)]
    assert second.state_dict() == {"epoch": 1, "step": 0}


def test_a_batch_moves_with_all_that_it_holds() -> None:
    batch = next(iter(loader_of(1, "rank_value", "masked_gene_prediction")))
    moved = batch.to("meta")
    assert moved.asked.device.type == moved.tokens.input_ids.device.type == "meta"
    assert moved.n_tokens == batch.n_tokens
