"""What is free, and the refusal of what would take more than its share of it."""

import resource
import subprocess
import sys

import pytest

from unetrpp import memory


def test_free_memory_is_a_plausible_number():
    free = memory.free_memory()
    assert free is not None and 2**24 < free < 2**50


def test_a_thing_may_take_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    assert memory.may_take(500) and not memory.may_take(501)
    memory.check_memory(500, "a.nii: it", "resample it")
    with pytest.raises(MemoryError, match="a.nii: it would take 501 bytes .* 50% .* 1 kB .*; sit"):
        memory.check_memory(501, "a.nii: it", "sit")
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert memory.may_take(10**18), "nothing is refused where nothing is known"


def test_sizes_in_words():
    found = [memory.size_in_words(n) for n in (0, 999, 1000, 3_210_000, 5e9, 7e15)]
    assert found == ["0 bytes", "999 bytes", "1 kB", "3.21 MB", "5 GB", "7,000.0 TB"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v counts on Linux")
def test_a_limit_of_the_process_counts():
    code = "from unetrpp.memory import free_memory; print(free_memory())"

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    free = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert 0 < int(free.stdout) < 2**30
