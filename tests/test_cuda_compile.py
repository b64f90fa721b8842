"""The CUDA kernels through nvcc, without a GPU."""

import re
import shutil
import subprocess

import pytest
from cuda_on_cpu import SOURCES


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((SOURCES / "cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_no_kernel_spills(source, tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", "-Werror", "all-warnings"]
    result = subprocess.run(
        [*command, "-c", source, "-o", tmp_path / "kernels.o"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", result.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    # One line of the compiler for each kernel.
    assert kernels and len(kernels) == len(spills)
    spilling = [name for name, size in zip(kernels, spills, strict=True) if size != ("0", "0")]
    assert not spilling, spilling
