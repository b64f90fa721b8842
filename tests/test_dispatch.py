"""Choice of the backend, its reasons, and what an import costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import epa_kernels
from epa_kernels import dispatch, native

needs_module = pytest.mark.skipif(native.module is None, reason=str(native.missing))


@pytest.fixture
def picky(monkeypatch):
    """A backend that comes first but cannot run, for two reasons."""
    backend = dispatch.Backend(
        dispatch.BACKENDS["two_pass"].functions,
        lambda op, x: ["head dim 160 > 128", "no kernel image for sm_75"],
        lambda: [],
    )
    monkeypatch.setitem(dispatch.BACKENDS, "picky", backend)
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("picky", "two_pass", "reference"))


@pytest.fixture
def no_module(monkeypatch):
    """As where nothing could be compiled."""
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "the extension is not there (no compiler)")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


X = torch.zeros(1, 8, 4)
FASTEST = "two_pass" if native.module is None else "cpp"


def test_fastest_that_can_run_is_chosen(picky):
    assert dispatch.select("paired_attention", X) == "two_pass"


def test_forced_backend_raises_with_every_reason(picky):
    with epa_kernels.use_backend("picky"), pytest.raises(RuntimeError) as error:
        dispatch.select("paired_attention", X)
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
        assert dispatch.select("paired_attention", X) == "reference"
        with epa_kernels.use_backend("two_pass"):
            assert dispatch.select("paired_attention", X) == "two_pass"
        assert dispatch.select("paired_attention", X) == "reference"
    assert dispatch.select("paired_attention", X) == FASTEST
    block = epa_kernels.use_backend("reference")
    for _ in range(2):
        with block:
            assert dispatch.select("paired_attention", X) == "reference"
        assert dispatch.select("paired_attention", X) == FASTEST
    epa_kernels.use_backend("reference")
    try:
        assert dispatch.select("paired_attention", X) == "reference"
        assert dispatch.select("paired_attention", X, backend="two_pass") == "two_pass"
    finally:
        epa_kernels.use_backend(None)
    assert dispatch.select("paired_attention", X) == FASTEST


@pytest.mark.parametrize(
    "call",
    (
        lambda: epa_kernels.use_backend("cudnn"),
        lambda: epa_kernels.EPA(8, 4, 2, backend="cudnn"),
        lambda: dispatch.select("paired_attention", X, backend="cudnn"),
    ),
)
def test_unknown_backend_is_refused_with_the_names(call):
    with pytest.raises(
        ValueError, match="must be one of cpp, triton, two_pass, reference, got 'cudnn'"
    ):
        call()
    assert dispatch.select("paired_attention", X) == FASTEST


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
    assert dispatch.select("paired_attention", X) == "two_pass"
    epa_kernels.explain("paired_attention", X)
    printed = capsys.readouterr().out
    assert "cpp        cannot run: the extension is not there (no compiler)" in printed
    assert "two_pass   runs" in printed
    with pytest.raises(RuntimeError, match="'cpp' was forced but cannot run: the extension is not"):
        dispatch.select("paired_attention", X, backend="cpp")


def test_cpp_gives_every_reason_at_once(no_module):
    with pytest.raises(RuntimeError) as error:
        dispatch.select("paired_attention", X.to("meta", torch.int32), backend="cpp")
    for part in ("not there", "x is on meta", "dtype torch.int32 is none of torch.float32"):
        assert part in str(error.value)


def test_order_falls_to_other_where_a_device_has_no_row():
    assert dispatch.select("paired_attention", X.to("meta")) == "two_pass"


@pytest.mark.skipif(os.environ.get("EPA_KERNELS_CPU") != "1", reason="kernels are not demanded")
def test_kernels_are_there_where_they_are_demanded():
    """Else all their tests would be skipped, and nobody would know."""
    assert native.module is not None, native.missing


@needs_module
def test_environment_variable_chooses_the_instruction_set():
    code = "from epa_kernels import native; print(native.isa)"
    isas = native.module.isas().split(",")
    for isa in isas:
        result = run_python(code, EPA_KERNELS_ISA=isa)
        assert result.stdout.strip() == isa, result.stderr
    assert run_python(code, EPA_KERNELS_ISA="").stdout.strip() == isas[0]
    result = run_python(code, EPA_KERNELS_ISA="mmx")
    rule = f"ValueError: EPA_KERNELS_ISA must be one of {native.module.isas()} on this processor"
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
        "sys.meta_path = own; from epa_kernels import native; print(native.missing)"
    )
    missing = run_python(code).stdout
    rule = f"sources in {tmp_path}" if is_source else "EPA_KERNELS_CPU=1 pip install"
    assert rule in missing and "circular" not in missing


def test_module_prints_versions_and_table():
    result = subprocess.run(
        [sys.executable, "-m", "epa_kernels"], capture_output=True, text=True, check=True
    )
    for part in (epa_kernels.__version__, torch.__version__, "channel_attention", "two_pass"):
        assert part in result.stdout


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
