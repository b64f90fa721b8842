"""Spatial attention: kernels and launches.

forward   [spatial_norm_fwd where q is normalised], spatial_output_fwd
backward  [spatial_query_bwd where P is in several blocks], spatial_output_bwd, spatial_merge_bwd,
          [spatial_norm_bwd where q is normalised]
"""

import torch
import triton
import triton.language as tl

from ... import rng
from ...contract import accumulate_dtype
from ..gradients import empty_gradient, per_head, temperature_gradient
from .launch import block, chunks, precision, prepare_heads, projected_block, within_reach
from .primitives import (
    LOG2E,
    attend,
    attend_backward,
    clamp_norm,
    dot,
    dropout_multiplier,
    exp2_rows,
    gradient_dot,
    gradient_dtype,
    load_rows,
    per_norm,
    softmax_backward,
    softmax_block,
    store_rows,
)


@triton.jit
def spatial_norm_fwd(
    q, q_b, q_n, q_h, q_d, sums, N, chunk,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sum_n q^2 of a chunk: sums (B, H, chunks, D)."""
    chunks, index, h = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    in_d = d < D
    first = index.to(tl.int64) * chunk
    stop = tl.minimum(first + chunk, N)
    total = tl.zeros((BD,), ACC)
    for start in range(first, stop, T):
        n = start + tl.arange(0, T)
        block = load_rows(q + b * q_b + h * q_h, q_n, q_d, n, d, n < stop, in_d).to(ACC)
        total += tl.sum(block * block, 0)
    tl.store(sums + ((b * H + h) * chunks + index) * D + d, total, mask=in_d)


@triton.jit
def scaled(q, t, norm, NORMALIZE: tl.constexpr):
    """(q', t') such that t (q / norm) k^T = t' q' k^T.

    Without a norm q has no rounding to come, so t waits for the product.
    """
    if NORMALIZE:
        return (q.to(norm.dtype) * (t / norm)[None, :]).to(q.dtype), 1.0
    else:
        return q, t


@triton.jit
def spatial_output_fwd(
    q, q_b, q_n, q_h, q_d, k_proj, k_b, k_p, k_h, k_d, v_proj, v_b, v_p, v_h, v_d,
    temperature, temperature_h, sums, count, seed, out, q_norm, N, threshold,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr,
    BD: tl.constexpr, BP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, D) of one tile of a head; q_norm (B, H, D), ones where sums is absent."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    d = tl.arange(0, BD)
    in_n, in_d = n < N, d < D
    head = b * H + h
    norm = tl.full((BD,), 1.0, ACC)
    if sums is not None:
        square = tl.zeros((BD,), ACC)
        for t in range(0, count):
            square += tl.load(sums + (head * count + t) * D + d, mask=in_d, other=0.0)
        norm = clamp_norm(square)
    if tl.program_id(0) == 0:
        tl.store(q_norm + head * D + d, norm, mask=in_d)
    t = tl.load(temperature + h * temperature_h).to(ACC) * LOG2E
    tile = load_rows(q + b * q_b + h * q_h, q_n, q_d, n, d, in_n, in_d)
    tile, factor = scaled(tile, t, norm, sums is not None)
    result, _, _, _ = attend(
        tile, factor, None, k_proj + b * k_b + h * k_h, k_p, k_d,
        v_proj + b * v_b + h * v_h, v_p, v_d,
        seed, head * N + n, threshold, tl.zeros((T, BD), ACC), D, P, BP, DROPOUT, PRECISION,
    )  # fmt: skip
    store_rows(out + b * N * H * D + h * D, H * D, 1, n, d, in_n, in_d, result)


@triton.jit
def spatial_query_bwd(
    dout, g_b, g_n, g_h, g_d, q, q_b, q_n, q_h, q_d, k_proj, k_b, k_p, k_h, k_d,
    v_proj, v_b, v_p, v_h, v_d, temperature, temperature_h, q_norm, seed,
    dq, d_b, d_n, d_h, d_d, rows, N, threshold,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr,
    BD: tl.constexpr, BP: tl.constexpr, NORMALIZE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a head: dq without the norm's part, and rows (B, H, 3, N) of `attend`."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    d = tl.arange(0, BD)
    in_n, in_d = n < N, d < D
    head = b * H + h
    norm = tl.load(q_norm + head * D + d, mask=in_d, other=1.0)
    t = tl.load(temperature + h * temperature_h).to(ACC)
    k_proj += b * k_b + h * k_h
    v_proj += b * v_b + h * v_h
    tile = load_rows(q + b * q_b + h * q_h, q_n, q_d, n, d, in_n, in_d)
    tile, factor = scaled(tile, t * LOG2E, norm, NORMALIZE)
    gradient = load_rows(dout + b * g_b + h * g_h, g_n, g_d, n, d, in_n, in_d)
    zero = tl.zeros((T, BD), ACC)
    _, highest, total, along = attend(
        tile, factor, gradient, k_proj, k_p, k_d, v_proj, v_p, v_d,
        seed, head * N + n, threshold, zero, D, P, BP, DROPOUT, PRECISION, OUT=False,
    )  # fmt: skip
    rows += head * 3 * N + n
    tl.store(rows, highest, mask=in_n)
    rows += N
    tl.store(rows, total, mask=in_n)
    rows += N
    tl.store(rows, along, mask=in_n)
    result = attend_backward(
        tile, factor, gradient, highest, total, along,
        k_proj, k_p, k_d, v_proj, v_p, v_d, seed, head * N + n, threshold, zero,
        D, P, BP, DROPOUT, PRECISION,
    )  # fmt: skip
    result *= (t / norm)[None, :]
    store_rows(dq + b * d_b + h * d_h, d_n, d_d, n, d, in_n, in_d, result)


@triton.jit
def spatial_output_bwd(
    dout, g_b, g_n, g_h, g_d, q, q_b, q_n, q_h, q_d, k_proj, k_b, k_p, k_h, k_d,
    v_proj, v_b, v_p, v_h, v_d, temperature, temperature_h, q_norm, seed,
    dq, d_b, d_n, d_h, d_d, rows, sums, temperature_sums, N, chunk, threshold,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr,
    BD: tl.constexpr, BP: tl.constexpr, NORMALIZE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head over one chunk: dq without the norm's part; sums (B, H, chunks, 2, P, D).

    A program has one block of projected tokens; of several, `spatial_query_bwd` has made dq
    and rows. Without a norm temperature_sums (B, H, chunks, blocks) are its gradient, of factors
    that no cast has rounded: it may cancel to little.
    """
    P_BLOCKS: tl.constexpr = (P + BP - 1) // BP
    chunks, index = tl.num_programs(0), tl.program_id(0)
    h, block = tl.program_id(1) // P_BLOCKS, tl.program_id(1) % P_BLOCKS
    b = tl.program_id(2).to(tl.int64)
    d, p = tl.arange(0, BD), block * BP + tl.arange(0, BP)
    in_d, in_p = d < D, p < P
    head = b * H + h
    dtype: tl.constexpr = q.dtype.element_ty
    small: tl.constexpr = gradient_dtype(dtype, ACC)
    norm = tl.load(q_norm + head * D + d, mask=in_d, other=1.0)
    t = tl.load(temperature + h * temperature_h).to(ACC)
    k_proj += b * k_b + h * k_h
    v_proj += b * v_b + h * v_h
    k = load_rows(k_proj, k_p, k_d, p, d, in_p, in_d)
    v = load_rows(v_proj, v_p, v_d, p, d, in_p, in_d)
    dkeys, dv_proj = tl.zeros((BP, BD), ACC), tl.zeros((BP, BD), ACC)
    dtemperature = tl.zeros((T,), ACC)
    first = index.to(tl.int64) * chunk
    stop = tl.minimum(first + chunk, N)
    # Hoisted addresses would take the registers that the sums need.
    for start in tl.range(first, stop, T, disable_licm=True):
        n = start + tl.arange(0, T)
        in_n = n < stop
        tile = load_rows(q + b * q_b + h * q_h, q_n, q_d, n, d, in_n, in_d)
        query, factor = scaled(tile, t * LOG2E, norm, NORMALIZE)
        products = dot(query, tl.trans(k), tl.zeros((T, BP), ACC), PRECISION)
        logits = factor * products
        number = head * N + n
        gradient = load_rows(dout + b * g_b + h * g_h, g_n, g_d, n, d, in_n, in_d)
        if P_BLOCKS == 1:
            weights, total = exp2_rows(logits, in_p)
            weights /= total[:, None]
        else:
            row = rows + head * 3 * N + n
            highest = tl.load(row, mask=in_n, other=0.0)
            row += N
            total = tl.load(row, mask=in_n, other=1.0)
            row += N
            along = tl.load(row, mask=in_n, other=0.0)
            weights = softmax_block(logits, in_p, highest, total)
        attention = weights
        if DROPOUT:
            multiplier = dropout_multiplier(seed, number, block * BP, BP, threshold, 1, ACC)
            attention = weights * multiplier
        dattention = dot(gradient, tl.trans(v), tl.zeros((T, BP), ACC), PRECISION)
        if DROPOUT:
            dattention *= multiplier
        if P_BLOCKS == 1:
            dlogits = softmax_backward(weights, dattention)
        else:
            dlogits = weights * (dattention - along[:, None])
        dlogits = tl.where(in_n[:, None], dlogits, 0.0)
        if not NORMALIZE:
            dtemperature += tl.sum(dlogits * products, 1)
        dlogits = dlogits.to(small)
        if P_BLOCKS == 1:
            dq_tile = gradient_dot(dlogits, k.to(small), tl.zeros((T, BD), ACC), dtype, PRECISION)
            dq_tile *= (t / norm)[None, :]
            store_rows(dq + b * d_b + h * d_h, d_n, d_d, n, d, in_n, in_d, dq_tile)
        dkeys = gradient_dot(tl.trans(dlogits), tile.to(small), dkeys, dtype, PRECISION)
        dv_proj = dot(tl.trans(attention.to(dtype)), gradient, dv_proj, PRECISION)
    sums += (head * chunks + index) * 2 * P * D
    store_rows(sums, D, 1, p, d, in_p, in_d, dkeys)
    store_rows(sums + P * D, D, 1, p, d, in_p, in_d, dv_proj)
    if not NORMALIZE:
        target = temperature_sums + (head * chunks + index) * P_BLOCKS + block
        tl.store(target, tl.sum(dtemperature, 0))


@triton.jit
def spatial_merge_bwd(
    sums, count, temperature_sums, parts, k_proj, k_b, k_p, k_h, k_d,
    temperature, temperature_h, q_norm, dk_proj, dk_b, dk_p, dk_h, dk_d,
    dv_proj, dv_b, dv_p, dv_h, dv_d, dtemperature, dnorm,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr,
    BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Of one head: gradients of k_proj, v_proj and temperature (B, H), d|q|/|q| (B, H, D)."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * H + h
    d = tl.arange(0, BD)
    in_d = d < D
    norm = tl.load(q_norm + head * D + d, mask=in_d, other=1.0)
    t = tl.load(temperature + h * temperature_h).to(ACC)
    along, total = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for first in range(0, P, BP):
        p = first + tl.arange(0, BP)
        in_p = p < P
        dkeys, dv = tl.zeros((BP, BD), ACC), tl.zeros((BP, BD), ACC)
        source = sums + head * count * 2 * P * D
        for _ in range(0, count):
            dkeys += load_rows(source, D, 1, p, d, in_p, in_d)
            dv += load_rows(source + P * D, D, 1, p, d, in_p, in_d)
            source += 2 * P * D
        k = load_rows(k_proj + b * k_b + h * k_h, k_p, k_d, p, d, in_p, in_d).to(ACC)
        per_temperature = tl.sum(dkeys * k / norm[None, :], 0)
        total += per_temperature
        along += per_temperature * t
        target = dk_proj + b * dk_b + h * dk_h
        store_rows(target, dk_p, dk_d, p, d, in_p, in_d, dkeys * (t / norm)[None, :])
        store_rows(dv_proj + b * dv_b + h * dv_h, dv_p, dv_d, p, d, in_p, in_d, dv)
    value = tl.sum(total, 0)
    if temperature_sums is not None:
        terms = tl.zeros((BT,), ACC)
        for first in range(0, parts, BT):
            i = first + tl.arange(0, BT)
            terms += tl.load(temperature_sums + head * parts + i, mask=i < parts, other=0.0)
        value = tl.sum(terms, 0)
    tl.store(dtemperature + head, value)
    tl.store(dnorm + head * D + d, per_norm(along, norm), mask=in_d)


@triton.jit
def spatial_norm_bwd(
    q, q_b, q_n, q_h, q_d, dnorm, dq, d_b, d_n, d_h, d_d, N,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq += q d|q|/|q|."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    d = tl.arange(0, BD)
    in_n, in_d = n < N, d < D
    factor = tl.load(dnorm + (b * H + h) * D + d, mask=in_d, other=0.0)
    tile = load_rows(q + b * q_b + h * q_h, q_n, q_d, n, d, in_n, in_d).to(ACC)
    target = dq + b * d_b + h * d_h
    value = load_rows(target, d_n, d_d, n, d, in_n, in_d).to(ACC) + tile * factor[None, :]
    store_rows(target, d_n, d_d, n, d, in_n, in_d, value)


def forward(q, k_proj, v_proj, temperature, seed, *, normalize, dropout_p):
    """Op `spatial_attention`, see `ops`."""
    B, N, H, D = q.shape
    P, dtype = k_proj.shape[1], accumulate_dtype(q.dtype)
    sums, count = None, 0
    if normalize:
        launch, common = prepare_heads("spatial_norm_fwd", q, P)
        count, size = chunks(N, launch)
        sums = q.new_empty((B, H, count, D), dtype=dtype)
        spatial_norm_fwd[(count, H, B)](q, *q.stride(), sums, N, size, T=launch.rows, **common)
    out, q_norm = q.new_empty((B, N, H, D)), q.new_empty((B, H, D), dtype=dtype)
    launch, common = prepare_heads("spatial_output_fwd", q, P)
    T = launch.rows
    spatial_output_fwd[(triton.cdiv(N, T), H, B)](
        q, *q.stride(), k_proj, *k_proj.stride(), v_proj, *v_proj.stride(), *per_head(temperature),
        sums, count, seed, out, q_norm, N, rng.threshold(dropout_p),
        P=P, T=T, BP=projected_block(D, P, q.element_size()), DROPOUT=dropout_p > 0,
        PRECISION=precision(q), **common,
    )  # fmt: skip
    return out, q_norm


def backward(dout, q, k_proj, v_proj, temperature, q_norm, seed, *, normalize, dropout_p):
    """Op `spatial_attention_bwd`, see `ops`."""
    B, N, H, D = q.shape
    P = k_proj.shape[1]
    dout = within_reach(dout)
    dq, dk_proj, dv_proj = (empty_gradient(t, q) for t in (q, k_proj, v_proj))
    tensors = (
        dout, *dout.stride(), q, *q.stride(), k_proj, *k_proj.stride(), v_proj, *v_proj.stride(),
        *per_head(temperature), q_norm, seed, dq, *dq.stride(),
    )  # fmt: skip
    threshold, BP = rng.threshold(dropout_p), projected_block(D, P, q.element_size())
    options = {
        "P": P, "BP": BP, "NORMALIZE": normalize, "DROPOUT": dropout_p > 0,
        "PRECISION": precision(q, "spatial_output_bwd"),
    }  # fmt: skip
    blocks, rows = triton.cdiv(P, BP), None
    if blocks > 1:
        rows = q_norm.new_empty((B, H, 3, N))
        launch, common = prepare_heads("spatial_query_bwd", q, P)
        spatial_query_bwd[(triton.cdiv(N, launch.rows), H, B)](
            *tensors, rows, N, threshold, T=launch.rows, **options, **common
        )
    launch, common = prepare_heads("spatial_output_bwd", q, P)
    count, size = chunks(N, launch)
    sums = q_norm.new_empty((B, H, count, 2, P, D))
    temperature_sums = None if normalize else q_norm.new_empty((B, H, count, blocks))
    spatial_output_bwd[(count, H * blocks, B)](
        *tensors, rows, sums, temperature_sums, N, size, threshold,
        T=launch.rows, **options, **common,
    )  # fmt: skip
    dtemperature, dnorm = q_norm.new_empty((B, H)), torch.empty_like(q_norm)
    launch, common = prepare_heads("spatial_merge_bwd", q, P)
    spatial_merge_bwd[(H, B)](
        sums, count, temperature_sums, count * blocks,
        k_proj, *k_proj.stride(), *per_head(temperature), q_norm,
        dk_proj, *dk_proj.stride(), dv_proj, *dv_proj.stride(), dtemperature, dnorm,
        P=P, BP=block(P, launch.rows), BT=64, **common,
    )  # fmt: skip
    if normalize:
        launch, common = prepare_heads("spatial_norm_bwd", q, P)
        spatial_norm_bwd[(triton.cdiv(N, launch.rows), H, B)](
            q, *q.stride(), dnorm, dq, *dq.stride(), N, T=launch.rows, **common
        )
    return dq, dk_proj, dv_proj, temperature_gradient(dtemperature.sum(0), temperature)
