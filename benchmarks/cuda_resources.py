"""What every CUDA kernel takes on every architecture, compiled by nvcc with no GPU.

    python -m benchmarks.cuda_resources               writes results/cuda_resources.csv anew
    python -m benchmarks.cuda_resources --full FILE   also writes a row for each template argument
    python -m benchmarks.cuda_resources --check       says whether the sources still give that table

The table has the most that any template arguments of a kernel take. Of a thread: registers, bytes
of stack and bytes spilled. Of a block: threads and bytes of shared memory that the kernel declares.
The full table adds, of a multiprocessor, the blocks that fit and the share of its warps that is
(occupancy), if a launch asks for no further shared memory. A row's key stands for the sources that
it depends on, so that --check needs no nvcc; the version that compiled is beside it.
"""

import argparse
import csv
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.csv"
FLAGS = "-std=c++17 -fatbin --keep -Xptxas -v -Werror all-warnings"
# The PTX that architectures from 10.0 on and those before are compiled from, as in setup.py.
NEWER, OLDER = "compute_100", "compute_80"
DTYPES = {"float": "float32", "double": "float64", "__nv_bfloat16": "bfloat16", "__half": "float16"}


class Multiprocessor(NamedTuple):
    """What bounds the blocks on one: CUDA C++ Programming Guide, technical specifications."""

    shared: int
    warps: int
    blocks: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * 1024, 64, 32),
    "sm_86": Multiprocessor(100 * 1024, 48, 16),
    "sm_89": Multiprocessor(100 * 1024, 48, 24),
    "sm_90": Multiprocessor(228 * 1024, 64, 32),
    "sm_100": Multiprocessor(228 * 1024, 64, 32),
    "sm_120": Multiprocessor(100 * 1024, 48, 24),
}
ARCHITECTURES = tuple(MULTIPROCESSORS)
REGISTERS, PARTITIONS, REGISTER_UNIT = 65536, 4, 256  # of a multiprocessor; a warp's are multiples
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # of a block, bytes
WARP = 32
# Of the table: what is largest over template arguments, between what says which row it is.
SIZES = "registers", "stack", "spilled", "threads", "shared"
COLUMNS = "architecture", "kernel", *SIZES, "nvcc", "key"


def resident_blocks(architecture: str, registers: int, shared: int, threads: int) -> int:
    """Blocks on a multiprocessor, as cuda_occupancy.h of the toolkit counts them."""

    def up(size: int, unit: int) -> int:
        return -(-size // unit) * unit

    limit, warps = MULTIPROCESSORS[architecture], up(threads, WARP) // WARP
    of_warp = up(registers * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    by_shared = limit.shared // up(shared + SHARED_RESERVED, SHARED_UNIT)
    return min(limit.blocks, limit.warps // warps, by_registers, by_shared)


def files_of(source: Path, seen: set[Path] | None = None) -> list[Path]:
    """A source and all that it includes of csrc."""
    seen = set() if seen is None else seen
    seen.add(source)
    for name in re.findall(r'#include "(.+)"', source.read_text(encoding="utf-8")):
        included = (source.parent / name).resolve()
        if included not in seen and included.exists():  # one is of the tests' emulator
            files_of(included, seen)
    return sorted(seen)


def key(source: Path) -> str:
    """Stands for a source and all that it includes, except their comments."""
    texts = [file.read_text(encoding="utf-8") for file in files_of(source)]
    code = [re.sub(r"\s+", " ", re.sub("//.*", "", text)) for text in texts]
    return hashlib.sha256("\n".join([FLAGS, NEWER, OLDER, *code]).encode()).hexdigest()[:12]


def version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V([\d.]+)", said)[0]


def parameters(source: Path) -> dict[str, list[str]]:
    """{kernel: names of its template parameters} of a source and all that it includes."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in files_of(source))
    heads = re.findall(
        r"template <([^>]*)>\s*__global__ void\s+(?:__launch_bounds__\(.*?\)\s*)?(\w+)\(", code
    )
    return {kernel: [name.split()[-1] for name in names.split(",")] for names, kernel in heads}


def compile_kernels(source: Path, architectures=ARCHITECTURES) -> list[dict[str, str | int]]:
    """Rows of all kernels of a source; a subprocess.CalledProcessError holds what nvcc says."""
    codes = [
        f"-gencode=arch={NEWER if int(name[3:]) >= 100 else OLDER},code={name}"
        for name in architectures
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *shlex.split(FLAGS), *codes, str(source)]
        said = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stderr
        # Of all architectures the same launch bounds.
        ptx = next(Path(folder).glob("*.ptx")).read_text(encoding="utf-8")
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'(?:.*\n)+?.* (\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        said,
    )
    threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx))
    assert found and len(found) == len(threads) * len(architectures), said
    filtered = subprocess.run(
        ["c++filt"], input="\n".join(name for name, *_ in found),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names, rows = parameters(source), []
    for (mangled, architecture, *sizes), name in zip(found, filtered.splitlines(), strict=True):
        [(kernel, arguments)] = re.findall(r"(\w+)<([^>]*)>\(", name)
        dtype, *arguments = arguments.split(", ")
        stack, stores, loads, registers, shared = (int(size or 0) for size in sizes)
        limits = registers, shared, int(threads[mangled])
        blocks = resident_blocks(architecture, *limits)
        warps = blocks * -(-limits[2] // WARP)
        rows.append(
            {
                "architecture": architecture,
                "kernel": kernel.removesuffix("_kernel"),
                "dtype": DTYPES[dtype],
                "arguments": " ".join(
                    map("=".join, zip(names[kernel][1:], arguments, strict=True))
                ),
                "registers": registers,
                "stack": stack,
                "spilled": stores + loads,
                "threads": limits[2],
                "shared": shared,
                "blocks": blocks,
                "occupancy": f"{warps / MULTIPROCESSORS[architecture].warps:.2f}",
                "nvcc": version(),
                "key": key(source),
            }
        )
    return sorted(
        rows,
        key=lambda row: (
            ARCHITECTURES.index(row["architecture"]),
            *(row["kernel"], row["dtype"], len(row["arguments"]), row["arguments"]),
        ),
    )


def most_of_each_kernel(rows: list[dict]) -> list[dict]:
    """Rows of the table from those of all template arguments, in their order."""
    kernels: dict[tuple, dict] = {}
    for row in rows:
        most = kernels.setdefault(
            (row["architecture"], row["kernel"]), {column: row[column] for column in COLUMNS}
        )
        most |= {column: max(most[column], row[column]) for column in SIZES}
    return list(kernels.values())


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check() -> None:
    """Exit with a sentence if the table is not of these sources."""
    found = {(row["architecture"], row["key"]) for row in read()}
    if found != set(product(ARCHITECTURES, map(key, SOURCES))):
        sys.exit(
            f"cuda_resources: {TABLE.name} is of other sources; run "
            f"python -m benchmarks.cuda_resources, which needs nvcc, and commit what it writes."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compile nothing, compare the keys")
    parser.add_argument("--full", type=Path, help="where to write a row for each template argument")
    args = parser.parse_args()
    if args.check:
        return check()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for part in pool.map(compile_kernels, SOURCES) for row in part]
    rows.sort(key=lambda row: ARCHITECTURES.index(row["architecture"]))
    if args.full:
        write(args.full, rows)
    write(TABLE, most_of_each_kernel(rows))


if __name__ == "__main__":
    main()
