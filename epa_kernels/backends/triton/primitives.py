"""What the kernels share: matrix products, softmax, and the random bits of `rng`.

Tensors are read in their own dtype. `ACC`, the accumulation dtype, is float32, or float64 for
float64 inputs. Factors of a product have the dtype of x where one of them is tokens, else ACC.
Blocks are powers of two of at least 16, the least that a product takes; what lies beyond a tensor
is masked. Maxima ignore NaN, sums and products do not: every NaN comes out.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in the dtype of acc; PRECISION is how float32 factors multiply."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.constexpr_function
def gradient_dtype(tokens, accumulate):
    """In which small gradients multiply tokens: of 1e-6, say, float16 would keep no digits."""
    return accumulate if tokens == tl.float16 else tokens


@triton.jit
def gradient_dot(a, b, acc, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """`dot` of factors in `gradient_dtype`; TF32 has the digits of float16."""
    IN_PARTS: tl.constexpr = TOKENS == tl.float16 and PRECISION == "tf32x3"
    return dot(a, b, acc, "tf32" if IN_PARTS else PRECISION)


@triton.jit
def load_rows(pointer, row_stride, column_stride, rows, columns, row_inside, column_inside):
    """The block of a matrix at rows x columns, 0 outside."""
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=row_inside[:, None] & column_inside[None, :], other=0.0)


@triton.jit
def store_rows(pointer, row_stride, column_stride, rows, columns, row_inside, column_inside, value):
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    mask = row_inside[:, None] & column_inside[None, :]
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def dropout_multiplier(
    seed, rows, first, COLUMNS: tl.constexpr, threshold, MAP: tl.constexpr, dtype
):
    """`rng.dropout_multiplier` of COLUMNS columns from `first`: 0 or 65536 / (65536 - threshold).

    rows int64; first a multiple of 8
    """
    value = tl.load(seed)
    key0, key1 = (value & 0xFFFFFFFF).to(tl.uint32), ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros((rows.shape[0], COLUMNS // 8), tl.uint32)
    c0 = zero + (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    c1 = zero + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c2 = zero + ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c3 = zero + MAP
    multiplier0, multiplier1 = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, multiplier0), c0 * multiplier0
        high1, low1 = tl.umulhi(c2, multiplier1), c2 * multiplier1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    # Column 8 g + 2 w + h takes half h of word w: the axes (w / 2, w % 2, h) in this order.
    low = tl.join(tl.join(c0, c2), tl.join(c1, c3)) & 0xFFFF
    high = tl.join(tl.join(c0, c2), tl.join(c1, c3)) >> 16
    half = tl.reshape(tl.join(low, high), (rows.shape[0], COLUMNS)).to(tl.int32)
    # As a tensor: a threshold of 1 is a constant to the compiler, which has no dtype to change.
    scale = tl.full((1, 1), 65536.0, dtype) / (tl.full((1, 1), 65536.0, dtype) - threshold)
    return tl.where(half >= threshold, scale, 0.0).to(dtype)


@triton.jit
def exp2_rows(logits, inside):
    """exp2(logits - max) and its row sums; columns that are not inside give 0."""
    logits = tl.where(inside[None, :], logits, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit
def softmax_backward(softmax, d):
    return softmax * (d - tl.sum(softmax * d, 1)[:, None])


@triton.jit
def softmax_block(logits, inside, highest, total):
    """Columns of a softmax whose rows have these maxima, and sums of exp2."""
    logits = tl.where(inside[None, :], logits, float("-inf"))
    return tl.exp2(logits - highest[:, None]) / total[:, None]


@triton.jit
def projected_rows(
    pointer, row_stride, column_stride, first, q,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BP of the P projected tokens, from `first` on, in q's dtype and width."""
    p, d = first + tl.arange(0, BP), tl.arange(0, q.shape[1])
    return load_rows(pointer, row_stride, column_stride, p, d, p < P, d < D).to(q.dtype)


@triton.jit
def attend(
    q, factor, dout, keys, key_p, key_d, values, value_p, value_d, seed, rows, threshold, acc,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, OUT: tl.constexpr = True,
):  # fmt: skip
    """acc + dropout(softmax) values, the softmax of base 2 and of factor q keys^T; acc is 0.

    keys and values (P, D) are walked in blocks of BP. Where there are several, what backward needs
    of the rows comes, too: maxima of the logits, sums of exp2 and, where dout is the gradient of
    the result, sums of the softmax times its gradient. Without OUT that alone.
    """
    dtype: tl.constexpr = q.dtype
    ACC: tl.constexpr = acc.dtype
    # Lower than any logit, but not infinite: of two infinities, no difference is a number.
    LOWEST: tl.constexpr = -1.0e308 if ACC == tl.float64 else -3.4e38
    highest = tl.full((q.shape[0],), LOWEST, ACC)
    total, along = tl.zeros((q.shape[0],), ACC), tl.zeros((q.shape[0],), ACC)
    if BP >= P:
        k = projected_rows(keys, key_p, key_d, 0, q, D, P, BP)
        v = projected_rows(values, value_p, value_d, 0, q, D, P, BP)
        logits = factor * dot(q, tl.trans(k), tl.zeros((q.shape[0], BP), ACC), PRECISION)
        weights, total = exp2_rows(logits, tl.arange(0, BP) < P)
        if DROPOUT:
            weights *= dropout_multiplier(seed, rows, 0, BP, threshold, 1, ACC)
        # Divided before the cast: float16 would not hold the sum of a row.
        acc = dot((weights / total[:, None]).to(dtype), v, acc, PRECISION)
    else:
        for first in range(0, P, BP):
            k = projected_rows(keys, key_p, key_d, first, q, D, P, BP)
            v = projected_rows(values, value_p, value_d, first, q, D, P, BP)
            logits = factor * dot(q, tl.trans(k), tl.zeros((q.shape[0], BP), ACC), PRECISION)
            inside = first + tl.arange(0, BP) < P
            logits = tl.where(inside[None, :], logits, float("-inf"))
            before, highest = highest, tl.maximum(highest, tl.max(logits, 1))
            weights, shrink = tl.exp2(logits - highest[:, None]), tl.exp2(before - highest)
            total = total * shrink + tl.sum(weights, 1)
            if DROPOUT:
                weights *= dropout_multiplier(seed, rows, first, BP, threshold, 1, ACC)
            if dout is not None:
                # Of the same numbers as the gradients of the logits, where it has to cancel:
                # dout . out, which is the same, has other roundings.
                d_weights = dot(dout, tl.trans(v), tl.zeros((q.shape[0], BP), ACC), PRECISION)
                along = along * shrink + tl.sum(weights * d_weights, 1)
            if OUT:
                acc = dot(weights.to(dtype), v, acc * shrink[:, None], PRECISION)
        along /= total
        if OUT:
            acc /= total[:, None]
    return acc, highest, total, along


@triton.jit
def attend_backward(
    q, factor, dout, highest, total, along,
    keys, key_p, key_d, values, value_p, value_d, seed, rows, threshold, acc,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + gradient of the logits, natural ones, times keys, of what `attend` gave."""
    dtype: tl.constexpr = q.dtype
    ACC: tl.constexpr = acc.dtype
    small: tl.constexpr = gradient_dtype(dtype, ACC)
    for first in range(0, P, BP):
        k = projected_rows(keys, key_p, key_d, first, q, D, P, BP)
        v = projected_rows(values, value_p, value_d, first, q, D, P, BP)
        logits = factor * dot(q, tl.trans(k), tl.zeros((q.shape[0], BP), ACC), PRECISION)
        weights = softmax_block(logits, first + tl.arange(0, BP) < P, highest, total)
        d_weights = dot(dout, tl.trans(v), tl.zeros((q.shape[0], BP), ACC), PRECISION)
        if DROPOUT:
            d_weights *= dropout_multiplier(seed, rows, first, BP, threshold, 1, ACC)
        dlogits = weights * (d_weights - along[:, None])
        acc = gradient_dot(dlogits.to(small), k.to(small), acc, dtype, PRECISION)
    return acc


@triton.jit
def per_norm(along, norm):
    """d|q| / |q| where |q| d|q| = -along; a clamped norm passes no gradient."""
    return tl.where(norm > NORM_EPS, -along / (norm * norm), 0.0)


@triton.jit
def channel_map(dots, q_norm, k_norm, temperature, D: tl.constexpr):
    """softmax_j(temperature <q^_i, k^_j>), the cosines and the products of norms; norms clamped."""
    inside = tl.arange(0, dots.shape[1]) < D
    norms = q_norm[:, None] * k_norm[None, :]
    cosine = tl.where(inside[None, :], dots / norms, 0.0)
    weights, total = exp2_rows(temperature * LOG2E * cosine, inside)
    return weights / total[:, None], cosine, norms


@triton.jit
def clamp_norm(square):
    """max(sqrt(square), 1e-12), NaN where it is NaN; rounding may leave a square below zero."""
    norm = tl.sqrt(tl.where(square < 0, 0.0, square))
    return tl.where(norm < NORM_EPS, NORM_EPS, norm)
