"""Golden values: numbers computed with the published code, to compare ours with.

    path("model_acdc.json")            where the file lies; skips the test if it is nowhere
    load("model_acdc.safetensors")     (tensors, metadata), metadata decoded from JSON
    load("acdc.state_dict.json")       the decoded JSON
    fill(entries, shared_ef=False)     the weights that belong to a list of state-dict entries

The smaller files lie in tests/golden/ (see its README.md). The rest is looked up in
$EPA_KERNELS_SHARED/golden/unetrpp or, without that variable, in ../shared/golden/unetrpp.
"""

import gzip
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parent.parent
HERE = REPOSITORY / "tests" / "golden"


def path(name):
    """Return the path of golden file `name` (or of its `.gz`); skip the test if it is missing."""
    shared = Path(os.environ.get("EPA_KERNELS_SHARED", REPOSITORY.parent / "shared"))
    elsewhere = shared / "golden" / "unetrpp"
    for candidate in (HERE / name, HERE / f"{name}.gz", elsewhere / name):
        if candidate.is_file():
            return candidate
    pytest.skip(f"golden file {name} is neither in tests/golden nor in {elsewhere}")


def load(name):
    """Return the decoded JSON of `name`, or `(tensors, metadata)` of a `.safetensors` file."""
    file = path(name)
    if name.endswith(".json"):
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as stream:
            return json.load(stream)
    with safe_open(file, framework="pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        metadata = {key: _decoded(text) for key, text in stream.metadata().items()}
    return tensors, metadata


def _decoded(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def fill(entries, *, shared_ef=False):
    """Return `{key: tensor}` for state-dict `entries` (dicts with key, shape, dtype).

    Every tensor is drawn from a generator seeded with its own key, so that no weights need to be
    stored. `shared_ef`: F is E, therefore E's key decides for both. The temperatures are large so
    that both softmaxes are far from uniform.
    """
    shapes = {entry["key"]: entry["shape"] for entry in entries}
    return {
        entry["key"]: torch.from_numpy(_fill(entry["key"], entry["dtype"], shapes, shared_ef))
        for entry in entries
    }


def entries_of(module):
    """Return the state-dict entries of `module` in the form that `fill` takes."""
    return [
        {"key": key, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in module.state_dict().items()
    ]


def _fill(key, dtype, shapes, shared_ef):
    shape = shapes[key]
    if not dtype.startswith("float"):
        return np.zeros(shape, np.int64)
    parts = key.split(".")
    last = parts[-1]
    seed_key = key
    if shared_ef and len(parts) > 1 and parts[-2] == "F":
        seed_key = ".".join([*parts[:-2], "E", last])
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(seed_key.encode("utf-8"))))
    a = generator.standard_normal(tuple(shape), dtype=np.float32).astype(np.float64)
    if last == "running_mean":
        w = 0.1 * a
    elif last == "running_var":
        w = 1.0 + 0.1 * np.abs(a)
    elif last == "gamma":
        w = 0.5 + 0.1 * a
    elif last == "temperature":
        w = 4.0 * (1.0 + 0.5 * np.abs(a))
    elif last == "temperature2":
        base = key.removesuffix("temperature2")
        channels = shapes[base + "qkvv.weight"][1]
        by_sum = base + "EF" in shapes
        tokens = shapes[base + "EF"][0] if by_sum else shapes[base + "E.weight"][1]
        w = 2.0 * math.sqrt(tokens / (channels // shape[0])) * (1.0 + 0.5 * np.abs(a))
    elif last == "pos_embed":
        w = 0.1 * a
    elif last == "EF":
        w = a / math.sqrt(shape[0])
    elif last == "weight" and len(shape) >= 2:
        w = a / math.sqrt(int(np.prod(shape[1:])))
    elif last == "weight":
        w = 1.0 + 0.1 * a
    elif last == "bias":
        w = 0.1 * a
    else:
        raise KeyError(key)
    return w.astype(np.float32)
