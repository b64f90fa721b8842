"""The CUDA kernels through nvcc, without a GPU, and the table of what they take."""

import random
import shutil
import subprocess
from itertools import product

import pytest

from benchmarks import cuda_resources
from benchmarks.cuda_resources import ARCHITECTURES, MULTIPROCESSORS, SOURCES

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
TABLE = cuda_resources.read()


def test_the_table_is_of_these_sources_and_no_kernel_spills():
    cuda_resources.check()
    assert {row["kernel"] for row in TABLE} >= {
        "spatial_attention_output_fwd_mma",
        "channel_attention_gram",
    }
    assert not [row for row in TABLE if row["spilled"] != "0"]


def test_a_key_stands_for_the_code_of_all_that_is_included(tmp_path):
    folder = tmp_path / "csrc"
    shutil.copytree(SOURCES[0].parents[1], folder)
    source, header = folder / "cuda" / SOURCES[0].name, folder / "philox.h"
    text, first = header.read_text(encoding="utf-8"), cuda_resources.key(source)
    header.write_text("// A word.\n" + text, encoding="utf-8")
    assert cuda_resources.key(source) == first
    header.write_text("int word;\n" + text, encoding="utf-8")
    assert cuda_resources.key(source) != first


def compiled_again(source):
    """The H100, and the next in turn with every change of the sources."""
    others = [name for name in ARCHITECTURES if name != "sm_90"]
    return "sm_90", others[int(cuda_resources.key(source), 16) % len(others)]


@needs_nvcc
@pytest.mark.exhaustive
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_warnings_and_take_what_the_table_says(source):
    """On two architectures; the table's keys stand for the sources of all six."""
    architectures = compiled_again(source)
    try:
        rows = cuda_resources.compile_kernels(source, architectures)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)
    assert not [row for row in rows if row["spilled"]]
    rows = cuda_resources.most_of_each_kernel(rows)
    key, version = rows[0]["key"], rows[0]["nvcc"]
    table = [r for r in TABLE if r["architecture"] in architectures and r["key"] == key]
    if table and table[0]["nvcc"] == version:
        assert [{k: str(v) for k, v in row.items()} for row in rows] == table


OCCUPANCY = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, shared, warps, registers, own, threads;
  while (scanf("%d %d %d %d %d %d %d", &major, &minor, &shared, &warps, &registers, &own,
               &threads) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerMultiprocessor = shared;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerBlockOptin = shared - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 100;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = own;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0)) {
      puts("error");
      continue;
    }
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
def test_blocks_of_a_multiprocessor_are_those_of_the_occupancy_calculator(tmp_path):
    (tmp_path / "occupancy.cu").write_text(OCCUPANCY, encoding="utf-8")
    program = tmp_path / "occupancy"
    subprocess.run(["nvcc", program.with_suffix(".cu"), "-o", program], check=True)
    draw = random.Random(0)
    sizes = list(product(range(16, 256, 7), (32, 96, 128, 256, 512)))
    asked = [
        (architecture, registers, draw.choice((0, draw.randrange(48 << 10))), threads)
        for architecture in ARCHITECTURES
        for registers, threads in sizes
    ] + [(name, 32, 0, 32) for name in ARCHITECTURES]
    lines = [
        f"{number // 10} {number % 10} {limit.shared} {limit.warps} {registers} {shared} {threads}"
        for architecture, registers, shared, threads in asked
        for number, limit in [(int(architecture[3:]), MULTIPROCESSORS[architecture])]
    ]
    said = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout.split()
    expected = [str(cuda_resources.resident_blocks(*question)) for question in asked]
    assert said == expected
