import os
import re
import sys
from pathlib import Path

import pytest

# The tests of the benchmarks import them from the folder above. It comes last, so that the
# installed packages are tested and not the sources beside it.
sys.path.append(str(Path(__file__).parents[1]))

# One thread a worker under pytest-xdist, in its child processes too: threads that wait for each
# other on busy cores cost more than they compute. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where the tests of the attention ops run, default cpu",
    )


def pytest_configure(config):
    device = config.getoption("--device")
    if device == "cpu":
        # The Triton kernels run in Python on CPU tensors. Set before triton is imported, too.
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(
                f"--device cuda needs a GPU that torch {torch.__version__} can use, and it finds "
                f"none; leave the option out to test on the CPU."
            )
        os.environ.pop("TRITON_INTERPRET", None)
    os.environ["EPA_KERNELS_TEST_DEVICE"] = device


@pytest.fixture(scope="session", autouse=True)
def interpreter(pytestconfig):
    """The interpreter that the tests of the Triton kernels need on a CPU."""
    from epa_kernels.backends import triton

    if pytestconfig.getoption("--device") == "cpu" and not triton.missing():
        from epa_kernels.backends.triton import interpreter

        interpreter.prepare()


@pytest.fixture(scope="session")
def cuda_module(tmp_path_factory):
    """The module of the CUDA kernels, for a CPU."""
    import cuda_on_cpu

    if reason := cuda_on_cpu.why_not():
        pytest.skip(reason)
    return cuda_on_cpu.Builder(tmp_path_factory).module()


@pytest.fixture(scope="module")
def emulated_cuda(cuda_module):
    """Lets `backends.cuda` run on CPU tensors; a function: kernels since it was called last."""
    import ctypes

    from epa_kernels.backends import cuda

    library = ctypes.CDLL(cuda_module.__file__)
    library.emulator_launched.restype = ctypes.c_char_p
    before, cuda.module = cuda.module, cuda_module
    cuda._why_not_here.known.clear()
    yield lambda: re.findall(r"\w+(?=_kernel)", library.emulator_launched().decode())
    cuda.module = before
    cuda._why_not_here.known.clear()


@pytest.fixture
def tf32():
    """float32 matrices multiply on tensor cores."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session", autouse=True)
def other_folder(tmp_path_factory):
    """Run elsewhere: here, child processes would import the sources, not what is installed."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if any(not m.args[0](**item.callspec.params) for m in item.iter_markers("daily")):
            item.add_marker("exhaustive")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def backend_runs(request):
    """Skip a test of a backend that cannot run here (on its dtype), with the backend's reasons."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if "backend" not in params:
        return
    import torch

    from epa_kernels import dispatch
    from epa_kernels.contract import call_on

    device = getattr(request.module, "DEVICE", "cpu")
    x = torch.empty(0, dtype=params.get("dtype", torch.float32), device=device)
    if reasons := dispatch.BACKENDS[params["backend"]].why_not(call_on("paired_attention", x)):
        pytest.skip("; ".join(reasons))
