"""Which backend runs: one table, one order, every reason.

    CPU tensor                  cpu, where it was built; else two_pass
    CUDA tensor                 the fastest of cuda, triton and two_pass, of those that passed their
                                check on that GPU: see `choice`
    any other tensor            two_pass
    where only plain operators  reference: under export, in a transform of torch.func, and for
    will do                     subclasses of Tensor that decide what an operator does

A backend that is forced, by `use_backend`, the environment variable EPA_KERNELS_BACKEND or the
`backend` argument, never falls back: it runs or raises with every reason why it cannot.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .backends import cpu, cuda, triton, two_pass
from .contract import AXES, OPS, Call, call_on
from .subclasses import foreign
from .torch_private import in_transform, is_exporting


class Backend(NamedTuple):
    """One implementation of the three ops.

    functions: op name -> function with the signature of `reference.<op>`.
    why_not: every reason why it cannot run a call, each a noun phrase; empty if it can.
    implementation: has a function for each schema of `contract.OPS`, named like it.
    trusted: may be chosen without a check on the device at hand.
    """

    functions: dict[str, Callable[..., Tensor]]
    why_not: Callable[[Call], list[str]]
    implementation: Any = None
    trusted: bool = True


def _no_reason(*_: object) -> list[str]:
    return []


def _why_plain_operators(call: Call) -> list[str]:
    """Why a call needs the plain operators of the reference, unless a backend is forced."""
    if is_exporting() or torch.jit.is_tracing():  # the older ONNX exporter traces
        return ["export in progress: the graph would hold a custom operator"]
    if not torch.compiler.is_compiling() and in_transform():
        return ["torch.func or forward-mode derivatives at work: the backend has none of them"]
    if (name := foreign(*call.activations)) is not None:
        return [f"{name} decides itself what an operator does, and knows torch's own alone"]
    return []


BACKENDS = {
    "cpu": Backend(ops.register("cpu", "CPU"), cpu.why_not, cpu),
    "cuda": Backend(ops.register("cuda", "CUDA"), cuda.why_not, cuda, trusted=False),
    "triton": Backend(ops.register("triton"), triton.why_not, triton, trusted=False),
    "two_pass": Backend(ops.register("two_pass"), _no_reason, two_pass),
    "reference": Backend({name: getattr(reference, name) for name in OPS}, _no_reason),
}
# First that can run wins, unless it or one behind it needs a check: then `choice` decides between
# those as far as the first that is trusted. A device type that is not listed takes the last row.
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


def _order(call: Call) -> Sequence[str]:
    return ORDER.get(call.device.type, ORDER["other"])


def _choose(call: Call) -> str:
    order = _order(call)
    if BACKENDS[order[0]].trusted:
        for name in order:
            if not BACKENDS[name].why_not(call):
                return name
        raise AssertionError("reference runs every call")
    from . import choice  # on a CPU nothing of it is needed

    if torch.compiler.is_compiling():
        able = _able(call)
        return able[0] if len(able) == 1 else choice.for_compiled(call, tuple(able))
    known = choice.known(call)
    if known is not None and not BACKENDS[known].why_not(call):  # which asks for strides, too
        return known
    able = _able(call)
    return able[0] if len(able) == 1 else choice.choose(call, BACKENDS, able)


def _able(call: Call) -> list[str]:
    """Names of the backends that can run a call, as far as the first that needs no check."""
    able = []
    for name in _order(call):
        if not BACKENDS[name].why_not(call):
            able.append(name)
            if BACKENDS[name].trusted:
                break
    return able


def select(call: Call, backend: str | None = None) -> str:
    """Name of the backend that runs a call.

    Args:
        backend: forces one for this call, over `use_backend` and the environment.

    Raises:
        ValueError: no such backend.
        RuntimeError: the forced backend cannot run; the message lists every reason.
    """
    forced = backend or _forced
    if forced is None:
        if _why_plain_operators(call):
            return "reference"
        return _choose(call)
    forced = check_backend(call.op if backend else "EPA_KERNELS_BACKEND", forced)
    reasons = BACKENDS[forced].why_not(call)
    if reasons:
        able = [name for name in _order(call) if not BACKENDS[name].why_not(call)]
        raise RuntimeError(
            f"{call.op}: backend {forced!r} was forced but cannot run: {'; '.join(reasons)}. "
            f"Available: {', '.join(able)}. epa_kernels.explain({call.op!r}, ...) prints all "
            f"reasons."
        )
    return forced


def explain(op: str | torch.nn.Module, *inputs: Tensor | None, **options: Any) -> None:
    """Print which backend would run a call, and for every other one why not.

    Of a layer also whether it is fused, and what keeps it from that.

    Args:
        op: "paired_attention", "spatial_attention" or "channel_attention"; or an `EPA` layer.
        inputs: all tensors of the function of that name; or the first one alone, and then limits
            on sizes that it does not tell are left out of the answer; of a layer its x.
        options: those of the function, such as `num_heads`, where all its tensors are given.

    Raises:
        ValueError: no such op; or other tensors than one, all, or a layer's x.

    Example:
        >>> epa_kernels.explain(epa_kernels.EPA(64, 32, 16), torch.randn(1, 64, 32))
        >>> epa_kernels.explain("paired_attention", torch.randn(1, 64, 32))
    """
    forced = getattr(op, "backend", None)
    if isinstance(op, torch.nn.Module):
        why, calls = _calls_of_layer(op, inputs)
        if why:
            print(f"the layer calls its modules and is not fused: {'; '.join(why)}")
    else:
        calls = [_explained_call(op, inputs, options)]
    for call in calls:
        _explain_call(call, forced)


def _explain_call(call: Call, forced: str | None) -> None:
    sizes = [f"{axis} = {n}" for axis in AXES if (n := getattr(call, axis))]
    flags = [name for name in ("normalize", "dropout") if getattr(call, name)]
    told = [
        f"{call.device.type} {str(call.dtype).removeprefix('torch.')}", *sizes,
        *filter(None, (call.kind, call.layout)), *flags,
    ]  # fmt: skip
    print(f"{call.op} on {', '.join(told)}")
    if forced is None and _forced is not None:
        forced = check_backend("EPA_KERNELS_BACKEND", _forced)
    chosen = forced
    said: dict[str, str] = {}
    if forced is None and not BACKENDS[_order(call)[0]].trusted and not _why_plain_operators(call):
        from . import choice

        said = choice.verdicts(call, BACKENDS, _able(call))
    for name in dict.fromkeys([*_order(call), *([forced] if forced else [])]):
        backend = BACKENDS[name]
        reasons = backend.why_not(call)
        if forced is None:
            if name != "reference":
                reasons += _why_plain_operators(call)
            chosen = chosen or (None if reasons else name)
        if reasons:
            verdict = "cannot run: " + "; ".join(reasons)
        elif said:
            verdict = said.get(name, "can run")
        elif name == chosen:
            verdict = "runs" if forced is None else "runs (forced)"
        else:
            verdict = "can run"
        print(f"  {name:<10} {verdict}")


def _calls_of_layer(layer: Any, inputs: tuple) -> tuple[list[str], list[Call]]:
    if not hasattr(layer, "explained"):
        raise ValueError(f"explain: the layer must be an EPA layer, got {type(layer).__name__}.")
    if len(inputs) != 1 or inputs[0] is None or inputs[0].dim() != 3:
        raise ValueError(
            f"explain: a layer needs its x of shape (B, N, C), got {len(inputs)} inputs."
        )
    return layer.explained(*inputs)


def _explained_call(op: Any, inputs: tuple, options: dict) -> Call:
    given = f"{len(inputs)} inputs"
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)} or a layer, got {op!r}.")
    contract = OPS[op]
    if len(inputs) not in (1, len(contract.inputs)) or inputs[0] is None:
        raise ValueError(
            f"explain: {op} needs its first tensor or all {len(contract.inputs)}, got {given}."
        )
    if len(inputs) == 1:
        return call_on(op, inputs[0])
    if op == "paired_attention" and not options.get("num_heads"):
        raise ValueError(f"explain: {op} needs num_heads, got {options.get('num_heads')}.")
    return contract.call(contract.Inputs(*inputs), contract.Options(**options))
