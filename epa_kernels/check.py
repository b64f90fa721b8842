"""`python -m epa_kernels --check`: every backend on the published layers, on every device."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import admission, choice
from .admission import Question
from .backends import cpu
from .backends.compiled import float32_is_exact
from .contract import Call
from .dispatch import BACKENDS, ORDER
from .timing import measure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """A published attention layer."""

    name: str
    op: str
    kind: str
    N: int
    H: int
    D: int
    P: int


LAYERS = (
    Layer("UNETR++ Synapse, stage 1", "paired_attention", "shared", 32768, 4, 8, 64),
    Layer("UNETR++ Synapse, stage 2", "paired_attention", "shared", 4096, 4, 16, 64),
    Layer("UNETR++ Synapse, stage 3", "paired_attention", "shared", 512, 4, 32, 64),
    Layer("UNETR++ Synapse, stage 4", "paired_attention", "shared", 64, 4, 64, 32),
    Layer("UNETR++ ACDC, stage 1", "paired_attention", "split", 25600, 4, 8, 64),
    Layer("UNETR++ tumor, stage 1", "paired_attention", "sum", 32768, 4, 8, 64),
    Layer("SegFormer3D BraTS, stage 1", "spatial_attention", "", 32768, 1, 32, 512),
    Layer("Slim UNETR++, stage 1", "channel_attention", "", 4096, 4, 12, 0),
)


def call_of(
    layer: Layer, dtype: torch.dtype, device: torch.device, *, dropout: bool = False
) -> Call:
    """A training step's call of a layer with one sample."""
    return Call(
        layer.op, device, dtype, 1, layer.N, layer.H * layer.D, layer.H, layer.D, layer.P,
        layer.kind, "official" if layer.kind else "", dropout=dropout, backward=True,
        parameter_dtype=dtype,
    )  # fmt: skip


class Row(NamedTuple):
    """What was found of one backend.

    error: RMS error of the worst tensor as a multiple of the reference's own in that dtype.
    milliseconds: of a pass, with backward where the direction is so; None where it failed.
    verdict: "chosen", "can run", "cannot run: ..." or "failed: ...".
    """

    device: str
    layer: str
    op: str
    dtype: str
    direction: str
    backend: str
    error: float | None
    milliseconds: float | None
    verdict: str


def run(device: torch.device) -> Iterator[Row]:
    """Check and time every backend of a device on `LAYERS`, as if nothing was known of it.

    On a GPU the answers are kept, so that programs need not ask again.
    """
    for layer in LAYERS:
        for dtype in DTYPES:
            yield from _rows(device, layer, dtype)


def _rows(device: torch.device, layer: Layer, dtype: torch.dtype) -> Iterator[Row]:
    call = call_of(layer, dtype, device)
    question = Question.of(call, float32_is_exact())
    findings: dict[str, admission.Finding] = {}
    impossible: dict[str, list[str]] = {}
    for name in ORDER[device.type]:
        backend = BACKENDS[name]
        if backend.implementation is None:
            continue
        if reasons := backend.why_not(call):
            impossible[name] = reasons
            continue
        findings[name] = _tried(name, question, device)
    for backward in (False, True):
        here = call._replace(backward=backward)
        times = _times(here, [name for name, found in findings.items() if not found.reasons])
        chosen = (
            min(times, key=times.__getitem__) if device.type == "cuda" else next(iter(times), "")
        )
        for name in (*findings, *impossible):
            if name in impossible:
                verdict = f"cannot run: {'; '.join(impossible[name])}"
            elif reasons := findings[name].reasons:
                verdict = f"failed: {'; '.join(reasons)}"
            else:
                verdict = "chosen" if name == chosen else "can run"
            yield Row(
                _device_name(device), layer.name, layer.op, str(dtype).removeprefix("torch."),
                "forward + backward" if backward else "forward", _with_isa(name),
                findings[name].ratio if name in findings else None,
                times[name] / 1e3 if name in times else None, verdict,
            )  # fmt: skip


def _tried(name: str, question: Question, device: torch.device) -> admission.Finding:
    """What was found of a backend, without dropout and with it."""
    backend, found = BACKENDS[name], []
    for dropout in (False, True):
        asked = question._replace(dropout=dropout)
        found.append(admission.try_out(backend.implementation, asked, device))
        if not backend.trusted and found[-1].is_lasting:
            choice.keep_verdict(name, asked, device, found[-1].reasons)
    ratios = [each.ratio for each in found if each.ratio is not None]
    return admission.Finding(
        list(dict.fromkeys(reason for each in found for reason in each.reasons)),
        max(ratios, default=None),
    )


def _times(call: Call, names: Sequence[str]) -> dict[str, float]:
    if not names:
        return {}
    implementations = {name: BACKENDS[name].implementation for name in names}
    question = Question.of(call, float32_is_exact())
    try:
        times = measure(implementations, question, call.B, call.N, call.device)
    except RuntimeError:  # without memory
        return {}
    if call.device.type == "cuda":
        choice.keep_times(call, times)
    return times


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda:{device.index or 0} {torch.cuda.get_device_name(device)}"
    return device.type


def _with_isa(name: str) -> str:
    return f"cpu {cpu.isa}" if name == "cpu" else name


def other_instruction_sets() -> Iterator[list[Row]]:
    """The rows of the cpu backend under each other instruction set, in processes of their own."""
    if cpu.module is None:
        return
    for isa in cpu.module.isas().split(","):
        if isa == cpu.isa:
            continue
        found = subprocess.run(
            [sys.executable, "-m", "epa_kernels", "--check", "--json", "--this-isa"],
            env=os.environ | {"EPA_KERNELS_ISA": isa, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            check=False,
        )
        if found.returncode not in (0, 1):
            reason = f"failed: the process ended with {found.returncode}"
            yield [Row("cpu", "", "", "", "", f"cpu {isa}", None, None, reason)]
            continue
        rows = [Row(**row) for row in json.loads(found.stdout)["rows"]]
        yield [row for row in rows if row.backend.startswith("cpu ")]


def failed(rows: Sequence[Row]) -> bool:
    return any(row.verdict.startswith("failed") for row in rows)


def as_json(rows: Sequence[Row], versions: dict[str, Any]) -> str:
    """Rows and versions for a bug report."""
    found = []
    for row in rows:
        is_number = row.error is not None and math.isfinite(row.error)
        found.append(row._replace(error=row.error if is_number else None)._asdict())
    return json.dumps({"versions": versions, "rows": found}, indent=1)


HEADER = ("layer", "dtype", "direction", "backend", "error", "ms", "verdict")


def line(row: Row) -> str:
    """A row of the table."""
    error = "" if row.error is None else f"{row.error:.2f}"
    time = "" if row.milliseconds is None else f"{row.milliseconds:.3f}"
    return _line(row.layer, row.dtype, row.direction, row.backend, error, time, row.verdict)


def header() -> str:
    return _line(*HEADER)


def _line(*cells: str) -> str:
    widths = (27, 9, 19, 13, 6, 9)
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return " ".join([*padded, cells[-1]]).rstrip()
