"""Cells go through a model in order, in batches of a budget of tokens that the memory decides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge import inference_batches
from scmodelforge.data.batch import MeasuredGenes
from scmodelforge.data.store import CellStore
from scmodelforge.errors import UserError
from scmodelforge.inference import annotate, embed, embed_store, open_for, predict_store
from scmodelforge.inference_batches import within_budget
from scmodelforge.models.bundle import ModelBundle
from scmodelforge.tokenizers.batch import TokenBatch
from tests.helpers import marker_cells, untrained_annotator


@pytest.fixture
def bundle() -> ModelBundle:
    return untrained_annotator()


@pytest.fixture(scope="module")
def store() -> CellStore:
    """50 cells of 11 to 27 tokens."""
    return open_for(untrained_annotator(), marker_cells(50, seed=7))


@pytest.fixture(scope="module")
def expected(store: CellStore) -> np.ndarray:
    return embed_store(untrained_annotator(), store)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def watched(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, before: Callable[[TokenBatch], None]
) -> None:
    """Let the model call `before` on each batch that it is to encode."""
    encode = bundle.model.encode

    def watching(tokens: TokenBatch, pooling: str | None = None) -> torch.Tensor:
        before(tokens)
        return encode(tokens, pooling)

    monkeypatch.setattr(bundle.model, "encode", watching)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), budget=st.integers(1, 40))
def test_cells_come_in_as_few_batches_as_the_budget_allows(lengths: list[int], budget: int) -> None:
    n, longest = len(lengths), max(*lengths, 1)
    ids = torch.arange(n * longest).reshape(n, longest)
    batch = TokenBatch(
        input_ids=ids,
        values=ids.float(),
        lengths=torch.tensor(lengths),
        cell_index=torch.arange(n) + 100,
        has_padding=True,
        obs=torch.arange(n)[:, None],
        measured=MeasuredGenes(np.ones((1, 3), dtype=bool), np.arange(n)),
    )
    parts = within_budget(batch, budget)
    assert torch.cat([part.cell_index for part in parts]).tolist() == batch.cell_index.tolist()
    begin = 0
    for part in parts:
        own = [max(length, 1) for length in lengths[begin : begin + part.n_cells]]
        end = begin + part.n_cells
        assert sum(own) <= budget or part.n_cells == 1
        width = max(own) if len(parts) > 1 else longest
        assert torch.equal(part.input_ids, ids[begin:end, :width])
        assert torch.equal(part.values, part.input_ids.float())
        assert part.obs is not None
        assert part.obs[:, 0].tolist() == part.measured.of_cell.tolist() == list(range(begin, end))
        begin = end
    assert len(parts) == fewest(lengths, budget)


def fewest(lengths: list[int], budget: int) -> int:
    """How many batches there are if each takes cells as long as the next one fits."""
    n, used = 1, 0
    for length in (max(length, 1) for length in lengths):
        if used and used + length > budget:
            n, used = n + 1, 0
        used += length
    return n


def test_batches_of_a_budget_are_of_similar_sizes() -> None:
    ids = torch.ones(11, 10, dtype=torch.int64)
    batch = TokenBatch(ids, ids.float(), torch.full((11,), 10), torch.arange(11), has_padding=False)
    assert [part.n_cells for part in within_budget(batch, 100)] == [6, 5]


@pytest.mark.parametrize(
    "rows", [np.arange(50)[::-1], np.array([7, 3, 3, 49, 0, 7]), np.zeros(0, dtype=np.int64)]
)
@pytest.mark.parametrize("batch_size", [4, 64])
def test_embeddings_come_in_the_order_of_the_rows(
    bundle: ModelBundle, store: CellStore, expected: np.ndarray, rows: np.ndarray, batch_size: int
) -> None:
    close(embed_store(bundle, store, batch_size, rows=rows), expected[rows])


def test_the_budget_makes_small_batches_of_long_cells_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, store: CellStore, expected: np.ndarray
) -> None:
    monkeypatch.setitem(inference_batches.BUDGET, "cpu", 60)
    seen: list[TokenBatch] = []
    watched(monkeypatch, bundle, seen.append)
    close(embed_store(bundle, store), expected)
    assert max(int(tokens.lengths.sum()) for tokens in seen) <= 60
    assert sum(tokens.n_cells for tokens in seen) == 50
    seen.clear()
    embed_store(bundle, store, batch_size=2)
    assert {tokens.n_cells for tokens in seen} == {2}, "batch_size is the most cells of a batch"


def refuse(most: int, error: Exception) -> Callable[[TokenBatch], None]:
    def before(tokens: TokenBatch) -> None:
        if tokens.lengths.sum() > most:
            raise error

    return before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
@pytest.mark.parametrize("use", [embed_store, predict_store])
def test_too_little_memory_halves_the_batches_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    bundle: ModelBundle,
    store: CellStore,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    use: Any,
) -> None:
    expected = use(bundle, store, 30)
    sizes: list[int] = []
    watched(monkeypatch, bundle, lambda tokens: sizes.append(int(tokens.lengths.sum())))
    watched(monkeypatch, bundle, refuse(200, error))
    with caplog.at_level(logging.WARNING, "scmodelforge"):
        found = use(bundle, store, 30)
    if use is embed_store:
        close(found, expected)
    else:
        assert found.iloc[:, 0].tolist() == expected.iloc[:, 0].tolist()
        close(found.iloc[:, 1].to_numpy(), expected.iloc[:, 1].to_numpy())
    assert len(caplog.messages) == 2, "the second batch of 30 cells does not try again what failed"
    assert caplog.messages[0].startswith("Out of memory with ")
    assert "tokens of 30 cells at once: from here on at most " in caplog.messages[0]
    assert max(sizes) <= 200


def test_a_cell_that_does_not_fit_alone_is_named(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, store: CellStore, caplog: pytest.LogCaptureFixture
) -> None:
    watched(monkeypatch, bundle, refuse(0, torch.OutOfMemoryError("out of memory")))
    with (
        caplog.at_level(logging.WARNING, "scmodelforge"),
        pytest.raises(
            UserError, match=r"(?s)too small for a single cell: cell 9 with \d+ tokens\.\nEnd other programs"
        ),
    ):
        embed_store(bundle, store, rows=np.array([9, 8, 7, 6]))
    assert caplog.messages, "smaller batches were tried first"


def test_other_errors_are_not_taken_for_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, store: CellStore
) -> None:
    watched(monkeypatch, bundle, refuse(0, RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        embed_store(bundle, store)


def test_bf16_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, store: CellStore, expected: np.ndarray
) -> None:
    monkeypatch.setattr(inference_batches, "bf16_on_cpu", lambda: True)
    half = embed_store(bundle, store, precision="bf16", device="cpu")
    assert half.dtype == np.float32
    assert not np.array_equal(half, expected)
    cosine = (half * expected).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999
    np.testing.assert_array_equal(embed_store(bundle, store, device="cpu"), expected)
    monkeypatch.setattr(inference_batches, "bf16_on_cpu", lambda: False)
    with pytest.raises(UserError, match=r"(?s)precision bf16: this processor \(without AVX512.*take 32"):
        embed_store(bundle, store, precision="bf16", device="cpu")


def test_what_is_no_precision_or_pooling_is_refused(bundle: ModelBundle, store: CellStore) -> None:
    with pytest.raises(UserError, match="precision is '16'; it must be 32, bf16 or bf16-true"):
        embed_store(bundle, store, precision="16")
    with pytest.raises(UserError, match="pooling is 'max'; it must be mean, cls or window"):
        embed_store(bundle, store, pooling="max")
    for use in (embed, annotate):
        with pytest.raises(UserError, match="precision is 'half'; it must be 32, bf16 or bf16-true"):
            use(marker_cells(5), bundle, precision="half")


@pytest.mark.skipif(not inference_batches.bf16_on_cpu(), reason="needs AVX512-BF16 or AMX")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bf16_true_rounds_what_blocks_hand_on_and_leaves_no_trace(norm: str, store: CellStore) -> None:
    bundle, seen = untrained_annotator(model={"norm": norm}), []
    hooks = [
        block.register_forward_hook(lambda block, given, result: seen.append(result.dtype))
        for block in bundle.model.transformer.blocks
    ]
    exact = embed_store(bundle, store)
    assert set(seen) == {torch.float32}
    seen.clear()
    half = embed_store(bundle, store, precision="bf16-true")
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    mixed = embed_store(bundle, store, precision="bf16")
    assert set(seen) == {torch.float32}
    for hook in hooks:
        hook.remove()
    distance = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (mixed, half)]
    assert 0 < distance[0] < distance[1] < 0.03
    np.testing.assert_array_equal(embed_store(bundle, store), exact)
