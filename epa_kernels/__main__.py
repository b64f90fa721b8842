"""`python -m epa_kernels`: versions, and which backend runs where."""

import argparse
import os
import platform

import torch

from . import EPA, __version__, dispatch
from .backends import cpu, cuda


def main(arguments: list[str] | None = None) -> None:
    """Print the versions and, for each device and op, the table of `explain`.

    Args:
        arguments: of the command line, sys.argv by default; any ends with exit code 2.
    """
    argparse.ArgumentParser(
        prog="python -m epa_kernels",
        description="Print versions, and which backend runs on each device. It takes no options.",
    ).parse_args(arguments)
    print(
        f"epa-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads")
    print(f"CPU kernels: {cpu.describe()}")
    print(f"CUDA kernels: {cuda.describe()}")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    if torch.cuda.is_available():
        devices.append("cuda")
    forced = os.environ.get("EPA_KERNELS_BACKEND")
    print(f"EPA_KERNELS_BACKEND: {forced or 'not set, the first backend that can run is taken'}\n")
    for device in devices:
        tokens = torch.zeros(1, 4096, 64, device=device)
        q, k_proj = tokens.view(1, 4096, 4, 16), tokens[:, :64].view(1, 64, 4, 16)
        temperature = torch.ones(1, device=device)
        dispatch.explain(EPA(4096, 64, 64, 4, device=device), tokens)
        dispatch.explain("spatial_attention", q, k_proj, k_proj, temperature)
        dispatch.explain("channel_attention", q, q, q, temperature)


if __name__ == "__main__":
    main()
