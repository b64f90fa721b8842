"""The emulator that runs CUDA kernels on a CPU, and the bugs that it finds in them."""

import shutil
from typing import NamedTuple

import cuda_on_cpu
import pytest
from cuda_on_cpu import EMULATOR, SANITIZERS, SOURCES

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return cuda_on_cpu.Builder(tmp_path_factory)


@pytest.fixture(scope="module")
def self_check(builder):
    objects = [
        builder.object(EMULATOR / f"{name}.cpp", "-O1") for name in ("emulator", "self_check")
    ]
    program = builder.link("self_check", objects)
    return lambda case: cuda_on_cpu.run(program, case)


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


class Bug(NamedTuple):
    name: str
    shows: str  # under which of SANITIZERS
    check: str  # of cuda_emulator/check_<op>.cpp
    file: str  # of csrc/cuda
    right: str
    planted: str  # the same with the bug where PLANTED

    @property
    def op(self) -> str:
        return self.check.partition("_")[0]


BUGS = (
    Bug(
        "barrier-before-keys-are-read", "values", "spatial", "spatial_mma.cuh",
        "scale[d] = factor / scale[d];\n  __syncthreads();",
        "scale[d] = factor / scale[d];\n  if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "column-mask", "values", "spatial", "fragments.cuh",
        "8 * j + 2 * t + i < P ? logit * factor : -INFINITY",
        "PLANTED || 8 * j + 2 * t + i < P ? logit * factor : -INFINITY",
    ),
    Bug(
        "dropout-row", "values", "spatial", "fragments.cuh",
        "philox_words(seed, row + 8 * r,",
        "philox_words(seed, row + (PLANTED ? 0 : 8 * r),",
    ),
    Bug(
        "divergent-barrier", "values", "spatial", "spatial_mma.cuh",
        "    __syncwarp();\n    float map",
        "    if (!PLANTED || lane < 16) __syncwarp();\n    float map",
    ),
    Bug(
        "rest-of-a-factor", "values", "spatial", "fragments.cuh",
        "  mma_tf32(part, high_a, low_b);\n",
        "  if (!PLANTED) mma_tf32(part, high_a, low_b);\n",
    ),
    Bug(
        "order-of-summed-numbers", "values", "spatial", "fragments.cuh",
        "word_offset<T>(i / 2) * stride + lane / 4 + i % 2 * 8",
        "word_offset<T>(i / (2 - PLANTED) % 2) * stride + lane / 4 + i / (1 + PLANTED) % 2 * 8",
    ),
    Bug(
        "norm-gradient", "values", "channel", "channel.cuh",
        "along_k += ddots[column]",
        "along_k += ddots[PLANTED ? row : column]",
    ),
    Bug(
        "squares-of-keys", "values", "channel_mma", "channel_mma.cuh",
        "add_squares<T>(right_squares, factor)",
        "add_squares<T>(PLANTED ? left_squares : right_squares, factor)",
    ),
    Bug(
        "scale-of-columns", "values", "channel_mma", "channel_mma.cuh",
        "(is_scaled ? inverse[d + i] : 1.f)",
        "(is_scaled && !PLANTED ? inverse[d + i] : 1.f)",
    ),
    Bug(
        "barrier-before-matrix-is-read", "values", "channel_mma", "channel_mma.cuh",
        "matrix[i]);\n  }\n  __syncthreads();",
        "matrix[i]);\n  }\n  if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "barrier-before-map-is-overwritten", "thread", "spatial", "spatial_mma.cuh",
        "add_products<T, D>(dvalues, maps, gradients);\n    __syncthreads();",
        "add_products<T, D>(dvalues, maps, gradients);\n    if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "barrier-at-end-of-generic-tile", "thread", "spatial", "spatial_generic.cuh",
        "dvalues[i] + dvalue;\n    }\n    __syncthreads();",
        "dvalues[i] + dvalue;\n    }\n    if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "sum-shared-by-blocks", "thread", "spatial", "spatial_mma.cuh",
        "sums += (head * gridDim.x + index) * 2",
        "sums += (head * gridDim.x + (PLANTED ? 0 : index)) * 2",
    ),
    Bug(
        "barrier-before-sums-are-read", "thread", "channel", "channel.cuh",
        "if (lane == 0) totals[warp] = total;\n  __syncthreads();",
        "if (lane == 0) totals[warp] = total;\n  if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "barrier-at-end-of-tile-of-gram", "thread", "channel_mma", "channel_mma.cuh",
        "    }\n    __syncthreads();\n  }\n  float *parts",
        "    }\n    if (!PLANTED) __syncthreads();\n  }\n  float *parts",
    ),
    Bug(
        "barrier-before-parts-are-added", "thread", "channel_mma", "channel_mma.cuh",
        "right_squares);\n  __syncthreads();",
        "right_squares);\n  if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "row-mask-of-loads", "address", "spatial", "fragments.cuh",
        "if (row < inside) value =",
        "if (PLANTED || row < inside) value =",
    ),
    Bug(
        "row-mask-of-results", "address", "spatial", "spatial_mma.cuh",
        "if (n + g + 8 * r >= stop) continue;",
        "if (!PLANTED && n + g + 8 * r >= stop) continue;",
    ),
    Bug(
        "shared-overrun", "address", "spatial", "spatial_mma.cuh",
        "store_map(maps, weights);",
        "store_map(maps + (PLANTED ? 10 : 0), weights);",
    ),
    Bug(
        "index-beyond-a-fragment", "undefined", "spatial", "spatial_mma.cuh",
        "= dvalues[c][i];",
        "= dvalues[c][i + PLANTED];",
    ),
    Bug(
        "column-mask-of-sums", "address", "channel", "channel_generic.cuh",
        "if (element < length && group == 0)",
        "if ((PLANTED || element < length) && group == 0)",
    ),
    Bug(
        "row-mask-of-product", "address", "channel_mma", "channel_mma.cuh",
        "if (row >= stop) continue;",
        "if (!PLANTED && row >= stop) continue;",
    ),
    Bug(
        "last-chunk-of-gram", "values", "paired", "paired_mix.cuh",
        "for (int64_t t = 0; t < a.chunks; ++t)\n        sum += a.chunk_grams",
        "for (int64_t t = 0; t + PLANTED < a.chunks; ++t)\n        sum += a.chunk_grams",
    ),
    Bug(
        "dropout-of-backward", "values", "paired", "paired_output.cuh",
        "weights[p] *= kept(p);",
        "if (!PLANTED) weights[p] *= kept(p);",
    ),
    Bug(
        "rows-of-a-span", "values", "paired_mma", "paired_output_mma.cuh",
        "outs + r % D * stride + r / D * C",
        "outs + r % D * stride + (PLANTED ? 0 : r / D * C)",
    ),
    Bug(
        "barrier-after-means", "thread", "paired", "paired_mix.cuh",
        "a.mean[b * a.C + c] = mean[c];\n  }\n  __syncthreads();",
        "a.mean[b * a.C + c] = mean[c];\n  }\n  if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "barrier-before-paired-map-is-overwritten",
        "thread", "paired_mma_wide", "paired_output_mma.cuh",
        "add_products<T, D>(dvalues, maps, gradients);\n    __syncthreads();",
        "add_products<T, D>(dvalues, maps, gradients);\n    if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "scale-of-logit-gradients", "values", "paired_mma_wide", "paired_output_mma.cuh",
        "dkeys[c][i] += down * part[c][i]",
        "dkeys[c][i] += (PLANTED ? 1 : down) * part[c][i]",
    ),
    Bug(
        "token-mask-of-a-span", "address", "paired_mma_wide", "paired_output_mma.cuh",
        "if (n + token < a.N)",
        "if (PLANTED || n + token < a.N)",
    ),
    Bug(
        "scale-of-slices", "values", "paired_mma_wide", "paired_summary_mma.cuh",
        "*inverse = 1 / scale",
        "*inverse = PLANTED ? 1 : 1 / scale",
    ),
    Bug(
        "barrier-before-projection-is-read", "values", "paired_mma", "paired_summary_mma.cuh",
        "is_own ? __syncwarp() : __syncthreads();\n      add_scaled",
        "is_own || PLANTED ? __syncwarp() : __syncthreads();\n      add_scaled",
    ),
    Bug(
        "barrier-before-rows-are-overwritten",
        "values", "paired_mma_wide", "paired_product_mma.cuh",
        "      __syncthreads();\n    }\n#pragma unroll",
        "      if (!PLANTED) __syncthreads();\n    }\n#pragma unroll",
    ),
    Bug(
        "row-mask-of-projected-tokens", "address", "paired_mma_wide", "paired_product_mma.cuh",
        "if (row >= tokens) continue;",
        "if (!PLANTED && row >= tokens) continue;",
    ),
    Bug(
        "column-mask-of-weight", "address", "paired_mma_wide", "paired_product_mma.cuh",
        "column < columns && k < depth",
        "(PLANTED || column < columns) && k < depth",
    ),
    Bug(
        "barrier-before-rows-are-read", "values", "paired_mma", "paired_product_mma.cuh",
        "c; });\n      __syncthreads();",
        "c; });\n      if (!PLANTED) __syncthreads();",
    ),
    Bug(
        "token-mask-of-projection", "address", "paired_mma", "paired_summary_mma.cuh",
        "row + VECTOR <= inside",
        "(PLANTED || row + VECTOR <= inside)",
    ),
)  # fmt: skip
NUMBERS = {bug.name: number for number, bug in enumerate(BUGS)}
# What the daily tests look for, a bug of each kind where it is found at the least cost.
DAILY = {
    "mask": "column-mask",
    "barrier": "barrier-before-keys-are-read",
    "overrun": "shared-overrun",
    "order of sums": "order-of-summed-numbers",
    "dropout words": "dropout-row",
    "scale": "scale-of-columns",
    "missing term": "rest-of-a-factor",
    "wrong stride": "sum-shared-by-blocks",
}
# What a sanitizer says; wrong values are said by the exit status.
REPORTS = {
    "values": "",
    "thread": "data race",
    "address": "AddressSanitizer",
    "undefined": "runtime error",
}


@pytest.fixture(scope="module")
def planted_check(builder, tmp_path_factory):
    """`Builder.check` of sources in which every bug waits for its number: one build finds all."""
    sources = tmp_path_factory.mktemp("planted") / "csrc"
    shutil.copytree(SOURCES, sources)
    for number, bug in enumerate(BUGS):
        path = sources / "cuda" / bug.file
        text = path.read_text(encoding="utf-8")
        assert text.count(bug.right) == 1, bug.name
        planted = bug.planted.replace("PLANTED", f"(emulator::planted == {number})")
        path.write_text(text.replace(bug.right, planted), encoding="utf-8")
    return lambda sanitizer, op: builder.check(sanitizer, op, sources)


def assert_is_found(run, bug: Bug, report: str) -> None:
    found = run("--planted", str(NUMBERS[bug.name]), bug.check)
    assert found.returncode != 0 and report in found.stderr, (bug.name, found)


@pytest.mark.parametrize("op", ("spatial", "channel"))
def test_kernels_are_right_and_a_bug_of_each_kind_is_found(op, planted_check):
    """AddressSanitizer alone, whose program compares values, too."""
    run = planted_check("address", op)
    clean = run()
    assert clean.returncode == 0, clean
    for name in DAILY.values():
        bug = BUGS[NUMBERS[name]]
        if bug.op == op:
            assert_is_found(run, bug, REPORTS[bug.shows] if bug.shows == "address" else "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", ("spatial", "channel", "paired"))
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_are_right_and_every_planted_bug_is_found(sanitizer, op, planted_check):
    run = planted_check(sanitizer, op)
    clean = run()
    assert clean.returncode == 0, clean
    for bug in BUGS:
        if (bug.shows, bug.op) == (sanitizer, op):
            assert_is_found(run, bug, REPORTS[sanitizer])
