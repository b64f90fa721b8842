"""Several processes that train one model, the launchers and signals around them, other threads."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("nibabel", reason="needs the extra 'train'")
pytest.importorskip("monai", reason="needs the extra 'train'")
pytest.importorskip("lightning_fabric", reason="needs the extra 'train'")

from test_train import (  # noqa: E402
    SMALL,
    assert_same_end,
    command,
    interrupt_at,
    losses,
    make_data,
    small_options,
    wait_for_steps,
)

from unetrpp import create_model, predict, processes, train, train_data  # noqa: E402
from unetrpp.losses import deep_supervision_loss  # noqa: E402
from unetrpp.memory import NotEnoughMemory  # noqa: E402
from unetrpp.processes import Signals, joint_batch_norm, launch, same_everywhere  # noqa: E402
from unetrpp.signals import Stopped, ended_by_signals  # noqa: E402
from unetrpp.train import Interrupted, TrainConfig, run_train  # noqa: E402

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("boxes"), cases=4)


# -- the joint batch


def network(name: str) -> torch.nn.Module:
    """A small one in float64, without dropout, which is random."""
    torch.manual_seed(1)
    sizes = {"img_size": [16, 16, 16], "strides": SMALL["strides"]}
    options = {**sizes, **SMALL["model_args"]} if name == "unetrpp" else sizes
    model = create_model(name, "tiny", in_channels=1, out_channels=3, **options).double()
    if model.has_deep_supervision:
        model.deep_supervision = True
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(4, 1, 16, 16, 16, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (4, 1, 16, 16, 16), generator=generator).double()
    # A class that the second process does not see, and intensities that differ between the two.
    label[2:][label[2:] == 2] = 0
    image[2:] = 3 * image[2:] + 1
    return image, label


def step(name: str, loss: str, world: int, rank: int) -> dict:
    model = network(name)
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    image, label = (value[part] for value in batch())
    wrapped = model
    if world > 1:
        model = joint_batch_norm(model, torch.device("cpu"))
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    value = deep_supervision_loss(wrapped(image), label, loss)
    value.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.item(), "gradients": gradients, "buffers": dict(model.named_buffers())}


NETWORKS = [("unetrpp", "dice_ce"), ("segformer3d", "dice"), ("slim_unetr", "dice_focal")]


def one_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {names: step(*names, 2, rank) for names in NETWORKS}
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2))
    model = model.to(memory_format=torch.channels_last_3d)
    same_everywhere(model)
    found["same"] = [value.sum().item() for value in model.state_dict().values()]
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("names", NETWORKS)
def test_two_processes_have_the_gradients_of_the_joint_batch(two_processes, names):
    """Everything in float64 except the loss, which is float32: 1e-5 of the largest gradient."""
    expected = step(*names, 1, 0)
    largest = max(value.abs().max().item() for value in expected["gradients"].values())
    for found in two_processes:
        found = found[names]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for key, value in expected["gradients"].items():
            assert (found["gradients"][key] - value).abs().max() <= 1e-5 * largest, key
        assert found["buffers"].keys() == expected["buffers"].keys()
        for key, value in expected["buffers"].items():
            torch.testing.assert_close(found["buffers"][key], value, rtol=1e-9, atol=1e-9)


def test_all_processes_get_the_weights_of_the_first(two_processes):
    assert two_processes[0]["same"] == two_processes[1]["same"]


# -- launchers


@pytest.mark.parametrize(
    ("variables", "started"),
    [
        ({}, ("", 1)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ("", 1)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ("", 1)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, ("srun", 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ("torchrun", 2)),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ("", 1)),  # one that Fabric starts
        ({"OMPI_COMM_WORLD_SIZE": "3"}, ("mpirun", 3)),
        ({"PMI_SIZE": "2"}, ("mpirun", 2)),
        ({"PMI_SIZE": "two"}, ("", 1)),
    ],
)
def test_who_has_started_how_many_processes(variables, started):
    assert processes._started(variables) == started


@pytest.mark.parametrize(
    ("variables", "devices", "remedy"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, "torchrun has started 2 .* give --devices 2, or"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 2, "torchrun has started 1 .* --devices is 2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 2, "srun has started 4 .* --devices is 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2, "mpirun .*; start the command without mpirun"),
    ],
)
def test_processes_that_would_not_be_one_job_are_refused(
    data, tmp_path, monkeypatch, variables, devices, remedy
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(data=data, output=tmp_path / "run", steps=1, devices=devices, **SMALL)
    with pytest.raises(ValueError, match=remedy):
        run_train(config)
    assert not (tmp_path / "run").exists()


def test_one_process_starts_in_an_allocation_of_several_tasks(monkeypatch):
    for name, value in {"JOB_ID": "1", "NTASKS": "4", "JOB_NAME": "a.sh", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("LOCAL_RANK", "0")  # as an earlier run of this process leaves it
    fabric = launch(TrainConfig(devices=1, accelerator="cpu", precision="32-true"))
    assert fabric.world_size == 1 and fabric.is_global_zero


# -- signals


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_first_signal_is_noted_and_a_second_one_ends_at_once(number, end, capfd):
    before = signal.getsignal(number)
    with pytest.raises(end), Signals(True, "unetrpp train --resume RUN") as signals:
        signals.doing = "the validation on 3 case(s)"
        signal.raise_signal(number)
        assert signals.number == number
        assert "waiting for the end of the validation on 3 case(s)" in capfd.readouterr().err
        signal.raise_signal(number)
    assert "ended at once; continue with: unetrpp train --resume RUN" in capfd.readouterr().err
    assert signal.getsignal(number) is before


@pytest.fixture
def attached():
    """A process that a closed terminal reaches, even where these tests run under nohup."""
    if os.name == "nt":
        pytest.skip("Windows has no SIGHUP")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("attached")
def test_a_closed_terminal_is_a_first_signal_however_often_it_comes(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "__stderr__", os.fdopen(write, "w"))  # nobody reads it any more
    with Signals(True, "unetrpp train --resume RUN") as signals:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert signals.number == signal.SIGHUP


@pytest.mark.usefixtures("attached")
def test_under_nohup_a_closed_terminal_stops_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals(True, "unetrpp train --resume RUN") as signals, ended_by_signals():
        signal.raise_signal(signal.SIGHUP)
    assert signals.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("attached")
def test_a_closed_terminal_ends_other_commands_once_and_they_tidy_up():
    tidied = False
    with pytest.raises(Stopped, match="SIGHUP"), ended_by_signals():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            tidied = True
    assert tidied


def test_words_that_nobody_reads_end_no_run(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        train.say("a line")
        train.say("another one")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("attached")
def test_a_run_whose_terminal_is_closed_is_saved(data, tmp_path):
    import pty

    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        arguments = command("--data", data, "-o", run, "--steps", 100000, *small_options())
        os.execve(sys.executable, arguments, ONE_THREAD)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:  # a full terminal would stop the run
            os.read(terminal, 1000)
    os.close(terminal)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
    assert torch.load(run / "resume.pt", weights_only=True)["step"] > 0
    assert not list(run.rglob(".*"))


def test_a_validation_that_is_ended_at_once_is_made_up_for(data, tmp_path, monkeypatch):
    options = {"data": data, "steps": 4, "validate_every": 2, **SMALL}
    run_train(TrainConfig(output=tmp_path / "whole", **options))
    score = train._score

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return score(*arguments)

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_score", interrupted)
        run_train(TrainConfig(output=run, **options))
    state = torch.load(run / "resume.pt", weights_only=True)
    assert (state["step"], state["due"]) == (2, True)
    run_train(TrainConfig(resume=run))
    assert_same_end(run, tmp_path / "whole")


def test_a_failing_validation_loses_no_step(data, tmp_path, monkeypatch):
    def broken(*arguments):
        raise OSError("the data have gone")

    monkeypatch.setattr(train, "_score", broken)
    with pytest.raises(OSError, match="the data have gone"):
        run_train(TrainConfig(data=data, output=tmp_path / "run", steps=2, **SMALL))
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"] == 1


def test_training_in_another_thread(data, tmp_path):
    results = []

    def train():
        results.append(run_train(TrainConfig(data=data, output=tmp_path / "a", steps=1, **SMALL)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results[0]["steps"] == 1


# -- a folder in use


def test_a_folder_in_use_takes_no_second_run(data, tmp_path):
    run = tmp_path / "run"
    config = TrainConfig(data=data, output=run, steps=2, **SMALL)

    def second(step: int) -> None:
        if step != 1:
            return
        for other in (
            TrainConfig(data=data, output=run, steps=1, overwrite=True, **SMALL),
            TrainConfig(resume=run),
        ):
            with pytest.raises(FileExistsError, match="is in use by process"):
                run_train(other)

    assert run_train(config, before_step=second)["steps"] == 2
    assert [step for step, loss, _ in losses(run) if loss is not None] == [1, 2]
    assert not (run / ".lock").exists()


def test_data_inside_the_output_folder_are_never_removed(tmp_path):
    make_data(tmp_path / "project" / "data")
    (tmp_path / "project" / "plan.json").write_text("{}", encoding="utf-8")
    options = {"steps": 1, "overwrite": True, **SMALL}
    inside = tmp_path / "project" / "data"
    with pytest.raises(FileExistsError, match="which no run writes"):
        run_train(TrainConfig(data=inside, output=tmp_path / "project", **options))
    with pytest.raises(ValueError, match="--data and --output are both"):
        run_train(TrainConfig(data=inside, output=inside, **options))
    assert len(list(inside.rglob("*.nii.gz"))) == 8


# -- what a resumed run finds


def test_a_held_out_volume_is_read_before_the_first_step(tmp_path):
    from unetrpp.dataset import find_cases, split_cases
    from unetrpp.preprocessing import UnreadableImage

    make_data(tmp_path / "data")
    held_out = split_cases(find_cases(tmp_path / "data"), 0, 4)[1][0]
    image = held_out.images[0]
    image.write_bytes(image.read_bytes()[:500])
    with pytest.raises(UnreadableImage, match=image.name):
        run_train(TrainConfig(data=tmp_path / "data", output=tmp_path / "r", steps=9, **SMALL))
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        config = TrainConfig(data=data, output=run, steps=4, **SMALL)
        run_train(config, before_step=interrupt_at(0))
    return run


def changed_state(run: Path, change) -> None:
    state = torch.load(run / "resume.pt", weights_only=True)
    change(state)
    torch.save(state, run / "resume.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].popitem(),
        lambda state: state.update(model=None),
        lambda state: state.update(model={key: torch.zeros(3) for key in state["model"]}),
        lambda state: state.update(optimizer={}),
        lambda state: state.update(optimizer={"state": {}, "param_groups": []}),
        lambda state: state.update(average=None),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(stopped, tmp_path, change):
    run = shutil.copytree(stopped, tmp_path / "run")
    changed_state(run, change)
    with pytest.raises(ValueError, match=r"resume\.pt: it does not belong to this run"):
        run_train(TrainConfig(resume=run))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 1", "seed: one", "seed"),
        ("seed: 1", "seed: 1\nfuture_option: 3", "no option future_option; a newer version"),
        ("loss: dice_ce", "loss: null", "lacks loss"),
        ("loss: dice_ce", "loss: cubic", "loss"),
        ("data: ", "dat: ", "no option dat"),
        ("ema: 0.99", "ema: 1.5", "--ema must be at least 0 and below 1, got 1.5"),
        ("steps: 4", "steps: null", "lacks steps or minutes"),
        ("precision: 32-true", "precision: auto", "lacks precision"),
        ("model: unetrpp", "model: nnunet", "--model must be one of"),
        ("steps: 4", "steps: 9", "steps is 9, and resume.pt is of a run with 4"),
        ("optimizer: adamw", "optimizer: sgd\nbetas: null", "optimizer is sgd"),
    ],
)
def test_a_configuration_of_another_version_is_named(stopped, tmp_path, old, new, message):
    run = shutil.copytree(stopped, tmp_path / "run")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.yaml.*{message}"):
        run_train(TrainConfig(resume=run))


def test_a_plan_of_another_version_is_named(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    content = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    content["plan"]["curvature"] = 3
    (run / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json is no plan of this version.*curvature"):
        run_train(TrainConfig(resume=run))


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(batch_size="two"),
        lambda plan: plan.update(model=None),
        lambda plan: plan.update(preprocessing=[1]),
        lambda plan: plan["model"].update(img_size=[8, 8]),
        lambda plan: plan["model"].update(depth=3),
        lambda plan: plan["model"].pop("in_channels"),
        lambda plan: plan["preprocessing"].update(spacing=[0, 1, 1]),
        lambda plan: plan["preprocessing"].update(patch_size=[8, 8]),
        lambda plan: plan["preprocessing"].update(labels=["box"]),
        lambda plan: plan["preprocessing"].update(normalization=["robust"]),
    ],
)
def test_a_plan_of_which_nothing_can_be_made_is_named(stopped, tmp_path, change):
    from unetrpp.train_data import _stored_plan

    shutil.copy(stopped / "plan.json", tmp_path)
    _stored_plan(tmp_path)
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    change(content["plan"])
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json is no plan of this version"):
        _stored_plan(tmp_path)


def test_another_machine_is_said_and_another_number_of_devices_refused(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    changed_state(run, lambda state: state.update(machine="cuda (x86_64, torch 2.8.0, 1 ...)"))
    run_train(TrainConfig(resume=run))
    assert "it ran on cuda (x86_64, torch 2.8.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="devices cannot change"):
        run_train(TrainConfig(resume=run, devices=2))


# -- memory


@pytest.mark.parametrize(
    ("module", "needed", "said"),
    [
        (train_data, 2 * 16**3 * (4 + 2), r"--batch_size 2: patches of \[16, 16, 16\] voxels"),
        (predict, 2 * 20 * 18 * 17 * 4, "nii.gz: the probabilities of 2 classes for 17 x 18 x 20"),
    ],
)
def test_what_memory_cannot_hold_later_is_named_at_once(
    data, tmp_path, monkeypatch, module, needed, said
):
    def check(size, what, remedy):
        if size == needed:
            raise NotEnoughMemory(what)

    monkeypatch.setattr(module, "check_memory", check)
    with pytest.raises(NotEnoughMemory, match=said):
        run_train(TrainConfig(output=tmp_path / "run", data=data, steps=3, **SMALL))


def test_the_cache_says_its_size_and_keeps_what_fits(data, tmp_path, monkeypatch, capsys):
    # 20 x 18 x 17 voxels of 4 + 2 bytes: a case takes 36.7 kB, and half of this holds two.
    monkeypatch.setattr(train_data, "free_memory", lambda: 160_000)
    options = {"data": data, "steps": 3, **SMALL}
    run_train(TrainConfig(output=tmp_path / "streamed", **options))
    said = capsys.readouterr().out
    assert "2 of 3 cases are kept in memory: 73.4 kB, of 160 kB that are free" in said
    assert "the others are read anew for each patch" in said
    monkeypatch.undo()
    run_train(TrainConfig(output=tmp_path / "kept", **options))
    assert "3 of 3 cases are kept in memory: 110 kB" in capsys.readouterr().out
    assert_same_end(tmp_path / "streamed", tmp_path / "kept")


# -- whole runs of two processes


SLOW_SAVE = """
import sys, time
import unetrpp.train as train
old = train.save_state
def slow(path, state):
    time.sleep(6)
    old(path, state)
train.save_state = slow
from unetrpp.cli import main
sys.exit(main())
"""


@pytest.mark.exhaustive
def test_two_processes_wait_for_the_saving(data, tmp_path):
    script, run = tmp_path / "slow.py", tmp_path / "run"
    script.write_text(SLOW_SAVE, encoding="utf-8")
    arguments = ["train", "--data", data, "-o", run, "--steps", 400, "--validate_every", 400]
    process = subprocess.Popen(
        [sys.executable, script, *map(str, arguments), "--devices", "2", *small_options()],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ONE_THREAD,
    )
    wait_for_steps(run, process, 2)
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130 and message.count("continue with") == 1
    assert torch.load(run / "resume.pt", weights_only=True)["step"] >= 2


@pytest.mark.exhaustive
def test_two_processes_validate_what_they_save_and_resume_to_the_same(tmp_path):
    from unetrpp.checkpoint import load_checkpoint
    from unetrpp.dataset import find_cases
    from unetrpp.evaluate import dice_per_class
    from unetrpp.predict import predict_volume
    from unetrpp.preprocessing import Preprocessing, load_case

    data = make_data(tmp_path / "data", cases=6)
    options = ["--data", data, "--steps", 6, "--validate_every", 6, "--devices", 2]
    options += ["--save_minutes", 0, *small_options(), "--folds", 3]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("-o", whole, *options), check=True, env=ONE_THREAD, timeout=240)
    process = subprocess.Popen(
        command("-o", killed, *options),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ONE_THREAD,
    )
    wait_for_steps(killed, process, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.2)
    subprocess.run(command("--resume", killed), check=True, env=ONE_THREAD, timeout=240)
    assert_same_end(killed, whole)
    said = next(
        record["val_dice_per_case"]
        for record in map(json.loads, (whole / "metrics.jsonl").read_text("utf-8").splitlines())
        if "val_dice" in record
    )
    model, config = load_checkpoint(whole / "last")
    preprocessing = Preprocessing.from_dict(config["preprocessing"])
    assert len(said) == 2
    for case in find_cases(data):
        if case.name in said:
            item = load_case(case, preprocessing)
            image = item["image"].as_tensor()[None]
            found = predict_volume(model, image, preprocessing.patch_size)[0].argmax(0).numpy()
            truth = item["label"].as_tensor()[0].numpy()
            assert dice_per_class(found, truth, [1])[0] == pytest.approx(said[case.name], abs=1e-6)
