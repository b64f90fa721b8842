"""The gather of paired attention: sums over heads and samples, after the mix's backward.

Over heads it makes what the summary's backward needs of a sample; over samples, the gradients of
the parameters. One launch does both, so that small sections run beside each other: each has a
device function, and a program has one block of one section.

    DGRAM        dgram (B, C, C), dtoken (B, C): gradients of x through the centred gram, the mean
    DPROJECTED   dprojected (B, J, P, C): gradient of E x
    MATRIX       matrix (B, O, C) = Wo2 A Wvc, which the channel branch's dy meets
    DQKVV        dqkvv_weight (4C, C)
    DOUT_PROJ2   dout_proj2_weight (O, C)
    DOUT_PROJ    dout_proj_weight (O, C), which is only added up
    DVECTORS     all that is a vector: gradients of biases and temperatures, drows (J, P)
"""

import triton
import triton.language as tl

from .paired_mix import matrix_gradient, value_constant_gradient, value_gradient
from .paired_output import offset, through_memory
from .primitives import dot, load_rows, store_rows

SECTIONS = 7
DGRAM, DPROJECTED, MATRIX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DQKVV, DOUT_PROJ2 = tl.constexpr(3), tl.constexpr(4)
DOUT_PROJ, DVECTORS = tl.constexpr(5), tl.constexpr(6)


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
def gather_dgram(
    block, ddots, dheads, qkvv_weight, dgram, dtoken,
    C: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM x BC of a sample's dgram: Wq^T (ddots Wk + dq_norm Wq) + Wk^T (ddots^T Wq + dk_norm Wk).

    And BM of its dtoken: Wq^T dq_mean + Wk^T dk_mean.
    """
    D: tl.constexpr = C // H
    ROW_BLOCKS: tl.constexpr = (C + BM - 1) // BM
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    b = (block // (ROW_BLOCKS * COLUMN_BLOCKS)).to(tl.int64)
    rows = block // COLUMN_BLOCKS % ROW_BLOCKS * BM + tl.arange(0, BM)
    columns = block % COLUMN_BLOCKS * BC + tl.arange(0, BC)
    d = tl.arange(0, BD)
    in_d, in_rows, inside = d < D, rows < C, columns < C
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


@triton.jit
def gather_dprojected(
    block, dkv, qkvv_weight, dprojected,
    C: tl.constexpr, P: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows of dprojected of a sample and token projection: dk_proj Wk and dv_proj Wvs.

    One projection gets both; of two, each has its own.
    """
    P_BLOCKS: tl.constexpr = (P + BM - 1) // BM
    b = (block // (J * P_BLOCKS)).to(tl.int64)
    j = block // P_BLOCKS % J
    rows = block % P_BLOCKS * BM + tl.arange(0, BM)
    in_rows = rows < P
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
            weight = load_rows(qkvv_weight, C, 1, part * C + k % C, columns, in_k, inside)
            total = dot(dkv_rows, weight.to(ACC), total, PRECISION)
        target = dprojected + (b * J + j) * P * C
        store_rows(target, C, 1, rows, columns, in_rows, inside, total)


@triton.jit
def gather_matrix(
    block, out_proj2_weight, value_matrix, matrix,
    C: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows of a sample's matrix; nothing where Wo2 is absent, and matrix is value_matrix."""
    O_BLOCKS: tl.constexpr = (O + BM - 1) // BM
    if out_proj2_weight is not None:
        b = (block // O_BLOCKS).to(tl.int64)
        rows = block % O_BLOCKS * BM + tl.arange(0, BM)
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


@triton.jit
def gather_dqkvv(
    block, B, sums, mean, projected, q_gram, k_gram, attention, ddots, dheads, dkv,
    out_proj2_weight, dqkvv_weight,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, J: tl.constexpr, O: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BC columns of a head's rows of one part of dqkvv_weight; parts 0 q, 1 k, 2 vc, 3 vs."""
    D: tl.constexpr = C // H
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    part, h = block // COLUMN_BLOCKS // H, block // COLUMN_BLOCKS % H
    columns = block % COLUMN_BLOCKS * BC + tl.arange(0, BC)
    d = tl.arange(0, BD)
    in_d, inside = d < D, columns < C
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
                p = first + tl.arange(0, BM)
                dk_rows = load_rows(dk, 1, C, d, p, in_d, p < P)
                z = projected + (b * J + j) * P * C
                z_rows = load_rows(z, C, 1, p, columns, p < P, inside)
                total = dot(dk_rows, z_rows, total, PRECISION)
    target = dqkvv_weight + (part * H + h) * D * C
    store_rows(target, C, 1, d, columns, in_d, inside, total)


@triton.jit
def gather_dout_proj2(
    block, B, sums, mean, value_matrix, value_constant, dout_proj2_weight,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows of dout_proj2_weight, where there is one: the gradient of Wo2 A Wvc times A Wvc."""
    D: tl.constexpr = C // H
    if dout_proj2_weight is not None:
        rows = block * BM + tl.arange(0, BM)
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


@triton.jit
def gather_dout_proj(
    block, B, sums, chunk_weight, chunks, dout_proj_weight,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of dout_proj_weight, from where MODE has left it: by heads, or by chunks."""
    D: tl.constexpr = C // H
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < O * C
    source = sums + offset("dout_proj", C, D, P, ROWS)
    if MODE == "rows":
        sum_to(source, SIZE, B * H, 0, 1, i, dout_proj_weight, i, inside, ACC, BT)
    elif MODE == "tokens":
        c = i % C
        offsets = c // D * SIZE + i // C * D + c % D
        sum_to(source, H * SIZE, B, 0, 1, offsets, dout_proj_weight, i, inside, ACC, BT)
    elif through_memory(MODE):
        sum_to(chunk_weight, O * C, B * chunks, 0, 1, i, dout_proj_weight, i, inside, ACC, BT)


@triton.jit
def gather_dvectors(
    block, B, sums, sample_qkvv_bias, sample_temperatures, dkv_sums, chunk_bias, chunks,
    dqkvv_bias, dproj_k_bias, dproj_v_bias, dtemperature, dtemperature2,
    dout_proj_bias, dout_proj2_bias, drows,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, J: tl.constexpr, O: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, MODE: tl.constexpr,
    BLOCK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of every vector; one that is absent takes nothing."""
    D: tl.constexpr = C // H
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_to(sample_qkvv_bias, 4 * C, B, 0, 1, i, dqkvv_bias, i, i < 4 * C, ACC, BT)
    sum_to(sample_temperatures, 2 * H, B, 0, 1, i, dtemperature, i, i < H, ACC, BT)
    sum_to(sample_temperatures + H, 2 * H, B, 0, 1, i, dtemperature2, i, i < H, ACC, BT)
    offsets = i // ROWS * SIZE + offset("dconstant", C, D, P, ROWS) + i % ROWS
    sum_to(sums, H * SIZE, B, 0, 1, offsets, dout_proj2_bias, i, i < O, ACC, BT)
    source = sums + offset("dout_proj", C, D, P, ROWS)
    if MODE == "rows":
        sum_to(source + O * C, SIZE, B * H, 0, 1, i, dout_proj_bias, i, i < O, ACC, BT)
    elif MODE == "tokens":
        sum_to(source + O * D, H * SIZE, B, 0, 1, i, dout_proj_bias, i, i < O, ACC, BT)
    elif through_memory(MODE):
        sum_to(chunk_bias, O, B * chunks, 0, 1, i, dout_proj_bias, i, i < O, ACC, BT)
    inside = i < P
    sum_to(dkv_sums, 4 * P, B * H, P, 3 - J, i, dproj_k_bias, i, inside, ACC, BT)
    sum_to(dkv_sums + P, 4 * P, B * H, 0, 1, i, dproj_v_bias, i, inside, ACC, BT)
    if drows is not None:
        sum_to(dkv_sums + 2 * P, 4 * P, B * H, P, 3 - J, i, drows, i, inside, ACC, BT)
        if J == 2:
            sum_to(dkv_sums + 3 * P, 4 * P, B * H, 0, 1, i, drows + P, i, inside, ACC, BT)


@triton.jit
def paired_gather_bwd(
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
    """One block of one section, grid (blocks of the largest section, SECTIONS).

    sums to dkv_sums are what `paired_output_bwd` and `paired_mix_bwd` left, chunk_out_proj_* what
    the latter left where out_s' goes through memory. A gradient that is not wanted is None.
    """
    SUM: tl.constexpr = dout_proj2_weight is None
    block, section = tl.program_id(0), tl.program_id(1)
    ROW_BLOCKS: tl.constexpr = (C + BM - 1) // BM
    COLUMN_BLOCKS: tl.constexpr = (C + BC - 1) // BC
    P_BLOCKS: tl.constexpr = (P + BM - 1) // BM
    O_BLOCKS: tl.constexpr = (O + BM - 1) // BM
    # Sections differ in size: a program beyond its own has nothing to do.
    size = tl.where(section == DGRAM, B * ROW_BLOCKS * COLUMN_BLOCKS, B * J * P_BLOCKS)
    size = tl.where(section == MATRIX, B * O_BLOCKS, size)
    size = tl.where(section == DQKVV, 4 * H * COLUMN_BLOCKS, size)
    size = tl.where(section == DOUT_PROJ2, O_BLOCKS, size)
    if (section <= DOUT_PROJ2) & (block >= size):
        return
    if section == DGRAM:
        gather_dgram(
            block, ddots, dheads, qkvv_weight, dgram, dtoken,
            C, H, ACC, BM, BC, BD, BK, PRECISION,
        )  # fmt: skip
    elif section == DPROJECTED:
        gather_dprojected(block, dkv, qkvv_weight, dprojected, C, P, J, ACC, BM, BC, PRECISION)
    elif section == MATRIX:
        gather_matrix(block, out_proj2_weight, value_matrix, matrix, C, O, ACC, BM, BC, PRECISION)
    elif section == DQKVV:
        gather_dqkvv(
            block, B, sums, mean, projected, q_gram, k_gram, attention, ddots, dheads, dkv,
            out_proj2_weight, dqkvv_weight,
            C, H, P, J, O, ACC, ROWS, SIZE, SUM, BM, BC, BD, BK, PRECISION,
        )  # fmt: skip
    elif section == DOUT_PROJ2:
        gather_dout_proj2(
            block, B, sums, mean, value_matrix, value_constant, dout_proj2_weight,
            C, H, P, O, ACC, ROWS, SIZE, BM, BC, PRECISION,
        )  # fmt: skip
    elif section == DOUT_PROJ:
        gather_dout_proj(
            block, B, sums, chunk_out_proj_weight, chunks, dout_proj_weight,
            C, H, P, O, ACC, ROWS, SIZE, MODE, BLOCK, BT,
        )  # fmt: skip
    elif section == DVECTORS:
        gather_dvectors(
            block, B, sums, sample_qkvv_bias, sample_temperatures, dkv_sums, chunk_out_proj_bias,
            chunks, dqkvv_bias, dproj_k_bias, dproj_v_bias, dtemperature, dtemperature2,
            dout_proj_bias, dout_proj2_bias, drows,
            C, H, P, J, O, ACC, ROWS, SIZE, MODE, BLOCK, BT,
        )  # fmt: skip
