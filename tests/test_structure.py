"""The structure of the repository: who imports whom, and what stands once."""

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from cases import ROOT

from epa_kernels import contract

PACKAGES = ("epa_kernels", "unetrpp", "benchmarks")
# Tests of the benchmarks themselves. Every other test is one of the product.
BENCHMARK_TESTS = {
    "test_benchmarks",
    "test_cuda_compile",
    "test_floor",
    "test_gpu_check",
    "test_published_order",
    "test_triton_compile",
    "test_tune",
}
# What stands in the contract, and is imported everywhere else.
TABLES = {
    "kinds": set(contract.KINDS),
    "layouts": set(contract.LAYOUTS),
    "ops": set(contract.OPS),
    "dtypes": {str(dtype).removeprefix("torch.") for dtype in contract.DTYPES},
}
WITHOUT_TORCH = "test_kernels_without_torch"  # cannot import epa_kernels


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def sources(*folders: str) -> dict[str, ast.Module]:
    """{dotted name of a module: its tree}; a package has the name of its __init__.py."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = parse(path)
    return found


@functools.cache
def tests() -> dict[str, ast.Module]:
    """{name of a module in tests: its tree}."""
    return {path.stem: parse(path) for path in sorted((ROOT / "tests").glob("*.py"))}


def statements(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """Nodes of a module; `at_import` leaves out functions and what is there for types alone."""
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node, at_import=at_import)


def imported(name: str, modules: dict[str, ast.Module], *, at_import: bool) -> set[str]:
    """Modules that a module imports by name; of others, the whole dotted name."""
    is_package = any(other.startswith(f"{name}.") for other in modules)
    found = set()
    for node in statements(modules[name], at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in modules else base for each in inner}
    return found


def cycle(modules: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other when they are imported, in order; empty if none do."""
    graph = {
        name: imported(name, modules, at_import=True) & modules.keys() - {name} for name in modules
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_a_planted_cycle_is_found():
    texts = {
        "p": "from .a import x",
        "p.a": "from . import b",
        "p.b": "from .deep import c",
        "p.deep": "",
        "p.deep.c": "def f():\n    from ..a import x",
    }
    modules = {name: ast.parse(text) for name, text in texts.items()}
    assert cycle(modules) == []
    assert imported("p.deep.c", modules, at_import=False) == {"p.a"}
    modules["p.deep.c"] = ast.parse("from ..a import x")
    assert set(cycle(modules)) == {"p.a", "p.b", "p.deep.c"}
    modules["p.deep.c"] = ast.parse("if TYPE_CHECKING:\n    from ..a import x")
    assert cycle(modules) == []


def test_no_modules_import_each_other():
    assert cycle(sources(*PACKAGES)) == []


@pytest.mark.parametrize(
    "package, others",
    (
        ("epa_kernels", {"unetrpp", "benchmarks"}),
        ("unetrpp", {"benchmarks"}),
        ("benchmarks", set()),
    ),
)
def test_a_package_imports_nothing_of_those_above_it_or_of_tests(package, others):
    modules, forbidden = sources(package), others | tests().keys() | {"tests"}
    assert len(modules) > 5
    for name in modules:
        assert not roots(imported(name, modules, at_import=False)) & forbidden, name


def test_only_tests_of_the_benchmarks_import_them():
    modules = tests()
    every = {name: roots(imported(name, modules, at_import=False)) for name in modules}
    assert {name for name in every if "benchmarks" in every[name]} <= BENCHMARK_TESTS


def test_private_names_of_torch_are_in_one_file():
    """As `torch._C.name`, or imported from such a module."""
    for name, tree in sources(*PACKAGES).items():
        if name == "epa_kernels.torch_private":
            continue
        for node in ast.walk(tree):
            found = ""
            if isinstance(node, ast.Attribute):
                found = ast.unparse(node)
            elif isinstance(node, ast.ImportFrom):
                found = f"{node.module}.{node.names[0].name}"
            elif isinstance(node, ast.Import):
                found = node.names[0].name
            is_private = re.match(r"torch(\.\w+)*\._[a-zA-Z]", found)
            assert not is_private, f"{name}: {found}"


def text(node: ast.AST | None) -> str | None:
    """The string of a constant, and the name of a dtype of torch."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
        return node.attr
    return None


def literals(tree: ast.Module) -> Iterator[set[str | None]]:
    """Tuples, lists and sets, and the keys of dictionaries that number them."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            yield set(map(text, node.elts))
        elif isinstance(node, ast.Dict):
            values = [isinstance(v, ast.Constant) and isinstance(v.value, int) for v in node.values]
            if all(values):
                yield set(map(text, node.keys))


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_names_stands_once(table):
    def places(modules):
        return [
            n for n, tree in modules.items() for names in literals(tree) if names == TABLES[table]
        ]

    assert set(places(sources("epa_kernels", "unetrpp"))) <= {"epa_kernels.contract"}
    if table != "dtypes":  # a test or a benchmark lists those that it runs on
        found = places(sources("benchmarks") | tests())
        assert set(found) <= {WITHOUT_TORCH}


def opens_text_as_the_locale_says(call: ast.Call) -> bool:
    """Whether a call of open, read_text or write_text leaves the encoding out."""
    function, names = call.func, {keyword.arg for keyword in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
    if isinstance(function, ast.Attribute) and name in ("read_text", "write_text"):
        return "encoding" not in names
    modes = (text(argument) or "" for argument in call.args)
    is_binary = any(re.fullmatch("[rwax+]*b[rwax+]*", mode) for mode in modes)
    return name == "open" and not is_binary and "encoding" not in names


def test_a_missing_encoding_is_found():
    texts = ("f.open('ab')", "open(f, 'r+b')", "write_text(f, t)", "f.read_text(encoding='utf-8')")
    texts += ("f.open()", "open(f, 'w')", "f.write_text('b')")
    calls = (ast.parse(each, mode="eval").body for each in texts)
    assert list(map(opens_text_as_the_locale_says, calls)) == [False] * 4 + [True] * 3


def test_text_files_have_an_encoding():
    for name, tree in sources(*PACKAGES).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert not opens_text_as_the_locale_says(node), f"{name}: {ast.unparse(node)}"


def test_nothing_changes_where_python_searches():
    """The tests do, once, in tests/conftest.py; so does setup.py, which no package imports."""
    modules = sources(*PACKAGES) | tests()
    changing = {n for n, tree in modules.items() if "sys.path." in ast.unparse(tree)}
    assert changing - {"test_structure"} == {"conftest"}


def test_oldest_constraints_are_the_bounds_of_pyproject():
    """CI runs the tests once with constraints-oldest.txt: what it pins is what users are told."""
    bounds = re.findall(
        r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8")
    )
    docs = {"mkdocs-material", "mkdocstrings", "ruff", "pytest-benchmark"}
    pinned = re.findall(
        r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text("utf-8"), re.M
    )
    assert set(pinned) == {bound for bound in bounds if bound[0] not in docs}
