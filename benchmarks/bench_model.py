"""Time of whole networks: prediction of one patch, and a training step of the Synapse network.

Attention is a part of it: convolutions, the same for every backend, are most of the rest. Few
rounds, since each takes seconds. The reference of SegFormer3D and Slim UNETR is the same network
with attention scores in memory and the decoder in the published order (`published`).
"""

import pytest
import torch

from benchmarks.published import published_order
from benchmarks.report import REFERENCE
from epa_kernels import dispatch, use_backend
from epa_kernels.contract import call_on
from epa_kernels.testing import kept_for_backward
from unetrpp import UNETRPP, create_model
from unetrpp.losses import deep_supervision_loss

BACKENDS = (REFERENCE, *(name for name in dispatch.BACKENDS if name != REFERENCE))


def training_step(model, x, label, *, loss=deep_supervision_loss, autocast=False):
    """Function that does one step as users train: SGD as published, autocast in bfloat16 or not."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99, nesterov=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            logits = model(x)
        loss(logits, label).backward()
        optimizer.step()

    return step


@pytest.fixture(scope="module", params=BACKENDS)
def setting(request):
    """Backend, network, a batch of volumes and their labels."""
    backend, config = request.param, request.config
    call = call_on("paired_attention", torch.empty(1, 64, 32))
    if reasons := dispatch.BACKENDS[backend].why_not(call):
        pytest.skip("; ".join(reasons))
    torch.manual_seed(0)
    model = UNETRPP.from_preset(
        "synapse", epa_backend=backend, attention_dropout=config.getoption("--dropout")
    )
    x = torch.randn(config.getoption("--batch"), 1, *model.img_size)
    label = torch.randint(model.config["args"]["out_channels"], x.shape).float()
    return backend, model, x, label


@pytest.mark.parametrize("direction", ("prediction", "training step"))
def bench_synapse(setting, direction, benchmark):
    backend, model, x, label = setting
    training = direction == "training step"
    model.train(training).deep_supervision = training
    benchmark.extra_info |= {
        "case": "synapse",
        "direction": direction,
        "backend": backend,
        "floor_ms": None,
        "kept_bytes": kept_for_backward(model, x) if training else None,
    }
    if not training:
        with torch.no_grad():
            benchmark.pedantic(model, (x,), rounds=7, warmup_rounds=1)
        return
    benchmark.pedantic(training_step(model, x, label), rounds=7, warmup_rounds=1)


@pytest.fixture(scope="module", params=("segformer3d", "slim_unetr"))
def sibling(request):
    """Name, network as described for BraTS, and a batch of volumes."""
    torch.manual_seed(0)
    model = create_model(request.param, "brats").eval()
    x = torch.randn(request.config.getoption("--batch"), model.in_channels, *model.img_size)
    return request.param, model, x


@pytest.mark.parametrize("backend", BACKENDS)
def bench_sibling(sibling, backend, benchmark):
    name, model, x = sibling
    call = call_on("spatial_attention", torch.empty(1, 64, 1, 32))
    if reasons := dispatch.BACKENDS[backend].why_not(call):
        pytest.skip("; ".join(reasons))
    benchmark.extra_info |= {
        "case": name,
        "direction": "prediction",
        "backend": backend,
        "floor_ms": None,
        "kept_bytes": None,
    }
    with torch.no_grad(), published_order() if backend == REFERENCE else use_backend(backend):
        benchmark.pedantic(model, (x,), rounds=15, warmup_rounds=2)
