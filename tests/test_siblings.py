"""SegFormer3D, Slim UNETR and the published parts of Slim UNETR++: parity with stored numbers."""

import golden
import pytest
import torch

from epa_kernels import EfficientPairedAttention, use_backend
from epa_kernels.testing import relative_l2
from unetrpp.models import (
    SegFormer3D,
    SlimUNETR,
    create_model,
    segformer3d,
    slim_unetr,
    slim_unetrpp,
)
from unetrpp.models.layers import TransformerBlock, upsample_linear

WHOLE = {
    "segformer3d": (
        "brats_128",
        "brats_128_headdim",
        "cube_96",
        "cube_32_b2",
        "cube_32_b2_headdim",
        "cube_64_c1_k14",
    ),
    "slim_unetr": ("brats_128", "hepatic_96", "cube_64_b2", "aniso_64_64_32"),
}
LAYERS = {
    "segformer3d": (
        *(f"sra_stage{n}_{scale}" for n in (1, 2, 3, 4) for scale in ("num_heads", "head_dim")),
        "block_stage2",
        "mixffn_c32",
        "patch_embed_1",
    ),
    "slim_unetr": (
        *(f"{kind}_stage{n}" for n in (1, 2, 3, 4) for kind in ("gst", "block")),
        "lrd_stage2",
    ),
    "slim_unetrpp_pieces": (
        "mednext_c24_k7",
        "mednext_c60_k7",
        *(f"{kind}_{size}" for size in ("c24_p64", "c48_p64", "c60_p64", "c96_p32")
          for kind in ("sca", "epa")),
        "epa_transformer_c48_p64",
    ),
}  # fmt: skip


def case_of(folder, name, kind):
    return next(c for c in golden.load(f"{folder}/cases.json")[kind] if c["case"] == name)


def build_model(folder, case):
    config, size = case["config"], case["input"]["shape"][2:]
    if folder == "slim_unetr":
        return SlimUNETR(config["in_channels"], config["out_channels"], size)
    return SegFormer3D(
        config["in_channels"], config["num_classes"], size, attention_scale=case["attn_scale"]
    )


def build_layer(case):
    """Return what to call on the case's input, and the layer whose parameters it has."""
    config, name = case["config"], case["case"].split("_")[0]
    channels, heads = (
        next((config[key] for key in keys if key in config), None)
        for keys in (
            ("embed_dim", "in_feature", "channels", "hidden_size"),
            ("num_heads", "heads"),
        )
    )
    step = (config.get("r", config.get("sr_ratio", 1)),) * 3
    size = (config.get("input_size"), channels, config.get("proj_size"), heads)
    if name == "sra":
        layer = segformer3d.SelfAttention(channels, heads, step, case["attn_scale"])
    elif name == "block" and "sr_ratio" in config:
        layer = segformer3d.TransformerBlock(channels, heads, step, 4, case["attn_scale"])
    elif name == "mixffn":
        layer = segformer3d.MixFFN(channels, config["mlp_ratio"])
    elif name == "patch":
        layer = segformer3d.PatchEmbedding(config["in_channel"], channels, (config["stride"],) * 3)
        return lambda x: layer(x)[0], layer
    elif name == "gst":
        layer = slim_unetr.GlobalSparseTransformer(channels, heads, step)
    elif name == "block":
        layer = slim_unetr.Block(channels, heads, step)
    elif name == "lrd":
        layer = slim_unetr.LocalReverseDiffusion(channels, step)
    elif name == "mednext":
        layer = slim_unetrpp.MedNeXtBlock(channels, kernel_size=config["kernel_size"])
    elif name == "sca":
        layer = slim_unetrpp.SCA(tuple(config["grid"]), *size[1:])
    elif case["case"].startswith("epa_transformer"):
        layer = TransformerBlock((8, 8, 8), *size[1:], epa_kind="sum")
    else:
        layer = EfficientPairedAttention(*size, kind="sum")
    if name in ("sra", "block", "mixffn") and len(case["input"]["shape"]) == 3:
        return lambda x: layer(x, tuple(config["grid"])), layer
    return layer, layer


def run(call, layer, case, dtype, *, gradients):
    """Return {"y"} of the case and, with gradients, {"grad_x", "grad.<key>": ...} as well."""
    layer.to(dtype).eval()
    x = golden.drawn(case["input"]["pcg64_seed"], case["input"]["shape"]).to(dtype)
    x.requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        y = call(x)
    found = {"y": y.detach()}
    if gradients:
        y.backward(golden.drawn(case["grad"]["g_seed"], y.shape).to(dtype))
        found["grad_x"] = x.grad
        found |= {f"grad.{key}": p.grad for key, p in layer.named_parameters()}
    return found


# Gradients of one or two numbers, sums of thousands of terms that cancel: in float32 the
# reference itself is up to 2e-5 off, by the processor; E k alone, 512 terms rounded to float32
# one by one, costs 7e-6 of it. In float64 they are held like all.
CANCELLING = {("epa_c24_p64", "temperature"), ("epa_c48_p64", "temperature2")}


def check(found, case, arrays, limit):
    """Compare with everything that is stored: arrays, and statistics of each gradient."""
    stride = case["stored"]["subsample_stride"]
    for key, expected in arrays.items():
        value = found["y" if key == "logits" else key]
        if value.ndim == 5:
            value = value[:, :, ::stride, ::stride, ::stride]
        assert relative_l2(value, expected) < limit, key
    if not any(key.startswith("grad") for key in found):
        return
    stored = case["grad"]
    idle = {key for key, value in found.items() if key.startswith("grad.") and value is None}
    assert idle == {f"grad.{key}" for key in stored["params_without_grad"]}
    assert found["grad_x"].double().square().sum().item() == pytest.approx(
        stored["grad_x"]["sumsq"], rel=2 * limit
    )
    largest = max(expected["l2"] for expected in stored["param_grads"].values())
    for key, expected in stored["param_grads"].items():
        gradient = found[f"grad.{key}"]
        is_cancelling = (case["case"], key) in CANCELLING and gradient.dtype == torch.float32
        allowed, gradient = 5e-5 if is_cancelling else limit, gradient.double()
        if expected["l2"] < 1e-9 * largest:
            # Zero except for rounding: a bias in front of a norm, attention to a single key.
            assert gradient.norm().item() <= limit * largest, key
            continue
        assert gradient.norm().item() == pytest.approx(expected["l2"], rel=allowed), key
        # A sum can cancel, so it is measured against what its terms could add up to.
        scale = expected["l2"] * gradient.numel() ** 0.5
        assert abs(gradient.sum().item() - expected["sum"]) < allowed * scale, key


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in WHOLE for name in WHOLE[folder]]
)
def test_model_matches_golden(folder, name):
    case = case_of(folder, name, "whole_model")
    arrays = golden.load(f"{folder}/{case['stored']['file']}")
    model = build_model(folder, case)
    published = golden.load(f"{folder}/{case['state_dict_file']}")
    entries = golden.entries_of(model)
    assert entries == [{k: e[k] for k in ("key", "shape", "dtype")} for e in published["entries"]]
    assert sum(p.numel() for p in model.parameters()) == published["n_params"]
    model.load_state_dict(golden.fill_sibling(entries, folder))
    logits = run(model, model, case, torch.float32, gradients=False)
    check(logits, case, {"logits": arrays["logits"]}, 1e-5)
    values, stats = logits["y"].double(), case["output"]
    assert list(values.shape) == stats["shape"]
    assert values.std(correction=0).item() == pytest.approx(stats["std"], rel=1e-5)
    assert values.abs().max().item() == pytest.approx(stats["absmax"], rel=1e-5)
    assert abs(values.mean().item() - stats["mean"]) < 1e-5 * stats["std"]
    if "grad" in case:
        check(run(model, model, case, torch.float64, gradients=True), case, arrays, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "two_pass", "cpu"])
@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in LAYERS for name in LAYERS[folder]]
)
def test_layer_matches_golden(folder, name, backend):
    case = case_of(folder, name, "layers")
    arrays = golden.load(f"{folder}/{case['stored']['file']}")
    call, layer = build_layer(case)
    entries = golden.entries_of(layer)
    stored = [{k: entry[k] for k in ("key", "shape", "dtype")} for entry in case["state_dict"]]
    assert entries == stored
    rules = f"{folder}/{name[:3]}" if name[:3] in ("gst", "lrd") else folder
    layer.load_state_dict(golden.fill_sibling(entries, rules, salt=case["weight_salt"]))
    with use_backend(backend):
        for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
            layer.zero_grad()
            check(run(call, layer, case, dtype, gradients=True), case, arrays, limit)


def test_upsampling_by_products_is_trilinear():
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x, size=(8, 5, 18), mode="trilinear")
    torch.testing.assert_close(upsample_linear(x, (8, 5, 18)), expected)
    assert upsample_linear(x, (4, 5, 6)) is x


@pytest.mark.parametrize(("size", "products"), [((8, 10, 12), 3), ((4, 10, 6), 1)])
def test_upsampling_stays_on_the_device_of_its_input(size, products):
    """A copy from the CPU would block a CUDA graph; axes that do not grow cost nothing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    devices, operators = set(), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            devices.add(result.device.type)
            operators.append(operator.overloadpacket)
            return result

    x = torch.empty(2, 3, 4, 5, 6, device="meta")
    with Recorder():
        assert upsample_linear(x, size).shape == (2, 3, *size)
    assert devices == {"meta"}
    assert sum(op in (torch.ops.aten.mm, torch.ops.aten.bmm) for op in operators) == products


@pytest.mark.parametrize(
    ("arguments", "millions", "multiply_adds"),
    [
        ({}, 3.408, 4.06),
        ({"sca_stages": (1, 2, 3)}, 5.51, 4.45),
        ({"sca_stages": (1, 2, 3), "proj_size": 32}, 4.31, 4.32),
        ({"sca_stages": (3,)}, 3.13, 3.92),
        ({"proj_size": 32}, 3.26, 4.03),
    ],
)
def test_reconstruction_has_the_described_size(arguments, millions, multiply_adds):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = create_model("slim_unetrpp", "brats", **arguments).eval()
        x = torch.empty(1, 4, 128, 128, 128)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.005)
    with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, abs=0.005)


def test_segformer3d_derives_kernels_and_reductions_from_the_strides():
    model = create_model(
        "segformer3d", "tiny", strides=((1, 2, 4), (1, 2, 2), (2, 2, 1), (2, 2, 2))
    )
    encoder = model.segformer_encoder
    kernels = [
        tuple(getattr(encoder, f"embed_{stage}").patch_embeddings.weight.shape[2:])
        for stage in (1, 2, 3, 4)
    ]
    # The published 7 for a stride of 4 and 3 for 2; patches overlap where the stride is 1, too.
    assert kernels == [(3, 3, 7), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    # Keys of the first two stages lie on the grid of the third.
    assert encoder.tf_block1[0].attention.sr.kernel_size == (2, 4, 2)
    assert encoder.tf_block2[0].attention.sr.kernel_size == (2, 2, 1)
    assert not hasattr(encoder.tf_block3[0].attention, "sr")
    assert model(torch.randn(2, 1, 32, 32, 32)).shape == (2, 2, 32, 32, 32)


def test_segformer3d_is_initialised_as_published():
    torch.manual_seed(0)
    model = create_model("segformer3d", "brats")
    block = model.segformer_encoder.tf_block1[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # Fan-out of a convolution: voxels of the kernel times channels that a channel feeds.
    for weight, fan_out in (
        (model.segformer_encoder.embed_2.patch_embeddings.weight, 27 * 64),
        (block.mlp.dwconv.dwconv.weight, 27),
        (model.segformer_decoder.linear_fuse[0].weight, 256),
    ):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any(), key


@pytest.mark.parametrize("name", ["slim_unetr", "slim_unetrpp"])
def test_tokens_are_dropped_in_training_only(name):
    torch.manual_seed(0)
    rest = {"attention_dropout": 0.0} if name == "slim_unetrpp" else {}
    model = create_model(name, "tiny", dropout=0.5, **rest)
    x = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_sca_is_resized_as_epa_is():
    block = TransformerBlock((4, 6, 8), 8, 5, 2, epa_kind="sum")
    sca = slim_unetrpp.SCA((4, 6, 8), 8, 5, 2)
    with torch.no_grad():
        block.epa_block.temperature2.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1))
        sca.sa.temperature2.copy_(block.epa_block.temperature2)
        sca.sa.EF.copy_(block.epa_block.EF)
    for module in (block, sca.sa):
        module.resize_tokens((8, 3, 16))
    assert torch.equal(sca.sa.EF, block.epa_block.EF)
    assert torch.equal(sca.sa.temperature2, block.epa_block.temperature2)
    assert sca(torch.randn(1, 8, 8, 3, 16)).shape == (1, 8, 8, 3, 16)


@pytest.mark.parametrize("branch", ["sa", "sc"])
def test_sca_drops_attention_in_training_only(branch):
    torch.manual_seed(0)
    layer = getattr(slim_unetrpp.SCA((4, 4, 4), 8, 5, 2, dropout=0.5), branch)
    x = torch.randn(1, 64, 8)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_reconstruction_adds_its_attention_to_what_was_there():
    """SCA is residual on its skips, EPA in front of the decoder: both silent, nothing is left."""
    torch.manual_seed(0)
    model = create_model("slim_unetrpp", "tiny").double().eval()
    model.load_state_dict(golden.fill_sibling(golden.entries_of(model), "slim_unetrpp_pieces"))
    bare = create_model("slim_unetrpp", "tiny", sca_stages=(), has_epa=False).double().eval()
    weights = model.state_dict()
    bare.load_state_dict({key: weights[key] for key in bare.state_dict()})
    x = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64)
    silence = {
        "SCA.2": [part.qkvv.weight for part in (model.SCA["2"].sa, model.SCA["2"].sc)],
        "SCA.3": [part.qkvv.weight for part in (model.SCA["3"].sa, model.SCA["3"].sc)],
        "EPA": [model.EPA.gamma, *model.EPA.conv8.parameters()],
    }
    with torch.no_grad():
        expected = bare(x)
        for part, parameters in silence.items():
            assert relative_l2(model(x), expected) > 1e-4, f"{part} does nothing"
            for parameter in parameters:
                parameter.zero_()
        assert relative_l2(model(x), expected) < 1e-12


def test_reconstruction_can_leave_its_parts_out():
    model = create_model("slim_unetrpp", "tiny", sca_stages=(), has_epa=False, kernel_size=5)
    keys = model.state_dict().keys()
    assert not any("SCA" in key or "EPA" in key for key in keys)
    assert model.Encoder.block1[0].MedNeXt.conv1.weight.shape[2:] == (5, 5, 5)
    assert model(torch.randn(2, 1, 32, 32, 32)).shape == (2, 2, 32, 32, 32)
    for arguments, message in (
        ({"sca_stages": (4,)}, "sca_stages must be among 1, 2, 3"),
        ({"kernel_size": 4}, "kernel_size must be odd and at least 1; got 4"),
        ({"kernel_size": -3}, "kernel_size must be an integer, at least 1; got -3"),
    ):
        with pytest.raises(ValueError, match=f"SlimUNETRPP: {message}"):
            create_model("slim_unetrpp", "tiny", **arguments)
