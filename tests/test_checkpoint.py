"""Checkpoints: written whole, read back exactly, published pickles read without running code."""

import collections
import json
import os
import pickle
import re
import warnings
import zipfile

import golden
import numpy as np
import pytest
import torch
from safetensors import safe_open

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
