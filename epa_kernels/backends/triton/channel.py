"""Channel attention: kernels and launches.

forward   channel_gram_fwd, channel_mix_fwd, channel_output_fwd
backward  channel_gram_bwd, channel_mix_bwd, channel_output_bwd
"""

import torch
import triton
import triton.language as tl

from ... import rng
from ...contract import accumulate_dtype
from ..gradients import empty_gradient, per_head, temperature_gradient
from .launch import block, chunks, precision, prepare_heads, within_reach
from .primitives import (
    channel_map,
    clamp_norm,
    dot,
    dropout_multiplier,
    load_rows,
    per_norm,
    softmax_backward,
    store_rows,
)


@triton.jit
def gram_of_chunk(
    a, a_b, a_n, a_h, a_d, c, c_b, c_n, c_h, c_d, sums, N, chunk,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, SQUARES: tl.constexpr, T: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a^T c of a chunk's tokens, and with SQUARES the sums of squares of a and of c."""
    SIZE: tl.constexpr = D * D + 2 * D if SQUARES else D * D
    chunks, index, h = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    in_d = d < D
    first = index.to(tl.int64) * chunk
    stop = tl.minimum(first + chunk, N)
    gram = tl.zeros((BD, BD), ACC)
    a_square, c_square = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for start in range(first, stop, T):
        n = start + tl.arange(0, T)
        a_tile = load_rows(a + b * a_b + h * a_h, a_n, a_d, n, d, n < stop, in_d)
        c_tile = load_rows(c + b * c_b + h * c_h, c_n, c_d, n, d, n < stop, in_d)
        gram = dot(tl.trans(a_tile), c_tile, gram, PRECISION)
        if SQUARES:
            a_square += tl.sum(a_tile.to(ACC) * a_tile.to(ACC), 0)
            c_square += tl.sum(c_tile.to(ACC) * c_tile.to(ACC), 0)
    sums += ((b * H + h) * chunks + index) * SIZE
    store_rows(sums, D, 1, d, d, in_d, in_d, gram)
    if SQUARES:
        tl.store(sums + D * D + d, a_square, mask=in_d)
        tl.store(sums + D * D + D + d, c_square, mask=in_d)


@triton.jit
def channel_gram_fwd(
    q, q_b, q_n, q_h, q_d, k, k_b, k_n, k_h, k_d, sums, N, chunk,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q^T k of a chunk and the sums of squares of q and k: sums (B, H, chunks, D*D + 2*D)."""
    gram_of_chunk(
        q, q_b, q_n, q_h, q_d, k, k_b, k_n, k_h, k_d, sums, N, chunk,
        H, D, ACC, True, T, BD, PRECISION,
    )  # fmt: skip


@triton.jit
def channel_gram_bwd(
    dout, g_b, g_n, g_h, g_d, v, v_b, v_n, v_h, v_d, sums, N, chunk,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dout^T v of a chunk, from which the gradient of the map comes: sums (B, H, chunks, D*D)."""
    gram_of_chunk(
        dout, g_b, g_n, g_h, g_d, v, v_b, v_n, v_h, v_d, sums, N, chunk,
        H, D, ACC, False, T, BD, PRECISION,
    )  # fmt: skip


@triton.jit
def channel_mix_fwd(
    sums, count, temperature, temperature_h, seed, gram, q_norm, k_norm, attention, threshold,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of one head: gram and attention (B, H, D, D), norms (B, H, D)."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * H + h
    d = tl.arange(0, BD)
    in_d = d < D
    products = tl.zeros((BD, BD), ACC)
    q_square, k_square = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    sums += head * count * (D * D + 2 * D)
    for _ in range(0, count):
        products += load_rows(sums, D, 1, d, d, in_d, in_d)
        q_square += tl.load(sums + D * D + d, mask=in_d, other=0.0)
        k_square += tl.load(sums + D * D + D + d, mask=in_d, other=0.0)
        sums += D * D + 2 * D
    q_length, k_length = clamp_norm(q_square), clamp_norm(k_square)
    tl.store(q_norm + head * D + d, q_length, mask=in_d)
    tl.store(k_norm + head * D + d, k_length, mask=in_d)
    store_rows(gram + head * D * D, D, 1, d, d, in_d, in_d, products)
    t = tl.load(temperature + h * temperature_h).to(ACC)
    weights, _, _ = channel_map(products, q_length, k_length, t, D)
    if DROPOUT:
        weights *= dropout_multiplier(seed, head * D + d, 0, BD, threshold, 0, ACC)
    store_rows(attention + head * D * D, D, 1, d, d, in_d, in_d, weights)


@triton.jit
def channel_output_fwd(
    v, v_b, v_n, v_h, v_d, attention, out, N,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, D) = v A^T of one tile of a head, BK channels of v at a time."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    d = tl.arange(0, BD)
    in_n, in_d = n < N, d < D
    v += b * v_b + h * v_h
    result = tl.zeros((T, BD), ACC)
    for first in range(0, D, BK):
        j = first + tl.arange(0, BK)
        tile = load_rows(v, v_n, v_d, n, j, in_n, j < D)
        weights = load_rows(attention + (b * H + h) * D * D, 1, D, j, d, j < D, in_d)
        result = dot(tile, weights.to(tile.dtype), result, PRECISION)
    store_rows(out + b * N * H * D + h * D, H * D, 1, n, d, in_n, in_d, result)


@triton.jit
def channel_mix_bwd(
    sums, count, gram, q_norm, k_norm, temperature, temperature_h, seed,
    attention, ddots, dq_norm, dk_norm, dtemperature, threshold,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of one head: attention again, gradients of <q_i, k_j>, d|q|/|q|, d|k|/|k| and temperature."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * H + h
    d = tl.arange(0, BD)
    in_d = d < D
    dattention = tl.zeros((BD, BD), ACC)
    sums += head * count * D * D
    for _ in range(0, count):
        dattention += load_rows(sums, D, 1, d, d, in_d, in_d)
        sums += D * D
    products = load_rows(gram + head * D * D, D, 1, d, d, in_d, in_d)
    q_length = tl.load(q_norm + head * D + d, mask=in_d, other=1.0)
    k_length = tl.load(k_norm + head * D + d, mask=in_d, other=1.0)
    t = tl.load(temperature + h * temperature_h).to(ACC)
    softmax, cosine, norms = channel_map(products, q_length, k_length, t, D)
    weights = softmax
    if DROPOUT:
        multiplier = dropout_multiplier(seed, head * D + d, 0, BD, threshold, 0, ACC)
        weights = softmax * multiplier
        dattention *= multiplier
    store_rows(attention + head * D * D, D, 1, d, d, in_d, in_d, weights)
    dlogits = tl.where(in_d[:, None], softmax_backward(softmax, dattention), 0.0)
    tl.store(dtemperature + head, tl.sum(tl.sum(dlogits * cosine, 1), 0))
    dcosine = t * dlogits
    store_rows(ddots + head * D * D, D, 1, d, d, in_d, in_d, dcosine / norms)
    along = dcosine * cosine
    tl.store(dq_norm + head * D + d, per_norm(tl.sum(along, 1), q_length), mask=in_d)
    tl.store(dk_norm + head * D + d, per_norm(tl.sum(along, 0), k_length), mask=in_d)


@triton.jit
def channel_output_bwd(
    dout, g_b, g_n, g_h, g_d, q, q_b, q_n, q_h, q_d, k, k_b, k_n, k_h, k_d,
    attention, ddots, dq_norm, dk_norm,
    dq, dq_b, dq_n, dq_h, dq_d, dk, dk_b, dk_n, dk_h, dk_d, dv, dv_b, dv_n, dv_h, dv_d, N,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = k ddots^T + q d|q|/|q|, dk = q ddots + k d|k|/|k|, dv = dout A of one tile of a head."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    d = tl.arange(0, BD)
    in_n, in_d = n < N, d < D
    q, k, dout = q + b * q_b + h * q_h, k + b * k_b + h * k_h, dout + b * g_b + h * g_h
    attention, ddots = attention + head * D * D, ddots + head * D * D
    factor = tl.load(dq_norm + head * D + d, mask=in_d, other=0.0)
    dq_tile = load_rows(q, q_n, q_d, n, d, in_n, in_d).to(ACC) * factor[None, :]
    factor = tl.load(dk_norm + head * D + d, mask=in_d, other=0.0)
    dk_tile = load_rows(k, k_n, k_d, n, d, in_n, in_d).to(ACC) * factor[None, :]
    dv_tile = tl.zeros((T, BD), ACC)
    for first in range(0, D, BK):
        j = first + tl.arange(0, BK)
        in_j = j < D
        # In the accumulation dtype: of the order of 1/N, they would underflow in float16.
        ddot = load_rows(ddots, 1, D, j, d, in_j, in_d)
        tile = load_rows(k, k_n, k_d, n, j, in_n, in_j).to(ACC)
        dq_tile = dot(tile, ddot, dq_tile, PRECISION)
        ddot = load_rows(ddots, D, 1, j, d, in_j, in_d)
        tile = load_rows(q, q_n, q_d, n, j, in_n, in_j).to(ACC)
        dk_tile = dot(tile, ddot, dk_tile, PRECISION)
        tile = load_rows(dout, g_n, g_d, n, j, in_n, in_j)
        weights = load_rows(attention, D, 1, j, d, in_j, in_d).to(tile.dtype)
        dv_tile = dot(tile, weights, dv_tile, PRECISION)
    store_rows(dq + b * dq_b + h * dq_h, dq_n, dq_d, n, d, in_n, in_d, dq_tile)
    store_rows(dk + b * dk_b + h * dk_h, dk_n, dk_d, n, d, in_n, in_d, dk_tile)
    store_rows(dv + b * dv_b + h * dv_h, dv_n, dv_d, n, d, in_n, in_d, dv_tile)


def forward(q, k, v, temperature, seed, *, dropout_p):
    """Op `channel_attention`, see `ops`."""
    B, N, H, D = q.shape
    dtype = accumulate_dtype(q.dtype)
    launch, common = prepare_heads("channel_gram_fwd", q)
    count, size = chunks(N, launch)
    sums = q.new_empty((B, H, count, D * D + 2 * D), dtype=dtype)
    channel_gram_fwd[(count, H, B)](
        q, *q.stride(), k, *k.stride(), sums, N, size,
        T=launch.rows, PRECISION=precision(q), **common,
    )  # fmt: skip
    gram, attention = (q.new_empty((B, H, D, D), dtype=dtype) for _ in range(2))
    q_norm, k_norm = (q.new_empty((B, H, D), dtype=dtype) for _ in range(2))
    _, common = prepare_heads("channel_mix_fwd", q)
    channel_mix_fwd[(H, B)](
        sums, count, *per_head(temperature), seed, gram, q_norm, k_norm, attention,
        rng.threshold(dropout_p), DROPOUT=dropout_p > 0, **common,
    )  # fmt: skip
    out = q.new_empty((B, N, H, D))
    launch, common = prepare_heads("channel_output_fwd", q)
    channel_output_fwd[(triton.cdiv(N, launch.rows), H, B)](
        v, *v.stride(), attention, out, N,
        T=launch.rows, BK=block(D, launch.columns), PRECISION=precision(q), **common,
    )  # fmt: skip
    return out, gram, q_norm, k_norm


def backward(dout, q, k, v, temperature, gram, q_norm, k_norm, seed, *, dropout_p):
    """Op `channel_attention_bwd`, see `ops`."""
    B, N, H, D = q.shape
    dout = within_reach(dout)
    launch, common = prepare_heads("channel_gram_bwd", q)
    count, size = chunks(N, launch)
    sums = gram.new_empty((B, H, count, D, D))
    channel_gram_bwd[(count, H, B)](
        dout, *dout.stride(), v, *v.stride(), sums, N, size,
        T=launch.rows, PRECISION=precision(q), **common,
    )  # fmt: skip
    attention, ddots = torch.empty_like(gram), torch.empty_like(gram)
    dq_norm, dk_norm = torch.empty_like(q_norm), torch.empty_like(k_norm)
    dtemperature = gram.new_empty((B, H))
    _, common = prepare_heads("channel_mix_bwd", q)
    channel_mix_bwd[(H, B)](
        sums, count, gram, q_norm, k_norm, *per_head(temperature), seed,
        attention, ddots, dq_norm, dk_norm, dtemperature, rng.threshold(dropout_p),
        DROPOUT=dropout_p > 0, **common,
    )  # fmt: skip
    dq, dk, dv = (empty_gradient(t, q) for t in (q, k, v))
    # TF32 keeps all that q and k of 16 bits have.
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    launch, common = prepare_heads("channel_output_bwd", q)
    channel_output_bwd[(triton.cdiv(N, launch.rows), H, B)](
        dout, *dout.stride(), q, *q.stride(), k, *k.stride(), attention, ddots, dq_norm, dk_norm,
        dq, *dq.stride(), dk, *dk.stride(), dv, *dv.stride(), N,
        T=launch.rows, BK=block(D, launch.columns),
        PRECISION="tf32" if is_half else precision(q), **common,
    )  # fmt: skip
    return dq, dk, dv, temperature_gradient(dtemperature.sum(0), temperature)
