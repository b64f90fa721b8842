"""The contract, and that everything which repeats a part of it in another form agrees with it."""

import inspect

import pytest
import torch
from cases import DEVICE

import epa_kernels
from epa_kernels import dispatch, functional, reference
from epa_kernels.backends import cpu
from epa_kernels.contract import KINDS, OPS, call_on
from epa_kernels.testing import op_arguments

SCHEMAS = {
    "paired_attention": (
        "paired_attention(Tensor x, Tensor qkvv_weight, Tensor? qkvv_bias, Tensor proj_k_weight, "
        "Tensor? proj_k_bias, Tensor? proj_v_weight, Tensor? proj_v_bias, Tensor temperature, "
        "Tensor temperature2, Tensor? out_proj_weight, Tensor? out_proj_bias, "
        "Tensor? out_proj2_weight, Tensor? out_proj2_bias, Tensor? seed, *, int num_heads, "
        "str kind, str layout, float channel_dropout_p, float spatial_dropout_p)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "spatial_attention": (
        "spatial_attention(Tensor q, Tensor k_proj, Tensor v_proj, Tensor temperature, "
        "Tensor? seed, *, bool normalize, float dropout_p) -> (Tensor, Tensor)"
    ),
    "channel_attention": (
        "channel_attention(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor? seed, *, "
        "float dropout_p) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_schema(name):
    forward, backward = OPS[name].schema()
    assert forward == SCHEMAS[name]
    inputs = forward.partition("(")[2].partition(", Tensor? seed")[0]
    kept = ", ".join(f"Tensor {kept}" for kept in OPS[name].kept)
    assert backward.startswith(f"{name}_bwd(Tensor dout, {inputs}, {kept}, Tensor? seed, *, ")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("module", (reference, functional), ids=("reference", "functional"))
def test_functions_take_inputs_and_options_in_this_order(module, name):
    op = OPS[name]
    parameters = inspect.signature(getattr(module, name)).parameters
    names = [*op.inputs, *op.Options._fields, "seed"]
    assert list(parameters)[: len(names)] == names
    defaults = {n: parameters[n].default for n in op.Options._field_defaults}
    assert defaults == op.Options._field_defaults


@pytest.mark.skipif(cpu.module is None, reason=str(cpu.missing))
def test_the_compiled_module_takes_tensors_in_this_order():
    for name, names in cpu.module.inputs.items():
        assert names == (OPS[name].view_names, OPS[name].address_names)
    assert "paired_attention" in cpu.module.inputs


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_call_allocates(kind):
    J = 2 if kind == "split" else 1
    op = OPS["paired_attention"]
    for N, kept_shapes in ((70, ((2, 16), (2, 16, 16), (2, J, 5, 16))), (31, ((0,),) * 3)):
        tensors, options = op_arguments((2, N, 16, 4, 5), kind, "official", torch.bfloat16)
        result, kept = op.allocate(op.Inputs(*tensors), op.Options(**options))
        assert (result.shape, result.dtype) == ((2, N, 16), torch.bfloat16)
        assert tuple(t.shape for t in kept) == kept_shapes
        if N == 70:
            assert (kept.mean.dtype, kept.gram.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_of_a_wrong_shape_is_named(kind):
    op = OPS["paired_attention"]
    tensors, options = op_arguments((1, 20, 8, 2, 5), kind, "official")
    for i, (name, t) in enumerate(zip(op.inputs, tensors, strict=True)):
        changed = [*tensors]
        if t is None:
            continue
        changed[i] = None
        if not op.inputs[name].optional:
            with pytest.raises(ValueError, match=f"{name}(, got| must be a tensor, got) None"):
                epa_kernels.paired_attention(*changed, **options)
        changed[i] = t.new_zeros((*t.shape[:-1], t.shape[-1] + 1))
        with pytest.raises(ValueError, match=r"paired_attention: \w+ must have shape|num_heads"):
            epa_kernels.paired_attention(*changed, **options)
        changed[i] = t.double()
        with pytest.raises(ValueError, match="is torch.float"):
            epa_kernels.paired_attention(*changed, **options)
        if name != "x":
            changed[i] = t.new_zeros((*t.shape, 2))
            with pytest.raises(ValueError, match=f"paired_attention: {name} must have shape"):
                epa_kernels.paired_attention(*changed, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter runs on CPU tensors")
def test_a_size_beyond_a_backend_falls_to_the_next(monkeypatch, capsys):
    """P is no size of the first tensor: the whole call has to be asked about."""
    pytest.importorskip("triton", "3.6", reason="needs the package triton, 3.6 or later")
    layer, x = epa_kernels.EPA(700, 8, 600, 2).eval(), torch.randn(1, 700, 8)
    reason = "number of projected tokens 600 > 512"
    with epa_kernels.use_backend("triton"):
        epa_kernels.explain(layer, x)
        assert f"triton     cannot run: {reason}" in capsys.readouterr().out
        with pytest.raises(RuntimeError, match=f"forced but cannot run: {reason}"):
            layer(x)
    chosen = dispatch.BACKENDS["triton"]._replace(trusted=True)
    monkeypatch.setitem(dispatch.BACKENDS, "triton", chosen)
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("triton", "two_pass", "reference"))
    epa_kernels.explain(layer, x)
    assert "two_pass   runs\n" in capsys.readouterr().out
    with epa_kernels.use_backend("two_pass"):
        expected = layer(x)
    assert torch.equal(layer(x), expected)


def test_explain_takes_a_layer_a_whole_call_or_the_first_tensor(capsys):
    layer, x = epa_kernels.EPA(64, 32, 16), torch.randn(2, 64, 32)
    inputs, options = layer.arguments(x)
    epa_kernels.explain(layer, x)
    epa_kernels.explain("paired_attention", *inputs, **options._asdict())
    first, second = capsys.readouterr().out.split("paired_attention on ")[1:]
    assert first == second and "B = 2, N = 64, C = 32, H = 4, D = 8, P = 16" in first
    epa_kernels.explain("paired_attention", x)
    assert "B = 2, N = 64, C = 32\n" in capsys.readouterr().out
    epa_kernels.explain(epa_kernels.EPA(64, 32, 16, backend="two_pass"), x)
    assert "two_pass   runs (forced)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("paired_attention",), "needs its first tensor or all 13, got 0 inputs"),
        (
            ("spatial_attention", torch.ones(1, 2, 3, 4), None),
            "first tensor or all 4, got 2 inputs",
        ),
        (("channel_attention", None), "needs its first tensor"),
        (("attention", torch.ones(1, 2, 3)), "op must be one of paired_attention, "),
        ((["paired_attention"], torch.ones(1, 2, 3)), "op must be one of"),
        ((torch.nn.Linear(2, 2), torch.ones(1, 2)), "must be an EPA layer, got Linear"),
        ((epa_kernels.EPA(8, 4, 2),), r"needs its x of shape \(B, N, C\), got 0 inputs"),
        ((epa_kernels.EPA(8, 4, 2), torch.ones(1, 4, 2, 2, 2)), "needs its x of shape"),
    ),
)
def test_explain_refuses_what_it_cannot_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        epa_kernels.explain(*arguments)


def test_explain_of_all_tensors_needs_the_number_of_heads():
    inputs, _ = epa_kernels.EPA(64, 32, 16).arguments(torch.randn(2, 64, 32))
    with pytest.raises(ValueError, match="explain: paired_attention needs num_heads"):
        epa_kernels.explain("paired_attention", *inputs)


def test_a_temperature_must_be_given():
    q = torch.randn(1, 6, 2, 4)
    with pytest.raises(
        ValueError, match="channel_attention: temperature must be a tensor, got None"
    ):
        epa_kernels.channel_attention(q, q, q, None)
    with pytest.raises(ValueError, match="spatial_attention: k_proj must be a tensor, got None"):
        epa_kernels.spatial_attention(q, None, q, torch.ones(1))


def test_limits_name_the_axis():
    call = call_on("channel_attention", torch.empty(1, 5, 3, 8))
    assert call.beyond({"H": 2, "D": 8, "P": 1}) == ["number of heads 3 > 2"]
