"""Attention over packed sequences equals the plain formula, whatever way it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from scmodelforge.models import attention
from scmodelforge.models.attention import Sequences, attend, bias_in_channels, reading, varlen_options

LENGTHS = (3, 0, 5, 1, 7)
TOTAL, HEADS, WIDTH = sum(LENGTHS), 2, 4
ENDS = torch.tensor((0, *LENGTHS)).cumsum(0).int()
PLAIN = Sequences(ENDS, max_length=7)
BIAS = torch.linspace(0, 3, TOTAL)
FEW = torch.arange(TOTAL) % 3 != 1
KINDS = {
    "plain": (PLAIN, None),
    "causal": (replace(PLAIN, causal=True), None),
    "bias": (replace(PLAIN, key_bias=BIAS), None),
    "causal bias, not to itself": (replace(PLAIN, causal=True, key_bias=BIAS, biases_itself=False), None),
    "capped": (PLAIN, 2.0),
    "capped causal bias": (replace(PLAIN, causal=True, key_bias=BIAS, biases_itself=False), 2.0),
    "read by some": (replace(PLAIN, read_by_all=FEW), None),
}


def heads(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOTAL, HEADS, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]


def dense(q, k, v, sequences: Sequences, soft_cap: float | None) -> torch.Tensor:
    """All tokens against all, with everything that is not read masked out."""
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed, itself = number[:, None] == number, torch.eye(TOTAL, dtype=torch.bool)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(WIDTH)
    if sequences.key_bias is not None:
        bias = sequences.key_bias.expand(TOTAL, TOTAL)
        scores = scores + (bias if sequences.biases_itself else bias.masked_fill(itself, 0))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if sequences.causal:
        allowed = allowed & torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    if sequences.read_by_all is not None:
        allowed = allowed & (sequences.read_by_all | itself)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formula(kind: str) -> None:
    sequences, soft_cap = KINDS[kind]
    found, expected = [], []
    for function, results in ((attend, found), (dense, expected)):
        q, k, v = heads()
        mixed = function(q, k, v, sequences, soft_cap)
        (mixed * torch.linspace(-1, 1, mixed.numel()).view_as(mixed)).sum().backward()
        results += [mixed.detach(), q.grad, k.grad, v.grad]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_mask_is_built_where_all_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend_by_formula", None)  # which would be called
    for kind in ("plain", "causal", "bias"):
        attend(*heads(), *KINDS[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_rides_in_the_keys(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in heads())
    bias, scale = torch.log1p(torch.arange(TOTAL).float() ** 3), 1 / math.sqrt(WIDTH)
    wide_q, wide_k, wide_v = bias_in_channels(q, k, v, bias, scale)
    assert wide_q.shape[-1] == wide_v.shape[-1] == 8
    scores = torch.einsum("ihd,jhd->hij", wide_q.double(), wide_k.double()) * scale
    plain = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
    error = (scores - plain - bias).abs().max()
    alone = ((bias / scale).to(dtype).double() * scale - bias).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert dtype == torch.float32 or alone > 5 * error, "one channel alone would lose digits"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["capped causal bias", "read by some", "causal bias, not to itself"])
def test_what_a_gpu_is_told_is_the_same_formula(kind: str) -> None:
    sequences, soft_cap = KINDS[kind]
    expected = dense(*heads(), sequences, soft_cap)
    reads, changed = reading(sequences, TOTAL, soft_cap)
    q, k, v = heads()
    i, j = torch.meshgrid(torch.arange(TOTAL), torch.arange(TOTAL), indexing="ij")
    scores = changed(torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(WIDTH), 0, 0, i, j)
    weights = scores.masked_fill(~reads(0, 0, i, j), -torch.inf).softmax(-1)
    torch.testing.assert_close(torch.einsum("hij,jhd->ihd", weights, v), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # FlexAttention itself, which on the CPU has no backward pass
        mixed = attention._flexible(q, k, v, sequences, soft_cap, 1 / math.sqrt(WIDTH))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_every_signature_of_torch_is_met() -> None:
    old, new = frozenset({"is_causal"}), frozenset({"window_size", "scale"})
    half = 1 / math.sqrt(16)
    assert varlen_options(old, True, half, 16) == {"is_causal": True}
    assert varlen_options(new, True, half, 16) == {"window_size": (-1, 0)}
    assert varlen_options(new, False, 0.5, 16) == {"scale": 0.5}
    assert varlen_options(old, False, half, 16) == {}
    with pytest.raises(NotImplementedError, match="scale"):
        varlen_options(old, False, 0.5, 16)
    with pytest.raises(NotImplementedError, match="window_size"):
        varlen_options(frozenset(), True, half, 16)


def test_the_operator_keeps_torch_s_rules() -> None:
    q, k, v = heads()
    torch.library.opcheck(attention.attend_each, (q, k, v, ENDS, True, 0.5))
