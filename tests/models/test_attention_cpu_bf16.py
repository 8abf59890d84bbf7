"""Attention by products of whole sequences gives what bfloat16 can, as torch's own kernel does."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmodelforge.models import attention_cpu, attention_cpu_bf16
from scmodelforge.models.attention_cpu import attend_each
from scmodelforge.models.bf16_kernels import exponential, softmax
from scmodelforge.models.single_threads import single_threads

HEADS, WIDTH, SCALE = 2, 24, 24**-0.5  # no power of two


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu_bf16, "HAS_AMX", False)
    monkeypatch.setattr(attention_cpu_bf16, "FEWEST_OPERATIONS", 2**16 * WIDTH)


def made(lengths: list[int], spread: float = 1.5, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v whose scores spread by some units, and whose keys have something in common."""
    generator = torch.Generator().manual_seed(seed)
    shape = 3, sum(lengths), HEADS, WIDTH
    qkv = torch.randn(shape, generator=generator) * spread + torch.randn(
        3, 1, HEADS, WIDTH, generator=generator
    )
    return list(qkv.bfloat16()), torch.tensor([0, *lengths]).cumsum(0).int()


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_queries: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in float64."""
    mixed, sums = [], []
    for own, read in zip(
        *(itertools.pairwise(ends.tolist()) for ends in (cu_queries, cu_seqlens)), strict=True
    ):
        scores = SCALE * torch.einsum("ihd,jhd->hij", q[slice(*own)].double(), k[slice(*read)].double())
        mixed.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[slice(*read)].double()))
        sums.append(scores.logsumexp(-1).T)
    return torch.cat(mixed), torch.cat(sums)


def attend(
    qkv: list[torch.Tensor], ends: torch.Tensor, cu_queries: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend_each(*qkv, ends if cu_queries is None else cu_queries, ends, False, SCALE)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    spread=st.floats(0.1, 1.5),
    seed=st.integers(0, 1000),
)
def test_values_and_log_sums_are_those_of_the_formula(lengths: list[int], spread: float, seed: int) -> None:
    qkv, ends = made(lengths, spread, seed)
    mixed, sums = attend(qkv, ends)
    expected, expected_sums = exact(*qkv, ends, ends)
    assert error(mixed, expected) < 0.012
    assert (sums - expected_sums).abs().max() < 0.02


def test_the_error_is_near_that_of_torch_s_kernel_and_not_that_of_rounded_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qkv, ends = made([900, 700])
    expected, _ = exact(*qkv, ends, ends)
    by_products = error(attend(qkv, ends)[0], expected)
    scores = SCALE * torch.einsum("ihd,jhd->hij", *(x[:900].float() for x in qkv[:2]))
    rounded = torch.einsum("hij,jhd->ihd", scores.bfloat16().float().softmax(-1), qkv[2][:900].float())
    monkeypatch.setattr(attention_cpu_bf16, "HAS_AMX", True)
    by_torch = error(attend(qkv, ends)[0], expected)
    assert by_torch < by_products < 2.5 * by_torch
    assert by_products < error(rounded, expected[:900]) / 1.5


def test_some_queries_alone_give_what_they_give_among_others() -> None:
    qkv, ends = made([600, 400, 300])
    asked = torch.arange(0, 1300, 3)
    cu_queries = torch.searchsorted(asked, ends, out_int32=True)
    mixed, sums = attend([qkv[0][asked], *qkv[1:]], ends, cu_queries)
    expected, expected_sums = exact(*qkv, ends, ends)
    assert error(mixed, expected[asked]) < 0.01
    assert (sums - expected_sums[asked]).abs().max() < 0.03


def test_long_sequences_come_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, ends = made([500, 300])
    whole = attend(qkv, ends)
    monkeypatch.setattr(attention_cpu_bf16, "SCORES_AT_ONCE", 100 * 512)
    for part, expected in zip(attend(qkv, ends), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_a_score_far_above_those_that_were_sampled_is_no_trouble(size: float) -> None:
    qkv, ends = made([600])
    q, k, _ = qkv
    k[301] = size * q[17]  # not among the sampled keys
    mixed, sums = attend(qkv, ends)
    expected, expected_sums = exact(*qkv, ends, ends)
    assert torch.isfinite(mixed).all()
    assert error(mixed[17], expected[17]) < 0.01
    assert error(sums, expected_sums) < 0.01


def test_what_is_not_a_number_stays_so() -> None:
    qkv, ends = made([300, 300])
    qkv[1][5, 0, 0] = torch.nan
    mixed, _ = attend(qkv, ends)
    assert mixed[:300, 0].isnan().all()
    assert mixed[:300, 1].isfinite().all()
    assert mixed[300:].isfinite().all()


def test_keys_that_all_queries_read_are_no_trouble() -> None:
    (q, k, v), ends = made([900], spread=1)
    strong = torch.randperm(900, generator=torch.Generator().manual_seed(1))[:6]
    q[..., 0], k[strong, :, 0] = 4, 12
    mixed, sums = attend([q, k, v], ends)
    expected, expected_sums = exact(q, k, v, ends, ends)
    assert error(mixed, expected) < 0.005
    assert error(sums, expected_sums) < 1e-3


@pytest.mark.parametrize(
    "lengths", [[400, 100], [1500], [2100]]
)  # the last one's gradients come from torch's kernel
def test_gradients_are_those_of_the_formula(lengths: list[int]) -> None:
    qkv, ends = made(lengths)
    half, double = (
        [x.detach().to(kind).requires_grad_() for x in qkv] for kind in (torch.bfloat16, torch.float64)
    )
    weights = torch.randn(half[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (attend(half, ends)[0] * weights).sum().backward()
    (exact(*double, ends, ends)[0] * weights).sum().backward()
    for ours, theirs in zip(half, double, strict=True):
        assert ours.grad is not None
        assert error(ours.grad, theirs.grad) < 0.015


def test_gradients_of_some_queries_alone_are_those_of_the_formula() -> None:
    qkv, ends = made([300, 70, 130])
    asked = torch.cat([torch.arange(0, 300, 7), torch.arange(370, 500, 2)])  # none of the second
    cu_queries = torch.searchsorted(asked, ends, out_int32=True)
    half, double = (
        [x.detach().to(kind).requires_grad_() for x in qkv] for kind in (torch.bfloat16, torch.float64)
    )
    weights = torch.randn(len(asked), HEADS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    (attend([half[0][asked], *half[1:]], ends, cu_queries)[0] * weights).sum().backward()
    (exact(*double, ends, ends)[0][asked] * weights).sum().backward()
    for ours, theirs in zip(half, double, strict=True):
        assert error(ours.grad, theirs.grad) < 0.015
    assert not half[1].grad[300:370].any(), "keys that nobody reads"


@pytest.mark.parametrize("lengths", [[300, 1, 64], [1700]])
def test_gradients_of_causal_attention_are_near_those_of_torch(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, ends = made(lengths, spread=1)
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor | None]:
        parts = [x.detach().to(dtype).requires_grad_() for x in qkv]
        (attend_each(*parts, ends, ends, True, SCALE)[0] * weights).sum().backward()
        return [x.grad for x in parts]

    exactly, by_products = gradients(torch.float64), gradients(torch.bfloat16)
    monkeypatch.setattr(attention_cpu, "has_gradients_by_products", lambda *_: False)
    by_torch = gradients(torch.bfloat16)
    for expected, ours, theirs in zip(exactly, by_products, by_torch, strict=True):
        assert error(ours, expected) < 2.5 * error(theirs, expected)


def test_gradients_of_heads_one_by_one_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, ends = made([200, 90])
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def gradients() -> list[torch.Tensor | None]:
        parts = [x.detach().requires_grad_() for x in qkv]
        (attend(parts, ends)[0] * weights).sum().backward()
        return [x.grad for x in parts]

    together = gradients()
    monkeypatch.setattr(attention_cpu_bf16, "SCORES_AT_ONCE", 256**2)  # of the longer one's one head
    for alone, expected in zip(gradients(), together, strict=True):
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("where", ["gradient", "k"])
def test_gradients_of_what_is_not_a_number_stay_so(where: str) -> None:
    qkv, ends = made([100, 90])
    if where == "k":
        qkv[1][5, 0] = torch.nan
    parts = [x.requires_grad_() for x in qkv]
    mixed, _ = attend(parts, ends)
    gradient = torch.ones_like(mixed)
    if where == "gradient":
        gradient[5, 0] = torch.nan
    mixed.backward(gradient)
    for x in parts:
        assert x.grad[:100, 0].isnan().any()
        assert x.grad[:100, 1].isfinite().all()
        assert x.grad[100:].isfinite().all()
    if where == "k":
        assert parts[2].grad[:100, 0].isnan().all(), "by the weights"


@settings(deadline=None)
@given(
    x=st.lists(st.floats(-200, 200, width=16), min_size=1, max_size=70),
    more=st.sampled_from([[], [torch.nan], [torch.inf, -torch.inf]]),
)
def test_exponentials_are_rounded_once(x: list[float], more: list[float]) -> None:
    found = torch.tensor(x + more).bfloat16()
    expected = found.float().exp()
    exponential(found.view(torch.uint16).numpy())
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1.2e-38, equal_nan=True)


@pytest.mark.parametrize("n_keys", [1, 40, 64, 65])
def test_few_keys_may_have_many_queries(n_keys: int) -> None:
    (q, k, v), _ = made([max(2**16 // n_keys, n_keys) + 1])
    cu_queries, ends = torch.tensor([0, len(q)]).int(), torch.tensor([0, n_keys]).int()
    mixed, _ = attend([q, k[:n_keys], v[:n_keys]], ends, cu_queries)
    assert error(mixed, exact(q, k[:n_keys], v[:n_keys], cu_queries, ends)[0]) < 0.01


def test_other_numbers_by_default_change_nothing() -> None:
    qkv, ends = made([300])

    def computed() -> list[torch.Tensor | None]:
        parts = [x.detach().requires_grad_() for x in qkv]
        mixed, sums = attend(parts, ends)
        mixed.backward(torch.ones_like(mixed))
        return [mixed, sums, *(x.grad for x in parts)]

    expected = computed()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = computed()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_several_may_ask_at_once() -> None:
    qkv, ends = made([300, 280, 400])
    expected = attend(qkv, ends)[0]
    single_threads.cache_clear()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: attend(qkv, ends)[0], range(12)))
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    script = """
import os, torch
torch.set_num_threads(1)  # torch's own threads do not survive a fork
from scmodelforge.models.attention_cpu import attend_each
x, ends = torch.randn(600, 2, 16).bfloat16(), torch.tensor([0, 600]).int()
attend_each(x, x, x, ends, ends, False, 0.25)
child = os.fork()
if child == 0:
    attend_each(x, x, x, ends, ends, False, 0.25)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    # a child without threads would wait for ever
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stdout.split() == ["7"]


PRODUCTS_OF_MANY_SHAPES = """
from pathlib import Path
import torch
import scmodelforge.models.attention_cpu

def memory():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024

def multiply(lengths):
    for length in lengths:
        torch.zeros(length, 64, dtype=torch.bfloat16) @ torch.zeros(64, 64, dtype=torch.bfloat16)

multiply(range(100, 200))
before = memory()
multiply(range(200, 800))
print(memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_products_of_many_shapes_do_not_fill_memory() -> None:
    """Torch and oneDNN keep what they prepared for 1,024 shapes each, some 300 KiB a shape."""
    kept = {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment = {key: value for key, value in os.environ.items() if key not in kept}
    command = [sys.executable, "-c", PRODUCTS_OF_MANY_SHAPES]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert float(ran.stdout) < 40, "MiB"


def test_the_operator_keeps_torch_s_rules() -> None:
    qkv, ends = made([300, 20])
    qkv = [x.requires_grad_() for x in qkv]
    torch.library.opcheck(attention_cpu.attend_each, (*qkv, ends, ends, False, SCALE))


def test_threads_compute_with_one_thread_each_and_others_with_as_many_as_before() -> None:
    before = torch.get_num_threads()
    single_threads.cache_clear()
    attend(*made([300, 300]))
    pool = single_threads(before)
    assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("columns", [1, 15, 16, 333])
def test_the_softmax_is_rounded_once(columns: int) -> None:
    scores = (torch.randn(40, columns, generator=torch.Generator().manual_seed(columns)) * 30).bfloat16()
    scores[3] = -1e30
    scores[4, 0] = -1e30
    scores[5, columns // 2] = 1e30
    exact = 0.3 * scores.double()
    log_sums = np.empty(40, dtype=np.float32)
    softmax(scores.view(torch.uint16).numpy(), 0.3, log_sums)
    torch.testing.assert_close(scores.double(), exact.softmax(1), rtol=2**-8, atol=1e-37)
    np.testing.assert_allclose(log_sums, exact.logsumexp(1), rtol=1e-6, atol=1e-5)
