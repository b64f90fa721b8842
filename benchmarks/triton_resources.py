"""What every Triton kernel takes on every architecture, compiled with no GPU.

    python benchmarks/triton_resources.py --architecture sm_90 --dtype bfloat16 --output table.csv

Each launch of the ops at the published shapes is compiled as it would be on the device: registers
and bytes spilled a thread, shared memory a block, and how many tensor-core instructions there are.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

CUDA = (80, 86, 89, 90, 100, 120)
ARCHITECTURES = (*(f"sm_{arch}" for arch in CUDA), "gfx942")
# N, C, H, P, kind of one layer of each stage, and of shapes that no published network has.
LAYERS = {
    "synapse/stage1": (32768, 32, 4, 64, "shared"),
    "synapse/stage2": (4096, 64, 4, 64, "shared"),
    "synapse/stage3": (512, 128, 4, 64, "shared"),
    "synapse/stage4": (64, 256, 4, 32, "shared"),
    "acdc/stage1": (25600, 32, 4, 64, "split"),
    "acdc/stage3": (400, 128, 4, 64, "split"),
    "lung/stage3": (1152, 128, 4, 64, "split"),
    "tumor/stage1": (32768, 32, 4, 64, "sum"),
    "tumor/stage4": (64, 256, 4, 32, "sum"),
}
DTYPES = ("bfloat16", "float16", "float32")
TENSOR_CORES = r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b|v_mfma"


class _Driver:
    """Stands in for a device of one architecture."""

    def __init__(self, architecture):
        from triton.backends.compiler import GPUTarget

        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device=None):
        return 0


def _tool(name):
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(kernel) -> dict[str, int]:
    """registers, spilled bytes (a thread), shared bytes (a block), tensor-core instructions."""
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        count = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        }
        registers, spilled = count["vgpr_count"], count["private_segment_fixed_size"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [_tool("cuobjdump"), "--dump-resource-usage", file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            code = subprocess.run(
                [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
        registers, stack, local = map(int, found.groups())
        spilled = stack + local
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "tensor_core": len(re.findall(TENSOR_CORES, code)),
    }


def compiled(architecture: str, layer: str, dtype: str, dropout: float = 0.1) -> dict[str, object]:
    """Kernel's name -> what Triton compiled, for forward and backward of one layer."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from epa_kernels.triton import paired

    N, C, H, P, kind = LAYERS[layer]
    x = torch.empty(2, N, C, dtype=getattr(torch, dtype))
    size, split, concat = torch.empty, kind == "split", kind != "sum"
    inputs = (
        x, size(4 * C, C), None, size(P, N), size(P) if concat else None,
        size(P, N) if split else None, size(P) if split else None, size(H), size(H),
        *((size(C // 2, C), size(C // 2)) * 2 if concat else (None,) * 4),
    )  # fmt: skip
    seed = torch.tensor(0)
    options = {"num_heads": H, "kind": kind, "layout": "official",
               "channel_dropout_p": dropout, "spatial_dropout_p": dropout}  # fmt: skip
    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(_Driver(architecture))
    with mock.patch.object(JITFunction, "run", compile_only):
        y, *kept = paired.forward(*inputs, seed, **options)
        paired.backward(y, *inputs, *kept, seed, **options)
    return kernels


def rows(architectures, layers, dtypes):
    for architecture in architectures:
        for layer in layers:
            for dtype in dtypes:
                for name, kernel in compiled(architecture, layer, dtype).items():
                    yield {
                        "architecture": architecture, "layer": layer, "dtype": dtype,
                        "kernel": name, **resources(kernel),
                    }  # fmt: skip


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit(
            "triton_resources: TRITON_INTERPRET must not be 1, the interpreter compiles nothing."
        )
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--layer", nargs="*", default=tuple(LAYERS), choices=LAYERS)
    parser.add_argument("--dtype", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--output", type=Path, required=True, help="the table, a CSV file")
    args = parser.parse_args()
    table = list(rows(args.architecture, args.layer, args.dtype))
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
