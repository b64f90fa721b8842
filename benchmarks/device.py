"""A device as benchmarks use it: clocks, caches, memory, and what it is.

Tests need graphs and streams of a GPU, too: `epa_kernels.testing` has those. Nothing else calls
torch.cuda. `Cpu` answers the same calls with the same results, so that a dry run walks the same
code, and so that `pytest benchmarks` runs on both; what a CPU cannot tell is None.
"""

import gc
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

import torch

from epa_kernels import admission, testing

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that are timed, the most important first
SETTLE_SECONDS, SETTLE_SIZE = 0.5, 4096
FEWEST_CALLS = 5


def get(kind):
    """The device "cuda" or "cpu"."""
    return {"cuda": Gpu, "cpu": Cpu}[kind]()


def versions():
    """Of what a result may depend on; None where it is not installed."""

    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names = ("triton", "numpy", "pytest", "monai")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: version(name) for name in names},
    }


def summary(seconds):
    """Median and the times that 20 and 80 % of the calls stay below, in microseconds."""
    ordered = sorted(seconds)
    p20, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {
        "median_us": statistics.median(ordered) * 1e6,
        "p20_us": p20 * 1e6,
        "p80_us": p80 * 1e6,
        "calls": len(ordered),
    }


def calls_within(seconds, device, function, most):
    """How many calls of a function take so long, once it is warm: FEWEST_CALLS to `most`."""
    device.seconds(function, FEWEST_CALLS)
    estimate = statistics.median(device.seconds(function, FEWEST_CALLS))
    return max(FEWEST_CALLS, min(most, int(seconds / estimate)))


class Moment:
    """A point of the current stream; the difference of two is in seconds of the GPU's clock."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class Gpu(testing.Gpu):
    """The current CUDA device."""

    is_gpu = True
    clock = Moment
    dtypes = DTYPES  # that `pytest benchmarks` times

    def __init__(self):
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._cache_filler = None

    def describe(self):
        """What identifies the device; None for what neither torch nor nvidia-smi tells."""
        fields = ("driver_version", "compute_mode", "clocks.max.sm", "power.limit")
        driver, mode, clock, power = _nvidia_smi(fields)
        properties = self._properties
        return {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": driver,
            "compute_mode": mode,
            "most_mhz": float(clock) if clock else None,
            "power_limit_watts": float(power) if power else None,
        }

    def synchronize(self):
        torch.cuda.synchronize()

    def seconds(self, function, calls, before=None):
        """Time of each call between two events, queued one behind another.

        before: what to run in front of each call, outside its time.
        """
        moments = []
        for _ in range(calls):
            if before is not None:
                before()
            start = Moment()
            function()
            moments.append((start, Moment()))
        torch.cuda.synchronize()
        return [end - start for start, end in moments]

    def host_seconds(self, function, calls):
        """Time of each call until it returns, on an idle device: what launching costs."""
        return _host_seconds(function, calls, self.synchronize)

    def flush(self):
        """Write more than the L2 cache holds, so that the next call finds nothing there."""
        if self._cache_filler is None:
            size = 4 * (getattr(self._properties, "L2_cache_size", None) or 2**26)
            self._cache_filler = torch.empty(size, dtype=torch.uint8, device=self.kind)
        self._cache_filler.zero_()

    def settle(self):
        """Keep the device busy until its clocks have risen."""
        a = torch.randn(SETTLE_SIZE, SETTLE_SIZE, device=self.kind)
        start = time.perf_counter()
        while time.perf_counter() - start < SETTLE_SECONDS:
            for _ in range(8):
                torch.mm(a, a)
            torch.cuda.synchronize()

    def release(self):
        """Give back the memory that no tensor holds."""
        gc.collect()
        torch.cuda.empty_cache()

    def peak_bytes(self, function):
        """Most memory that tensors held during a call, those from before it included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def is_alive(self):
        """See `epa_kernels.admission.is_alive`."""
        return admission.is_alive(torch.device(self.kind))


class Cpu(testing.Cpu):
    """A CPU, which stands in for a GPU in a dry run."""

    is_gpu = False
    clock = staticmethod(time.perf_counter)
    dtypes = (torch.float32,)

    def describe(self):
        return {
            "name": f"{platform.processor() or platform.machine()} (dry run)",
            **dict.fromkeys(("capability", "memory_bytes", "multiprocessors", "l2_bytes")),
            **dict.fromkeys(("driver", "compute_mode", "most_mhz", "power_limit_watts")),
        }

    def synchronize(self):
        pass

    def seconds(self, function, calls, before=None):
        times = []
        for _ in range(calls):
            if before is not None:
                before()
            times += _host_seconds(function, 1, self.synchronize)
        return times

    def host_seconds(self, function, calls):
        return _host_seconds(function, calls, self.synchronize)

    def flush(self):
        pass

    def settle(self):
        pass

    def release(self):
        gc.collect()

    def peak_bytes(self, function):
        function()
        return None

    def is_alive(self):
        return True


def _host_seconds(function, calls, synchronize):
    times = []
    for _ in range(calls):
        synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    synchronize()
    return times


def _nvidia_smi(fields):
    """What nvidia-smi says of the first device, None for each field that it does not tell."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        values = [value.strip() for value in said.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return [None] * len(fields)
    return [None if "N/A" in value or "[" in value else value for value in values]


if __name__ == "__main__":
    import json

    try:
        found = get(sys.argv[1])
    except RuntimeError as error:
        sys.exit(str(error))
    print(json.dumps({**found.describe(), "versions": versions()}))
