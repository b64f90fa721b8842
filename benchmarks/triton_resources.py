"""What every Triton kernel takes on every architecture, compiled with no GPU.

    python -m benchmarks.triton_resources               writes results/triton_resources.csv anew
    python -m benchmarks.triton_resources --full FILE   writes FILE too, a row for every launch
    python -m benchmarks.triton_resources --check       says whether the sources still give it

Each launch of the ops at the layers below is compiled as it would be on the device. The table has a
row for each architecture and kernel, over all its launches: the most registers and the most bytes
spilled by a thread, the most shared memory of a block, and the fewest tensor-core instructions of
launches in 16 bits. Layers of MAY_SPILL spill apart, in spilled_beyond. A launch that several
layers share counts once.

A launch has a key, a hash of all that it depends on: sources, compile-time arguments, architecture,
version of Triton. A row's keys are a hash of its launches' keys. So --check need not compile, and a
row or a launch in FILE is compiled again only where its key is another one.
"""

import argparse
import ast
import csv
import functools
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# Shared memory that a block may take, bytes; AMD calls it local data share.
SHARED_LIMITS = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
ARCHITECTURES = tuple(SHARED_LIMITS)
DTYPES = ("bfloat16", "float16", "float32", "tf32", "float64")  # tf32: see `multiplying`
BLOCKS = ("T", "BM", "BC", "BP", "num_warps", "num_stages")
RESOURCES = ("registers", "spilled", "shared", "tensor_core")
LAUNCH = ("architecture", "layer", "dtype", "pass", "kernel", *BLOCKS, *RESOURCES, "key")
SUMMARY = ("architecture", "kernel", "launches", "registers", "spilled", "spilled_beyond", "shared",
           "tensor_core", "widest", "keys")  # fmt: skip
NUMBERS = {*RESOURCES, "launches", "spilled_beyond"}
TABLE = Path(__file__).parent / "results" / "triton_resources.csv"
KERNELS = Path(__file__).parents[1] / "epa_kernels" / "backends" / "triton"
TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b|v_mfma"


class Layer(NamedTuple):
    """A layer of paired attention."""

    tokens: int
    channels: int
    heads: int
    projected: int
    kind: str
    layout: str = "official"


# Published stages, each with another (head dim, projected tokens) or another kind; then the other
# layout, and shapes that no published network has.
LAYERS = {
    "synapse/stage1": Layer(32768, 32, 4, 64, "shared"),
    "synapse/stage2": Layer(4096, 64, 4, 64, "shared"),
    "synapse/stage3": Layer(512, 128, 4, 64, "shared"),
    "synapse/stage4": Layer(64, 256, 4, 32, "shared"),
    "acdc/stage1": Layer(25600, 32, 4, 64, "split"),
    "acdc/stage3": Layer(400, 128, 4, 64, "split"),
    "tumor/stage1": Layer(32768, 32, 4, 64, "sum"),
    "tumor/stage4": Layer(64, 256, 4, 32, "sum"),
    "tokens/stage1": Layer(32768, 32, 4, 64, "shared", "tokens"),
    "tokens/stage4": Layer(64, 256, 4, 32, "shared", "tokens"),
    "heads/stage1": Layer(32768, 32, 4, 64, "heads"),
    "heads/stage3": Layer(512, 128, 4, 64, "heads"),
    "heads/stage4": Layer(64, 256, 4, 32, "heads"),
    "segformer3d/stage1": Layer(32768, 32, 1, 512, "unnormalised"),
    "segformer3d/stage4": Layer(64, 256, 8, 64, "unnormalised"),
    "D15": Layer(4096, 60, 4, 64, "shared"),
    "D24": Layer(4096, 96, 4, 64, "shared"),
    "D128": Layer(4096, 512, 4, 64, "shared"),
    "P512": Layer(4096, 32, 4, 512, "shared"),
    "D64-P512": Layer(4096, 256, 4, 512, "shared"),
    "D128-P512": Layer(4096, 512, 4, 512, "shared"),
    "heads-D128": Layer(4096, 512, 4, 64, "heads"),
    "heads-D128-P512": Layer(4096, 512, 4, 512, "heads"),
}
# Of these, which no published network has, a launch must fit but may spill.
MAY_SPILL = ("D128", "D64-P512", "D128-P512", "heads-D128", "heads-D128-P512")

Row = dict[str, Any]  # of a table, numbers as int


class Launch(NamedTuple):
    """A kernel as the ops launch it."""

    direction: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def compile(self, architecture: str) -> Any:
        """What Triton makes of it for an architecture."""
        with device(architecture):
            return self.kernel.run(*self.arguments, grid=(1,), warmup=True, **self.constants)

    def key(self, architecture: str) -> str:
        """Stands for all that the result of `compile` depends on."""
        import triton

        parts = [triton.__version__, architecture, code(self.kernel)]
        parts += [_specialized(value) for value in self.arguments]
        parts += [f"{name}={value}" for name, value in sorted(self.constants.items())]
        return digest(parts)


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@functools.cache
def code(kernel: Any) -> str:
    return "\n".join(sources(kernel))


def sources(kernel: Any, seen: set[str] | None = None) -> Iterator[str]:
    """Code of a kernel and of all it calls, without comments and docstrings; its constants."""
    import triton.language as tl
    from triton.runtime.jit import JITCallable

    seen = set() if seen is None else seen
    seen.add(kernel.__name__)
    tree = ast.parse(kernel.src)
    yield undocumented(tree)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - seen
    for name in sorted(names):
        value = kernel.fn.__globals__.get(name)
        if isinstance(value, JITCallable):
            yield from sources(value, seen)
        elif isinstance(value, tl.constexpr):
            yield f"{name} = {value.value}"


def undocumented(tree: ast.AST) -> str:
    """The code of a tree without comments and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def fingerprint() -> str:
    """A hash of the sources of kernels and launches and of this file: a cheap `check`.

    Python 3.12 writes other quotes inside f-strings than 3.11.
    """
    others = ("__init__.py", "interpreter.py")
    files = [file for file in sorted(KERNELS.glob("*.py")) if file.name not in others]
    files.append(Path(__file__))
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return digest(undocumented(tree).replace('"', "'") for tree in trees)


def _specialized(value: Any) -> str:
    """What a run-time argument changes in the compiled code."""
    if hasattr(value, "data_ptr"):
        return f"{value.dtype}, aligned {value.data_ptr() % 16 == 0}"
    if isinstance(value, int):
        return f"one {value == 1}, multiple of 16 {value % 16 == 0}, wide {value >= 2**31}"
    return repr(value)


class _Driver:
    """Stands in for a device of one architecture."""

    def __init__(self, architecture: str) -> None:
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


@contextmanager
def device(architecture: str) -> Iterator[None]:
    """Kernels are compiled for an architecture, and the launches are shaped for it."""
    import triton

    from epa_kernels.backends.triton import launch

    triton.runtime.driver.set_active(_Driver(architecture))
    with mock.patch.object(launch, "architecture", lambda _: architecture):
        yield


@contextmanager
def multiplying(dtype: str) -> Iterator[Any]:
    """The dtype of the tokens; "tf32" is float32 under torch's float32_matmul_precision "high"."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def launches(architecture: str, layer: Layer, dtype: str, dropout: float = 0.1) -> list[Launch]:
    """Every launch of forward and backward of a layer, with dropout, B = 2 and no qkvv bias.

    Of kind "heads": of the two other ops, on heads of that shape. Of kind "unnormalised": of
    spatial attention as siblings of UNETR++ have it, without a norm of q and dropout.
    """
    import torch
    from triton.runtime.jit import JITFunction

    from epa_kernels.backends.triton import channel, paired, spatial

    N, C, H, P, kind, layout = layer
    size, split, concat = torch.empty, kind == "split", kind != "sum"
    weights = (
        size(4 * C, C), None, size(P, N), size(P) if concat else None,
        size(P, N) if split else None, size(P) if split else None, size(H), size(H),
        *((size(C // 2, C), size(C // 2)) * 2 if concat else (None,) * 4),
    )  # fmt: skip
    seed = torch.tensor(0)
    options = {"num_heads": H, "kind": kind, "layout": layout,
               "channel_dropout_p": dropout, "spatial_dropout_p": dropout}  # fmt: skip
    found, direction = [], "forward"

    def record(kernel, *arguments, grid, warmup, **named):
        named |= zip(kernel.arg_names, arguments, strict=False)
        names = (p.name for p in kernel.params if not p.is_constexpr)
        found.append(Launch(direction, kernel, tuple(named.pop(n) for n in names), named))

    patch = mock.patch.object(JITFunction, "run", record)
    with device(architecture), multiplying(dtype) as tokens_dtype, patch:
        x = size(2, N, C, dtype=tokens_dtype)
        if kind in ("heads", "unnormalised"):
            normalize = kind == "heads"
            q, t = x.view(2, N, H, C // H), size(H, 1, 1)
            k_proj = q.new_empty(2, P, H, C // H)
            rate = {"dropout_p": dropout if normalize else 0.0}
            _, norm = spatial.forward(q, k_proj, k_proj, t, seed, normalize=normalize, **rate)
            if normalize:
                _, gram, q_norm, k_norm = channel.forward(q, q, q, t, seed, **rate)
            direction = "backward"
            spatial.backward(q, q, k_proj, k_proj, t, norm, seed, normalize=normalize, **rate)
            if normalize:
                channel.backward(q, q, q, q, t, gram, q_norm, k_norm, seed, **rate)
            return found
        y, *kept = paired.forward(x, *weights, seed, **options)
        direction = "backward"
        paired.backward(y, x, *weights, *kept, seed, **options)
    return found


def resources(binary) -> dict[str, int]:
    """registers, spilled bytes (a thread), shared bytes (a block), tensor-core instructions.

    Of NVIDIA's compiler what it reports: a word that it parks in memory to stay within a multiple
    of registers is no spill to it.
    """
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{name}:\s*(\d+)", code)[0])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        from triton.backends.nvidia.compiler import get_ptxas

        code = binary.asm["ptx"]
        (target,) = re.findall(r"\.target (\w+)", code)
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(code)
            file.flush()
            said = subprocess.run(
                [get_ptxas(binary.metadata.target.arch).path, "-v", "--regAllocOptLevel=2",
                 f"--gpu-name={target}", file.name, "-o", os.devnull],
                capture_output=True, text=True, check=True,
            ).stderr  # fmt: skip
        (registers,) = map(int, re.findall(r"Used (\d+) registers", said))
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": binary.metadata.shared,
        "tensor_core": len(re.findall(TENSOR_CORES, code)),
    }


def is_needed(architecture: str, layer: str, dtype: str) -> bool:
    """Published layers on all architectures; else the H100, and those with the least memory."""
    if dtype == "float64":  # where it hardly fits
        return architecture == "sm_90" and "D128" in layer
    # float16 has the size of bfloat16: the stages of one network are enough.
    if "/" in layer and (dtype != "float16" or layer.startswith("synapse/")):
        return True
    return architecture in ("sm_90", "sm_86", "gfx942")


def needed(
    architectures: Iterable[str] = ARCHITECTURES,
    layers: Iterable[str] = tuple(LAYERS),
    dtypes: Iterable[str] = DTYPES,
) -> dict[str, tuple[Row, Launch]]:
    """{key: (row without resources, launch)} of every launch that differs from those before it."""
    found: dict[str, tuple[Row, Launch]] = {}
    for architecture in architectures:
        for layer in layers:
            for dtype in dtypes:
                if not is_needed(architecture, layer, dtype):
                    continue
                for launch in launches(architecture, LAYERS[layer], dtype):
                    blocks = {name: launch.constants.get(name, "") for name in BLOCKS}
                    row = {
                        "architecture": architecture, "layer": layer, "dtype": dtype,
                        "pass": launch.direction, "kernel": launch.kernel.__name__, **blocks,
                    }  # fmt: skip
                    found.setdefault(launch.key(architecture), (row, launch))
    return found


def read(path: Path) -> list[Row]:
    """The rows of a table that `write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = (line for line in file if not line.startswith("#"))
        return [
            {name: int(v) if name in NUMBERS else v for name, v in row.items()}
            for row in csv.DictReader(lines)
        ]


def write(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {header()}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def header() -> str:
    """The first line of a table: what it was generated by and from."""
    version = importlib.metadata.version("triton")
    return (
        f"generated by python -m benchmarks.triton_resources with triton {version} "
        f"from sources {fingerprint()}"
    )


def summarise(rows: list[Row]) -> Row:
    """The row of an architecture and kernel, over the rows of its launches."""

    def most(name: str, among: list[Row]) -> int:
        return max((row[name] for row in among), default=0)

    halves = [row["tensor_core"] for row in rows if row["dtype"] in ("bfloat16", "float16")]
    widest = max(rows, key=lambda row: row["registers"])
    return {
        "architecture": rows[0]["architecture"],
        "kernel": rows[0]["kernel"],
        "launches": len(rows),
        "registers": widest["registers"],
        "spilled": most("spilled", [row for row in rows if row["layer"] not in MAY_SPILL]),
        "spilled_beyond": most("spilled", [row for row in rows if row["layer"] in MAY_SPILL]),
        "shared": most("shared", rows),
        "tensor_core": min(halves, default=0),
        "widest": f"{widest['layer']} {widest['dtype']}",
        "keys": digest(sorted(row["key"] for row in rows)),
    }


def by_kernel(architecture: str) -> dict[str, dict[str, tuple[Row, Launch]]]:
    """{kernel: {key: (row without resources, launch)}} of one architecture."""
    found: dict[str, dict[str, tuple[Row, Launch]]] = {}
    for key, (row, launch) in needed([architecture]).items():
        found.setdefault(row["kernel"], {})[key] = row, launch
    return found


def stale() -> list[str]:
    """Architecture and kernel of each row of the table that the sources do not give."""
    expected = {
        (architecture, kernel): digest(sorted(group))
        for architecture in ARCHITECTURES
        for kernel, group in by_kernel(architecture).items()
    }
    found = {(row["architecture"], row["kernel"]): row["keys"] for row in read(TABLE)}
    return sorted(" ".join(pair) for pair, _ in expected.items() ^ found.items())


def compiled(
    architecture: str, summaries: dict[str, Row], known: dict[str, Row]
) -> tuple[list[Row], list[Row]]:
    """The rows of an architecture: of kernels, and of launches where no summary has their keys.

    Args:
        summaries: keys of a row -> the row; its launches are not compiled.
        known: key -> row of a launch, which is not compiled.
    """
    table, rows = [], []
    for group in by_kernel(architecture).values():
        summary = summaries.get(digest(sorted(group)))
        if summary is None:
            launches_of_kernel = []
            for key, (row, launch) in group.items():
                # A known row may be of another layer.
                taken = known.get(key) or resources(launch.compile(architecture))
                launches_of_kernel.append(row | {n: taken[n] for n in RESOURCES} | {"key": key})
            rows += launches_of_kernel
            summary = summarise(launches_of_kernel)
        table.append(summary)
    return table, rows


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit(
            "triton_resources: TRITON_INTERPRET must not be 1, the interpreter compiles nothing."
        )
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compile nothing, compare the keys")
    parser.add_argument("--full", type=Path, metavar="FILE", help="write every launch, too")
    args = parser.parse_args()
    if args.check:
        if rows := stale():
            sys.exit(
                f"triton_resources: {len(rows)} rows of {TABLE.name} are of other sources or "
                f"another Triton ({', '.join(rows[:3])}, ...); run "
                f"python -m benchmarks.triton_resources and commit what it writes."
            )
        return
    known = {row["key"]: row for row in read(args.full)} if args.full and args.full.exists() else {}
    # Where every launch is to be written, the summaries do not save the compiling.
    old = {} if args.full or not TABLE.exists() else {row["keys"]: row for row in read(TABLE)}
    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(compiled, ARCHITECTURES, repeat(old), repeat(known)))
    write(TABLE, SUMMARY, [row for table, _ in parts for row in table])
    if args.full:
        write(args.full, LAUNCH, [row for _, rows in parts for row in rows])


if __name__ == "__main__":
    main()
