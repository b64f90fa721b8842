"""Which of several backends runs on a device: those that its check admitted, the fastest of them.

    verdict   `admission` checks a backend once for each question, `answers` keeps what it said
    times     the shape at hand is timed once, with other numbers; the fastest runs from then on
    order     without times the first of `dispatch.ORDER`: under deterministic algorithms, and with
              EPA_KERNELS_TUNE=0, so that two runs choose alike
    group     times of rank 0 decide for a process group; until it has some, the last in the order

Where nothing may be checked, only what is known counts: while a CUDA graph is captured, in a
backward pass, in a forked child, and of fake tensors. What is not known to be right is not chosen.
"""

import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import admission
from .admission import Question
from .answers import Answers, identity
from .backends.compiled import float32_is_exact
from .contract import Call, plan
from .timing import measure
from .torch_private import constant_result, default_store, in_backward

NOTICE_SECONDS = 5  # a check that takes longer is worth a line
MOST_CHOSEN = 4096  # calls whose backend is remembered
# Tokens of a batch that a compiled graph is chosen for, where their number is not fixed.
SIZE_CLASSES = (512, 4096, 32768, 262144)

_lock = threading.RLock()
_answers: dict[torch.device, Answers] = {}
_chosen: dict[tuple, str] = {}  # what a call asks -> backend
_here: dict[tuple[str, Question, torch.device], str] = {}  # refused in this process alone, and why
_wanted: dict[Call, tuple[str, ...]] = {}  # asked in a backward pass -> able backends
_group: Any = None  # whose rank 0 decided
_forked = False
_said = False  # that a check takes long


def _after_fork() -> None:
    global _forked, _lock
    _forked, _lock = True, threading.RLock()  # a thread that is not here may hold the other


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def known(call: Call) -> str | None:
    """The backend that was chosen for such a call, None if it has not been asked for."""
    if default_store() is not _group:
        return None
    return _chosen.get(_asked(call))


def choose(call: Call, backends: Mapping[str, Any], able: Sequence[str]) -> str:
    """Name of the backend that runs a call, checked and timed where that is needed.

    Args:
        backends: `dispatch.BACKENDS`.
        able: names of those that can run the call, in order; the last needs no check.
    """
    global _group
    if in_backward():
        # Without the lock: who holds it may wait for this very thread of autograd.
        name, is_final = _decide(call, backends, able, default_store())
        if not is_final and _without_tensors(call) not in _wanted:
            _wanted[_without_tensors(call)] = tuple(able)
            _chosen.clear()  # so that the next call outside comes here
        return name
    with _lock:
        store = default_store()
        if store is not _group:
            _chosen.clear()
            _group = store
        if _may_check(call):
            while _wanted:
                wanted, others = _wanted.popitem()
                _choose(wanted, backends, others, store)
        return _choose(call, backends, able, store)


def _choose(call: Call, backends: Mapping[str, Any], able: Sequence[str], store: Any) -> str:
    name, is_final = _decide(call, backends, able, store)
    if is_final:
        if len(_chosen) >= MOST_CHOSEN:
            _chosen.clear()
        _chosen[_asked(call)] = name
    return name


def verdicts(call: Call, backends: Mapping[str, Any], able: Sequence[str]) -> dict[str, str]:
    """What `explain` says of each backend that can run a call; runs the checks if it may."""
    chosen = choose(call, backends, able)
    question, may = _question(call), _may_check(call)
    times = _times(call, question) or {}
    found = {}
    for name in able:
        reasons = _verdict(name, backends[name], question, call.device, may)
        if reasons is None:
            found[name] = f"not checked: {_why_not_checked(call) or 'ask again'}"
        elif reasons:
            found[name] = f"not chosen: {'; '.join(reasons)}"
        elif name == chosen:
            found[name] = "runs"
        elif name in times and chosen in times:
            found[name] = f"slower: {times[name]:.3g} us against {times[chosen]:.3g} us"
        else:
            found[name] = "can run"
    return found


def keep_verdict(name: str, question: Question, device: torch.device, reasons: list[str]) -> None:
    """Keep what a check of the caller's found, in place of what was known."""
    with _lock:
        _chosen.clear()
        answers = _known_answers(device, True)
        assert answers is not None
        answers.keep_verdict(name, str(question), reasons)


def keep_times(call: Call, times: Mapping[str, float]) -> None:
    """Keep times of the caller's, in place of what was known."""
    with _lock:
        _chosen.clear()
        answers = _known_answers(call.device, True)
        assert answers is not None
        answers.keep_times(str(_question(call)), _shape(call), dict(times))


def for_compiled(call: Call, able: tuple[str, ...]) -> str:
    """`choose` while torch.compile traces, which takes the answer as a constant.

    A number of tokens that is not fixed counts by its class of sizes.
    """
    size = call.B * call.N
    # Comparisons, since a size may be a symbol; and only they make a number of a symbol.
    tokens = SIZE_CLASSES[-1]
    for most in reversed(SIZE_CLASSES):
        if size <= most:
            tokens = most
    is_direct = True if call.N < 2 * call.C else False
    return _for_compiled(
        call.op, call.device.type, call.device.index, call.dtype, tokens, is_direct,
        len(range(call.H)), len(range(call.D)), len(range(call.P)), call.kind, call.layout,
        call.normalize, True if call.dropout else False, call.backward, call.parameter_dtype,
        call.is_mixed, able,
    )  # fmt: skip


@constant_result
def _for_compiled(
    op: str, device_type: str, index: int | None, dtype: torch.dtype, tokens: int,
    is_direct: bool, H: int, D: int, P: int, kind: str, layout: str, normalize: bool,
    dropout: bool, backward: bool, parameter_dtype: torch.dtype | None, is_mixed: bool,
    able: tuple[str, ...],
) -> str:  # fmt: skip
    from .dispatch import BACKENDS

    N = min(tokens, 2 * H * D - 1) if is_direct else tokens
    call = Call(
        op, _device(device_type, index), dtype, max(1, tokens // N), N, H * D, H, D, P, kind,
        layout, normalize, dropout, backward, parameter_dtype, is_mixed,
    )  # fmt: skip
    name = known(call)
    return name if name in able else choose(call, BACKENDS, able)


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


def _asked(call: Call) -> tuple:
    # All but the activations.
    return (*call[:-1], float32_is_exact(), torch.are_deterministic_algorithms_enabled())


def _without_tensors(call: Call) -> Call:
    return call._replace(activations=())


def _question(call: Call) -> Question:
    return Question.of(call, float32_is_exact())


def _shape(call: Call) -> str:
    """The class of sizes of a call: its plan, and its tokens up to a power of two."""
    return f"{plan(call.N, call.C)} {1 << (call.B * call.N - 1).bit_length()}"


def _is_tuned() -> bool:
    return (
        os.environ.get("EPA_KERNELS_TUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
    )


def _why_not_checked(call: Call) -> str | None:
    """Why no check may run now, None if it may."""
    if not (call.H and call.D and (call.P or call.op == "channel_attention")):
        return "its check needs the sizes of all tensors"
    if call.is_mixed:
        return "no check runs for parameters of several dtypes"
    if _forked:
        return "no check runs in a forked child; start it by spawn"
    if in_backward():
        return "no check runs in a backward pass"
    if any(type(t).__module__.startswith("torch._subclasses.") for t in call.activations):
        return "no check runs for a fake tensor"
    if call.device.type == "cuda":
        if not torch.cuda.is_initialized():
            return "no check runs before CUDA is in use"
        if torch.cuda.is_current_stream_capturing():
            return "no check runs while a CUDA graph is captured; call it once before"
    return None


def _may_check(call: Call) -> bool:
    return _why_not_checked(call) is None


def _known_answers(device: torch.device, may_ask: bool) -> Answers | None:
    """What is known of a device; None where that needs the device, and it must not be asked."""
    if device not in _answers:
        if not may_ask and (device.type != "cpu" and not torch.cuda.is_initialized()):
            return None
        _answers[device] = Answers(identity(device))
    return _answers[device]


def _decide(
    call: Call, backends: Mapping[str, Any], able: Sequence[str], store: Any
) -> tuple[str, bool]:
    """(backend, whether that holds for every such call)."""
    if store is None or not _is_tuned() or not _may_check(call):
        return _decide_alone(call, backends, able)
    key = f"epa_kernels {_question(call)} {call.device.type}"
    if store.check([key]):
        name = store.get(key).decode()
        if name in able and (
            _verdict(name, backends[name], _question(call), call.device, True) == []
        ):
            return name, True
        return _decide_alone(call, backends, able, is_tuned=False)
    if torch.distributed.get_rank() == 0:
        name, is_final = _decide_alone(call, backends, able)
        store.set(key, name)
        return name, is_final
    # Nobody waits: rank 0 may never be asked this, as in a validation of other ranks.
    return able[-1], False


def _decide_alone(
    call: Call, backends: Mapping[str, Any], able: Sequence[str], is_tuned: bool | None = None
) -> tuple[str, bool]:
    question, may = _question(call), _may_check(call)
    reasons = {name: _verdict(name, backends[name], question, call.device, may) for name in able}
    admitted = [name for name, found in reasons.items() if found == []]
    # Neither of the last two will ever be checked.
    is_final = None not in reasons.values() or call.is_mixed or _forked
    if len(admitted) == 1 or not (_is_tuned() if is_tuned is None else is_tuned):
        return admitted[0], is_final
    times = _times(call, question)
    if (times is None or not set(admitted) <= set(times)) and may:
        times = _measure(call, question, backends, admitted)
    if not times or not set(admitted) <= set(times):
        return admitted[0], is_final and may
    return min(admitted, key=lambda name: times[name]), is_final


def _verdict(
    name: str, backend: Any, question: Question, device: torch.device, may: bool
) -> list[str] | None:
    """Why a backend is refused; empty if it is admitted, None if that is not known."""
    if backend.trusted:
        return []
    if (name, question, device) in _here:
        return [_here[name, question, device]]
    answers = _known_answers(device, may)
    found = None if answers is None else answers.verdict(name, str(question))
    if found is None and answers is not None and not question.backward:
        # With a backward pass it ran the same forward pass.
        with_backward = answers.verdict(name, str(question._replace(backward=True)))
        if with_backward == []:
            return []
    if found is not None or answers is None or not may:
        return found
    answers.reload()
    if (found := answers.verdict(name, str(question))) is not None:
        return found
    notice = threading.Timer(NOTICE_SECONDS, _say_that_it_takes_long, [answers.key["device"]])
    notice.daemon = True
    notice.start()
    try:
        with answers.running(name, str(question)):
            tried = admission.try_out(backend.implementation, question, device)
    finally:
        notice.cancel()
    found = tried.reasons
    if tried.is_lasting:
        answers.keep_verdict(name, str(question), found)
    else:
        _here[name, question, device] = "; ".join(found)
    if found:
        warnings.warn(
            f"epa_kernels: backend {name!r} is not chosen for {question} on "
            f"{answers.key['device']}: {'; '.join(found[:3])}. Another one runs. "
            f"`python -m epa_kernels --forget` has it checked again.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _say_that_it_takes_long(device: str) -> None:
    global _said
    if not _said:
        _said = True
        logging.getLogger("epa_kernels").warning(
            "epa_kernels checks its kernels on %s, once for each kind of layer; what Triton "
            "compiles for it may take minutes",
            device,
        )


def _times(call: Call, question: Question) -> dict[str, float] | None:
    answers = _known_answers(call.device, False)
    return None if answers is None else answers.times(str(question), _shape(call))


def _measure(
    call: Call, question: Question, backends: Mapping[str, Any], admitted: Sequence[str]
) -> dict[str, float] | None:
    """Time the shape of a call and keep that; None where one cannot run it, as without memory."""
    implementations = {name: backends[name].implementation for name in admitted}
    answers = _known_answers(call.device, True)
    assert answers is not None
    try:
        times = admission.run_apart(
            lambda: measure(implementations, question, call.B, call.N, call.device),
            call.device,
            admission.SECONDS,
        )
    except (RuntimeError, TimeoutError):
        return None
    answers.keep_times(str(question), _shape(call), times)
    return times
