"""The build: of every instruction set, of what changed alone, and none that fails in silence."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77")
pytest.importorskip("pybind11")
pytest.importorskip("ninja")

ROOT = Path(__file__).parents[1]
PACKAGE = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGE += ("epa_kernels", "unetrpp")
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
}
SENTENCE = "epa-kernels is built without its C++ kernels, because"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no c++, g++ or clang++"
)


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
        path.write_text(text)
    copy(PACKAGE, folder)
    return folder


def run(arguments, folder, **variables):
    """Runs Python in `folder`, with no variable of the build set but those given."""
    ours = ("EPA_KERNELS_CPU", "CXX", "CXXFLAGS", "LDFLAGS")
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
    return run(
        ["setup.py", "-q", "build_ext", "--build-lib=lib", "--build-temp=t"], folder, **variables
    )


def modules(folder):
    return list(folder.rglob("_C*.so"))


def test_without_a_compiler_the_package_is_plain_python(tree, tmp_path):
    pytest.importorskip("pip")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    target = tmp_path / "target"
    pip = ["-m", "pip", "install", "-v", *options, f"--target={target}", str(tree)]
    result = run(pip, tmp_path, CXX="/nonexistent -O2")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(SENTENCE) == 1, result.stdout
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
    (tree / "csrc/cpu/tile.cpp").write_text("int tile = this is wrong;\n")
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
    (tree / "csrc/cpu/tile.cpp").write_text(SOURCES["cpu/tile.cpp"].replace("16", "32"))
    assert compiled() == {f"tile.{isa}" for isa in isas}
    (tree / "csrc/width.h").write_text(SOURCES["width.h"] + "\n")
    assert compiled() == {f"gemm.{isa}" for isa in isas}


@needs_compiler
def test_an_inline_function_of_many_objects_runs_on_every_processor(tree):
    result = build(tree)
    assert result.returncode == 0, result.stdout
    (path,) = modules(tree)
    spec = importlib.util.spec_from_file_location("_C", path)
    assert importlib.util.module_from_spec(spec).width == 128


def test_sdist_holds_what_a_build_and_the_tests_need(tmp_path):
    copy((*PACKAGE, "csrc", "tests"), tmp_path)
    needed = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    result = run(["setup.py", "-q", "sdist"], tmp_path, CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert "csrc/kernels.h" in needed and needed <= names, needed - names
