"""Golden values: numbers computed with the published code, to compare ours with.

    path("model_acdc.json")            where the file lies; skips the test if it is nowhere
    load("model_acdc.safetensors")     (tensors, metadata), metadata decoded from JSON
    load("acdc.state_dict.json")       the decoded JSON
    load("slim_unetr/lrd_stage2.npz")  a dict of tensors; the siblings have a folder each
    fill(entries, shared_ef=False)     the weights that belong to a list of state-dict entries
    fill_sibling(entries, folder, ...) the same by the rule of the siblings' files

The smaller files lie in tests/golden/ (see its README.md). The rest is looked up in
$EPA_KERNELS_SHARED/golden or, without that variable, in ../shared/golden, where the files of
UNETR++ have a folder of their own, too.
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
    elsewhere = shared / "golden" if "/" in name else shared / "golden" / "unetrpp"
    for candidate in (HERE / name, HERE / f"{name}.gz", elsewhere / name):
        if candidate.is_file():
            return candidate
    pytest.skip(f"golden file {name} is neither in tests/golden nor in {elsewhere}")


def load(name):
    """Return the decoded JSON of `name`, the arrays of an `.npz` file as a dict of tensors, or
    `(tensors, metadata)` of a `.safetensors` file."""
    file = path(name)
    if name.endswith(".npz"):
        return {key: torch.from_numpy(value) for key, value in np.load(file).items()}
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


def drawn(seed, shape):
    """Return PCG64 normals in float32, the rule of all golden inputs."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


# Ends of keys with a rule of their own: value from a normal a and its 1 / sqrt(fan-in) d.
_SPECIAL = {
    "segformer3d": {},
    "slim_unetr": {
        "Encoder.position_embeddings": lambda a, d: 0.5 * a,
        "positional_encoding.weight": lambda a, d: 0.3 * a * d,
        "LocalRC.pointwise_conv_1.weight": lambda a, d: 0.3 * a * d,
        "line_conv_1.weight": lambda a, d: 0.3 * a * d,
        "GlobalST.qkv.weight": lambda a, d: 0.6 * a * d,
    },
    # Attention layers alone.
    "slim_unetr/gst": {"qkv.weight": lambda a, d: 0.9 * a * d},
    "slim_unetr/lrd": {},
    "slim_unetrpp_pieces": {
        "grn_gamma": lambda a, d: 0.5 * a,
        "grn_beta": lambda a, d: 0.5 * a,
        "temperature": lambda a, d: 3 + 0.5 * a,
        "temperature2": lambda a, d: 3 + 0.5 * a,
        "gamma": lambda a, d: 0.5 + 0.1 * a,
        "pos_embed": lambda a, d: 0.5 * a,
    },
}


def fill_sibling(entries, folder, *, salt=""):
    """Return `{key: tensor}` for state-dict entries of a sibling.

    `folder` names the rules for special keys: a folder of golden files, or one of `_SPECIAL`.
    """

    def values(key, shape, dtype):
        if not dtype.startswith("float"):
            return np.zeros(shape, np.int64)
        generator = np.random.Generator(np.random.PCG64(zlib.crc32((salt + key).encode())))
        a = generator.standard_normal(tuple(shape), dtype=np.float32).astype(np.float64)
        d = 1 / math.sqrt(math.prod(shape[1:]))
        for end, rule in _SPECIAL[folder].items():
            if key.endswith(end):
                return rule(a, d)
        if key.endswith("running_mean"):
            return 0.1 * a
        if key.endswith("running_var"):
            return 1 + 0.1 * np.abs(a)
        if len(shape) >= 2:
            return a * d
        if key.endswith("weight"):
            return 1 + 0.1 * a
        if key.endswith("bias"):
            return 0.1 * a
        raise KeyError(key)

    def tensor(entry):
        value = values(entry["key"], entry["shape"], entry["dtype"])
        return torch.from_numpy(value.astype(np.float32 if value.dtype.kind == "f" else np.int64))

    return {entry["key"]: tensor(entry) for entry in entries}
