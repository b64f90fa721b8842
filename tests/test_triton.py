"""The Triton kernels, in Triton's interpreter: memory, order of programs, launches, imports.

That they compute what the spec does is tested where every backend is.
"""

import ast
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CHILD_ENVIRONMENT, KINDS, LAYOUTS
from torch.utils._python_dispatch import TorchDispatchMode

import epa_kernels
from epa_kernels import dispatch
from epa_kernels.backends import triton as backend
from epa_kernels.backends.triton import launch
from epa_kernels.testing import Guards, make_layer, op_arguments, run_layer

pytest.importorskip("triton", reason="needs the package triton")

from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402

# Both plans; layouts that are projected on the spot and through memory.
SHAPES = {"rows": (2, 160, 32, 2, 9), "flat": (1, 130, 40, 2, 5), "direct": (2, 20, 24, 3, 5)}
# And more projected tokens than a tile of tokens meets at a time.
MEMORY_SHAPES = SHAPES | {"blocks": (1, 96, 32, 2, 70), "flat-blocks": (1, 60, 24, 2, 130)}
# Layers of benchmarks/triton_resources.py, none of them published, that must launch, but may spill.
MAY_SPILL = ("D128", "D64-P512", "D128-P512", "heads-D128", "heads-D128-P512")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", MEMORY_SHAPES.values(), ids=MEMORY_SHAPES)
def test_nothing_is_touched_outside_and_everything_written(shape, kind, layout, monkeypatch):
    """Reads outside would bring NaN into a result, and what is not written would be NaN."""
    tensors, options = op_arguments(shape, kind, layout)
    seed = torch.tensor(3)
    expected = backend.paired_attention(*tensors, seed, **options)
    dy = torch.randn(shape[:3], generator=torch.Generator().manual_seed(2))
    gradients = backend.paired_attention_bwd(dy, *tensors, *expected[1:], seed, **options)
    with monkeypatch.context() as patch:
        guards = Guards(patch)
        tensors, dy = [guards.copy(t) for t in tensors], guards.copy(dy)
        found = backend.paired_attention(*tensors, seed, **options)
        found_gradients = backend.paired_attention_bwd(dy, *tensors, *found[1:], seed, **options)
    guards.check()
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
def test_nothing_is_touched_outside_the_other_ops(name, options, monkeypatch):
    tensors = torch.randn(4, 2, 70, 2, 5, generator=torch.Generator().manual_seed(1)).unbind(0)
    options = {"dropout_p": 0.2} | options
    expected = run_op(name, tensors, options)
    with monkeypatch.context() as patch:
        guards = Guards(patch)
        found = run_op(name, [guards.copy(t) for t in tensors], options)
    guards.check()
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
    """Output and every gradient are those of the definition, in float64."""
    x, gy = torch.randn(2, *shape[:3], generator=torch.Generator().manual_seed(7)).unbind(0)
    exact, found = (
        run_layer(layer, x, gy, backend=name, dtype=torch.float64)
        for name in ("reference", "triton")
    )
    for name, truth in exact.items():
        assert (found[name] - truth).abs().max() <= 1e-11 * truth.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_columns_in_several_blocks(kind):
    """C beyond one block: sums of the output pass's backward are split over programs."""
    shape = (1, 70, 144, 2, 5)
    assert_exact(make_layer(shape, kind), shape)


# B, N, C, H, P; another (head dim, P) each: heads that fill no block, P of one block and several.
WIDTHS = (
    ((1, 160, 32, 4, 64), "split"),  # D = 8
    ((1, 130, 30, 2, 17), "sum"),  # D = 15
    ((1, 110, 48, 2, 70), "shared"),  # D = 24
    ((1, 140, 128, 1, 150), "shared"),  # D = 128
    ((1, 90, 32, 2, 512), "sum"),  # D = 16
    ((2, 30, 64, 1, 200), "split"),  # D = 64, direct
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, kind", WIDTHS, ids=lambda value: str(value).replace(" ", ""))
def test_any_head_dim_and_number_of_projected_tokens(shape, kind, layout):
    assert_exact(make_layer(shape, kind, layout, dropout=0.2), shape)


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


RESOURCES = Path(__file__).parents[1] / "benchmarks" / "triton_resources.py"
COMPILING = CHILD_ENVIRONMENT | {"TRITON_INTERPRET": "0"}


def resources(code):
    """Run code with benchmarks/triton_resources.py as `r`, where Triton compiles."""
    head = "import sys, json"
    return subprocess.run(
        [sys.executable, "-c", f"{head}; from benchmarks import triton_resources as r; {code}"],
        env=COMPILING, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def recorded():
    with (RESOURCES.parent / "results" / "triton_resources.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_launch_fits_every_architecture():
    """No published layer spills, the shared memory is there, large products use tensor cores.

    The table says what compiling gave; the next tests show that it is of these sources, and true.
    """
    limits = json.loads(resources("print(json.dumps(r.SHARED_LIMITS))"))
    rows = recorded()
    assert {row["architecture"] for row in rows} == set(limits)
    for row in rows:
        assert int(row["shared"]) <= limits[row["architecture"]], row
        assert int(row["spilled"]) == 0 or row["layer"] in MAY_SPILL, row
        halves = row["dtype"] in ("bfloat16", "float16")
        if halves and row["kernel"] in ("summary", "output", "output_backward", "summary_backward"):
            assert int(row["tensor_core"]) > 0, row


def test_resources_are_of_these_sources():
    """A change shows in review: benchmarks/triton_resources.py writes the table anew."""
    import triton

    pinned = next(
        line for line in (RESOURCES.parents[1] / "constraints.txt").read_text().splitlines()
        if line.startswith("triton==")
    )  # fmt: skip
    if pinned != f"triton=={triton.__version__}":
        pytest.skip(f"the table is of {pinned}, here is {triton.__version__}")
    subprocess.run([sys.executable, RESOURCES, "--check"], env=COMPILING, check=True)


@pytest.mark.parametrize(
    "architecture", ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
)
def test_resources_are_what_compiling_gives(architecture):
    """One in 70 of the architecture's rows; of the H100's, a whole stage 1 in bfloat16, too."""
    code = f"""
found = []
for i, (key, (row, launch)) in enumerate(r.needed([{architecture!r}]).items()):
    layer = row["architecture"], row["layer"], row["dtype"]
    whole = layer == ("sm_90", "synapse/stage1", "bfloat16")
    if whole or i % 70 == r.ARCHITECTURES.index({architecture!r}):
        found.append((key, r.resources(launch.compile({architecture!r}))))
print(json.dumps(found))
"""
    found = json.loads(resources("exec(" + repr(code) + ")"))
    table = {row["key"]: row for row in recorded()}
    assert len(found) >= (15 if architecture == "sm_90" else 5)
    for key, taken in found:
        row = table[key]
        assert {name: int(row[name]) for name in taken} == taken, row


def test_the_smallest_dropout_rate_compiles():
    """It drops one in 65536: an argument of 1 is a constant to the compiler."""
    code = """
layers = (r.LAYERS["synapse/stage1"], r.LAYERS["heads/stage1"])
calls = [c for layer in layers for c in r.launches("sm_90", layer, "bfloat16", dropout=1 / 65536)]
names = ("output", "mix", "spatial_forward", "channel_mix")
print([c.kernel.__name__ for c in calls if c.kernel.__name__ in names and c.compile("sm_90")])
"""
    found = resources("exec(" + repr(code) + ")")
    assert all(name in found for name in ("output", "mix", "spatial_forward", "channel_mix"))


@pytest.mark.parametrize(
    "setting, expected",
    (
        ("pass", ("ieee", "tf32x3", "ieee")),
        ("torch.set_float32_matmul_precision('high')", ("tf32x3", "tf32x3", "ieee")),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", ("tf32x3", "tf32x3", "ieee")),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", ("ieee", "tf32x3", "ieee")),
    ),
)
def test_float32_products_follow_the_setting_of_torch(setting, expected):
    code = (
        f"import torch; from epa_kernels.backends.triton.launch import precision; {setting};"
        "x, y = torch.empty(0), torch.empty(0, dtype=torch.bfloat16);"
        "print((precision(x), precision(y), precision(x, 'output_backward')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=COMPILING, capture_output=True, text=True, check=True
    )
    assert tuple(ast.literal_eval(result.stdout)) == expected


def test_sizes_that_were_never_compiled_are_refused():
    q, k = torch.randn(1, 5, 1, 256), torch.randn(1, 600, 1, 256)
    for call, message in (
        (lambda: epa_kernels.EPA(8, 256, 2, 1, backend="triton")(torch.randn(1, 8, 256)),
         "paired_attention: .*'triton' cannot run: head dim 256 > 128; use backend 'two_pass'"),
        (lambda: epa_kernels.channel_attention(q, q, q, torch.ones(1), backend="triton"),
         "channel_attention: .*head dim 256 > 128"),
        (lambda: epa_kernels.spatial_attention(q, k, k, torch.ones(1), backend="triton"),
         "head dim 256 > 128, number of projected tokens 600 > 512; use"),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=message):
            call()


def test_offsets_beyond_32_bits_are_refused():
    """Of channels and heads; those of tokens and samples may be as wide."""
    refused = pytest.raises(
        NotImplementedError, match="offset of a channel of a token 2147483648 >"
    )
    wide = torch.empty_strided((1, 1, 1, 2), (0, 0, 0, 2**31), device="meta")
    near = torch.empty(1, 1, 1, 2, device="meta")
    temperature = torch.ones(1)
    for tensors in ((wide, near, near), (near, wide, near), (near, near, wide)):
        with refused:
            backend.channel_attention(*tensors, temperature, None, dropout_p=0.0)
        with refused:
            backend.spatial_attention(*tensors, temperature, None, normalize=True, dropout_p=0.0)
    tensors, options = op_arguments((1, 1, 2, 1, 1), "shared", "official")
    tensors[0] = wide.view(1, 1, 2)
    with refused:
        backend.paired_attention(*tensors, None, **options)


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
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="x is on cpu, the kernels run on GPUs"):
        dispatch.select("paired_attention", x, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select("paired_attention", x, backend="triton") == "triton"
    with pytest.raises(RuntimeError, match="dtype torch.int32 is none of"):
        dispatch.select("paired_attention", x.int(), backend="triton")
    monkeypatch.setattr(backend, "missing", lambda: "Triton cannot be imported (broken)")
    with pytest.raises(RuntimeError, match="cannot be imported .broken."):
        dispatch.select("paired_attention", x, backend="triton")
    assert dispatch.select("paired_attention", x) != "triton"
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
    assert any("not run on a GPU yet" in r for r in dispatch.BACKENDS["triton"].why_not_chosen())
