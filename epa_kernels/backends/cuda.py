"""CUDA C++ kernels of csrc/cuda: allocation, streams and addresses, nothing else.

The compiled module is loaded with the first tensor that they are asked about.
"""

import contextlib
import ctypes
import functools
import os

import torch
from torch import Tensor

from ..contract import OPS, Call, accumulate_dtype, plan
from ..rng import threshold
from ..torch_private import constant_result
from .compiled import (
    DTYPE_NUMBERS,
    KIND_NUMBERS,
    LAYOUT_NUMBERS,
    address,
    dense,
    float32_is_exact,
    load,
    unknown_dtype,
    view,
)
from .gradients import ParameterGradients, empty_gradient, per_head, temperature_gradient

PAIRED, SPATIAL, CHANNEL = OPS.values()


class _Module:
    """The module `_C_cuda`, loaded at the first look at it; `missing` says why it is absent."""

    @functools.cached_property
    def _loaded(self):
        return load("_C_cuda", "EPA_KERNELS_CUDA", "nvcc")

    @property
    def missing(self) -> str | None:
        return self._loaded[1]

    def __getattr__(self, name: str):
        if self.missing is not None:
            raise RuntimeError(self.missing)
        return getattr(self._loaded[0], name)


module = _Module()
# Sizes that bound a grid or a block, see csrc/cuda/cuda_kernels.h.
_HEADS = {"B": 65535, "H": 65535, "D": 1024}
LIMITS = {
    "paired_attention": {"B": 65533, "C": 1024, "D": 512, "P": 512},
    "spatial_attention": _HEADS | {"P": 512},
    "channel_attention": _HEADS | {"D": 256},
}


def describe() -> str:
    """The architectures that the kernels are compiled for, or why there are none."""
    if module.missing is not None:
        return f"none: {module.missing}"
    names = ", ".join(f"sm_{number}" for number in module.architectures)
    return f"{names} and PTX of sm_{module.ptx}, compiled with CUDA {_version(module.cuda_version)}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _once(function):
    """Ask once; torch.compile takes the answer as a constant and does not look inside."""
    known = {}

    def answer(*question):
        if question not in known:
            known[question] = function(*question)
        return known[question]

    answer.known = known
    return constant_result(answer)


@_once
def _why_not_here() -> list[str]:
    """Every reason that has nothing to do with a tensor."""
    reasons = []
    if module.missing is not None:
        reasons.append(module.missing)
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__}, which is built without CUDA")
    return reasons


def driver_version() -> int | None:
    """The newest CUDA that the driver runs, 13000 for 13.0; None where no driver tells."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


@_once
def _why_not_on(index: int | None) -> list[str]:
    """Every reason that the GPU itself gives."""
    major, minor = torch.cuda.get_device_capability(index)
    number = 10 * major + minor
    if number < 80:
        return [f"compute capability {major}.{minor} < 8.0"]
    if module.missing is not None:
        return []
    reasons, driver = [], driver_version()
    runs = any(n // 10 == major and n <= number for n in module.architectures)
    if not runs and number < module.ptx:
        reasons.append(f"compute capability {major}.{minor}, the extension has {describe()}")
    # Any driver of the same major version runs binaries; PTX takes one as new as nvcc.
    needed = module.cuda_version // 1000 * 1000 if runs else module.cuda_version
    if driver is not None and driver < needed:
        reasons.append(
            f"a driver of CUDA {_version(driver)}, the extension is of CUDA "
            f"{_version(module.cuda_version)}"
        )
    return reasons


def why_not(call: Call) -> list[str]:
    """Every reason why the kernels cannot run a call."""
    reasons = list(_why_not_here())
    if call.device.type != "cuda":
        reasons.append(f"x is on {call.device.type}, the kernels run on NVIDIA GPUs")
    elif torch.cuda.is_initialized():  # not for a fake tensor, on a machine without a GPU
        reasons += _why_not_on(call.device.index)
    return reasons + unknown_dtype(call) + call.beyond(LIMITS[call.op])


def _device(t: Tensor):
    """The kernels run on the current device: make it that of t."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _launch(op, name: str, like: Tensor, *results) -> None:
    """Run method `name` of an op's arguments, with a workspace that lives as long as its stream."""
    workspace = like.new_empty((getattr(op, f"{name}_workspace")(),), dtype=torch.uint8)
    op.workspace = address(workspace)
    with _device(like):
        getattr(op, name)(*results)


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, int]:
    """Threshold and address of the seed, which stays on the device."""
    return (threshold(dropout_p), address(seed)) if dropout_p > 0 else (0, 0)


def _parameter_dtype(inputs) -> torch.dtype:
    """What the kernels take all parameters in: their own dtype where that is x's or wider."""
    x, *parameters = inputs
    is_own = all(t is None or t.dtype == x.dtype for t in parameters)
    return x.dtype if is_own else accumulate_dtype(x.dtype)


def _paired(inputs, kept, seed, options):
    """Arguments of the kernels, the dtype of parameters, and the tensors that must outlive both."""
    x = inputs.x
    B, N, C = x.shape
    dtype = _parameter_dtype(inputs)
    _, *projections = PAIRED.views(inputs)
    projections = [None if t is None else t.to(dtype) for t in projections]
    parameters = [dense(t, dtype) for t in PAIRED.addresses(inputs)]
    channel_threshold, channel_seed = _dropout(options.channel_dropout_p, seed)
    spatial_threshold, spatial_seed = _dropout(options.spatial_dropout_p, seed)
    op = module.PairedAttention(
        (B, N, C, options.num_heads, inputs.proj_k_weight.shape[0]),
        KIND_NUMBERS[options.kind], LAYOUT_NUMBERS[options.layout],
        plan(N, C) == "direct", (channel_threshold, spatial_threshold),
        channel_seed or spatial_seed, DTYPE_NUMBERS[dtype], not float32_is_exact(),
        tuple(map(view, (x, *projections))), tuple(map(address, parameters)),
        tuple(map(address, kept)), _stream(x),
    )  # fmt: skip
    return op, dtype, (projections, parameters)


def paired_attention(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    inputs, seed, options = PAIRED.forward(tensors, options)
    y, kept = PAIRED.allocate(inputs, options)
    op, _, _alive = _paired(inputs, kept, seed, options)
    _launch(op, "fwd", y, address(y))
    return y, *kept


def paired_attention_bwd(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    inputs, kept, seed, options = PAIRED.backward(tensors, options)
    x, dy = inputs.x, dy.contiguous()
    kept = [t.contiguous() for t in kept]
    op, dtype, _alive = _paired(inputs, kept, seed, options)
    results = [empty_gradient(t, x) for t in PAIRED.views(inputs)]
    written = [
        t if t is results[0] or t.dtype == dtype else torch.empty_like(t, dtype=dtype)
        for t in results
    ]
    parameters = ParameterGradients(PAIRED.addresses(inputs), x, dtype)
    _launch(
        op, "bwd", x, address(dy),
        tuple(view(t) if t.numel() else None for t in written),
        tuple(map(address, parameters.dense)),
    )  # fmt: skip
    for result, t in zip(results, written, strict=True):
        if t is not result:
            result.copy_(t)
    names = PAIRED.view_names + PAIRED.address_names
    gradients = zip(names, results + parameters.finish(), strict=True)
    return tuple(inputs._replace(**dict(gradients)))


def _spatial(inputs, kept, seed, options):
    """Arguments of the kernels, and the tensor that must outlive them."""
    q = inputs.q
    row, stride = per_head(inputs.temperature.to(kept.q_norm.dtype))
    op = module.SpatialAttention(
        (*q.shape, inputs.k_proj.shape[1]), options.normalize, not float32_is_exact(),
        _dropout(options.dropout_p, seed), tuple(map(view, SPATIAL.views(inputs))),
        (address(row), stride), address(kept.q_norm), _stream(q),
    )  # fmt: skip
    return op, row


def _channel(inputs, kept, seed, options):
    """Arguments of the kernels, and the tensor that must outlive them."""
    q = inputs.q
    row, stride = per_head(inputs.temperature.to(kept.gram.dtype))
    op = module.ChannelAttention(
        tuple(q.shape), not float32_is_exact(), _dropout(options.dropout_p, seed),
        tuple(map(view, CHANNEL.views(inputs))), (address(row), stride),
        tuple(map(address, kept)), _stream(q),
    )  # fmt: skip
    return op, row


def _heads_fwd(op, arguments_of, tensors, options):
    """An op on heads; `arguments_of` makes what its kernels take, and what must outlive them."""
    inputs, seed, options = op.forward(tensors, options)
    out, kept = op.allocate(inputs, options)
    arguments, _alive = arguments_of(inputs, kept, seed, options)
    _launch(arguments, "fwd", out, view(out))
    return out, *kept


def _heads_bwd(op, arguments_of, dout, tensors, options):
    """Its backward, likewise."""
    inputs, kept, seed, options = op.backward(tensors, options)
    kept = kept._make(t.contiguous() for t in kept)
    gradients = tuple(empty_gradient(t, dout) for t in op.views(inputs))
    B, _, H, _ = dout.shape
    dtemperature = kept.q_norm.new_empty((B, H))
    arguments, _alive = arguments_of(inputs, kept, seed, options)
    _launch(arguments, "bwd", dout, view(dout), tuple(map(view, gradients)), address(dtemperature))
    return *gradients, temperature_gradient(dtemperature.sum(0), inputs.temperature)


def spatial_attention(*tensors, **options):
    """Op `spatial_attention`, see `ops`."""
    return _heads_fwd(SPATIAL, _spatial, tensors, options)


def spatial_attention_bwd(dout, *tensors, **options):
    """Op `spatial_attention_bwd`, see `ops`."""
    return _heads_bwd(SPATIAL, _spatial, dout, tensors, options)


def channel_attention(*tensors, **options):
    """Op `channel_attention`, see `ops`."""
    return _heads_fwd(CHANNEL, _channel, tensors, options)


def channel_attention_bwd(dout, *tensors, **options):
    """Op `channel_attention_bwd`, see `ops`."""
    return _heads_bwd(CHANNEL, _channel, dout, tensors, options)
