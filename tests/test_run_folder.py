"""A run folder in use, damaged, on a full disk, or holding more than a run writes."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from unetrpp import files
from unetrpp.files import replacing, write_json, write_text
from unetrpp.folder_lock import LOCK, held
from unetrpp.run_folder import (
    Metrics,
    check_folder,
    read_config,
    read_metrics,
    read_plan,
    read_state,
    remove_partial_files,
    save_state,
    start_folder,
)

SPLIT = {"training": ["a"], "validation": ["b"]}
STATE = {
    "step": 1,
    "total": 2,
    "best": 0.5,
    "elapsed": 1.0,
    "due": False,
    "model": {"w": torch.zeros(1000)},
    "optimizer": {},
    "average": None,
}


def make_run(folder: Path) -> Path:
    """What a run and its report leave."""
    folder.mkdir(parents=True, exist_ok=True)
    start_folder(folder, {"seed": 1}, {"x": 1}, SPLIT)
    save_state(folder / "resume.pt", STATE)
    for name in (
        "best/model.safetensors",
        "last/config.json",
        "tensorboard/events.out.tfevents.1.host",
        "validation/b.nii.gz",
        "validation/scores.json",
        "metrics.jsonl",
        "report.html",
        "nonfinite_step_3.pt",
        ".partial.resume.pt",
        ".best.partial/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def content(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# -- one run at a time


def in_another_process(folder: Path) -> str:
    """Try to hold a folder elsewhere; returns what came out."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom unetrpp.folder_lock import held\n"
        "try:\n    with held(Path(sys.argv[1]), print): print('held')\n"
        "except FileExistsError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_folder_is_held_by_one_process_and_one_thread(tmp_path):
    run = tmp_path / "runs" / "a"
    with held(run, print):
        assert f"process {os.getpid()} on " in in_another_process(run)
        said = []

        def other():
            try:
                with held(run, print):
                    said.append("held")
            except FileExistsError as error:
                said.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "is in use by process" in said[0] and "name another folder" in said[0]
    # What was made for it and stayed empty is gone; what another one has made stays.
    assert os.listdir(tmp_path) == []
    assert in_another_process(tmp_path) == "held"


def test_a_lock_ends_with_its_process_even_if_its_children_live_on(tmp_path):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom unetrpp.folder_lock import held\n"
        "with held(Path(sys.argv[1]), print):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(20); os._exit(0)\n"
        "    print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"ready\n"
    assert "is in use by" in in_another_process(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists() and in_another_process(tmp_path) == "held"
    os.killpg(process.pid, 9)
    process.stdout.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with held(tmp_path / "run", said.append):
        pass
    assert "no locks" in said[0] and "second run" in said[0]


def test_a_lock_that_is_a_link_or_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a link"), held(tmp_path / "run", print):
        pass
    with pytest.raises(FileExistsError, match="mine is a file"), held(tmp_path / "mine", print):
        pass
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "kept"


def test_a_folder_that_a_killed_start_left_counts_as_empty(tmp_path):
    (tmp_path / LOCK).write_text("process 1", encoding="utf-8")
    (tmp_path / ".partial.plan.json").write_text("{", encoding="utf-8")
    check_folder(tmp_path, overwrite=False)
    start_folder(tmp_path, {}, {}, SPLIT)
    assert content(tmp_path) == [LOCK, "config.yaml", "plan.json"]


# -- overwriting


def test_overwriting_removes_what_a_run_wrote(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(FileExistsError, match="--overwrite"):
        check_folder(run, overwrite=False)
    check_folder(run, overwrite=True)
    start_folder(run, {"seed": 2}, {}, SPLIT)
    assert content(run) == ["config.yaml", "plan.json"] and not (run / "best").exists()
    assert read_config(run) == {"seed": 2}


@pytest.mark.parametrize(
    "name",
    [
        "data/dataset.json",
        "imagesTr/a.nii.gz",
        "notes.txt",
        "best/model.onnx",
        "best/old/model.safetensors",
        "validation/of_mine.nii.gz",
        "tensorboard/thesis.md",
        "last",
        "metrics.jsonl/a",
    ],
)
def test_overwriting_spares_what_no_run_wrote(tmp_path, name):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_bytes(b"mine")
    write_json(run / "plan.json", {"plan": {}, "split": SPLIT})
    before = content(run)
    for refused in (lambda: check_folder(run, True), lambda: start_folder(run, {}, {}, SPLIT)):
        with pytest.raises(FileExistsError, match="which no run writes"):
            refused()
    assert content(run) == before


def test_a_folder_with_a_log_of_the_queue_takes_no_run_and_says_why(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "slurm-12.out").touch()
    with pytest.raises(FileExistsError, match=r"holds slurm-12\.out, and a run starts"):
        check_folder(tmp_path, overwrite=False)


@pytest.mark.parametrize("name", ["best", "resume.pt", "validation/b.nii.gz"])
def test_overwriting_follows_no_links(tmp_path, name):
    run = make_run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    path = run / name
    if path.is_dir():
        (path / "model.safetensors").unlink()
        path.rmdir()
    else:
        path.unlink()
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match=f"it holds {name}"):
        check_folder(run, overwrite=True)
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("plan", [None, "{}", "[]", "{"])
def test_overwriting_needs_the_plan_of_a_run(tmp_path, plan):
    (tmp_path / "config.yaml").write_text("data: of the next run", encoding="utf-8")
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan, encoding="utf-8")
    with pytest.raises(FileExistsError, match="is not an earlier run"):
        check_folder(tmp_path, overwrite=True)


def test_partial_files_of_a_killed_run_are_removed(tmp_path):
    run = make_run(tmp_path / "run")
    remove_partial_files(run)
    assert not [path for path in run.rglob("*") if "partial" in path.name]
    assert read_state(run)["step"] == 1


# -- a disk that takes no more


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
import unetrpp.run_folder as run_folder
from unetrpp.checkpoint import save_checkpoint
from unetrpp.files import write_text
from unetrpp import create_model
model = create_model("unetrpp", "tiny", in_channels=1, out_channels=2, img_size=[16, 16, 16],
                     strides=[[2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run = Path(sys.argv[1])
metrics = run_folder.Metrics(run, 0)
def too_many_metrics():
    while True:
        metrics.write({"step": 1, "text": "x" * 9000})
for write in (
    lambda: run_folder.save_state(run / "resume.pt", {"model": torch.zeros(100_000)}),
    lambda: save_checkpoint(run / "best", model),
    lambda: save_checkpoint(run / "last", model),
    lambda: write_text(run / "report.html", "x" * 200_000),
    too_many_metrics,
):
    try:
        write()
        print("written")
    except OSError as error:
        print(type(error).__name__, error.errno, error)
"""


def test_no_room_names_file_and_cause_and_keeps_what_was_there(tmp_path):
    run = tmp_path / "run"
    (run / "last").mkdir(parents=True)
    for name in ("resume.pt", "report.html", "last/model.safetensors"):
        (run / name).write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(run)], capture_output=True, text=True, check=True
    )
    names = (
        "resume.pt",
        "best/model.safetensors",
        "last/model.safetensors",
        "report.html",
        "metrics.jsonl",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        name = name.replace("best/", ".best.partial/")  # where a new checkpoint is written first
        assert line.startswith(f"OSError {errno.EFBIG} {run}/") and name in line, line
        assert "could not be written: File too large" in line and "ulimit -f" in line
    for name in ("resume.pt", "report.html", "last/model.safetensors"):
        assert (run / name).read_bytes() == b"old"
    left = ["last/model.safetensors", "metrics.jsonl", "report.html", "resume.pt"]
    assert [name for name in content(run) if not name.startswith("tensorboard")] == left


def test_a_full_disk_is_the_cause_that_torch_hides(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files, "_cause", lambda file: full)
    with pytest.raises(OSError, match="resume.pt could not be written: No space left on device"):
        with replacing(tmp_path / "resume.pt"):
            raise RuntimeError("unexpected pos 640 vs 534")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="unexpected"), replacing(tmp_path / "resume.pt"):
        raise RuntimeError("unexpected fault of another kind")
    assert os.listdir(tmp_path) == []


def test_partial_files_follow_no_planted_link_and_the_umask(tmp_path):
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    (tmp_path / ".partial.a").symlink_to(tmp_path / "mine")
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as partial:
            partial.write_bytes(b"new")
            os.chmod(partial, 0o600)  # as safetensors leaves it
    finally:
        os.umask(before)
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "kept"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_new_checkpoint_follows_no_planted_link(tmp_path):
    from unetrpp import create_model
    from unetrpp.checkpoint import save_checkpoint

    (tmp_path / "mine").mkdir()
    (tmp_path / ".best.partial").symlink_to(tmp_path / "mine")
    save_checkpoint(tmp_path / "best", create_model("unetrpp", "tiny"))
    assert not (tmp_path / "best").is_symlink() and os.listdir(tmp_path / "mine") == []


def test_partial_files_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".partial.{files._host()}.{pid}.a[0].nii" for pid in (dead.pid, os.getppid())]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with replacing(tmp_path / "a[0].nii", shared=True) as partial:
        partial.write_bytes(b"")
    assert sorted(os.listdir(tmp_path)) == sorted([names[1], "a[0].nii"])


# -- damaged files


def evil(path: Path) -> object:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path}",)

    return Evil()


def with_flipped_bit(content: bytes) -> bytes:
    """One of a weight: the zeros of STATE's model are the longest run of equal bytes."""
    place = content.index(bytes(2000)) + 1000
    return content[:place] + b"\x40" + content[place + 1 :]


def state_with(**entries: object) -> dict:
    return {**STATE, **entries}


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("step: 3", encoding="utf-8"),
        lambda file: file.write_bytes(b"\x80\x02]q\x00."),
        lambda file: file.write_bytes(b"PK\x05\x06" + 18 * b"\0"),
        lambda file: torch.save([1, 2], file),
        lambda file: torch.save({"step": 1}, file),
        lambda file: torch.save(torch.zeros(2), file),
        lambda file: torch.save({1: 2}, file),
        lambda file: torch.save(state_with(step="3"), file),
        lambda file: torch.save(state_with(step=-3), file),
        lambda file: torch.save(state_with(total=2.5), file),
        lambda file: torch.save(state_with(best=None), file),
        lambda file: torch.save(state_with(best=math.nan), file),
        lambda file: torch.save(state_with(step=True), file),
        lambda file: torch.save(state_with(step=3), file),
        lambda file: torch.save(state_with(total=0), file),
        lambda file: file.write_bytes(with_flipped_bit(file.read_bytes())),
        lambda file: (file.unlink(), file.symlink_to(file.with_name("nowhere"))),
        lambda file: torch.save({**STATE, "step": evil(file.with_name("ran"))}, file),
        lambda file: torch.save(evil(file.with_name("ran")), file),
        lambda file: torch.save(
            evil(file.with_name("ran")), file, _use_new_zipfile_serialization=False
        ),
    ],
)
def test_a_damaged_state_is_named_and_nothing_runs(tmp_path, damage):
    save_state(tmp_path / "resume.pt", STATE)
    damage(tmp_path / "resume.pt")
    with pytest.raises(ValueError, match=r"resume\.pt.*(restore|delete)") as refused:
        read_state(tmp_path)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_state_of_the_version_before_is_read(tmp_path):
    save_state(tmp_path / "resume.pt", {k: v for k, v in STATE.items() if k != "due"})
    assert read_state(tmp_path)["due"] is False


@pytest.mark.parametrize(
    "text",
    ["data: [", "- 1", "3", "", "\x00", "1: 2", b"\xff\xfe\x00d", b"a: \xe9", "a: " + 5000 * "["],
)
def test_a_damaged_configuration_is_named(tmp_path, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml.*restore it from a copy"):
        read_config(tmp_path)


def test_a_configuration_that_an_editor_has_saved_with_a_bom_is_read(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3\r\n")
    assert read_config(tmp_path) == {"steps": 3}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        "null",
        "{}",
        '{"plan": 1, "split": 2}',
        '{"plan": {}, "split": {"training": []}}',
        '{"plan": {}, "split": {"training": [1], "validation": []}}',
        '{"plan": {}, "split": {"training": ["a"], "validation": []}}',
        b"\xff\xfe\x00d",
    ],
)
def test_a_damaged_plan_is_named(tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"plan\.json.*restore it from a copy"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"plan\.json is missing"):
        read_plan(tmp_path)


def test_lines_of_metrics_that_are_no_records_are_left_out(tmp_path):
    good = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
    lines = [json.dumps(good[0]), "3", "null", '{"loss": 1}', '{"step": "1"}', '{"step": 2, "lo']
    text = "\n".join([*lines, json.dumps(good[1])]).encode() + b"\n\xff\xfe\n"
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert read_metrics(tmp_path) == good
    Metrics(tmp_path, 2).close()
    assert read_metrics(tmp_path) == good


def test_the_record_of_a_validation_that_is_to_come_is_dropped(tmp_path):
    records = [{"step": 1, "loss": 0.5}, {"step": 1, "val_dice": 0.1}, {"step": 2, "loss": 1.0}]
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    Metrics(tmp_path, 1, due=True).close()
    assert read_metrics(tmp_path) == records[:1]


# -- TensorBoard


@pytest.mark.parametrize(
    "code",
    ["raise TypeError('Descriptors cannot be created')", "raise OSError('libcuda')", "x = 1"],
)
def test_a_broken_tensorboard_is_left_out_with_a_line(tmp_path, monkeypatch, code):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard" or "tensorboard" in n]:
        monkeypatch.delitem(sys.modules, name)
    said = []
    (tmp_path / "run").mkdir()
    metrics = Metrics(tmp_path / "run", 0, say=said.append)
    metrics.write({"step": 1, "loss": 0.5})
    metrics.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard is left out (")
    assert read_metrics(tmp_path / "run") == [{"step": 1, "loss": 0.5}]


def test_a_tensorboard_that_fails_later_is_left_out(tmp_path):
    class Board:
        def add_scalar(self, *arguments):
            raise OSError("disk full")

    said = []
    metrics = Metrics(tmp_path, 0, say=said.append)
    metrics.board = Board()
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    assert len(said) == 1 and len(read_metrics(tmp_path)) == 2
