"""The ops under torch.library, torch.compile, export and repeated differentiation."""

import numpy as np
import pytest
import torch
from cases import BACKENDS, FUSED_BACKENDS, INTERPRETED, KINDS, daily_if_interpreted
from torch.library import opcheck

import epa_kernels
from epa_kernels.testing import DEVICE, make_layer


def op_of(backend, name):
    return getattr(getattr(torch.ops, f"epa_kernels_{backend}"), name).default


def paired_arguments(shape, kind, dtype):
    B, N, C, H, _ = shape
    layer = make_layer(shape, kind).to(dtype)
    linear = {
        "E": (None, None),
        "F": (None, None),
        "out_proj": (None, None),
        "out_proj2": (None,) * 2,
    }
    for name in linear:
        if hasattr(layer, name):
            linear[name] = (getattr(layer, name).weight, getattr(layer, name).bias)
    tensors = (
        torch.randn(B, N, C, dtype=dtype, device=DEVICE),
        layer.qkvv.weight,
        layer.qkvv.bias,
        *((layer.EF.t(), None) if kind == "sum" else linear["E"]),
        *(linear["F"] if kind == "split" else (None, None)),
        layer.temperature,
        layer.temperature2,
        *linear["out_proj"],
        *linear["out_proj2"],
    )
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    options = {"num_heads": H, "kind": kind, "layout": "official",
               "channel_dropout_p": 0.1, "spatial_dropout_p": 0.2}  # fmt: skip
    return (*tensors, torch.tensor(5, device=DEVICE)), options


# What is kept has dtypes of its own beside float32; the traced gradients are compared in float64,
# because the two ways round differently.
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = {torch.float32: STATIC, torch.float64: (*STATIC, "test_aot_dispatch_dynamic")}


DIRECT, TWO_PASS = (2, 50, 32, 4, 8), (2, 130, 32, 4, 8)


@daily_if_interpreted(
    {"shape": (TWO_PASS,), "kind": ("shared",), "dtype": (torch.float64,)},
    {"shape": (TWO_PASS,), "kind": ("split",), "dtype": (torch.float32,)},
    {"shape": (DIRECT,), "kind": ("sum",), "dtype": (torch.float32,)},
)
@pytest.mark.parametrize("dtype", UTILS)
@pytest.mark.parametrize("shape", (DIRECT, TWO_PASS), ids=("direct", "two_pass"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck_paired_attention(backend, kind, shape, dtype):
    if backend in INTERPRETED:
        shape = (*shape[:3], 2, 8)  # half the heads
    arguments, options = paired_arguments(shape, kind, dtype)
    opcheck(op_of(backend, "paired_attention"), arguments, options, test_utils=UTILS[dtype])
    out = op_of(backend, "paired_attention")(*arguments, **options)
    *inputs, seed = (t if t is None else t.detach() for t in arguments)
    backward = (torch.randn_like(out[0]), *inputs, *(t.detach() for t in out[1:]), seed)
    opcheck(op_of(backend, "paired_attention_bwd"), backward, options, test_utils=UTILS[dtype])


@daily_if_interpreted({"dropout_p": (0.2,)})
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck_spatial_and_channel_attention(backend, dropout_p):
    q, k, v = torch.randn(3, 2, 65, 3, 8, device=DEVICE).unbind(0)
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    temperature = torch.ones(3, 1, 1, device=DEVICE, requires_grad=True)
    seed = torch.tensor(3, device=DEVICE) if dropout_p else None
    options = {"dropout_p": dropout_p}
    opcheck(op_of(backend, "channel_attention"), (q, k, v, temperature, seed), options)
    for normalize in (False, True):
        arguments = (q, k[:, :9].detach(), v[:, :9].detach(), temperature, seed)
        opcheck(op_of(backend, "spatial_attention"), arguments, options | {"normalize": normalize})


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    layer = make_layer((2, 130, 16, 2, 9)).float()
    x = torch.randn(2, 130, 16, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with epa_kernels.use_backend(backend):
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y.sum(), [x, layer.E.weight]) for y in (expected, found)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiles_with_inductor_and_dropout():
    layer = epa_kernels.EPA(130, 16, 9, 2, device=DEVICE)
    y = torch.compile(layer, fullgraph=True)(torch.randn(2, 130, 16, device=DEVICE))
    y.sum().backward()
    assert layer.E.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_one_graph_serves_every_number_of_tokens_and_samples(backend):
    """spatial_attention has no weight bound to N: a dynamic N must not recompile."""
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def call(q, k, v):
        temperature = torch.ones(1, device=DEVICE)
        return epa_kernels.spatial_attention(q, k, v, temperature, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for B, N in ((3, 100), (5, 57), (9, 301)):  # no size that equals another axis
        q, k, v = (torch.randn(B, tokens, 2, 4, device=DEVICE) for tokens in (N, 7, 7))
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    assert graphs == 1


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_paired_attention_compiles_with_dynamic_tokens(backend):
    """One graph for each plan, whatever N is."""
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph.forward

    C, H, P = 8, 2, 5

    def call(x, weight, projection, temperature):
        return epa_kernels.paired_attention(
            x, weight, None, projection, None, None, None, temperature, temperature, None, None,
            None, None, num_heads=H, kind="sum", backend=backend,
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    weight = torch.randn(4 * C, C, device=DEVICE)
    temperature = torch.ones(H, 1, 1, device=DEVICE)
    for N in (40, 300, 77, 9, 13):
        x, projection = torch.randn(2, N, C, device=DEVICE), torch.randn(P, N, device=DEVICE)
        inputs = (x, weight, projection, temperature)
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
    assert graphs <= 2


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_second_derivative_names_the_reference(backend):
    layer = epa_kernels.EPA(30, 8, 5, backend=backend, device=DEVICE)
    y = layer(torch.randn(1, 30, 8, device=DEVICE))
    gradient = torch.autograd.grad(y.sum(), layer.qkvv.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"'{backend}' has no second derivative; .*'reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("N", (30, 130), ids=("direct", "two_pass"))
def test_exports_as_plain_operators(N):
    layer = make_layer((2, N, 16, 2, 9)).float().eval()
    x = torch.randn(2, N, 16, device=DEVICE)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    assert not [node for node in program.graph.nodes if "epa_kernels" in str(node.target)]
    for B in (1, 4):
        x = torch.randn(B, N, 16, device=DEVICE)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    layer = make_layer((2, 130, 16, 2, 9)).cpu().float().eval()
    x, file = torch.randn(2, 130, 16), tmp_path / "epa.onnx"
    torch.onnx.export(layer, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_frozen_inputs_get_no_gradient(backend):
    layer = epa_kernels.EPA(30, 8, 5, backend=backend, device=DEVICE)
    layer.E.requires_grad_(False)
    x = torch.randn(1, 30, 8, device=DEVICE)
    layer(x).sum().backward()
    assert layer.E.weight.grad is None and x.grad is None
    assert layer.qkvv.weight.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_other_derivatives_name_the_reference_backend(backend):
    """A tangent that got lost would be a derivative of zero."""
    layer = make_layer((1, 20, 8, 2, 4))
    x = torch.randn(1, 20, 8, dtype=torch.float64, device=DEVICE)

    def dual(t):
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    for derivative in (
        dual,
        lambda t: torch.func.jvp(layer, (t,), (torch.ones_like(t),))[1],
        torch.func.grad(lambda t: layer(t).square().sum()),
    ):
        with epa_kernels.use_backend("reference"):
            assert derivative(x).abs().sum() > 0
        with epa_kernels.use_backend(backend):
            with pytest.raises(RuntimeError, match="neither forward-mode.*'reference'"):
                derivative(x)
