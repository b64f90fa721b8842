"""Options of the benchmarks, the device that they run on, and the tables that end a run."""

import os
from pathlib import Path

import pytest
import torch

import epa_kernels
from benchmarks import floor, report

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("epa-kernels")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what is timed, default cuda where torch finds a GPU, else cpu",
    )
    group.addoption("--batch", type=int, default=1, help="samples a batch, default 1")
    group.addoption("--dropout", type=float, default=0.0, help="of both attention maps, default 0")
    group.addoption(
        "--results",
        type=Path,
        help="folder for the tables and plots; default benchmarks/results for a run with neither "
        "-k, --batch nor --dropout, else none",
    )


def pytest_configure(config):
    kind = config.getoption("device")
    os.environ["EPA_KERNELS_TEST_DEVICE"] = kind  # before epa_kernels.testing is imported
    from benchmarks import device

    try:
        config.device = device.get(kind)
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {kind}: {error}; leave the option out.") from error


@pytest.fixture(scope="session")
def device(pytestconfig):
    """See `benchmarks.device`."""
    return pytestconfig.device


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=config.device.clock))


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    write = terminalreporter.write_line
    batch, dropout = config.getoption("batch"), config.getoption("dropout")
    device, kind = config.device, config.getoption("device")
    setting = (
        f"epa-kernels {epa_kernels.__version__}, torch {torch.__version__}, "
        f"batch {batch}, dropout {dropout}, "
        + (device.describe()["name"] if device.is_gpu else report.cpu())
    )
    folder = config.getoption("results")
    if folder is None and (batch, dropout) == (1, 0) and "deselected" not in terminalreporter.stats:
        folder = RESULTS
    for name, rows in report.collect(session).items():
        write("")
        write(setting)
        if not device.is_gpu and any(row.floor_ms is not None for row in rows):
            write(floor.describe())
        write("")
        for line in report.markdown(rows):
            write(line)
        if folder is None or len({row.backend for row in rows}) == 1:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{name}_{kind}" if device.is_gpu else name
        report.write_csv(rows, device, folder / f"{stem}.csv")
        report.plots(rows, setting, folder / stem)
        write("")
        write(f"written to {folder}")
