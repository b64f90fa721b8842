"""Launches of paired attention: workspaces, grids and block sizes, nothing else."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import rng
from ...contract import OPS, accumulate_dtype, mean_dtype, plan
from ..gradients import ParameterGradients, empty_gradient
from .launch import block, chunks, precision, prepare, projected_block
from .paired_gather import SECTIONS, paired_gather_bwd
from .paired_mix import paired_mix_bwd, paired_mix_fwd
from .paired_output import (
    offset,
    paired_merge_bwd,
    paired_output_bwd,
    paired_output_fwd,
    through_memory,
)
from .paired_product import paired_product_fwd
from .paired_summary import paired_merge_fwd, paired_summary_bwd, paired_summary_fwd

PAIRED = OPS["paired_attention"]
# Up to so many channels out_s is projected on the spot; beyond, registers do not suffice.
SPOT_CHANNELS, SPOT_CHANNELS_BWD = 128, 32
# Elements of a block where the gather adds up, and how many terms of each are read at a time.
GATHER_BLOCK, GATHER_DEPTH = 256, 8


class _Layer:
    """The tensors, options and block sizes of one call."""

    def __init__(self, inputs, seed, options):
        x, kind = inputs.x, options.kind
        B, N, C = self.shape = x.shape
        H, P = options.num_heads, inputs.proj_k_weight.shape[0]
        self.B, self.N, self.C, self.H, self.P, self.D = B, N, C, H, P, C // H
        self.J = 2 if kind == "split" else 1
        self.O = C if kind == "sum" else C // 2
        self.is_sum = kind == "sum"
        self.dtype = accumulate_dtype(x.dtype)
        self.x, self.proj_k, self.proj_v = x, inputs.proj_k_weight, inputs.proj_v_weight

        def dense(t):
            return None if t is None else t.contiguous()

        self.qkvv_weight, self.qkvv_bias = dense(inputs.qkvv_weight), dense(inputs.qkvv_bias)
        self.proj_k_bias = dense(inputs.proj_k_bias)
        self.proj_v_bias = dense(inputs.proj_v_bias) if kind == "split" else self.proj_k_bias
        self.temperature = dense(inputs.temperature)
        self.temperature2 = dense(inputs.temperature2)
        self.out_proj_weight = dense(inputs.out_proj_weight)
        self.out_proj_bias = dense(inputs.out_proj_bias)
        self.out_proj2_weight = dense(inputs.out_proj2_weight)
        self.out_proj2_bias = dense(inputs.out_proj2_bias)
        channel_dropout_p, spatial_dropout_p = options.channel_dropout_p, options.spatial_dropout_p
        self.channel_threshold = rng.threshold(channel_dropout_p)
        self.spatial_threshold = rng.threshold(spatial_dropout_p)
        self.channel_dropout, self.spatial_dropout = channel_dropout_p > 0, spatial_dropout_p > 0
        self.seed = seed if self.channel_dropout or self.spatial_dropout else None
        self.row_sums = None
        if inputs.qkvv_bias is not None:
            self.row_sums = self.empty(self.J, P)
            projections = inputs.proj_k_weight, inputs.proj_v_weight
            for row, projection in zip(self.row_sums, projections, strict=False):
                torch.sum(projection, 1, dtype=self.dtype, out=row)
        self.BD, self.BO = block(self.D), block(self.O)
        self.BP = projected_block(self.D, P, x.element_size())
        self.ROWS = -(-self.O // H)  # of the channel branch's matrix, a head
        self.whole_rows = C == block(C) and N % C == 0  # C tokens make up rows of out_s'
        self.layout = options.layout
        self.precision = precision(x)
        # The parts of a wide head's map do not fit shared memory.
        self.mix_precision = "ieee" if self.D > 64 else self.precision

    def mode(self, spot_channels):
        """MODE of an output pass that projects out_s on the spot up to so many channels."""
        on_the_spot = self.C <= spot_channels
        if self.layout == "tokens":
            return "add" if self.is_sum else "tokens" if on_the_spot else "flat_tokens"
        if on_the_spot and self.whole_rows:
            return "row_sum" if self.is_sum else "rows"
        return "flat_sum" if self.is_sum else "flat"

    def prepare(self, kernel):
        return prepare(kernel, self.x, self.C, self.D, self.P)

    def empty(self, *shape):
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)

    def projections(self):
        """Pointer and strides of both token projections; the first stands in for an absent one."""
        proj_v = self.proj_k if self.proj_v is None else self.proj_v
        return self.proj_k, *self.proj_k.stride(), proj_v, *proj_v.stride()


class _Mixed(NamedTuple):
    """What `paired_mix_fwd` leaves; from q_gram on for backward only."""

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
    launch, common = layer.prepare("paired_summary_fwd")
    T, BC, BP = launch.rows, block(C, launch.columns), block(P, 64)
    # The direct plan comes here twice, and mode flat has a product at the end of forward.
    spare = plan(N, C) == "direct" or layer.mode(SPOT_CHANNELS).startswith("flat")
    count, size = chunks(N, launch, spare_launch=spare)
    mean = torch.empty(B, C, dtype=mean_dtype(layer.x.device), device=layer.x.device)
    result = mean, layer.empty(B, C, C), layer.empty(B, J, P, C)
    sums = result if count == 1 else [t.new_empty((count, *t.shape)) for t in result]
    columns = triton.cdiv(C, BC)
    rows = max(columns, J * triton.cdiv(P, BP))
    paired_summary_fwd[(count, rows * columns, B)](
        layer.x, *layer.x.stride(), *layer.projections(), *sums, N, size,
        C=C, P=P, J=J, T=T, BC=BC, BP=BP, PRECISION=layer.precision, **common,
    )  # fmt: skip
    if count > 1:
        launch, common = layer.prepare("paired_merge_fwd")
        BLOCK = launch.rows
        paired_merge_fwd[(triton.cdiv(C * C, BLOCK) + triton.cdiv(J * P * C, BLOCK), B)](
            *sums, *result, N, size, count, C=C, ROWS=J * P, BLOCK=BLOCK, BT=16, **common
        )
    return result


def _mix(layer, mean, gram, projected, dout=None, dy=None):
    """What lies between the passes; with dy all that backward needs, dout included if given."""
    B, N, C, H, P, D = layer.B, layer.N, layer.C, layer.H, layer.P, layer.D
    shapes = [(B, H, P, D), (B, H, P, D), (B, C), (B, C, C), (B, C)]
    if dy is not None:
        shapes += [(B, C, C)] * 2 + [(B, C)] * 4 + [(B, H, D, D)]
    mixed = _Mixed(*(layer.empty(*shape) for shape in shapes))
    launch, common = layer.prepare("paired_mix_fwd")
    tile, _ = layer.prepare("paired_product_fwd")
    BC, T, BM = block(C, launch.columns), tile.rows, block(C, tile.columns)
    tiles = 0 if dout is None else triton.cdiv(N, T) * triton.cdiv(C, BM)
    paired_mix_fwd[(H + tiles, B)](
        mean, gram, projected, layer.row_sums, layer.qkvv_weight, layer.qkvv_bias,
        layer.proj_k_bias, layer.proj_v_bias, layer.temperature, layer.temperature2, layer.seed,
        *mixed, dy, N * C, layer.out_proj_weight, dout, N, layer.channel_threshold,
        C=C, H=H, P=P, J=layer.J, O=layer.O, BC=BC, BD=layer.BD, BP=block(P, launch.rows), T=T,
        BM=BM, DROPOUT=layer.channel_dropout, KEEP=dy is not None, PRECISION=layer.mix_precision,
        **common,
    )  # fmt: skip
    return mixed


def _product(layer, a, w, bias, y, add=False):
    """y (B, N, M) = [y +] a w^T + bias; w (M, K) or (B, M, K), any strides but y's last."""
    M, K = w.shape[-2:]
    launch, common = layer.prepare("paired_product_fwd")
    T, BM = launch.rows, block(M, launch.columns)
    paired_product_fwd[(triton.cdiv(layer.N, T), triton.cdiv(M, BM), layer.B)](
        a, *a.stride(), w, w.stride(0) if w.dim() == 3 else 0, *w.stride()[-2:], bias,
        y, *y.stride()[:2], layer.N, K=K, M=M, ADD=add, T=T, BK=block(K, launch.columns), BM=BM,
        PRECISION=layer.precision, **common,
    )  # fmt: skip


def forward(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    layer = _Layer(*PAIRED.forward(tensors, options))
    B, N, C, H, P, O = layer.B, layer.N, layer.C, layer.H, layer.P, layer.O
    kept = _summary(layer)
    mixed = _mix(layer, *kept)
    mode = layer.mode(SPOT_CHANNELS)
    is_flat = through_memory(mode)
    launch, common = layer.prepare("paired_output_fwd")
    T, heads = launch.rows, H if mode == "tokens" else 1
    tokens = max(T, C) if mode in ("rows", "row_sum") else T  # of a program
    y = layer.x.new_empty((B, N, C))
    out_s = layer.x.new_empty((B, N, C)) if is_flat else None
    paired_output_fwd[(triton.cdiv(N, tokens), H // heads, B)](
        layer.x, *layer.x.stride(), layer.qkvv_weight, layer.qkvv_bias, *mixed[:5],
        layer.out_proj_weight, layer.out_proj_bias, layer.out_proj2_weight, layer.out_proj2_bias,
        layer.seed, y, out_s, N, layer.spatial_threshold,
        C=C, H=H, P=P, O=O, MODE=mode, HEADS=heads, T=T, BC=block(C, launch.columns),
        BD=layer.BD, BP=layer.BP, BO=layer.BO, BR=block(-(-O * heads // H)),
        DROPOUT=layer.spatial_dropout, PRECISION=layer.precision, **common,
    )  # fmt: skip
    if is_flat:
        _product(layer, out_s, layer.out_proj_weight, layer.out_proj_bias, y)
    if mode == "flat_sum":
        _product(layer, layer.x, mixed.value_matrix, None, y, add=True)
    if plan(N, C) == "direct":  # keeps nothing; backward makes it again
        kept = tuple(layer.x.new_empty((0,)) for _ in range(3))
    return y, *kept


def _output_bwd(layer, mode, dy, dout, mean, mixed):
    """dq (B,N,C), the sums over tokens (B,H,SIZE), and with dout out_s' (B,N,C)."""
    B, N, C, H, P, D, O = layer.B, layer.N, layer.C, layer.H, layer.P, layer.D, layer.O
    size = offset("dout_proj", C, D, P, layer.ROWS)
    size += {"rows": O * C + O, "tokens": O * D + O}.get(mode, 0)
    dq = torch.empty_like(dy)
    out_s = None if dout is None else torch.empty_like(dy)
    launch, common = layer.prepare("paired_output_bwd")
    if mode == "rows":
        launch = launch._replace(rows=max(launch.rows, C))
    if mode == "tokens":  # which holds all channels of its head's dWo1
        launch = launch._replace(rows=min(launch.rows, 32))
    count, chunk = chunks(N, launch, spare_launch=plan(N, C) == "direct")
    sums = layer.empty(count, B, H, size)
    BC = block(C, launch.columns)
    blocks = max(triton.cdiv(C, BC), triton.cdiv(P, layer.BP))
    paired_output_bwd[(count, H * blocks, B)](
        layer.x, *layer.x.stride(), dy, dy if dout is None else dout, layer.qkvv_weight, mean,
        mixed.q_mean,
        mixed.k_proj, mixed.v_proj, mixed.scale, layer.out_proj_weight, layer.seed,
        dq, out_s, sums, N, chunk, layer.spatial_threshold,
        C=C, H=H, P=P, O=O, MODE=mode, ROWS=layer.ROWS, SIZE=size, T=launch.rows, BC=BC,
        BD=layer.BD, BP=layer.BP, BO=layer.BO, BR=block(layer.ROWS),
        DROPOUT=layer.spatial_dropout, PRECISION=precision(layer.x, "paired_output_bwd"), **common,
    )  # fmt: skip
    if count == 1:
        return dq, sums[0], out_s
    total = layer.empty(B, H, size)
    launch, common = layer.prepare("paired_merge_bwd")
    paired_merge_bwd[(triton.cdiv(B * H * size, launch.rows),)](
        sums, total, count, B * H * size, BLOCK=launch.rows, BT=16, **common
    )
    return dq, total, out_s


def backward(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    inputs, (mean, gram, projected), seed, options = PAIRED.backward(tensors, options)
    layer = _Layer(inputs, seed, options)
    B, N, C, H, P, J, O = layer.B, layer.N, layer.C, layer.H, layer.P, layer.J, layer.O
    if plan(N, C) == "direct":
        mean, gram, projected = _summary(layer)
    dy = dy.contiguous()
    mode = layer.mode(SPOT_CHANNELS_BWD)
    is_flat = through_memory(mode)
    dout = torch.empty_like(dy) if is_flat else None
    mixed = _mix(layer, mean, gram, projected, dout, dy)
    dq, sums, out_s = _output_bwd(layer, mode, dy, dout, mean, mixed)
    size = sums.shape[-1]

    attention, ddots = layer.empty(B, H, layer.D, layer.D), layer.empty(B, H, layer.D, layer.D)
    dheads, sample_qkvv_bias = layer.empty(B, 6, C), layer.empty(B, 4 * C)
    sample_temperatures = layer.empty(B, 2, H)
    dkv, dkv_sums = layer.empty(B, 2, P, C), layer.empty(B, H, 4, P)
    launch, common = layer.prepare("paired_mix_bwd")
    count = chunk = programs = 0
    chunk_out_proj = None, None
    if is_flat:
        count, chunk = chunks(N, launch)
        chunk_out_proj = layer.empty(count, B, O, C), layer.empty(count, B, O)
        programs = count * triton.cdiv(O, launch.rows) * triton.cdiv(C, launch.rows)
    paired_mix_bwd[(H + programs, B)](
        sums, mean, layer.row_sums, layer.qkvv_weight, layer.qkvv_bias,
        layer.temperature, layer.temperature2, layer.out_proj2_weight, layer.seed,
        mixed.k_proj, *mixed[7:], attention, ddots, dheads, sample_qkvv_bias, sample_temperatures,
        dkv, dkv_sums, dy, out_s, *chunk_out_proj, N, chunk, layer.channel_threshold,
        C=C, H=H, P=P, J=J, O=O, ROWS=layer.ROWS, SIZE=size, SUM=layer.is_sum, T=launch.rows,
        BC=block(C, launch.columns), BD=layer.BD, BP=block(P, launch.rows),
        BO=block(O, launch.rows), DROPOUT=layer.channel_dropout, PRECISION=layer.mix_precision,
        **common,
    )  # fmt: skip

    # Of x and the token projections the last pass makes the gradients.
    gradients = ParameterGradients(PAIRED.addresses(inputs), layer.x)
    dgram, dtoken = layer.empty(B, C, C), layer.empty(B, C)
    dprojected = layer.empty(B, J, P, C)
    drows = None if layer.qkvv_bias is None else layer.empty(J, P)
    matrix = mixed.value_matrix if layer.is_sum else layer.empty(B, O, C)
    launch, common = layer.prepare("paired_gather_bwd")
    BM, BC, BLOCK = launch.rows, block(C, launch.columns), GATHER_BLOCK
    blocks = max(
        B * triton.cdiv(C, BM) * triton.cdiv(C, BC),
        B * J * triton.cdiv(P, BM),
        4 * H * triton.cdiv(C, BC),
        triton.cdiv(O * C, BLOCK),
    )
    dense = zip(PAIRED.address_names, gradients.dense, strict=True)
    paired_gather_bwd[(blocks, SECTIONS)](
        sums=sums, mean=mean, projected=projected, q_gram=mixed.q_gram, k_gram=mixed.k_gram,
        attention=attention, ddots=ddots, dheads=dheads, sample_qkvv_bias=sample_qkvv_bias,
        sample_temperatures=sample_temperatures, dkv=dkv, dkv_sums=dkv_sums,
        qkvv_weight=layer.qkvv_weight, out_proj2_weight=layer.out_proj2_weight,
        value_matrix=mixed.value_matrix, value_constant=mixed.value_constant, dgram=dgram,
        dtoken=dtoken, dprojected=dprojected, drows=drows, matrix=matrix,
        **{f"d{name}": gradient for name, gradient in dense},
        chunk_out_proj_weight=chunk_out_proj[0], chunk_out_proj_bias=chunk_out_proj[1],
        chunks=count, B=B,
        C=C, H=H, P=P, J=J, O=O, ROWS=layer.ROWS, SIZE=size, MODE=mode, BM=BM, BC=BC, BD=layer.BD,
        BK=min(layer.BD, 32), BLOCK=BLOCK, BT=GATHER_DEPTH, PRECISION=layer.precision, **common,
    )  # fmt: skip

    dx, dproj_k, dproj_v = (empty_gradient(t, layer.x) for t in PAIRED.views(inputs))
    launch, common = layer.prepare("paired_summary_bwd")
    T, BC, BP = launch.rows, block(C, launch.columns), block(P, 64)
    grid = triton.cdiv(N, T), B + 1, max(triton.cdiv(C, BC), J * triton.cdiv(P, BP))
    paired_summary_bwd[grid](
        layer.x, *layer.x.stride(), dq, dy, *layer.projections(), layer.qkvv_weight, mean, dgram,
        dtoken, dprojected, drows, matrix, dx, *dx.stride(), dproj_k, *dproj_k.stride(),
        dproj_v if J == 2 else dproj_k, *(dproj_v if J == 2 else dproj_k).stride(), N, B,
        C=C, P=P, J=J, O=O, T=T, BC=BC, BP=BP, PRECISION=layer.precision, **common,
    )  # fmt: skip
    names = PAIRED.view_names + PAIRED.address_names
    results = zip(names, (dx, dproj_k, dproj_v, *gradients.finish()), strict=True)
    return tuple(inputs._replace(**dict(results)))
