"""`patch_model`: the layer in the place of the published one, after a trial of both."""

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .contract import LAYOUTS
from .modules import EfficientPairedAttention
from .parts import DROPOUT, LINEAR

TOLERANCE = 1e-4  # relative L2 of two float32 results of one formula; other formulas differ by 0.1


class Patched(int):
    """How many layers `patch_model` replaced, a number like any other.

    Attributes:
        left: name of each layer that looks like a published one and was left alone -> the reason.
    """

    left: dict[str, str]

    def __new__(cls, count: int, left: dict[str, str]) -> "Patched":
        patched = super().__new__(cls, count)
        patched.left = left
        return patched

    def __reduce__(self) -> tuple[Any, ...]:
        return Patched, (int(self), self.left)


class _Unknown(Exception):
    """Why a layer is none of the published ones."""


def _kind_of(layer: nn.Module) -> str | None:
    """The kind of a published EPA layer, by its attributes; None if it is no such layer."""
    # A wrapper, as of torch.compile or peft, hands out the names of the layer that it holds.
    if "qkvv" not in layer._modules:
        return None
    if not (hasattr(layer, "temperature") and hasattr(layer, "temperature2")):
        return None
    if hasattr(layer, "EF"):
        return "sum"
    if hasattr(layer, "E") and hasattr(layer, "F"):
        return "shared" if layer.E is layer.F else "split"
    return None


def _parts(kind: str) -> tuple[str, ...]:
    own = ("temperature", "temperature2", *(("EF",) if kind == "sum" else ()))
    return (*own, *LINEAR[kind], *DROPOUT)


def _sizes(layer: Any, kind: str) -> tuple[int, int, int, int]:
    """N, C, P and H, by the shapes that parts give themselves."""
    names = _parts(kind)
    known = {
        *dict(layer.named_parameters(recurse=False)),
        *dict(layer.named_buffers(recurse=False)),
        *dict(layer.named_children()),
    }
    missing = [name for name in names if not hasattr(layer, name)]
    besides = sorted(known - set(names))
    if missing or besides:
        raise _Unknown(
            " and ".join(
                f"it {verb} {', '.join(found)}"
                for verb, found in (("lacks", missing), ("has besides", besides))
                if found
            )
        )
    if "forward" in vars(layer):
        raise _Unknown("its forward was replaced on the object")
    C, H = getattr(layer.qkvv, "in_features", 0), layer.temperature.numel()
    if kind == "sum":
        N, P = layer.EF.shape if layer.EF.dim() == 2 else (0, 0)
    else:
        N, P = (getattr(layer.E, name, 0) for name in ("in_features", "out_features"))
    features = {"qkvv": (C, 4 * C), "E": (N, P), "F": (N, P)}
    features |= dict.fromkeys(("out_proj", "out_proj2"), (C, C // 2))
    wrong = []
    for name in LINEAR[kind]:
        part = getattr(layer, name)
        found = getattr(part, "in_features", 0), getattr(part, "out_features", 0)
        if found != features[name]:
            wrong.append(f"{name} {found} instead of {features[name]}")
    if not (N and P and C and H) or C % H or layer.temperature2.numel() != H or wrong:
        told = ", ".join(wrong) or f"N = {N}, C = {C}, P = {P}, {H} heads"
        raise _Unknown(f"its parts have an unknown shape: {told}")
    return N, C, P, H


def _trial_parts(kind: str, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Fresh parts of the layer's shapes, with weights that tell one formula from another.

    The layer's own may be zero, in half precision, on another device or on none, and have hooks.
    """
    N, C, P, H = sizes
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> nn.Parameter:
        values = torch.empty(shape, device="cpu", dtype=torch.float32)
        return nn.Parameter(values.normal_(generator=generator), requires_grad=False)

    def linear(inputs: int, outputs: int) -> nn.Linear:
        part = nn.Linear(inputs, outputs, device="meta").eval()
        part.weight, part.bias = draw(outputs, inputs), draw(outputs)
        part.weight.data *= inputs**-0.5
        return part

    # Such temperatures that no softmax is uniform: q^ has elements of the size N^-0.5.
    found: dict[str, Any] = {"temperature": draw(H, 1, 1), "temperature2": draw(H, 1, 1)}
    found["temperature"].data.add_(4)
    found["temperature2"].data.add_(4).mul_((N * H / C) ** 0.5)
    if kind == "sum":
        found["EF"] = draw(N, P)
        found["EF"].data *= N**-0.5
    else:
        found["E"] = linear(N, P)
        found["F"] = found["E"] if kind == "shared" else linear(N, P)
        found["out_proj"], found["out_proj2"] = linear(C, C // 2), linear(C, C // 2)
    found["qkvv"] = linear(C, 4 * C)
    for name in DROPOUT:
        found[name] = nn.Dropout(0.0).eval()
    return found


def _with_parts(layer: nn.Module, parts: dict[str, Any]) -> nn.Module:
    """A copy of the layer with other parts, in eval mode and without hooks."""
    # Whatever the layer holds refers to the new parts, too.
    memo = {id(getattr(layer, name)): part for name, part in parts.items()}
    twin = object.__new__(type(layer))
    own = vars(nn.Module()) | {"training": False}
    for name, value in vars(layer).items():
        if name not in own:
            # A map that was kept for a picture cannot be copied, and need not be.
            with contextlib.suppress(Exception):
                value = copy.deepcopy(value, memo)
            own[name] = value
    vars(twin).update(own)
    for name, part in parts.items():
        setattr(twin, name, part)
    return twin


def _tried(layer: nn.Module, parts: dict[str, Any], x: Tensor, *, training: bool) -> Tensor:
    """What the layer's forward makes of tokens, with other parts that drop nothing."""
    try:
        result = _with_parts(layer, parts).train(training).forward(x.clone())
    except Exception as error:  # of any kind: it is not our code
        raise _Unknown(
            f"its forward failed on tokens {tuple(x.shape)}: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(result, Tensor) or result.shape != x.shape:
        raise _Unknown(f"its forward does not turn tokens {tuple(x.shape)} into such tokens")
    return result


def _layout_of(layer: nn.Module, kind: str, sizes: tuple[int, int, int, int]) -> str:
    """The layout with which ours computes what the layer does."""
    if type(layer).forward is nn.Module.forward:  # it has none: there is nothing to keep
        return LAYOUTS[0]
    N, C, P, H = sizes
    parts = _trial_parts(kind, sizes)
    x = torch.empty(2, N, C, device="cpu", dtype=torch.float32)
    x.normal_(generator=torch.Generator("cpu").manual_seed(1))
    # Its forward may draw numbers, too.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        theirs = _tried(layer, parts, x, training=False)
        differences = {}
        for layout in LAYOUTS:
            ours = _build(parts, kind, sizes, layout).eval()
            ours.backend = "reference"
            expected = ours(x)
            differences[layout] = float((theirs.float() - expected).norm() / expected.norm())
            if differences[layout] <= TOLERANCE:
                # Nothing is dropped, so a published layer computes the same when it trains.
                trained = _tried(layer, parts, x, training=True)
                if float((trained - theirs).norm() / expected.norm()) > TOLERANCE:
                    raise _Unknown("its forward computes something else in training mode")
                return layout
    told = ", ".join(f"{value:.2g} from layout {name!r}" for name, value in differences.items())
    raise _Unknown(f"its forward computes something else (relative difference {told})")


def _build(
    parts: dict[str, Any], kind: str, sizes: tuple[int, int, int, int], layout: str
) -> EfficientPairedAttention:
    ours = EfficientPairedAttention(*sizes, kind=kind, layout=layout, device="meta")
    for name, part in parts.items():
        setattr(ours, name, part)
    return ours


def _adopt(layer: nn.Module, kind: str) -> EfficientPairedAttention:
    """Our layer around the parts of a published one, with its hooks, mode and own attributes."""
    sizes = _sizes(layer, kind)
    layout = _layout_of(layer, kind, sizes)
    ours = _build({name: getattr(layer, name) for name in _parts(kind)}, kind, sizes, layout)
    held = vars(ours)
    # The tables of hooks themselves, so that a handle still removes its hook.
    hooks = {k: v for k, v in vars(layer).items() if k in vars(nn.Module()) and "hooks" in k}
    added = {k: v for k, v in vars(layer).items() if k not in held}
    held.update(hooks | added | {"training": layer.training})
    return ours


def patch_model(model: nn.Module) -> Patched:
    """Replace every published EPA layer inside `model` by ours, in place.

    A layer counts if it has `qkvv`, `temperature`, `temperature2` and either `E` and `F` or `EF`.
    Its kind follows from them. Both layers are tried first, in eval mode and on the CPU, on random
    tokens and with random weights of the same shapes. If the results are equal, ours takes the
    place, with the layout that the trial found. If not, or if the old layer computes something
    else in training mode without dropout, it is left alone, and one warning names it with the
    reason.

    Parts are shared, not copied, and hooks on the layer are kept. Outputs, optimizers, state-dict
    keys and checkpoints stay valid. The model's mode, gradients and torch's generator do not
    change.

    Args:
        model: any module that contains such layers.

    Returns:
        How many layers were replaced, an int. Its attribute `left` maps the name of each layer that
        was left alone to the reason.

    Raises:
        ValueError: the model contains nothing that looks like such a layer.

    Example:
        >>> import epa_kernels
        >>> patched = epa_kernels.patch_model(model)
        >>> patched, patched.left
        (21, {})
    """
    adopted: dict[int, EfficientPairedAttention] = {}
    places: list[tuple[nn.Module, str, EfficientPairedAttention]] = []
    left: dict[int, tuple[str, str]] = {}
    for prefix, parent in model.named_modules():
        # Not named_children: it skips the second name of a layer that one parent holds twice.
        for name, child in parent._modules.items():
            if child is None or isinstance(child, EfficientPairedAttention) or id(child) in left:
                continue
            if (kind := _kind_of(child)) is None:
                continue
            if id(child) not in adopted:
                try:
                    adopted[id(child)] = _adopt(child, kind)
                except _Unknown as reason:
                    left[id(child)] = (f"{prefix}.{name}".lstrip("."), str(reason))
                    continue
            places.append((parent, name, adopted[id(child)]))
    if not adopted and not left:
        own = sum(isinstance(child, EfficientPairedAttention) for child in model.modules())
        if own:
            raise ValueError(
                f"patch_model: {type(model).__name__} holds {own} layer(s) of epa_kernels already, "
                f"and no published one beside them; nothing is left to swap."
            )
        raise ValueError(
            f"patch_model: {type(model).__name__} contains no published EPA layer (a submodule "
            f"with qkvv, temperature, temperature2 and E and F, or EF); for a model that is itself "
            f"the layer, build epa_kernels.EPA and load its state dict."
        )
    for parent, name, ours in places:
        setattr(parent, name, ours)
    patched = Patched(len(adopted), dict(left.values()))
    if left:
        warnings.warn(
            f"patch_model: {len(adopted)} layers were replaced and {len(left)} left alone: "
            + "; ".join(f"{name}: {reason}" for name, reason in patched.left.items())
            + ".",
            stacklevel=2,
        )
    return patched
