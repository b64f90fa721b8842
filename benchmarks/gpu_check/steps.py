"""A process of a step that measures: its items, one by one, each result in a line of its own.

    python -m benchmarks.gpu_check.steps STEP --lines FILE --deadline TIME [--dry-run]

Items that FILE has a result of are passed over, so a process can be started again behind a crash.
"""

import argparse
import os
import time
from pathlib import Path

import torch

import epa_kernels
from benchmarks import device

from . import lines

STEPS = (
    "admission",
    "peaks",
    "compile",
    "ops",
    "network",
    "sanitizer",
    "network compiled",
    "ops compiled",
)


def items(step, gpu, dry_run, peaks):
    """(key, function -> what it found) of each item of a step, the most important first."""
    if step == "peaks":
        from benchmarks import gpu_peaks as measured

        return measured.items(gpu, dry_run)
    if step == "admission":
        from . import admission

        return admission.items(gpu, dry_run)
    if step == "sanitizer":
        from . import sanitizer

        return sanitizer.items(gpu, dry_run)
    if step.startswith("network"):
        from . import network

        return network.items(gpu, dry_run, compiled=step.endswith("compiled"))
    from . import ops

    if step == "compile":
        return ops.first_calls(gpu, dry_run)
    return ops.items(gpu, dry_run, peaks, compiled=step.endswith("compiled"))


def run(gpu, share, writer, knows, deadline):
    """Run each (key, function) that is not known, until the deadline or the loss of the device."""
    for key, function in share:
        if knows(key):
            continue
        if time.time() > deadline:
            return
        writer.begin(key)
        start = time.perf_counter()
        try:
            found, status, reason = function(), "ok", None
        except lines.Refused as error:
            found, status, reason = {}, "refused", str(error)
        except lines.Skipped as error:
            found, status, reason = {}, "skipped", str(error)
        except Exception as error:
            found, status, reason = {}, "failed", f"{type(error).__name__}: {error}"[:2000]
            del error
        seconds = time.perf_counter() - start
        is_alive = status == "ok" or gpu.is_alive()
        if not is_alive:
            reason = f"{reason} (the device is lost to its process)"
        writer.end(key, status, reason, seconds=seconds, **(found or {}))
        if not is_alive:
            return
        gpu.release()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--peaks", type=Path, help="lines of the step peaks")
    parser.add_argument("--package", type=Path, required=True, help="folder of epa_kernels")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    found = Path(epa_kernels.__file__).parents[1]
    if not found.samefile(args.package):
        raise SystemExit(f"epa_kernels was imported from {found} instead of {args.package}")
    if args.dry_run and os.environ.get("TRITON_INTERPRET") == "1":
        from epa_kernels.backends.triton import interpreter

        interpreter.prepare()
    torch.manual_seed(0)
    gpu = device.get("cpu" if args.dry_run else "cuda")
    peaks = lines.Progress(args.peaks).results if args.peaks else {}
    share = list(items(args.step, gpu, args.dry_run, peaks))[args.worker :: args.workers]
    knows = lines.Progress(args.lines).knows
    writer = lines.Writer(args.lines)
    writer.plan(key for key, _ in share)
    run(gpu, share, writer, knows, args.deadline)


if __name__ == "__main__":
    main()
