"""Which backend runs: one table, one order, every reason.

    CPU tensor                  cpu, where it was built; else two_pass
    CUDA and any other tensor   two_pass; on CUDA, cuda or triton where it is forced
    under export                reference, since a graph of plain operators runs anywhere

A backend that is forced, by `use_backend`, the environment variable EPA_KERNELS_BACKEND or the
`backend` argument, never falls back: it runs or raises with every reason why it cannot.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .backends import cpu, cuda, triton

OPS = ("paired_attention", "spatial_attention", "channel_attention")


class Backend(NamedTuple):
    """One implementation of the three ops.

    functions: op name -> function with the signature of `reference.<op>`.
    why_not: (op, x) -> every reason why it cannot run on x, each a noun phrase; empty if it can.
    why_not_chosen: () -> reasons that keep it from being chosen unless forced.
    """

    functions: dict[str, Callable[..., Tensor]]
    why_not: Callable[[str, Tensor], list[str]]
    why_not_chosen: Callable[[], list[str]]


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def _no_reason(*_: object) -> list[str]:
    return []


def _exporting() -> list[str]:
    return ["export in progress: the graph would hold a custom operator"] if _is_exporting() else []


def _untried() -> list[str]:
    return [*_exporting(), "it has not run on a GPU yet, so it is chosen only by force"]


BACKENDS = {
    "cpu": Backend(ops.register("cpu", "CPU"), cpu.why_not, _exporting),
    "cuda": Backend(ops.register("cuda", "CUDA"), cuda.why_not, _untried),
    "triton": Backend(ops.register("triton"), triton.why_not, _untried),
    "two_pass": Backend(ops.register("two_pass"), _no_reason, _exporting),
    "reference": Backend({name: getattr(reference, name) for name in OPS}, _no_reason, _no_reason),
}
# First that can run wins; a device type that is not listed takes the last row.
ORDER = {
    "cpu": ("cpu", "two_pass", "reference"),
    "cuda": ("cuda", "triton", "two_pass", "reference"),
    "other": ("two_pass", "reference"),
}

# Earlier releases' names, still accepted.
FORMER_NAMES = {"cpp": "cpu"}

_forced: str | None = os.environ.get("EPA_KERNELS_BACKEND") or None


def check_backend(caller: str, name: str) -> str:
    """The name of a backend as this package writes it; ValueError if there is none of that name."""
    name = FORMER_NAMES.get(name, name)
    if name not in BACKENDS:
        raise ValueError(f"{caller}: backend must be one of {', '.join(BACKENDS)}, got {name!r}.")
    return name


class use_backend:
    """Force a backend for every call, or lift the force with None.

    `use_backend("reference")` holds from now on; `with use_backend("reference"):` holds inside the
    block. The setting is one per process, shared by its threads.

    Args:
        name: "cpu", "cuda", "triton", "two_pass", "reference", or None for automatic choice.

    Raises:
        ValueError: no such backend.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            name = check_backend("use_backend", name)
        self._name, self._previous = name, _forced
        _forced = name

    def __enter__(self) -> None:
        # Again, so that one object serves several blocks.
        global _forced
        _forced = self._name

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._previous


def _order(x: Tensor) -> Sequence[str]:
    return ORDER.get(x.device.type, ORDER["other"])


def select(op: str, x: Tensor, backend: str | None = None) -> str:
    """Name of the backend that runs `op` on x.

    Args:
        op: one of OPS.
        x: the op's first tensor.
        backend: forces one for this call, over `use_backend` and the environment.

    Raises:
        ValueError: no such backend.
        RuntimeError: the forced backend cannot run; the message lists every reason.
    """
    forced = backend or _forced
    if forced is None:
        for name in _order(x):
            # In this order: what is not to be chosen is not to be loaded either.
            if not BACKENDS[name].why_not_chosen() and not BACKENDS[name].why_not(op, x):
                return name
        raise AssertionError("reference runs on every tensor")
    forced = check_backend(op if backend else "EPA_KERNELS_BACKEND", forced)
    reasons = BACKENDS[forced].why_not(op, x)
    if reasons:
        able = [name for name in _order(x) if not BACKENDS[name].why_not(op, x)]
        raise RuntimeError(
            f"{op}: backend {forced!r} was forced but cannot run: {'; '.join(reasons)}. "
            f"Available: {', '.join(able)}. epa_kernels.explain({op!r}, x) prints all reasons."
        )
    return forced


def explain(op: str, x: Tensor) -> None:
    """Print which backend would run `op` on x, and for every other one why not.

    Args:
        op: "paired_attention", "spatial_attention" or "channel_attention".
        x: the op's first tensor; its device, dtype and shape decide.

    Example:
        >>> epa_kernels.explain("paired_attention", torch.randn(1, 64, 32))
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}.")
    print(f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}")
    forced = _forced and check_backend("EPA_KERNELS_BACKEND", _forced)
    chosen = forced
    for name in dict.fromkeys([*_order(x), *([forced] if forced else [])]):
        backend = BACKENDS[name]
        reasons = backend.why_not(op, x)
        if forced is None:
            reasons = reasons + backend.why_not_chosen()
            chosen = chosen or (None if reasons else name)
        if reasons:
            verdict = "cannot run: " + "; ".join(reasons)
        elif name == chosen:
            verdict = "runs" if forced is None else "runs (forced)"
        else:
            verdict = "can run"
        print(f"  {name:<10} {verdict}")
