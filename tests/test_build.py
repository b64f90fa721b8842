"""The build: of every architecture, of what changed alone, and none that fails in silence."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77")
pytest.importorskip("pybind11")
pytest.importorskip("ninja")

ROOT = Path(__file__).parents[1]
PACKAGE = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGE += ("epa_kernels", "unetrpp")
COMMANDS = Path("csrc/compile_commands.py")
# What the real sources are, in small. `width` differs with the flags, and the linker keeps one.
SOURCES = {
    "width.h": """
inline __attribute__((noinline)) int width() {
#if defined(__AVX512F__)
  return 512;
#elif defined(__AVX2__)
  return 256;
#else
  return 128;
#endif
}
""",
    "cpu/gemm.cpp": '#include "width.h"\nnamespace EPA_ISA { int gemm() { return width(); } }\n',
    "cpu/tile.cpp": "namespace EPA_ISA { int tile() { return 16; } }\n",
    "cpu/isa.cpp": """
#if defined(__x86_64__)
#define BEST avx512
#else
#define BEST baseline
#endif
namespace BEST { int gemm(); }
int best_gemm() { return BEST::gemm(); }
""",
    "bind_cpu.cpp": """
#include <Python.h>
int best_gemm();
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", "", -1, {}, {}, {}, {}, {}};
  PyObject *result = PyModule_Create(&definition);
  PyModule_AddIntConstant(result, "width", best_gemm());
  return result;
}
""",
    "cuda/launch.cu": """
#include <cuda_runtime.h>
__global__ void write(int *to) { *to = 1; }
const char *launch() {
  write<<<1, 1>>>(nullptr);
  return cudaGetErrorName(cudaGetLastError());
}
""",
    "bind_cuda.cpp": """
#include <Python.h>
#include <initializer_list>
const char *launch();
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C_cuda", "", -1, {}, {}, {}, {}, {}};
  PyObject *result = PyModule_Create(&definition);
  PyModule_AddStringConstant(result, "error", launch());
  PyModule_AddIntConstant(result, "cuda_version", EPA_CUDA_VERSION);
  PyModule_AddIntConstant(result, "ptx", EPA_PTX);
  PyObject *numbers = PyList_New(0);
  for (int number : {EPA_ARCHITECTURES}) PyList_Append(numbers, PyLong_FromLong(number));
  PyModule_AddObject(result, "architectures", numbers);
  return result;
}
""",
}
SENTENCE = "epa-kernels is built without its C++ kernels, because"
CUDA_SENTENCE = "epa-kernels is built without its CUDA kernels, because"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no c++, g++ or clang++"
)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
# What a test of the CPU's module does not build.
NO_NVCC = {"CUDA_HOME": "/nonexistent"}
# Of CUDA 12.4, as far as the build asks; it compiles nothing.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) printf 'compute_%s\\n' 75 80 90 100 ;;
  *-E*) echo '#define CUDART_VERSION 12040' ;;
  *-c*.cu*) echo "a kernel is wrong" >&2; exit 1 ;;
esac
"""


def copy(names, folder):
    for name in names:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, folder / name)


@pytest.fixture
def tree(tmp_path):
    """The package with the small sources, where nothing has been built."""
    folder = tmp_path / "source tree"
    for name, text in SOURCES.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    copy((*PACKAGE, COMMANDS), folder)
    return folder


def run(arguments, folder, **variables):
    """Runs Python in `folder`, with no variable of the build set but those given."""
    ours = ("EPA_KERNELS_CPU", "EPA_KERNELS_CUDA", "CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME")
    ours += ("TORCH_CUDA_ARCH_LIST",)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build(folder, **variables):
    """Builds both modules where CUDA_HOME is given, else that of the CPU."""
    command = ["setup.py", "-q", "build_ext", "--build-lib=lib", "--build-temp=t"]
    return run(command, folder, **{**NO_NVCC, **variables})


def modules(folder):
    return list(folder.rglob("_C*.so"))


def load(path):
    """A module that is none of this process's."""
    name = path.name.partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    return importlib.util.module_from_spec(spec)


@pytest.fixture
def toolkit(tmp_path):
    """CUDA_HOME with the nvcc of the script that is given."""

    def make(script):
        nvcc = tmp_path / "cuda 12/bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(script, encoding="utf-8")
        nvcc.chmod(0o755)
        return str(nvcc.parents[1])

    return make


@needs_compiler
def test_metadata_and_a_source_distribution_ask_no_compiler(tree, toolkit, tmp_path):
    """A build of the same compilers does ask them."""
    asked = tmp_path / "asked"
    script = f'#!/bin/sh\necho "$0" >> {shlex.quote(str(asked))}\nexit 1\n'
    home = toolkit(script)
    compiler = tmp_path / "compiler"
    compiler.write_text(script, encoding="utf-8")
    compiler.chmod(0o755)
    hooks = """
import os
from setuptools import build_meta
for name in ("wheel", "editable", "sdist"):
    getattr(build_meta, f"get_requires_for_build_{name}")()
os.mkdir("out")
for name in ("wheel", "editable"):
    build_meta.__dict__[f"prepare_metadata_for_build_{name}"]("out")
build_meta.build_sdist("out")
"""
    variables = {"CXX": str(compiler), "CUDA_HOME": home}
    result = run(["-c", hooks], tree, **variables)
    assert result.returncode == 0 and "is built without" not in result.stdout, result.stdout
    assert list(tree.glob("out/*.tar.gz")) and not asked.exists()
    result = build(tree, **variables)
    assert result.returncode == 0, result.stdout
    names = asked.read_text(encoding="utf-8").splitlines()
    assert names == [str(compiler), f"{home}/bin/nvcc"]


@needs_compiler
def test_an_editable_build_compiles_once_and_into_the_tree(tree, tmp_path):
    def objects():
        return {p.name: p.stat().st_mtime_ns for p in tree.glob("build/editable/*.o")}

    hook = "from setuptools import build_meta; print(build_meta.build_editable({!r}))"
    times = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        command = ["-c", hook.format(str(tmp_path / folder))]
        result = run(command, tree, EPA_KERNELS_CPU="1", **NO_NVCC)
        assert result.returncode == 0, result.stdout
        times.append(objects())
    assert times[0] == times[1] and "bind_cpu.o" in times[0]
    assert [path.parent for path in modules(tree)] == [tree / "epa_kernels"]


def test_without_a_compiler_the_package_is_plain_python(tree, tmp_path):
    pytest.importorskip("pip")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    target = tmp_path / "target"
    pip = ["-m", "pip", "install", "-v", *options, f"--target={target}", str(tree)]
    result = run(pip, tmp_path, CXX="/nonexistent -O2", **NO_NVCC)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(SENTENCE) == 1, result.stdout
    assert result.stdout.count(CUDA_SENTENCE) == 1, result.stdout
    assert "/nonexistent" in result.stdout and "py3-none-any" in result.stdout
    assert not modules(target)
    code = "import epa_kernels; print(epa_kernels.__file__)"
    result = run(["-c", code], tmp_path, PYTHONPATH=str(target))
    assert Path(result.stdout.strip()).parent == target / "epa_kernels", result.stdout


@pytest.mark.parametrize("compiler", ["/nonexistent", "cat", "c++ -nostdinc"])
def test_a_module_that_is_demanded_is_built_or_an_error(compiler, tree):
    result = build(tree, CXX=compiler)
    assert result.returncode == 0 and SENTENCE in result.stdout, result.stdout
    result = build(tree, CXX=compiler, EPA_KERNELS_CPU="1")
    assert result.returncode != 0 and "EPA_KERNELS_CPU is 1, but" in result.stdout, result.stdout


@needs_compiler
def test_an_error_in_the_sources_is_an_error(tree):
    (tree / "csrc/cpu/tile.cpp").write_text("int tile = this is wrong;\n", encoding="utf-8")
    result = build(tree)
    assert result.returncode != 0
    for text in ("csrc/cpu/tile.cpp:1", "does not compile", "EPA_KERNELS_CPU=0"):
        assert text in result.stdout, result.stdout
    result = build(tree, EPA_KERNELS_CPU="0")
    assert result.returncode == 0 and SENTENCE in result.stdout, result.stdout
    assert not modules(tree)


@needs_compiler
def test_a_flag_that_the_compiler_refuses_is_an_error(tree):
    result = build(tree, CXXFLAGS="-fno-such-flag")
    assert result.returncode != 0 and "-fno-such-flag" in result.stdout, result.stdout


@needs_compiler
def test_an_edit_compiles_what_depends_on_it(tree):
    def compiled():
        before = {path.name: path.stat().st_mtime_ns for path in (tree / "t").glob("*.o")}
        result = build(tree)
        assert result.returncode == 0, result.stdout
        after = {path.name: path.stat().st_mtime_ns for path in (tree / "t").glob("*.o")}
        return {name.removesuffix(".o") for name in after if after[name] != before.get(name)}

    everything = compiled()
    isas = {name.removeprefix("gemm.") for name in everything if name.startswith("gemm.")}
    assert isas == {"baseline"} or isas == {"baseline", "avx2", "avx512"}
    several = {f"{source}.{isa}" for source in ("gemm", "tile") for isa in isas}
    assert everything == {"bind_cpu", "isa", *several}
    assert compiled() == set()
    edited = SOURCES["cpu/tile.cpp"].replace("16", "32")
    (tree / "csrc/cpu/tile.cpp").write_text(edited, encoding="utf-8")
    assert compiled() == {f"tile.{isa}" for isa in isas}
    (tree / "csrc/width.h").write_text(SOURCES["width.h"] + "\n", encoding="utf-8")
    assert compiled() == {f"gemm.{isa}" for isa in isas}


@needs_compiler
def test_an_inline_function_of_many_objects_runs_on_every_processor(tree):
    result = build(tree)
    assert result.returncode == 0, result.stdout
    (path,) = modules(tree)
    assert load(path).width == 128


@pytest.mark.parametrize(
    "script, reason",
    (
        (None, "/nonexistent/bin/nvcc cannot run"),
        ("#!/bin/sh\necho 'no toolkit' >&2\nexit 1\n", "cannot compile them (no toolkit)"),
        ("#!/bin/sh\necho compute_75\n", "knows none of 8.0 9.0 10.0 12.0"),
        ("#!/bin/sh\necho compute_80\n", "has no headers of the CUDA runtime"),
    ),
    ids=("absent", "broken", "old", "bare"),
)
def test_a_cuda_module_that_is_demanded_is_built_or_an_error(script, reason, tree, toolkit):
    home = {"CUDA_HOME": toolkit(script)} if script else NO_NVCC
    result = build(tree, EPA_KERNELS_CPU="0", **home)
    assert result.returncode == 0 and not modules(tree), result.stdout
    assert CUDA_SENTENCE in result.stdout and reason in result.stdout, result.stdout
    result = build(tree, EPA_KERNELS_CPU="0", EPA_KERNELS_CUDA="1", **home)
    assert result.returncode != 0 and "EPA_KERNELS_CUDA is 1, but" in result.stdout, result.stdout
    assert reason in result.stdout


@pytest.mark.parametrize("asked", ("Ampere;9.0", "native", "90"))
def test_an_architecture_without_a_number_is_named(asked, tree, toolkit):
    options = {"CUDA_HOME": toolkit(FAKE_NVCC), "TORCH_CUDA_ARCH_LIST": asked}
    result = build(tree, EPA_KERNELS_CPU="0", **options)
    assert f"has {asked.partition(';')[0]!r}, which is no number" in result.stdout, result.stdout


@needs_compiler
def test_nvcc_gets_the_compiler_without_what_stands_in_front(tree, toolkit):
    home = toolkit(FAKE_NVCC)
    build(tree, EPA_KERNELS_CPU="0", CUDA_HOME=home, CXX="env g++ -m64")
    command = (tree / "t/build.ninja").read_text(encoding="utf-8")
    assert "-ccbin g++ " in command and "-Xcompiler -m64" in command


@needs_compiler
@pytest.mark.parametrize(
    "asked, expected",
    (
        ("", ["80,sm_80", "80,sm_90", "100,sm_100", "100,compute_100"]),
        ("7.5;8.0 9.0a+PTX,12.0", ["80,sm_80", "80,sm_90", "80,compute_80"]),
        ("9.0", ["90,sm_90", "90,compute_90"]),
    ),
)
def test_an_nvcc_gets_the_architectures_that_it_knows(asked, expected, tree, toolkit):
    home = toolkit(FAKE_NVCC)
    result = build(tree, EPA_KERNELS_CPU="0", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=asked)
    pairs = re.findall(
        r"arch=compute_(\d+),code=(\w+)", (tree / "t/build.ninja").read_text(encoding="utf-8")
    )
    assert [",".join(pair) for pair in pairs] == expected
    # An error in the sources is an error here, too.
    assert result.returncode != 0 and "a kernel is wrong" in result.stdout, result.stdout
    assert "EPA_KERNELS_CUDA=0 leaves it out" in result.stdout
    result = build(tree, EPA_KERNELS_CPU="0", CUDA_HOME=home, EPA_KERNELS_CUDA="0")
    assert result.returncode == 0 and "EPA_KERNELS_CUDA is 0" in result.stdout, result.stdout


@needs_nvcc
@needs_compiler
def test_a_wheel_holds_both_modules_and_they_load_beside_any_torch(tree, tmp_path):
    pytest.importorskip("pip")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    wheels = ["-m", "pip", "wheel", "-q", *options, f"--wheel-dir={tmp_path}", str(tree)]
    capabilities = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0", "EPA_KERNELS_CUDA": "1"}
    linker = {"LDFLAGS": "-Wl,--as-needed,-z,now -s"}
    result = run(wheels, tmp_path, EPA_KERNELS_CPU="1", **capabilities, **linker)
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-cp3\d+-cp3\d+\w*-(linux|macosx)_\w+\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    cpu, cuda = sorted(modules(tmp_path / "installed"))
    assert load(cpu).width == 128
    module = load(cuda)
    assert module.architectures == [80, 90] and module.cuda_version >= 12000
    if not os.path.exists("/proc/driver/nvidia"):
        assert module.error == "cudaErrorInsufficientDriver"
    # The CUDA runtime is inside, and is no one else's: torch brings another one.
    symbols = subprocess.run(["nm", "-D", cuda], capture_output=True, text=True, check=True).stdout
    assert " T PyInit__C_cuda" in symbols and " cuda" not in symbols


@needs_compiler
def test_a_wheel_without_modules_is_of_no_platform_whatever_was_built_before(tree, tmp_path):
    def wheel(**variables):
        result = run(["setup.py", "-q", "bdist_wheel"], tree, **{**NO_NVCC, **variables})
        assert result.returncode == 0, result.stdout
        newest = max((tree / "dist").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with zipfile.ZipFile(newest) as file:
            names = [name for name in file.namelist() if name.endswith(".so")]
            (tags,) = (name for name in file.namelist() if name.endswith(".dist-info/WHEEL"))
            return newest.name, names, file.read(tags).decode()

    name, found, tags = wheel(EPA_KERNELS_CPU="1")
    assert "-none-any" not in name and len(found) == 1 and "Root-Is-Purelib: false" in tags
    name, found, tags = wheel(EPA_KERNELS_CPU="0")
    assert name.endswith("-py3-none-any.whl") and not found
    assert "Root-Is-Purelib: true" in tags and "Tag: py3-none-any" in tags


def test_sdist_holds_what_a_build_and_the_tests_need(tmp_path):
    copy((*PACKAGE, "csrc", "tests"), tmp_path)
    needed = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    result = run(["setup.py", "-q", "sdist"], tmp_path, CXX="/nonexistent", **NO_NVCC)
    assert result.returncode == 0, result.stdout
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {str(COMMANDS), "csrc/kernels.h", "csrc/cuda/cuda_kernels.h"} <= needed <= names, (
        needed - names
    )
