"""Time and memory of the whole Synapse network under autocast in bfloat16.

A training step is zero_grad, forward, loss, backward and SGD; inference is one call without
gradients. Each runs eager, as a CUDA graph of the whole step, compiled, and as a graph of the
compiled step.
"""

import functools
import itertools
import statistics
from importlib.util import find_spec

import torch
from torch.nn import functional as F

from benchmarks import device as devices
from benchmarks.bench_model import training_step
from benchmarks.report import REFERENCE
from epa_kernels import EfficientPairedAttention
from unetrpp import UNETRPP
from unetrpp.losses import deep_supervision_loss

from .ops import backends

CALLS, WARM_UP = 10, 3
DIRECTIONS = ("training step", "inference")
DRY_NETWORK = {"preset": "tiny", "img_size": (16, 16, 16)}


def cross_entropy(logits, label):
    """Where MONAI, and with it the Dice term, is missing; weights of the outputs as there."""
    weights = [0.5**i for i in range(len(logits))]
    total = 0
    for weight, output in zip(weights, logits, strict=True):
        target = F.interpolate(label, output.shape[2:], mode="nearest-exact").squeeze(1).long()
        total = total + weight / sum(weights) * F.cross_entropy(output.float(), target)
    return total


def loss_function():
    """(loss, its name)."""
    if find_spec("monai"):
        return deep_supervision_loss, "Dice + cross-entropy"
    return cross_entropy, "cross-entropy alone, since MONAI is not installed"


@functools.lru_cache(maxsize=1)
def make_network(kind, dry_run):
    """The network on the device, and its first state on the CPU."""
    torch.manual_seed(0)
    settings = DRY_NETWORK if dry_run else {"preset": "synapse"}
    model = UNETRPP.from_preset(**settings)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return model.to(kind), state


def make_call(kind, dry_run, batch, direction, backend, model):
    """The call that is timed; gives no tensor, since each replay of a graph overwrites them."""
    network, state = make_network(kind, dry_run)
    network.load_state_dict(state)
    network.zero_grad()
    network.train(direction == "training step").deep_supervision = network.training
    for module in network.modules():
        if isinstance(module, EfficientPairedAttention):
            module.backend = backend
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, *network.img_size, generator=generator).to(kind)
    classes = network.config["args"]["out_channels"]
    label = torch.randint(classes, x.shape, generator=generator).float().to(kind)
    if network.training:
        loss, _ = loss_function()
        return training_step(model, x, label, loss=loss, autocast=True)

    def predict():
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
            model(x)

    return predict


@functools.lru_cache(maxsize=1)
def compile_network(kind, dry_run, batch, direction, backend):
    """The compiled network, once for its two rows."""
    torch.compiler.reset()
    model, _ = make_network(kind, dry_run)
    return torch.compile(model, dynamic=False, backend="eager" if dry_run else "inductor")


def measure(device, dry_run, batch, direction, backend, mode):
    device.release()
    setting = (device.kind, dry_run, batch, direction, backend)
    model = compile_network(*setting) if "compiled" in mode else make_network(*setting[:2])[0]
    call = make_call(*setting, model)
    calls, warm_up = (1, 1) if dry_run else (CALLS, WARM_UP)
    start = device.host_seconds(call, 1)[0]
    if "graph" in mode:
        replays = []
        peak = device.peak_bytes(lambda: replays.append(device.capture(call)[0]))
        call = replays[0]
    else:
        for _ in range(warm_up - 1):
            call()
        peak = device.peak_bytes(call)
    seconds = device.seconds(call, calls)
    return {
        "loss": loss_function()[1] if direction == "training step" else None,
        **devices.summary(seconds),
        "host_us": statistics.median(device.host_seconds(call, calls)) * 1e6,
        "first_call_seconds": start,
        "peak_bytes": peak,
        "reasons": {"peak_bytes": "a CPU does not count it"} if peak is None else {},
    }


def items(device, dry_run, *, compiled):
    """(key, function) of each row: fused backends first, training before inference, B = 2 first."""
    names = [n for n in backends(device, torch.bfloat16) if n != REFERENCE]
    modes = ("compiled", "compiled graph") if compiled else ("eager", "graph")
    names, batches, directions = (*names[:1], REFERENCE, *names[1:]), (2, 1), DIRECTIONS
    if dry_run:  # the interpreter takes seconds for a step, and so does the compiler
        names, batches = ("two_pass", REFERENCE), (2,)
        if compiled:
            names, directions = names[:1], directions[:1]
    for batch, direction in itertools.product(batches, directions):
        for backend in names:
            for mode in modes:
                key = f"{direction}, B={batch}, {backend}, {mode}"
                setting = batch, direction, backend, mode
                yield key, functools.partial(measure, device, dry_run, *setting)
