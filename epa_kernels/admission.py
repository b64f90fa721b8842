"""The check that a backend must pass on a device before it is chosen there.

A question is all that decides which code of a backend runs. The backend answers it with small
inputs of the check's own, against the reference in float64, under the rule of `tolerance`. Every
buffer lies between NaN, so that a read beyond it spoils the result, and a write beyond it is seen.
Nothing of the caller is touched: no tensor, no generator, and `run_apart` gives a thread with
modes and streams of its own.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .contract import OPS, PER_HEAD, Call, axis_lengths, by_name
from .surroundings import Surroundings
from .tolerance import Errors

DRAWS = 8  # of numbers, of a layer of up to 128 channels
# Times the reference's error. The tests hold kernels to 2 on their shapes; with 256 channels in
# float32, kernels that are right reach 2.5 in RMS and 3.1 in the largest error, as they add up
# tokens in another order. A wrong term is off by hundreds.
FACTOR = 4
DROPOUT = {"channel_dropout_p": 0.1, "spatial_dropout_p": 0.2, "dropout_p": 0.2}
SECONDS = 120  # for a check, most of which a compiler takes


class Question(NamedTuple):
    """What decides which code of a backend runs: all of a call but its length and its numbers."""

    op: str
    backward: bool  # whether gradients are asked for
    kind: str
    layout: str
    normalize: bool
    dropout: bool
    dtype: torch.dtype  # of the activations
    parameter_dtype: torch.dtype
    exact: bool  # float32 is multiplied as float32, see torch.set_float32_matmul_precision
    H: int
    D: int
    P: int

    @classmethod
    def of(cls, call: Call, exact: bool) -> "Question":
        return cls(
            call.op, call.backward, call.kind, call.layout, call.normalize, call.dropout,
            call.dtype, call.parameter_dtype or call.dtype, exact, call.H, call.D, call.P,
        )  # fmt: skip

    def __str__(self) -> str:
        flags = [name for name in ("normalize", "dropout") if getattr(self, name)]
        dtype, own_dtype = (
            str(each).removeprefix("torch.") for each in (self.dtype, self.parameter_dtype)
        )
        own = [] if own_dtype == dtype else [f"parameters {own_dtype}"]
        exact = [] if self.exact else ["float32 in parts"]
        words = [
            self.op, "backward" if self.backward else "forward", self.kind, self.layout,
            dtype, *own, f"H{self.H}", f"D{self.D}", f"P{self.P}", *flags, *exact,
        ]  # fmt: skip
        return " ".join(filter(None, words))


class Case(NamedTuple):
    """Sizes and memory of one run of a check.

    memory: "dense"; "sliced", activations and projections are slices of larger tensors; or
        "transposed", their last axes are swapped in memory, as those of a volume's tokens are.
    bias: "all", "none", or "default" as a new layer has them.
    """

    B: int
    N: int
    memory: str
    bias: str


def cases(question: Question) -> list[Case]:
    """Both plans, N with and without a tail, one chunk of tokens and several, any memory."""
    C = question.H * question.D
    # Aligned and a multiple of 16, as most users have it: Triton compiles that apart.
    long = 16 * -(-max(2 * C, 528) // 16)
    few = max(1, min(2 * C, 512) - 3)
    return [
        Case(2, long, "dense", "default"),
        Case(1, long + 21, "sliced", "none"),
        Case(2, long, "transposed", "all"),
        Case(5, few, "dense", "all"),
        Case(1, few, "transposed", "default"),
    ]


def draws(question: Question) -> tuple[int, int]:
    """(draws of numbers for each case, most where those break the rule), see `Errors`.

    Of few draws tails are luck, but a large layer has more numbers in each.
    """
    count = max(2, DRAWS * 128 // max(128, question.H * question.D))
    return count, 4 * count


class Drawn(NamedTuple):
    """Arguments of an op in the question's dtypes, of which no attention map is uniform."""

    inputs: Any
    options: Any
    dout: Tensor
    seed: Tensor | None


def draw(question: Question, case: Case, generator: torch.Generator) -> Drawn:
    """Draw the arguments of an op on the generator's device, as a new layer has them."""
    op, device = OPS[question.op], generator.device
    N, H, D, P = case.N, question.H, question.D, question.P
    sizes = axis_lengths(case.B, N, H * D, H, D, P)
    sizes[PER_HEAD[0]] = 1 if case.bias == "none" else H

    def normal(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device)
        return t.to(question.dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    # Of a layer, q^ has elements of N^-1/2 and k_proj of 1.
    scales = {"temperature": 4.0, "temperature2": 2 * (N / D) ** 0.5}
    if question.op == "spatial_attention":
        scales["temperature"] = 2 * (N / D if question.normalize else 1 / D) ** 0.5
    found: dict[str, Tensor | None] = {}
    for name, rule in op.inputs.items():
        shape = tuple(sizes[axis] for axis in rule.axes)
        is_absent = rule.optional and (
            case.bias == "none" or (case.bias == "default" and name == "qkvv_bias")
        )
        if is_absent or (rule.kinds and question.kind not in rule.kinds):
            found[name] = None
        elif rule.role == "activation":
            found[name] = normal(*shape)
        else:
            t = uniform(*shape)
            t = scales[name] * (1 + t / 2) if name in scales else (2 * t - 1) / shape[-1] ** 0.5
            found[name] = t.to(question.parameter_dtype)
    values = {"num_heads": H, "kind": question.kind, "layout": question.layout}
    values |= {"normalize": question.normalize}
    values |= {name: p if question.dropout else 0.0 for name, p in DROPOUT.items()}
    options = op.Options(**{name: values[name] for name in op.Options._fields})
    seed = torch.tensor(7, dtype=torch.int64, device=device) if question.dropout else None
    return Drawn(op.Inputs(**found), options, normal(*(sizes[axis] for axis in op.result)), seed)


def by_reference(
    question: Question, drawn: Drawn, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Result and gradients of the reference by the names of tensors; in their dtypes or in one."""
    inputs = [None if t is None else t.to(dtype or t.dtype, copy=True) for t in drawn.inputs]
    names = [n for n, t in zip(drawn.inputs._fields, inputs, strict=True) if t is not None]
    leaves = [t.requires_grad_(question.backward) for t in inputs if t is not None]
    run = getattr(reference, question.op)
    with torch.set_grad_enabled(question.backward):
        result = run(*inputs, seed=drawn.seed, **by_name(drawn.options))
    if not question.backward:
        return {"result": result}
    found = torch.autograd.grad(result, leaves, drawn.dout.to(result.dtype))
    gradients = {f"gradient of {n}": t for n, t in zip(names, found, strict=True)}
    return {"result": result.detach(), **gradients}


def by_backend(
    implementation: Any, question: Question, drawn: Drawn, case: Case
) -> tuple[dict[str, Tensor], list[str]]:
    """Result and gradients of a backend by the names of tensors; and where it wrote elsewhere."""
    op = OPS[question.op]
    with torch.no_grad(), Surroundings() as memory:
        given = [
            None if t is None else memory.copy(t, "dense" if r.role == "parameter" else case.memory)
            for r, t in zip(op.inputs.values(), drawn.inputs, strict=True)
        ]
        dout = memory.copy(drawn.dout, case.memory)
        options = by_name(drawn.options)
        result, *kept = getattr(implementation, op.name)(*given, drawn.seed, **options)
        found = {"result": result}
        if question.backward:
            copies = [t.clone() for t in kept]
            run = getattr(implementation, f"{op.name}_bwd")
            gradients = run(dout, *given, *kept, drawn.seed, **options)
            found |= {
                f"gradient of {name}": gradient
                for name, t, gradient in zip(op.inputs, given, gradients, strict=True)
                if t is not None
            }
            given, drawn_too = [*given, dout, *kept], [*drawn.inputs, drawn.dout, *copies]
        else:
            drawn_too = list(drawn.inputs)
        wrong = ["it writes outside its tensors"] if memory.broken() else []
        if not all(t is None or torch.equal(t, c) for t, c in zip(given, drawn_too, strict=True)):
            wrong.append("it writes into its inputs")
        return found, wrong


class Finding(NamedTuple):
    """What a check found.

    reasons: how the backend fails; empty where it is as accurate as the reference.
    ratio: RMS error as a multiple of the reference's own, see `Errors.ratio`; None in float64,
        where the reference is exact, and where the check did not end.
    is_lasting: whether it says something of the backend, and not of this process.
    """

    reasons: list[str]
    ratio: float | None = None
    is_lasting: bool = True


class BackendError(Exception):
    """The backend raised what stands behind this, and the reference did not."""


def check(implementation: Any, question: Question, device: torch.device) -> Finding:
    """Run a backend on a device, against the reference there.

    Args:
        implementation: has a function for each schema of `contract.OPS`, named like it.

    Raises:
        BackendError: see there. Exception: whatever the reference raises.
    """
    found: dict[str, None] = {}  # a set in order
    ratios = []
    generator = torch.Generator(device).manual_seed(0)
    enough, most = draws(question)
    for case in cases(question):
        errors, differences = Errors(), []
        for number in range(most):
            drawn = draw(question, case, generator)
            exact = by_reference(question, drawn, torch.float64)
            same_dtype = by_reference(question, drawn)
            try:
                kernel, wrong = by_backend(implementation, question, drawn, case)
                found |= dict.fromkeys(wrong)
                if number == 0:
                    again, _ = by_backend(implementation, question, drawn, case)
                    for name, t in kernel.items():
                        if not torch.equal(t.nan_to_num(), again[name].nan_to_num()):
                            found[f"{name}: a second run gives other bits"] = None
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise BackendError from error
            if question.dtype == torch.float64:
                found |= dict.fromkeys(_float64_differences(kernel, exact))
                break
            errors.add(kernel, same_dtype, exact)
            if number + 1 in (enough, most):
                differences = errors.differences(FACTOR)
                if not differences:
                    break
        found |= dict.fromkeys(differences)
        ratios.append(errors.ratio())
    return Finding(list(found), None if question.dtype == torch.float64 else max(ratios))


def _float64_differences(kernel: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """In float64 the reference has no error of its own to compare with."""
    found, largest = [], exact["result"].abs().max()
    for name, truth in exact.items():
        # A gradient may be zero against rounding, as that of the norm of one token is.
        bound = 1e-11 * float(torch.maximum(truth.abs().max(), 1e-3 * largest))
        error = float((kernel[name] - truth).abs().max())
        if not error <= bound:
            found.append(f"{name}: largest error {error:.2g}, allowed {bound:.2g}")
    return found


def try_out(implementation: Any, question: Question, device: torch.device) -> Finding:
    """`check`, where an error or no end is a reason as well.

    What does not tell of the backend does not last: memory that ran out, a reference that raised, a
    device that fails at whatever is asked of it, and a compiler that took long.
    """
    try:
        return run_apart(lambda: check(implementation, question, device), device, SECONDS)
    except TimeoutError:
        reason = f"its check took more than {SECONDS} s, most likely in a compiler"
        return Finding([reason], is_lasting=False)
    except torch.OutOfMemoryError:
        return Finding(["there was no memory left for its check"], is_lasting=False)
    except BackendError as error:
        cause = error.__cause__
        assert cause is not None
        is_lasting = is_alive(device) and "ALLOC_FAILED" not in str(cause)
        return Finding([f"its check raised {_said(cause)}"], is_lasting=is_lasting)
    except Exception as error:
        return Finding([f"the reference raised {_said(error)}"], is_lasting=False)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["without a message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def is_alive(device: torch.device) -> bool:
    """Whether a device still answers; after an illegal access a GPU does not, to this process."""
    try:
        return bool(torch.ones(1, device=device).sum().item() == 1)
    except Exception:
        return False


def run_apart(function: Callable[[], Any], device: torch.device, seconds: float) -> Any:
    """Call a function where no setting of the caller's thread reaches it, nor the other way.

    A thread of its own has its own autograd mode, autocast, inference mode, hooks of saved tensors,
    torch.func levels, current device and stream. Not to be called inside a backward pass: the
    function may wait for the thread of autograd that the caller is in.

    Raises:
        TimeoutError: it has not ended in time, and is left alone.
        Exception: what the function raises.
    """
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            with _on_own_stream(device):
                result.append(function())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=run, name="epa_kernels check", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if error:
        try:
            raise error[0]
        finally:
            error.clear()  # else its frames would keep the tensors alive
    return result[0]


_streams: dict[torch.device, Any] = {}  # one a device, since memory is cached by stream


@contextlib.contextmanager
def _on_own_stream(device: torch.device) -> Iterator[None]:
    """A stream of the checks, finished when the block ends."""
    if device.type != "cuda":
        yield
        return
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(_streams[device]):
        try:
            yield
        finally:
            torch.cuda.current_stream(device).synchronize()
