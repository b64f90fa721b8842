"""The check that a backend must pass before it is chosen, of every published layer.

It is the one that the package runs on a user's device, see epa_kernels/admission.py. A dry run
checks the two passes in place of the kernels.
"""

import functools

import torch

from epa_kernels import admission, check
from epa_kernels.admission import Question
from epa_kernels.backends.compiled import float32_is_exact
from epa_kernels.dispatch import BACKENDS

from .lines import Refused, Skipped

DRY_LAYER = check.Layer("tiny", "paired_attention", "shared", 40, 2, 4, 5)


def examine(device, layer, dtype, dropout, name):
    """The error as a multiple of the reference's own; refuses a backend that fails."""
    call = check.call_of(layer, dtype, torch.device(device.kind), dropout=dropout)
    backend = BACKENDS[name]
    if reasons := backend.why_not(call):
        raise Skipped("; ".join(reasons))
    question = Question.of(call, float32_is_exact())
    found = admission.try_out(backend.implementation, question, call.device)
    if found.reasons:
        raise Refused("; ".join(found.reasons))
    return {"ratio": found.ratio}


def items(device, dry_run):
    """(key, function) of each layer, dtype, dropout or not, and backend."""
    layers = (DRY_LAYER,) if dry_run else check.LAYERS
    names = ("two_pass",) if dry_run else [n for n, b in BACKENDS.items() if not b.trusted]
    for dtype in check.DTYPES:
        for layer in layers:
            for dropout in (False, True):
                for name in names:
                    word = str(dtype).removeprefix("torch.")
                    key = f"{layer.name.replace(', ', ' ')}, {word}, dropout {dropout}, {name}"
                    yield key, functools.partial(examine, device, layer, dtype, dropout, name)
