"""Write the tables of measured results into README.md and docs/results.md.

    python -m benchmarks.tables            compares, and fails if a page is not up to date
    python -m benchmarks.tables --write    writes the pages

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`. Its numbers come from a
file in benchmarks/results:

    ops.csv, model.csv   `make bench`
    throughput.csv       `unetrpp info --throughput > FILE`, then `--throughput FILE` here
    accuracy.csv         the commands in its rows; their last lines are copied by hand
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md")
REFERENCE, COMPILED, PLAIN, KERNELS = "reference", "reference compiled", "two_pass", "cpu"
SDPA = "sdpa"
MIB = 2**20

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Return the rows of a file in benchmarks/results."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_backend(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Group measured rows: {(case, direction): {backend: row}}, in the order of the file."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["direction"]), {})[row["backend"]] = row
    return groups


def lines_of(head: str, rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|---" * (head.count(" | ") + 1) + "|"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def milliseconds(group: dict[str, Row], backend: str) -> float:
    return float(group[backend]["median_ms"])


def time(group: dict[str, Row], backend: str, digits: int = 2) -> str:
    return f"{milliseconds(group, backend):.{digits}f}" if backend in group else ""


def times_faster(group: dict[str, Row], peer: str) -> str:
    if peer not in group:
        return ""
    return f"{milliseconds(group, peer) / milliseconds(group, KERNELS):.1f}"


def kept(group: dict[str, Row], backend: str, digits: int = 2) -> str:
    count = group[backend]["kept_bytes"]
    return f"{int(count) / MIB:.{digits}f} MiB" if count else ""


def summary() -> Iterator[str]:
    """The table of the README: the layer where it has most tokens, and whole networks."""
    layer = by_backend(read("ops.csv"))
    network = by_backend(read("model.csv"))
    chosen = (
        ("EPA, 32,768 tokens, forward", layer["synapse/stage1", "forward"]),
        ("EPA, 32,768 tokens, forward + backward", layer["synapse/stage1", "forward+backward"]),
        ("EPA, 4,096 tokens, forward + backward", layer["synapse/stage2", "forward+backward"]),
        ("UNETR++ (Synapse), prediction", network["synapse", "prediction"]),
        ("UNETR++ (Synapse), training step", network["synapse", "training step"]),
        ("SegFormer3D, prediction", network["segformer3d", "prediction"]),
        ("Slim UNETR, prediction", network["slim_unetr", "prediction"]),
    )
    yield from lines_of(
        "what | reference, ms | compiled, ms | `cpu`, ms | times faster | kept: reference "
        "| kept: `cpu`",
        (
            [
                name,
                time(group, REFERENCE, 1),
                time(group, COMPILED, 1),
                f"**{time(group, KERNELS, 1)}**",
                times_faster(group, REFERENCE),
                kept(group, REFERENCE, 0),
                kept(group, KERNELS, 0),
            ]
            for name, group in chosen
        ),
    )


def layer() -> Iterator[str]:
    """Every case of paired attention."""
    yield from lines_of(
        "layer | reference | compiled | SDPA | `two_pass` | `cpu` | x reference | x compiled "
        "| floor | kept: reference | kept: `cpu`",
        (
            [
                f"{case} {direction}",
                time(group, REFERENCE),
                time(group, COMPILED),
                time(group, SDPA),
                time(group, PLAIN),
                f"**{time(group, KERNELS)}**",
                times_faster(group, REFERENCE),
                times_faster(group, COMPILED),
                f"{float(group[KERNELS]['floor_ms']):.2f}",
                kept(group, REFERENCE),
                kept(group, KERNELS),
            ]
            for (case, direction), group in by_backend(read("ops.csv")).items()
        ),
    )


def network() -> Iterator[str]:
    """Every case of whole networks."""
    yield from lines_of(
        "network | reference | `two_pass` | `cpu` | x reference | kept: reference | kept: `cpu`",
        (
            [
                f"{case} {direction}",
                time(group, REFERENCE, 0),
                time(group, PLAIN, 0),
                f"**{time(group, KERNELS, 0)}**",
                times_faster(group, REFERENCE),
                kept(group, REFERENCE, 0),
                kept(group, KERNELS, 0),
            ]
            for (case, direction), group in by_backend(read("model.csv")).items()
        ),
    )


def throughput() -> Iterator[str]:
    """Speed, size and memory of every preset."""
    yield from lines_of(
        "preset | input | parameters | G multiply-adds | images/min, cold | images/min, warm "
        "| latency ms | peak memory MiB",
        (
            [*cells[:2], f"{int(cells[2]):,}", *cells[3:]]
            for cells in (list(row.values()) for row in read("throughput.csv"))
        ),
    )


def accuracy() -> Iterator[str]:
    """Dice on data that the training did not see."""
    yield from lines_of(
        "network | data | command | Dice | per class | steps | minutes",
        (
            [
                row["network"],
                row["data"],
                f"`{row['command']}`",
                f"**{row['dice']}**",
                row["classes"],
                row["steps"],
                row["minutes"],
            ]
            for row in read("accuracy.csv")
        ),
    )


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    table.__name__: table for table in (summary, layer, network, throughput, accuracy)
}


def filled(page: str) -> str:
    """Return the text of a page with its tables made from the files of today."""

    def fill(found: re.Match) -> str:
        return "\n".join([found[1], *TABLES[found[2]](), "<!-- end of table -->"])

    return re.sub(r"(<!-- table (\w+) -->)\n.*?<!-- end of table -->", fill, page, flags=re.DOTALL)


def take_throughput(printed: str) -> None:
    """Replace throughput.csv by a table that `unetrpp info --throughput` printed."""
    columns = list(read("throughput.csv")[0])
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:2] == "| "]
    with open(RESULTS / "throughput.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([cell.replace(",", "") for cell in row] for row in rows[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages, not compare them")
    parser.add_argument("--throughput", type=Path, help="a printed table to take up first")
    arguments = parser.parse_args()
    if arguments.throughput:
        take_throughput(arguments.throughput.read_text(encoding="utf-8"))
    old = []
    for name in PAGES:
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if arguments.write:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            old.append(name)
    if old:
        print(f"not up to date: {', '.join(old)}; run python -m benchmarks.tables --write")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
