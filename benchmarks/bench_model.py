"""Time of whole networks: prediction of one patch, and a training step of the Synapse network.

Attention is a part of it: convolutions, the same for every backend, are most of the rest. Few
rounds, since each takes seconds. The reference of SegFormer3D and Slim UNETR is the same network
with attention scores in memory and the decoder in the published order (`published`).

On a CPU in float32. On a GPU in float32 and under autocast in bfloat16; float16 would need a
scaler of the loss.
"""

import functools

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


def predict(model, x, autocast):
    """Logits of a batch, without gradients."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        return model(x)


def pytest_generate_tests(metafunc):
    dtypes = [dtype for dtype in metafunc.config.device.dtypes if dtype != torch.float16]
    metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def skip_unless_able(backend, call):
    if reasons := dispatch.BACKENDS[backend].why_not(call):
        pytest.skip("; ".join(reasons))


def info(case, dtype, direction, backend, kept_bytes=None):
    """What a row of the tables says beside its times."""
    return {
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
        "backend": backend,
        "floor_ms": None,
        "kept_bytes": kept_bytes,
    }


@pytest.fixture(scope="module", params=BACKENDS)
def setting(request, device):
    """Backend, network, a batch of volumes and their labels."""
    backend, config = request.param, request.config
    skip_unless_able(
        backend, call_on("paired_attention", torch.empty(1, 64, 32, device=device.kind))
    )
    torch.manual_seed(0)
    model = UNETRPP.from_preset(
        "synapse", epa_backend=backend, attention_dropout=config.getoption("dropout")
    )
    x = torch.randn(config.getoption("batch"), 1, *model.img_size)
    label = torch.randint(model.config["args"]["out_channels"], x.shape).float()
    return backend, model.to(device.kind), x.to(device.kind), label.to(device.kind)


@pytest.mark.parametrize("direction", ("prediction", "training step"))
def bench_synapse(setting, direction, dtype, device, benchmark):
    backend, model, x, label = setting
    is_training, autocast = direction == "training step", dtype != torch.float32
    model.train(is_training).deep_supervision = is_training
    function, kept_bytes = functools.partial(predict, model, x, autocast), None
    if is_training:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            kept_bytes = kept_for_backward(model, x)
        function = training_step(model, x, label, autocast=autocast)
    benchmark.extra_info |= info("synapse", dtype, direction, backend, kept_bytes)
    benchmark.pedantic(function, setup=device.flush, rounds=7, warmup_rounds=1)


@pytest.fixture(scope="module", params=("segformer3d", "slim_unetr"))
def sibling(request, device):
    """Name, network as described for BraTS, and a batch of volumes."""
    torch.manual_seed(0)
    model = create_model(request.param, "brats").eval()
    x = torch.randn(request.config.getoption("batch"), model.in_channels, *model.img_size)
    return request.param, model.to(device.kind), x.to(device.kind)


@pytest.mark.parametrize("backend", BACKENDS)
def bench_sibling(sibling, backend, dtype, device, benchmark):
    name, model, x = sibling
    skip_unless_able(
        backend, call_on("spatial_attention", torch.empty(1, 64, 1, 32, device=device.kind))
    )
    benchmark.extra_info |= info(name, dtype, "prediction", backend)
    function = functools.partial(predict, model, x, dtype != torch.float32)
    with published_order() if backend == REFERENCE else use_backend(backend):
        benchmark.pedantic(function, setup=device.flush, rounds=15, warmup_rounds=2)
