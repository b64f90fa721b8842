"""`python -m epa_kernels`: versions, which backend runs where, and the check of all of them."""

import argparse
import os
import platform
from typing import Any

import torch

from . import EPA, __version__, answers, dispatch
from .backends import cpu, cuda


def main(arguments: list[str] | None = None) -> int:
    """Print the versions and the table of `explain`, or check every backend.

    Args:
        arguments: of the command line, sys.argv by default; a wrong one ends with exit code 2.

    Returns:
        1 where a backend failed its check, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m epa_kernels",
        description="Print versions, and which backend runs on each device.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run every backend on the published layers: accuracy, time and choice",
    )
    parser.add_argument("--json", action="store_true", help="with --check: print JSON")
    parser.add_argument(
        "--forget", action="store_true", help="remove what is known of the backends of GPUs"
    )
    parser.add_argument("--this-isa", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.json and not options.check:
        parser.error("--json belongs to --check")
    if options.forget:
        print(f"{answers.forget()} file(s) removed from {answers.folder()}")
    if options.check:
        return _check(options.json, options.this_isa)
    if not options.forget:
        _explain()
    return 0


def _versions() -> dict[str, Any]:
    return {
        "epa-kernels": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "CPU kernels": cpu.describe(),
        "CUDA kernels": cuda.describe(),
    } | {
        f"cuda:{index}": torch.cuda.get_device_name(index)
        for index in range(torch.cuda.device_count())
    }


def _check(is_json: bool, this_isa: bool) -> int:
    from . import check

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows: list[check.Row] = []

    def add(found: list[check.Row]) -> None:
        rows.extend(found)
        if not is_json:
            print(*map(check.line, found), sep="\n", flush=True)

    for device in devices:
        if not is_json:
            print(f"\n{device}\n{check.header()}", flush=True)
        for row in check.run(device):
            add([row])
        if device.type == "cpu" and not this_isa:
            for found in check.other_instruction_sets():
                add(found)
    if is_json:
        print(check.as_json(rows, _versions()))
    return 1 if check.failed(rows) else 0


def _explain() -> None:
    versions = _versions()
    print(*(f"{name}: {text}" for name, text in versions.items()), sep="\n")
    forced = os.environ.get("EPA_KERNELS_BACKEND")
    print(f"EPA_KERNELS_BACKEND: {forced or 'not set, the fastest that may run is taken'}\n")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        tokens = torch.zeros(1, 4096, 64, device=device)
        q, k_proj = tokens.view(1, 4096, 4, 16), tokens[:, :64].view(1, 64, 4, 16)
        temperature = torch.ones(1, device=device)
        dispatch.explain(EPA(4096, 64, 64, 4, device=device), tokens)
        dispatch.explain("spatial_attention", q, k_proj, k_proj, temperature)
        dispatch.explain("channel_attention", q, q, q, temperature)


if __name__ == "__main__":
    raise SystemExit(main())
