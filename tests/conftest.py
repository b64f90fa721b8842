import importlib.util
import os

import pytest

# One thread a worker under pytest-xdist, in its child processes too: threads that wait for each
# other on busy cores cost more than they compute. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


# The Triton kernels run in Python on CPU tensors. Set before triton is imported, too.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Few large blocks, since a program costs milliseconds, but several chunks of several tiles."""
    if importlib.util.find_spec("triton"):
        import triton_interpreter

        from epa_kernels.triton import configs

        triton_interpreter.repair()
        pick, rows = configs.pick, {"merge": 64, "gather": 64, "sum_chunks": 8192}

        def larger(kernel, *shape):
            launch = pick(kernel, *shape)
            return launch._replace(rows=rows.get(kernel, launch.rows), chunks=2)

        configs.pick, configs.SINGLE_CHUNK = larger, 100


@pytest.fixture(scope="session", autouse=True)
def other_folder(tmp_path_factory):
    """Run elsewhere: here, child processes would import the sources, not what is installed."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def backend_runs(request):
    """Skip a test of a backend that cannot run here (on its dtype), with the backend's reasons."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if "backend" not in params:
        return
    import torch

    from epa_kernels import dispatch

    x = torch.empty(0, dtype=params.get("dtype", torch.float32))
    if reasons := dispatch.BACKENDS[params["backend"]].why_not("paired_attention", x):
        pytest.skip("; ".join(reasons))
