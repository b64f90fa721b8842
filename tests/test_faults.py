"""What went wrong, in a user's words: memory, disks, and what is a fault of the program."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from unetrpp import cli
from unetrpp.faults import NEEDS_LESS, in_words, is_expected, ran_out_of_memory


def allocate_too_much():
    np.zeros(2**60, np.uint8)


def allocate_a_tensor():
    torch.zeros(2**60, dtype=torch.uint8)


def wrapped():
    try:
        allocate_too_much()
    except MemoryError as error:
        raise RuntimeError("applying transform <LoadImage>") from error


@pytest.mark.parametrize("fail", [allocate_too_much, allocate_a_tensor, wrapped])
def test_real_allocations_are_recognised(fail):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        fail()
    assert ran_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("DataLoader worker is killed by signal: Bus error. It is possible that "
                     "dataloader's workers are out of shared memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", NEEDS_LESS)
def test_memory_that_ran_out_is_said_with_what_needs_less(error, command, monkeypatch, capsys):
    def fail(parser):
        raise error

    monkeypatch.setitem(cli.COMMANDS, command, ("", fail))
    assert cli.main([command]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"unetrpp {command}: memory ran out (")
    assert said.endswith(f"what needs less: {NEEDS_LESS[command]}\n")
    assert "fault of the program" not in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_errors_of_the_system_name_file_cause_and_remedy(number):
    said = in_words(OSError(number, os.strerror(number), "/data/a.nii.gz"))
    assert said.startswith(f"/data/a.nii.gz: {os.strerror(number)} (errno {number}); ")


def test_a_sentence_of_our_own_about_a_file_stays():
    error = OSError("a.pt could not be written: No space left; free some space there")
    error.errno = errno.ENOSPC
    assert in_words(error) == str(error)
    assert in_words(FileExistsError("a exists; name another")) == "a exists; name another"


def test_only_what_is_one_is_called_a_fault_of_the_program():
    assert not ran_out_of_memory(RuntimeError("shapes differ")) and is_expected(ValueError("x"))
    assert not is_expected(KeyError("x")) and in_words(KeyError("x")) == "KeyError: 'x'"
    assert in_words(ValueError("a.nii is no volume; give one")) == "a.nii is no volume; give one"


WAIT = """
import signal, sys, time
# A shell that starts the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from unetrpp import cli
def wait(parser):
    print("ready", flush=True)
    time.sleep(60)
cli.COMMANDS["predict"] = ("", wait)
sys.exit(cli.main(["predict"]))
"""


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_stopped_command_says_so_and_how_to_go_on(number, word):
    pytest.importorskip("jsonargparse")
    with subprocess.Popen(
        [sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said.startswith(f"unetrpp predict: stopped by {word}; ") and said.count("\n") == 1
    assert "--skip_existing" in said
