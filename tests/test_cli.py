"""The command `unetrpp`: help, options from YAML and command line, errors and exit codes."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("monai", reason="needs the extra 'train'")
pytest.importorskip("jsonargparse", reason="needs the extra 'train'")

import torch  # noqa: E402

import unetrpp  # noqa: E402
from unetrpp import cli, train  # noqa: E402
from unetrpp.models import PRESETS  # noqa: E402


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
