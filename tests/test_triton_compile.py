"""The Triton kernels through its compiler, without a GPU, and the table of what they take."""

import ast
import subprocess
import sys

import pytest
from cases import CHILD_ENVIRONMENT, ROOT

pytest.importorskip("triton", "3.6", reason="needs the package triton, 3.6 or later")

COMPILING = CHILD_ENVIRONMENT | {"TRITON_INTERPRET": "0"}
# Kernels whose products are large: those of 16 bits must run on tensor cores.
LARGE_PRODUCTS = (
    "paired_summary_fwd", "paired_output_fwd", "paired_output_bwd", "paired_summary_bwd",
)  # fmt: skip


@pytest.fixture(scope="module")
def resources():
    from benchmarks import triton_resources

    return triton_resources


def compiling(code):
    """What code prints that has benchmarks/triton_resources.py as `r`, where Triton compiles."""
    head = "import json, sys\nfrom benchmarks import triton_resources as r\n"
    return subprocess.run(
        [sys.executable, "-c", head + code], env=COMPILING, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip


def test_every_launch_fits_every_architecture(resources):
    """No published layer spills, the shared memory is there, large products use tensor cores.

    The table says what compiling gave; the next tests show that it is of these sources, and true.
    """
    rows = resources.read(resources.TABLE)
    assert {row["architecture"] for row in rows} == set(resources.ARCHITECTURES)
    for row in rows:
        assert row["shared"] <= resources.SHARED_LIMITS[row["architecture"]], row
        assert row["spilled"] == 0, row
        assert row["tensor_core"] > 0 or row["kernel"] not in LARGE_PRODUCTS, row


@pytest.fixture
def pinned_triton():
    """Skip what holds for the version of Triton that the table is of alone."""
    import triton

    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pinned,) = (line for line in constraints if line.startswith("triton=="))
    if pinned != f"triton=={triton.__version__}":
        pytest.skip(f"the table is of {pinned}, here is {triton.__version__}")


def test_resources_are_of_these_sources(resources, pinned_triton):
    """A change shows in review: python -m benchmarks.triton_resources writes the table anew."""
    head = resources.TABLE.read_text(encoding="utf-8").partition("\n")[0]
    assert head == f"# {resources.header()}"


@pytest.mark.exhaustive
def test_resources_are_of_these_launches(pinned_triton):
    compiling("sys.argv.append('--check'); r.main()")


# Of every architecture one kernel: together those with the most to lose, and every op.
COMPILED = {
    "sm_80": "paired_mix_bwd", "sm_86": "paired_output_bwd", "sm_89": "spatial_output_bwd",
    "sm_90": "paired_summary_bwd", "sm_100": "channel_output_bwd", "sm_120": "paired_output_fwd",
    "gfx942": "paired_gather_bwd",
}  # fmt: skip


@pytest.mark.parametrize(
    "kernels", (COMPILED, pytest.param({}, id="all", marks=pytest.mark.exhaustive))
)
def test_resources_are_what_compiling_gives(kernels, pinned_triton):
    """The widest launch of each kernel, of sm_90 all kernels, else one in four."""
    code = f"""
kernels, compiled = {kernels!r}, 0
for i, row in enumerate(r.read(r.TABLE)):
    architecture, kernel = row["architecture"], row["kernel"]
    if kernels and kernel != kernels[architecture]:
        continue
    if not kernels and architecture != "sm_90" and i % 4:
        continue
    layer, dtype = row["widest"].split()
    found = [
        r.resources(launch.compile(architecture))
        for launch in r.launches(architecture, r.LAYERS[layer], dtype)
        if launch.kernel.__name__ == kernel
    ]
    compiled += 1
    assert max(f["registers"] for f in found) == row["registers"], (row, found)
    for f in found:
        assert f["shared"] <= row["shared"], (row, f)
        spilled = "spilled_beyond" if layer in r.MAY_SPILL else "spilled"
        assert f["spilled"] <= row[spilled], (row, f)
print(compiled)
"""
    assert int(compiling(code)) >= (len(COMPILED) if kernels else 50)


def test_the_smallest_dropout_rate_compiles():
    """It drops one in 65536: an argument of 1 is a constant to the compiler."""
    names = ["paired_output_fwd", "paired_mix_fwd", "spatial_output_fwd", "channel_mix_fwd"]
    code = f"""
layers = (r.LAYERS["synapse/stage1"], r.LAYERS["heads/stage1"])
calls = [c for layer in layers for c in r.launches("sm_90", layer, "bfloat16", dropout=1 / 65536)]
first = {{c.kernel.__name__: c for c in reversed(calls)}}
print([name for name in {names} if first[name].compile("sm_90")])
"""
    assert ast.literal_eval(compiling(code)) == names


PRECISIONS = (
    ("pass", ("ieee", "tf32x3", "ieee")),
    ("torch.set_float32_matmul_precision('high')", ("tf32x3", "tf32x3", "ieee")),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", ("tf32x3", "tf32x3", "ieee")),
    ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", ("ieee", "tf32x3", "ieee")),
)


def test_float32_products_follow_the_setting_of_torch():
    """A process for each setting, forked, since torch refuses the old one after the new one."""
    code = f"""
import os
import torch
from epa_kernels.backends.triton.launch import precision
x, y = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)
for setting in {[setting for setting, _ in PRECISIONS]}:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    exec(setting)
    print((precision(x), precision(y), precision(x, "paired_output_bwd")), flush=True)
    os._exit(0)
"""
    found = compiling(code).splitlines()
    assert [ast.literal_eval(line) for line in found] == [expected for _, expected in PRECISIONS]
