"""README and docs: their code runs, what they name exists, and their sentences are short."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
# A comment in front of a block says why it is not run.
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL
)
VARIABLE = re.compile(r"\b(?:EPA_KERNELS|UNETRPP)_[A-Z]+\b")
# A path of the repository, or the name of a source file in it.
PATH = re.compile(
    r"(?:epa_kernels|unetrpp|csrc|docs|tests|benchmarks|examples|\.github|\.ci)(?:/[\w.*-]+)*/?"
    r"|[\w*-]+\.(?:py|cpp|h|cuh|cu|toml|cff)|Makefile|\.[\w-]+\.yaml|\.clang-format"
)
DOTTED = re.compile(r"((?:epa_kernels|unetrpp)(?:\.\w+)+)(?:\(|$)")
ELSEWHERE = {"cuda_occupancy.h"}  # of the CUDA toolkit


def relative(page):
    return str(page.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("page", PAGES, ids=relative)


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(language):
    """Every code block of a language that is to be run, as a parameter with a readable id."""
    return [
        pytest.param(found["code"], id=f"{relative(page)}-{i}")
        for page in PAGES
        for i, found in enumerate(FENCE.finditer(read(page)), 1)
        if found["language"] == language and not found["reason"]
    ]


def spans(text):
    """What stands between backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def test_every_block_has_a_known_language():
    for page in PAGES:
        languages = {found["language"] for found in FENCE.finditer(read(page))}
        assert languages <= {"python", "bash", "yaml", "text"}, page


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    import epa_kernels

    if "unetrpp" in code:
        pytest.importorskip("monai")
    monkeypatch.chdir(tmp_path)
    with epa_kernels.use_backend(None):
        exec(compile(code, "<page>", "exec"), {"__name__": "page"})


def commands(code):
    """The commands of a bash block: words without comments and leading variables, and those."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        variables = []
        while words and re.match(r"[A-Z_]+=", words[0]):
            variables.append(words.pop(0).partition("=")[0])
        if words:
            yield words, variables


def known_variables():
    """Environment variables that docs/environment_variables.md describes."""
    page = read(REPOSITORY / "docs" / "environment_variables.md")
    return set(re.findall(r"`([A-Z_]+)`", page))


@pytest.mark.parametrize("code", blocks("bash"))
def test_bash_is_right(code):
    for words, variables in commands(code):
        assert set(variables) <= known_variables(), words
        program, *arguments = words
        check = {
            "unetrpp": check_unetrpp,
            "make": check_make,
            "python": check_python,
            "pip": check_pip,
            "pytest": check_pytest,
            "pre-commit": no_check,
            "git": no_check,
        }[program]
        check(arguments)


def no_check(arguments):
    pass


def check_unetrpp(arguments):
    jsonargparse = pytest.importorskip("jsonargparse")
    from unetrpp import cli

    name, *options = arguments
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config")  # a file that the reader writes
    cli.COMMANDS[name][1](parser)
    if "--help" not in options:
        options = [option for option in options if option != "--print_config"]
        parser.parse_args(cli._spell_out(options, parser))


def check_make(arguments):
    makefile = read(REPOSITORY / "Makefile")
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        pattern = rf"^{name} \?=|\$\({name}\)" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), argument


def check_python(arguments):
    if arguments[0] != "-m":
        assert (REPOSITORY / arguments[0]).is_file(), arguments
        return
    _, module, *options = arguments
    if module == "pip":
        return check_pip(options)
    path = REPOSITORY / module.replace(".", "/")
    sources = [path.with_suffix(".py"), path / "__main__.py"]
    source = next((source for source in sources if source.is_file()), None)
    assert source, f"no module {module}"
    for option in options:
        if option.startswith("-"):
            assert f'"{option}"' in read(source), f"{module} has no {option}"


def check_pip(arguments):
    assert arguments[0] == "install", arguments
    project = read(REPOSITORY / "pyproject.toml")
    for argument in arguments[1:]:
        if found := re.match(r"\.\[(.+)\]$", argument):
            for extra in found[1].split(","):
                assert re.search(rf"^{extra} = \[", project, re.M), extra
        elif argument.endswith(".txt"):
            assert (REPOSITORY / argument).is_file()


def check_pytest(arguments):
    options = "".join(
        read(REPOSITORY / folder / "conftest.py") for folder in ("tests", "benchmarks")
    )
    for argument in arguments:
        path = argument.partition("::")[0]
        if argument.startswith("--"):
            known = ("--benchmark-only", "--durations", "--numprocesses")
            assert argument.startswith(known) or f'"{argument}"' in options, argument
        elif path.endswith(".py") or path in ("tests", "benchmarks"):
            assert (REPOSITORY / path).exists(), argument


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_holds_options_of_training(code):
    yaml = pytest.importorskip("yaml")
    from unetrpp.train_config import TrainConfig

    TrainConfig(**yaml.safe_load(code))


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@every_page
def test_paths_exist(page):
    for name in spans(read(page)):
        if PATH.fullmatch(name) and name not in ELSEWHERE:
            is_alone = "/" not in name and "." in name
            assert any(REPOSITORY.glob(name.rstrip("/"))) or (
                is_alone and any(REPOSITORY.glob(f"*/**/{name}"))
            ), name


@every_page
def test_dotted_names_exist(page):
    for name in spans(read(page)):
        if not PATH.fullmatch(name) and (found := re.match(DOTTED, name)):
            module, _, attribute = found[1].rpartition(".")
            if not hasattr(importlib.import_module(module), attribute):
                importlib.import_module(found[1])


@every_page
def test_make_targets_exist(page):
    for name in spans(read(page)):
        if name.startswith("make "):
            check_make(shlex.split(name)[1:])


def test_environment_variables_are_the_ones_that_are_read():
    read_somewhere = set()
    for folder in ("epa_kernels", "unetrpp", "benchmarks", "tests", "csrc"):
        for source in (REPOSITORY / folder).rglob("*"):
            if source.suffix in (".py", ".cpp", ".h") and source != Path(__file__).resolve():
                read_somewhere |= set(VARIABLE.findall(read(source)))
    read_somewhere |= set(VARIABLE.findall(read(REPOSITORY / "setup.py")))
    described = {name for name in known_variables() if VARIABLE.fullmatch(name)}
    assert described == {name for name in read_somewhere if not is_macro(name)}


def is_macro(name):
    """Whether a name is one of the C++ preprocessor."""
    return any(
        re.search(rf"#\s*(?:define|ifdef|ifndef|if)\b.*\b{name}\b", read(source))
        for source in (REPOSITORY / "csrc").rglob("*")
        if source.is_file()
    )


def test_api_page_has_every_public_name():
    import epa_kernels
    import unetrpp

    page = read(REPOSITORY / "docs" / "api.md")
    for package in (epa_kernels, unetrpp):
        for name in package.__all__:
            value = getattr(package, name)
            if name == "EPA" or not (inspect.isclass(value) or callable(value)):
                continue
            assert re.search(rf"^::: {package.__name__}\.(?:\w+\.)*{name}$", page, re.M), name


def test_tables_are_those_of_the_measurements():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_small():
    for image in (REPOSITORY / "docs" / "images").iterdir():
        assert image.stat().st_size < 300_000, image


def test_pinned_tools_agree():
    """The hooks before a commit run the versions that `make lint` runs."""
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", read(REPOSITORY / "constraints.txt"), re.M))
    hooks = re.findall(r"([\w.-]+)==([\w.]+)", read(REPOSITORY / ".pre-commit-config.yaml"))
    assert hooks and all(pins[name] == version for name, version in hooks)


def sentences(text):
    """The sentences of a page, without tables, code, headings and licences."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n\n", text), flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = [""]
    for line in text.splitlines():
        is_prose = line.strip() and not re.match(r"\s*(\||#|:::|!!!)", line)
        starts_anew = not is_prose or re.match(r"\s*([-*]|\d+\.) ", line)
        if starts_anew:
            paragraphs.append("")
        if is_prose:
            paragraphs[-1] += " " + re.sub(r"^\s*([-*]|\d+\.) ", "", line)
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<!\bal)(?<=[.!?])[*\")]*\s+", paragraph):
            if words := [word for word in sentence.split() if re.search(r"\w", word)]:
                yield len(words), sentence.strip()


@every_page
def test_sentences_are_short(page):
    found = list(sentences(read(page)))
    too_long = [sentence for count, sentence in found if count > 40]
    assert not too_long
    assert not found or mean(count for count, _ in found) <= 25


def test_readme_is_one_screenful():
    assert len(read(REPOSITORY / "README.md").splitlines()) <= 120


@every_page
def test_words_are_the_ones_agreed_upon(page):
    if page.name == "style.md":
        return  # names the words to avoid
    for word in ("but for", "specification", "the spec"):
        assert not re.search(rf"\b{word}\b", read(page)), word
    assert not re.search(r"\bTIME_[A-Z_]+\b", read(page)), "a figure is missing"
