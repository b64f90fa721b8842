"""What all networks share: the registry, strides and sizes, configuration, checks, resizing."""

import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

import torch
from torch import Tensor, nn

from unetrpp.models.layers import Triple

__all__ = [
    "MODELS",
    "RECONSTRUCTION",
    "Network",
    "Widths",
    "nearest_legal_size",
    "register",
    "size_multiples",
    "size_text",
]

STAGES = 4

# What a user must know of a network whose `is_reconstruction` is set.
RECONSTRUCTION = (
    "a RECONSTRUCTION: only parts of it were published, how they are joined is this package's "
    "guess; nothing is known of its accuracy"
)

N = TypeVar("N", bound="Network")

# The registry: every network by its name, filled by `register`.
MODELS: dict[str, type["Network"]] = {}


def register(network: type[N]) -> type[N]:
    """Class decorator: make a network known by its `name` to every function and command."""
    MODELS[network.name] = network
    return network


@dataclass(frozen=True)
class Widths:
    """What `unetrpp train` takes for the widths where the user names no preset.

    Args:
        preset: one of the network's.
        reason: the sentence that is printed.
        settings: constructor arguments beside the preset's.
    """

    preset: str
    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class Network(nn.Module):
    """A network of four stages for volumes, built from arguments that its `config` keeps.

    A subclass with the decorator `register` is a network of this package; its file says all that is
    its own, in the class attributes below.

    Args:
        in_channels: channels of the input volume.
        img_size: size of the input volume, three integers or one.
        strides: one step per stage, three integers or one each; img_size must be a multiple of
            their product.
        arguments: the other constructor arguments of the subclass, for `config`.

    Attributes:
        img_size, strides: as tuples of integers.
        grids: token grid of each stage.
        name: what `create_model` knows the network by.
        takes_any_size: whether forward takes every legal size, or img_size alone because weights
            are bound to the number of tokens.
        coarse_heads: names of the modules that only deep supervision uses; none in most networks.
        unread_parameters: ends of the names of parameters that the published state dict has and
            that forward never reads.
        has_deep_supervision: whether the network has coarser outputs for training.
        deep_supervision: whether forward returns them, too. Can be switched at any time. While it
            is off, the coarse heads get no gradient and ask for none (requires_grad is False), so
            that DistributedDataParallel does not wait for one; they keep their weights.
        is_reconstruction: whether the network was published in parts only and joined here.
        input_weight, output_weight: key of the tensor whose given axis has the input channels, and
            of the one with the classes.
        presets: constructor arguments that differ from the defaults, by name. The first presets are
            the published variants; "tiny", in every network, runs in a second on one CPU core.
        cpu_widths, gpu_widths: what `unetrpp train` proposes, by the device.
        recipe: how the network was trained: options of `TrainConfig` by name, with steps. A recipe
            without batch_size was trained with 2.
        published_patch: the size it was trained at, for the help of `--patch_size`.

    Raises:
        ValueError: strides or size break their rule, or another argument is not of the type that
            the subclass's constructor gives it.
    """

    name: str
    takes_any_size = False
    coarse_heads: ClassVar[tuple[str, ...]] = ()
    unread_parameters: ClassVar[tuple[str, ...]] = ()
    is_reconstruction = False
    input_weight: tuple[str, int]
    output_weight: tuple[str, int]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    cpu_widths: ClassVar[Widths]
    gpu_widths: ClassVar[Widths]
    recipe: ClassVar[Mapping[str, Any]]
    published_patch: ClassVar[str]

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int] | int,
        strides: Sequence[Sequence[int] | int],
        **arguments: Any,
    ) -> None:
        super().__init__()
        self._deep_supervision = False
        self._resting: set[str] = set()  # parameters of coarse heads that would ask for gradients
        self.check_lengths(STAGES, strides=strides)
        self.check_types(in_channels=in_channels, **arguments)
        self.in_channels = in_channels
        self.strides = tuple(self._triple("strides", stride) for stride in strides)
        self.img_size = self._triple("img_size", img_size)
        self.grids = _stage_grids(self.img_size, self.strides, type(self).__name__)
        self._arguments = {"in_channels": in_channels, "strides": self.strides, **arguments}

    @classmethod
    def build(cls, **arguments: Any) -> "Network":
        """Build a model with constructor arguments that a user or a file names.

        Raises:
            ValueError: an argument is unknown or missing, or breaks its rule.
        """
        signature = inspect.signature(cls)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"{cls.__name__}: {error}; its arguments are {', '.join(signature.parameters)}."
            ) from None
        return cls(**arguments)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> "Network":
        """Build a model with the settings of a preset, some of them overridden.

        Args:
            preset: a name among the presets of this network, for instance "tiny"; the network's
                own name may stand in front, "segformer3d/tiny".
            overrides: constructor arguments, for instance in_channels=2, img_size=(96, 96, 96).

        Raises:
            ValueError: no such preset, or an argument is unknown or breaks its rule.
        """
        presets = cls.presets
        name = str(preset).removeprefix(f"{cls.name}/")
        if name not in presets:
            raise ValueError(
                f"{cls.__name__}.from_preset: preset must be one of {', '.join(presets)}; got "
                f"{preset!r}."
            )
        return cls.build(**{**presets[name], **overrides})

    @staticmethod
    def is_decayed(name: str, parameter: nn.Parameter) -> bool:
        """Whether the weight decay of the published recipe acts on a parameter of this name."""
        return True

    @classmethod
    def load_warning(cls, overrides: Mapping[str, Any]) -> str | None:
        """Return what the user of a published file must know, if there is something.

        Args:
            overrides: the constructor arguments that the user gave.

        Returns: the rest of a sentence that starts with the file's name.
        """
        return f"is read as {cls.__name__}, {RECONSTRUCTION}." if cls.is_reconstruction else None

    @classmethod
    def channels_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the numbers of input channels and of classes that a state dict was made for."""
        found = {}
        for argument, (key, axis) in (
            ("in_channels", cls.input_weight),
            ("out_channels", cls.output_weight),
        ):
            if key in tensors:
                found[argument] = tensors[key].shape[axis]
        return found

    @property
    def has_deep_supervision(self) -> bool:
        """See `Network`."""
        return bool(self.coarse_heads)

    @property
    def deep_supervision(self) -> bool:
        """See `Network`."""
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, value: bool) -> None:
        self._deep_supervision = value
        for name, parameter in self._coarse_parameters():
            if value:
                # Only what was put to rest here is woken: a frozen head stays frozen.
                parameter.requires_grad_(parameter.requires_grad or name in self._resting)
            elif parameter.requires_grad:
                self._resting.add(name)
                parameter.requires_grad_(False)
        if value:
            self._resting.clear()

    def _coarse_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for head in self.coarse_heads:
            yield from self.get_submodule(head).named_parameters(head)

    def requires_grad_(self: N, requires_grad: bool = True) -> N:
        """As of every module, except that what gets no gradient does not ask for one.

        The coarse heads follow when deep supervision is switched on.
        """
        super().requires_grad_(requires_grad)
        for name, parameter in self.named_parameters():
            if name.endswith(self.unread_parameters):
                parameter.requires_grad_(False)
        if not self._deep_supervision:
            self._resting.clear()
            self.deep_supervision = False
        return self

    def reset_parameters(self) -> None:
        """Draw every parameter and statistic anew, as at construction; after `to_empty`, say."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        self.draw_own_way()

    def draw_own_way(self) -> None:
        """Draw what this network draws in another way than torch's layers; nothing in most."""

    @property
    def config(self) -> dict[str, Any]:
        """Name and constructor arguments, as plain JSON.

        `unetrpp.create_model(config["name"], **config["args"])` builds the model again.

        A class from outside this package adds "class", its dotted name. With the decorator
        `register` and a name of its own it is built again by that name; its constructor arguments
        are then attributes of the same names, and "img_size" is the present one. Without, name and
        args are those of the network that it derives from.
        """
        arguments = {**self._arguments, "img_size": self.img_size}
        if self.has_deep_supervision:
            arguments["deep_supervision"] = self.deep_supervision
        config: dict[str, Any] = {"name": self.name, "args": arguments}
        cls = type(self)
        if not cls.__module__.startswith(f"{__package__}."):
            config["class"] = f"{cls.__module__}.{cls.__qualname__}"
            if MODELS.get(self.name) is cls:
                config["args"] = self._own_arguments(arguments)
                config["img_size"] = self.img_size  # which the constructor need not take
        try:
            return json.loads(json.dumps(config))
        except TypeError as error:
            raise ValueError(
                f"{cls.__name__}.config: constructor arguments must be plain JSON, but {error}."
            ) from error

    def _own_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what this class's own constructor takes: of `arguments`, or an attribute."""
        parameters = inspect.signature(type(self)).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        own = {key: value for key, value in arguments.items() if takes_all or key in parameters}
        for name, parameter in parameters.items():
            is_named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if is_named and name not in own and hasattr(self, name):
                own[name] = getattr(self, name)
        return own

    @property
    def attention_inputs(self) -> dict[str, tuple[int, ...]]:
        """Ops of `epa_kernels` that forward runs, each with the first shape it gets, batch 1."""
        raise NotImplementedError

    def _heads_shape(self, level: int, tokens_level: int) -> tuple[int, int, int, int]:
        """(1, N, H, D) of the heads of a stage, from 0, on as many tokens as another has."""
        channels, heads = (self._arguments[key][level] for key in ("dims", "num_heads"))
        return 1, math.prod(self.grids[tokens_level]), heads, channels // heads

    def resize_tokens(self, img_size: Sequence[int] | int) -> "Network":
        """Carry the weights to another input size, in place, and return the model.

        What has one entry per token is resampled over its token grid: position embeddings as a
        field (trilinear when growing, averaged when shrinking), E, F and EF so that their sum over
        tokens and their result on smooth fields stay, temperature2 by the square root of the
        token counts (see `layers.TransformerBlock.resize_tokens`). All other weights do not depend
        on the size. Parameters stay the same objects, with their dtype, device and requires_grad;
        their gradients are dropped, and optimizer state that has the old shapes must be made anew.

        Where tokens are stored in an order that depends on their number (layout "official" of
        UNETR++, the decoder's input of Slim UNETR) the resized model agrees less closely. Expect
        to fine-tune.

        Args:
            img_size: the new input size, legal for the strides of the model.

        Raises:
            ValueError: the size does not fit the strides; the model is then unchanged.
        """
        img_size = self._triple("img_size", img_size)
        grids = _stage_grids(img_size, self.strides, f"{type(self).__name__}.resize_tokens")
        # Stages share a grid only where all strides between them are 1, and then at every size.
        new = dict(zip(self.grids, grids, strict=True))
        for module in self.modules():
            resize: Any = getattr(module, "resize_tokens", None)
            if module is not self and resize is not None:
                resize(new[cast(Triple, module.grid)])
        self.img_size, self.grids = img_size, grids
        return self

    def check_input(self, x: Tensor) -> Tensor:
        """Return x as forward takes it; a ValueError names rule and remedy if it cannot.

        While torch.compile traces, a subclass such as MONAI's MetaTensor becomes a plain tensor:
        torch 2.13 cannot compile even nn.Conv3d for it. That breaks the graph once, before the
        network. Otherwise x stays what it is.
        """
        if torch.compiler.is_dynamo_compiling() and type(x) is not Tensor:
            x = x.as_subclass(Tensor)
        size = tuple(x.shape[2:])
        caller = f"{type(self).__name__}.forward"
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            axes = "XYZ" if self.takes_any_size else map(str, self.img_size)
            raise ValueError(
                f"{caller}: x must be (B, {self.in_channels}, {', '.join(axes)}), got "
                f"{tuple(x.shape)}."
            )
        if size == self.img_size:
            return x
        legal = nearest_legal_size(size, self.strides)
        if self.takes_any_size:
            if size != legal:
                raise ValueError(
                    f"{caller}: each axis of x must be a multiple of "
                    f"{size_multiples(self.strides)}, the products of the strides; got {size}. "
                    f"Crop or pad x to {legal}."
                )
            return x
        if size == legal:
            got = _stage_grids(size, self.strides, caller)[0]
            found = f"{math.prod(got)} tokens {got}"
        else:
            found = f"a size that is no multiple of {size_multiples(self.strides)}"
        raise ValueError(
            f"{caller}: stage 1 expects {math.prod(self.grids[0])} tokens {self.grids[0]}, those "
            f"of img_size {self.img_size}, but x is {size}: {found}. Crop or pad x to "
            f"{self.img_size}, or slide a window of that size over it "
            f"(monai.inferers.sliding_window_inference), or carry the weights over with "
            f"model.resize_tokens({legal})."
        )

    @classmethod
    def check_lengths(cls, length: int, **arguments: Sequence) -> None:
        """Raise a ValueError that names the argument which has not `length` entries."""
        for name, value in arguments.items():
            is_list = isinstance(value, Collection)
            if not is_list or len(value) != length:
                number = f"{len(value)}: " if is_list else ""
                raise ValueError(
                    f"{cls.__name__}: {name} must have {length} entries, got {number}{value!r}."
                )

    @classmethod
    def check_types(cls, **arguments: Any) -> None:
        """Raise a ValueError that names the argument which is not what its type hint says.

        Integers are numbers of something: at least 1, depths at least 0. Dropout is a share.
        """
        hints = cls._type_hints()
        for name, value in arguments.items():
            least = 0 if name.endswith("depths") else 1
            is_share = name.endswith("dropout")
            is_number = isinstance(value, Real) and (not is_share or 0 <= float(value) <= 1)
            rules = {
                int: (f"an integer, at least {least}", _are_integers([value], least)),
                Sequence[int]: (f"integers, each at least {least}", _are_integers(value, least)),
                float: ("a share from 0 to 1" if is_share else "a number", is_number),
                bool: ("true or false", isinstance(value, bool)),
                str: ("a word", isinstance(value, str)),
            }
            # A network of somebody else may leave out hints, or have others.
            hint = hints.get(name)
            rule, holds = rules[hint] if hint in rules else ("", True)
            if not holds:
                raise ValueError(f"{cls.__name__}: {name} must be {rule}; got {value!r}.")

    @classmethod
    def _type_hints(cls) -> dict[str, Any]:
        """Return the type hints of the constructors from Network's subclass down to this class.

        Of an argument that several of them name, the first one's, because that one checks it.
        """
        hints: dict[str, Any] = {}
        for owner in reversed(cls.__mro__):
            if issubclass(owner, Network) and "__init__" in vars(owner):
                with suppress(NameError, TypeError):  # a hint that is there for type checkers alone
                    hints = {**get_type_hints(owner.__init__), **hints}
        return hints

    @classmethod
    def check_heads(cls, dims: Sequence[int], num_heads: Sequence[int]) -> None:
        """Raise a ValueError unless every stage's heads divide its channels."""
        if any(channels % heads for channels, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(
                f"{cls.__name__}: num_heads must divide dims stage by stage, got {num_heads} and "
                f"{dims}."
            )

    @classmethod
    def _triple(cls, name: str, value: Sequence[int] | int) -> Triple:
        values: Any = (value,) * 3 if isinstance(value, Integral) else value
        if not _are_integers(values, 1) or len(values) != 3:
            raise ValueError(
                f"{cls.__name__}: {name} must be one integer or three, each at least 1; got "
                f"{value!r}."
            )
        return cast(Triple, tuple(map(int, values)))


def size_multiples(strides: Sequence[Sequence[int]]) -> Triple:
    """Return, per axis, what `img_size` must be a multiple of: the product of the strides."""
    multiples: Any = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
    return multiples


def nearest_legal_size(size: Sequence[float], strides: Sequence[Sequence[int]]) -> Triple:
    """Return the legal input size nearest to `size`, per axis at least one multiple, ties up.

    Its numbers have the type of `size`: integers, floats or those of a symbolic shape.
    """
    axes = zip(size, size_multiples(strides), strict=True)
    nearest: Any = tuple(max(1, (2 * n + m) // (2 * m)) * m for n, m in axes)
    return nearest


def size_text(values: Sequence[float]) -> str:
    """Return sizes as they are printed: (64, 128, 128) is "64x128x128"."""
    return "x".join(f"{value:g}" for value in values)


def _are_integers(values: Any, least: int) -> bool:
    return isinstance(values, Collection) and all(
        isinstance(value, Integral) and int(value) >= least for value in values
    )


def _stage_grids(img_size: Triple, strides: Sequence[Triple], caller: str) -> list[Triple]:
    """Return the token grid of each stage, or raise if the size does not fit the strides."""
    legal = nearest_legal_size(img_size, strides)
    if img_size != legal:
        multiples = size_multiples(strides)
        raise ValueError(
            f"{caller}: img_size must be a multiple of {multiples} per axis, the products of the "
            f"strides; got {img_size}. Nearest legal size: {legal}."
        )
    grids = []
    for stride in strides:
        img_size = cast(Triple, tuple(n // s for n, s in zip(img_size, stride, strict=True)))
        grids.append(img_size)
    return grids
