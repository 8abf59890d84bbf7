"""Attention over packed sequences equals the plain formula, whatever way it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from scmodelforge.models import attention, attention_cpu, attention_gpu
from scmodelforge.models.attention import attend, bias_in_channels
from scmodelforge.models.attention_gpu import BLOCK, change_of_scores, varlen_options, who_reads
from scmodelforge.models.sequences import Sequences

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
    "capped bias": (replace(PLAIN, key_bias=BIAS), 2.0),
    "causal bias": (replace(PLAIN, causal=True, key_bias=BIAS), None),
    "bias, not to itself": (replace(PLAIN, key_bias=BIAS, biases_itself=False), None),
    "read by some": (replace(PLAIN, read_by_all=FEW), None),
    "all at once": (Sequences(ENDS, 7, True, BIAS, biases_itself=False, read_by_all=FEW), 2.0),
    "all but the cap": (Sequences(ENDS, 7, True, BIAS, biases_itself=False, read_by_all=FEW), None),
}
FASTEST = ("plain", "causal", "bias", "causal bias")  # what needs no mask


def heads(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOTAL, HEADS, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]


def dense(q, k, v, sequences: Sequences, soft_cap: float | None = None) -> torch.Tensor:
    """All tokens against all, with everything that is not read masked out."""
    lengths, total = sequences.cu_seqlens.diff(), len(q)
    number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    allowed, itself = number[:, None] == number, torch.eye(total, dtype=torch.bool)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if sequences.key_bias is not None:
        bias = sequences.key_bias.expand(total, total)
        scores = scores + (bias if sequences.biases_itself else bias.masked_fill(itself, 0))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if sequences.causal:
        allowed = allowed & torch.ones(total, total, dtype=torch.bool).tril()
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
    for kind in FASTEST:
        attend(*heads(), *KINDS[kind])


@pytest.mark.parametrize("kind", FASTEST)
def test_gradients_of_double_precision_are_those_of_finite_differences(kind: str) -> None:
    inputs = [x.detach().double().requires_grad_() for x in heads()]
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, *KINDS[kind]), inputs)


@pytest.mark.parametrize("kind", ["plain", "causal", "capped causal bias", "read by some"])
def test_half_precision_loses_no_more_than_its_rounding(kind: str) -> None:
    sequences, soft_cap = KINDS[kind]
    half = [x.detach().bfloat16().requires_grad_() for x in heads()]
    exact = [x.detach().float().requires_grad_() for x in half]
    mixed, expected = attend(*half, sequences, soft_cap), dense(*exact, sequences, soft_cap)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, atol=0.02, rtol=0.02)
    for result in (mixed, expected):
        result.float().square().sum().backward()
    for ours, theirs in zip(half, exact, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all_are_no_trouble(kind: str) -> None:
    sequences, soft_cap = KINDS[kind]
    bias, everyone = (None if x is None else x[:0] for x in (sequences.key_bias, sequences.read_by_all))
    empty = replace(sequences, cu_seqlens=torch.zeros(3).int(), key_bias=bias, read_by_all=everyone)
    assert attend(*(x[:0] for x in heads()), empty, soft_cap).shape == (0, HEADS, WIDTH)


@pytest.mark.parametrize("kind", ["plain", "causal", "capped", "read by some"])
def test_dropout_leaves_out_weights_and_keeps_the_mean(kind: str) -> None:
    sequences, soft_cap = KINDS[kind]
    q, k, v = (x.detach() for x in heads())
    torch.manual_seed(0)
    drawn = torch.stack([attend(q, k, v, sequences, soft_cap, 0.25) for _ in range(1500)])
    single = int(ENDS[3])  # a cell of one token reads itself, or nothing
    kept = (drawn[:, single] == 0).all(dim=-1)
    assert 0.2 < kept.float().mean() < 0.3
    expected = dense(q, k, v, sequences, soft_cap)
    assert (drawn.mean(dim=0) - expected).abs().max() < 0.12 < (drawn[0] - expected).abs().max()


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
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gpu_is_told_is_the_same_formula(kind: str) -> None:
    sequences, soft_cap = KINDS[kind]
    expected = dense(*heads(), sequences, soft_cap)
    reads, changed = who_reads(sequences, TOTAL), change_of_scores(sequences, TOTAL, soft_cap)
    q, k, v = heads()
    i, j = torch.meshgrid(torch.arange(TOTAL), torch.arange(TOTAL), indexing="ij")
    scores = changed(torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(WIDTH), 0, 0, i, j)
    weights = scores.masked_fill(~reads(0, 0, i, j), -torch.inf).softmax(-1)
    torch.testing.assert_close(torch.einsum("hij,jhd->ihd", weights, v), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # FlexAttention itself, which on the CPU has no backward pass
        mixed = attention_gpu.flexible(q, k, v, sequences, soft_cap, 1 / math.sqrt(WIDTH))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_gpu_reads_sequences_longer_and_shorter_than_its_blocks() -> None:
    lengths = torch.tensor([BLOCK + 9, 0, 1, 100, BLOCK, 3])
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    total = int(ends[-1])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, HEADS, 16, generator=generator) for _ in range(3))
    bias = torch.rand(total, generator=generator) * 5
    sequences = Sequences(ends, int(lengths.max()), causal=True, key_bias=bias, biases_itself=False)
    mixed = attention_gpu.flexible(q, k, v, sequences, 4.0, 1 / math.sqrt(16))
    torch.testing.assert_close(mixed, dense(q, k, v, sequences, 4.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("some", [False, True])
@given(
    lengths=st.lists(st.sampled_from([0, 1, 90, 127, 128, 129, 300]), min_size=1, max_size=6),
    tail=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_a_gpu_looks_at_the_blocks_that_are_read_and_no_others(
    causal: bool, some: bool, lengths: list[int], tail: bool
) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(ends[-1]) + 100 * tail
    everyone = torch.arange(total) % 3 != 1 if some else None
    sequences = Sequences(ends, max(lengths), causal, read_by_all=everyone)
    blocks = attention_gpu.blocks_of(sequences, total)
    padded = total + -total % BLOCK
    reads = who_reads(sequences, padded)
    pairs = create_mask(reads, None, None, padded, padded, device="cpu")[0, 0]
    n = padded // BLOCK
    if n == 0:
        return
    by_block = pairs.view(n, BLOCK, n, BLOCK).transpose(1, 2).flatten(2)
    partly = torch.zeros(n, n, dtype=torch.bool)
    whole = torch.zeros(n, n, dtype=torch.bool)
    for found, counts, indices in (
        (partly, blocks.kv_num_blocks, blocks.kv_indices),
        (whole, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for i in range(n):
            found[i, indices[0, 0, i, : counts[0, 0, i]].long()] = True
    assert not (partly & whole).any()
    if everyone is None:
        assert torch.equal(partly | whole, by_block.any(2)), "none is missed, and none looked at in vain"
        assert torch.equal(whole, by_block.all(2))
    else:
        assert not (by_block.any(2) & ~(partly | whole)).any()
        assert not whole.any()


@pytest.mark.parametrize("kind", FASTEST)
@pytest.mark.parametrize("parameters", [{"is_causal", "scale"}, {"window_size", "scale"}])
def test_the_kernel_of_a_gpu_gets_heads_of_a_width_that_it_takes(
    kind: str, parameters: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(
        q, k, v, starts, ends, longest, longest_read, is_causal=False, window_size=(-1, -1), scale=None
    ):
        assert all(x.stride(-1) == 1 and x.shape[-1] % attention_gpu.CHANNELS == 0 for x in (q, k, v))
        assert starts is ends
        assert longest == longest_read == max(LENGTHS)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        causal = is_causal or window_size == (-1, 0)
        # `dense` scales by the width that it sees.
        return dense(q * scale * math.sqrt(q.shape[-1]), k, v, Sequences(starts, longest, causal))

    monkeypatch.setattr(attention_gpu, "varlen_attn", kernel)
    monkeypatch.setattr(attention_gpu, "VARLEN_PARAMETERS", frozenset(parameters))
    sequences, _ = KINDS[kind]
    q, k, v = (x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in heads())
    expected, scale = dense(q, k, v, sequences), 1 / math.sqrt(WIDTH)
    if sequences.key_bias is not None:
        q, k, v = bias_in_channels(q, k, v, sequences.key_bias, scale)
    mixed = attention_gpu.variable_length(q, k, v, sequences, scale)[..., :WIDTH]
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


@pytest.mark.parametrize(("causal", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_operator_keeps_torch_s_rules(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in heads())
    torch.library.opcheck(attention_cpu.attend_each, (q, k, v, ENDS, ENDS, causal, 0.5))
