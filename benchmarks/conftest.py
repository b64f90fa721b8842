"""Options of the benchmarks, and the table that ends a run."""

import platform

import torch

import epa_kernels


def pytest_addoption(parser):
    group = parser.getgroup("epa-kernels")
    group.addoption("--batch", type=int, default=1, help="samples a batch, default 1")
    group.addoption("--dropout", type=float, default=0.0, help="of both attention maps, default 0")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"epa-kernels {epa_kernels.__version__}, torch {torch.__version__}, float32, "
        f"batch {config.getoption('--batch')}, dropout {config.getoption('--dropout')}, "
        f"{torch.get_num_threads()} threads of {processor()}"
    )
    write("")
    write("| case | backend | median ms | quartiles | x reference | kept for backward |")
    write("|---|---|---|---|---|---|")
    reference = {}
    for benchmark in session.benchmarks:
        stats, info = benchmark.stats, benchmark.extra_info
        reference.setdefault(benchmark.group, stats.median)  # the reference comes first
        write(
            f"| {benchmark.group} | {info['backend']} | {stats.median * 1e3:.2f} "
            f"| {stats.q1 * 1e3:.2f} - {stats.q3 * 1e3:.2f} "
            f"| {reference[benchmark.group] / stats.median:.2f} "
            f"| {info['kept_bytes'] / 2**20:.2f} MiB |"
        )


def processor():
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
