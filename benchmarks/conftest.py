"""Options of the benchmarks, and the tables that end a run."""

from pathlib import Path

import torch

import epa_kernels
from benchmarks import floor, report

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("epa-kernels")
    group.addoption("--batch", type=int, default=1, help="samples a batch, default 1")
    group.addoption("--dropout", type=float, default=0.0, help="of both attention maps, default 0")
    group.addoption(
        "--results",
        type=Path,
        help="folder for ops.csv, ops.png and model.csv; default benchmarks/results for a run with "
        "neither -k, --batch nor --dropout, else none",
    )


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    write = terminalreporter.write_line
    batch, dropout = config.getoption("--batch"), config.getoption("--dropout")
    setting = (
        f"epa-kernels {epa_kernels.__version__}, torch {torch.__version__}, float32, "
        f"batch {batch}, dropout {dropout}, "
        f"{torch.get_num_threads()} threads of {report.processor()}"
    )
    folder = config.getoption("--results")
    if folder is None and (batch, dropout) == (1, 0) and "deselected" not in terminalreporter.stats:
        folder = RESULTS
    for name, rows in report.collect(session).items():
        has_floor = all(row.floor_ms is not None for row in rows)
        write("")
        write(setting)
        if has_floor:
            write(floor.describe())
        write("")
        for line in report.markdown(rows):
            write(line)
        if folder is None or len({row.backend for row in rows}) == 1:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        report.write_csv(rows, folder / f"{name}.csv")
        if has_floor:
            report.plot(rows, setting, folder / f"{name}.png")
        write("")
        write(f"written to {folder}")
