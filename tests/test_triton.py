"""The Triton kernels, in Triton's interpreter: memory, order of programs, launches, imports.

That they compute what the spec does is tested where every backend is.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import KINDS, LAYOUTS, make_layer, run_layer

from epa_kernels import dispatch
from epa_kernels import triton as backend

pytest.importorskip("triton", reason="needs the package triton")

from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402

# Both plans; layouts that are projected on the spot and through memory.
SHAPES = {"rows": (2, 160, 32, 2, 9), "flat": (1, 130, 40, 2, 5), "direct": (2, 20, 24, 3, 5)}
GUARD = 64  # elements of NaN on each side of a buffer


class Guards:
    """Allocate every tensor filled with NaN and between NaN, and see that those stay."""

    def __init__(self, monkeypatch):
        self.buffers = []
        self._empty = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch, "empty_like", lambda t, **_: self.like(t))
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda t, *a, **k: self.new_empty(t, *a, **k)
        )

    def empty(self, *shape, dtype=torch.float32, device=None):
        shape = shape[0] if shape and isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return self._take(shape, torch.Size(shape).numel(), dtype)

    def new_empty(self, t, *shape, dtype=None, device=None):
        return self.empty(*shape, dtype=dtype or t.dtype)

    def like(self, t):
        return self._take(t.shape, t.numel(), t.dtype).as_strided(t.shape, t.stride())

    def copy(self, t):
        return None if t is None else self.like(t).copy_(t)

    def _take(self, shape, count, dtype):
        if not count or not dtype.is_floating_point:  # the interpreter's own
            return self._empty(shape, dtype=dtype)
        buffer = self._empty(count + 2 * GUARD, dtype=dtype).fill_(float("nan"))
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(shape)

    def check(self):
        assert self.buffers
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


def ops_arguments(shape, kind, layout, dtype=torch.float32):
    B, N, C, H, _ = shape
    layer = make_layer(shape, kind, layout).to(dtype)
    weights = dict(layer.named_parameters())

    def pair(name):
        return weights.get(f"{name}.weight"), weights.get(f"{name}.bias")

    projection = (layer.EF.t(), None) if kind == "sum" else pair("E")
    x = torch.randn(B, N, C, dtype=dtype, generator=torch.Generator().manual_seed(1))
    tensors = (x, *pair("qkvv"), *projection, *pair("F"), layer.temperature, layer.temperature2,
               *pair("out_proj"), *pair("out_proj2"))  # fmt: skip
    options = {"num_heads": H, "kind": kind, "layout": layout,
               "channel_dropout_p": 0.1, "spatial_dropout_p": 0.2}  # fmt: skip
    return [None if t is None else t.detach() for t in tensors], options


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nothing_is_touched_outside_and_everything_written(shape, kind, layout, monkeypatch):
    """Reads outside would bring NaN into a result, and what is not written would be NaN."""
    tensors, options = ops_arguments(shape, kind, layout)
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


@pytest.mark.parametrize("name", ("spatial_attention", "channel_attention"))
def test_nothing_is_touched_outside_the_other_ops(name, monkeypatch):
    q, k, v, dout = torch.randn(4, 2, 130, 2, 5, generator=torch.Generator().manual_seed(1))
    options = {"dropout_p": 0.2} | ({"normalize": True} if name.startswith("spatial") else {})
    temperature, seed = torch.ones(2), torch.tensor(3)
    forward, backward = getattr(backend, name), getattr(backend, f"{name}_bwd")
    results = []
    for guarded in (False, True):
        with monkeypatch.context() as patch:
            guards = Guards(patch) if guarded else None
            tensors = [guards.copy(t) if guarded else t for t in (dout, q, k, v)]
            out, *kept = forward(*tensors[1:], temperature, seed, **options)
            results.append((out, *kept, *backward(*tensors, temperature, *kept, seed, **options)))
    guards.check()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_programs_may_run_in_any_order(shape, monkeypatch):
    """On a GPU they do: no program may read what another one of its launch writes."""
    layer = make_layer(shape, dropout=0.2)
    x, gy = torch.randn(2, *shape[:3], generator=torch.Generator().manual_seed(7)).unbind(0)
    first = run_layer(layer, x, gy, backend="triton", dtype=torch.float32)
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

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shuffled)
    second = run_layer(layer, x, gy, backend="triton", dtype=torch.float32)
    assert moved > 10
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_columns_in_several_blocks(kind):
    """C beyond one block: sums of the output pass's backward are split over programs."""
    shape = (1, 70, 144, 2, 5)
    layer = make_layer(shape, kind)
    x, gy = torch.randn(2, *shape[:3], generator=torch.Generator().manual_seed(7)).unbind(0)
    exact, found = (
        run_layer(layer, x, gy, backend=name, dtype=torch.float64)
        for name in ("reference", "triton")
    )
    for name, truth in exact.items():
        assert (found[name] - truth).abs().max() <= 1e-11 * truth.abs().max(), name


# (forward, backward): one more forward where the result of one program needs all tokens of another.
LAUNCHES = {
    ("rows", "shared", "official"): (4, 6),
    ("rows", "split", "tokens"): (4, 6),
    ("rows", "sum", "tokens"): (4, 6),
    ("rows", "sum", "official"): (5, 6),
    ("flat", "shared", "official"): (5, 7),
    ("direct", "shared", "tokens"): (4, 8),
}


@pytest.mark.parametrize("case", LAUNCHES, ids="-".join)
def test_number_of_launches(case, monkeypatch):
    name, kind, layout = case
    tensors, options = ops_arguments(SHAPES[name], kind, layout)
    count, run = 0, InterpretedFunction.run

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)

    seed = torch.tensor(3)
    y, *kept = backend.paired_attention(*tensors, seed, **options)
    forward, count = count, 0
    backend.paired_attention_bwd(torch.ones_like(y), *tensors, *kept, seed, **options)
    assert (forward, count) == LAUNCHES[case]


@pytest.mark.parametrize("architecture", ("sm_80", "sm_90"))
def test_compiles_without_spills_and_for_tensor_cores(architecture, tmp_path):
    """With no GPU, what the launches of a stage 1 layer would compile in bfloat16."""
    script = Path(__file__).parents[1] / "benchmarks" / "triton_resources.py"
    table, options = tmp_path / "table.csv", ("synapse/stage1", "--dtype", "bfloat16")
    subprocess.run(
        [sys.executable, script, "--architecture", architecture, "--layer", *options,
         "--output", table],
        env=os.environ | {"TRITON_INTERPRET": "0"}, check=True,
    )  # fmt: skip
    kernels = {row["kernel"]: row for row in csv.DictReader(table.open())}
    assert len(kernels) == 9
    for name, row in kernels.items():
        assert int(row["spilled"]) == 0 and int(row["shared"]) <= 48 * 1024, row
        if name in ("summary", "output", "output_backward", "summary_backward"):
            assert int(row["tensor_core"]) > 0, row


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
    assert any("not run on a GPU yet" in r for r in dispatch.BACKENDS["triton"].why_not_chosen())
