"""Choice of the backend, its reasons, and what an import costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import epa_kernels
from epa_kernels import __main__ as command
from epa_kernels import choice, dispatch
from epa_kernels.backends import cpu, cuda
from epa_kernels.contract import call_on

needs_module = pytest.mark.skipif(cpu.module is None, reason=str(cpu.missing))
needs_cuda_module = pytest.mark.skipif(
    cuda.module.missing is not None, reason=str(cuda.module.missing)
)


@pytest.fixture
def picky(monkeypatch):
    """A backend that comes first but cannot run, for two reasons."""
    backend = dispatch.Backend(
        dispatch.BACKENDS["two_pass"].functions,
        lambda call: ["head dim 160 > 128", "no kernel image for sm_75"],
    )
    monkeypatch.setitem(dispatch.BACKENDS, "picky", backend)
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("picky", "two_pass", "reference"))


@pytest.fixture
def no_module(monkeypatch):
    """As where nothing could be compiled."""
    monkeypatch.setattr(cpu, "module", None)
    monkeypatch.setattr(cpu, "missing", "the extension is not there (no compiler)")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


X = torch.zeros(1, 8, 4)
CALL = call_on("paired_attention", X)
FASTEST = "two_pass" if cpu.module is None else "cpu"


def test_fastest_that_can_run_is_chosen(picky):
    assert dispatch.select(CALL) == "two_pass"


def test_forced_backend_raises_with_every_reason(picky):
    with epa_kernels.use_backend("picky"), pytest.raises(RuntimeError) as error:
        dispatch.select(CALL)
    message = str(error.value)
    for part in (
        "head dim 160 > 128",
        "no kernel image",
        "Available: two_pass, reference",
        "explain",
    ):
        assert part in message


def test_use_backend_holds_in_its_block_or_from_now_on():
    with epa_kernels.use_backend("reference"):
        assert dispatch.select(CALL) == "reference"
        with epa_kernels.use_backend("two_pass"):
            assert dispatch.select(CALL) == "two_pass"
        assert dispatch.select(CALL) == "reference"
    assert dispatch.select(CALL) == FASTEST
    block = epa_kernels.use_backend("reference")
    for _ in range(2):
        with block:
            assert dispatch.select(CALL) == "reference"
        assert dispatch.select(CALL) == FASTEST
    epa_kernels.use_backend("reference")
    try:
        assert dispatch.select(CALL) == "reference"
        assert dispatch.select(CALL, backend="two_pass") == "two_pass"
    finally:
        epa_kernels.use_backend(None)
    assert dispatch.select(CALL) == FASTEST


@pytest.mark.parametrize(
    "call",
    (
        lambda: epa_kernels.use_backend("cudnn"),
        lambda: epa_kernels.EPA(8, 4, 2, backend="cudnn"),
        lambda: dispatch.select(CALL, backend="cudnn"),
    ),
)
def test_unknown_backend_is_refused_with_the_names(call):
    with pytest.raises(
        ValueError, match="must be one of cpu, cuda, triton, two_pass, reference, got 'cudnn'"
    ):
        call()
    assert dispatch.select(CALL) == FASTEST


def test_environment_variable_forces_a_backend():
    code = (
        "import torch, epa_kernels; epa_kernels.explain('paired_attention', torch.zeros(1, 8, 4))"
    )
    result = run_python(code, EPA_KERNELS_BACKEND="reference")
    assert "reference  runs (forced)" in result.stdout, result.stderr
    result = run_python(code, EPA_KERNELS_BACKEND="cudnn")
    assert "EPA_KERNELS_BACKEND: backend must be one of" in result.stderr


def test_explain_prints_every_backend_with_its_reasons(picky, capsys):
    epa_kernels.explain("paired_attention", X)
    printed = capsys.readouterr().out
    assert "picky      cannot run: head dim 160 > 128; no kernel image for sm_75" in printed
    assert "two_pass   runs" in printed
    assert "reference  can run" in printed
    with pytest.raises(ValueError, match="op must be one of"):
        epa_kernels.explain("attention", X)


def test_without_the_module_the_next_backend_is_chosen_and_the_reason_printed(no_module, capsys):
    assert dispatch.select(CALL) == "two_pass"
    epa_kernels.explain("paired_attention", X)
    printed = capsys.readouterr().out
    assert "cpu        cannot run: the extension is not there (no compiler)" in printed
    assert "two_pass   runs" in printed
    with pytest.raises(RuntimeError, match="'cpu' was forced but cannot run: the extension is not"):
        dispatch.select(CALL, backend="cpu")


def test_cpu_gives_every_reason_at_once(no_module):
    with pytest.raises(RuntimeError) as error:
        dispatch.select(call_on("paired_attention", X.to("meta", torch.int32)), backend="cpu")
    for part in ("not there", "x is on meta", "dtype torch.int32 is none of torch.float32"):
        assert part in str(error.value)


def test_order_falls_to_other_where_a_device_has_no_row():
    assert dispatch.select(call_on("paired_attention", X.to("meta"))) == "two_pass"


@pytest.mark.parametrize("switch", ("EPA_KERNELS_CPU", "EPA_KERNELS_CUDA"))
def test_kernels_are_there_where_they_are_demanded(switch):
    """Else all their tests would be skipped, and nobody would know."""
    if os.environ.get(switch) != "1":
        pytest.skip("kernels are not demanded")
    missing = {"EPA_KERNELS_CPU": cpu.missing, "EPA_KERNELS_CUDA": cuda.module.missing}
    assert missing[switch] is None


HEADS = torch.zeros(1, 8, 2, 4)


@pytest.fixture
def unasked():
    """`cuda` as before its first question; what it is told then is forgotten."""
    questions = cuda._why_not_here, cuda._why_not_on
    for question in questions:
        question.known.clear()
    yield
    for question in questions:
        question.known.clear()


@pytest.fixture
def gpu(monkeypatch, unasked):
    """A GPU as torch would describe it, and kernels compiled for some: gpu(capability, ...)."""

    def make(
        capability, driver=13000, architectures=(80, 90, 100, 120), ptx=100, cuda_version=13000
    ):
        module = SimpleNamespace(
            missing=None, architectures=architectures, ptx=ptx, cuda_version=cuda_version
        )
        monkeypatch.setattr(cuda, "module", module)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(cuda, "driver_version", lambda: driver)

    return make


@pytest.mark.parametrize("status, version", ((0, 13000), (100, None)))
def test_the_driver_tells_its_version(status, version, monkeypatch):
    def tell(answer):
        answer._obj.value = 13000
        return status

    driver = SimpleNamespace(cuDriverGetVersion=tell)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
    assert cuda.driver_version() == version


def test_a_machine_without_a_driver_has_no_version(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert cuda.driver_version() is None


def on_gpu(*shape, dtype=torch.float32):
    """A call of spatial_attention on a GPU."""
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape)
    return call_on("spatial_attention", x)


SMALL = on_gpu(2, 64, 4, 16)
GPU_TENSOR = {"device": SMALL.device, "dtype": SMALL.dtype, "shape": (2, 64, 4, 16)}


@pytest.mark.parametrize(
    "x, settings, expected",
    (
        (SMALL, {"capability": (8, 0)}, []),
        (SMALL, {"capability": (8, 9)}, []),
        (SMALL, {"capability": (12, 1)}, []),
        (SMALL, {"capability": (13, 0)}, []),  # by PTX
        (SMALL, {"capability": (7, 5)}, ["compute capability 7.5 < 8.0"]),
        (SMALL, {"capability": (11, 0)}, []),  # likewise
        (
            SMALL,
            {"capability": (8, 6), "architectures": (90,), "ptx": 90, "cuda_version": 12040},
            [
                "compute capability 8.6, the extension has sm_90 and PTX of sm_90, compiled "
                "with CUDA 12.4"
            ],
        ),
        (
            SMALL,
            {"capability": (9, 0), "architectures": (80, 120), "ptx": 120},
            [
                "compute capability 9.0, the extension has sm_80, sm_120 and PTX of sm_120, "
                "compiled with CUDA 13.0"
            ],
        ),
        (
            SMALL,
            {"capability": (9, 0), "driver": 12080},
            ["a driver of CUDA 12.8, the extension is of CUDA 13.0"],
        ),
        (SMALL, {"capability": (9, 0), "driver": 12040, "cuda_version": 12080}, []),
        (  # there is PTX alone for it, which an older driver cannot compile
            SMALL,
            {"capability": (13, 0), "driver": 12040, "cuda_version": 12080},
            ["a driver of CUDA 12.4, the extension is of CUDA 12.8"],
        ),
        (
            on_gpu(65536, 64, 65536, 1025, dtype=torch.int8),
            {"capability": (9, 0)},
            [
                "dtype torch.int8 is none of torch.float32, torch.float64, torch.bfloat16, "
                "torch.float16",
                "batch size 65536 > 65535",
                "number of heads 65536 > 65535",
                "head dim 1025 > 1024",
            ],
        ),
        (on_gpu(65535, 70000, 65535, 1024), {"capability": (9, 0)}, []),
    ),
)
def test_cuda_runs_on_gpus_that_it_was_compiled_for(x, settings, expected, gpu):
    gpu(**settings)
    assert cuda.why_not(x) == expected


def test_cuda_is_not_chosen_before_its_check(gpu, monkeypatch, tmp_path, capsys):
    gpu((9, 0))
    monkeypatch.setenv("EPA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "identity", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(choice, "_answers", {})
    assert dispatch.select(SMALL) == "two_pass"
    assert dispatch.select(SMALL, backend="cuda") == "cuda"
    epa_kernels.explain("spatial_attention", SimpleNamespace(**GPU_TENSOR))
    out = capsys.readouterr().out
    assert "cuda       not checked: its check needs the sizes of all tensors" in out
    assert "two_pass   runs\n" in out


def test_cuda_gives_every_reason_at_once(monkeypatch, unasked, capsys):
    missing = SimpleNamespace(missing="the extension is not there (no nvcc)")
    monkeypatch.setattr(cuda, "module", missing)
    with pytest.raises(RuntimeError) as error:
        dispatch.select(call_on("spatial_attention", HEADS.int()), backend="cuda")
    parts = ["(no nvcc)", "x is on cpu, the kernels run on", "dtype torch.int32"]
    if torch.version.cuda is None:
        parts.append(f"torch {torch.__version__}, which is built without CUDA")
    for part in parts:
        assert part in str(error.value)
    with epa_kernels.use_backend("cuda"):
        epa_kernels.explain("spatial_attention", HEADS)
    assert "cuda       cannot run: the extension is not there" in capsys.readouterr().out


def test_cuda_is_asked_without_a_graph_break():
    def ask(x):
        return x + len(cuda.why_not(call_on("spatial_attention", x)))

    asked = torch.compile(ask, fullgraph=True, backend="eager")
    expected = len(cuda.why_not(call_on("spatial_attention", HEADS)))
    assert torch.equal(asked(HEADS), HEADS + expected)


def test_cuda_module_is_not_loaded_by_the_import():
    code = (
        "import sys, torch, epa_kernels; x = torch.zeros(2, 9, 2, 4)\n"
        "epa_kernels.spatial_attention(x, x, x, torch.ones(1))\n"
        "from epa_kernels.backends import cuda; from epa_kernels.contract import call_on\n"
        "assert 'epa_kernels._C_cuda' not in sys.modules\n"
        "cuda.why_not(call_on('spatial_attention', x))\n"
        "print(('epa_kernels._C_cuda' in sys.modules) == (cuda.module.missing is None))"
    )
    result = run_python(code)
    assert result.stdout.strip() == "True", result.stderr


@needs_cuda_module
@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="there is a driver")
def test_a_launch_without_a_driver_names_kernel_shape_and_reason():
    message = "spatial_attention: output_fwd did not start for B N H D P = 1 8 2 4 8: CUDA driver"
    with pytest.raises(RuntimeError, match=message):
        cuda.spatial_attention(
            HEADS, HEADS, HEADS, torch.ones(1), None, normalize=False, dropout_p=0.0
        )


@needs_module
def test_environment_variable_chooses_the_instruction_set():
    code = "from epa_kernels.backends import cpu; print(cpu.isa)"
    isas = cpu.module.isas().split(",")
    for isa in isas:
        result = run_python(code, EPA_KERNELS_ISA=isa)
        assert result.stdout.strip() == isa, result.stderr
    assert run_python(code, EPA_KERNELS_ISA="").stdout.strip() == isas[0]
    result = run_python(code, EPA_KERNELS_ISA="mmx")
    rule = f"ValueError: EPA_KERNELS_ISA must be one of {cpu.module.isas()} on this processor"
    assert rule in result.stderr and "'mmx'" in result.stderr


def test_child_processes_import_the_package_that_is_tested():
    code = "import epa_kernels, unetrpp; print(epa_kernels.__file__, unetrpp.__file__)"
    import unetrpp

    assert run_python(code).stdout.split() == [epa_kernels.__file__, unetrpp.__file__]


@pytest.mark.parametrize("is_source", (True, False), ids=("sources", "install"))
def test_reason_for_no_module_tells_sources_from_an_install(tmp_path, monkeypatch, is_source):
    package = Path(epa_kernels.__file__).parent
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(package, tmp_path / "epa_kernels", ignore=ignore)
    if is_source:
        (tmp_path / "setup.py").touch()
    monkeypatch.chdir(tmp_path)
    # Without the finder of an editable install, which would find the extension.
    code = (
        "import sys; own = [f for f in sys.meta_path if f.__module__.startswith('_frozen')];"
        "sys.meta_path = own; from epa_kernels.backends import cpu, cuda; "
        "print(cpu.missing, cuda.module.missing, sep='\\n')"
    )
    missing = run_python(code).stdout.splitlines()
    for name, switch, reason in zip(("_C", "_C_cuda"), ("CPU", "CUDA"), missing, strict=True):
        rule = f"sources in {tmp_path}" if is_source else f"EPA_KERNELS_{switch}=1 pip install"
        assert rule in reason and f"epa_kernels.{name} " in reason and "circular" not in reason


def test_module_prints_versions_and_table():
    result = subprocess.run(
        [sys.executable, "-m", "epa_kernels"], capture_output=True, text=True, check=True
    )
    for part in (
        epa_kernels.__version__,
        torch.__version__,
        "channel_attention",
        "two_pass",
        "CUDA kernels: ",
    ):
        assert part in result.stdout


@pytest.mark.parametrize("arguments", (["--typo"], ["cpu"], ["--backend", "cpu"]))
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m epa_kernels" in capsys.readouterr().err


def test_import_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import epa_kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    imported = run_python(code).stdout.split()
    assert "epa_kernels" in imported
    foreign = {"monai", "triton", "nibabel", "scipy", "matplotlib", "lightning_fabric", "unetrpp"}
    assert not foreign & set(imported)


def test_import_costs_less_than_a_tenth_of_a_second():
    code = (
        "import time, torch; t = time.process_time(); import epa_kernels; "
        "print(time.process_time() - t)"
    )
    # The least of some runs: a busy machine only adds.
    cost = min(float(run_python(code).stdout) for _ in range(5))
    assert cost < 0.1
