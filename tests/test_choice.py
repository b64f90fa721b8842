"""Backends on a device that checks them: admission, choice, memory; with backends made for it.

The device is the CPU, told to check what it runs.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CHILD_ENVIRONMENT

import epa_kernels
from epa_kernels import __main__ as command
from epa_kernels import admission, answers, check, choice, contract, dispatch
from epa_kernels.admission import Case, Question
from epa_kernels.backends import cuda, triton, two_pass
from epa_kernels.contract import OPS
from epa_kernels.timing import ROUNDS, WARM_UP

CPU = torch.device("cpu")
SCHEMAS = [name for op in OPS for name in (op, f"{op}_bwd")]
QUESTION = Question(
    "paired_attention", True, "shared", "official", False, False, torch.float32, torch.float32,
    True, 2, 4, 5,
)  # fmt: skip

# The interpreter takes milliseconds a program.
SMALL_CASES = [Case(1, 43, "sliced", "all"), Case(2, 13, "transposed", "none")]


def backend(**changed):
    """The two passes with some functions changed, each given the right one first."""
    right = {name: getattr(two_pass, name) for name in SCHEMAS}
    made = {
        name: (lambda *a, f=f, n=name, **k: f(right[n], *a, **k)) for name, f in changed.items()
    }
    return SimpleNamespace(**(right | made))


def slower(right, *tensors, **options):
    time.sleep(0.05)  # more than a busy machine takes
    return right(*tensors, **options)


def wrong_gradient(right, *tensors, **options):
    first, *rest = right(*tensors, **options)
    return (first * 1.001, *rest)


def writes_outside(right, *tensors, **options):
    result, *kept = right(*tensors, **options)
    mine = torch.empty(result.shape, dtype=result.dtype)
    mine.copy_(result)
    mine.as_strided((1,), (1,), mine.storage_offset() + mine.numel()).fill_(3.0)
    return mine, *kept


def reads_outside(right, x, *rest, **options):
    result, *kept = right(x, *rest, **options)
    return result + 0 * x.as_strided(
        (1,), (1,), x.storage_offset() + x[-1, -1, -1:].storage_offset() - x.storage_offset() + 1
    ), *kept


def makes_once_right():
    calls = []

    def function(right, *tensors, **options):
        result, *kept = right(*tensors, **options)
        calls.append(None)
        return (result + 1e-7 * result.abs().max() if len(calls) == 2 else result, *kept)

    return function


def raises(right, *tensors, **options):
    raise RuntimeError("no such instruction\nand more")


def leaves_unwritten(right, *tensors, **options):
    result, *kept = right(*tensors, **options)
    mine = torch.empty(result.shape, dtype=result.dtype)
    mine[:, 1:] = result[:, 1:]
    return mine, *kept


def ignores_strides(right, x, *rest, **options):
    """Reads x as if it were dense along its last axis."""
    flat = x.as_strided(x.shape, (x.stride(0), x.stride(1), 1))
    return right(x if x.stride(2) == 1 else 0 * x + flat.nan_to_num(), *rest, **options)


def writes_into_its_input(right, dout, x, *rest, **options):
    found = right(dout, x, *rest, **options)
    x.zero_()
    return found


FAULTS = {
    "ignores strides": (dict(paired_attention=ignores_strides), "result: largest error"),
    "writes into its input": (
        dict(paired_attention_bwd=writes_into_its_input),
        "it writes into its inputs",
    ),
    "wrong gradient": (dict(paired_attention_bwd=wrong_gradient), "gradient of x: largest error"),
    "writes outside": (dict(paired_attention=writes_outside), "it writes outside its tensors"),
    "reads outside": (dict(paired_attention=reads_outside), "result: largest error nan"),
    "other bits": (dict(paired_attention=makes_once_right()), "a second run gives other bits"),
    "raises": (dict(paired_attention=raises), "raised RuntimeError: no such instruction"),
    "leaves unwritten": (dict(paired_attention=leaves_unwritten), "result: largest error nan"),
}


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A function that puts backends in front of two_pass on a device that checks them."""
    monkeypatch.setenv("EPA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EPA_KERNELS_TUNE", raising=False)
    monkeypatch.setattr(contract, "CHECKED_DEVICES", ("cpu",))
    forget(monkeypatch)

    def put(**implementations):
        for name, implementation in implementations.items():
            made = dispatch.Backend(
                dispatch.BACKENDS["two_pass"].functions, lambda call: [], implementation, False
            )
            monkeypatch.setitem(dispatch.BACKENDS, name, made)
        monkeypatch.setitem(dispatch.ORDER, "cpu", (*implementations, "two_pass", "reference"))

    return put


def forget(monkeypatch):
    """As a new process."""
    for name in ("_answers", "_chosen", "_here", "_wanted"):
        monkeypatch.setattr(choice, name, {})


def call_of(N=40, grad=True):
    layer = epa_kernels.EPA(N, 8, 5, 2)
    x = torch.randn(1, N, 8, requires_grad=grad)
    return layer, x


def question(layer, x):
    (call,) = layer.explained(x)[1]
    return choice._question(call)


def chosen(layer, x):
    (call,) = layer.explained(x)[1]
    return dispatch.select(call)


def test_right_backend_is_admitted_and_runs(device, capsys):
    device(right=backend())
    layer, x = call_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name = chosen(layer, x)
    assert choice._known_answers(CPU, True).verdict("right", str(question(layer, x))) == []
    epa_kernels.explain(layer, x)
    out = capsys.readouterr().out
    other = {"right": "two_pass", "two_pass": "right"}[name]
    assert f"{name:<10} runs" in out and f"{other:<10} slower: " in out


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_backend_is_refused_with_what_differed(fault, device, capsys):
    changed, words = FAULTS[fault]
    device(faulty=backend(**changed))
    layer, x = call_of()
    with pytest.warns(RuntimeWarning, match="backend 'faulty' is not chosen") as caught:
        assert chosen(layer, x) == "two_pass"
    assert words in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert chosen(layer, x) == "two_pass"
    epa_kernels.explain(layer, x)
    out = capsys.readouterr().out
    assert "faulty     not chosen: " in out and words in out
    assert "two_pass   runs" in out


def test_a_check_that_hangs_is_left_alone(device, monkeypatch, capsys):
    release = threading.Event()

    def hangs(right, *tensors, **options):
        release.wait(60)
        return right(*tensors, **options)

    monkeypatch.setattr(admission, "SECONDS", 0.2)
    device(hanging=backend(paired_attention=hangs))
    layer, x = call_of()
    with pytest.warns(RuntimeWarning, match="its check took more than 0.2 s"):
        assert chosen(layer, x) == "two_pass"
    epa_kernels.explain(layer, x)
    assert "hanging    not chosen: its check took more than" in capsys.readouterr().out
    assert not choice._known_answers(CPU, True).content["verdicts"]  # the machine may be busy
    release.set()


def test_the_fastest_is_chosen_and_explain_says_the_times(device, capsys):
    device(slow=backend(paired_attention=slower))
    layer, x = call_of()
    assert chosen(layer, x) == "two_pass"
    epa_kernels.explain(layer, x)
    out = capsys.readouterr().out
    assert "slow       slower: " in out and " us against " in out and "two_pass   runs" in out


@pytest.mark.parametrize("how", ("deterministic", "EPA_KERNELS_TUNE"))
def test_the_fixed_order_decides_where_two_runs_must_choose_alike(how, device, monkeypatch):
    device(slow=backend(paired_attention=slower))
    layer, x = call_of()
    if how == "deterministic":
        torch.use_deterministic_algorithms(True)
    else:
        monkeypatch.setenv("EPA_KERNELS_TUNE", "0")
    try:
        assert chosen(layer, x) == "slow"
    finally:
        torch.use_deterministic_algorithms(False)


def count(calls):
    def function(right, *tensors, **options):
        calls.append(threading.get_ident())
        return right(*tensors, **options)

    return function


def test_what_is_known_is_asked_once_on_this_machine(device, monkeypatch):
    calls = []
    device(right=backend(paired_attention=count(calls)))
    layer, x = call_of()
    first = chosen(layer, x)
    done = len(calls)
    assert done
    for _ in range(100):
        assert chosen(layer, x) == first
    forget(monkeypatch)
    assert chosen(layer, x) == first and len(calls) == done
    # Another length of the same class of sizes is not timed, one of another class is.
    for N, more in ((56, 0), (100, WARM_UP + ROUNDS)):
        layer, x = call_of(N=N)
        chosen(layer, x)
        assert len(calls) == done + more


@pytest.mark.parametrize("grad", (True, False))
def test_gradients_are_checked_where_they_are_asked_for(grad, device):
    device(faulty=backend(paired_attention_bwd=wrong_gradient))
    layer, x = call_of()
    if grad:
        with pytest.warns(RuntimeWarning, match="backward"):
            assert chosen(layer, x) == "two_pass"
        return
    with torch.no_grad():
        chosen(layer, x)
    (verdicts,) = (json.loads(f.read_text())["answers"]["verdicts"] for f in files())
    assert verdicts == {f"faulty {QUESTION._replace(backward=False, dropout=True)}": []}


def files():
    return list(answers.folder().glob("*.json"))


@pytest.mark.parametrize(
    "damage", (b"", b"{", b"[]", b'{"key": 1, "answers": {}}', b"\x00\xff", b"[" * 100000)
)
def test_a_damaged_file_is_begun_anew(damage, device, monkeypatch):
    calls = []
    device(right=backend(paired_attention=count(calls)))
    layer, x = call_of()
    first, done = chosen(layer, x), len(calls)
    (file,) = files()
    file.write_bytes(damage)
    forget(monkeypatch)
    chosen(layer, x)
    assert len(calls) == 2 * done and first
    assert json.loads(file.read_text())["answers"]["verdicts"]


def test_entries_of_another_shape_are_damage(device, monkeypatch):
    device(right=backend())
    layer, x = call_of()
    chosen(layer, x)
    (file,) = files()
    content = json.loads(file.read_text())
    for section, value in (("verdicts", 3), ("times", []), ("verdicts", [3]), ("running", 3)):
        changed = json.loads(json.dumps(content))
        changed["answers"][section] = {"entry": value}
        file.write_text(json.dumps(changed))
        forget(monkeypatch)
        assert choice._known_answers(CPU, True).content == {
            "verdicts": {},
            "times": {},
            "running": {},
        }


def test_a_folder_that_cannot_be_written_is_no_error(device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EPA_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    device(right=backend())
    layer, x = call_of()
    assert chosen(layer, x) == chosen(layer, x)


def test_another_driver_has_answers_of_its_own(device, monkeypatch):
    calls = []
    device(right=backend(paired_attention=count(calls)))
    layer, x = call_of()
    chosen(layer, x)
    done, key = len(calls), answers.identity(CPU)
    monkeypatch.setattr(choice, "identity", lambda device: {**key, "driver": "13010"})
    forget(monkeypatch)
    chosen(layer, x)
    assert len(calls) == 2 * done and len(files()) == 2


def test_a_writer_that_is_killed_leaves_the_file_whole(device, monkeypatch):
    device(right=backend())
    layer, x = call_of()
    chosen(layer, x)
    (file,) = files()
    before = file.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        choice._known_answers(CPU, True).keep_verdict("other", "question", [])
    assert file.read_bytes() == before and not list(file.parent.glob("*.partial"))


def test_processes_add_to_one_file(device, tmp_path):
    code = (
        "import sys; from epa_kernels.answers import Answers\n"
        "found = Answers({'device': 'here'})\n"
        "for i in range(30): found.keep_verdict(sys.argv[1], str(i), [])"
    )
    device()
    run = [
        subprocess.Popen([sys.executable, "-c", code, name], env=os.environ.copy())
        for name in ("a", "b", "c")
    ]
    assert [process.wait(60) for process in run] == [0, 0, 0]
    assert len(answers.Answers({"device": "here"}).content["verdicts"]) == 90


def test_forget_removes_the_answers(device, capsys):
    device(right=backend())
    layer, x = call_of()
    chosen(layer, x)
    (answers.folder() / "notes.json").write_text("mine")
    assert answers.forget() == 1
    assert [file.name for file in files()] == ["notes.json"]


def test_nothing_of_the_caller_is_touched(device):
    seen = []

    def look(right, *tensors, **options):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return right(*tensors, **options)

    device(right=backend(paired_attention=look))
    layer, x = call_of()
    before, state = x.clone(), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        chosen(layer, x)
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
    assert set(seen) == {(False, False)}
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_check_in_a_backward_pass_ends(device):
    """Checkpointing asks for gradients only there."""
    calls = []
    device(
        faulty=backend(paired_attention_bwd=raises), right=backend(paired_attention=count(calls))
    )
    layer, x = call_of()
    in_backward = []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                in_backward.append(chosen(layer, x))
            return dy

    Recomputed.apply(x).sum().backward()
    assert in_backward == ["two_pass"] and not calls
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="'faulty' is not chosen"):
        chosen(layer, x)  # outside, it checks what was asked inside
    done = len(calls)
    Recomputed.apply(x).sum().backward()
    assert in_backward[1] == choice.known(layer.explained(x)[1][0]) and len(calls) == done
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None


def test_threads_that_ask_at_once_check_once(device, monkeypatch):
    checks, try_out = [], admission.try_out
    monkeypatch.setattr(admission, "try_out", lambda *a: checks.append(a) or try_out(*a))
    device(right=backend())
    layer, x = call_of()
    threads = [threading.Thread(target=chosen, args=(layer, x)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


def test_without_memory_for_the_check_another_backend_runs(device, monkeypatch, capsys):
    def full(right, *tensors, **options):
        raise torch.OutOfMemoryError("none left")

    device(large=backend(paired_attention=full))
    layer, x = call_of()
    with pytest.warns(RuntimeWarning, match="there was no memory left for its check"):
        assert chosen(layer, x) == "two_pass"
    assert not choice._known_answers(CPU, True).content["verdicts"]
    epa_kernels.explain(layer, x)
    assert "there was no memory left for its check" in capsys.readouterr().out


SLOW = dict(paired_attention=slower)


def test_fake_tensors_are_answered_from_what_is_known(device, monkeypatch, capsys):
    from torch._subclasses import FakeTensorMode

    device(slow=backend(paired_attention=slower), right=backend())
    slow_two = dispatch.BACKENDS["two_pass"]._replace(implementation=backend(**SLOW))
    monkeypatch.setitem(dispatch.BACKENDS, "two_pass", slow_two)
    layer, x = call_of()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert chosen(layer, fake) == "two_pass" and not files()
        epa_kernels.explain(layer, fake)
    assert "right      not checked: no check runs for a fake tensor" in capsys.readouterr().out
    assert chosen(layer, x) == "right"
    with mode:
        assert chosen(layer, fake) == "right"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_checks_nothing(device):
    device(faulty=backend(paired_attention=raises))
    layer, x = call_of()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if chosen(layer, x) == "two_pass" and not files() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_compiled_graph_is_given_the_answer(dynamic, device, monkeypatch):
    calls = []
    device(faulty=backend(paired_attention=raises), right=backend(paired_attention=count(calls)))
    # What is chosen shows in the graph: the other one computes with torch's own operators.
    other = dispatch.BACKENDS["reference"]._replace(implementation=backend(**SLOW))
    monkeypatch.setitem(dispatch.BACKENDS, "two_pass", other)
    layer, x = call_of()
    layer.eval()
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=keep, dynamic=dynamic)
    with warnings.catch_warnings():  # torch 2.8 swallows it
        warnings.simplefilter("ignore")
        y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    assert calls and len(graphs) == 1 and "epa_kernels_two_pass" in graphs[0]


def test_an_export_asks_nothing(device):
    calls = []
    device(right=backend(paired_attention=count(calls)))
    layer, x = call_of(grad=False)
    program = torch.export.export(layer.eval(), (x,))
    assert not calls and not any("epa_kernels" in str(n.target) for n in program.graph.nodes)


TWO_PROCESSES = """
import sys, time, torch
import torch.distributed as dist
import test_choice as t
from epa_kernels import choice, contract, dispatch
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method={store!r}, rank=rank, world_size=2)
contract.CHECKED_DEVICES = ("cpu",)
for name in ("first", "second"):
    changed = {{"paired_attention": t.slower}} if (name == "first") == (rank == 0) else {{}}
    dispatch.BACKENDS[name] = dispatch.Backend(
        dispatch.BACKENDS["two_pass"].functions, lambda call: [], t.backend(**changed), False
    )
slow = dispatch.BACKENDS["two_pass"]._replace(implementation=t.backend(paired_attention=t.slower))
dispatch.BACKENDS["two_pass"] = slow
dispatch.ORDER["cpu"] = ("first", "second", "two_pass")
layer, x = t.call_of()
layer = torch.nn.parallel.DistributedDataParallel(layer)
layer(x).sum().backward()
for _ in range(600):  # rank 1 does not wait
    if (name := t.chosen(layer.module, x)) != "two_pass":
        break
    time.sleep(0.1)
print(name)
dist.barrier()
dist.destroy_process_group()
"""


def test_in_a_process_group_rank_0_decides(device, tmp_path):
    """Each rank would take the other of two; all take that of rank 0."""
    device()
    code = TWO_PROCESSES.format(store=f"file://{tmp_path / 'store'}")
    paths = os.pathsep.join([str(Path(__file__).parent), CHILD_ENVIRONMENT["PYTHONPATH"]])
    run = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(rank)],
            env=os.environ | {"EPA_KERNELS_CACHE": str(tmp_path / str(rank)), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    # gloo of older versions says more.
    said = [process.communicate(timeout=120)[0].split()[-1] for process in run]
    assert said == ["second", "second"]


def test_a_backward_pass_that_was_checked_admits_the_forward_pass(device):
    calls = []
    device(right=backend(paired_attention=count(calls)))
    layer, x = call_of()
    chosen(layer, x)
    done = len(calls)
    with torch.no_grad():
        chosen(layer, x)
    assert len(calls) == done + WARM_UP + ROUNDS


def test_the_check_is_a_table_and_fails_with_a_backend(device, monkeypatch, capsys):
    monkeypatch.setattr(
        check, "LAYERS", [check.Layer("tiny", "spatial_attention", "", 20, 2, 4, 5)]
    )
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    assert command.main(["--check", "--this-isa"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tiny +float32 +forward \+ backward +two_pass +[0-9.]+ +[0-9.]+ +", out)
    device(faulty=backend(spatial_attention_bwd=wrong_gradient))
    assert command.main(["--check", "--this-isa", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    verdicts = {(row["direction"], row["backend"]): row["verdict"] for row in found["rows"]}
    assert verdicts["forward", "two_pass"] == "chosen"
    assert verdicts["forward + backward", "faulty"].startswith("failed: gradient of q: largest")


def test_the_check_runs_every_instruction_set(monkeypatch):
    """In processes of their own, with the same rows."""
    row = check.Row("cpu", "tiny", "op", "float32", "forward", "cpu baseline", 1.0, 1.0, "chosen")
    asked = []

    def run(arguments, env, **options):
        asked.append(env["EPA_KERNELS_ISA"])
        found = check.as_json([row, row._replace(backend="two_pass")], {})
        return SimpleNamespace(stdout=found, returncode=-11 if len(asked) == 2 else 0)

    monkeypatch.setattr(check.subprocess, "run", run)
    monkeypatch.setattr(check.cpu, "module", SimpleNamespace(isas=lambda: "avx512,avx2,baseline"))
    monkeypatch.setattr(check.cpu, "isa", "avx512")
    first, (second,) = check.other_instruction_sets()
    assert first == [row]
    assert (
        second.backend == "cpu baseline" and second.verdict == "failed: the process ended with -11"
    )
    assert asked == ["avx2", "baseline"]


def test_forget_and_json_are_said(device, capsys):
    device(right=backend())
    layer, x = call_of()
    chosen(layer, x)
    assert command.main(["--forget"]) == 0
    assert capsys.readouterr().out == f"1 file(s) removed from {answers.folder()}\n"
    with pytest.raises(SystemExit):
        command.main(["--json"])
    assert "--json belongs to --check" in capsys.readouterr().err


def test_a_check_that_ends_the_process_is_refused_after_the_second(device, monkeypatch, capsys):
    calls = []

    def ends(right, *tensors, **options):
        calls.append(None)
        os._exit(3)

    device(deadly=backend(paired_attention=ends))
    layer, x = call_of()
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            choice._forked = False  # a process of its own, but for the test
            chosen(layer, x)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(layer, x) == "two_pass"
    assert not calls
    epa_kernels.explain(layer, x)
    assert "deadly     not chosen: 2 processes ended while they checked" in capsys.readouterr().out


def test_a_check_that_is_stopped_leaves_no_mark(device, monkeypatch):
    device(right=backend())
    layer, x = call_of()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(admission, "try_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        chosen(layer, x)
    assert set(map(tuple, choice._known_answers(CPU, True).content["running"].values())) == {()}


def test_a_long_check_says_so_once(device, monkeypatch, caplog):
    monkeypatch.setattr(choice, "NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(choice, "_said", False)
    device(one=backend(), two=backend())
    layer, x = call_of()
    chosen(layer, x)
    assert [r.levelname for r in caplog.records if "checks its kernels" in r.message] == ["WARNING"]


@pytest.mark.skipif(bool(triton.missing()), reason=str(triton.missing()))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_triton_is_admitted_in_its_interpreter(op, dtype, monkeypatch):
    monkeypatch.setattr(admission, "cases", lambda question: SMALL_CASES)
    question = QUESTION._replace(op=op, dtype=dtype, dropout=True)
    if op != "paired_attention":
        question = question._replace(kind="", layout="", P=0 if op == "channel_attention" else 5)
    found = admission.try_out(triton, question, CPU)
    assert found.reasons == [] and 0 < found.ratio < admission.FACTOR


@pytest.mark.parametrize("op", OPS)
def test_cuda_is_admitted_in_its_emulator(op, monkeypatch, emulated_cuda):
    monkeypatch.setattr(admission, "cases", lambda question: SMALL_CASES)
    question = QUESTION._replace(op=op)
    if op != "paired_attention":
        question = question._replace(kind="", layout="", P=0 if op == "channel_attention" else 5)
    found = admission.try_out(cuda, question, CPU)
    assert found.reasons == [] and emulated_cuda()


def test_what_says_nothing_of_the_backend_is_not_kept(device, monkeypatch):
    """A reference that raises, and a device that is lost to the process."""
    device(right=backend())
    layer, x = call_of()
    with monkeypatch.context() as patch:
        patch.setattr(admission, "by_reference", raises)
        with pytest.warns(RuntimeWarning, match="the reference raised RuntimeError"):
            assert chosen(layer, x) == "two_pass"
    forget(monkeypatch)
    device(lost=backend(paired_attention=raises))
    monkeypatch.setattr(admission, "is_alive", lambda device: False)
    with pytest.warns(RuntimeWarning, match="'lost' is not chosen"):
        assert chosen(layer, x) == "two_pass"
    assert not choice._known_answers(CPU, True).content["verdicts"]


def test_errors_while_timing_leave_the_order(device, monkeypatch):
    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(choice, "measure", fails)
    device(right=backend())
    layer, x = call_of()
    assert chosen(layer, x) == "right"


def test_parameters_of_several_dtypes_are_not_checked(device, capsys):
    device(right=backend())
    layer, x = call_of()
    layer.temperature.data = layer.temperature.data.double()
    assert chosen(layer, x) == "two_pass" and not files()
    epa_kernels.explain(layer, x)
    assert "right      not checked: no check runs for parameters of several" in (
        capsys.readouterr().out
    )


def test_what_another_process_found_counts_at_once(device, monkeypatch):
    calls = []
    device(right=backend(paired_attention=count(calls)))
    layer, x = call_of()
    mine = choice._known_answers(CPU, True)
    answers.Answers(mine.key).keep_verdict("right", str(question(layer, x)), ["it is odd"])
    assert chosen(layer, x) == "two_pass" and not calls
    answers.forget()
    mine.keep_times("other", "shape", {"right": 1.0})
    assert mine.content["verdicts"] == {}  # what was forgotten does not come back
