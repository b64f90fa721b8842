"""The Triton kernels, in Triton's interpreter: memory, order of programs, launches, imports.

That they compute what the reference does is tested where every backend is.
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import KINDS, LAYOUTS
from torch.utils._python_dispatch import TorchDispatchMode

import epa_kernels
from epa_kernels import dispatch
from epa_kernels.backends import triton as backend
from epa_kernels.backends.triton import launch
from epa_kernels.contract import OPS, call_on
from epa_kernels.testing import Surroundings, make_layer, op_arguments, run_layer

pytest.importorskip("triton", "3.6", reason="needs the package triton, 3.6 or later")

from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402

from epa_kernels.backends.triton import paired  # noqa: E402
from epa_kernels.backends.triton.interpreter import launch_shapes_of_users  # noqa: E402

# Both plans; layouts that are projected on the spot and through memory.
SHAPES = {"rows": (2, 160, 32, 2, 9), "flat": (1, 130, 40, 2, 5), "direct": (2, 20, 24, 3, 5)}
# And more projected tokens than a tile of tokens meets at a time.
MEMORY_SHAPES = SHAPES | {"blocks": (1, 96, 32, 2, 70), "flat-blocks": (1, 60, 24, 2, 130)}
PAIRED, SPATIAL, CHANNEL = OPS.values()


# Each MODE, kind and layout, both plans, P in one block and several.
MEMORY_CASES = (
    ("rows", "shared", "official"),  # MODE rows
    ("rows", "sum", "official"),  # row_sum
    ("rows", "split", "tokens"),  # tokens
    ("rows", "sum", "tokens"),  # add
    ("flat", "split", "official"),  # flat
    ("flat", "sum", "official"),  # flat_sum
    ("flat", "shared", "tokens"),  # backward flat_tokens
    ("direct", "shared", "official"),
    ("direct", "sum", "tokens"),
    ("blocks", "split", "official"),
    ("flat-blocks", "shared", "tokens"),
)


@pytest.mark.daily.with_args(lambda shape, kind, layout: (shape, kind, layout) in MEMORY_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", MEMORY_SHAPES)
def test_nothing_is_touched_outside_and_everything_written(shape, kind, layout):
    """Reads outside would bring NaN into a result, and what is not written would be NaN."""
    shape = MEMORY_SHAPES[shape]
    tensors, options = op_arguments(shape, kind, layout)
    seed = torch.tensor(3)
    expected = backend.paired_attention(*tensors, seed, **options)
    dy = torch.randn(shape[:3], generator=torch.Generator().manual_seed(2))
    gradients = backend.paired_attention_bwd(dy, *tensors, *expected[1:], seed, **options)
    with Surroundings() as memory:
        tensors, dy = [t if t is None else memory.copy(t) for t in tensors], memory.copy(dy)
        found = backend.paired_attention(*tensors, seed, **options)
        found_gradients = backend.paired_attention_bwd(dy, *tensors, *found[1:], seed, **options)
    assert memory.buffers and not memory.broken()
    for value, truth in zip((*found, *found_gradients), (*expected, *gradients), strict=True):
        assert torch.equal(value, truth)


OTHER_OPS = (
    ("spatial_attention", {"normalize": True}),
    ("spatial_attention", {"normalize": False}),
    ("channel_attention", {}),
)


def run_op(name, tensors, options):
    """One of the two other ops: dout, q, k, v -> out, dq, dk, dv, dtemperature, what is kept."""
    temperature, seed = torch.ones(2, dtype=tensors[0].dtype), torch.tensor(3)
    out, *kept = getattr(backend, name)(*tensors[1:], temperature, seed, **options)
    backward = getattr(backend, f"{name}_bwd")
    return out, *backward(*tensors, temperature, *kept, seed, **options), *kept


@pytest.mark.parametrize("name, options", OTHER_OPS)
def test_nothing_is_touched_outside_the_other_ops(name, options):
    tensors = torch.randn(4, 2, 70, 2, 5, generator=torch.Generator().manual_seed(1)).unbind(0)
    options = {"dropout_p": 0.2} | options
    expected = run_op(name, tensors, options)
    with Surroundings() as memory:
        found = run_op(name, [memory.copy(t) for t in tensors], options)
    assert memory.buffers and not memory.broken()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def shuffle(monkeypatch):
    """Call it, and programs run in another order from then on."""
    set_grid_idx, moved = InterpreterBuilder.set_grid_idx, 0

    def shuffled(self, *index):
        nonlocal moved
        grid = self.grid_dim
        count = grid[0] * grid[1] * grid[2]
        flat = (index[0] * grid[1] + index[1]) * grid[2] + index[2]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
        moved += order[flat] != flat
        flat = order[flat]
        set_grid_idx(self, flat // (grid[1] * grid[2]), flat // grid[2] % grid[1], flat % grid[2])

    yield lambda: monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shuffled)
    assert moved > 10


@pytest.mark.parametrize("shape", MEMORY_SHAPES.values(), ids=MEMORY_SHAPES)
def test_programs_may_run_in_any_order(shape, shuffle):
    """On a GPU they do: no program may read what another one of its launch writes."""
    layer = make_layer(shape, dropout=0.2)
    x, gy = torch.randn(2, *shape[:3], generator=torch.Generator().manual_seed(7)).unbind(0)
    first = run_layer(layer, x, gy, backend="triton", dtype=torch.float32)
    shuffle()
    second = run_layer(layer, x, gy, backend="triton", dtype=torch.float32)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name, options", OTHER_OPS)
def test_programs_of_the_other_ops_may_run_in_any_order(name, options, shuffle):
    tensors = torch.randn(4, 2, 70, 2, 5, generator=torch.Generator().manual_seed(1)).unbind(0)
    first = run_op(name, tensors, {"dropout_p": 0.2} | options)
    shuffle()
    second = run_op(name, tensors, {"dropout_p": 0.2} | options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_logits_that_only_float64_holds(monkeypatch):
    """In several blocks, of 16 as float32 and float64 have them outside of these tests."""
    monkeypatch.setattr(launch, "WIDE_PROJECTED", 16)
    q, k, v, dout = torch.randn(
        4, 1, 40, 2, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).unbind(0)
    q, k, options = 1e20 * q.abs(), -1e20 * k.abs(), {"normalize": False, "dropout_p": 0.0}
    found = run_op("spatial_attention", (dout, q, k, v), options)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = epa_kernels.spatial_attention(*inputs, torch.ones(2).double(), backend="reference")
    expected = (out, *torch.autograd.grad(out, inputs, dout))
    for value, truth in zip(found[:4], expected, strict=True):
        torch.testing.assert_close(value, truth.detach(), rtol=1e-11, atol=0)


def assert_exact(layer, shape):
    """Output and every gradient are those of the reference, in float64."""
    x, gy = torch.randn(2, *shape[:3], generator=torch.Generator().manual_seed(7)).unbind(0)
    exact, found = (
        run_layer(layer, x, gy, backend=name, dtype=torch.float64)
        for name in ("reference", "triton")
    )
    for name, truth in exact.items():
        assert (found[name] - truth).abs().max() <= 1e-11 * truth.abs().max(), name


WIDE_CASES = (("sum", "official"), ("shared", "tokens"))  # the latter is MODE flat_tokens


@pytest.mark.daily.with_args(lambda kind, layout: (kind, layout) in WIDE_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_columns_in_several_blocks(kind, layout):
    """C beyond one block: sums of the output pass's backward are split over programs."""
    shape = (1, 70, 144, 2, 5)
    assert_exact(make_layer(shape, kind, layout), shape)


# B, N, C, H, P; another (head dim, P) each: heads that fill no block, P of one block and several.
WIDTHS = {
    "D8-P64": ((1, 160, 32, 4, 64), "split"),
    "D15-P17": ((1, 130, 30, 2, 17), "sum"),
    "D24-P70": ((1, 110, 48, 2, 70), "shared"),
    "D128-P150": ((1, 140, 128, 1, 150), "shared"),
    "D16-P512": ((1, 90, 32, 2, 512), "sum"),
    "D64-P200-direct": ((2, 30, 64, 1, 200), "split"),
}
WIDTH_CASES = (
    ("D8-P64", "official"),
    ("D15-P17", "official"),
    ("D15-P17", "tokens"),
    ("D24-P70", "official"),
    ("D64-P200-direct", "tokens"),
)


@pytest.mark.daily.with_args(lambda width, layout: (width, layout) in WIDTH_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_head_dim_and_number_of_projected_tokens(width, layout):
    shape, kind = WIDTHS[width]
    assert_exact(make_layer(shape, kind, layout, dropout=0.2), shape)


# Chunks and blocks as on a GPU: many small ones, P in one block, and in several.
USERS = {
    "stage1": ((2, 544, 32, 4, 64), "shared", "official"),
    "stage4": ((1, 64, 256, 4, 32), "shared", "official"),
    "flat": ((1, 300, 40, 2, 17), "split", "official"),
    "sum": ((1, 288, 32, 4, 64), "sum", "official"),
    "add": ((1, 200, 48, 2, 70), "sum", "tokens"),
    "tokens": ((2, 200, 32, 2, 200), "split", "tokens"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", USERS)
def test_launch_shapes_of_users(case):
    """Without `enlarge_blocks`, as every other test here has them."""
    shape, kind, layout = USERS[case]
    with launch_shapes_of_users():
        assert_exact(make_layer(shape, kind, layout, dropout=0.2), shape)


@pytest.mark.exhaustive
@pytest.mark.parametrize("projected", (17, 70))
@pytest.mark.parametrize("name, options", OTHER_OPS)
def test_launch_shapes_of_users_of_the_other_ops(name, options, projected):
    shapes = [(1, 300, 2, 20)] * 2 + [(1, projected, 2, 20)] * 2
    if name == "channel_attention":
        shapes = shapes[:1] * 4
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    with launch_shapes_of_users():
        found = run_op(name, tensors, {"dropout_p": 0.2} | options)
    inputs = [t.requires_grad_() for t in tensors[1:]]
    options = options | {"dropout_p": 0.2, "seed": torch.tensor(3), "backend": "reference"}
    out = getattr(epa_kernels, name)(*inputs, torch.ones(2).double(), **options)
    expected = (out, *torch.autograd.grad(out, inputs, tensors[0]))
    for value, truth in zip(found[:4], expected, strict=True):
        torch.testing.assert_close(value, truth.detach(), rtol=1e-11, atol=1e-11)


def test_an_unknown_mode_is_refused(monkeypatch):
    """It must not fall into the last branch of a kernel."""
    tensors, options = op_arguments((1, 40, 8, 2, 3), "shared", "official")
    seed = torch.tensor(3)
    y, *kept = backend.paired_attention(*tensors, seed, **options)
    monkeypatch.setattr(paired._Layer, "mode", lambda *_: "planar")
    with pytest.raises(InterpreterError, match="unknown MODE"):
        backend.paired_attention(*tensors, seed, **options)
    with pytest.raises(InterpreterError, match="unknown MODE"):
        backend.paired_attention_bwd(y, *tensors, *kept, seed, **options)


# (forward, backward). At most 4 and 6, but where the result of one program needs all tokens of
# another and several chunks are to be merged (no published layer), and with a bias of qkvv: the
# sums of a projection's rows take a launch of their own.
LAUNCHES = {
    ("rows", "shared", "official", False): (4, 6),
    ("rows", "split", "tokens", False): (4, 6),
    ("rows", "sum", "official", False): (4, 6),
    ("rows", "sum", "tokens", False): (4, 6),
    ("flat", "shared", "official", False): (5, 6),
    ("flat", "sum", "official", False): (5, 6),
    ("few", "shared", "official", False): (4, 6),
    ("one", "sum", "official", False): (3, 5),
    ("direct", "shared", "official", False): (4, 6),
    ("direct", "sum", "official", False): (4, 6),
    ("direct", "split", "tokens", False): (3, 6),
    ("rows", "shared", "official", True): (5, 7),
    ("rows", "split", "official", True): (6, 8),
}


class CountLaunches(TorchDispatchMode):
    """Operators of torch that launch something on a GPU, outside of the interpreter."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.interpreting, run = 0, False, InterpretedFunction.run

        def counted(function, *args, **kwargs):
            self.count, self.interpreting = self.count + 1, True
            try:
                return run(function, *args, **kwargs)
            finally:
                self.interpreting = False

        monkeypatch.setattr(InterpretedFunction, "run", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # On a GPU the host would wait for it, and a graph could not be captured.
        assert self.interpreting or func is not torch.ops.aten._local_scalar_dense.default
        allocates = "empty" in func.__name__
        self.count += not (self.interpreting or allocates or func.is_view)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", LAUNCHES, ids=lambda case: "-".join(map(str, case)))
def test_number_of_launches(case, monkeypatch):
    name, kind, layout, bias = case
    shapes = SHAPES | {"few": (1, 90, 40, 2, 5), "one": (1, 32, 16, 2, 5)}
    tensors, options = op_arguments(shapes[name], kind, layout)
    if not bias:
        tensors[2] = None
    seed = torch.tensor(3)
    with CountLaunches(monkeypatch) as launches:
        y, *kept = backend.paired_attention(*tensors, seed, **options)
        forward, launches.count, dy = launches.count, 0, torch.empty_like(y)
        backend.paired_attention_bwd(dy, *tensors, *kept, seed, **options)
    assert (forward, launches.count) == LAUNCHES[case]


@pytest.mark.parametrize("name", ("spatial_attention", "channel_attention"))
def test_number_of_launches_of_the_other_ops(name, monkeypatch):
    q, k, v, dout = torch.randn(4, 2, 70, 2, 5).unbind(0)
    options = {"dropout_p": 0.2} | ({"normalize": True} if name.startswith("spatial") else {})
    temperature, seed = torch.ones(2, 1, 1), torch.tensor(3)
    forward, backward = getattr(backend, name), getattr(backend, f"{name}_bwd")
    with CountLaunches(monkeypatch) as launches:
        _, *kept = forward(q, k, v, temperature, seed, **options)
        count, launches.count = launches.count, 0
        backward(dout, q, k, v, temperature, *kept, seed, **options)
    assert count <= 4 and launches.count <= 6


class NoHostValues(TorchDispatchMode):
    """Raise where the host needs a value of a tensor, or a shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise RuntimeError(f"{func} needs a value on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.exhaustive
def test_a_training_step_waits_for_nothing():
    """So that a CUDA graph can hold it; of the kernels `test_number_of_launches` shows it."""
    pytest.importorskip("monai")
    from unetrpp import UNETRPP
    from unetrpp.losses import deep_supervision_loss

    model = UNETRPP.from_preset("tiny", epa_backend="two_pass", attention_dropout=0.1)
    model.train().deep_supervision = True
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99, nesterov=True)
    x = torch.randn(2, 1, *model.img_size)
    with NoHostValues():
        loss = deep_supervision_loss(model(x), (x > 0).float())
        loss.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="_local_scalar_dense.* needs a value on the host"):
            loss.item()


def test_sizes_that_were_never_compiled_are_refused():
    q, k = torch.randn(1, 5, 1, 256), torch.randn(1, 600, 1, 256)
    for call, message in (
        (lambda: epa_kernels.EPA(8, 256, 2, 1, backend="triton")(torch.randn(1, 8, 256)),
         "paired_attention: backend 'triton' was forced but cannot run: head dim 256 > 128. Avail"),
        (lambda: epa_kernels.channel_attention(q, q, q, torch.ones(1), backend="triton"),
         "channel_attention: .*head dim 256 > 128"),
        (lambda: epa_kernels.spatial_attention(q, k, k, torch.ones(1), backend="triton"),
         "head dim 256 > 128; number of projected tokens 600 > 512. Available"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()


def test_offsets_beyond_32_bits_are_refused():
    """Of channels and heads; those of tokens and samples may be as wide."""
    wide = torch.empty_strided((1, 1, 1, 2), (0, 0, 0, 2**31), device="meta")
    near = torch.empty(1, 1, 1, 2, device="meta")
    calls = [
        call
        for tensors in ((wide, near, near), (near, wide, near), (near, near, wide))
        for call in (
            SPATIAL.call(SPATIAL.Inputs(*tensors, torch.ones(1)), SPATIAL.Options()),
            CHANNEL.call(CHANNEL.Inputs(*tensors, torch.ones(1)), CHANNEL.Options()),
        )
    ]
    tensors, options = op_arguments((1, 1, 2, 1, 1), "shared", "official")
    tensors[0] = wide.view(1, 1, 2)
    calls.append(PAIRED.call(PAIRED.Inputs(*tensors), PAIRED.Options(**options)))
    for call in calls:
        assert "offset of a channel of a token 2147483648 > 2147483647" in backend.why_not(call)
    # Projected tokens are walked like channels; the gradient of the result is made dense.
    far = torch.empty_strided((1, 2, 1, 2), (0, 2**31, 0, 1), device="meta")
    call = SPATIAL.call(SPATIAL.Inputs(near, far, far, torch.ones(1)), SPATIAL.Options())
    assert "offset of a channel of a token 2147483649 > 2147483647" in backend.why_not(call)
    assert launch.within_reach(wide).is_contiguous() and launch.within_reach(near) is near


def test_triton_is_imported_with_the_first_tensor_it_runs_on():
    code = (
        "import sys, torch, epa_kernels; x = torch.zeros(1, 8, 4);"
        "epa_kernels.EPA(8, 4, 2)(x); epa_kernels.explain('paired_attention', x);"
        "print('triton' in sys.modules)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.splitlines()[-1] == "False"


def test_reasons_are_given_where_it_cannot_run(monkeypatch):
    x = torch.zeros(1, 8, 4)
    call = call_on("paired_attention", x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="x is on cpu, the kernels run on GPUs"):
        dispatch.select(call, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select(call, backend="triton") == "triton"
    with pytest.raises(RuntimeError, match="dtype torch.int32 is none of"):
        dispatch.select(call._replace(dtype=torch.int32), backend="triton")
    monkeypatch.setattr(backend, "missing", lambda: "Triton cannot be imported (broken)")
    with pytest.raises(RuntimeError, match="cannot be imported .broken."):
        dispatch.select(call, backend="triton")
    assert dispatch.select(call) != "triton"
    monkeypatch.undo()
    monkeypatch.setattr(backend.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    backend.no_launcher.cache_clear()
    assert "no C compiler" in backend.no_launcher()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda _: "/nowhere")
    backend.no_launcher.cache_clear()
    assert "needs /nowhere/Python.h" in backend.no_launcher()
    backend.no_launcher.cache_clear()
    assert not dispatch.BACKENDS["triton"].trusted
