"""The contract of every op, stated once: its inputs, options, results, and what a call of it is.

From it follow the schemas and fakes of `ops`, the checks of `functional`, the questions that
`dispatch` asks of a backend, and the order in which compiled backends hand over tensors.

Axes: B batch, N tokens, C channels, H heads, D = C/H head dim, P projected tokens, J token
projections: 2 for kind "split", else 1.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

KINDS = ("shared", "split", "sum")
LAYOUTS = ("official", "tokens")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of compiled kernels
NORM_EPS = 1e-12  # no norm is taken for smaller

# Where backends must pass a check before one is chosen, see `choice`.
CHECKED_DEVICES = ("cuda",)

AXES = {
    "B": "batch size",
    "N": "number of tokens",
    "C": "channels",
    "H": "number of heads",
    "D": "head dim",
    "P": "number of projected tokens",
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every smaller floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mean_dtype(device: torch.device) -> torch.dtype:
    """dtype of the token mean that paired_attention keeps: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def plan(num_tokens: int, channels: int) -> str:
    """Plan of paired_attention: "two_pass", or "direct" where C x C algebra costs more than tokens.

    The direct plan keeps nothing but x for backward; its other kept tensors have size 0.
    """
    return "direct" if num_tokens < 2 * channels else "two_pass"


class Call(NamedTuple):
    """One call of an op: all that decides which backend can run it. A size that is unknown is 0."""

    op: str
    device: torch.device
    dtype: torch.dtype  # of the activations
    B: int
    N: int
    C: int
    H: int
    D: int
    P: int  # 0 for channel_attention, too
    kind: str = ""  # of paired_attention alone, as layout
    layout: str = ""
    normalize: bool = False  # of spatial_attention alone
    dropout: bool = False
    backward: bool = False  # whether autograd will ask for gradients
    parameter_dtype: torch.dtype | None = None  # None as the activations
    is_mixed: bool = False  # parameters have several dtypes
    activations: tuple[Tensor, ...] = ()  # for their strides

    def beyond(self, limits: Mapping[str, int]) -> list[str]:
        """The reason for each axis of `limits` that is longer than the limit."""
        return [
            f"{AXES[axis]} {getattr(self, axis)} > {most}"
            for axis, most in limits.items()
            if getattr(self, axis) > most
        ]


def axis_lengths(B: int, N: int, C: int, H: int, D: int, P: int, J: int = 1) -> dict[str, int]:
    """Length of every axis that the contract names."""
    return {
        "B": B, "N": N, "C": C, "H": H, "D": D, "P": P,
        "J": J, "4C": 4 * C, "C/2": C // 2, "1": 1,
    }  # fmt: skip


PER_HEAD = ("H or 1",)


class Input(NamedTuple):
    """What an op asks of an input, beside its type.

    axes: the shape; PER_HEAD is one element a head or one for all, in any shape.
    role: "activation" shares the dtype of the first input and is read by its strides; "projection"
        is a parameter that is read by its strides; "parameter" is read as a dense array.
    optional: may be None; other inputs are None for the kinds that do not take them.
    kinds: the kinds of paired attention that take it, where not all do.
    hint: what to do about another shape.
    """

    axes: tuple[str, ...]
    role: str
    optional: bool = False
    kinds: tuple[str, ...] = ()
    hint: str = ""


def _input(role: str) -> Callable[..., Input]:
    return lambda axes, *rest, **options: Input(tuple(axes.split(", ")), role, *rest, **options)


activation, projection, parameter = map(_input, ("activation", "projection", "parameter"))


class Kept(NamedTuple):
    """A tensor that an op keeps for backward, in the accumulation dtype unless told."""

    axes: tuple[str, ...]
    dtype: Callable[[torch.dtype, torch.device], torch.dtype] = lambda dtype, _: accumulate_dtype(
        dtype
    )


class PairedInputs(NamedTuple):
    """Inputs of paired_attention."""

    x: Annotated[
        Tensor,
        activation(
            "B, N, C",
            hint="a volume (B, C, X, Y, Z) becomes tokens by x.flatten(2).transpose(1, 2)",
        ),
    ]
    qkvv_weight: Annotated[Tensor, parameter("4C, C")]
    qkvv_bias: Annotated[Tensor | None, parameter("4C", True)]
    proj_k_weight: Annotated[
        Tensor,
        projection("P, N", hint="a layer is bound to the token count that it was made for"),
    ]
    proj_k_bias: Annotated[Tensor | None, parameter("P", True)]
    proj_v_weight: Annotated[Tensor | None, projection("P, N", kinds=("split",))]
    proj_v_bias: Annotated[Tensor | None, parameter("P", True, ("split",))]
    temperature: Annotated[Tensor, parameter("H, 1, 1")]
    temperature2: Annotated[Tensor, parameter("H, 1, 1")]
    out_proj_weight: Annotated[Tensor | None, parameter("C/2, C", kinds=("shared", "split"))]
    out_proj_bias: Annotated[Tensor | None, parameter("C/2", True, ("shared", "split"))]
    out_proj2_weight: Annotated[Tensor | None, parameter("C/2, C", kinds=("shared", "split"))]
    out_proj2_bias: Annotated[Tensor | None, parameter("C/2", True, ("shared", "split"))]


class PairedOptions(NamedTuple):
    """Options of paired_attention."""

    num_heads: int
    kind: str = "shared"
    layout: str = "official"
    channel_dropout_p: float = 0.0
    spatial_dropout_p: float = 0.0


class PairedKept(NamedTuple):
    """What the plan "two_pass" of paired_attention keeps: sums over tokens."""

    mean: Annotated[Tensor, Kept(("B", "C"), lambda _, device: mean_dtype(device))]  # of x
    gram: Annotated[Tensor, Kept(("B", "C", "C"))]  # of x - mean
    projected: Annotated[Tensor, Kept(("B", "J", "P", "C"))]  # E x, and F x


class SpatialInputs(NamedTuple):
    """Inputs of spatial_attention."""

    q: Annotated[Tensor, activation("B, N, H, D")]
    k_proj: Annotated[Tensor, activation("B, P, H, D")]
    v_proj: Annotated[Tensor, activation("B, P, H, D")]
    temperature: Annotated[Tensor, parameter(*PER_HEAD)]


class SpatialOptions(NamedTuple):
    """Options of spatial_attention."""

    normalize: bool = False
    dropout_p: float = 0.0


class SpatialKept(NamedTuple):
    """What spatial_attention keeps: norms over the tokens, ones where q is not normalised."""

    q_norm: Annotated[Tensor, Kept(("B", "H", "D"))]


class ChannelInputs(NamedTuple):
    """Inputs of channel_attention."""

    q: Annotated[Tensor, activation("B, N, H, D")]
    k: Annotated[Tensor, activation("B, N, H, D")]
    v: Annotated[Tensor, activation("B, N, H, D")]
    temperature: Annotated[Tensor, parameter(*PER_HEAD)]


class ChannelOptions(NamedTuple):
    """Options of channel_attention."""

    dropout_p: float = 0.0


class ChannelKept(NamedTuple):
    """What channel_attention keeps: products <q_i, k_j> and norms over the tokens."""

    gram: Annotated[Tensor, Kept(("B", "H", "D", "D"))]
    q_norm: Annotated[Tensor, Kept(("B", "H", "D"))]
    k_norm: Annotated[Tensor, Kept(("B", "H", "D"))]


def _paired_sizes(inputs: PairedInputs, options: PairedOptions) -> dict[str, int]:
    B, N, C = inputs.x.shape
    H, P = options.num_heads, inputs.proj_k_weight.shape[0]
    return axis_lengths(B, N, C, H, C // H, P, 2 if options.kind == "split" else 1)


def _paired_flags(options: PairedOptions) -> tuple[str, str, bool, bool]:
    dropout = options.channel_dropout_p > 0 or options.spatial_dropout_p > 0
    return options.kind, options.layout, False, dropout


def _spatial_sizes(inputs: SpatialInputs, _: SpatialOptions) -> dict[str, int]:
    B, N, H, D = inputs.q.shape
    return axis_lengths(B, N, H * D, H, D, inputs.k_proj.shape[1])


def _spatial_flags(options: SpatialOptions) -> tuple[str, str, bool, bool]:
    return "", "", options.normalize, options.dropout_p > 0


def _channel_sizes(inputs: ChannelInputs, _: ChannelOptions) -> dict[str, int]:
    B, N, H, D = inputs.q.shape
    return axis_lengths(B, N, H * D, H, D, 0)


def _channel_flags(options: ChannelOptions) -> tuple[str, str, bool, bool]:
    return "", "", False, options.dropout_p > 0


class Op:
    """An op: its tables, and what follows from them.

    inputs, options, kept: the classes above; result: axes of the result.
    sizes: (inputs, options) -> length of every axis that the contract names
    view_names, address_names: the inputs that kernels read by strides, and as dense arrays
    """

    def __init__(
        self, name: str, inputs: Any, options: Any, kept: Any, result: tuple[str, ...],
        sizes: Callable[[Any, Any], dict[str, int]],
        flags: Callable[[Any], tuple[str, str, bool, bool]],
    ) -> None:  # fmt: skip
        self.name, self.result, self.sizes, self._flags = name, result, sizes, flags
        self.Inputs, self.Options, self.Kept = inputs, options, kept
        self.inputs: dict[str, Input] = _markers(inputs)
        self.kept: dict[str, Kept] = _markers(kept)
        self._result_shape = shape_getter(result)
        self._kept_shapes = [(shape_getter(k.axes), k.dtype) for k in self.kept.values()]
        names, roles = list(self.inputs), [i.role for i in self.inputs.values()]
        self._activations = roles.count("activation")  # come first
        self.view_names = tuple(n for n in names if self.inputs[n].role != "parameter")
        self.address_names = tuple(n for n in names if self.inputs[n].role == "parameter")
        self._view_indices = [names.index(n) for n in self.view_names]
        self._address_indices = [names.index(n) for n in self.address_names]

    def call(self, inputs: Any, options: Any, sizes: Mapping[str, int] | None = None) -> Call:
        """What a call with these inputs and options is; sizes where they are known already."""
        n, first = sizes or self.sizes(inputs, options), inputs[0]
        backward, parameter_dtype, is_mixed = False, None, False
        if first.device.type in CHECKED_DEVICES:  # not asked where it decides nothing
            given = [t for t in inputs if t is not None]
            backward = torch.is_grad_enabled() and any([t.requires_grad for t in given])
            parameter_dtype = inputs[self._activations].dtype
            is_mixed = any([t.dtype != parameter_dtype for t in given[self._activations :]])
        return Call(
            self.name, first.device, first.dtype,
            n["B"], n["N"], n["C"], n["H"], n["D"], n["P"],
            *self._flags(options), backward, parameter_dtype, is_mixed,
            tuple(inputs)[: self._activations],
        )  # fmt: skip

    def schema(self) -> tuple[str, str]:
        """The signatures of the op and of its backward, as torch.library takes them."""
        tensors = ", ".join(
            f"Tensor{'?' if type(None) in get_args(hint) else ''} {name}"
            for name, hint in get_type_hints(self.Inputs).items()
        )
        kept = ", ".join(f"Tensor {name}" for name in self.kept)
        options = ", ".join(f"{t.__name__} {n}" for n, t in get_type_hints(self.Options).items())
        results = ", ".join(["Tensor"] * (1 + len(self.kept)))
        gradients = ", ".join(["Tensor"] * len(self.inputs))
        return (
            f"{self.name}({tensors}, Tensor? seed, *, {options}) -> ({results})",
            f"{self.name}_bwd(Tensor dout, {tensors}, {kept}, Tensor? seed, *, {options})"
            f" -> ({gradients})",
        )

    def views(self, inputs: Any) -> list[Tensor | None]:
        """The inputs that kernels read by strides, in the order of csrc/kernels.h."""
        return [inputs[i] for i in self._view_indices]

    def addresses(self, inputs: Any) -> list[Tensor | None]:
        """The inputs that kernels read as dense arrays, in the order of csrc/kernels.h."""
        return [inputs[i] for i in self._address_indices]

    def forward(self, tensors: tuple, options: dict) -> tuple[Any, Tensor | None, Any]:
        """Arguments of the op by name: inputs, seed, options."""
        return self.Inputs._make(tensors[:-1]), tensors[-1], self.Options(**options)

    def backward(self, tensors: tuple, options: dict) -> tuple[Any, Any, Tensor | None, Any]:
        """Arguments behind dout of the op's backward by name: inputs, kept, seed, options."""
        count = len(self.inputs)
        inputs, kept = self.Inputs._make(tensors[:count]), self.Kept._make(tensors[count:-1])
        return inputs, kept, tensors[-1], self.Options(**options)

    def allocate(self, inputs: Any, options: Any) -> tuple[Tensor, Any]:
        """The result of a call and what it keeps, uninitialised and dense."""
        first, sizes = inputs[0], self.sizes(inputs, options)
        dtype, device, new_empty = first.dtype, first.device, first.new_empty
        result = new_empty(self._result_shape(sizes))
        if self.name == "paired_attention" and plan(sizes["N"], sizes["C"]) == "direct":
            return result, self.Kept(*[new_empty((0,)) for _ in self.kept])
        kept = [new_empty(shape(sizes), dtype=of(dtype, device)) for shape, of in self._kept_shapes]
        return result, self.Kept(*kept)


def shape_getter(axes: tuple[str, ...]) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """The shape that axes make of `Op.sizes`."""
    # Neither a loop nor operator.itemgetter: it runs at every call, and dynamo traces it.
    match axes:
        case (a,):
            return lambda sizes: (sizes[a],)
        case a, b:
            return lambda sizes: (sizes[a], sizes[b])
        case a, b, c:
            return lambda sizes: (sizes[a], sizes[b], sizes[c])
        case a, b, c, d:
            return lambda sizes: (sizes[a], sizes[b], sizes[c], sizes[d])
    raise ValueError(f"shape_getter: 1 to 4 axes, got {axes}.")


def _markers(fields: Any) -> dict:
    hints = get_type_hints(fields, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


OPS = {
    op.name: op
    for op in (
        Op(
            "paired_attention", PairedInputs, PairedOptions, PairedKept, ("B", "N", "C"),
            _paired_sizes, _paired_flags,
        ),
        Op(
            "spatial_attention", SpatialInputs, SpatialOptions, SpatialKept, ("B", "N", "H", "D"),
            _spatial_sizes, _spatial_flags,
        ),
        Op(
            "channel_attention", ChannelInputs, ChannelOptions, ChannelKept, ("B", "N", "H", "D"),
            _channel_sizes, _channel_flags,
        ),
    )
}  # fmt: skip


def by_name(options: Any) -> dict[str, Any]:
    """Options as arguments by name; torch.compile of torch 2.8 cannot trace their `_asdict`."""
    return dict(zip(type(options)._fields, options, strict=True))


def call_on(op: str, x: Tensor) -> Call:
    """What the first input alone tells of a call; all else is unknown."""
    if op == "paired_attention":
        B, N, C = (*x.shape, 0, 0, 0)[:3]
        H = D = 0
    else:
        B, N, H, D = (*x.shape, 0, 0, 0, 0)[:4]
        C = H * D
    return Call(op, x.device, x.dtype, B, N, C, H, D, 0)
