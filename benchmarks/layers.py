"""The attention layers that benchmarks time, their inputs, and who computes them.

Low precision is what autocast leaves: x in bfloat16 or float16, parameters in float32. A backend
that is not as accurate as the reference (epa_kernels.testing.Errors) is not timed; of a peer it is
said.
"""

import copy
import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks import floor
from benchmarks.report import COMPILED, REFERENCE
from epa_kernels import dispatch
from epa_kernels.layout import from_heads
from epa_kernels.testing import assert_as_accurate, make_layer, run_layer

SDPA = "sdpa"
DIRECTIONS = ("forward", "forward+backward")


class Case(NamedTuple):
    """One attention layer of a published network."""

    name: str
    tokens: int
    channels: int
    projected: int
    kind: str


CASES = (
    Case("synapse/stage1", 32768, 32, 64, "shared"),
    Case("synapse/stage2", 4096, 64, 64, "shared"),
    Case("synapse/stage3", 512, 128, 64, "shared"),
    Case("synapse/stage4", 64, 256, 32, "shared"),
    Case("acdc/stage1", 25600, 32, 64, "split"),
    Case("tumor/stage1", 32768, 32, 64, "sum"),
)
DRY_CASE = Case("synapse/stage1", 40, 8, 3, "shared")


class Row(NamedTuple):
    case: Case
    batch: int
    dtype: torch.dtype
    heads: int = 4
    dropout: float = 0.0  # of both attention maps

    @property
    def shape(self):
        return self.batch, self.case.tokens, self.case.channels, self.heads, self.case.projected

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self):
        return f"{self.case.name}, B={self.batch}, {self.dtype_name}"


def sdpa_forward(layer, x):
    """The layer as one would write it with torch's fused attention for the spatial branch."""
    B, N, C = x.shape
    q, k, vc, vs = (
        F.linear(x, layer.qkvv.weight.to(x.dtype))
        .view(B, N, 4, layer.num_heads, C // layer.num_heads)
        .permute(2, 0, 3, 1, 4)
    )  # (B, H, N, D) each
    k_weight, k_bias, v_weight, v_bias = (
        None if t is None else t.to(x.dtype) for t in _projections(layer)
    )
    k_proj = k_weight @ k if k_bias is None else k_weight @ k + k_bias.unsqueeze(1)
    v_proj = v_weight @ vs if v_bias is None else v_weight @ vs + v_bias.unsqueeze(1)
    q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
    out_s = F.scaled_dot_product_attention(
        q * layer.temperature2.to(x.dtype), k_proj, v_proj, scale=1.0
    )
    attention = ((q.mT @ k) * layer.temperature.to(x.dtype)).softmax(-1)  # (B, H, D, D)
    out_c = (attention @ vc.mT).permute(0, 3, 1, 2).reshape(B, N, C)
    out_s = from_heads(out_s.transpose(1, 2), layer.layout)
    if layer.kind == "sum":
        return out_c + out_s
    y_s, y_c = (
        F.linear(out, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
        for out, linear in ((out_s, layer.out_proj), (out_c, layer.out_proj2))
    )
    return torch.cat((y_s, y_c), dim=-1)


def _projections(layer):
    if layer.kind == "sum":
        return layer.EF.T, None, layer.EF.T, None
    return layer.E.weight, layer.E.bias, layer.F.weight, layer.F.bias


class Setting(NamedTuple):
    """A row's layer, input, output gradient, and results in float64 and in its own dtype."""

    layer: torch.nn.Module
    x: torch.Tensor
    gy: torch.Tensor
    exact: dict[str, torch.Tensor]
    same_dtype: dict[str, torch.Tensor]


@functools.lru_cache(maxsize=1)
def make_setting(kind, row):
    layer = make_layer(row.shape, row.case.kind, bias=False, dropout=row.dropout)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(row.dtype))
    generator = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(row.shape[:3], generator=generator).to(kind, row.dtype) for _ in range(2))
    exact = run_layer(layer, x, gy, backend=REFERENCE, dtype=torch.float64)
    layer.float()
    same_dtype = run_layer(
        layer, x, gy, backend=REFERENCE, dtype=row.dtype, parameter_dtype=torch.float32
    )
    return Setting(layer, x, gy, exact, same_dtype)


@functools.lru_cache(maxsize=1)
def make_provider(kind, row, name, dry_run):
    """A copy of the row's layer that computes as `name` does."""
    layer = copy.deepcopy(make_setting(kind, row).layer)
    layer.backend = name if name in dispatch.BACKENDS else REFERENCE
    if name == SDPA:
        layer.forward = functools.partial(sdpa_forward, layer)
    if name == COMPILED:
        torch.compiler.reset()  # the graphs of earlier rows count against a limit
        mode = "max-autotune" if kind == "cuda" else "default"
        options = {"backend": "aot_eager"} if dry_run else {"mode": mode}
        layer.compile(dynamic=False, fullgraph=True, **options)  # whole, or not at all
    return layer


@functools.lru_cache(maxsize=1)
def inaccuracy(kind, row, name, dry_run):
    """What breaks the tolerance rule of epa_kernels.testing.Errors, None if nothing does."""
    setting, layer = make_setting(kind, row), make_provider(kind, row, name, dry_run)
    found = run_layer(
        layer, setting.x, setting.gy,
        backend=layer.backend, dtype=row.dtype, parameter_dtype=torch.float32,
    )  # fmt: skip
    layer.zero_grad()
    try:
        assert_as_accurate(found, setting.same_dtype, setting.exact)
    except AssertionError as error:
        return f"tensor, its error and the reference's, or its cosine: {error}"
    return None


def make_call(layer, setting, name, direction):
    """The call of a provider that is timed."""
    # As after zero_grad(): gradients are returned, not added to those of the call before.
    x = setting.x.detach().requires_grad_()
    inputs = (x, *layer.parameters())

    def forward():
        with torch.no_grad():
            return (layer(x),)

    def both():
        return torch.autograd.grad(layer(x), inputs, setting.gy)

    function = forward if direction == "forward" else both
    return _marked(function) if name == COMPILED else function


def _marked(function):
    """A call that may overwrite the results of the one before, as CUDA graphs do."""

    def call():
        torch.compiler.cudagraph_mark_step_begin()
        return function()

    return call


def counted(row, direction, peaks):
    """Counted work, and the floor that the peaks which `gpu_peaks` measured give it."""
    forward, backward = floor.work(row.shape, row.case.kind, element_bytes=row.dtype.itemsize)
    both = floor.Work(*map(sum, zip(forward, backward, strict=True)))
    work = forward if direction == "forward" else both
    needed = ("memory", row.dtype_name, "exponentials")
    missing = [name for name in needed if peaks.get(name, {}).get("value") is None]
    if missing:
        reasons = {"floor_us": f"no peak was measured for {', '.join(missing)}"}
        return {**work._asdict(), "floor_us": None, "bound": None, "reasons": reasons}
    rates = floor.GpuPeaks(*(peaks[name]["value"] for name in needed))
    seconds = floor.gpu_seconds(work, rates)
    bound = max(seconds, key=seconds.get)
    return {**work._asdict(), "floor_us": seconds[bound] * 1e6, "bound": bound, "reasons": {}}
