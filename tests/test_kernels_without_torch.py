"""The compiled module alone, with neither torch nor this package: against numpy, in float64.

Forward against the reference, written again in a few lines; backward against its differences
along a random direction of each input. The module is the installed one, or the one in the folder
EPA_KERNELS_MODULE: `make sanitize` has one there that reports every access out of bounds.
"""

import functools
import importlib.util
import math
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest


def find_module():
    """Path of the module; find_spec finds the package's folder without importing it."""
    given = os.environ.get("EPA_KERNELS_MODULE")
    package = None if given else importlib.util.find_spec("epa_kernels")
    for folder in [given] if given else package.submodule_search_locations if package else ():
        for suffix in EXTENSION_SUFFIXES:
            if (path := Path(folder, f"_C{suffix}")).is_file():
                return path
    if given:
        raise FileNotFoundError(f"EPA_KERNELS_MODULE: {given} holds no _C for this Python")
    pytest.skip("the extension epa_kernels._C is not there", allow_module_level=True)


spec = importlib.util.spec_from_file_location("_C", find_module())
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

ISAS = tuple(kernels.isas().split(","))
KINDS, LAYOUTS = ("shared", "split", "sum"), ("official", "tokens")
# bfloat16, which numpy lacks, is held as the uint16 of its bits.
CODES = {np.dtype("f4"): 0, np.dtype("f8"): 1, np.dtype("u2"): 2, np.dtype("f2"): 3}
LOW = {"float32": ("f4", 2e-5), "bfloat16": ("u2", 1e-2), "float16": ("f2", 2e-3)}
THREADS = 2
SEED = -(2**40) - 7
THRESHOLDS = (20000, 9000)  # of the channel map and of the spatial map, in 65536

# B, N, C, H, P: one token, no whole vector, many vectors, D = 1 and 128, P = 1 and 513, several
# tiles and chunks, N that C divides and not, and more work than one thread is given.
SHAPES = (
    (2, 1, 6, 2, 3),
    (1, 63, 40, 2, 5),
    (2, 140, 32, 4, 33),
    (2, 256, 32, 4, 33),
    (1, 513, 24, 24, 1),
    (1, 257, 128, 1, 7),
    (1, 39, 4, 2, 513),
    (1, 70, 21, 3, 9),
    (1, 1031, 64, 4, 17),
)
# B, N, H, D, P
BRANCH_SHAPES = (
    (2, 1, 2, 1, 3),
    (1, 65, 3, 8, 33),
    (2, 513, 1, 20, 1),
    (1, 300, 2, 65, 27),
    (1, 40, 1, 128, 513),
    (1, 1031, 4, 16, 64),
)


def shape_id(shape):
    return "x".join(map(str, shape))


@pytest.fixture(params=ISAS)
def isa(request):
    kernels.use_isa(request.param)
    yield request.param
    # The package may have loaded the same file, and its choice with it.
    kernels.use_isa(os.environ.get("EPA_KERNELS_ISA", ""))


# What is expected.


def philox(counter, seed):
    """Four 32-bit words of each counter, see epa_kernels/rng.py."""
    mask, seed = np.uint64(0xFFFFFFFF), seed % 2**64
    c = [np.asarray(word, np.uint64) for word in counter]
    k = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & mask,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & mask,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def multiplier(shape, map_index, threshold):
    """Dropout of an attention map of this shape: 0 or 65536 / (65536 - threshold)."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    row = np.arange(rows)[:, None]
    group = np.arange(-(-columns // 8))[None, :]
    words = philox(np.broadcast_arrays(group, row, 0 * row, map_index + 0 * row), SEED)
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    halves = np.stack(halves, -1).reshape(rows, -1)[:, :columns]
    return ((halves >= threshold) * (65536 / (65536 - threshold))).reshape(shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def over_norm(t):
    return t / np.maximum(np.sqrt((t * t).sum(1, keepdims=True)), 1e-12)


def channel_attention(q, k, v, temperature, *, mask):
    cosine = np.einsum("bnhi,bnhj->bhij", over_norm(q), over_norm(k))
    attention = softmax(temperature[:, None, None] * cosine) * mask
    return np.einsum("bhij,bnhj->bnhi", attention, v)


def spatial_attention(q, k_proj, v_proj, temperature, *, mask, normalize):
    logits = np.einsum("bnhd,bphd->bhnp", over_norm(q) if normalize else q, k_proj)
    attention = softmax(temperature[:, None, None] * logits) * mask
    return np.einsum("bhnp,bphd->bnhd", attention, v_proj)


def paired_attention(a, *, H, kind, layout, masks):
    B, N, C = a["x"].shape

    def linear(t, name):
        t = t @ a[f"{name}_weight"].T
        return t if a[f"{name}_bias"] is None else t + a[f"{name}_bias"]

    def project(name, t):
        t = np.einsum("pn,bnhd->bphd", a[f"{name}_weight"], t)
        return t if a[f"{name}_bias"] is None else t + a[f"{name}_bias"][:, None, None]

    q, k, vc, vs = np.moveaxis(linear(a["x"], "qkvv").reshape(B, N, 4, H, C // H), 2, 0)
    k_proj = project("proj_k", k)
    v_proj = project("proj_v" if kind == "split" else "proj_k", vs)
    out_c = channel_attention(q, k, vc, a["temperature"], mask=masks[0]).reshape(B, N, C)
    out_s = spatial_attention(q, k_proj, v_proj, a["temperature2"], mask=masks[1], normalize=True)
    if layout == "official":
        out_s = out_s.transpose(0, 3, 2, 1)
    out_s = out_s.reshape(B, N, C)
    if kind == "sum":
        return out_c + out_s
    return np.concatenate((linear(out_s, "out_proj"), linear(out_c, "out_proj2")), -1)


# How the kernels are called.


def encode(values, dtype):
    """Numbers rounded to a dtype; bfloat16 as bits."""
    if dtype != np.dtype("u2"):
        return values.astype(dtype)
    bits = values.astype("f4").view("u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")


def decode(array):
    if array.dtype != np.dtype("u2"):
        return array.astype("f8")
    return (array.astype("u4") << 16).view("f4").astype("f8")


def view(array):
    if array is None:
        return None
    strides = (stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, CODES[array.dtype], *strides


def address(array):
    return 0 if array is None else array.ctypes.data


class Memory:
    """Arrays for one call.

    dense: an allocation of its own, whose ends a sanitizer guards. reversed, stepped: NaN lie
    around it, with no sample's last axis contiguous; `check` sees that they are what they were.
    """

    def __init__(self, dtype, placement):
        self.dtype, self.placement, self.outside = np.dtype(dtype), placement, []

    def put(self, values):
        if values is None:
            return None
        if self.placement == "dense":
            return encode(values, self.dtype)
        shape, ndim = values.shape, values.ndim
        order = list(range(ndim))
        if self.placement == "reversed":
            order = order[: ndim > 2] + order[: (ndim > 2) - ndim - 1 : -1]
        step = 2 if self.placement == "stepped" else 1
        parent = encode(np.full([shape[i] * step + 3 for i in order], np.nan), self.dtype)
        part = tuple(slice(1, 1 + shape[i] * step, step) for i in order)
        array = parent[part].transpose(np.argsort(order))
        array[...] = encode(values, self.dtype)
        self.outside.append((parent, part, self.frame(parent, part)))
        return array

    def empty(self, like):
        return None if like is None else self.put(np.full(like.shape, np.nan))

    @staticmethod
    def frame(parent, part):
        frame = parent.copy()
        frame[part] = 0
        return frame.tobytes()

    def check(self):
        for parent, part, before in self.outside:
            assert self.frame(parent, part) == before


def weight(values, dtype):
    return None if values is None else np.ascontiguousarray(values, dtype)


VIEWS, WEIGHTS = kernels.inputs["paired_attention"]


def run_paired(a, dy, *, H, kind, layout, direct, thresholds, dtype="f8", placement="dense"):
    """y and the gradient of every input, as float64."""
    (B, N, C), P = a["x"].shape, len(a["proj_k_weight"])
    memory, wide = Memory(dtype, placement), "f8" if dtype == "f8" else "f4"
    views = [memory.put(a[name]) for name in VIEWS]
    weights = [weight(a[name], wide) for name in WEIGHTS]
    kept = [None] * 3
    if not direct:
        projections = 2 if kind == "split" else 1
        shapes = ((B, C), "f8"), ((B, C, C), wide), ((B, projections, P, C), wide)
        kept = [np.full(shape, np.nan, kind) for shape, kind in shapes]
    arguments = ((B, N, C, H, P), KINDS.index(kind), LAYOUTS.index(layout), direct, thresholds,
                 SEED, THREADS, [view(t) for t in views], [address(t) for t in weights],
                 [address(t) for t in kept])  # fmt: skip
    # The caller makes these two: they are dense, as the official layout must have them.
    y, dy = (Memory(dtype, "dense").put(t) for t in (np.full_like(a["x"], np.nan), dy))
    kernels.paired_attention_fwd(*arguments, view(y))
    dviews = [memory.empty(a[name]) for name in VIEWS]
    dweights = [None if t is None else np.full_like(t, np.nan) for t in weights]
    kernels.paired_attention_bwd(
        *arguments, view(dy), [view(t) for t in dviews], [address(t) for t in dweights]
    )
    memory.check()
    gradients = zip((*VIEWS, *WEIGHTS), (*dviews, *dweights), strict=True)
    return decode(y), {name: decode(t) for name, t in gradients if t is not None}


def run_branch(op, a, dout, *, threshold, normalize=None, dtype="f8", placement="dense"):
    """out and the gradient of every input, as float64; normalize is the spatial branch's."""
    is_channel = op is channel_attention
    memory, wide = Memory(dtype, placement), "f8" if dtype == "f8" else "f4"
    *names, _ = a
    inputs, temperature = [memory.put(a[name]) for name in names], weight(a["temperature"], wide)
    (B, N, H, D), tokens = inputs[0].shape, inputs[1].shape[1]
    kept = [(B, H, D, D), (B, H, D), (B, H, D)] if is_channel else [(B, H, D)]
    kept = [np.full(shape, np.nan, wide) for shape in kept]
    addresses = [address(t) for t in kept]
    arguments = (
        *(((B, N, H, D),) if is_channel else ((B, N, H, D, tokens), normalize)),
        *(threshold, SEED, THREADS, [view(t) for t in inputs], address(temperature)),
        addresses if is_channel else addresses[0],
    )
    name = "channel_attention" if is_channel else "spatial_attention"
    out, dout = memory.empty(a["q"]), memory.put(dout)
    getattr(kernels, f"{name}_fwd")(*arguments, view(out))
    gradients = [memory.empty(a[name]) for name in names]
    dtemperature = np.full_like(temperature, np.nan)
    getattr(kernels, f"{name}_bwd")(
        *arguments, view(dout), [view(t) for t in gradients], address(dtemperature)
    )
    memory.check()
    gradients = dict(zip(a, (*gradients, dtemperature), strict=True))
    return decode(out), {name: decode(t) for name, t in gradients.items()}


# What is compared.


def paired_inputs(shape, kind, bias, seed=0):
    """Inputs by name, and the output's gradient; neither softmax is near uniform."""
    B, N, C, H, P = shape
    normal = np.random.default_rng(seed).standard_normal
    summed, split = kind == "sum", kind == "split"

    def bias_of(size, wanted=True):
        return 0.1 * normal(size) if bias and wanted else None

    a = {
        "x": normal((B, N, C)),
        "qkvv_weight": normal((4 * C, C)) / math.sqrt(C),
        "qkvv_bias": bias_of(4 * C),
        "proj_k_weight": normal((P, N)) / math.sqrt(N),
        "proj_k_bias": bias_of(P, not summed),
        "proj_v_weight": normal((P, N)) / math.sqrt(N) if split else None,
        "proj_v_bias": bias_of(P, split),
        "temperature": 4 + np.arange(H) / H,
        "temperature2": (2 + np.arange(H) / H) * math.sqrt(N * H / C),
    }
    for name in ("out_proj", "out_proj2"):
        a[f"{name}_weight"] = None if summed else normal((C // 2, C)) / math.sqrt(C)
        a[f"{name}_bias"] = bias_of(C // 2, not summed)
    return a, normal((B, N, C))


def branch_inputs(op, shape, seed=0):
    B, N, H, D, P = shape
    normal = np.random.default_rng(seed).standard_normal
    names, tokens = ("q", "k", "v"), N
    if op is spatial_attention:
        names, tokens = ("q", "k_proj", "v_proj"), P
    shapes = ((B, N, H, D), (B, tokens, H, D), (B, tokens, H, D))
    a = dict(zip(names, map(normal, shapes), strict=True))
    return a | {"temperature": 0.5 + np.arange(H) / H}, normal((B, N, H, D))


def paired_masks(shape, thresholds):
    B, N, C, H, P = shape
    D = C // H
    maps = ((B, H, D, D), (B, H, N, P))
    return [multiplier(maps[i], i, thresholds[i]) for i in range(2)]


def check_gradients(reference, a, dy, gradients):
    """Each gradient against a central difference along a random direction."""
    random = np.random.default_rng(1)
    step = 1e-5
    for name, gradient in gradients.items():
        direction = random.standard_normal(gradient.shape)
        ends = [reference({**a, name: a[name] + sign * step * direction}) for sign in (1, -1)]
        expected = ((ends[0] - ends[1]) * dy).sum() / (2 * step)
        found = (gradient * direction).sum()
        # Of about the size of one random sum, where a gradient vanishes of the result's rounding.
        scale = np.linalg.norm(gradient) + 1e-4 * np.linalg.norm(dy)
        assert abs(found - expected) <= 1e-6 * scale, (name, found, expected)


def assert_close(found, expected, tolerance, name="result"):
    error = np.linalg.norm(found - expected)
    assert error <= tolerance * np.linalg.norm(expected), (name, error)


CASES = [
    pytest.param(shape, kind, layout, id=f"{shape_id(shape)}-{kind}-{layout}")
    for shape in SHAPES
    for kind in KINDS
    for layout in LAYOUTS
    if kind == "sum" or shape[2] % 2 == 0
]


@functools.cache
def paired_case(shape, kind, layout):
    """Inputs, the output's gradient, the reference and its output."""
    a, dy = paired_inputs(shape, kind, bias=layout == "official")
    options = {"H": shape[3], "kind": kind, "layout": layout}
    reference = functools.partial(
        paired_attention, masks=paired_masks(shape, THRESHOLDS), **options
    )
    return a, dy, reference, reference(a)


@functools.cache
def first_gradients(shape, kind, layout, direct):
    """Gradients of the first instruction set, which are those of differences of the reference."""
    a, dy, reference, _ = paired_case(shape, kind, layout)
    kernels.use_isa(ISAS[0])
    _, gradients = run_paired(
        a, dy, H=shape[3], kind=kind, layout=layout, direct=direct, thresholds=THRESHOLDS
    )
    check_gradients(reference, a, dy, gradients)
    return gradients


@pytest.mark.parametrize("direct", (False, True), ids=("two_pass", "direct"))
@pytest.mark.parametrize("shape, kind, layout", CASES)
def test_paired_attention(isa, shape, kind, layout, direct):
    a, dy, _, expected = paired_case(shape, kind, layout)
    y, gradients = run_paired(
        a, dy, H=shape[3], kind=kind, layout=layout, direct=direct, thresholds=THRESHOLDS
    )
    assert_close(y, expected, 1e-12)
    first = first_gradients(shape, kind, layout, direct)
    for name, gradient in gradients.items():
        scale = np.linalg.norm(first[name]) + 1e-4 * np.linalg.norm(dy)
        assert np.linalg.norm(gradient - first[name]) <= 1e-10 * scale, name


@pytest.mark.parametrize("direct", (False, True), ids=("two_pass", "direct"))
@pytest.mark.parametrize("thresholds", ((0, 0), (20000, 0), (0, 9000)), ids=str)
def test_paired_attention_drops_out_each_map_on_its_own(isa, thresholds, direct):
    shape, options = SHAPES[2], {"H": 4, "kind": "shared", "layout": "official"}
    a, dy = paired_inputs(shape, "shared", bias=True)
    masks = paired_masks(shape, thresholds)
    y, gradients = run_paired(a, dy, direct=direct, thresholds=thresholds, **options)
    assert_close(y, paired_attention(a, masks=masks, **options), 1e-12)
    check_gradients(lambda a: paired_attention(a, masks=masks, **options), a, dy, gradients)


@pytest.mark.parametrize("direct", (False, True), ids=("two_pass", "direct"))
@pytest.mark.parametrize("placement", ("dense", "reversed", "stepped"))
@pytest.mark.parametrize("dtype", ("float64", *LOW))
@pytest.mark.parametrize("kind", ("split", "sum"))
def test_paired_attention_dtypes_and_strides(isa, kind, dtype, placement, direct):
    shape = (2, 140, 22, 2, 13)
    dtype, tolerance = LOW.get(dtype, ("f8", 1e-12))
    if dtype == "f2" and not kernels.has_float16:
        pytest.skip("the compiler of the extension has no _Float16")
    a, dy = paired_inputs(shape, kind, bias=True)
    a |= {name: a[name] if a[name] is None else rounded(a[name], dtype) for name in VIEWS}
    dy = rounded(dy, dtype)
    options = {"H": 2, "kind": kind, "layout": "official", "thresholds": THRESHOLDS}
    expected, exact = run_paired(a, dy, direct=direct, **options)
    y, gradients = run_paired(a, dy, direct=direct, dtype=dtype, placement=placement, **options)
    assert_close(y, expected, tolerance)
    for name, gradient in gradients.items():
        assert_close(gradient, exact[name], tolerance, name)


def rounded(values, dtype):
    return decode(encode(values, np.dtype(dtype)))


BRANCHES = pytest.mark.parametrize(
    "op, options",
    (
        (channel_attention, {}),
        (spatial_attention, {"normalize": True}),
        (spatial_attention, {"normalize": False}),
    ),
    ids=("channel", "spatial-normalize", "spatial"),
)


def branch_mask(op, shape, threshold):
    B, N, H, D, P = shape
    is_channel = op is channel_attention
    return multiplier((B, H, D, D) if is_channel else (B, H, N, P), int(not is_channel), threshold)


@pytest.mark.parametrize("threshold", (0, 9000))
@pytest.mark.parametrize("shape", BRANCH_SHAPES, ids=shape_id)
@BRANCHES
def test_branch(isa, op, options, shape, threshold):
    a, dout = branch_inputs(op, shape)
    mask = branch_mask(op, shape, threshold)
    out, gradients = run_branch(op, a, dout, threshold=threshold, **options)
    assert_close(out, op(**a, mask=mask, **options), 1e-12)
    check_gradients(lambda a: op(**a, mask=mask, **options), a, dout, gradients)


@pytest.mark.parametrize("placement", ("dense", "reversed", "stepped"))
@pytest.mark.parametrize("dtype", ("float64", *LOW))
@BRANCHES
def test_branch_dtypes_and_strides(isa, op, options, dtype, placement):
    dtype, tolerance = LOW.get(dtype, ("f8", 1e-12))
    if dtype == "f2" and not kernels.has_float16:
        pytest.skip("the compiler of the extension has no _Float16")
    a, dout = branch_inputs(op, (2, 140, 3, 11, 13))
    a = {name: rounded(t, "f4" if name == "temperature" else dtype) for name, t in a.items()}
    dout, options = rounded(dout, dtype), options | {"threshold": 9000}
    expected, exact = run_branch(op, a, dout, **options)
    out, gradients = run_branch(op, a, dout, dtype=dtype, placement=placement, **options)
    assert_close(out, expected, tolerance)
    for name, gradient in gradients.items():
        assert_close(gradient, exact[name], tolerance, name)


def test_philox_has_the_published_answer():
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    words = philox(counter, key[0] | key[1] << 32)
    assert [int(word) for word in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_unknown_instruction_set_is_refused_with_the_names():
    with pytest.raises(ValueError, match=f"must be one of {kernels.isas()} on this processor"):
        kernels.use_isa("mmx")
