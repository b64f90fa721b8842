"""What tests and benchmarks of an attention op share, for kernels of your own as well.

make_layer, strided, op_arguments   layers and inputs whose attention is not uniform
run_layer                           output and every gradient of a layer on a backend
Errors, assert_as_accurate          the tolerance rule, two anchors: see `Errors`
Surroundings                        memory whose surroundings are watched
kept_for_backward                   bytes that autograd saves
Gpu, Cpu                            CUDA graphs, streams and waiting, or their stand-in
"""

import contextlib
import math
import os

import torch

from .dispatch import use_backend
from .modules import EfficientPairedAttention
from .surroundings import Surroundings as Surroundings
from .tolerance import Errors
from .torch_private import busy_gpu

# Where layers and inputs lie; `pytest --device cuda` of the project's own tests sets it.
DEVICE = os.environ.get("EPA_KERNELS_TEST_DEVICE", "cpu")
WARM_UP = 3  # calls before a capture, as torch's notes on CUDA graphs recommend


def strided(*shape, dtype, generator):
    """Normal numbers as a slice of a larger tensor, so that no stride is trivial."""
    larger = torch.randn(*(n + 1 for n in shape), generator=generator, dtype=torch.float64)
    # Moved before it is sliced, since a slice would arrive dense.
    return larger.to(DEVICE)[tuple(slice(1, None) for _ in shape)].to(dtype)


def make_layer(shape, kind="shared", layout="official", *, bias=True, dropout=0.0, seed=0):
    """A layer in float64 whose values are float32 numbers and whose attention is not uniform."""
    _, N, C, H, P = shape
    torch.manual_seed(seed)
    layer = EfficientPairedAttention(
        N, C, P, H, bias, dropout, dropout, kind=kind, layout=layout
    ).double()
    with torch.no_grad():
        layer.temperature.copy_(4 * (1 + torch.rand(H, 1, 1) / 2))
        layer.temperature2.copy_(2 * math.sqrt(N * H / C) * (1 + torch.rand(H, 1, 1) / 2))
        for parameter in layer.parameters():
            parameter.copy_(parameter.float())
    return layer.to(DEVICE)


def run_layer(layer, x, gy, *, backend, dtype, parameter_dtype=None, seed=0):
    """Output and every gradient of a run in `dtype`: {"y", "x", parameter names}."""
    layer.to(DEVICE, parameter_dtype or dtype).zero_grad()
    x = x.detach().to(DEVICE, dtype).requires_grad_()
    torch.manual_seed(seed)
    with use_backend(backend):
        y = layer(x)
        y.backward(gy.to(DEVICE, dtype))
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def relative_l2(value, expected):
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_as_accurate(kernel, same_dtype, exact):
    """`Errors` of a single draw."""
    errors = Errors()
    errors.add(kernel, same_dtype, exact)
    errors.check()


def kept_for_backward(layer, x):
    """Bytes of the storages that autograd saves in one forward pass, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.requires_grad_())
    return sum(kept.values())


def op_arguments(shape, kind, layout, dtype=torch.float32, *, bias=True, seed=0):
    """Inputs of the op, without a seed of dropout, and its options."""
    B, N, C, H, _ = shape
    layer = make_layer(shape, kind, layout, bias=bias, seed=seed).to(dtype)
    weights = dict(layer.named_parameters())

    def pair(name):
        return weights.get(f"{name}.weight"), weights.get(f"{name}.bias")

    projection = (layer.EF.t(), None) if kind == "sum" else pair("E")
    x = torch.randn(B, N, C, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    tensors = (x, *pair("qkvv"), *projection, *pair("F"), layer.temperature, layer.temperature2,
               *pair("out_proj"), *pair("out_proj2"))  # fmt: skip
    options = {"num_heads": H, "kind": kind, "layout": layout,
               "channel_dropout_p": 0.1, "spatial_dropout_p": 0.2}  # fmt: skip
    return [None if t is None else t.detach() for t in tensors], options


class Gpu:
    """The current CUDA device."""

    kind = "cuda"

    def capture(self, function):
        """(replay, result): a CUDA graph of a call, and the tensors that each replay writes."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result

    def allocated_bytes(self):
        return torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def no_synchronization(self):
        """Inside, a call that waits for the device raises."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def on_busy_stream(self, function):
        """Result of a call on another stream that is busy with something else for 20 ms first."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            busy_gpu(40_000_000)
            result = function()
        side.synchronize()
        return result


class Cpu:
    """Answers the calls of `Gpu` on a CPU, so that a dry run walks the same code."""

    kind = "cpu"

    def capture(self, function):
        result = function()

        def replay():
            again = function()
            with torch.no_grad():
                for old, new in zip(result or (), again or (), strict=True):
                    old.copy_(new)

        return replay, result

    def allocated_bytes(self):
        return None

    @contextlib.contextmanager
    def no_synchronization(self):
        yield

    def on_busy_stream(self, function):
        return function()
