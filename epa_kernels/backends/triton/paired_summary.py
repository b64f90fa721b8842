"""The summary pass of paired attention: sums over tokens forward, gradients of x backward.

Shape alone divides tokens into chunks. A program leaves its sums over one chunk in a workspace,
and `paired_merge_fwd` adds them in their order: the result depends on nothing but the input. With a
single chunk there is nothing to add, and the merge is left out.
"""

import triton
import triton.language as tl

from .primitives import (
    dot,
    gradient_dot,
    gradient_dtype,
    load_rows,
    store_rows,
)


@triton.jit
def paired_summary_fwd(
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
def paired_merge_fwd(
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
def paired_summary_bwd(
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
