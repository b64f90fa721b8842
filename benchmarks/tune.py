"""Re-derive the table of launch shapes in epa_kernels/backends/triton/launch.py.

    python -m benchmarks.tune                  on a GPU: the fastest for it
    python -m benchmarks.tune --compile-only   with no GPU: the nearest that fits, on --architecture

A candidate differs from `launch.rule` in warps, stages and blocks. With no GPU the nearest one is
taken that compiles without a spilled byte and within the shared memory of a block, for every layer
with the same head dim and projected tokens. On a GPU a candidate must also be as accurate as the
reference (`epa_kernels.testing`), and the fastest is taken, one kernel after the other. Each
kernel's line of the table is printed; --write puts the lines into launch.py.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.triton_resources import (
    ARCHITECTURES,
    LAYERS,
    SHARED_LIMITS,
    Layer,
    launches,
    multiplying,
    resources,
)

DTYPES = ("bfloat16", "float32", "tf32")  # one of each `launch.numbers`
GAIN = 0.02  # share of the time that a candidate must save, or the noise would choose
TABLE = "TABLE: dict[tuple[str, str, int, int, str], Launch] = "
Table = dict[tuple[str, str, int, int, str], Any]  # of `launch`, which is imported late


def candidates(shape: Any) -> Iterator[Any]:
    """The launch shape itself, then those around it, nearest first."""
    seen = set()
    for rows in (1, 0.5, 2, 0.25):
        for columns in (1, 0.5, 2, 0.25):
            for warps in (1, 2, 0.5, 4, 0.25):
                for stages in (shape.stages, 1, 2):
                    candidate = shape._replace(
                        rows=shape.rows and max(16, int(shape.rows * rows)),
                        columns=shape.columns and max(16, int(shape.columns * columns)),
                        warps=min(16, max(1, int(shape.warps * warps))),
                        stages=stages,
                    )
                    if candidate not in seen:
                        seen.add(candidate)
                        yield candidate


def kernels(architecture: str, layer: Layer, dtype: str) -> Table:
    """{table key: launch shape by the rule} of every kernel of a layer."""
    from epa_kernels.backends.triton import launch

    found: Table = {}
    pick = launch.pick

    def record(kernel, x, channels, head_dim, projected):
        shape = pick(kernel, x, channels, head_dim, projected)
        found[architecture, kernel, head_dim, projected, launch.numbers(x, kernel)] = shape
        return shape

    with mock.patch.object(launch, "pick", record), mock.patch.object(launch, "TABLE", {}):
        launches(architecture, layer, dtype)
    return found


def misfit(architecture: str, layer: Layer, dtype: str, kernel: str) -> str | None:
    """Why the kernel cannot launch in its present shape, None if it can."""
    for call in launches(architecture, layer, dtype):
        if call.kernel.__name__ != kernel:
            continue
        taken = resources(call.compile(architecture))
        if taken["spilled"]:
            return f"{taken['spilled']} bytes spilled"
        if taken["shared"] > SHARED_LIMITS[architecture]:
            return f"{taken['shared']} bytes of shared memory"
    return None


def fitting(architecture: str, layers: list[Layer], dtype: str, only: Sequence[str] = ()) -> Table:
    """{key: launch shape} where the rule's does not fit every layer."""
    from epa_kernels.backends.triton import launch

    rules: dict[tuple, list[tuple[Layer, Any]]] = {}
    for layer in layers:
        for key, shape in kernels(architecture, layer, dtype).items():
            rules.setdefault(key, []).append((layer, shape))
    found: Table = {}
    for key, uses in rules.items():
        kernel = key[1]
        if only and kernel not in only:
            continue
        for candidate in candidates(uses[0][1]):
            same = all(candidate == shape for _, shape in uses)
            with mock.patch.object(launch, "TABLE", {} if same else {key: candidate}):
                reasons = (misfit(architecture, layer, dtype, kernel) for layer, _ in uses)
                why = next(filter(None, reasons), None)
            if why is None:
                if not same:
                    found[key] = candidate
                break
            print(f"{key} {tuple(candidate)}: {why}", file=sys.stderr, flush=True)
        else:
            print(f"{key}: no candidate fits, the rule stays", file=sys.stderr)
    return found


def fastest(
    layer: Layer, dtype: Any, where: str, repetitions: int, most: int, only: Sequence[str] = ()
) -> Table:
    """{key: launch shape} for the GPU at hand, where another one than the rule's is faster."""
    os.environ["EPA_KERNELS_TEST_DEVICE"] = where  # before epa_kernels.testing is imported
    import torch

    from benchmarks import device
    from epa_kernels.backends.triton import launch
    from epa_kernels.testing import assert_as_accurate, make_layer, run_layer

    gpu, batch = device.get(where), 2
    shape = (batch, layer.tokens, layer.channels, layer.heads, layer.projected)
    module = make_layer(shape, layer.kind, layer.layout, bias=False)
    generator = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(shape[:3], generator=generator).to(where, dtype) for _ in range(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
    exact = run_layer(module, x, gy, backend="reference", dtype=torch.float64)
    # As autocast leaves them: parameters in float32.
    low = {"dtype": dtype, "parameter_dtype": torch.float32}
    same_dtype = run_layer(module, x, gy, backend="reference", **low)
    x.requires_grad_()
    module.backend = "triton"
    launched: Table = {}
    table: Table = {}
    pick = launch.pick

    def record(kernel, x, channels, head_dim, projected):
        shape = pick(kernel, x, channels, head_dim, projected)
        key = launch.architecture(x), kernel, head_dim, projected, launch.numbers(x, kernel)
        launched[key] = shape
        return shape

    def both():
        return torch.autograd.grad(module(x), (x, *module.parameters()), gy)

    def seconds():
        """Median, of a replayed graph: launches do not count."""
        found = run_layer(module, x, gy, backend="triton", **low)
        assert_as_accurate(found, same_dtype, exact)
        replay, _result = gpu.capture(both)
        return statistics.median(gpu.seconds(replay, repetitions))

    with mock.patch.object(launch, "TABLE", table):
        with mock.patch.object(launch, "pick", record):
            best = first = seconds()
        for key, shape in launched.items():
            if only and key[1] not in only:
                continue
            chosen = None
            for candidate in islice(candidates(shape), 1, most):
                table[key] = candidate
                try:
                    time = seconds()
                except Exception as error:  # resources that the GPU lacks, or a wrong result
                    if not gpu.is_alive():
                        raise
                    print(f"{key} {tuple(candidate)}: {error!r}"[:200], file=sys.stderr)
                    continue
                if time < (1 - GAIN) * best:
                    best, chosen = time, candidate
            del table[key]
            if chosen:
                table[key] = chosen
    print(f"{layer}, {dtype}: {first * 1e6:.1f} -> {best * 1e6:.1f} us, forward and backward")
    return table


def lines(table: Table) -> str:
    """The table as it stands in launch.py."""
    rows = [
        f'    ("{arch}", "{kernel}", {D}, {P}, "{kind}"): Launch({", ".join(map(str, shape))}),\n'
        for (arch, kernel, D, P, kind), shape in sorted(table.items())
    ]
    return "{\n" + "".join(rows) + "}" if rows else "{}"


def write(table: Table, path: Path) -> None:
    """Put the lines of `table` into launch.py; those of other architectures stay."""
    text = path.read_text(encoding="utf-8")
    head, separator, rest = text.partition(TABLE)
    if not separator:
        sys.exit(f"tune: {path} has no line that begins with {TABLE!r}.")
    end = rest.index("}\n") + 2
    path.write_text(head + separator + lines(table) + "\n" + rest[end:], encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compile-only", action="store_true", help="choose by what compiles")
    parser.add_argument("--architecture", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument(
        "--layer", nargs="*", choices=LAYERS,
        help="default with --compile-only all; else Synapse's, of which no two share a line",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="*", default=tuple(DTYPES), choices=DTYPES)
    parser.add_argument("--kernel", nargs="*", default=(), help="default all")
    parser.add_argument("--candidates", type=int, default=24, help="tried a kernel, default 24")
    parser.add_argument("--repetitions", type=int, default=50, help="timed, default 50")
    parser.add_argument("--write", action="store_true", help="put the table into launch.py")
    args = parser.parse_args(arguments)

    import torch

    from epa_kernels.backends.triton import launch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    table = dict(launch.TABLE)
    names = args.layer or [n for n in LAYERS if args.compile_only or n.startswith("synapse/")]
    if args.compile_only:
        if interpreted:
            sys.exit("tune: TRITON_INTERPRET must not be 1, the interpreter compiles nothing.")
        layers = [LAYERS[name] for name in names]
        for architecture in args.architecture:
            table = {
                key: value
                for key, value in table.items()
                if key[0] != architecture or (args.kernel and key[1] not in args.kernel)
            }
            for dtype in args.dtype:
                table |= fitting(architecture, layers, dtype, args.kernel)
    else:
        if not torch.cuda.is_available() and not interpreted:
            sys.exit("tune: no GPU is available; --compile-only chooses without one.")
        where = "cuda" if torch.cuda.is_available() else "cpu"
        if heads := [n for n in names if LAYERS[n].kind in ("heads", "unnormalised")]:
            sys.exit(f"tune: {', '.join(heads)} can be chosen by --compile-only alone.")
        for name in names:
            for dtype in args.dtype:
                with multiplying(dtype) as tokens:
                    table |= fastest(
                        LAYERS[name], tokens, where, args.repetitions, args.candidates, args.kernel
                    )
                if args.write:  # after each, so that an end by force loses little
                    write(table, Path(launch.__file__))
    print(TABLE + lines(table))
    if args.write and args.compile_only:
        write(table, Path(launch.__file__))


if __name__ == "__main__":
    main()
