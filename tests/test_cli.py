"""The command `unetrpp`: help, options from YAML and command line, errors and exit codes."""

import re
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("monai", reason="needs the extra 'train'")
pytest.importorskip("jsonargparse", reason="needs the extra 'train'")

import torch  # noqa: E402

import unetrpp  # noqa: E402
from unetrpp import cli, evaluate, predict, train  # noqa: E402
from unetrpp.models import PRESETS  # noqa: E402
from unetrpp.train_config import resolved  # noqa: E402


def captured_config(monkeypatch) -> list:
    """Replace the training by a recorder of its configuration."""
    seen = []

    def record(config):
        seen.append(config)
        return {"best_dice": 0.5, "steps": 1, "seconds": 1.0, "output": "run", "is_main": True}

    monkeypatch.setattr(train, "run_train", record)
    return seen


def test_overview_is_quick_and_names_every_command():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unetrpp", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    for name in ("train", "predict", "evaluate", "report", "info", "demo"):
        assert f"  {name} " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "unetrpp.cli" in imported
    assert not imported & {"torch", "monai", "jsonargparse"}


@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "report", "info", "demo"])
def test_every_option_has_a_line_of_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    # jsonargparse shows an option without a docstring entry as its type alone.
    options = text.split("options:")[1].split("\n  -")
    for option in options[1:]:
        words = option.replace("\n", " ").split("(")[0].split()
        assert len([w for w in words if w.islower()]) >= 2, f"no help for {option!r}"


def test_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split("\n  --preset")[1].split("\n  --")[0].split())
    for network, presets in PRESETS.items():
        listed = re.search(rf"\b{network}: ([^;.]*)", text)[1]
        assert set(listed.split(", ")) == set(presets)


def test_help_says_that_no_recipe_decides_the_patch_size(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "except for the patch size, which no recipe decides" in text
    assert "proposed from the data if not given, with any recipe. Published: [64,128,128]" in text


def test_yaml_then_command_line(tmp_path, monkeypatch):
    seen = captured_config(monkeypatch)
    file = tmp_path / "config.yaml"
    file.write_text(
        "data: here\noutput: there\nsteps: 7\npatch_size: [16, 32, 16]\n", encoding="utf-8"
    )
    assert (
        cli.main(
            [
                "train",
                "--config",
                str(file),
                "--steps",
                "9",
                "--patch-size=[32,32,32]",
                "--overwrite",
                "--mirror",
                "--report",
                "false",
            ]
        )
        == 0
    )
    (config,) = seen
    assert str(config.data) == "here" and str(config.output) == "there"
    assert config.steps == 9 and config.patch_size == [32, 32, 32]
    assert config.overwrite is True and config.mirror is True and config.report is False


def test_printed_config_can_be_read_back(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--data", "d", "-o", "r", "--learning-rate", "0.5", "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    seen = captured_config(monkeypatch)
    assert cli.main(["train", "--config", str(file)]) == 0
    assert seen[0].learning_rate == 0.5 and str(seen[0].data) == "d"


def test_a_switch_before_a_file_does_not_swallow_it():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    cli._predict(parser)
    arguments = ["-o", "out", "--checkpoint", "c", "--mirror", "a.nii.gz", "b.nii.gz"]
    options = parser.parse_args(cli._spell_out(arguments, parser))
    assert options.mirror is True
    assert [str(path) for path in options.inputs] == ["a.nii.gz", "b.nii.gz"]


def test_user_errors_are_one_sentence_and_code_1(tmp_path, capsys):
    assert cli.main(["train", "--data", str(tmp_path), "-o", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "dataset.json does not exist" in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "--data", str(tmp_path), "-o", str(tmp_path / "run"), "--debug"])


@pytest.mark.parametrize("package", ["jsonargparse", "safetensors", "monai.inferers"])
def test_missing_package_is_said_with_the_extra_that_brings_it(package, monkeypatch, capsys):
    def train(parser):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setitem(cli.COMMANDS, "train", ("", train))
    assert cli.main(["train"]) == 1
    message = capsys.readouterr().err
    assert f"needs {package.partition('.')[0]}, which is not installed" in message
    assert message.endswith("pip install 'epa-kernels[train]'\n")
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        cli.main(["train", "--debug"])


@pytest.mark.parametrize(
    "package, call",
    [
        ("scipy", lambda folder: evaluate.hd95([[1, 1]], [[0, 1]])),
        ("tqdm", lambda folder: evaluate.evaluate_pairs({}, folder)),
        ("tqdm", lambda folder: predict.predict_cases([], folder, folder)),
        (
            "monai",
            lambda folder: predict.predict_volume(None, torch.zeros(1, 1, 2, 2, 2), (2,) * 3),
        ),
        (
            "lightning_fabric",
            lambda folder: train.run_train(train.TrainConfig(folder, folder / "r")),
        ),
    ],
)
def test_missing_package_is_said_in_python_too(package, call, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"needs {package}, which is not installed: pip install 'epa-kernels\[train\]'"
    with pytest.raises(ModuleNotFoundError, match=said):
        call(tmp_path)


def test_missing_package_of_a_lazy_name_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "unetrpp.checkpoint", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"load_checkpoint needs safetensors.*\[train\]"):
        _ = unetrpp.load_checkpoint


def test_broken_import_of_our_own_keeps_its_message(monkeypatch, capsys):
    def train(parser):
        import unetrpp.nowhere  # noqa: F401

    monkeypatch.setitem(cli.COMMANDS, "train", ("", train))
    assert cli.main(["train"]) == 1
    assert "No module named 'unetrpp.nowhere'" in capsys.readouterr().err
    monkeypatch.setitem(unetrpp._HOMES, "load_published", "nowhere")
    with pytest.raises(ModuleNotFoundError, match="No module named 'unetrpp.nowhere'"):
        _ = unetrpp.load_published


def test_no_option_at_all_is_explained(capsys):
    assert cli.main(["train"]) == 1
    assert "needs --data DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value",
    [
        *((name, "0") for name in ("steps", "batch_size", "validate_every", "devices", "minutes")),
        *((name, "1000000") for name in ("batch_size", "devices", "workers")),
        *((name, "-1") for name in ("cache", "workers", "warm_up", "fold", "seed", "save_minutes")),
        *(("learning_rate", value) for value in ("-0.1", "0", "nan", "inf", "fast")),
        *(("ema", value) for value in ("1", "1.5", "-0.1", "nan")),
        *(("foreground", value) for value in ("2", "-0.1", "null")),
        *(("patch_size", value) for value in ("[16,16]", "[0,16,16]", "[]", "16", "[16,16,x]")),
        *(("spacing", value) for value in ("[0,1,1]", "[1,1]", "[-1,1,1]", "[.inf,1,1]")),
        *(
            ("strides", value)
            for value in ("[[2,2,2]]", "[2,2,2,2]", "[[2,2,2],[2,2,2],[2,2,2],0]")
        ),
        *(("betas", value) for value in ("[0.9]", "[0.9,1]")),
        *(("weight_decay", value) for value in ("-1", "nan")),
        *(("folds", value) for value in ("1", "1e99")),
        *((name, "much") for name in ("recipe", "loss", "optimizer", "precision", "report")),
        *((name, "") for name in ("data", "output", "resume")),
        ("fold", "5"),
        ("seed", str(2**63)),
        ("model_args", "[1]"),
        *(("model_args", f'{{"{name}": 7}}') for name in ("in_channels", "img_size", "strides")),
    ],
)
def test_option_out_of_range_is_refused_with_its_range(option, value, tmp_path, capsys):
    """From the command line and from YAML alike, before anything is written."""
    file = tmp_path / "options.yaml"
    file.write_text(f"{option}: {value or repr(value)}\n", encoding="utf-8")
    where = {"data": str(tmp_path), "output": str(tmp_path / "run")}
    given = [word for name in where if name != option for word in (f"--{name}", where[name])]
    for words in ([f"--{option}={value}"], ["--config", str(file)]):
        try:
            code = cli.main(["train", *given, *words])
        except SystemExit as stop:
            code = stop.code
        assert code in (1, 2)
        message = capsys.readouterr().err
        (said,) = [line for line in message.splitlines() if line.startswith("unetrpp train: ")]
        assert f"--{option} must " in said and ", got " in said, said
        assert "Traceback" not in message and "usage:" not in message
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"ema": float("nan")}, {"recipe": "long"},
        {"patch_size": "16"}, {"patch_size": (16, 16)}, {"foreground": None}, {"data": ""},
        {"model_args": {1: 2}}, {"devices": "2"}, {"loss": "l1"}, {"model": "resnet"},
    ],
)  # fmt: skip
def test_ranges_hold_for_python_callers(options, tmp_path):
    given = {"data": tmp_path, "output": tmp_path / "run", **options}
    (name,) = options
    with pytest.raises(ValueError, match=f"--{name} must be "):
        train.run_train(train.TrainConfig(**given))


def test_numbers_of_numpy_and_text_paths_are_taken(tmp_path, monkeypatch):
    np = pytest.importorskip("numpy")
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"steps": np.int64(3), "patch_size": np.array([16, 16, 32]), "ema": np.float32(0)}
    config = resolved(train.TrainConfig(data="~/data", output="~/run", **given))
    assert config.data == tmp_path / "data" and config.output == tmp_path / "run"
    assert type(config.steps) is int and config.patch_size == [16, 16, 32]
    assert type(config.patch_size[0]) is int and type(config.ema) is float


@pytest.mark.parametrize(
    "content, said",
    [
        (b"stepz: 3\n", "there is no option 'stepz'; did you mean steps?"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- steps\n- 3\n", "is a list, not options by name"),
        (b"hello", "is a str, not options by name"),
        (b"steps:\t3\n\tx: 1\n", "line 1: a tab where YAML takes spaces only"),
        (b"steps: [1\n", "line 2: "),
        ("steps: 3\n".encode("utf-16"), "the text is not UTF-8 (byte 0); save it as UTF-8"),
        ("data: café\n".encode("latin-1"), "the text is not UTF-8 (byte 9)"),
        ({}, "is a folder"),
        (None, "does not exist"),
    ],
)
def test_file_that_holds_no_options_is_said_in_a_sentence(content, said, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    if content == {}:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(file)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("unetrpp train: ") and message.count("\n") == 1
    assert str(file) in message and said in message


def test_byte_order_mark_and_home_in_yaml(tmp_path, monkeypatch):
    seen = captured_config(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "options.yaml"
    file.write_bytes(b"\xef\xbb\xbfdata: ~/scans\nsteps: 4\n")
    assert cli.main(["train", f"--config={file}"]) == 0
    assert seen[0].data == tmp_path / "scans" and seen[0].steps == 4


@pytest.mark.parametrize(
    "words, said",
    [
        (["--foldz", "3"], "no option '--foldz'; did you mean fold?"),
        (["--steps"], "--steps needs a value, and none was given"),
        (["extra"], "'extra' belongs to no option"),
        (["--patch_size", "[16,16,16]", "17"], "a list is one word, as in --patch_size [48,64,48]"),
        (["--mirror", "maybe"], "a switch takes true or false"),
        (["--config"], "--config '' does not exist"),
    ],
)
def test_wrong_usage_is_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_argument_without_a_name_is_refused_by_its_word(tmp_path, capsys):
    for words, said in ((["predict", "", "-o", "o", "--checkpoint", "c"], "inputs must be a path"),
                        (["evaluate", "", "labels"], "predictions must be the path"),
                        (["report", ""], "run must be the path")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and f"unetrpp {words[0]}: {said}" in message


def test_output_of_train_is_no_file_and_no_data(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="--output .*notes.txt is a file"):
        resolved(train.TrainConfig(data=tmp_path, output=file, overwrite=True))
    with pytest.raises(ValueError, match="--data and --output are both"):
        resolved(train.TrainConfig(data=tmp_path, output=tmp_path / "x" / "..", overwrite=True))


def test_device_that_is_not_there_is_said_before_training(tmp_path, monkeypatch):
    config = train.TrainConfig(data=tmp_path, output=tmp_path / "run", accelerator="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--accelerator cuda needs such a device"):
        resolved(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config.devices = 3
    with pytest.raises(ValueError, match="--devices must be at most 2, .* got 3"):
        resolved(config)


def test_wrong_usage_is_code_2(capsys):
    assert cli.main(["trian"]) == 2
    assert "there are train, predict" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--steps", "many"])
    assert stop.value.code == 2


def test_info_of_a_preset_counts_parameters_and_tokens(capsys):
    assert cli.main(["info", "unetrpp/tiny"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("preset tiny\n")
    assert "each axis a multiple of 16x16x16" in text
    assert "4096 (16x16x16), 512 (8x8x8), 64 (4x4x4), 8 (2x2x2)" in text
    assert "two_pass" in text and "reference" in text
    assert cli.main(["info", "nothing"]) == 1
    assert "neither a checkpoint folder nor a preset" in capsys.readouterr().err


def test_info_of_other_networks_and_says_what_is_a_reconstruction(capsys):
    for name, parameters, multiply_adds in (
        ("segformer3d/brats", "4,525,251", "10.04 G"),
        ("slim_unetr/hepatic", "1,773,726", "0.94 G"),
        ("slim_unetrpp/brats", "3,407,899", "4.06 G"),
    ):
        assert cli.main(["info", name]) == 0
        text = capsys.readouterr().out
        assert parameters in text and f"= {multiply_adds} multiply-adds" in text
        assert "each axis a multiple of 32x32x32" in text
        tokens = {"segformer3d": 32768, "slim_unetr": 216, "slim_unetrpp": 512}[name.split("/")[0]]
        assert f"spatial_attention on cpu float32, B = 1, N = {tokens}, " in text
        for op in ("paired_attention", "channel_attention"):
            assert (f"{op} on cpu float32, B = 1, " in text) == name.startswith("slim_unetrpp")
        assert ("RECONSTRUCTION" in text) == name.startswith("slim_unetrpp")
        assert ("any other size" in text) == name.startswith("segformer3d")
    assert cli.main(["info"]) == 1
    message = capsys.readouterr().err
    assert "neither a checkpoint folder nor a preset (synapse, " in message
    assert "slim_unetrpp/brats (reconstruction), " in message


def test_throughput_is_a_markdown_table_of_figures_that_agree(capsys):
    assert cli.main(["info", "slim_unetrpp/tiny", "--throughput"]) == 0
    head, line, row, _, note = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["preset"] == "slim_unetrpp/tiny (reconstruction)"
    assert cells["input"] == "1x32x32x32"
    cold, warm, latency = (
        float(cells[key]) for key in ("images/min, cold", "images/min, warm", "latency ms")
    )
    # The very first pass starts threads and kernels, which a median after it does not see.
    assert 0 < cold < warm
    assert 60e3 / warm == pytest.approx(latency, abs=0.51)
    assert "Slim UNETR" in note and f"{torch.get_num_threads()} threads" in note
    assert cli.main(["info", "nothing", "--throughput"]) == 1
    assert "'nothing' is no preset" in capsys.readouterr().err


def test_own_warnings_are_printed_as_sentences():
    """Python would add a place in the program and a line of its code."""
    with cli._warning_in_sentences("evaluate"):
        own = warnings.formatwarning("a.nii lies 3 mm away", UserWarning, cli.__file__, 7)
        other = warnings.formatwarning("old", UserWarning, "other.py", 7, line="x = 1")
    assert own == "unetrpp evaluate: warning: a.nii lies 3 mm away\n"
    assert other == warnings.formatwarning("old", UserWarning, "other.py", 7, line="x = 1")


def test_a_command_whose_output_is_closed_runs(monkeypatch):
    def report(parser):
        print("a line")
        return lambda options: print("a line", file=sys.stderr) or 0

    monkeypatch.setitem(cli.COMMANDS, "info", ("", report))
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["info"]) == 0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_says_what_a_stop_leaves_and_what_needs_less(name, monkeypatch, capsys):
    errors = iter([KeyboardInterrupt(), MemoryError()])

    def fail(parser):
        raise next(errors)

    monkeypatch.setitem(cli.COMMANDS, name, ("", fail))
    assert cli.main([name]) == 130
    assert f"unetrpp {name}: stopped by Ctrl-C; " in capsys.readouterr().err
    assert cli.main([name]) == 1
    assert "memory ran out" in capsys.readouterr().err
