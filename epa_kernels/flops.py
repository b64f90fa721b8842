"""Floating-point operations of the ops, for torch.utils.flop_counter.FlopCounterMode.

Two for each multiply-add of the matrix products that `reference` takes. The backward pass takes as
many again for each factor of a product that needs a gradient. So every backend counts as the
reference does.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .contract import OPS, Op

COUNTER = "torch.utils.flop_counter"
# A product: multiply-adds, and whether each of its two factors needs a gradient.
Products = list[tuple[int, bool, bool]]


def _needed(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _attention(sizes: Any, op: str, q: bool, k: bool, v: bool, temperature: bool) -> Products:
    """The map and its product with v; q, k, v and temperature: whether they need gradients."""
    columns = sizes["P"] if op == "spatial_attention" else sizes["D"]
    adds = sizes["B"] * sizes["N"] * sizes["C"] * columns
    return [(adds, q, k), (adds, q or k or temperature, v)]


def _paired(inputs: Any, sizes: Any) -> Products:
    tokens, C, P = sizes["B"] * sizes["N"], sizes["C"], sizes["P"]
    x, weight = _needed(inputs.x), _needed(inputs.qkvv_weight)
    qkv = x or weight or _needed(inputs.qkvv_bias)
    E, E_bias = inputs.proj_k_weight, inputs.proj_k_bias
    F, F_bias = inputs.proj_v_weight, inputs.proj_v_bias
    if F is None:
        F, F_bias = E, E_bias
    k_proj, v_proj = qkv or _needed(E, E_bias), qkv or _needed(F, F_bias)
    t, t2 = _needed(inputs.temperature), _needed(inputs.temperature2)
    products = [
        (tokens * 4 * C * C, x, weight),
        (tokens * P * C, _needed(E), qkv),
        (tokens * P * C, _needed(F), qkv),
        *_attention(sizes, "channel_attention", qkv, qkv, qkv, t),
        *_attention(sizes, "spatial_attention", qkv, k_proj, v_proj, t2),
    ]
    for branch, out in (
        (qkv or k_proj or v_proj or t2, inputs.out_proj_weight),
        (qkv or t, inputs.out_proj2_weight),
    ):
        if out is not None:
            products.append((tokens * C * out.shape[0], branch, _needed(out)))
    return products


def _products(op: Op, inputs: Any, options: Any) -> Products:
    sizes = op.sizes(inputs, options)
    if op.name == "paired_attention":
        return _paired(inputs, sizes)
    q, k, v, temperature = map(_needed, inputs)
    return _attention(sizes, op.name, q, k, v, temperature)


def forward(op: Op, tensors: tuple, options: dict) -> int:
    """Operations of a call of an op with these arguments."""
    inputs, _, named = op.forward(tensors, options)
    return sum(2 * adds for adds, _, _ in _products(op, inputs, named))


def backward(op: Op, tensors: tuple, options: dict) -> int:
    """Operations of a call of its backward, whose first argument is the result's gradient."""
    inputs, _, _, named = op.backward(tensors[1:], options)
    return sum(2 * adds * (a + b) for adds, a, b in _products(op, inputs, named))


def _formula(count: Callable[..., int], op: Op) -> Callable[..., int]:
    return lambda *tensors, out_val=None, **options: count(op, tensors, options)


def _register(packets: Sequence[tuple[Any, Callable[..., int]]]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    for packet, formula in packets:
        register_flop_formula(packet, get_raw=True)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers as soon as somebody imports the counter, which itself takes 0.2 s to import."""

    def __init__(self) -> None:
        self.packets: list[tuple[Any, Callable[..., int]]] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            _register(self.packets)

        setattr(spec.loader, "exec_module", run_and_register)  # noqa: B010
        return spec


_after_import = _AfterImport()


def register(namespace: Any) -> None:
    """Let the counter know every op of a backend, at once or when it is imported.

    Args:
        namespace: torch.ops.epa_kernels_<backend>.
    """
    packets = []
    for name, op in OPS.items():
        packets.append((getattr(namespace, name), _formula(forward, op)))
        packets.append((getattr(namespace, f"{name}_bwd"), _formula(backward, op)))
    if COUNTER in sys.modules:
        _register(packets)
        return
    _after_import.packets += packets
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
