"""The output pass of paired attention: y from x, and backward the sums over tokens.

Tokens meet the keys and values that the mix made; `attend` is the softmax. What a program does with
out_s, the spatial branch's result, and with its gradient is MODE:

    rows         layout "official", where C is a power of two that divides N: C tokens of a head are
                 D whole rows of out_s', which are projected on the spot
    row_sum      the same of kind "sum": the channel branch is added to those rows
    tokens       layout "tokens", projected on the spot, all heads in one program
    add          kind "sum", layout "tokens": the channel branch is added to each head's columns
    flat         any other "official" shape: out_s' and its gradient go through memory, and
                 `paired_product` projects them
    flat_sum     the same of kind "sum": `paired_product` adds the channel branch
    flat_tokens  layout "tokens" with many channels: through memory, as flat

out_s' is out_s in the order of the layout. The logits are (scale * q) k_proj^T with
scale = temperature2 / |q|. q, not k_proj, takes the scale: that of a zero channel is 1e12, which
no float16 holds, and 0 times it is 0.
"""

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    attend,
    attend_backward,
    dot,
    dropout_multiplier,
    exp2_rows,
    gradient_dot,
    gradient_dtype,
    load_rows,
    softmax_backward,
    softmax_block,
    store_rows,
)


@triton.constexpr_function
def is_mode(mode):
    return mode in ("rows", "row_sum", "tokens", "add", "flat", "flat_sum", "flat_tokens")


@triton.constexpr_function
def through_memory(mode):
    """Whether out_s' and its gradient are tensors, which `paired_product` multiplies."""
    return mode in ("flat", "flat_tokens")


@triton.constexpr_function
def offset(part, C, D, P, ROWS):
    """Where a part of a head's sums begins; `paired_output_bwd` says what they are."""
    names = ("dq_weight", "dmatrix", "dkeys", "dv_proj", "dlogits", "dconstant", "dout_proj")
    sizes = (D * C, ROWS * C, P * D, P * D, P, ROWS)
    return sum(sizes[: names.index(part)])


@triton.jit
def rows_of(start, h, N, C: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, M: tl.constexpr):
    """Rows of the official out_s' that M C tokens of a head make up, (BD M), and which exist."""
    i = tl.arange(0, BD * M)
    j = start // C + i % M
    return (i // M * H + h).to(tl.int64) * (N // C) + j, (i // M < C // H) & (j < N // C)


@triton.jit
def paired_output_fwd(
    x, x_b, x_n, x_c, qkvv_weight, qkvv_bias, k_proj, v_proj, scale, value_matrix, value_constant,
    out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias, seed, y, out_s,
    N, threshold,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """y (B, N, C) of one tile and HEADS heads; the tile has at least C tokens where rows are whole.

    out_s (B, N, C) is for a MODE that goes through memory. A program makes the spatial branch's O
    output channels, and ceil(O HEADS / H) of the channel branch's.
    """
    tl.static_assert(is_mode(MODE), "unknown MODE")
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

        for member in range(HEADS):
            h = group * HEADS + member
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
                seed, (b * H + h) * N + n, threshold, tl.zeros((T, BD), ACC),
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
def paired_output_bwd(
    x, x_b, x_n, x_c, dy, dout, qkvv_weight, mean, q_mean, k_proj, v_proj, scale, out_proj_weight,
    seed,
    dq, out_s, sums,
    N, chunk, threshold,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """One head over one chunk: dq (B, N, C), and in sums (chunks, B, H, SIZE), at each `offset`

        dq_weight (D, C), dmatrix (ROWS, C), dkeys (P, D), dv_proj (P, D), dlogits (P),
        dconstant (ROWS), and dout_proj: in MODE rows weight (O, C) and bias (O), in MODE tokens
        weight (O, D) and bias (O)

    keys are scale * k_proj; dkeys, dq_weight and dmatrix are sums over centred tokens. Where out_s'
    goes through memory, dout (B, N, C) is its gradient, and out_s gets it again; else dout is dy.
    A program has one block of columns of x and one of projected tokens, if there are so many.
    """
    tl.static_assert(is_mode(MODE), "unknown MODE")
    D: tl.constexpr = C // H
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    P_BLOCKS: tl.constexpr = (P + BP - 1) // BP
    BLOCKS: tl.constexpr = COLUMN_BLOCKS if COLUMN_BLOCKS > P_BLOCKS else P_BLOCKS
    IS_FLAT: tl.constexpr = through_memory(MODE)
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

        number = (b * H + h) * N + n  # of the row of the map, for dropout
        if P_BLOCKS == 1:
            weights, total = exp2_rows(logits, in_p)
            weights /= total[:, None]
        else:
            out, highest, total, along = attend(
                q, 1.0, dout_s, k_proj, D, 1, v_proj, D, 1, seed, number, threshold,
                tl.zeros((T, BD), ACC), D, P, BP, DROPOUT, PRECISION, NEEDS_OUT,
            )  # fmt: skip
            weights = softmax_block(logits, in_p, highest, total)
        attention = weights
        if DROPOUT:
            multiplier = dropout_multiplier(seed, number, first_p, BP, threshold, 1, ACC)
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
                seed, number, threshold, dq_tile, D, P, BP, DROPOUT, PRECISION,
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
    target = sums + offset("dmatrix", C, D, P, ROWS)
    store_rows(target, C, 1, r, own, r < ROWS, in_own, dmatrix)
    if block < P_BLOCKS:
        store_rows(sums + offset("dkeys", C, D, P, ROWS), D, 1, p, d, in_p, in_d, dkeys)
        store_rows(sums + offset("dv_proj", C, D, P, ROWS), D, 1, p, d, in_p, in_d, dv_proj)
        tl.store(sums + offset("dlogits", C, D, P, ROWS) + p, dlogits_sum, mask=in_p)
    if block == 0:
        tl.store(sums + offset("dconstant", C, D, P, ROWS) + r, dconstant, mask=r < ROWS)
    sums += offset("dout_proj", C, D, P, ROWS)
    if MODE == "rows":
        store_rows(sums, C, 1, w, tl.arange(0, C), w < O, tl.arange(0, C) < C, dweight)
        if block == 0:
            tl.store(sums + O * C + o, dbias, mask=in_o)
    if MODE == "tokens":
        if block == 0:
            store_rows(sums, D, 1, o, d, in_o, in_d, dweight)
            tl.store(sums + O * D + o, dbias, mask=in_o)


@triton.jit
def paired_merge_bwd(
    sums, total, chunks, size, ACC: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr
):
    """total (size) = sum of sums (chunks, size), BT chunks at a time."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), ACC)
    for first in range(0, chunks, BT):
        t = first + tl.arange(0, BT).to(tl.int64)
        mask = (t < chunks)[:, None] & (i < size)[None, :]
        value += tl.sum(tl.load(sums + t[:, None] * size + i[None, :], mask=mask, other=0.0), 0)
    tl.store(total + i, value, mask=i < size)
