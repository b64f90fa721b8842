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
    activations: tuple[Tensor, ...] = ()  # for their strides

    def beyond(self, limits: Mapping[str, int]) -> list[str]:
        """The reason for each axis of `limits` that is longer than the limit."""
        return [
            f"{AXES[axis]} {getattr(self, axis)} > {most}"
            for axis, most in limits.items()
            if getattr(self, axis) > most
        ]

    def sizes(self) -> dict[str, int]:
        """Length of every axis that the contract names."""
        return sizes(self.B, self.N, self.C, self.H, self.D, self.P, self.kind)


def sizes(B: int, N: int, C: int, H: int, D: int, P: int, kind: str = "") -> dict[str, int]:
    """Length of every axis that the contract names."""
    return {
        "B": B, "N": N, "C": C, "H": H, "D": D, "P": P,
        "J": 2 if kind == "split" else 1, "4C": 4 * C, "C/2": C // 2, "1": 1,
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
    dtype: Callable[[Call], torch.dtype] = lambda call: accumulate_dtype(call.dtype)


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

    mean: Annotated[Tensor, Kept(("B", "C"), lambda call: mean_dtype(call.device))]  # of x
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


def _paired_call(inputs: PairedInputs, options: PairedOptions) -> Call:
    x = inputs.x
    B, N, C = x.shape
    H = options.num_heads
    return Call(
        "paired_attention", x.device, x.dtype, B, N, C, H, C // H, inputs.proj_k_weight.shape[0],
        options.kind, options.layout, False,
        options.channel_dropout_p > 0 or options.spatial_dropout_p > 0, (x,),
    )  # fmt: skip


def _spatial_call(inputs: SpatialInputs, options: SpatialOptions) -> Call:
    q, k_proj, v_proj, _ = inputs
    B, N, H, D = q.shape
    return Call(
        "spatial_attention", q.device, q.dtype, B, N, H * D, H, D, k_proj.shape[1], "", "",
        options.normalize, options.dropout_p > 0, (q, k_proj, v_proj),
    )  # fmt: skip


def _channel_call(inputs: ChannelInputs, options: ChannelOptions) -> Call:
    q, k, v, _ = inputs
    B, N, H, D = q.shape
    return Call(
        "channel_attention", q.device, q.dtype, B, N, H * D, H, D, 0, "", "", False,
        options.dropout_p > 0, (q, k, v),
    )  # fmt: skip


class Op:
    """An op: its tables, and what follows from them.

    inputs, options, kept: the classes above; result: axes of the result.
    call: (inputs, options) -> Call
    view_names, address_names: the inputs that kernels read by strides, and as dense arrays
    """

    def __init__(
        self, name: str, inputs: Any, options: Any, kept: Any, result: tuple[str, ...],
        call: Callable[[Any, Any], Call],
    ) -> None:  # fmt: skip
        self.name, self.result, self.call = name, result, call
        self.Inputs, self.Options, self.Kept = inputs, options, kept
        self.inputs: dict[str, Input] = _markers(inputs)
        self.kept: dict[str, Kept] = _markers(kept)
        self._result_shape = shape_getter(result)
        self._kept_shapes = [(shape_getter(k.axes), k.dtype) for k in self.kept.values()]
        names = list(self.inputs)
        self.view_names = tuple(n for n in names if self.inputs[n].role != "parameter")
        self.address_names = tuple(n for n in names if self.inputs[n].role == "parameter")
        self._view_indices = [names.index(n) for n in self.view_names]
        self._address_indices = [names.index(n) for n in self.address_names]

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
        call, new_empty = self.call(inputs, options), inputs[0].new_empty
        sizes = call.sizes()
        result = new_empty(self._result_shape(sizes))
        if call.kind and plan(call.N, call.C) == "direct":
            return result, self.Kept(*[new_empty((0,)) for _ in self.kept])
        kept = [new_empty(shape(sizes), dtype=dtype(call)) for shape, dtype in self._kept_shapes]
        return result, self.Kept(*kept)


def shape_getter(axes: tuple[str, ...]) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """The shape that axes make of `Call.sizes`."""
    return lambda sizes: tuple([sizes[axis] for axis in axes])


def _markers(fields: Any) -> dict:
    hints = get_type_hints(fields, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


OPS = {
    op.name: op
    for op in (
        Op(
            "paired_attention", PairedInputs, PairedOptions, PairedKept, ("B", "N", "C"),
            _paired_call,
        ),
        Op(
            "spatial_attention", SpatialInputs, SpatialOptions, SpatialKept, ("B", "N", "H", "D"),
            _spatial_call,
        ),
        Op(
            "channel_attention", ChannelInputs, ChannelOptions, ChannelKept, ("B", "N", "H", "D"),
            _channel_call,
        ),
    )
}  # fmt: skip


def call_on(op: str, x: Tensor) -> Call:
    """What the first input alone tells of a call; all else is unknown."""
    B, N, *rest = (*x.shape, 0, 0, 0, 0)[:4] if op != "paired_attention" else (*x.shape, 0, 0)[:3]
    if op == "paired_attention":
        return Call(op, x.device, x.dtype, B, N, rest[0], 0, 0, 0)
    H, D = rest
    return Call(op, x.device, x.dtype, B, N, H * D, H, D, 0)
