"""UNETR++: parity with the published networks, sizes, resizing, compile and export."""

import copy
import math

import golden
import numpy as np
import pytest
import torch
from torch.nn import functional

from epa_kernels import EfficientPairedAttention, use_backend
from epa_kernels.contract import KINDS
from epa_kernels.testing import relative_l2
from unetrpp.models import UNETRPP, create_model
from unetrpp.models.layers import TransformerBlock, resample_grid, resampling_matrix

VARIANTS = ("synapse", "acdc", "lung", "tumor")
# Daily, every kind of attention: lung's is acdc's, at the largest of the four sizes.
DAILY_VARIANTS = tuple(
    pytest.param(name, marks=pytest.mark.exhaustive) if name == "lung" else name
    for name in VARIANTS
)
BACKENDS = ("reference", "two_pass")
BLOCKS = (
    "block_shared_b2_c32_s4x4x6_p64",
    "block_split_b2_c32_s2x5x5_p32",
    "block_sum_b2_c32_s4x4x4_p32",
)

# A network of a few milliseconds, anisotropic, for what does not depend on size.
SMALL = {
    "in_channels": 1,
    "out_channels": 3,
    "img_size": (8, 16, 32),
    "strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 2)),
    "feature_size": 4,
    "dims": (4, 8, 12, 16),
    "depths": (1, 1, 1, 1),
    "decoder_depths": (1, 1, 1),
    "num_heads": 2,
    "proj_sizes": (6, 6, 6, 4),
    "decoder_proj_sizes": (6, 6, 6),
}


def small_model(seed=0, **overrides):
    """Return a small network in evaluation mode whose attention and embeddings matter."""
    torch.manual_seed(seed)
    model = UNETRPP(**{**SMALL, **overrides})
    fill_with_golden_rule(model)
    return model.eval()


def fill_with_golden_rule(module):
    kinds = {part.kind for part in module.modules() if isinstance(part, EfficientPairedAttention)}
    entries = golden.entries_of(module)
    module.load_state_dict(golden.fill(entries, shared_ef=kinds == {"shared"}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_the_published_one(variant):
    with torch.device("meta"):
        model = UNETRPP.from_preset(variant)
    assert golden.entries_of(model) == golden.load(f"{variant}.state_dict.json")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == golden.load("variants.json")[variant]["params"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_preset_has_the_published_sizes(variant):
    published = golden.load("variants.json")[variant]
    with torch.device("meta"):
        model = UNETRPP.from_preset(variant)
    blocks = [stage[0] for stage in model.unetr_pp_encoder.stages]
    assert [block.pos_embed.shape[1] for block in blocks] == published["tokens_encoder"]
    dropouts = {block.epa_block.attn_drop.p for block in blocks}
    dropouts |= {block.epa_block.attn_drop_2.p for block in blocks}
    assert dropouts == {published["attn_dropout"]}
    assert {block.conv8[0].p for block in blocks} == {published["conv8_dropout3d"]}
    assert model.img_size == tuple(published["input"])


def test_btcv_is_synapse():
    with torch.device("meta"):
        btcv, synapse = UNETRPP.from_preset("btcv"), UNETRPP.from_preset("synapse")
    assert btcv.config == synapse.config


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", DAILY_VARIANTS)
def test_model_matches_golden(variant, backend):
    outputs, metadata = golden.load(f"model_{variant}.safetensors")
    model = UNETRPP.from_preset(variant, deep_supervision=True).eval()
    fill_with_golden_rule(model)
    x = golden.drawn(metadata["seed"], metadata["input_shape"])
    with torch.no_grad(), use_backend(backend):
        logits = model(x)
    for index, (output, stats) in enumerate(zip(logits, metadata["stats"], strict=True)):
        assert list(output.shape) == stats["shape"]
        a, b, c = stats["stride"]
        assert relative_l2(output[:, :, ::a, ::b, ::c], outputs[f"out{index}"]) < 2e-5
        output = output.double()
        assert output.norm().item() == pytest.approx(stats["l2"], rel=2e-5)
        assert output.std().item() == pytest.approx(stats["std"], rel=2e-5)
        assert output.abs().max().item() == pytest.approx(stats["absmax"], rel=2e-5)
        # Means can cancel, so they are measured against the spread.
        per_class = output.mean((0, 2, 3, 4))
        expected = torch.tensor(stats["per_class_mean"], dtype=torch.float64)
        assert (per_class - expected).abs().max().item() < 2e-5 * stats["std"]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_matches_golden(name, backend, mode):
    tensors, metadata = golden.load(f"{name}.safetensors")
    kind = metadata["kind"]

    def run(dtype):
        block = TransformerBlock(
            tuple(metadata["spatial"]),
            metadata["C"],
            metadata["P"],
            metadata["heads"],
            epa_kind=kind,
            epa_backend=backend,
            res_blocks=2 if kind == "split" else 1,
            attention_dropout=0.0,
            conv_dropout=0.0,
        )
        fill_with_golden_rule(block)
        block.to(dtype).train(mode == "train")
        x = tensors["x"].to(dtype).requires_grad_()
        y = block(x)
        y.backward(tensors["gy"].to(dtype))
        found = {f"{mode}.y": y, f"{mode}.gx": x.grad}
        found |= {f"{mode}.grad.{key}": p.grad for key, p in block.named_parameters()}
        if mode == "train":
            found |= {
                f"train.after.{key}": value
                for key, value in block.named_buffers()
                if not key.endswith("num_batches_tracked")
            }
        return {key: value.detach() for key, value in found.items()}

    in_float64, in_float32 = run(torch.float64), run(torch.float32)
    assert set(in_float64) == {key for key in tensors if key.startswith(f"{mode}.")}
    published = metadata["fp32_vs_fp64"]
    for key, value in in_float64.items():
        assert relative_l2(value, tensors[key]) < 1e-6, key
        # Against our own float64 result, because the stored one is rounded to float32. The
        # gradient of a temperature is H numbers, each a sum of thousands of terms that cancel:
        # one draw of its rounding error says little, so the largest of the file's four counts.
        alike = [k for k in published if "temperature" in k] if "temperature" in key else [key]
        # Running statistics have no published error: rounding to float32 is what they may show.
        limit = 1e-6 if ".after." in key else 2 * max(published[k][1] for k in alike)
        assert relative_l2(in_float32[key], value) <= limit, key


def soft_dice_and_cross_entropy(logits, target, classes):
    """The published loss of one output; see train_synapse.json."""
    probability = logits.softmax(1)
    truth = functional.one_hot(target, classes).movedim(-1, 1).to(logits.dtype)
    axes = (0, 2, 3, 4)
    tp = (probability * truth).sum(axes)
    fp = (probability * (1 - truth)).sum(axes)
    fn = ((1 - probability) * truth).sum(axes)
    dice = (2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5 + 1e-8)
    return functional.cross_entropy(logits, target) - dice[1:].mean()


# Two minutes: daily, the gradients of a block are compared with the published ones.
@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "losses_compared"),
    # Steps two and three of the reference follow from its first gradient, which is compared.
    [("two_pass", 3), ("reference", 1)],
)
def test_training_matches_golden_in_float64(backend, losses_compared):
    published = golden.load("train_synapse.json")
    setting, expected = published["config"], published["float64"]
    model = UNETRPP.from_preset(
        "synapse", deep_supervision=True, attention_dropout=0.0, conv_dropout=0.0
    )
    fill_with_golden_rule(model)
    model.double().train()
    x = golden.drawn(setting["xseed"], (setting["B"], 1, 64, 128, 128)).double()
    generator = np.random.Generator(np.random.PCG64(setting["tseed"]))
    low = torch.from_numpy(generator.integers(0, 14, (setting["B"], 8, 16, 16), dtype=np.int64))
    full = low.repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    targets = [full, full[:, ::2, ::4, ::4], full[:, ::4, ::8, ::8]]

    def losses():
        outputs = zip(model(x), targets, strict=True)
        return [soft_dice_and_cross_entropy(logits, target, 14) for logits, target in outputs]

    for step in range(losses_compared):
        # The last loss needs no gradient: it tells whether the steps before were right.
        with torch.set_grad_enabled(step in (0, losses_compared - 2)), use_backend(backend):
            per_output = losses()
            loss = sum(
                weight * part
                for weight, part in zip(published["ds_weights"], per_output, strict=True)
            )
        assert loss.item() == pytest.approx(expected["losses"][step], rel=1e-10)
        assert [p.item() for p in per_output] == pytest.approx(
            expected["loss_per_output"][step], rel=1e-10
        )
        if loss.requires_grad:
            model.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            assert norm.item() == pytest.approx(expected["grad_norms"][step], rel=1e-9)
            torch.optim.SGD(model.parameters(), lr=setting["lr"]).step()
        if step == 0:
            gradients = {key: p.grad for key, p in model.named_parameters()}
            assert set(gradients) == set(published["first_step_grad"])
            for key, gradient in gradients.items():
                norm = published["first_step_grad"][key]["l2"]
                assert gradient.norm().item() == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"epa_kind": "split", "res_blocks": 2},
        {"epa_kind": "sum", "epa_layout": "tokens"},
        {"in_channels": 3, "img_size": (16, 16, 16), "strides": (1, 2, 2, (2, 1, 1))},
        {"img_size": (4, 8, 8), "strides": ((1, 2, 2), (1, 1, 1), (1, 2, 2), (2, 2, 2))},
        {"depths": (2, 1, 1, 2), "decoder_depths": (1, 2, 1)},
    ],
    ids=["anisotropic", "split", "sum", "stem-1", "few-slices", "depths"],
)
def test_any_geometry_trains(overrides):
    torch.manual_seed(0)
    model = UNETRPP(**{**SMALL, **overrides}, deep_supervision=True)
    x = torch.randn(2, model.in_channels, *model.img_size)
    outputs = model(x)
    for output, stride in zip(outputs, model.output_strides, strict=True):
        expected = tuple(n // s for n, s in zip(model.img_size, stride, strict=True))
        assert output.shape == (2, 3, *expected)
    sum(output.square().mean() for output in outputs).backward()
    idle = [
        key
        for key, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    assert idle == []


def test_deep_supervision_can_be_switched():
    model = small_model()
    x = torch.randn(1, 1, *SMALL["img_size"])
    with torch.no_grad():
        single = model(x)
        model.deep_supervision = True
        outputs = model(x)
    assert isinstance(outputs, list)
    assert torch.equal(outputs[0], single)
    assert model.config["args"]["deep_supervision"] is True


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: create_model("unet"),
            "create_model: name must be one of unetrpp, s.*; got 'unet'",
        ),
        (lambda: UNETRPP.from_preset("brain"), "synapse, btcv, acdc, lung, tumor, tiny; got 'br"),
        (lambda: UNETRPP(**{**SMALL, "dims": (4, 8)}), "dims must have 4 entries, got 2"),
        (lambda: UNETRPP(**{**SMALL, "decoder_depths": (1,)}), "decoder_depths must have 3"),
        (lambda: UNETRPP(**{**SMALL, "res_blocks": 3}), "res_blocks must be 1 or 2, got 3"),
        (lambda: UNETRPP(**{**SMALL, "img_size": (8, 16)}), "img_size must be one integer or"),
        (lambda: UNETRPP(**{**SMALL, "strides": (1, 2, 0, 2)}), "strides must be one integer or"),
    ],
)
def test_wrong_argument_names_the_rule(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = UNETRPP.from_preset("tiny")
    encoder = model.unetr_pp_encoder.stages[0][0]
    decoder = model.decoder3.decoder_block[0][0]
    assert encoder.epa_block.E.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not encoder.epa_block.E.bias.any()
    # torch's default for a linear layer of N inputs is uniform with deviation 1 / sqrt(3 N).
    tokens = decoder.pos_embed.shape[1]
    assert decoder.epa_block.E.weight.std().item() == pytest.approx(
        1 / math.sqrt(3 * tokens), rel=0.01
    )
    assert decoder.epa_block.E.bias.any()
    for block in (encoder, decoder):
        assert (block.gamma == 1e-6).all()
        assert not block.pos_embed.any()
    assert encoder.epa_block.F is encoder.epa_block.E


def test_block_keeps_nine_volumes_for_backward():
    block = TransformerBlock((16, 16, 16), 32, 64, 4, epa_backend="two_pass")
    x = torch.randn(1, 32, 16, 16, 16, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x)
    assert output.requires_grad
    # Inputs of LayerNorm, attention, gamma, conv51 with its two norms and activations, and conv8.
    assert sum(kept.values()) < 9.1 * x.untyped_storage().nbytes()


@pytest.mark.parametrize(("target", "source"), [(8, 4), (12, 8), (7, 5), (4, 8), (5, 12), (6, 6)])
def test_resampling_is_linear_and_skips_nothing(target, source):
    matrix = resampling_matrix(target, source)
    assert matrix.shape == (target, source)
    torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64))
    assert (matrix.sum(0) > 0).all()

    def centres(n):
        return (torch.arange(n, dtype=torch.float64) + 0.5) / n

    # Beyond the outermost source centres the line is continued flat.
    inside = (centres(target) - 0.5).abs() < 0.5 - 1 / source - 0.5 / target
    found = matrix @ centres(source)
    torch.testing.assert_close(found[inside], centres(target)[inside])


def test_growing_is_trilinear_and_shrinking_by_two_is_pooling():
    x = torch.randn(2, 5, 4, 6, 8, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)

    def resampled(grid):
        out = resample_grid(tokens, 1, (4, 6, 8), grid)
        return out.transpose(1, 2).unflatten(2, grid)

    expected = functional.interpolate(x, size=(7, 12, 8), mode="trilinear", align_corners=False)
    torch.testing.assert_close(resampled((7, 12, 8)), expected)
    torch.testing.assert_close(resampled((2, 3, 4)), functional.avg_pool3d(x, 2))


def cosine_field(coefficients, grid):
    """Return (..., *grid): the sum of the 8 lowest cosine modes with coefficients (..., 8)."""
    axes = []
    for n in grid:
        centres = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        axes.append(torch.stack([torch.ones_like(centres), torch.cos(math.pi * centres)]))
    modes = torch.einsum("ax,by,cz->abcxyz", *axes).reshape(8, *grid)
    return torch.tensordot(coefficients, modes, ([-1], [0]))


def token_projections(block):
    """Return every projection of a block as (P, N)."""
    epa = block.epa_block
    return [epa.EF.T] if epa.kind == "sum" else [epa.E.weight, epa.F.weight]


GRIDS = [(8, 12, 16), (10, 7, 8), (4, 3, 4), (16, 3, 5)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resized_projection_sees_the_resampled_tokens(kind, grid):
    old = (8, 6, 8)
    block = TransformerBlock(old, 8, 5, 2, epa_kind=kind)
    fill_with_golden_rule(block)
    block.double()
    resized = copy.deepcopy(block)
    resized.resize_tokens(grid)
    # The weights are white noise and so are the tokens: this holds for any.
    tokens = torch.randn(math.prod(grid), 3, dtype=torch.float64)
    for before, after in zip(token_projections(block), token_projections(resized), strict=True):
        assert after.shape == (5, math.prod(grid))
        torch.testing.assert_close(after @ tokens, before @ resample_grid(tokens, 0, grid, old))
        torch.testing.assert_close(after.sum(1), before.sum(1))
    # And the resampled tokens are those that a smooth field has on the old grid.
    field = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there, here = (cosine_field(field, g).flatten(1).T for g in (grid, old))
    assert relative_l2(resample_grid(there, 0, grid, old), here) < 0.1


def scale_free_model(kind):
    """Return a trained-like network that acts alike at every resolution, except for its attention.

    Projections and embeddings are smooth. Convolutions see voxels, not positions, so they have
    their centre alone and no stride; what is left is what resize_tokens must carry.
    """
    generator = torch.Generator().manual_seed(3)
    model = UNETRPP(
        **{**SMALL, "img_size": (12, 12, 12), "strides": (1, 1, 1, 1)},
        epa_kind=kind,
        epa_layout="tokens",
    )
    fill_with_golden_rule(model)
    model.double().eval()

    def smooth(rows, block):
        coefficients = torch.randn(rows, 8, dtype=torch.float64, generator=generator)
        return cosine_field(coefficients, block.grid).flatten(1)

    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 5 and weight.shape[-1] == 3:
                centre = weight[:, :, 1, 1, 1].clone() * 27**0.5
                weight.zero_()[:, :, 1, 1, 1] = centre
        for block in model.modules():
            if isinstance(block, TransformerBlock):
                block.pos_embed.copy_(0.1 * smooth(block.pos_embed.shape[2], block).T)
                for projection in token_projections(block):
                    projection.copy_(smooth(len(projection), block) / math.prod(block.grid))
    return model


@pytest.mark.parametrize("img_size", [(24, 18, 12), (6, 6, 12)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resized_model_gives_the_same_segmentation(kind, img_size):
    model = scale_free_model(kind)
    generator = torch.Generator().manual_seed(4)
    field = torch.randn(1, 1, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        before = model(cosine_field(field, model.img_size))
        expected = functional.interpolate(before, size=img_size, mode="trilinear")

        def error(changed):
            return relative_l2(changed(cosine_field(field, img_size)), expected)

        resized = copy.deepcopy(model).resize_tokens(img_size)
        old_temperature = copy.deepcopy(resized)
        for key, parameter in old_temperature.named_parameters():
            if key.endswith("temperature2"):
                parameter.copy_(model.get_parameter(key))
        found = error(resized)
        assert found < 0.12
        assert found < 0.75 * error(old_temperature)

        again = resized.resize_tokens(model.img_size)
        assert relative_l2(again(cosine_field(field, model.img_size)), before) < 0.1


# Daily, every network is traced forward and backward (test_models.py).
@pytest.mark.exhaustive
def test_block_compiles_to_machine_code():
    torch.manual_seed(0)
    block = TransformerBlock((4, 4, 4), 8, 4, 2).eval()
    fill_with_golden_rule(block)
    x = torch.randn(2, 8, 4, 4, 4)
    with torch.no_grad():
        assert relative_l2(torch.compile(block, fullgraph=True)(x), block(x)) < 1e-5
