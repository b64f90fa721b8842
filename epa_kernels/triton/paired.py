"""Launches of paired attention: workspaces, grids and block sizes, nothing else."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import ParameterGradients, empty_gradient, mean_dtype, plan
from ..reference import accumulate_dtype
from ..rng import threshold
from . import configs
from . import paired_kernels as kernels
from .configs import block, chunks, precision, tile


class _Layer:
    """The tensors, options and block sizes of one call."""

    def __init__(
        self, x, qkvv_weight, qkvv_bias, proj_k_weight, proj_k_bias, proj_v_weight, proj_v_bias,
        temperature, temperature2, out_proj_weight, out_proj_bias, out_proj2_weight,
        out_proj2_bias, seed, *, num_heads, kind, layout, channel_dropout_p, spatial_dropout_p,
    ):  # fmt: skip
        B, N, C = self.shape = x.shape
        H, P = num_heads, proj_k_weight.shape[0]
        self.B, self.N, self.C, self.H, self.P, self.D = B, N, C, H, P, C // H
        self.J = 2 if kind == "split" else 1
        self.O = C if kind == "sum" else C // 2
        self.is_sum = kind == "sum"
        self.dtype = accumulate_dtype(x.dtype)
        self.x, self.proj_k, self.proj_v = x, proj_k_weight, proj_v_weight
        (
            self.qkvv_weight, self.qkvv_bias, self.proj_k_bias, self.proj_v_bias, self.temperature,
            self.temperature2, self.out_proj_weight, self.out_proj_bias, self.out_proj2_weight,
            self.out_proj2_bias,
        ) = (
            None if t is None else t.contiguous()
            for t in (
                qkvv_weight, qkvv_bias, proj_k_bias,
                proj_v_bias if kind == "split" else proj_k_bias, temperature, temperature2,
                out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias,
            )
        )  # fmt: skip
        self.channel_cut, self.spatial_cut = (
            threshold(channel_dropout_p),
            threshold(spatial_dropout_p),
        )
        self.channel_dropout, self.spatial_dropout = channel_dropout_p > 0, spatial_dropout_p > 0
        self.seed = seed if self.channel_dropout or self.spatial_dropout else None
        self.row_sums = None
        if qkvv_bias is not None:
            projections = (proj_k_weight, proj_v_weight)[: self.J]
            self.row_sums = torch.stack([e.sum(1, dtype=self.dtype) for e in projections])

        self.BC, self.BD, self.BP, self.BO = block(C, 128), block(self.D), block(P), block(self.O)
        self.T = self.tokens(tile(P, C))
        self.mode = self._mode(layout)
        if self.mode == "rows":
            self.T = max(self.T, C)
        self.ROWS = -(-self.O // H)  # of the channel branch's matrix, a head
        self.common = {
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "PRECISION": precision(x),
        }

    def _mode(self, layout):
        if layout == "tokens":
            return "add" if self.is_sum else "tokens"
        if self.is_sum:
            return "sum"
        whole = self.C == self.BC and self.N % self.C == 0
        return "rows" if whole and self.C * self.BP <= 16384 else "flat"

    def tokens(self, most):
        """Tokens of a tile: half as many where products of float32 go through registers."""
        return most // 2 if self.x.element_size() >= 4 else most

    def empty(self, *shape):
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)

    def projections(self):
        """Pointer and strides of both token projections; the first stands in for an absent one."""
        proj_v = self.proj_k if self.proj_v is None else self.proj_v
        return self.proj_k, *self.proj_k.stride(), proj_v, *proj_v.stride()


class _Mixed(NamedTuple):
    """What `mix` leaves; from q_gram on for backward only."""

    k_proj: Tensor
    v_proj: Tensor
    scale: Tensor
    value_matrix: Tensor
    value_constant: Tensor
    q_gram: Tensor | None = None
    k_gram: Tensor | None = None
    q_mean: Tensor | None = None
    k_mean: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    dots: Tensor | None = None


def _summary(layer):
    """First pass: mean (B,C), centred gram (B,C,C), projected (B,J,P,C)."""
    B, N, C, P, J = layer.B, layer.N, layer.C, layer.P, layer.J
    T, BC, BP = layer.tokens(64), min(layer.BC, 64), block(P, 64)
    count, size = chunks(N, T)
    means = torch.empty(B, count, C, dtype=torch.float64, device=layer.x.device)
    sums = layer.empty(B, count, (C + J * P) * C)
    columns = triton.cdiv(C, BC)
    rows = max(columns, J * triton.cdiv(P, BP))
    kernels.summary[(count, rows * columns, B)](
        layer.x, *layer.x.stride(), *layer.projections(), means, sums, N, size,
        C=C, P=P, J=J, T=T, BC=BC, BP=BP, num_warps=4 if BC <= 32 else 8, num_stages=2,
        **layer.common,
    )  # fmt: skip
    mean = torch.empty(B, C, dtype=mean_dtype(layer.x.device), device=layer.x.device)
    gram, projected = layer.empty(B, C, C), layer.empty(B, J, P, C)
    BM = configs.MERGE_ROWS
    kernels.merge[(triton.cdiv(C, BM) + triton.cdiv(J * P, BM), B)](
        means, sums, mean, gram, projected, N, size, count,
        C=C, ROWS=J * P, ACC=layer.common["ACC"], BM=BM, BC=BC, num_warps=4,
    )  # fmt: skip
    return mean, gram, projected


def _mix(layer, mean, gram, projected, keep):
    B, C, H, P, D = layer.B, layer.C, layer.H, layer.P, layer.D
    shapes = [(B, H, P, D), (B, H, P, D), (B, C), (B, C, C), (B, C)]
    if keep:
        shapes += [(B, C, C)] * 2 + [(B, C)] * 4 + [(B, H, D, D)]
    mixed = _Mixed(*(layer.empty(*shape) for shape in shapes))
    kernels.mix[(H, B)](
        mean, gram, projected, layer.row_sums, layer.qkvv_weight, layer.qkvv_bias,
        layer.proj_k_bias, layer.proj_v_bias, layer.temperature, layer.temperature2, layer.seed,
        *mixed, layer.N, layer.channel_cut,
        C=C, H=H, P=P, J=layer.J, BC=min(layer.BC, 32), BD=layer.BD, BP=block(P, 32),
        DROPOUT=layer.channel_dropout, KEEP=keep,
        num_warps=4 if layer.BD <= 16 else 8, num_stages=1, **layer.common,
    )  # fmt: skip
    return mixed


def _product(layer, a, w, bias, y, rows, add=False):
    """y (B, rows, M) = [y +] a w^T + bias; w (M, K) or (B, M, K), any strides but y's last."""
    M, K = w.shape[-2:]
    T, BM = 64, block(M, 64)
    kernels.product[(triton.cdiv(rows, T), triton.cdiv(M, BM), layer.B)](
        a, *a.stride(), w, w.stride(0) if w.dim() == 3 else 0, *w.stride()[-2:], bias,
        y, *y.stride()[:2], rows, K=K, M=M, ADD=add, T=T, BK=block(K, 64), BM=BM, num_warps=4,
        **layer.common,
    )  # fmt: skip


def forward(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    layer = _Layer(*tensors, **options)
    B, N, C, H, P, O = layer.B, layer.N, layer.C, layer.H, layer.P, layer.O
    kept = _summary(layer)
    mixed = _mix(layer, *kept, keep=False)
    y = layer.x.new_empty(B, N, C)
    out_s = layer.x.new_empty(B, N, C) if layer.mode == "flat" else None
    heads = H if layer.mode == "tokens" else 1
    kernels.output[(triton.cdiv(N, layer.T), H // heads, B)](
        layer.x, *layer.x.stride(), layer.qkvv_weight, layer.qkvv_bias, *mixed[:5],
        layer.out_proj_weight, layer.out_proj_bias, layer.out_proj2_weight, layer.out_proj2_bias,
        layer.seed, y, out_s, N, layer.spatial_cut,
        C=C, H=H, P=P, O=O, MODE=layer.mode, HEADS=heads, T=layer.T, BC=min(layer.BC, 64),
        BD=layer.BD, BP=layer.BP, BO=layer.BO, BR=block(-(-O * heads // H)),
        DROPOUT=layer.spatial_dropout, num_warps=8, num_stages=1, **layer.common,
    )  # fmt: skip
    if layer.mode == "flat":
        _product(layer, out_s, layer.out_proj_weight, layer.out_proj_bias, y, N)
    if layer.mode == "sum":
        _product(layer, layer.x, mixed.value_matrix, None, y, N, add=True)
    if plan(N, C) == "direct":  # keeps nothing; backward makes it again
        kept = tuple(layer.x.new_empty(0) for _ in range(3))
    return y, *kept


def _output_backward(layer, dy, mean, mixed):
    """dq (B,N,C), the sums over tokens (B,H,SIZE), and for mode flat out_s' (B,N,C)."""
    B, N, C, H, P, D, O = layer.B, layer.N, layer.C, layer.H, layer.P, layer.D, layer.O
    size = (D + layer.ROWS) * C + 2 * P * D + P + layer.ROWS
    size += {"rows": O * C + O, "tokens": O * D + O}.get(layer.mode, 0)
    dq = torch.empty_like(dy)
    dout, out_s = dy, None
    if layer.mode == "flat":
        dout, out_s = torch.empty_like(dy), torch.empty_like(dy)
        _product(layer, dy, layer.out_proj_weight.T, None, dout, N)
    T = max(min(layer.T, 32), C if layer.mode == "rows" else 0)
    count, chunk = chunks(N, T)
    sums = layer.empty(B, count, H, size)
    columns = triton.cdiv(C, layer.BC)
    kernels.output_backward[(count, H * columns, B)](
        layer.x, *layer.x.stride(), dy, dout, layer.qkvv_weight, mean, mixed.q_mean,
        mixed.k_proj, mixed.v_proj, mixed.scale, layer.out_proj_weight, layer.seed,
        dq, out_s, sums, N, chunk, layer.spatial_cut,
        C=C, H=H, P=P, O=O, MODE=layer.mode, ROWS=layer.ROWS, SIZE=size, T=T, BC=layer.BC,
        BD=layer.BD, BP=layer.BP, BO=layer.BO, BR=block(layer.ROWS),
        DROPOUT=layer.spatial_dropout, num_warps=8, num_stages=1, **layer.common,
    )  # fmt: skip
    total = layer.empty(B, H, size)
    kernels.sum_chunks[(triton.cdiv(H * size, configs.SUM_BLOCK), B)](
        sums, total, count,
        SIZE=H * size, ACC=layer.common["ACC"], BLOCK=configs.SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return dq, total, out_s


def backward(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    *inputs, mean, gram, projected, seed = tensors
    layer = _Layer(*inputs, seed, **options)
    B, N, C, H, P, J, O = layer.B, layer.N, layer.C, layer.H, layer.P, layer.J, layer.O
    if plan(N, C) == "direct":
        mean, gram, projected = _summary(layer)
    mixed = _mix(layer, mean, gram, projected, keep=True)
    dy = dy.contiguous()
    dq, sums, out_s = _output_backward(layer, dy, mean, mixed)
    size = sums.shape[-1]

    sample_qkvv_weight, sample_qkvv_bias = layer.empty(B, 4 * C, C), layer.empty(B, 4 * C)
    sample_out_proj2 = None if layer.is_sum else layer.empty(B, O, C)
    sample_temperatures, dkv = layer.empty(B, 2, H), layer.empty(B, 2, P, C)
    dkv_sums = layer.empty(B, H, 4, P)
    factors, dmeans = layer.empty(B, 2, C, C), layer.empty(B, 2, C)
    kernels.mix_backward[(H, B)](
        sums, mean, projected, layer.row_sums, layer.qkvv_weight, layer.qkvv_bias,
        layer.temperature, layer.temperature2, layer.out_proj2_weight, layer.seed,
        mixed.k_proj, *mixed[3:], sample_qkvv_weight, sample_qkvv_bias,
        sample_out_proj2, sample_temperatures, dkv, dkv_sums, factors, dmeans, N,
        layer.channel_cut,
        C=C, H=H, P=P, J=J, O=O, ROWS=layer.ROWS, SIZE=size, SUM=layer.is_sum,
        BC=min(layer.BC, 32), BD=layer.BD, BP=block(P, 32), BO=layer.BO,
        DROPOUT=layer.channel_dropout,
        num_warps=4 if layer.BD <= 16 else 8 if layer.BD <= 32 else 16, num_stages=1,
        **layer.common,
    )  # fmt: skip

    # Not x and not the token projections: of those the last pass makes the gradients.
    names = (1, 2, 4, 6, 7, 8, 9, 10, 11, 12)
    gradients = ParameterGradients([inputs[i] for i in names], layer.x)
    dense = dict(zip(names, gradients.dense, strict=True))
    dgram, dtoken = layer.empty(B, C, C), layer.empty(B, C)
    dprojected = layer.empty(B, J, P, C)
    drows = None if layer.qkvv_bias is None else layer.empty(J, P)
    matrix = mixed.value_matrix if layer.is_sum else layer.empty(B, O, C)
    BM, BLOCK = configs.MERGE_ROWS, configs.SUM_BLOCK
    blocks = max(B * triton.cdiv(max(C, J * P), BM), B * J * triton.cdiv(P, BM))
    blocks = max(blocks, triton.cdiv(4 * C * C, BLOCK))
    kernels.gather[(blocks, 7)](
        sums, sample_qkvv_weight, sample_qkvv_bias, sample_out_proj2, sample_temperatures, dkv,
        dkv_sums, factors, dmeans, layer.qkvv_weight, layer.out_proj2_weight, mixed.value_matrix,
        dgram, dtoken, dprojected, drows, matrix, dense[1], dense[2], dense[4], dense[6], dense[7],
        dense[8], dense[9], dense[10], dense[11], dense[12], B,
        C=C, H=H, P=P, J=J, O=O, ROWS=layer.ROWS, SIZE=size, MODE=layer.mode, BM=BM,
        BC=min(layer.BC, 32), BLOCK=BLOCK, num_warps=4, num_stages=1, **layer.common,
    )  # fmt: skip

    dx, dproj_k = empty_gradient(inputs[0], layer.x), empty_gradient(inputs[3], layer.x)
    dproj_v = empty_gradient(inputs[5], layer.x)
    T, BC, BP = layer.tokens(64), min(layer.BC, 64), block(P, 64)
    grid = triton.cdiv(N, T), B + 1, max(triton.cdiv(C, BC), J * triton.cdiv(P, BP))
    kernels.summary_backward[grid](
        layer.x, *layer.x.stride(), dq, dy, *layer.projections(), layer.qkvv_weight, mean, dgram,
        dtoken, dprojected, drows, matrix, dx, *dx.stride(), dproj_k, *dproj_k.stride(),
        dproj_v if J == 2 else dproj_k, *(dproj_v if J == 2 else dproj_k).stride(), N, B,
        C=C, P=P, J=J, O=O, T=T, BC=BC, BP=BP,
        num_warps=4 if BC <= 32 else 8, num_stages=2, **layer.common,
    )  # fmt: skip
    results = {0: dx, 3: dproj_k, 5: dproj_v} | dict(zip(names, gradients.finish(), strict=True))
    if layer.mode == "flat":
        dy_s = dy[..., :O].flatten(0, 1).to(layer.dtype)
        results[9].copy_(dy_s.T @ out_s.flatten(0, 1).to(layer.dtype))
        if inputs[10] is not None:
            results[10].copy_(dy_s.sum(0))
    return tuple(results[i] for i in range(len(inputs)))
