"""Products of paired attention whose factors lie in memory: where out_s' does.

The launch is forward's alone. Backward, further programs of the mix make the product of dy and Wo1
by `product_tile`, and those of the mix's backward dWo1 by `out_proj_gradient`.
"""

import triton
import triton.language as tl

from .primitives import (
    dot,
    load_rows,
    store_rows,
)


@triton.jit
def paired_product_fwd(
    a, a_b, a_n, a_k, w, w_b, w_m, w_k, bias, y, y_b, y_n, N,
    K: tl.constexpr, M: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, N, M) = [y +] a (B, N, K) w (B, M, K)^T + bias (M)."""
    product_tile(
        a, a_b, a_n, a_k, w, w_b, w_m, w_k, bias, y, y_b, y_n, N,
        tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64),
        K, M, ADD, ACC, T, BK, BM, PRECISION,
    )  # fmt: skip


@triton.jit
def product_tile(
    a, a_b, a_n, a_k, w, w_b, w_m, w_k, bias, y, y_b, y_n, N, tile, block, b,
    K: tl.constexpr, M: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile and one block of output channels of `paired_product_fwd`."""
    n = tile.to(tl.int64) * T + tl.arange(0, T)
    m = block * BM + tl.arange(0, BM)
    in_n, in_m = n < N, m < M
    total = tl.zeros((T, BM), ACC)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        values = load_rows(a + b * a_b, a_n, a_k, n, k, in_n, k < K)
        weights = load_rows(w + b * w_b, w_m, w_k, m, k, in_m, k < K).to(values.dtype)
        total = dot(values, tl.trans(weights), total, PRECISION)
    if bias is not None:
        total += tl.load(bias + m, mask=in_m, other=0.0).to(ACC)[None, :]
    if ADD:
        total += load_rows(y + b * y_b, y_n, 1, n, m, in_n, in_m).to(ACC)
    store_rows(y + b * y_b, y_n, 1, n, m, in_n, in_m, total)


@triton.jit
def out_proj_gradient(
    dy, out_s, dweight, dbias, index, block, b, B, N, chunk,
    C: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dWo1 (chunks, B, O, C) = dy_s^T out_s', T x T of it, and dbo1 (chunks, B, O) = sum dy_s."""
    BLOCKS: tl.constexpr = (C + T - 1) // T
    o, columns = block // BLOCKS * T + tl.arange(0, T), block % BLOCKS * T + tl.arange(0, T)
    in_o, inside = o < O, columns < C
    weight, bias = tl.zeros((T, T), ACC), tl.zeros((T,), ACC)
    first = index.to(tl.int64) * chunk
    stop = tl.minimum(first + chunk, N)
    for start in range(first, stop, T):
        n = start + tl.arange(0, T)
        rows = load_rows(out_s + b * N * C, C, 1, n, columns, n < stop, inside)
        dy_s = load_rows(dy + b * N * C, C, 1, n, o, n < stop, in_o)
        weight = dot(tl.trans(dy_s), rows, weight, PRECISION)
        bias += tl.sum(dy_s.to(ACC), 0)
    target = index * B + b
    store_rows(dweight + target * O * C, C, 1, o, columns, in_o, inside, weight)
    tl.store(dbias + target * O + o, bias, mask=in_o & (block % BLOCKS == 0))
