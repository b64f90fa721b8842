"""The CUDA kernels under compute-sanitizer, which comes with the CUDA toolkit.

    memcheck    accesses out of bounds or misaligned
    racecheck   accesses to shared memory that no barrier orders
    synccheck   barriers that not all threads reach

Each checks one process, `python -m benchmarks.gpu_check.sanitizer DEVICE BACKEND`, that runs every op forward
and backward on small shapes. Kernels of others are left alone. In a dry run nothing checks it.
"""

import functools
import os
import shutil
import subprocess
import sys

import torch

import epa_kernels
from epa_kernels import dispatch
from epa_kernels.contract import call_on
from epa_kernels.testing import make_layer

from .steps import Skipped

CHECKS = ("memcheck", "racecheck", "synccheck")
TOOL, KERNELS = "compute-sanitizer", "kns=_attention_"  # a part of every kernel's name
# B, N, C, H, P: D = 16, 8 and 64 have kernels of their own in low precision, whole rows of the
# official layout and several tiles a block among them; D = 20 takes the generic ones.
SETTINGS = (
    (torch.bfloat16, (2, 131, 32, 2, 33)),
    (torch.bfloat16, (1, 4224, 32, 4, 64)),
    (torch.float16, (2, 64, 256, 4, 32)),
    (torch.float32, (1, 67, 40, 2, 67)),
)
LAST_LINES = 30


def find_tool():
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ["PATH"], *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which(TOOL, path=os.pathsep.join(folders))


def check(name, kind, dry_run):
    """Run a check; an error holds what it reports."""
    command, backend = [], "two_pass" if dry_run else "cuda"
    if not dry_run:
        q = torch.empty(1, 1, 1, 16, device=kind)
        if reasons := dispatch.BACKENDS[backend].why_not(call_on("spatial_attention", q)):
            raise Skipped("; ".join(reasons))
        if find_tool() is None:
            raise Skipped(f"{TOOL} is neither on the PATH nor in CUDA_HOME")
        command = [find_tool(), "--tool", name, "--error-exitcode", "1", "--kernel-regex", KERNELS]
    # Each tensor an allocation of its own, whose end is known.
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu_check.sanitizer", kind, backend],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not (dry_run or any("SUMMARY: 0" in line for line in lines)):
        raise RuntimeError("\n".join(lines[-LAST_LINES:]))
    return {"ran": [line for line in lines if "_attention, " in line]}


def items(device, dry_run):
    """(key, function) of each check, for `steps`."""
    for name in CHECKS:
        yield name, functools.partial(check, name, device.kind, dry_run)


def forward(op, layer, x):
    """An op on a layer's tokens, or on heads of the same shape."""
    if op == "paired_attention":
        return layer(x)
    q, temperature = x.unflatten(2, (layer.num_heads, -1)), layer.temperature.to(x.dtype)
    options = {"dropout_p": 0.2, "backend": layer.backend}
    if op == "channel_attention":
        return epa_kernels.channel_attention(q, q, q, temperature, **options)
    k = q[:, : layer.E.out_features]
    return epa_kernels.spatial_attention(q, k, k, temperature, normalize=True, **options)


def run_ops(kind, backend):
    """What is checked: every op that the backend has; names those that ran."""
    for dtype, shape in SETTINGS:
        layer = make_layer(shape, dropout=0.2).float()
        layer.backend = backend
        x = torch.randn(shape[:3], device=kind, dtype=dtype, requires_grad=True)
        for op in dispatch.OPS:
            if not dispatch.BACKENDS[backend].why_not(call_on(op, x)):
                forward(op, layer, x).sum().backward()
                print(f"{op}, {dtype}, {shape}")


if __name__ == "__main__":
    run_ops(*sys.argv[1:])
