"""The emulator that runs CUDA kernels on a CPU, and the bugs that it finds in them."""

import shutil
import subprocess

import cuda_on_cpu
import pytest
from cuda_on_cpu import SOURCES

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())


@pytest.fixture(scope="module")
def self_check(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_check")
    objects = [
        cuda_on_cpu.compile_object(cuda_on_cpu.EMULATOR / name, folder / f"{name}.o", "-O1")
        for name in ("emulator.cpp", "self_check.cpp")
    ]
    program = folder / "self_check"
    subprocess.run(["g++", *map(str, objects), "-o", str(program)], check=True)

    def run(case):
        return subprocess.run([program, case], capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "case", ("product of 8", "product of 16", "product in tf32", "transpose", "barrier")
)
def test_emulator_computes_as_documented(self_check, case):
    result = self_check(case)
    assert result.returncode == 0, result


@pytest.mark.parametrize(
    "case, message",
    (
        ("divergent barrier", "divergence"),
        ("barriers of two kinds", "divergence|deadlock"),
        ("shuffle of half a warp", "deadlock|divergence"),
        ("shared memory", "more than 48 KB"),
        ("threads", "block of a size not allowed"),
    ),
)
def test_emulator_refuses(self_check, case, message):
    result = self_check(case)
    assert result.returncode == 2, result
    assert any(part in result.stdout for part in message.split("|")), result


@pytest.fixture(scope="module", params=cuda_on_cpu.SANITIZERS)
def checker(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, cuda_on_cpu.Checker(folder, request.param)


# Name, how it shows, what check_kernels.cpp is to run, file of csrc/cuda, what is right, what is
# planted instead.
BUGS = (
    (
        "barrier-before-keys-are-read", "values", "spatial", "spatial_mma.cuh",
        "scale[d] = factor / scale[d];\n  __syncthreads();",
        "scale[d] = factor / scale[d];",
    ),
    (
        "column-mask", "values", "spatial", "fragments.cuh",
        "8 * j + 2 * t + i < P ? logit * factor : -INFINITY", "logit * factor",
    ),
    (
        "dropout-row", "values", "spatial", "fragments.cuh",
        "philox_words(seed, row + 8 * r,", "philox_words(seed, row,",
    ),
    (
        "divergent-barrier", "values", "spatial", "spatial_mma.cuh",
        "    __syncwarp();\n    float map", "    if (lane < 16) __syncwarp();\n    float map",
    ),
    (
        "rest-of-a-factor", "values", "spatial", "fragments.cuh",
        "  mma_tf32(part, high_a, low_b);\n", "",
    ),
    (
        "order-of-summed-numbers", "values", "spatial", "fragments.cuh",
        "word_offset<T>(i / 2) * stride + lane / 4 + i % 2 * 8",
        "word_offset<T>(i % 2) * stride + lane / 4 + i / 2 * 8",
    ),
    (
        "norm-gradient", "values", "channel", "channel.cuh",
        "along_k += ddots[column]", "along_k += ddots[row]",
    ),
    (
        "squares-of-keys", "values", "channel_mma", "channel_mma.cuh",
        "add_squares<T>(right_squares, factor)", "add_squares<T>(left_squares, factor)",
    ),
    (
        "scale-of-columns", "values", "channel_mma", "channel_mma.cuh",
        "(is_scaled ? inverse[d + i] : 1.f)", "1.f",
    ),
    (
        "barrier-before-matrix-is-read", "values", "channel_mma", "channel_mma.cuh",
        "matrix[i]);\n  }\n  __syncthreads();", "matrix[i]);\n  }",
    ),
    (
        "barrier-before-map-is-overwritten", "thread", "spatial", "spatial_mma.cuh",
        "add_products<T, D>(dvalues, maps, gradients);\n    __syncthreads();",
        "add_products<T, D>(dvalues, maps, gradients);",
    ),
    (
        "barrier-at-end-of-generic-tile", "thread", "spatial", "spatial_generic.cuh",
        "dvalues[i] + dvalue;\n    }\n    __syncthreads();", "dvalues[i] + dvalue;\n    }",
    ),
    (
        "sum-shared-by-blocks", "thread", "spatial", "spatial_mma.cuh",
        "sums += (head * gridDim.x + index) * 2", "sums += head * gridDim.x * 2",
    ),
    (
        "barrier-before-sums-are-read", "thread", "channel", "channel.cuh",
        "if (lane == 0) totals[warp] = total;\n  __syncthreads();",
        "if (lane == 0) totals[warp] = total;",
    ),
    (
        "barrier-at-end-of-tile-of-gram", "thread", "channel_mma", "channel_mma.cuh",
        "    }\n    __syncthreads();\n  }\n  float *parts", "    }\n  }\n  float *parts",
    ),
    (
        "barrier-before-parts-are-added", "thread", "channel_mma", "channel_mma.cuh",
        "right_squares);\n  __syncthreads();", "right_squares);",
    ),
    (
        "row-mask-of-loads", "address", "spatial", "fragments.cuh",
        "if (row < inside) value =", "value =",
    ),
    (
        "row-mask-of-results", "address", "spatial", "spatial_mma.cuh",
        "if (n + g + 8 * r >= stop) continue;", "",
    ),
    (
        "shared-overrun", "address", "spatial", "spatial_mma.cuh",
        "maps, [TILE_ROWS * MAP_STRIDE]", "maps, [TILE_ROWS * MAP_STRIDE - 10]",
    ),
    (
        "index-beyond-a-fragment", "undefined", "spatial", "spatial_mma.cuh",
        "= dvalues[c][i];", "= dvalues[c][i + 1];",
    ),
    (
        "column-mask-of-sums", "address", "channel", "channel.cuh",
        "if (element < length && group == 0)", "if (group == 0)",
    ),
    (
        "row-mask-of-product", "address", "channel_mma", "channel_mma.cuh",
        "if (row >= stop) continue;", "",
    ),
    (
        "last-chunk-of-gram", "values", "paired", "paired_mix.cuh",
        "for (int64_t t = 0; t < a.chunks; ++t)\n        sum += a.chunk_grams",
        "for (int64_t t = 0; t + 1 < a.chunks; ++t)\n        sum += a.chunk_grams",
    ),
    (
        "dropout-of-backward", "values", "paired", "paired_output.cuh",
        "weights[p] *= kept(p);", "",
    ),
    (
        "rows-of-a-span", "values", "paired_mma", "paired_mma.cuh",
        "outs + r % D * stride + r / D * C", "outs + r % D * stride",
    ),
    (
        "barrier-after-means", "thread", "paired", "paired_mix.cuh",
        "a.mean[b * a.C + c] = mean[c];\n  }\n  __syncthreads();",
        "a.mean[b * a.C + c] = mean[c];\n  }",
    ),
    (
        "barrier-before-paired-map-is-overwritten", "thread", "paired_mma_wide", "paired_mma.cuh",
        "add_products<T, D>(dvalues, maps, gradients);\n    __syncthreads();",
        "add_products<T, D>(dvalues, maps, gradients);",
    ),
    (
        "scale-of-logit-gradients", "values", "paired_mma_wide", "paired_mma.cuh",
        "dkeys[c][i] += down * part[c][i]", "dkeys[c][i] += part[c][i]",
    ),
    (
        "token-mask-of-a-span", "address", "paired_mma_wide", "paired_mma.cuh",
        "if (n + token < a.N)", "if (n + token >= 0)",
    ),
    (
        "scale-of-slices", "values", "paired_mma_wide", "paired_mma_gradients.cuh",
        "*inverse = 1 / scale", "*inverse = 1",
    ),
    (
        "barrier-before-projection-is-read", "values", "paired_mma", "paired_mma_gradients.cuh",
        "is_own ? __syncwarp() : __syncthreads();\n      add_scaled",
        "__syncwarp();\n      add_scaled",
    ),
    (
        "barrier-before-rows-are-overwritten",
        "values", "paired_mma_wide", "paired_mma_product.cuh",
        "      __syncthreads();\n    }\n#pragma unroll", "    }\n#pragma unroll",
    ),
    (
        "row-mask-of-projected-tokens", "address", "paired_mma_wide", "paired_mma_product.cuh",
        "if (row >= tokens) continue;", "",
    ),
    (
        "column-mask-of-weight", "address", "paired_mma_wide", "paired_mma_product.cuh",
        "column < columns && k < depth", "k < depth",
    ),
    (
        "barrier-before-rows-are-read", "values", "paired_mma", "paired_mma_product.cuh",
        "c; });\n      __syncthreads();", "c; });",
    ),
    (
        "token-mask-of-projection", "address", "paired_mma", "paired_mma_gradients.cuh",
        "row + VECTOR <= inside", "row >= 0",
    ),
)  # fmt: skip
# What a sanitizer says; wrong values are said by the exit status.
REPORTS = {
    "values": "",
    "thread": "data race",
    "address": "AddressSanitizer",
    "undefined": "runtime error",
}


@pytest.mark.slow
def test_kernels_are_right_and_every_planted_bug_is_found(checker, tmp_path):
    sanitizer, checker = checker
    clean = checker.run()
    assert clean.returncode == 0, clean
    for name, shows, op, file, right, wrong in BUGS:
        if shows != sanitizer:
            continue
        source = f"cuda/{op.split('_')[0]}_attention.cu"
        sources = tmp_path / name
        shutil.copytree(SOURCES, sources)
        text = (sources / "cuda" / file).read_text()
        assert text.count(right) == 1, name
        (sources / "cuda" / file).write_text(text.replace(right, wrong))
        found = checker.run(op, changed=sources / source)
        assert found.returncode != 0 and REPORTS[sanitizer] in found.stderr, (name, found)
