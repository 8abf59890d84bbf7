"""The kernel of a Hopper GPU is attention: its values, its sums and its gradients are those of the formula."""

from __future__ import annotations

import math

import pytest
import torch

from scmodelforge.models import attention_hopper
from scmodelforge.models.attention import attend, attend_by_formula
from scmodelforge.models.sequences import Sequences

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU (H100, H200), and there is none")

LENGTHS = (5, 0, 130, 64, 1, 777, 128, 0, 2048)
HEADS = 3


def packed(causal: bool) -> Sequences:
    ends = torch.tensor((0, *LENGTHS), device="cuda").cumsum(0).int()
    return Sequences(ends, max(LENGTHS), causal)


def projected(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys and values as one product gives them: (total, 3, heads, width)."""
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = torch.randn(sum(LENGTHS), 3, HEADS, width, generator=generator, device="cuda")
    return (1.5 * drawn).to(dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", attention_hopper.TILES)
def test_values_and_gradients_are_those_of_the_formula(width: int, dtype: torch.dtype, causal: bool) -> None:
    sequences, found = packed(causal), []
    direction = torch.linspace(-1, 1, sum(LENGTHS) * HEADS * width, device="cuda").view(-1, HEADS, width)
    for precision, function in ((dtype, attend), (torch.float64, attend_by_formula)):
        inputs = projected(width, dtype).to(precision).requires_grad_()
        q, k, v = inputs.unbind(1)
        assert precision != dtype or attention_hopper.takes(q)
        mixed = function(q, k, v, sequences)
        mixed.backward(direction.to(precision))
        found.append((mixed.detach().double(), inputs.grad.double()))
    digits = 2e-3 if dtype == torch.float16 else 1e-2
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < digits * exact.norm()


@pytest.mark.parametrize("causal", [False, True])
def test_it_keeps_the_log_of_sums_that_the_backward_pass_reads(causal: bool) -> None:
    sequences, scale = packed(causal), 1 / math.sqrt(64)
    q, k, v = projected(64, torch.bfloat16).unbind(1)
    starts, longest = sequences.cu_seqlens, sequences.max_length
    _, sums = attention_hopper.attend_on_hopper(q, k, v, starts, longest, causal, scale)
    last = slice(-LENGTHS[-1], None)
    scores = torch.einsum("ihd,jhd->hij", q[last].double(), k[last].double()) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(sums[:, last].double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-4)


def test_the_operator_keeps_torch_s_rules() -> None:
    q, k, v = (x.contiguous().requires_grad_() for x in projected(64, torch.bfloat16)[:199].unbind(1))
    ends = torch.tensor([0, 5, 135, 199], device="cuda").int()
    torch.library.opcheck(attention_hopper.attend_on_hopper, (q, k, v, ends, 130, False, 0.125))


def test_the_same_step_gives_the_same_bits() -> None:
    sequences, found = packed(causal=False), []
    for _ in range(2):
        inputs = projected(64, torch.bfloat16).requires_grad_()
        attend(*inputs.unbind(1), sequences).square().sum().backward()
        found.append(inputs.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_s_kernel_takes_views_of_one_product(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_hopper, "takes", lambda q: False)
    sequences, found = packed(causal), []
    for precision, function in ((torch.bfloat16, attend), (torch.float64, attend_by_formula)):
        inputs = projected(64, torch.bfloat16).to(precision).requires_grad_()
        mixed = function(*inputs.unbind(1), sequences)
        mixed.square().sum().backward()
        found.append((mixed.detach().double(), inputs.grad.double()))
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 2e-2 * exact.norm()
