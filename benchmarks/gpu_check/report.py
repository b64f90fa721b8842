"""What a run leaves: a JSON file of all of it, and Markdown tables of what matters."""

import collections
import itertools

from . import lines

PEERS = ("reference", "reference compiled", "sdpa")
FAILURES_KEPT = 20
DIRECTIONS = ("forward", "backward", "forward+backward")


def tests(outcome):
    """Counts, names of what failed, the first failure of each test with its trace, skips."""
    results = outcome.results
    failed, seen = [], collections.Counter()
    for key in results:
        if results[key]["status"] in lines.FAILURES:
            test = key.partition("[")[0]
            failed.append((seen[test], key))
            seen[test] += 1
    failed = [key for _, key in sorted(failed, key=lambda pair: pair[0])]
    skips = (r["reason"] for r in results.values() if r["status"] == "skipped")
    return {
        "counts": dict(collections.Counter(r["status"] for r in results.values())),
        "failures": [{"key": key, **results[key]} for key in failed[:FAILURES_KEPT]],
        "failed": [{"key": key, "reason": results[key]["reason"]} for key in failed],
        "skipped": dict(collections.Counter(skips)),
    }


def rows(outcomes, names):
    """Results whose key "a, b, c" gives the columns `names`, of several outcomes, as one list."""
    return [
        {"key": key, **dict(zip(names, key.split(", "), strict=True)), **result}
        for outcome in outcomes
        for key, result in outcome.results.items()
    ]


def _table(header, body):
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for cells in body:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _number(value, digits=3):
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def short(text, length=100):
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _head(run):
    device = run["device"]
    yield f"# GPU check: {device['name']}, {run['date']}"
    yield ""
    if run["dry_run"]:
        yield "A dry run on a CPU: its figures mean nothing.\n"
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v is not None)
    yield (
        f"`{run['command']}`; {_number(run['seconds'])} s. Driver {device['driver']}, "
        f"{device['capability']}, {device['multiprocessors']} multiprocessors, {versions}, "
        f"commit {run['commit']}."
    )
    yield ""
    package = run["package"]
    modules = ", ".join(package["modules"]) or "none"
    yield f"Package: {package['source']}; compiled modules: {modules}."
    if package["reason"]:
        yield f"Why: {short(package['reason'], 300)}"


def _steps(run):
    yield "## Steps"
    yield ""
    header = ("step", "result", "seconds", "done", "left out", "why")
    yield from _table(
        header,
        (
            (
                step["name"],
                step["status"],
                _number(step["seconds"]),
                step["done"],
                len(step["left"]),
                short(step["reason"] or (f"from {step['left'][0]} on" if step["left"] else "")),
            )
            for step in run["steps"]
        ),
    )


def _admission(run):
    yield "## Admission"
    yield ""
    yield (
        "The check of each layer, dtype and backend: RMS error as a multiple of the reference's "
        "own, without dropout and with it."
    )
    yield ""
    rows = {}
    for row in run["admission"]:
        cell = _number(row.get("ratio")) if row["status"] == "ok" else row["status"]
        rows.setdefault((row["layer"], row["dtype"], row["backend"]), {})[row["dropout"]] = cell
    kinds = ("dropout False", "dropout True")
    body = [(*key, *(cells.get(kind, "") for kind in kinds)) for key, cells in rows.items()]
    yield from _table(("layer", "dtype", "backend", *kinds), body)


def _failures(run):
    yield "## Failures"
    yield ""
    counts = ", ".join(f"{count} {status}" for status, count in run["tests"]["counts"].items())
    yield f"Tests: {counts or 'none ran'}."
    yield ""
    checks = (
        f"{row['check']} {row['status']}" + f" ({short(row['reason'])})" * bool(row["reason"])
        for row in run["sanitizer"]
    )
    yield f"compute-sanitizer: {', '.join(checks) or 'none ran'}."
    yield ""
    found = [(f["key"], f["reason"]) for f in run["tests"]["failed"]]
    for name in ("admission", "sanitizer", "peaks", "compile", "ops", "network"):
        found += [
            (row["key"], f"{row['status']}: {row['reason']}")
            for row in run[name]
            if row["status"] in lines.FAILURES
        ]
    if not found:
        yield "None."
    for key, reason in found[:FAILURES_KEPT]:
        yield f"- `{key}`: {short(reason, 300)}"
    if len(found) > FAILURES_KEPT:
        yield f"- and {len(found) - FAILURES_KEPT} more, all in the JSON file"


def _peaks(run):
    yield "## Peaks"
    yield ""
    scale = {"B/s": ("GB/s", 1e9), "FLOP/s": ("TFLOP/s", 1e12), "exp2/s": ("Texp2/s", 1e12)}
    body = []
    for row in run["peaks"]:
        unit, factor = scale.get(row.get("unit"), ("", 1))
        value = f"{_number(row['value'] / factor)} {unit}" if "value" in row else row["status"]
        body.append((row["name"], value, row.get("source", "measured")))
    yield from _table(("what", "measured", "how"), body)


def best_us(row):
    """Time of a row without launches, with a cold cache; with launches where it has no graph."""
    if row is None or row["status"] != "ok":
        return None
    return (row["graph_cold"] or row["cold"])["median_us"]


def _groups(ops):
    """(case, batch, dtype, direction) -> provider -> (microseconds, row), backward a difference."""
    groups = {}
    for row in ops:
        key = row["case"], row["batch"], row["dtype"], row["direction"]
        groups.setdefault(key, {})[row["provider"]] = best_us(row), row
    for key in list(groups):
        *layer, direction = key
        forward, both = groups.get((*layer, "forward")), groups.get((*layer, "forward+backward"))
        if direction == "forward" and both:
            groups[(*layer, "backward")] = {
                name: (both[name][0] - forward[name][0], None)
                for name in both
                if name in forward and None not in (both[name][0], forward[name][0])
            }
    place = {layer: i for i, layer in enumerate(dict.fromkeys(k[:3] for k in groups))}
    ordered = sorted(groups, key=lambda key: (place[key[:3]], DIRECTIONS.index(key[3])))
    return {key: groups[key] for key in ordered}


def _ops(run):
    yield "## Ops"
    yield ""
    yield (
        "Medians in microseconds with a cold L2, from a CUDA graph where one could be captured; "
        "backward is the difference. x is how many times faster the fastest backend is; launch is "
        "what its call costs the host; bytes are counted, not read from a counter."
    )
    yield ""
    names = dict.fromkeys(row["provider"] for row in run["ops"])
    own = [name for name in names if name not in PEERS]
    header = ("layer", "pass", "floor", "bound", *names, "fastest", *(f"x {p}" for p in PEERS))
    header += ("of floor", "GB/s", "warm", "launch", "peak MiB", "kept MiB")
    body = []
    for (case, batch, dtype, direction), group in _groups(run["ops"]).items():
        own_times = {n: group[n][0] for n in own if n in group and group[n][0] is not None}
        fastest = min(own_times, key=own_times.get, default=None)
        row = group[fastest][1] if fastest else None
        floor = next((r for _, r in group.values() if r and r.get("floor_us")), {})
        peers = [group.get(peer, (None, None))[0] for peer in PEERS]
        cells = [f"{case} {batch} {dtype}", direction]
        cells += [_number(floor.get("floor_us")), floor.get("bound") or ""]
        for name in names:
            time, found = group.get(name, (None, None))
            failed = found and found["status"] != "ok" and found["status"]
            doubt = "*" if found and found.get("inaccuracy") else ""
            cells.append(failed or _number(time) + doubt)
        cells.append(fastest or "")
        cells += [_number(t / own_times[fastest]) if t and fastest else "" for t in peers]
        if row:
            cells += [f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else ""]
            cells += [_number(row["gbps"]), _number((row["graph"] or row["warm"])["median_us"])]
            cells += [
                _number(row["host_us"]),
                *(_mib(row[k]) for k in ("peak_bytes", "kept_bytes")),
            ]
        else:
            cells += [""] * 6
        body.append(cells)
    yield from _table(header, body)
    if any(row.get("inaccuracy") for row in run["ops"]):
        yield ""
        yield "\\* breaks the tolerance rule that backends are held to; the JSON file says where."
    reasons = (row.get("reasons", {}).items() for row in run["ops"])
    for (field, reason), count in collections.Counter(itertools.chain(*reasons)).items():
        if field in ("graph", "floor_us", "peak_bytes"):
            yield ""
            yield f"No {field} in {count} rows: {short(reason, 300)}."


def _mib(value):
    return "" if value is None else f"{value / 2**20:.2f}"


def _network(run):
    yield "## Whole network"
    yield ""
    losses = dict.fromkeys(row["loss"] for row in run["network"] if row.get("loss"))
    yield (
        "Synapse under autocast in bfloat16, medians in milliseconds and peak memory in MiB; "
        f"loss: {', '.join(losses) or 'not measured'}."
    )
    yield ""
    modes = ("eager", "graph", "compiled", "compiled graph")
    by_setting = {}
    for row in run["network"]:
        key = row["direction"], row["batch"], row["backend"]
        by_setting.setdefault(key, {})[row["mode"]] = row
    body = []
    for (direction, batch, backend), group in sorted(by_setting.items(), reverse=True):
        cells = [f"{direction} {batch}", backend]
        for mode in modes:
            row = group.get(mode)
            is_ok = row is not None and row["status"] == "ok"
            cells.append(_number(row["median_us"] / 1e3) if is_ok else row["status"] if row else "")
            cells.append(_mib(row["peak_bytes"]) if is_ok else "")
        body.append(cells)
    columns = itertools.chain(*((mode, "MiB") for mode in modes))
    yield from _table(("what", "backend", *columns), body)


def _left(run):
    yield "## Left out for want of time"
    yield ""
    left = {step["name"]: step["left"] for step in run["steps"] if step["left"]}
    if not left:
        yield "Nothing."
    for name, keys in left.items():
        yield f"- {name}: {len(keys)}, the first of them `{keys[0]}`"


def sections(run):
    """Markdown, by section, the most important first."""
    parts = (_head, _steps, _failures, _admission, _ops, _network, _peaks, _left)
    return ["\n".join(part(run)) for part in parts]
