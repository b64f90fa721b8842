"""Kernels of paired attention, two passes over the tokens forward and backward; see `two_pass`.

    forward   summary, [merge,] mix, output, [product]
    backward  [summary, merge,] mix, output_backward, [sum_chunks,] mix_backward, gather,
              summary_backward

Tokens are cut into chunks by shape alone. A program leaves its sums over one chunk in a workspace,
and the next kernel adds them in their order: the result depends on nothing but the input. With a
single chunk there is nothing to add up, and merge and sum_chunks are left out.

What a program of an output pass does with out_s and its gradient, MODE:

    rows      layout "official", where C is a power of two that divides N: C tokens of a head are D
              whole rows of out_s', projected on the spot; forward only: row_sum, of kind "sum"
    tokens    layout "tokens", projected on the spot, all heads in one program
    add       kind "sum", layout "tokens"
    flat      any other "official" shape: out_s' and its gradient go through memory, and `product`
              projects them; flat_sum, of kind "sum", where the channel branch is added afterwards;
              flat_tokens, of layout "tokens" with many channels

The logits are (scale * q) k_proj^T with scale = temperature2 / |q|: q, not k_proj, takes the scale,
since a channel that is zero has a scale of 1e12, which no float16 holds, and 0 times it is 0.
"""

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    attend,
    attend_backward,
    channel_map,
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
def summary(
    x, x_b, x_n, x_c, proj_k, proj_k_p, proj_k_n, proj_v, proj_v_p, proj_v_n,
    means, grams, projections, N, chunk,
    C: tl.constexpr, P: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk's mean, centred gram and E x; a program has one block of rows and of columns of each.

    means (chunks, B, C) float64;  grams (chunks, B, C, C);  projections (chunks, B, J, P, C)
    """
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    PROJ_BLOCKS: tl.constexpr = (P + BP - 1) // BP
    index, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row_block, column_block = tl.program_id(1) // COLUMN_BLOCKS, tl.program_id(1) % COLUMN_BLOCKS
    first = index.to(tl.int64) * chunk
    stop = tl.minimum(first + chunk, N)

    columns = column_block * BC + tl.arange(0, BC)
    in_columns = columns < C
    rows = row_block * BC + tl.arange(0, BC)
    in_rows = rows < C
    proj_block = row_block % PROJ_BLOCKS
    p = proj_block.to(tl.int64) * BP + tl.arange(0, BP)
    in_p = p < P
    is_gram = row_block < COLUMN_BLOCKS
    is_proj = row_block < J * PROJ_BLOCKS
    x += b * x_b
    # Differences to one token are exact where tokens are nearly constant.
    token = tl.load(x + first * x_n + columns * x_c, mask=in_columns, other=0.0).to(ACC)
    row_token = tl.load(x + first * x_n + rows * x_c, mask=in_rows, other=0.0).to(ACC)
    mean, row_mean = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    gram, projected = tl.zeros((BC, BC), ACC), tl.zeros((BP, BC), ACC)
    before = 0
    for start in range(first, stop, T):
        n = start + tl.arange(0, T)
        inside = n < stop
        tile = load_rows(x, x_n, x_c, n, columns, inside, in_columns)
        if is_gram:
            count = tl.minimum(stop - start, T).to(tl.int32)
            mask = inside[:, None]
            centred = tl.where(mask, tile.to(ACC) - token[None, :], 0.0)
            offset = tl.sum(centred, 0) / count
            centred = tl.where(mask, centred - offset[None, :], 0.0)
            if COLUMN_BLOCKS == 1:
                row_centred, row_offset = centred, offset
            else:
                row_tile = load_rows(x, x_n, x_c, n, rows, inside, in_rows)
                row_centred = tl.where(mask, row_tile.to(ACC) - row_token[None, :], 0.0)
                row_offset = tl.sum(row_centred, 0) / count
                row_centred = tl.where(mask, row_centred - row_offset[None, :], 0.0)
            # Chan's formula: from the means of the tokens so far and of the tile to the joint one.
            share = count.to(ACC) / (before + count)
            delta, row_delta = offset - mean, row_offset - row_mean
            mean += delta * share
            row_mean += row_delta * share
            gram += row_delta[:, None] * delta[None, :] * (share * before)
            gram = dot(
                tl.trans(row_centred).to(tile.dtype), centred.to(tile.dtype), gram, PRECISION
            )
            before += count
        if is_proj:
            if J == 1 or row_block < PROJ_BLOCKS:
                e = load_rows(proj_k, proj_k_p, proj_k_n, p, n, in_p, inside).to(tile.dtype)
            else:
                e = load_rows(proj_v, proj_v_p, proj_v_n, p, n, in_p, inside).to(tile.dtype)
            projected = dot(e, tile, projected, PRECISION)

    target = index * tl.num_programs(2) + b
    if is_gram:
        store_rows(grams + target * C * C, C, 1, rows, columns, in_rows, in_columns, gram)
        if row_block == 0:
            value = token.to(tl.float64) + mean.to(tl.float64)
            tl.store(means + target * C + columns, value, mask=in_columns)
    if is_proj:
        projections += (target * J + row_block // PROJ_BLOCKS) * P * C
        store_rows(projections, C, 1, p, columns, in_p, in_columns, projected)


@triton.jit
def merge(
    means, grams, projections, mean, gram, projected, N, chunk, chunks,
    C: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Sums over chunks: mean (B, C) float64, gram (B, C, C), projected (B, ROWS, C), ROWS = J*P.

    A program has BLOCK elements of gram or projected, and reads BT chunks at a time.
    """
    GRAM_BLOCKS: tl.constexpr = (C * C + BLOCK - 1) // BLOCK
    b, block, B = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(1)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    if block < GRAM_BLOCKS:
        i += block * BLOCK
        inside = i < C * C
        means += b * C
        first_row = tl.load(means + i // C, mask=inside, other=0.0)
        first_column = tl.load(means + i % C, mask=inside, other=0.0)
        rows, columns = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        products = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, chunks, BT):
            t = first + tl.arange(0, BT).to(tl.int64)
            mask = (t < chunks)[:, None] & inside[None, :]
            source = grams + (t[:, None] * B + b) * C * C + i[None, :]
            total += tl.sum(tl.load(source, mask=mask, other=0.0), 0)
            # Chan's formula, from differences to the first chunk's mean.
            count = tl.minimum(N - t * chunk, chunk).to(tl.float64)[:, None]
            source = means + t[:, None] * B * C
            row = tl.load(source + (i // C)[None, :], mask=mask, other=0.0) - first_row[None, :]
            column = tl.load(source + (i % C)[None, :], mask=mask, other=0.0)
            column -= first_column[None, :]
            weighted = tl.where(mask, count * column, 0.0)
            rows += tl.sum(tl.where(mask, count * row, 0.0), 0)
            columns += tl.sum(weighted, 0)
            products += tl.sum(weighted * row, 0)
        total += (products - rows * columns / N).to(ACC)
        tl.store(gram + b * C * C + i, total, mask=inside)
        tl.store(mean + b * C + i, first_column + columns / N, mask=i < C)
    else:
        i += (block - GRAM_BLOCKS) * BLOCK
        inside = i < ROWS * C
        for first in range(0, chunks, BT):
            t = first + tl.arange(0, BT).to(tl.int64)
            mask = (t < chunks)[:, None] & inside[None, :]
            source = projections + (t[:, None] * B + b) * ROWS * C + i[None, :]
            total += tl.sum(tl.load(source, mask=mask, other=0.0), 0)
        tl.store(projected + b * ROWS * C + i, total, mask=inside)


@triton.jit
def product(
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
    """One tile and one block of output channels of `product`."""
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
def mix(
    mean, gram, projected, row_sums, qkvv_weight, qkvv_bias, proj_k_bias, proj_v_bias,
    temperature, temperature2, seed,
    k_proj, v_proj, scale, value_matrix, value_constant,
    q_gram, k_gram, q_mean, k_mean, q_norm, k_norm, dots, dy, dy_b, out_proj_weight, dout,
    N, cut,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, J: tl.constexpr, O: tl.constexpr,
    ACC: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, T: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One head of one sample between the passes: `two_pass._Mix`.

    k_proj, v_proj (B, H, P, D);  scale (B, C);  value_matrix (B, C, C) = A Wvc;
    value_constant (B, C) = A bvc
    KEEP, for backward: q_gram, k_gram (B, C, C) = Wq M, Wk M;  q_mean, k_mean, q_norm, k_norm
    (B, C);  dots (B, H, D, D)

    With dout, the programs beyond the heads make the gradient of the flat out_s' meanwhile:
    dout (B, N, C) = dy_s Wo1, T tokens and BM channels each.
    """
    D: tl.constexpr = C // H
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if dout is not None:
        BLOCKS: tl.constexpr = (C + BM - 1) // BM
        if h >= H:
            product_tile(
                dy, dy_b, C, 1, out_proj_weight, 0, 1, C, None,
                dout, dy_b, C, N, (h - H) // BLOCKS, (h - H) % BLOCKS, b,
                O, C, False, ACC, T, BC, BM, PRECISION,
            )  # fmt: skip
            return
    d = tl.arange(0, BD)
    in_d = d < D
    q_weight, k_weight = qkvv_weight + h * D * C, qkvv_weight + (H + h) * D * C
    vc_weight, vs_weight = qkvv_weight + (2 * H + h) * D * C, qkvv_weight + (3 * H + h) * D * C
    head = b * C + h * D  # of (B, H, D)

    q_centre, k_centre = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    q_square, k_square = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    products = tl.zeros((BD, BD), ACC)
    for first in range(0, C, BC):
        columns = first + tl.arange(0, BC)
        inside = columns < C
        q_m, k_m = tl.zeros((BD, BC), ACC), tl.zeros((BD, BC), ACC)
        for other in range(0, C, BC):
            rows = other + tl.arange(0, BC)
            block = load_rows(gram + b * C * C, C, 1, rows, columns, rows < C, inside)
            wq = load_rows(q_weight, C, 1, d, rows, in_d, rows < C).to(ACC)
            wk = load_rows(k_weight, C, 1, d, rows, in_d, rows < C).to(ACC)
            q_m, k_m = dot(wq, block, q_m, PRECISION), dot(wk, block, k_m, PRECISION)
        wq = load_rows(q_weight, C, 1, d, columns, in_d, inside).to(ACC)
        wk = load_rows(k_weight, C, 1, d, columns, in_d, inside).to(ACC)
        centre = tl.load(mean + b * C + columns, mask=inside, other=0.0)
        # In float64: a mean that is small beside the weights would lose its digits.
        q_centre += tl.sum(wq.to(tl.float64) * centre[None, :], 1)
        k_centre += tl.sum(wk.to(tl.float64) * centre[None, :], 1)
        q_square += tl.sum(q_m * wq, 1)
        k_square += tl.sum(k_m * wk, 1)
        products = dot(q_m, tl.trans(wk), products, PRECISION)
        if KEEP:
            store_rows(q_gram + head * C, C, 1, d, columns, in_d, inside, q_m)
            store_rows(k_gram + head * C, C, 1, d, columns, in_d, inside, k_m)
    if qkvv_bias is not None:
        q_centre += tl.load(qkvv_bias + h * D + d, mask=in_d, other=0.0).to(tl.float64)
        k_centre += tl.load(qkvv_bias + (H + h) * D + d, mask=in_d, other=0.0).to(tl.float64)
    q_centre, k_centre = q_centre.to(ACC), k_centre.to(ACC)
    products += N * q_centre[:, None] * k_centre[None, :]
    q_length = clamp_norm(tl.where(q_square < 0, 0.0, q_square) + N * q_centre * q_centre)
    k_length = clamp_norm(tl.where(k_square < 0, 0.0, k_square) + N * k_centre * k_centre)
    if KEEP:
        tl.store(q_mean + head + d, q_centre, mask=in_d)
        tl.store(k_mean + head + d, k_centre, mask=in_d)
        tl.store(q_norm + head + d, q_length, mask=in_d)
        tl.store(k_norm + head + d, k_length, mask=in_d)
        store_rows(dots + (b * H + h) * D * D, D, 1, d, d, in_d, in_d, products)

    attention, _, _ = channel_map(products, q_length, k_length, tl.load(temperature + h).to(ACC), D)
    if DROPOUT:
        attention *= dropout_multiplier(seed, (b * H + h) * D + d, 0, BD, cut, 0, ACC)
    for first in range(0, C, BC):
        columns = first + tl.arange(0, BC)
        inside = columns < C
        block = load_rows(vc_weight, C, 1, d, columns, in_d, inside).to(ACC)
        block = dot(attention, block, tl.zeros((BD, BC), ACC), PRECISION)
        store_rows(value_matrix + head * C, C, 1, d, columns, in_d, inside, block)
    constant = tl.zeros((BD,), ACC)
    if qkvv_bias is not None:
        bias = tl.load(qkvv_bias + (2 * H + h) * D + d, mask=in_d, other=0.0).to(ACC)
        constant += tl.sum(attention * bias[None, :], 1)
    tl.store(value_constant + head + d, constant, mask=in_d)

    tl.store(scale + head + d, tl.load(temperature2 + h).to(ACC) / q_length, mask=in_d)
    for first in range(0, P, BP):
        p = first + tl.arange(0, BP)
        in_p = p < P
        k_block, v_block = tl.zeros((BP, BD), ACC), tl.zeros((BP, BD), ACC)
        for other in range(0, C, BC):
            columns = other + tl.arange(0, BC)
            inside = columns < C
            z = load_rows(projected + b * J * P * C, C, 1, p, columns, in_p, inside)
            wk = load_rows(k_weight, C, 1, d, columns, in_d, inside).to(ACC)
            k_block = dot(z, tl.trans(wk), k_block, PRECISION)
            if J == 2:
                z = load_rows(projected + (b * J + 1) * P * C, C, 1, p, columns, in_p, inside)
            wv = load_rows(vs_weight, C, 1, d, columns, in_d, inside).to(ACC)
            v_block = dot(z, tl.trans(wv), v_block, PRECISION)
        if qkvv_bias is not None:
            # sum_n E[p,n] (W x_n + bias) = W z_p + bias sum_n E[p,n]
            bias = tl.load(qkvv_bias + (H + h) * D + d, mask=in_d, other=0.0).to(ACC)
            k_block += tl.load(row_sums + p, mask=in_p, other=0.0)[:, None] * bias[None, :]
            bias = tl.load(qkvv_bias + (3 * H + h) * D + d, mask=in_d, other=0.0).to(ACC)
            total = tl.load(row_sums + (J - 1) * P + p, mask=in_p, other=0.0)
            v_block += total[:, None] * bias[None, :]
        if proj_k_bias is not None:
            k_block += tl.load(proj_k_bias + p, mask=in_p, other=0.0).to(ACC)[:, None]
        if proj_v_bias is not None:
            v_block += tl.load(proj_v_bias + p, mask=in_p, other=0.0).to(ACC)[:, None]
        offset = (b * H + h) * P * D
        store_rows(k_proj + offset, D, 1, p, d, in_p, in_d, k_block)
        store_rows(v_proj + offset, D, 1, p, d, in_p, in_d, v_block)


@triton.jit
def rows_of(start, h, N, C: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, M: tl.constexpr):
    """Rows of the official out_s' that M C tokens of a head make up (BD M), and which exist."""
    i = tl.arange(0, BD * M)
    j = start // C + i % M
    return (i // M * H + h).to(tl.int64) * (N // C) + j, (i // M < C // H) & (j < N // C)


@triton.jit
def output(
    x, x_b, x_n, x_c, qkvv_weight, qkvv_bias, k_proj, v_proj, scale, value_matrix, value_constant,
    out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias, seed, y, out_s,
    N, cut,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """y (B, N, C) of one tile and HEADS heads; in a MODE of whole rows of at least C tokens.

    out_s (B, N, C) is the flat one, of MODE flat. Of O output channels of each branch a program has
    ceil(O / groups) of the channel branch's.
    """
    D: tl.constexpr = C // H
    GROUP_ROWS: tl.constexpr = (O * HEADS + H - 1) // H
    WHOLE_ROWS: tl.constexpr = MODE == "rows" or MODE == "row_sum"
    # A row of out_s' is C tokens: PARTS tiles, or a tile is M rows, K channels of each.
    PARTS: tl.constexpr = C // T if WHOLE_ROWS and C > T else 1
    M: tl.constexpr = T // C if WHOLE_ROWS and C <= T else 1
    K: tl.constexpr = T // M
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    in_d = d < D
    o = tl.arange(0, BO)
    in_o = o < O
    x += b * x_b
    y += b * N * C
    value_matrix += b * C * C
    value_constant += b * C
    dtype: tl.constexpr = x.dtype.element_ty
    y_s = tl.zeros((BD * M if WHOLE_ROWS else T, BO), ACC)

    begin = tl.program_id(0).to(tl.int64) * (T * PARTS)
    for part in range(PARTS):
        start = begin + part * T
        n = start + tl.arange(0, T)
        in_n = n < N
        if MODE != "add" and MODE != "row_sum" and MODE != "flat_sum":
            r = group * GROUP_ROWS + tl.arange(0, BR)
            in_r = (r < O) & (r < (group + 1) * GROUP_ROWS)
            y_c = tl.zeros((T, BR), ACC)
            constant = tl.zeros((BR,), ACC)
            for first in range(0, C, BC):
                columns = first + tl.arange(0, BC)
                inside = columns < C
                matrix = tl.zeros((BR, BC), ACC)
                for other in range(0, C, BC):
                    k = other + tl.arange(0, BC)
                    w = load_rows(out_proj2_weight, C, 1, r, k, in_r, k < C).to(ACC)
                    vm = load_rows(value_matrix, C, 1, k, columns, k < C, inside)
                    matrix = dot(w, vm, matrix, PRECISION)
                tile = load_rows(x, x_n, x_c, n, columns, in_n, inside)
                y_c = dot(tile, tl.trans(matrix).to(dtype), y_c, PRECISION)
                if qkvv_bias is not None:
                    w = load_rows(out_proj2_weight, C, 1, r, columns, in_r, inside).to(ACC)
                    vm = tl.load(value_constant + columns, mask=inside, other=0.0)
                    constant += tl.sum(w * vm[None, :], 1)
            if out_proj2_bias is not None:
                constant += tl.load(out_proj2_bias + r, mask=in_r, other=0.0).to(ACC)
            store_rows(y + O, C, 1, n, r, in_n, in_r, y_c + constant[None, :])

        for offset in range(HEADS):
            h = group * HEADS + offset
            q = tl.zeros((T, BD), ACC)
            if MODE == "add":
                out_c = tl.zeros((T, BD), ACC)
            for first in range(0, C, BC):
                columns = first + tl.arange(0, BC)
                inside = columns < C
                tile = load_rows(x, x_n, x_c, n, columns, in_n, inside)
                w = load_rows(qkvv_weight + h * D * C, C, 1, d, columns, in_d, inside)
                q = dot(tile, tl.trans(w).to(dtype), q, PRECISION)
                if MODE == "add":
                    w = load_rows(value_matrix + h * D * C, C, 1, d, columns, in_d, inside)
                    out_c = dot(tile, tl.trans(w).to(dtype), out_c, PRECISION)
            if qkvv_bias is not None:
                q += tl.load(qkvv_bias + h * D + d, mask=in_d, other=0.0).to(ACC)[None, :]
            q *= (tl.load(scale + b * C + h * D + d, mask=in_d, other=0.0) * LOG2E)[None, :]
            head = (b * H + h) * P * D
            out, _, _, _ = attend(
                q.to(dtype), 1.0, None, k_proj + head, D, 1, v_proj + head, D, 1,
                seed, (b * H + h) * N + n, cut, tl.zeros((T, BD), ACC),
                D, P, BP, DROPOUT, PRECISION,
            )  # fmt: skip

            if WHOLE_ROWS:
                row, in_row = rows_of(begin, h, N, C, H, BD, M)
                columns = part * K + tl.arange(0, K)
                rows = tl.reshape(tl.trans(out.to(dtype)), (BD * M, K))
                if MODE == "rows":
                    w = load_rows(out_proj_weight, C, 1, o, columns, in_o, columns < C)
                    y_s = dot(rows, tl.trans(w).to(dtype), y_s, PRECISION)
                else:
                    total = rows.to(ACC)
                    total += tl.load(value_constant + columns)[None, :]
                    for first in range(0, C, BC):
                        c = first + tl.arange(0, BC)
                        tile = load_rows(x, x_n, x_c, row, c, in_row, c < C)
                        w = load_rows(value_matrix, C, 1, columns, c, columns < C, c < C)
                        total = dot(tile, tl.trans(w).to(dtype), total, PRECISION)
                    store_rows(y, C, 1, row, columns, in_row, columns < C, total)
            elif MODE == "tokens":
                w = load_rows(out_proj_weight + h * D, C, 1, o, d, in_o, in_d)
                y_s = dot(out.to(dtype), tl.trans(w).to(dtype), y_s, PRECISION)
            elif MODE == "add":
                out += out_c
                out += tl.load(value_constant + h * D + d, mask=in_d, other=0.0)[None, :]
                store_rows(y + h * D, C, 1, n, d, in_n, in_d, out)
            else:
                if MODE == "flat_tokens":
                    f = n[:, None] * C + h * D + d[None, :]
                else:
                    f = (d[None, :] * H + h).to(tl.int64) * N + n[:, None]
                if MODE == "flat_sum":
                    out += tl.load(value_constant + f % C)
                    target = y
                else:
                    target = out_s + b * N * C
                tl.store(target + f, out.to(dtype), mask=in_n[:, None] & in_d[None, :])
    if MODE == "rows" or MODE == "tokens":
        if out_proj_bias is not None:
            y_s += tl.load(out_proj_bias + o, mask=in_o, other=0.0).to(ACC)[None, :]
        if MODE == "rows":
            row, in_row = rows_of(begin, group, N, C, H, BD, M)
        else:
            row = begin + tl.arange(0, T)
            in_row = row < N
        store_rows(y, C, 1, row, o, in_row, in_o, y_s)


@triton.jit
def output_backward(
    x, x_b, x_n, x_c, dy, dout, qkvv_weight, mean, q_mean, k_proj, v_proj, scale, out_proj_weight,
    seed,
    dq, out_s, sums,
    N, chunk, cut,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """One head over one chunk: dq (B, N, C), and in sums (chunks, B, H, SIZE), one after the other

        dWq (D, C), dmatrix (ROWS, C), dkeys (P, D), dv_proj (P, D), dlogits (P), dconstant (ROWS),
        dWo1 (O, C) in MODE rows, (O, D) in MODE tokens, and there dbo1 (O)

    keys are scale * k_proj; dkeys, dWq and dmatrix are sums over centred tokens. For MODE flat,
    dout (B, N, C) is the gradient of the flat out_s', and out_s gets the latter again. A program
    has one block of columns of x and one of projected tokens, if there are so many.
    """
    D: tl.constexpr = C // H
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    P_BLOCKS: tl.constexpr = (P + BP - 1) // BP
    BLOCKS: tl.constexpr = COLUMN_BLOCKS if COLUMN_BLOCKS > P_BLOCKS else P_BLOCKS
    IS_FLAT: tl.constexpr = MODE == "flat" or MODE == "flat_tokens"
    NEEDS_OUT: tl.constexpr = IS_FLAT or MODE == "rows" or MODE == "tokens"
    index, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h, block = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    first_token = index.to(tl.int64) * chunk
    stop = tl.minimum(first_token + chunk, N)
    d = tl.arange(0, BD)
    in_d = d < D
    first_p = block % P_BLOCKS * BP
    p = first_p + tl.arange(0, BP)
    in_p = p < P
    o = tl.arange(0, BO)
    in_o = o < O
    r = tl.arange(0, BR)
    in_r = (r < ROWS) & (h * ROWS + r < O)
    own = block * BC + tl.arange(0, BC)
    in_own = own < C
    x += b * x_b
    dy += b * N * C
    dtype: tl.constexpr = x.dtype.element_ty
    small: tl.constexpr = gradient_dtype(dtype, ACC)
    own_mean = tl.load(mean + b * C + own, mask=in_own, other=0.0).to(ACC)
    centre = tl.load(q_mean + b * C + h * D + d, mask=in_d, other=0.0)
    scale = tl.load(scale + b * C + h * D + d, mask=in_d, other=0.0)
    k_proj += (b * H + h) * P * D
    v_proj += (b * H + h) * P * D
    k = load_rows(k_proj, D, 1, p, d, in_p, in_d).to(dtype)
    v = load_rows(v_proj, D, 1, p, d, in_p, in_d).to(dtype)

    dq_weight, dmatrix = tl.zeros((BD, BC), ACC), tl.zeros((BR, BC), ACC)
    dkeys, dv_proj = tl.zeros((BP, BD), ACC), tl.zeros((BP, BD), ACC)
    dlogits_sum, dconstant = tl.zeros((BP,), ACC), tl.zeros((BR,), ACC)
    if MODE == "rows":
        M: tl.constexpr = T // C
        BW: tl.constexpr = BO // COLUMN_BLOCKS if BO // COLUMN_BLOCKS > 16 else 16
        w = block * BW + tl.arange(0, BW)
        dweight = tl.zeros((BW, C), ACC)
        dbias = tl.zeros((BO,), ACC)
    if MODE == "tokens":
        dweight = tl.zeros((BO, BD), ACC)
        dbias = tl.zeros((BO,), ACC)

    # Hoisted addresses would take the registers that the sums need.
    for start in tl.range(first_token, stop, T, disable_licm=True):
        n = start + tl.arange(0, T)
        in_n = n < stop
        q_centred, tile = tl.zeros((T, BD), ACC), tl.zeros((T, BC), dtype)
        for first in range(0, C, BC):
            columns = first + tl.arange(0, BC)
            inside = columns < C
            tile = load_rows(x, x_n, x_c, n, columns, in_n, inside).to(ACC)
            tile_mean = tl.load(mean + b * C + columns, mask=inside, other=0.0).to(ACC)
            tile = tl.where(in_n[:, None], tile - tile_mean[None, :], 0.0).to(dtype)
            weight = load_rows(qkvv_weight + h * D * C, C, 1, d, columns, in_d, inside)
            q_centred = dot(tile, tl.trans(weight).to(dtype), q_centred, PRECISION)
        if COLUMN_BLOCKS > 1:
            tile = load_rows(x, x_n, x_c, n, own, in_n, in_own).to(ACC)
            tile = tl.where(in_n[:, None], tile - own_mean[None, :], 0.0).to(dtype)
        q = ((q_centred + centre[None, :]) * (scale * LOG2E)[None, :]).to(dtype)
        logits = dot(q, tl.trans(k), tl.zeros((T, BP), ACC), PRECISION)
        if MODE == "rows":
            row, in_row = rows_of(start, h, N, C, H, BD, M)
            dy_s = load_rows(dy, C, 1, row, o, in_row, in_o)
            channels = tl.arange(0, C)
            weight = load_rows(out_proj_weight, C, 1, o, channels, in_o, channels < C).to(dtype)
            drows = dot(dy_s, weight, tl.zeros((BD * M, C), ACC), PRECISION)
            dout_s = tl.trans(tl.reshape(drows.to(dtype), (BD, T)))
        elif MODE == "tokens":
            dy_s = load_rows(dy, C, 1, n, o, in_n, in_o)
            weight = load_rows(out_proj_weight + h * D, C, 1, o, d, in_o, in_d).to(dtype)
            dout_s = dot(dy_s, weight, tl.zeros((T, BD), ACC), PRECISION).to(dtype)
        elif MODE == "add":
            dout_s = load_rows(dy + h * D, C, 1, n, d, in_n, in_d)
        else:
            if MODE == "flat_tokens":
                f = n[:, None] * C + h * D + d[None, :]
            else:
                f = (d[None, :] * H + h).to(tl.int64) * N + n[:, None]
            mask = in_n[:, None] & in_d[None, :]
            dout_s = tl.load(dout + b * N * C + f, mask=mask, other=0.0)

        number = (b * H + h) * N + n
        if P_BLOCKS == 1:
            weights, total = exp2_rows(logits, in_p)
            weights /= total[:, None]
        else:
            out, highest, total, along = attend(
                q, 1.0, dout_s, k_proj, D, 1, v_proj, D, 1, seed, number, cut,
                tl.zeros((T, BD), ACC), D, P, BP, DROPOUT, PRECISION, NEEDS_OUT,
            )  # fmt: skip
            weights = softmax_block(logits, in_p, highest, total)
        attention = weights
        if DROPOUT:
            multiplier = dropout_multiplier(seed, number, first_p, BP, cut, 1, ACC)
            attention = weights * multiplier
        attention = attention.to(dtype)

        if NEEDS_OUT and P_BLOCKS == 1:
            out = dot(attention, v, tl.zeros((T, BD), ACC), PRECISION)
        if MODE == "rows":
            rows = tl.reshape(tl.trans(out.to(dtype)), (BD * M, C))
            dbias += tl.sum(dy_s.to(ACC), 0)
            if COLUMN_BLOCKS > 1:
                dy_s = load_rows(dy, C, 1, row, w, in_row, w < O)
            dweight = dot(tl.trans(dy_s), rows, dweight, PRECISION)
        elif MODE == "tokens":
            dweight = dot(tl.trans(dy_s), out.to(dtype), dweight, PRECISION)
            dbias += tl.sum(dy_s.to(ACC), 0)
        elif IS_FLAT:
            if block == 0:
                tl.store(out_s + b * N * C + f, out.to(dtype), mask=mask)

        dattention = dot(dout_s, tl.trans(v), tl.zeros((T, BP), ACC), PRECISION)
        if DROPOUT:
            dattention *= multiplier
        if P_BLOCKS == 1:
            dlogits = softmax_backward(weights, dattention)
        else:
            dlogits = weights * (dattention - along[:, None])
        dlogits = tl.where(in_n[:, None], dlogits, 0.0)
        dlogits_sum += tl.sum(dlogits, 0)
        dlogits = dlogits.to(small)
        dq_tile = tl.zeros((T, BD), ACC)
        if P_BLOCKS == 1:
            dq_tile = gradient_dot(dlogits, k.to(small), dq_tile, dtype, PRECISION)
        elif block < COLUMN_BLOCKS:  # the others need none
            dq_tile = attend_backward(
                q, 1.0, dout_s, highest, total, along, k_proj, D, 1, v_proj, D, 1,
                seed, number, cut, dq_tile, D, P, BP, DROPOUT, PRECISION,
            )  # fmt: skip
        dq_tile = (dq_tile * scale[None, :]).to(dtype)
        dkeys = gradient_dot(
            tl.trans(dlogits), q_centred.to(dtype).to(small), dkeys, dtype, PRECISION
        )
        dv_proj = dot(tl.trans(attention), dout_s, dv_proj, PRECISION)
        dq_weight = dot(tl.trans(dq_tile), tile, dq_weight, PRECISION)
        dy_c = load_rows(dy + C - O + h * ROWS, C, 1, n, r, in_n, in_r)
        dmatrix = dot(tl.trans(dy_c), tile, dmatrix, PRECISION)
        dconstant += tl.sum(dy_c.to(ACC), 0)
        if block == 0:
            store_rows(dq + b * N * C + h * D, C, 1, n, d, in_n, in_d, dq_tile)

    sums += ((index * tl.num_programs(2) + b) * H + h) * SIZE
    store_rows(sums, C, 1, d, own, in_d, in_own, dq_weight)
    sums += D * C
    store_rows(sums, C, 1, r, own, r < ROWS, in_own, dmatrix)
    sums += ROWS * C
    if block < P_BLOCKS:
        store_rows(sums, D, 1, p, d, in_p, in_d, dkeys)
        store_rows(sums + P * D, D, 1, p, d, in_p, in_d, dv_proj)
        tl.store(sums + 2 * P * D + p, dlogits_sum, mask=in_p)
    if block == 0:
        tl.store(sums + 2 * P * D + P + r, dconstant, mask=r < ROWS)
    sums += 2 * P * D + P + ROWS
    if MODE == "rows":
        store_rows(sums, C, 1, w, tl.arange(0, C), w < O, tl.arange(0, C) < C, dweight)
        if block == 0:
            tl.store(sums + O * C + o, dbias, mask=in_o)
    if MODE == "tokens":
        if block == 0:
            store_rows(sums, D, 1, o, d, in_o, in_d, dweight)
            tl.store(sums + O * D + o, dbias, mask=in_o)


@triton.jit
def sum_chunks(sums, total, chunks, size, ACC: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr):
    """total (size) = sum of sums (chunks, size), BT chunks at a time."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), ACC)
    for first in range(0, chunks, BT):
        t = first + tl.arange(0, BT).to(tl.int64)
        mask = (t < chunks)[:, None] & (i < size)[None, :]
        value += tl.sum(tl.load(sums + t[:, None] * size + i[None, :], mask=mask, other=0.0), 0)
    tl.store(total + i, value, mask=i < size)


@triton.jit
def matrix_gradient(
    sample, o, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Pointers into a sample's sums: rows o of the gradient of Wo2 A Wvc, and of its constants."""
    head = sample + (o // ROWS) * SIZE + D * C
    return head + (o % ROWS) * C, head + ROWS * C + 2 * P * D + P + o % ROWS


@triton.jit
def value_constant_gradient(
    sample, own, out_proj2_weight, h, d,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, SUM: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the constant that a head's values add, (BD)."""
    if SUM:
        constants = own + D * C + ROWS * C + 2 * P * D + P + d
        return tl.load(constants, mask=d < D, other=0.0)
    else:
        dconstant = tl.zeros((d.shape[0],), ACC)
        for first in range(0, O, BO):
            o = first + tl.arange(0, BO)
            _, constants = matrix_gradient(sample, o, C, D, P, ROWS, SIZE)
            w2 = load_rows(out_proj2_weight + h * D, C, 1, o, d, o < O, d < D).to(ACC)
            dconstant += tl.sum(w2 * tl.load(constants, mask=o < O, other=0.0)[:, None], 0)
        return dconstant


@triton.jit
def value_gradient(
    sample, own, mean, out_proj2_weight, dconstant, h, d, columns,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, SUM: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of some columns of a head's A Wvc, (BD, columns); mean points to the sample."""
    in_d, inside = d < D, columns < C
    centre = tl.load(mean + columns, mask=inside, other=0.0).to(dconstant.dtype)
    if SUM:
        dvalue = load_rows(own + D * C, C, 1, d, columns, in_d, inside)
        return dvalue + dconstant[:, None] * centre[None, :]
    else:
        dvalue = tl.zeros((d.shape[0], columns.shape[0]), dconstant.dtype)
        for first in range(0, O, BO):
            o = first + tl.arange(0, BO)
            rows, constants = matrix_gradient(sample, o, C, D, P, ROWS, SIZE)
            w2 = load_rows(out_proj2_weight + h * D, C, 1, o, d, o < O, in_d).to(dvalue.dtype)
            mask = (o < O)[:, None] & inside[None, :]
            dm = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)
            dm += tl.load(constants, mask=o < O, other=0.0)[:, None] * centre[None, :]
            dvalue = dot(tl.trans(w2), dm, dvalue, PRECISION)
        return dvalue


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


@triton.jit
def mix_backward(
    sums, mean, row_sums, qkvv_weight, qkvv_bias, temperature, temperature2, out_proj2_weight,
    seed, k_proj, q_mean, k_mean, q_norm, k_norm, dots,
    attention, ddots, dheads, dqkvv_bias, dtemperatures, dkv, dkv_sums,
    dy, out_s, dout_proj_weight, dout_proj_bias,
    N, chunk, cut,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, J: tl.constexpr, O: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr, T: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One head of one sample: what of `two_pass._Mix.backward` is small. All results in ACC.

    attention, ddots (B, H, D, D): the channel map after dropout; the gradient of <q_i, k_j>
    dheads (B, 6, C): d|q|/|q|, d|k|/|k|; gradients of the means of q and k; N times those, with
    all else that multiplies the mean of x
    dqkvv_bias (B, 4C), dtemperatures (B, 2, H): of one sample
    dkv (B, 2, P, C): gradients of k_proj and v_proj
    dkv_sums (B, H, 4, P): their sums over d, and their products with the biases of k and vs

    With out_s, further programs meanwhile run `out_proj_gradient`.
    """
    D: tl.constexpr = C // H
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if out_s is not None:
        PARTS: tl.constexpr = ((C + T - 1) // T) * ((O + T - 1) // T)
        if h >= H:
            out_proj_gradient(
                dy, out_s, dout_proj_weight, dout_proj_bias, (h - H) // PARTS, (h - H) % PARTS, b,
                tl.num_programs(1), N, chunk, C, O, ACC, T, PRECISION,
            )  # fmt: skip
            return
    d = tl.arange(0, BD)
    in_d = d < D
    head = b * C + h * D
    square = (b * H + h) * D * D
    mean += b * C
    sample = sums + b * H * SIZE
    own = sample + h * SIZE
    vc_weight = qkvv_weight + (2 * H + h) * D * C
    dbias = dqkvv_bias + b * 4 * C + h * D

    dconstant = value_constant_gradient(
        sample, own, out_proj2_weight, h, d, C, D, P, O, ROWS, SIZE, SUM, BO, ACC
    )
    dattention = tl.zeros((BD, BD), ACC)
    for first in range(0, C, BC):
        columns = first + tl.arange(0, BC)
        dvalue = value_gradient(
            sample, own, mean, out_proj2_weight, dconstant, h, d, columns,
            C, D, P, O, ROWS, SIZE, SUM, BO, PRECISION,
        )  # fmt: skip
        weight = load_rows(vc_weight, C, 1, d, columns, in_d, columns < C).to(ACC)
        dattention = dot(dvalue, tl.trans(weight), dattention, PRECISION)

    q_length = tl.load(q_norm + head + d, mask=in_d, other=1.0)
    k_length = tl.load(k_norm + head + d, mask=in_d, other=1.0)
    products = load_rows(dots + square, D, 1, d, d, in_d, in_d)
    t = tl.load(temperature + h).to(ACC)
    softmax, cosine, norms = channel_map(products, q_length, k_length, t, D)
    dropped = softmax
    if DROPOUT:
        multiplier = dropout_multiplier(seed, (b * H + h) * D + d, 0, BD, cut, 0, ACC)
        dropped = softmax * multiplier
    store_rows(attention + square, D, 1, d, d, in_d, in_d, dropped)
    if qkvv_bias is not None:
        bias = tl.load(qkvv_bias + (2 * H + h) * D + d, mask=in_d, other=0.0).to(ACC)
        dattention += dconstant[:, None] * bias[None, :]
        tl.store(dbias + 2 * C + d, tl.sum(dropped * dconstant[:, None], 0), mask=in_d)
    if DROPOUT:
        dattention *= multiplier
    # Rows of the padding have no gradient.
    dlogits = tl.where(in_d[:, None], softmax_backward(softmax, dattention), 0.0)
    tl.store(dtemperatures + b * 2 * H + h, tl.sum(tl.sum(dlogits * cosine, 1), 0))
    dcosine = t * dlogits
    ddot = dcosine / norms
    store_rows(ddots + square, D, 1, d, d, in_d, in_d, ddot)
    dq_norm = per_norm(tl.sum(dcosine * cosine, 1), q_length)
    dk_norm = per_norm(tl.sum(dcosine * cosine, 0), k_length)

    # Spatial branch: from the gradient of the keys to that of k_proj.
    t = tl.load(temperature2 + h).to(ACC)
    q_centre = tl.load(q_mean + head + d, mask=in_d, other=0.0)
    k_centre = tl.load(k_mean + head + d, mask=in_d, other=0.0)
    along, dq_total = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    dk_bias, dvs_bias = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    dtemperature2 = tl.zeros((BD,), ACC)
    source = own + D * C + ROWS * C
    for first in range(0, P, BP):
        p = first + tl.arange(0, BP)
        in_p = p < P
        projection = load_rows(k_proj + (b * H + h) * P * D, D, 1, p, d, in_p, in_d)
        dlogits_p = tl.load(source + 2 * P * D + p, mask=in_p, other=0.0)
        dkey = load_rows(source, D, 1, p, d, in_p, in_d) + dlogits_p[:, None] * q_centre[None, :]
        key = projection * (t / q_length)[None, :]
        dtemperature2 += tl.sum(dkey * projection / q_length[None, :], 0)
        along += tl.sum(dkey * key, 0)
        dq_total += tl.sum(dlogits_p[:, None] * key, 0)
        dk = dkey * (t / q_length)[None, :]
        dv = load_rows(source + P * D, D, 1, p, d, in_p, in_d)
        store_rows(dkv + b * 2 * P * C + h * D, C, 1, p, d, in_p, in_d, dk)
        store_rows(dkv + (b * 2 + 1) * P * C + h * D, C, 1, p, d, in_p, in_d, dv)
        totals = dkv_sums + (b * H + h) * 4 * P + p
        tl.store(totals, tl.sum(dk, 1), mask=in_p)
        tl.store(totals + P, tl.sum(dv, 1), mask=in_p)
        if qkvv_bias is not None:
            bias = tl.load(qkvv_bias + (H + h) * D + d, mask=in_d, other=0.0).to(ACC)
            tl.store(totals + 2 * P, tl.sum(dk * bias[None, :], 1), mask=in_p)
            bias = tl.load(qkvv_bias + (3 * H + h) * D + d, mask=in_d, other=0.0).to(ACC)
            tl.store(totals + 3 * P, tl.sum(dv * bias[None, :], 1), mask=in_p)
            total = tl.load(row_sums + p, mask=in_p, other=0.0)
            dk_bias += tl.sum(dk * total[:, None], 0)
            total = tl.load(row_sums + (J - 1) * P + p, mask=in_p, other=0.0)
            dvs_bias += tl.sum(dv * total[:, None], 0)
    tl.store(dtemperatures + (b * 2 + 1) * H + h, tl.sum(dtemperature2, 0))
    dq_norm += per_norm(along, q_length)

    # q_n gets ddots k_n + dq_norm q_n, k_n gets ddots^T q_n + dk_norm k_n: centred part and mean
    # apart, so that neither cancels against the other.
    dq_mean = tl.sum(ddot * k_centre[None, :], 1) + dq_norm * q_centre
    dk_mean = tl.sum(ddot * q_centre[:, None], 0) + dk_norm * k_centre
    dq_total += N * dq_mean
    dk_total = N * dk_mean
    dheads += b * 6 * C + h * D + d
    tl.store(dheads, dq_norm, mask=in_d)
    tl.store(dheads + C, dk_norm, mask=in_d)
    tl.store(dheads + 2 * C, dq_mean, mask=in_d)
    tl.store(dheads + 3 * C, dk_mean, mask=in_d)
    tl.store(dheads + 4 * C, dq_total, mask=in_d)
    tl.store(dheads + 5 * C, dk_total, mask=in_d)
    if qkvv_bias is not None:
        tl.store(dbias + d, dq_total, mask=in_d)
        tl.store(dbias + C + d, dk_total + dk_bias, mask=in_d)
        tl.store(dbias + 3 * C + d, dvs_bias, mask=in_d)


@triton.jit
def sum_to(
    source, stride, count, second_stride, second_count, offsets, target, i, inside,
    ACC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """target[i] = sum of source[offsets] over two axes, in order; nothing without a target."""
    if target is not None:
        value = tl.zeros((i.shape[0],), ACC)
        for second in range(0, second_count):
            for first in range(0, count, BT):
                t = first + tl.arange(0, BT).to(tl.int64)
                mask = (t < count)[:, None] & inside[None, :]
                block = source + second * second_stride + t[:, None] * stride + offsets[None, :]
                value += tl.sum(tl.load(block, mask=mask, other=0.0), 0)
        tl.store(target + i, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def gather(
    sums, mean, projected, q_gram, k_gram, attention, ddots, dheads, sample_qkvv_bias,
    sample_temperatures, dkv, dkv_sums, qkvv_weight, out_proj2_weight, value_matrix,
    value_constant,
    dgram, dtoken, dprojected, drows, matrix,
    dqkvv_weight, dqkvv_bias, dproj_k_bias, dproj_v_bias, dtemperature, dtemperature2,
    dout_proj_weight, dout_proj_bias, dout_proj2_weight, dout_proj2_bias,
    chunk_out_proj_weight, chunk_out_proj_bias, chunks, B,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, J: tl.constexpr, O: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over heads: what the last pass needs. Over samples: the gradients of the parameters.

        dgram (B, C, C), dtoken (B, C), dprojected (B, J, P, C), drows (J, P), matrix (B, O, C)

    The second grid axis is what a program makes, the first its block of it:

        0 dgram, dtoken   1 dprojected   2 matrix   3 dqkvv_weight   4 dout_proj2_weight
        5 dout_proj_weight   6 all that is a vector
    """
    D: tl.constexpr = C // H
    SUM: tl.constexpr = dout_proj2_weight is None
    BLOCKS: tl.constexpr = (C + BM - 1) // BM
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    P_BLOCKS: tl.constexpr = (P + BM - 1) // BM
    O_BLOCKS: tl.constexpr = (O + BM - 1) // BM
    CONSTANTS: tl.constexpr = D * C + ROWS * C + 2 * P * D + P
    block, section = tl.program_id(0), tl.program_id(1)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BM)
    d = tl.arange(0, BD)
    in_d = d < D
    # Sections differ in size: a program beyond its own has nothing to do.
    size = tl.where(section == 0, B * BLOCKS * COLUMN_BLOCKS, B * J * P_BLOCKS)
    size = tl.where(section == 2, B * O_BLOCKS, size)
    size = tl.where(section == 3, 4 * H * COLUMN_BLOCKS, size)
    size = tl.where(section == 4, O_BLOCKS, size)
    if (section < 5) & (block >= size):
        return
    if section == 0:
        # Of x^T x: Wq^T (ddots Wk + dq_norm Wq) + Wk^T (ddots^T Wq + dk_norm Wk).
        b = (block // (BLOCKS * COLUMN_BLOCKS)).to(tl.int64)
        rows = block // COLUMN_BLOCKS % BLOCKS * BM + row
        columns = block % COLUMN_BLOCKS * BC + tl.arange(0, BC)
        in_rows, inside = rows < C, columns < C
        total, token = tl.zeros((BM, BC), ACC), tl.zeros((BM,), ACC)
        for h in range(0, H):
            wq, wk = qkvv_weight + h * D * C, qkvv_weight + (H + h) * D * C
            square, head = ddots + (b * H + h) * D * D, dheads + b * 6 * C + h * D
            for first in range(0, D, BK):
                k = first + tl.arange(0, BK)
                in_k = k < D
                norm = tl.load(head + k, mask=in_k, other=0.0)
                w = load_rows(wq, C, 1, k, rows, in_k, in_rows).to(ACC)
                dmean = tl.load(head + 2 * C + k, mask=in_k, other=0.0)
                token += tl.sum(w * dmean[:, None], 0)
                factor = norm[:, None] * w
                ddot = load_rows(square, D, 1, k, d, in_k, in_d)
                w = load_rows(wk, C, 1, d, rows, in_d, in_rows).to(ACC)
                factor = dot(ddot, w, factor, PRECISION)
                w = load_rows(wq, C, 1, k, columns, in_k, inside).to(ACC)
                total = dot(tl.trans(factor), w, total, PRECISION)
                norm = tl.load(head + C + k, mask=in_k, other=0.0)
                w = load_rows(wk, C, 1, k, rows, in_k, in_rows).to(ACC)
                dmean = tl.load(head + 3 * C + k, mask=in_k, other=0.0)
                token += tl.sum(w * dmean[:, None], 0)
                factor = norm[:, None] * w
                ddot = load_rows(square, 1, D, k, d, in_k, in_d)
                w = load_rows(wq, C, 1, d, rows, in_d, in_rows).to(ACC)
                factor = dot(ddot, w, factor, PRECISION)
                w = load_rows(wk, C, 1, k, columns, in_k, inside).to(ACC)
                total = dot(tl.trans(factor), w, total, PRECISION)
        store_rows(dgram + b * C * C, C, 1, rows, columns, in_rows, inside, total)
        tl.store(dtoken + b * C + rows, token, mask=in_rows & (block % COLUMN_BLOCKS == 0))
    elif section == 1:
        b = (block // (J * P_BLOCKS)).to(tl.int64)
        j = block // P_BLOCKS % J
        rows = block % P_BLOCKS * BM + row
        in_rows = rows < P
        # k and vs of one projection are added up here; of two, each has its own.
        begin, end = tl.where(J == 1, 0, j * C), tl.where(J == 1, 2 * C, (j + 1) * C)
        for first in range(0, C, BC):
            columns = first + tl.arange(0, BC)
            inside = columns < C
            total = tl.zeros((BM, BC), ACC)
            for other in range(begin, end, BC):
                k = other + tl.arange(0, BC)
                in_k = k < end
                offsets = k // C * P * C + k % C
                dkv_rows = tl.load(
                    dkv + b * 2 * P * C + rows[:, None] * C + offsets[None, :],
                    mask=in_rows[:, None] & in_k[None, :],
                    other=0.0,
                )
                part = k // C * 2 + 1  # of q, k, vc, vs: k and vs
                weight = load_rows(qkvv_weight, C, 1, part * C + k % C, columns, in_k, inside).to(
                    ACC
                )
                total = dot(dkv_rows, weight, total, PRECISION)
            target = dprojected + (b * J + j) * P * C
            store_rows(target, C, 1, rows, columns, in_rows, inside, total)
    elif section == 2:
        if out_proj2_weight is not None:
            b = (block // O_BLOCKS).to(tl.int64)
            rows = block % O_BLOCKS * BM + row
            in_rows = rows < O
            for first in range(0, C, BC):
                columns = first + tl.arange(0, BC)
                inside = columns < C
                total = tl.zeros((BM, BC), ACC)
                for other in range(0, C, BC):
                    k = other + tl.arange(0, BC)
                    weight = load_rows(out_proj2_weight, C, 1, rows, k, in_rows, k < C).to(ACC)
                    vm = value_matrix + b * C * C
                    vm = load_rows(vm, C, 1, k, columns, k < C, inside)
                    total = dot(weight, vm, total, PRECISION)
                store_rows(matrix + b * O * C, C, 1, rows, columns, in_rows, inside, total)
    elif section == 3:
        part, h = block // COLUMN_BLOCKS // H, block // COLUMN_BLOCKS % H
        columns = block % COLUMN_BLOCKS * BC + tl.arange(0, BC)
        inside = columns < C
        total = tl.zeros((BD, BC), ACC)
        for sample in range(0, B):
            b = tl.full((), 0, tl.int64) + sample
            own = sums + (b * H + h) * SIZE
            square = (b * H + h) * D * D
            if part < 2:
                # Of q: ddots (Wk M) + dq_norm (Wq M); of k the transpose, and dk_proj^T Z.
                grams = tl.where(part == 0, q_gram, k_gram) + (b * C + h * D) * C
                others = tl.where(part == 0, k_gram, q_gram) + (b * C + h * D) * C
                head = dheads + (b * 6 + part) * C + h * D + d
                norm = tl.load(head, mask=in_d, other=0.0)
                total += norm[:, None] * load_rows(grams, C, 1, d, columns, in_d, inside)
                constant = tl.load(head + 4 * C, mask=in_d, other=0.0)
                centre = tl.load(mean + b * C + columns, mask=inside, other=0.0).to(ACC)
                total += constant[:, None] * centre[None, :]
                row_step, column_step = tl.where(part == 0, D, 1), tl.where(part == 0, 1, D)
                for first in range(0, D, BK):
                    k = first + tl.arange(0, BK)
                    ddot = load_rows(ddots + square, row_step, column_step, d, k, in_d, k < D)
                    gram = load_rows(others, C, 1, k, columns, k < D, inside)
                    total = dot(ddot, gram, total, PRECISION)
            if part == 0:
                total += load_rows(own, C, 1, d, columns, in_d, inside)
            elif part == 2:
                for first in range(0, D, BK):
                    k = first + tl.arange(0, BK)
                    dconstant = value_constant_gradient(
                        sums + b * H * SIZE, own, out_proj2_weight, h, k,
                        C, D, P, O, ROWS, SIZE, SUM, BM, ACC,
                    )  # fmt: skip
                    dvalue = value_gradient(
                        sums + b * H * SIZE, own, mean + b * C, out_proj2_weight, dconstant, h, k,
                        columns, C, D, P, O, ROWS, SIZE, SUM, BM, PRECISION,
                    )  # fmt: skip
                    weights = load_rows(attention + square, 1, D, d, k, in_d, k < D)
                    total = dot(weights, dvalue, total, PRECISION)
            else:
                j = tl.where(part == 1, 0, J - 1)
                dk = dkv + (b * 2 + part // 2) * P * C + h * D
                for first in range(0, P, BM):
                    p = first + row
                    dk_rows = load_rows(dk, 1, C, d, p, in_d, p < P)
                    z = projected + (b * J + j) * P * C
                    z_rows = load_rows(z, C, 1, p, columns, p < P, inside)
                    total = dot(dk_rows, z_rows, total, PRECISION)
        target = dqkvv_weight + (part * H + h) * D * C
        store_rows(target, C, 1, d, columns, in_d, inside, total)
    elif section == 4:
        if dout_proj2_weight is not None:
            rows = block * BM + row
            in_rows = rows < O
            for first in range(0, C, BC):
                columns = first + tl.arange(0, BC)
                inside = columns < C
                total = tl.zeros((BM, BC), ACC)
                pointers, constants = matrix_gradient(sums, rows, C, D, P, ROWS, SIZE)
                centre_pointer, constant, vm = mean, value_constant, value_matrix
                for _ in range(0, B):
                    dconstant = tl.load(constants, mask=in_rows, other=0.0)
                    value = tl.load(constant + columns, mask=inside, other=0.0)
                    total += dconstant[:, None] * value[None, :]
                    for other in range(0, C, BC):
                        k = other + tl.arange(0, BC)
                        mask = in_rows[:, None] & (k < C)[None, :]
                        dm = tl.load(pointers[:, None] + k[None, :], mask=mask, other=0.0)
                        centre = tl.load(centre_pointer + k, mask=k < C, other=0.0).to(ACC)
                        dm += dconstant[:, None] * centre[None, :]
                        w = load_rows(vm, C, 1, columns, k, inside, k < C)
                        total = dot(dm, tl.trans(w), total, PRECISION)
                    pointers, constants = pointers + H * SIZE, constants + H * SIZE
                    centre_pointer, constant, vm = centre_pointer + C, constant + C, vm + C * C
                store_rows(dout_proj2_weight, C, 1, rows, columns, in_rows, inside, total)
    elif section == 5:
        source = sums + CONSTANTS + ROWS
        if MODE == "rows":
            sum_to(source, SIZE, B * H, 0, 1, i, dout_proj_weight, i, i < O * C, ACC, BT)
        if MODE == "tokens":
            c = i % C
            offsets = c // D * SIZE + i // C * D + c % D
            sum_to(source, H * SIZE, B, 0, 1, offsets, dout_proj_weight, i, i < O * C, ACC, BT)
        if MODE == "flat" or MODE == "flat_tokens":
            source, count = chunk_out_proj_weight, B * chunks
            sum_to(source, O * C, count, 0, 1, i, dout_proj_weight, i, i < O * C, ACC, BT)
    else:
        sum_to(sample_qkvv_bias, 4 * C, B, 0, 1, i, dqkvv_bias, i, i < 4 * C, ACC, BT)
        sum_to(sample_temperatures, 2 * H, B, 0, 1, i, dtemperature, i, i < H, ACC, BT)
        sum_to(sample_temperatures + H, 2 * H, B, 0, 1, i, dtemperature2, i, i < H, ACC, BT)
        offsets = i // ROWS * SIZE + CONSTANTS + i % ROWS
        sum_to(sums, H * SIZE, B, 0, 1, offsets, dout_proj2_bias, i, i < O, ACC, BT)
        if MODE == "rows":
            source = sums + CONSTANTS + ROWS + O * C
            sum_to(source, SIZE, B * H, 0, 1, i, dout_proj_bias, i, i < O, ACC, BT)
        if MODE == "tokens":
            source = sums + CONSTANTS + ROWS + O * D
            sum_to(source, H * SIZE, B, 0, 1, i, dout_proj_bias, i, i < O, ACC, BT)
        if MODE == "flat" or MODE == "flat_tokens":
            sum_to(chunk_out_proj_bias, O, B * chunks, 0, 1, i, dout_proj_bias, i, i < O, ACC, BT)
        inside = i < P
        sum_to(dkv_sums, 4 * P, B * H, P, 3 - J, i, dproj_k_bias, i, inside, ACC, BT)
        sum_to(dkv_sums + P, 4 * P, B * H, 0, 1, i, dproj_v_bias, i, inside, ACC, BT)
        if drows is not None:
            sum_to(dkv_sums + 2 * P, 4 * P, B * H, P, 3 - J, i, drows, i, inside, ACC, BT)
            if J == 2:
                sum_to(dkv_sums + 3 * P, 4 * P, B * H, 0, 1, i, drows + P, i, inside, ACC, BT)


@triton.jit
def summary_backward(
    x, x_b, x_n, x_c, dq, dy, proj_k, proj_k_p, proj_k_n, proj_v, proj_v_p, proj_v_n,
    qkvv_weight, mean, dgram, dtoken, dprojected, drows, matrix,
    dx, dx_b, dx_n, dx_c, dproj_k, dproj_k_p, dproj_k_n, dproj_v, dproj_v_p, dproj_v_n,
    N, B,
    C: tl.constexpr, P: tl.constexpr, J: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one sample, or over all the token projections' gradient: (tiles, B + 1, blocks)."""
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    P_BLOCKS: tl.constexpr = (P + BP - 1) // BP
    sample, block = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    in_n = n < N
    dtype: tl.constexpr = x.dtype.element_ty
    small: tl.constexpr = gradient_dtype(dtype, ACC)
    if sample < B:
        if block < COLUMN_BLOCKS:
            b = sample.to(tl.int64)
            columns = block * BC + tl.arange(0, BC)
            inside = columns < C
            token = tl.load(dtoken + b * C + columns, mask=inside, other=0.0)
            total = tl.zeros((T, BC), ACC) + token[None, :]
            for first in range(0, C, BC):
                k = first + tl.arange(0, BC)
                in_k = k < C
                tile = load_rows(dq + b * N * C, C, 1, n, k, in_n, in_k)
                w = load_rows(qkvv_weight, C, 1, k, columns, in_k, inside).to(dtype)
                total = dot(tile, w, total, PRECISION)
                centre = tl.load(mean + b * C + k, mask=in_k, other=0.0).to(ACC)
                tile = load_rows(x + b * x_b, x_n, x_c, n, k, in_n, in_k).to(ACC)
                tile = (tile - centre[None, :]).to(dtype).to(small)
                w = load_rows(dgram + b * C * C, C, 1, k, columns, in_k, inside).to(small)
                total = gradient_dot(tile, w, total, dtype, PRECISION)
            for first in range(0, O, BC):
                k = first + tl.arange(0, BC)
                in_k = k < O
                tile = load_rows(dy + b * N * C + C - O, C, 1, n, k, in_n, in_k)
                w = load_rows(matrix + b * O * C, C, 1, k, columns, in_k, inside).to(dtype)
                total = dot(tile, w, total, PRECISION)
            for first in range(0, P, BP):
                p = first + tl.arange(0, BP).to(tl.int64)
                in_p = p < P
                tile = load_rows(proj_k, proj_k_n, proj_k_p, n, p, in_n, in_p).to(small)
                z = dprojected + b * J * P * C
                w = load_rows(z, C, 1, p, columns, in_p, inside).to(small)
                total = gradient_dot(tile, w, total, dtype, PRECISION)
                if J == 2:
                    tile = load_rows(proj_v, proj_v_n, proj_v_p, n, p, in_n, in_p).to(small)
                    w = load_rows(z + P * C, C, 1, p, columns, in_p, inside).to(small)
                    total = gradient_dot(tile, w, total, dtype, PRECISION)
            store_rows(dx + b * dx_b, dx_n, dx_c, n, columns, in_n, inside, total)
    elif block < J * P_BLOCKS:
        p = (block % P_BLOCKS).to(tl.int64) * BP + tl.arange(0, BP)
        in_p = p < P
        j = block // P_BLOCKS
        total = tl.zeros((BP, T), ACC)
        if drows is not None:
            total += tl.load(drows + j * P + p, mask=in_p, other=0.0)[:, None]
        dprojected += j * P * C
        for _ in range(0, B):
            for first in range(0, C, BC):
                k = first + tl.arange(0, BC)
                in_k = k < C
                tile = load_rows(x, x_n, x_c, n, k, in_n, in_k).to(small)
                z = load_rows(dprojected, C, 1, p, k, in_p, in_k).to(small)
                total = gradient_dot(z, tl.trans(tile), total, dtype, PRECISION)
            x += x_b
            dprojected += J * P * C
        if J == 1 or j == 0:
            store_rows(dproj_k, dproj_k_p, dproj_k_n, p, n, in_p, in_n, total)
        else:
            store_rows(dproj_v, dproj_v_p, dproj_v_n, p, n, in_p, in_n, total)
