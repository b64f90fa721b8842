"""Checkpoints: written whole, read back exactly, published pickles read without running code."""

import argparse
import collections
import functools
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile

import golden
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unetrpp import checkpoint
from unetrpp.checkpoint import load_checkpoint, save_checkpoint
from unetrpp.models import UNETRPP, create_model
from unetrpp.published import load_published

EXTRA = {
    "preprocessing": {"modality": "CT", "clip": [-160.5, 240], "spacing": None},
    "labels": {"background": 0, "Milz, 脾臓": 1},
}


@pytest.fixture(scope="module")
def model():
    """A tiny network with weights that no constructor gives."""
    torch.manual_seed(0)
    model = UNETRPP.from_preset("tiny", deep_supervision=True).eval()
    model.load_state_dict(golden.fill(golden.entries_of(model), shared_ef=True))
    return model


@pytest.fixture
def folder(model, tmp_path):
    return save_checkpoint(tmp_path / "run" / "best", model, EXTRA)


def assert_same(a, b):
    for (key, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(x, y), key


@pytest.mark.parametrize("name", ["segformer3d", "slim_unetr", "slim_unetrpp"])
def test_other_networks_round_trip_and_are_recognised(name, tmp_path):
    torch.manual_seed(1)
    model = create_model(name, "tiny", in_channels=2, out_channels=5).eval()
    again, config = load_checkpoint(save_checkpoint(tmp_path / "a", model, EXTRA))
    assert_same(model, again)
    assert config == {"model": model.config, **EXTRA}
    # Published ones are a state dict alone, or one among other things.
    file = published(model.state_dict(), tmp_path / "published.pt", prefix="")
    said = {
        "segformer3d": [r'published.pt does not tell .*assumed is attention_scale="num_heads"'],
        "slim_unetrpp": ["published.pt is read as SlimUNETRPP, a RECONSTRUCTION: "],
    }
    for preset in (None, f"{name}/tiny"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_published(file, preset)
        for message, pattern in zip(caught, said.get(name, []), strict=True):
            assert re.search(pattern, str(message.message)) and message.filename == __file__
        assert found.config == model.config
        assert_same(model, found)
    resized, _ = load_checkpoint(tmp_path / "a", img_size=(32, 48, 32))
    assert resized(torch.randn(1, 2, 32, 48, 32)).shape == (1, 5, 32, 48, 32)
    if not model.takes_any_size:
        file = published(resized.state_dict(), tmp_path / "resized.pt")
        label = f"{name}/tiny" + " (reconstruction)" * model.is_reconstruction
        with pytest.raises(ValueError) as caught:
            load_published(file)
        assert f"preset {label} at another img_size, one with 12 tokens in" in str(caught.value)
        assert_same(resized, load_published(file, f"{name}/tiny", img_size=(32, 48, 32)))


def test_round_trip_is_exact(model, folder):
    again, config = load_checkpoint(folder)
    assert_same(model, again)
    assert not again.training
    assert again.unetr_pp_encoder.stages[0][0].epa_block.E is (
        again.unetr_pp_encoder.stages[0][0].epa_block.F
    )
    assert config == {"model": model.config, **EXTRA}
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        for a, b in zip(model(x), again(x), strict=True):
            assert torch.equal(a, b)


def test_folder_is_readable_by_others(model, folder):
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["best"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model"] == model.config
    assert config["labels"] == EXTRA["labels"]
    with safe_open(folder / "model.safetensors", framework="pt") as stream:
        keys = set(stream.keys())
    # Shared tensors are stored once, under the first of their names.
    assert keys == {key for key in model.state_dict() if ".F." not in key}


@pytest.mark.parametrize("kind", ["split", "sum"])
def test_other_kinds_round_trip(kind, tmp_path):
    model = UNETRPP.from_preset("tiny", epa_kind=kind)
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "a", model))
    assert_same(model, again)


def test_load_with_overrides_and_another_size(model, folder):
    again, config = load_checkpoint(
        folder, img_size=(48, 32, 16), deep_supervision=False, attention_dropout=0.0
    )
    assert again(torch.randn(1, 1, 48, 32, 16)).shape == (1, 2, 48, 32, 16)
    assert config["model"] == again.config
    assert config["model"]["args"]["img_size"] == [48, 32, 16]
    assert again.unetr_pp_encoder.stages[0][0].epa_block.attn_drop.p == 0.0
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(folder, out_channels=5)
    with pytest.raises(ValueError, match="unexpected keyword argument 'dropout'; its arguments"):
        load_checkpoint(folder, dropout=0.5)


def test_wrappers_are_looked_through(model, tmp_path):
    wrapped = torch.nn.DataParallel(torch.compile(model))
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "a", wrapped))
    assert_same(model, again)


@pytest.mark.parametrize("stage", ["save_file", "fsync", "replace"])
def test_failed_write_keeps_the_old_checkpoint(stage, model, folder, monkeypatch):
    other = UNETRPP.from_preset("tiny")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if stage == "save_file":
            patch.setattr(checkpoint, "save_file", fail)
        else:
            patch.setattr(os, stage, fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(folder, other)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(folder.parent / "new", other)
    assert os.listdir(folder.parent) == ["best"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    again, config = load_checkpoint(folder)
    assert_same(model, again)
    assert config["labels"] == EXTRA["labels"]


def test_write_stopped_between_the_files_gives_the_new_checkpoint(folder, monkeypatch):
    other = UNETRPP.from_preset("tiny", in_channels=2)
    replace = os.replace

    def stop_at_config(source, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_config)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, other, {"labels": {"new": 1}})
    again, config = load_checkpoint(folder)
    assert_same(other, again)
    assert config == {"model": other.config, "labels": {"new": 1}}


def test_edited_config_counts(folder):
    file = folder / "config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("CT", "MR"), encoding="utf-8")
    _, config = load_checkpoint(folder)
    assert config["preprocessing"]["modality"] == "MR"
    file.write_text(json.dumps({"model": config["model"]}), encoding="utf-8")
    assert load_checkpoint(folder)[1] == {"model": config["model"]}


def test_what_a_killed_process_left_is_overwritten(model, folder):
    for place in (folder / ".partial.model.safetensors", folder.parent / ".new.partial"):
        place.mkdir() if place.name.startswith(".new") else place.write_bytes(b"half")
    save_checkpoint(folder, model)
    save_checkpoint(folder.parent / "new", model)
    assert sorted(os.listdir(folder.parent)) == ["best", "new"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_extra_must_be_json_and_keep_off_reserved_keys(model, tmp_path):
    with pytest.raises(ValueError, match="plain JSON, but .*float32 is not JSON"):
        save_checkpoint(tmp_path / "a", model, {"dice": np.float32(0.5)})
    with pytest.raises(ValueError, match="plain JSON, but Out of range float"):
        save_checkpoint(tmp_path / "a", model, {"dice": float("nan")})
    with pytest.raises(ValueError, match="reserved keys {'model'}"):
        save_checkpoint(tmp_path / "a", model, {"model": {}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_or_missing_file_is_named(name, folder):
    file = folder / name
    content = file.read_bytes()
    for length in (0, 7, len(content) // 2, len(content) - 3):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"load_checkpoint: .*{name} is truncated"):
            load_checkpoint(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"load_checkpoint: .*{name} is missing"):
        load_checkpoint(folder)


def test_wrong_place_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing; a checkpoint is a folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"config.json is missing; .* Did you mean .*best\?"
    ):
        load_checkpoint(folder.parent)
    with pytest.raises(ValueError, match="is a file; .*load_published reads"):
        load_checkpoint(folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["Bert"]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r'config.json must hold {"model": {"name", "args"}}'):
        load_checkpoint(folder)


def published(state, path, *, prefix="module.", numpy_one=False, **more):
    """Write what the published trainer writes: weights, optimizer, curves of numpy numbers."""
    curve = [np.float64(0.9), np.float64(0.5)]
    content = {
        "epoch": 2,
        "state_dict": collections.OrderedDict(
            (prefix + key, value) for key, value in state.items()
        ),
        "optimizer_state_dict": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": 0.01, "momentum": 0.99, "nesterov": True, "params": [0]}],
        },
        "lr_scheduler_state_dict": None,
        "plot_stuff": (curve, [np.float32(0.75)], [], [np.mean(curve), np.int64(7), np.bool_(1)]),
        "best_stuff": (np.float64(0.5), None, curve[1]),
        **more,
    }
    torch.save(content, path)
    if numpy_one:
        _rewrite_pickle(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    return path


def _rewrite_pickle(path, old, new):
    """Replace a module name in the pickle, as a file written with numpy 1 has it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = [name for name in members if name.endswith("data.pkl") and old in members[name]]
    assert len(changed) == 1
    members[changed[0]] = members[changed[0]].replace(old, new)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("numpy_one", [False, True], ids=["numpy2", "numpy1"])
@pytest.mark.parametrize("prefix", ["module.", ""], ids=["multi-gpu", "one-gpu"])
def test_published_checkpoint_loads(model, tmp_path, prefix, numpy_one):
    if not numpy_one and np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip(f"numpy {np.__version__} writes the module names of numpy 1")
    numpy_one = numpy_one and np.lib.NumpyVersion(np.__version__) >= "2.0.0"
    file = published(model.state_dict(), tmp_path / "m.model", prefix=prefix, numpy_one=numpy_one)
    found = load_published(file)
    assert_same(model, found)
    assert not found.training
    into = UNETRPP.from_preset("tiny")
    assert load_published(file, into) is into
    assert_same(model, into)


@pytest.mark.parametrize("numpy_one", [False, True], ids=["numpy2", "numpy1"])
@pytest.mark.parametrize("dtype", ["f4", ">f8", "i8", "?", "u1"])
def test_numeric_arrays_beside_the_weights_are_read(model, tmp_path, dtype, numpy_one):
    if numpy_one and np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip(f"numpy {np.__version__} writes these names anyway")
    more = {"curves": np.arange(6).reshape(2, 3).astype(dtype), "none": np.zeros((0, 2), dtype)}
    file = published(model.state_dict(), tmp_path / "m.model", numpy_one=numpy_one, **more)
    assert_same(model, load_published(file, "tiny"))


@pytest.mark.parametrize("values", [[1, None], ["a", "b"]], ids=["object", "text"])
def test_other_arrays_are_refused(model, tmp_path, values):
    more = {"curves": np.array(values)}
    file = published(model.state_dict(), tmp_path / "m.model", **more)
    with pytest.raises(ValueError, match="load_published: .*m.model"):
        load_published(file)


def test_bare_state_dict_loads(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert_same(model, load_published(tmp_path / "weights.pt", "tiny"))


def test_channels_are_taken_from_the_file(tmp_path):
    model = UNETRPP.from_preset("tiny", in_channels=4, out_channels=9)
    found = load_published(published(model.state_dict(), tmp_path / "m.model"))
    assert found.config == model.config
    assert_same(model, found)


def test_full_size_published_variant_is_recognised(tmp_path):
    # Storage is shared by all tensors of one shape, so that 57 million weights make a small file.
    entries = golden.load("synapse.state_dict.json")
    blank = {}
    state = {}
    for entry in entries:
        dtype = getattr(torch, entry["dtype"])
        place = (tuple(entry["shape"]), dtype)
        state[entry["key"]] = blank.setdefault(place, torch.zeros(()).to(dtype)).expand(place[0])
    found = load_published(published(state, tmp_path / "model_final_checkpoint.model"))
    assert found.config == UNETRPP.from_preset("synapse").config


def test_checkpoint_of_another_size_is_carried_over(tmp_path):
    model = UNETRPP.from_preset("tiny", img_size=(48, 32, 32))
    file = published(model.state_dict(), tmp_path / "m.model")
    message = r"fits no preset. The file fits preset tiny at another img_size, one with 6144 tok"
    with pytest.raises(ValueError, match=message):
        load_published(file)
    found = load_published(file, "tiny", img_size=(48, 32, 32))
    assert_same(model, found)
    assert found.resize_tokens((32, 32, 32))(torch.randn(1, 1, 32, 32, 32)).shape[2:] == (32,) * 3


def test_mismatch_lists_keys_and_names_the_preset(tmp_path):
    model = UNETRPP.from_preset("tiny", res_blocks=2, feature_size=6)
    state = model.state_dict()
    del state["out1.conv.conv.bias"]
    file = published(state, tmp_path / "m.model")
    with pytest.raises(ValueError) as caught:
        load_published(file, "tiny")
    message = str(caught.value)
    assert message.startswith(f"load_published: {file} does not fit the model:")
    assert "1 missing: out1.conv.conv.bias\n" in message
    assert "84 unexpected: unetr_pp_encoder.stages.0.0.conv52.conv1.conv.weight, " in message
    assert ", ... and 79 more\n" in message
    assert (
        "of another shape: encoder1.conv1.conv.weight (6, 1, 3, 3, 3) instead of (8, 1," in message
    )
    assert "The file fits no preset." in message
    with pytest.raises(ValueError) as caught:
        load_published(file)
    assert str(caught.value).count("fits no preset") == 1 and "  " not in str(caught.value)

    fitting = published(UNETRPP.from_preset("tiny").state_dict(), tmp_path / "tiny.model")
    with pytest.raises(ValueError, match="The file fits preset tiny[.]"):
        load_published(fitting, "tiny", res_blocks=2)


@pytest.mark.parametrize(
    ("name", "preset", "argument"),
    [("unetrpp", "tiny", "proj_sizes"), ("slim_unetrpp", "slim_unetrpp/tiny", "proj_size")],
)
def test_another_number_of_projected_tokens_is_named(name, preset, argument, tmp_path):
    other = {"proj_sizes": (12, 16, 16, 8), "proj_size": 12}[argument]
    model = create_model(name, "tiny", **{argument: other})
    file = published(model.state_dict(), tmp_path / "m.model")
    for arguments in ((), (preset,)):
        with pytest.raises(ValueError) as caught:
            load_published(file, *arguments)
        message = str(caught.value)
        assert f"preset {preset}" in message and argument in message
        assert "resize_tokens" not in message, "that changes the tokens, not the projected ones"
    assert_same(model, load_published(file, preset, **{argument: other}))


def test_attention_scale_is_not_assumed_where_it_is_given(tmp_path):
    model = create_model("segformer3d", "tiny", attention_scale="head_dim")
    file = published(model.state_dict(), tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_published(file, attention_scale="head_dim")
        assert load_published(file, model) is model
    assert found.config == model.config


def test_separate_e_and_f_are_not_taken_for_shared_ones(tmp_path):
    split = UNETRPP.from_preset("tiny", epa_kind="split")
    file = published(split.state_dict(), tmp_path / "m.model")
    with pytest.raises(ValueError, match=r'different tensors .*E.weight and .*epa_kind="split"'):
        load_published(file, "tiny")
    assert_same(split, load_published(file, "tiny", epa_kind="split"))


class Malicious:
    """Unpickles by running a command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_pickle_is_refused_and_nothing_runs(model, tmp_path, legacy):
    trace = tmp_path / "was-run"
    file = tmp_path / "evil.model"
    content = {"state_dict": model.state_dict(), "plot_stuff": Malicious(trace)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"load_published: .*evil.model holds \w+.mkdir, which"):
        load_published(file)
    assert not trace.exists()
    # The same file does run it when it is unpickled as the published code does.
    torch.load(file, weights_only=False)
    assert trace.exists()


def test_plain_pickle_is_refused(tmp_path):
    trace = tmp_path / "was-run"
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(ValueError, match="load_published: .*evil.pkl"):
        load_published(file)
    assert not trace.exists()


def test_unreadable_published_file_is_named(model, tmp_path):
    file = published(model.state_dict(), tmp_path / "m.model")
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="load_published: .*m.model is truncated or no torch"):
            load_published(file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="m.model holds no state dict"):
        load_published(file)
    for content in ({"state_dict": [1]}, {"state_dict": None}, {"state_dict": {3: torch.ones(1)}}):
        torch.save(content, file)
        with pytest.raises(ValueError, match="m.model holds no state dict"):
            load_published(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="m.model holds no state dict"):
        load_published(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="m.model is missing"):
        load_published(file)


def test_published_arguments_are_checked(model, tmp_path):
    file = published(model.state_dict(), tmp_path / "m.model")
    with pytest.raises(ValueError, match="preset must be one of"):
        load_published(file, "brain")
    with pytest.raises(ValueError, match="img_size cannot change a model that is already built"):
        load_published(file, UNETRPP.from_preset("tiny"), img_size=(32, 32, 32))


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def with_averages(state):
    return {"n_averaged": torch.tensor(3), **prefixed(state, "module.")}


OTHERS = {key: torch.randn(2) for key in ("loss.weight", "metric.sum")}
# What other training code makes of a state dict.
FORMS = {
    **{
        prefix: functools.partial(prefixed, prefix=prefix)
        for prefix in (
            "module.",
            "_orig_mod.",
            "model.",
            "net.",
            "network.",
            "module._orig_mod.",
            "_orig_mod.module.model.",
            "model.net.network.",
            "_forward_module.model.",
            "student.backbone.",
        )
    },
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "lightning": lambda state: {
        "state_dict": {**prefixed(state, "model."), **OTHERS},
        "hyper_parameters": argparse.Namespace(lr=0.1, root=pathlib.Path("a")),
        "callbacks": {"ModelCheckpoint": {"best_model_path": "a", "kth": torch.tensor(1.0)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
    },
    "nnU-Net v2": lambda state: {
        "network_weights": prefixed(state, "_orig_mod."),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        "logging": {"ema_fg_dice": [np.float32(0.5)]},
        "trainer_name": "nnUNetTrainer",
    },
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": torch.tensor(0.5)},
    "model": lambda state: {"model": prefixed(state, "module."), "args": argparse.Namespace(a=1)},
    "two entries": lambda state: {"checkpoint": {"model": {"state_dict": state}}},
    "ema": lambda state: {"ema": {"module": state}, "updates": 7},
    "ema beside": lambda state: {
        "ema": {key: torch.zeros_like(value) for key, value in state.items()},
        "model_state_dict": state,
    },
    "AveragedModel": with_averages,
    "AveragedModel in an entry": lambda state: {"swa": with_averages(state)},
    "DeepSpeed": lambda state: {"module": state, "optimizer": None, "mp_world_size": 1},
    "FSDP": lambda state: {
        "_fsdp_wrapped_module."
        + key.replace("stages.0.", "stages.0._checkpoint_wrapped_module.").replace(
            "decoder2.", "decoder2._orig_mod."
        ): value
        for key, value in state.items()
    },
    "thop": lambda state: {
        **state,
        "total_ops": torch.zeros(1),
        "out1.total_params": torch.ones(1),
    },
    "defaultdict": lambda state: collections.defaultdict(dict, model=state),
    "half": lambda state: {key: value.half() for key, value in state.items()},
    "bfloat16": lambda state: {key: value.bfloat16() for key, value in state.items()},
    "without F": lambda state: {k: v for k, v in state.items() if ".F." not in k},
    "without E": lambda state: {k: v for k, v in state.items() if ".E." not in k},
    "without counters": lambda state: {
        k: v for k, v in state.items() if not k.endswith("num_batches_tracked")
    },
    "parameters": lambda state: {
        k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_what_others_save_is_loaded(model, tmp_path, form):
    file = tmp_path / "weights.pt"
    torch.save(FORMS[form](model.state_dict()), file)
    narrow = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(form)
    into = UNETRPP.from_preset("tiny")
    for found in (load_published(file, "tiny"), load_published(file, into)):
        for (key, a), b in zip(
            model.state_dict().items(), found.state_dict().values(), strict=True
        ):
            expected = a.to(narrow).to(a.dtype) if narrow and a.is_floating_point() else a
            is_lost = form == "without counters" and key.endswith("num_batches_tracked")
            assert is_lost or torch.equal(expected, b), key
            assert b.dtype == a.dtype


@pytest.mark.parametrize("missing", [("out2", "out3"), ("out3",)])
def test_heads_of_deep_supervision_may_be_missing(model, tmp_path, missing):
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(missing)}
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    for preset in (None, "tiny"):
        with pytest.warns(UserWarning, match=f"no weights of {', '.join(missing)}, the heads of"):
            found = load_published(tmp_path / "weights.pt", preset)
        assert all(torch.equal(found.state_dict()[key], value) for key, value in state.items())
    del state["out1.conv.conv.bias"], state["decoder2.transp_conv.conv.weight"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="2 missing: decoder2.transp_conv.conv.weight, out1.conv"):
        load_published(tmp_path / "weights.pt", "tiny")


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("model_final_checkpoint.model", ["model_final_checkpoint.model.pkl", "debug.json"]),
        ("model_best.model", ["model_best.model.pkl", "progress.png"]),
        ("fold_0/checkpoint_final.pth", ["plans.json", "dataset.json"]),
        ("model.safetensors", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"]),
        ("pytorch_model.bin", ["optimizer.bin", "scaler.pt", "sampler.bin"]),
        ("best/checkpoint_3/pytorch_model.bin", ["log.txt"]),
        ("lightning_logs/version_0/checkpoints/epoch=3-step=8.ckpt", ["hparams.yaml"]),
        ("global_step8/mp_rank_00_model_states.pt", ["latest", "zero_to_fp32.py"]),
        ("model.safetensors.index.json", []),
    ],
)
def test_folders_of_other_programs_are_read(model, tmp_path, name, beside):
    for each in beside:
        (tmp_path / each).write_bytes(b"no weights")
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if name.endswith(".index.json"):
        halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
        for number, half in enumerate(halves):
            save_file({k: v.clone() for k, v in half.items()}, tmp_path / f"m-{number}.safetensors")
        places = {k: f"m-{n}.safetensors" for n, half in enumerate(halves) for k in half}
        file.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    elif name.endswith(".safetensors"):
        save_file({"module." + key: value.clone() for key, value in state.items()}, file)
    else:
        torch.save({"state_dict": state}, file)
    assert_same(model, load_published(tmp_path))
    assert_same(model, load_published(file))


def test_a_folder_with_several_is_refused(model, tmp_path):
    for fold in (0, 1):
        (tmp_path / f"fold_{fold}").mkdir()
        torch.save(model.state_dict(), tmp_path / f"fold_{fold}" / "model_best.model")
    with pytest.raises(ValueError, match="name one: fold_0/model_best.model, fold_1/model_best"):
        load_published(tmp_path)
    assert_same(model, load_published(tmp_path / "fold_1"))
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none holds no file of weights; known are model."):
        load_published(tmp_path / "none")
    (tmp_path / "none" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match="shards of torch.distributed.checkpoint; join them: "):
        load_published(tmp_path / "none")


def test_a_folder_of_save_checkpoint_is_read(tmp_path):
    # Its widths are of no preset; config.json says them.
    model = UNETRPP.from_preset("tiny", feature_size=6)
    assert_same(model, load_published(save_checkpoint(tmp_path / "a", model)))


@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_what_fits_nothing_names_prefix_and_nearest_preset(tmp_path, prefix):
    state = UNETRPP.from_preset("tiny", feature_size=6).state_dict()
    torch.save(prefixed(state, prefix), tmp_path / "weights.pt")
    for preset in (None, "tiny"):
        with pytest.raises(ValueError) as caught:
            load_published(tmp_path / "weights.pt", preset)
        message = str(caught.value)
        assert "The nearest preset is tiny, whose names and shapes " in message
        assert (
            "of another shape: encoder1.conv1.conv.weight (6, 1, 3, 3, 3) instead of (8, "
            in (message.partition("nearest preset")[2])
        )
        assert (f"The prefix {prefix!r} of its names was removed." in message) == bool(prefix)
    other = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save(prefixed(other.state_dict(), prefix), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="fits no preset. None of its 2 names is one of a network"):
        load_published(tmp_path / "weights.pt")


def test_numbers_that_are_no_floats_are_refused(model, tmp_path):
    state = dict(model.state_dict())
    state["out1.conv.conv.bias"] = torch.ones(2, dtype=torch.int8)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="1 of another type: out1.conv.conv.bias torch.int8 inst"):
        load_published(tmp_path / "weights.pt", "tiny")


@pytest.mark.parametrize("form", (lambda t: t.to("meta"), torch.Tensor.to_sparse))
def test_tensors_that_are_not_dense_are_refused(model, tmp_path, form):
    state = dict(model.state_dict())
    state["out1.conv.conv.bias"] = form(state["out1.conv.conv.bias"])
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt holds out1.conv.conv.bias .* save dense"):
        load_published(tmp_path / "weights.pt", "tiny")


def test_what_is_no_checkpoint_is_named(model, tmp_path):
    file = tmp_path / "weights.pt"
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(model, file)
    with pytest.raises(ValueError, match=r"is a whole module, torch.save\(model\), .*state_dict"):
        load_published(file)
    torch.save({"epoch": 1, "model": model}, file)
    with pytest.raises(ValueError, match="is a whole module"):
        load_published(file)
    torch.save(optimizer.state_dict(), file)
    with pytest.raises(ValueError, match="holds the state of an optimizer alone; name the file"):
        load_published(file)
    for content, message in (
        (b"", "truncated or no torch checkpoint"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page, no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights.pt (is )?{message}"):
            load_published(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fold_0/model_best.model", b"x")
    with pytest.raises(ValueError, match="is a zip archive of other files; unpack it"):
        load_published(file)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
    with pytest.raises(ValueError, match="is a TorchScript archive"):
        load_published(file)


def test_a_file_that_inflates_far_beyond_its_size_is_refused(tmp_path):
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"state_dict": {"a": torch.zeros(8 * 2**20)}}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert packed.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"would inflate to 33,\d*,\d*; torch.save compresses no"):
        load_published(packed)


def test_damaged_or_newer_configurations_are_named(folder):
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    args = content["model"]["args"]
    for described, message in (
        ({"name": "unetrpp", "args": {**args, "gates": 3}}, "argument 'gates'.* a later version"),
        ({"name": "unetrpp", "args": {}}, "missing a required argument: 'in_channels'"),
        ({"name": "unetr4", "args": args}, "got 'unetr4'. Did you mean unetrpp.* needs an update"),
        ({"name": "unetrpp", "args": {**args, "dims": None}}, "dims must be"),
        ({"name": "unetrpp", "args": []}, "must hold"),
        ({"name": ["unetrpp"], "args": args}, "must hold"),
        ("unetrpp", "must hold"),
        (None, "must hold"),
    ):
        file.write_text(json.dumps({**content, "model": described}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"load_checkpoint: .*config.json .*{message}"):
            load_checkpoint(folder)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert load_checkpoint(folder)[1] == {"model": content["model"], **EXTRA}
    file.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="config.json is truncated or no JSON"):
        load_checkpoint(folder)
    file.write_bytes(b'{"model": "\xe9"}')
    with pytest.raises(ValueError, match="config.json is truncated or no JSON .*Latin-1"):
        load_checkpoint(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="config.json is no file; copy the checkpoint again"):
        load_checkpoint(folder)


def test_checkpoint_files_follow_the_umask(model, folder):
    usual = folder.parent / "usual"
    usual.touch()
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).stat().st_mode == usual.stat().st_mode


def test_a_folder_whose_name_is_no_utf_8_is_named(tmp_path):
    folder = tmp_path / "r\udce4n"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is no UTF-8, and safetensors opens no such path; rename"):
        load_checkpoint(folder)
