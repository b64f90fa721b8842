"""The programs in examples run, and find what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    tested = {"own_network", "published_training_loop", "monai_training_loop"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_own_network():
    assert load("own_network").main() > 0.9


def test_published_training_loop():
    swapped, difference = load("published_training_loop").main()
    assert swapped == 2 and difference < 1e-5


def test_monai_training_loop():
    pytest.importorskip("monai")
    assert load("monai_training_loop").main() > 0.7
