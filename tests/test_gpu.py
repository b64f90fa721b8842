"""What only a GPU can show: CUDA graphs, streams, host synchronisation, repeatability, memory.

`pytest --device cuda`. With EPA_KERNELS_DRY_RUN, as a dry run of benchmarks/gpu_check sets it, a
CPU stands in for the GPU, so that the tests themselves are known to run.
"""

import os

import pytest
import torch
from cases import BACKENDS, COMPILED_BACKENDS, FUSED_BACKENDS
from torch.nn import functional

import epa_kernels
from epa_kernels.testing import DEVICE, Cpu, Gpu, kept_for_backward, make_layer, relative_l2
from unetrpp import UNETRPP

DRY_RUN = "EPA_KERNELS_DRY_RUN" in os.environ
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not DRY_RUN, reason="needs a GPU: pytest --device cuda"
)

OPS = ("paired", "spatial", "channel")
SHAPE = (1, 24, 8, 1, 3) if DRY_RUN else (2, 4096, 32, 4, 64)  # B, N, C, H, P
STAGE1 = SHAPE if DRY_RUN else (2, 32768, 32, 4, 64)
RUNS = 2 if DRY_RUN else 50
STEPS = 2


@pytest.fixture(scope="module")
def device():
    return Gpu() if DEVICE == "cuda" else Cpu()


def make_call(op, backend, *, dtype=torch.float32, dropout=0.0):
    """(call, first input): the call gives the output and every gradient, all detached."""
    B, N, C, H, P = SHAPE
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    if op == "paired":
        layer = make_layer(SHAPE, dropout=dropout).float()
        layer.backend = backend
        inputs, dout = (draw(B, N, C), *layer.parameters()), draw(B, N, C).detach()

        def run():
            return layer(inputs[0])

    else:
        q, dout = draw(B, N, H, C // H), draw(B, N, H, C // H).detach()
        k, v = (draw(B, P if op == "spatial" else N, H, C // H) for _ in range(2))
        inputs = (q, k, v, torch.full((H, 1, 1), 0.5, device=DEVICE, requires_grad=True))
        function = getattr(epa_kernels, f"{op}_attention")

        def run():
            return function(*inputs, dropout_p=dropout, backend=backend)

    def call():
        out = run()
        return (out.detach(), *torch.autograd.grad(out, inputs, dout))

    return call, inputs[0]


def assert_equal(found, expected):
    for value, truth in zip(found, expected, strict=True):
        assert relative_l2(value, truth) <= 1e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replays_what_eager_computes(backend, op, device):
    call, x = make_call(op, backend)
    replay, result = device.capture(call)
    for seed in (2, 3):
        values = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            x.copy_(values)
        replay()
        assert_equal([t.clone() for t in result], call())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_draws_a_dropout_mask_each_time(backend, op, device):
    call, _ = make_call(op, backend, dropout=0.3)
    replay, result = device.capture(call)
    replay()
    first = result[0].clone()
    replay()
    assert not torch.equal(first, result[0])


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_graph_of_a_training_step_learns_as_eager_does(backend, device):
    size = {"img_size": (16, 16, 16)} if DRY_RUN else {}
    torch.manual_seed(0)
    model = UNETRPP.from_preset(
        "tiny", epa_backend=backend, attention_dropout=0.0, conv_dropout=0.0, **size
    ).to(DEVICE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, *model.img_size, generator=generator).to(DEVICE)
    label = torch.randint(2, (2, *model.img_size), generator=generator).to(DEVICE)

    def step():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    def losses(run):
        """Of steps from the first state, with no momentum."""
        model.load_state_dict(state)
        for values in optimizer.state.values():
            values["momentum_buffer"].zero_()
        return torch.stack([run().clone() for _ in range(STEPS)])

    eager = losses(lambda: step()[0])
    replay, result = device.capture(step)
    replayed = losses(lambda: replay() or result[0])
    torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=0)
    assert eager[0] != eager[-1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_many_runs_give_the_same_bits(backend, op, dtype):
    call, _ = make_call(op, backend, dtype=dtype)
    first = call()
    for run in range(RUNS):
        for value, again in zip(first, call(), strict=True):
            assert torch.equal(value, again), run


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [name for name in FUSED_BACKENDS if name != "two_pass"])
def test_float32_keeps_its_digits_on_tensor_cores(backend, op, tf32):
    """torch's own products lose half of them at that setting."""
    found = make_call(op, backend)[0]()
    torch.set_float32_matmul_precision("highest")
    assert_equal(found[:2], make_call(op, "reference")[0]()[:2])  # output, gradient of x or q


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits(backend, op, device):
    call, _ = make_call(op, backend, dropout=0.3)
    call()
    with device.no_synchronization():
        call()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_the_current_stream(backend, op, device):
    """Inputs are written late on that stream: whoever reads them on another one reads zeros."""
    call, x = make_call(op, backend)
    expected, values = call(), x.detach().clone()

    def write_and_call():
        with torch.no_grad():
            x.copy_(values)
        return call()

    with torch.no_grad():
        x.zero_()
    assert_equal(device.on_busy_stream(write_and_call), expected)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_x_and_little_else_is_kept_for_backward(backend, device):
    """Stage 1 of Synapse with dropout: 1 MiB beside x, autograd's tensors and the allocator's."""
    layer = make_layer(STAGE1, bias=False, dropout=0.15).float()
    layer.backend = backend
    x = torch.randn(STAGE1[:3], device=DEVICE, requires_grad=True)
    assert x.nbytes <= kept_for_backward(layer, x) <= x.nbytes + 2**20
    before = device.allocated_bytes()
    y = layer(x)
    if before is not None:  # a CPU does not count
        assert device.allocated_bytes() - before - y.nbytes <= 2**20
