"""The mix of paired attention: what lies between the passes, one head of one sample a program.

Forward it makes from the summary what the output pass needs, the channel map among it. Backward it
makes from the output pass's sums the small gradients: D x D, or P x D.
"""

import triton
import triton.language as tl

from .paired_output import offset
from .paired_product import out_proj_gradient, product_tile
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
def paired_mix_fwd(
    mean, gram, projected, row_sums, qkvv_weight, qkvv_bias, proj_k_bias, proj_v_bias,
    temperature, temperature2, seed,
    k_proj, v_proj, scale, value_matrix, value_constant,
    q_gram, k_gram, q_mean, k_mean, q_norm, k_norm, dots, dy, dy_b, out_proj_weight, dout,
    N, threshold,
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
        attention *= dropout_multiplier(seed, (b * H + h) * D + d, 0, BD, threshold, 0, ACC)
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
        target = (b * H + h) * P * D
        store_rows(k_proj + target, D, 1, p, d, in_p, in_d, k_block)
        store_rows(v_proj + target, D, 1, p, d, in_p, in_d, v_block)


@triton.jit
def matrix_gradient(
    sample, o, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Pointers into a sample's sums: rows o of the gradient of Wo2 A Wvc, and of its constants."""
    head = sample + (o // ROWS) * SIZE
    rows = head + offset("dmatrix", C, D, P, ROWS) + (o % ROWS) * C
    return rows, head + offset("dconstant", C, D, P, ROWS) + o % ROWS


@triton.jit
def value_constant_gradient(
    sample, own, out_proj2_weight, h, d,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, SUM: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the constant that a head's values add, (BD)."""
    if SUM:
        constants = own + offset("dconstant", C, D, P, ROWS) + d
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
        rows = own + offset("dmatrix", C, D, P, ROWS)
        dvalue = load_rows(rows, C, 1, d, columns, in_d, inside)
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
def paired_mix_bwd(
    sums, mean, row_sums, qkvv_weight, qkvv_bias, temperature, temperature2, out_proj2_weight,
    seed, k_proj, q_mean, k_mean, q_norm, k_norm, dots,
    attention, ddots, dheads, dqkvv_bias, dtemperatures, dkv, dkv_sums,
    dy, out_s, dout_proj_weight, dout_proj_bias,
    N, chunk, threshold,
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
        multiplier = dropout_multiplier(seed, (b * H + h) * D + d, 0, BD, threshold, 0, ACC)
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
    for first in range(0, P, BP):
        p = first + tl.arange(0, BP)
        in_p = p < P
        projection = load_rows(k_proj + (b * H + h) * P * D, D, 1, p, d, in_p, in_d)
        dlogits_p = tl.load(own + offset("dlogits", C, D, P, ROWS) + p, mask=in_p, other=0.0)
        dkey = load_rows(own + offset("dkeys", C, D, P, ROWS), D, 1, p, d, in_p, in_d)
        dkey += dlogits_p[:, None] * q_centre[None, :]
        key = projection * (t / q_length)[None, :]
        dtemperature2 += tl.sum(dkey * projection / q_length[None, :], 0)
        along += tl.sum(dkey * key, 0)
        dq_total += tl.sum(dlogits_p[:, None] * key, 0)
        dk = dkey * (t / q_length)[None, :]
        dv = load_rows(own + offset("dv_proj", C, D, P, ROWS), D, 1, p, d, in_p, in_d)
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
