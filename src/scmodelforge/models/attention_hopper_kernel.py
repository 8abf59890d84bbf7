"""The kernel of `attention_hopper.py`, for Triton: queries of one block against all keys of their sequence.

What is written is attention as FlashAttention-2 computes it (Dao 2023, algorithm 1): keys come in blocks, the largest
score so far and the sum of weights are kept for each row, and what was added up is shrunk whenever the largest grows.
"""

import triton
import triton.language as tl


@triton.jit
def _read_block(
    mixed,
    row_sum,
    row_max,
    q,
    keys,
    values,
    row,
    first,
    end,
    k_stride,
    v_stride,
    scale,
    causal: tl.constexpr,
    partly: tl.constexpr,
    key_block: tl.constexpr,
):
    """One block of keys; `partly`: some of them are not to be read, or lie behind the end."""
    column = first + tl.arange(0, key_block)
    k_place, v_place = column[None, :].to(tl.int64) * k_stride, column[:, None].to(tl.int64) * v_stride
    k = tl.load(keys + k_place, mask=column[None, :] < end, other=0.0) if partly else tl.load(keys + k_place)
    scores = tl.dot(q, k)
    if partly:
        allowed = column[None, :] < end
        if causal:
            allowed = allowed & (column[None, :] <= row[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
    largest = tl.maximum(row_max, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - largest[:, None])
    shrink = tl.math.exp2(row_max - largest)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    v = (
        tl.load(values + v_place, mask=column[:, None] < end, other=0.0)
        if partly
        else tl.load(values + v_place)
    )
    mixed = tl.dot(weights.to(v.dtype), v, mixed)
    return mixed, row_sum, largest


@triton.jit
def forward(
    q_start,
    k_start,
    v_start,
    out_start,
    sums_start,
    cu_seqlens,
    q_stride,
    k_stride,
    v_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    total,
    blocks,
    scale,
    heads: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
):
    """Blocks of the same head and sequence are neighbours, so that they find its keys in the cache."""
    program = tl.program_id(0)
    first = (program % blocks) * query_block
    head = (program // blocks) % heads
    sequence = program // (blocks * heads)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if first >= length:
        return
    row, channel = first + tl.arange(0, query_block), tl.arange(0, width)
    is_row = row < length
    place = start + row[:, None]
    q = tl.load(
        q_start + place * q_stride + head * q_head_stride + channel[None, :], mask=is_row[:, None], other=0.0
    )
    keys = k_start + start * k_stride + head * k_head_stride + channel[:, None]
    values = v_start + start * v_stride + head * v_head_stride + channel[None, :]
    mixed = tl.zeros([query_block, width], dtype=tl.float32)
    row_sum = tl.zeros([query_block], dtype=tl.float32)
    row_max = tl.full([query_block], float("-inf"), dtype=tl.float32)
    end, whole = length, length
    if causal:
        end, whole = tl.minimum(length, first + query_block), tl.minimum(length, first)
    whole = (whole // key_block) * key_block
    for j in tl.range(0, whole, key_block):
        mixed, row_sum, row_max = _read_block(
            mixed,
            row_sum,
            row_max,
            q,
            keys,
            values,
            row,
            j,
            end,
            k_stride,
            v_stride,
            scale,
            causal,
            False,
            key_block,
        )
    for j in tl.range(whole, end, key_block):
        mixed, row_sum, row_max = _read_block(
            mixed,
            row_sum,
            row_max,
            q,
            keys,
            values,
            row,
            j,
            end,
            k_stride,
            v_stride,
            scale,
            causal,
            True,
            key_block,
        )
    out = (mixed / row_sum[:, None]).to(out_start.dtype.element_ty)
    tl.store(out_start + place * (heads * width) + head * width + channel[None, :], out, mask=is_row[:, None])
    log_sum = (row_max + tl.math.log2(row_sum)) * 0.6931471805599453  # of base 2 → natural
    tl.store(sums_start + head.to(tl.int64) * total + start + row, log_sum, mask=is_row)
