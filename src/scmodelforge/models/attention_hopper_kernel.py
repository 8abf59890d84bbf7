"""The kernels of `attention_hopper.py`, for Triton: attention and its gradients, block by block.

They compute as FlashAttention-2 does (Dao 2023, algorithms 1 and 2). Forward, keys come in blocks, the largest score so
far and the sum of weights are kept for each row, and what was added up is shrunk whenever the largest grows. Backward,
weights are computed again from the log of these sums: once for the gradients of keys and values, with the queries in
blocks, and once for those of queries, with the keys in blocks. Nobody adds to what another one adds to, so that the
same step gives the same bits. Exponentials are of base 2, which is what the hardware has: scores are scaled by `scale`
= natural scale / log 2.
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
def _work_of_this_program(cu_seqlens, blocks, heads: tl.constexpr, block: tl.constexpr):
    """First row of its block within its sequence, head, and where that sequence begins and how long it is.

    Blocks of the same head and sequence are neighbours, so that they find its keys in the cache.
    """
    program = tl.program_id(0)
    sequence = program // (blocks * heads)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    return (program % blocks) * block, (program // blocks) % heads, start, length


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
    """Attention of the queries of one block."""
    first, head, start, length = _work_of_this_program(cu_seqlens, blocks, heads, query_block)
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


@triton.jit
def mean_gradient(
    out_start,
    gradient_start,
    means_start,
    total,
    heads: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Of each query and head the sum of output times its gradient: the mean gradient of its weights."""
    row, head, channel = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1), tl.arange(0, width)
    is_row = row < total
    place = row[:, None].to(tl.int64) * (heads * width) + head * width + channel[None, :]
    out = tl.load(out_start + place, mask=is_row[:, None], other=0.0).to(tl.float32)
    gradient = tl.load(gradient_start + place, mask=is_row[:, None], other=0.0).to(tl.float32)
    tl.store(means_start + head.to(tl.int64) * total + row, tl.sum(out * gradient, 1), mask=is_row)


@triton.jit
def _add_queries(
    of_k,
    of_v,
    k,
    v,
    queries,
    gradients,
    sums,
    means,
    column,
    first,
    length,
    q_stride,
    gradient_stride,
    scale,
    causal: tl.constexpr,
    partly: tl.constexpr,
    query_block: tl.constexpr,
):
    """One block of queries; `partly`: some of them do not read all keys, or lie behind the end."""
    row = first + tl.arange(0, query_block)
    q_place, place = row[:, None].to(tl.int64) * q_stride, row[:, None].to(tl.int64) * gradient_stride
    if partly:
        is_row = row < length
        q = tl.load(queries + q_place, mask=is_row[:, None], other=0.0)
        gradient = tl.load(gradients + place, mask=is_row[:, None], other=0.0)
        log_sum = tl.load(sums + row, mask=is_row, other=float("inf")) * 1.4426950408889634
        mean = tl.load(means + row, mask=is_row, other=0.0)
    else:
        q, gradient = tl.load(queries + q_place), tl.load(gradients + place)
        log_sum, mean = tl.load(sums + row) * 1.4426950408889634, tl.load(means + row)
    weights = tl.math.exp2(tl.dot(k, tl.trans(q)) * scale - log_sum[None, :])
    if causal and partly:
        weights = tl.where(column[:, None] <= row[None, :], weights, 0.0)
    of_v = tl.dot(weights.to(q.dtype), gradient, of_v)
    of_scores = weights * (tl.dot(v, tl.trans(gradient)) - mean[None, :])
    of_k = tl.dot(of_scores.to(q.dtype), q, of_k)
    return of_k, of_v


@triton.jit
def gradient_of_keys(
    q_start,
    k_start,
    v_start,
    gradient_start,
    sums_start,
    means_start,
    cu_seqlens,
    of_k_start,
    of_v_start,
    q_stride,
    k_stride,
    v_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    total,
    blocks,
    scale,
    natural_scale,
    heads: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    key_block: tl.constexpr,
    query_block: tl.constexpr,
):
    """Gradients of the keys and values of one block, from all queries of their sequence."""
    first, head, start, length = _work_of_this_program(cu_seqlens, blocks, heads, key_block)
    if first >= length:
        return
    column, channel = first + tl.arange(0, key_block), tl.arange(0, width)
    is_column = (column < length)[:, None]
    place = start + column[:, None]
    k = tl.load(
        k_start + place * k_stride + head * k_head_stride + channel[None, :], mask=is_column, other=0.0
    )
    v = tl.load(
        v_start + place * v_stride + head * v_head_stride + channel[None, :], mask=is_column, other=0.0
    )
    stride: tl.constexpr = heads * width
    queries = q_start + start * q_stride + head * q_head_stride + channel[None, :]
    gradients = gradient_start + start * stride + head * width + channel[None, :]
    sums = sums_start + head.to(tl.int64) * total + start
    means = means_start + head.to(tl.int64) * total + start
    of_k = tl.zeros([key_block, width], dtype=tl.float32)
    of_v = tl.zeros([key_block, width], dtype=tl.float32)
    begin, whole = 0, (length // query_block) * query_block
    if causal:
        begin = (first // query_block) * query_block
        beyond = tl.cdiv(first + key_block, query_block) * query_block
        for i in tl.range(begin, tl.minimum(beyond, length), query_block):
            of_k, of_v = _add_queries(
                of_k,
                of_v,
                k,
                v,
                queries,
                gradients,
                sums,
                means,
                column,
                i,
                length,
                q_stride,
                stride,
                scale,
                True,
                True,
                query_block,
            )
        begin = beyond
    for i in tl.range(begin, whole, query_block):
        of_k, of_v = _add_queries(
            of_k,
            of_v,
            k,
            v,
            queries,
            gradients,
            sums,
            means,
            column,
            i,
            length,
            q_stride,
            stride,
            scale,
            causal,
            False,
            query_block,
        )
    for i in tl.range(tl.maximum(begin, whole), length, query_block):
        of_k, of_v = _add_queries(
            of_k,
            of_v,
            k,
            v,
            queries,
            gradients,
            sums,
            means,
            column,
            i,
            length,
            q_stride,
            stride,
            scale,
            causal,
            True,
            query_block,
        )
    there = place * stride + head * width + channel[None, :]
    tl.store(of_k_start + there, (of_k * natural_scale).to(k.dtype), mask=is_column)
    tl.store(of_v_start + there, of_v.to(k.dtype), mask=is_column)


@triton.jit
def _add_keys(
    of_q,
    q,
    gradient,
    log_sum,
    mean,
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
    """One block of keys, as in `_read_block`."""
    column = first + tl.arange(0, key_block)
    k_place, v_place = column[:, None].to(tl.int64) * k_stride, column[:, None].to(tl.int64) * v_stride
    if partly:
        k = tl.load(keys + k_place, mask=column[:, None] < end, other=0.0)
        v = tl.load(values + v_place, mask=column[:, None] < end, other=0.0)
    else:
        k, v = tl.load(keys + k_place), tl.load(values + v_place)
    weights = tl.math.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
    if partly:
        allowed = column[None, :] < end
        if causal:
            allowed = allowed & (column[None, :] <= row[:, None])
        weights = tl.where(allowed, weights, 0.0)
    of_scores = weights * (tl.dot(gradient, tl.trans(v)) - mean[:, None])
    return tl.dot(of_scores.to(k.dtype), k, of_q)


@triton.jit
def gradient_of_queries(
    q_start,
    k_start,
    v_start,
    gradient_start,
    sums_start,
    means_start,
    cu_seqlens,
    of_q_start,
    q_stride,
    k_stride,
    v_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    total,
    blocks,
    scale,
    natural_scale,
    heads: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
):
    """Gradients of the queries of one block, from all keys of their sequence."""
    first, head, start, length = _work_of_this_program(cu_seqlens, blocks, heads, query_block)
    if first >= length:
        return
    row, channel = first + tl.arange(0, query_block), tl.arange(0, width)
    is_row = row < length
    place = start + row[:, None]
    there = place * (heads * width) + head * width + channel[None, :]
    q = tl.load(
        q_start + place * q_stride + head * q_head_stride + channel[None, :], mask=is_row[:, None], other=0.0
    )
    gradient = tl.load(gradient_start + there, mask=is_row[:, None], other=0.0)
    at = head.to(tl.int64) * total + start + row
    log_sum = tl.load(sums_start + at, mask=is_row, other=float("inf")) * 1.4426950408889634
    mean = tl.load(means_start + at, mask=is_row, other=0.0)
    keys = k_start + start * k_stride + head * k_head_stride + channel[None, :]
    values = v_start + start * v_stride + head * v_head_stride + channel[None, :]
    of_q = tl.zeros([query_block, width], dtype=tl.float32)
    end, whole = length, length
    if causal:
        end, whole = tl.minimum(length, first + query_block), tl.minimum(length, first)
    whole = (whole // key_block) * key_block
    for j in tl.range(0, whole, key_block):
        of_q = _add_keys(
            of_q,
            q,
            gradient,
            log_sum,
            mean,
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
        of_q = _add_keys(
            of_q,
            q,
            gradient,
            log_sum,
            mean,
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
    tl.store(of_q_start + there, (of_q * natural_scale).to(q.dtype), mask=is_row[:, None])
