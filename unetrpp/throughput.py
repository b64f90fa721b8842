"""Speed, size and memory of presets on this machine's CPU, as a Markdown table.

Each figure of speed comes from a process of its own, so that one preset neither warms up nor fills
the memory of the next:

  cold   one forward pass of one volume in training mode with gradients recorded, the first thing
         the process computes: the protocol of Slim UNETR, whose images per minute are
         60 round(1 / seconds, 3)
  warm   evaluation mode without gradients, the median of repeated passes after the first; and the
         memory that the first one takes beyond what was in use, at its peak
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

__all__ = ["multiply_adds", "processor", "throughput_table"]

# Passes of the warm protocol: at least so many, and for so long.
PASSES, SECONDS = 5, 4.0


def throughput_table(presets: Iterable[str]) -> Iterator[str]:
    """Measure presets one after another; yields the lines of the table as they are ready.

    Args:
        presets: names as `unetrpp.models.preset_names` has them.

    Raises:
        RuntimeError: a preset's process failed, with what it said.
    """
    import torch

    from unetrpp.models import create_model, preset_label, preset_names

    yield (
        "| preset | input | parameters | G multiply-adds | images/min, cold | images/min, warm "
        "| latency ms | peak memory MiB |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name in presets:
        network, preset = preset_names()[name]
        with torch.device("meta"):
            model = create_model(network, preset)
        cold, warm = (_in_process(network, preset, protocol) for protocol in ("cold", "warm"))
        memory = warm["peak_bytes"]
        size = (model.in_channels, *model.img_size)
        cells = (
            preset_label(name),
            "x".join(map(str, size)),
            f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            f"{multiply_adds(model) / 1e9:.2f}",
            f"{round(1 / cold['seconds'], 3) * 60:.1f}",
            f"{60 / warm['seconds']:.1f}",
            f"{1e3 * warm['seconds']:.0f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"One volume, float32, {torch.get_num_threads()} threads of {processor()}, torch "
        f"{torch.__version__}. Cold: first forward pass of a process, training mode with "
        f"gradients, as Slim UNETR measures. Warm: evaluation, median. Memory: of the first warm "
        f"pass, beyond weights and libraries."
    )


def multiply_adds(model) -> int:
    """Multiply-adds of a forward pass of one volume: convolutions and matrix products.

    Args:
        model: a network of `unetrpp.models`; only its configuration is used.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import epa_kernels
    from unetrpp.models import create_model

    with torch.device("meta"):
        copy = create_model(model.config["name"], **model.config["args"]).eval()
        x = torch.empty(1, copy.in_channels, *copy.img_size)
    # The counter knows the cost of plain operators, those of the reference backend.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, epa_kernels.use_backend("reference"):
        copy(x)
    return counter.get_total_flops() // 2


def processor() -> str:
    """The processor's name, where the system tells it."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    return platform.processor() or platform.machine()


def _in_process(network: str, preset: str, protocol: str) -> dict:
    """What `_measure` returns, from a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "unetrpp.throughput", network, preset, protocol],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"throughput: {network} {preset} failed ({done.returncode}): {done.stderr.strip()}"
        )
    return json.loads(done.stdout)


def _measure(network: str, preset: str, protocol: str) -> dict:
    import torch

    from unetrpp.models import create_model

    model = create_model(network, preset)
    x = torch.randn(1, model.in_channels, *model.img_size)
    if protocol == "cold":
        start = time.perf_counter()
        model(x)
        return {"seconds": time.perf_counter() - start}
    model.eval()
    with torch.no_grad():
        before = _resident_bytes("VmRSS")
        with suppress(OSError):
            # Linux: forget the peak of building the model.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        model(x)
        after = _resident_bytes("VmHWM")
        times: list[float] = []
        while len(times) < PASSES or sum(times) < SECONDS:
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return {
        "seconds": median(times),
        "peak_bytes": None if before is None or after is None else after - before,
    }


def _resident_bytes(field: str) -> int | None:
    """VmRSS (now) or VmHWM (at most so far) of this process, where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return None


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
