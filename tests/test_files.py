"""Files that are replaced whole or not at all, and text that does not depend on the locale."""

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import unetrpp
from unetrpp.files import read_json, replacing, write_json, write_text

PACKAGE = Path(unetrpp.__file__).parent


def test_text_is_utf_8_and_line_ends_are_kept(tmp_path):
    write_text(tmp_path / "a.csv", "Milz, 脾臓\r\n")
    assert (tmp_path / "a.csv").read_bytes() == "Milz, 脾臓\r\n".encode()
    write_json(tmp_path / "a.json", {"label": "脾臓"})
    assert read_json(tmp_path / "a.json") == {"label": "脾臓"}
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.json", "")
        with replacing(tmp_path / "weights") as partial:
            # As safetensors does: a file of its own, for its owner alone.
            os.close(os.open(tmp_path / "own", os.O_CREAT | os.O_WRONLY, 0o600))
            os.replace(tmp_path / "own", partial)
    finally:
        os.umask(before)
    for name in ("a.json", "weights"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="Windows needs a right to make links")
def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / ".partial.a").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_bytes() == b"kept"
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, stage):
    file = tmp_path / "volume.nii.gz"
    file.write_bytes(b"old")

    def fail(*arguments):
        raise OSError("disk full")

    if stage != "write":
        monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="disk full"), replacing(file) as partial:
        # Writers of images go by the ending.
        assert partial.name.endswith(".nii.gz") and partial.parent == tmp_path
        partial.write_bytes(b"half")
        if stage == "write":
            fail()
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == [file.name]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    with replacing(tmp_path / "a") as partial:
        left = partial
        partial.write_bytes(b"")
    left.write_bytes(b"half of a longer file")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["a"]


def text_is_opened_without_encoding(call: ast.Call) -> bool:
    name = getattr(call.func, "id", getattr(call.func, "attr", None))
    if name not in ("open", "read_text", "write_text"):
        return False
    # `files.write_text` knows one encoding only.
    if isinstance(call.func, ast.Name) and name == "write_text":
        return False
    words = [word.value for word in ast.walk(call) if isinstance(word, ast.Constant)]
    binary = name == "open" and any(word in ("rb", "wb", "ab", "r+b") for word in words)
    return not binary and "encoding" not in [keyword.arg for keyword in call.keywords]


def test_every_text_file_is_opened_as_utf_8():
    """Else non-ASCII names of labels and folders follow the locale, on Windows above all."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and text_is_opened_without_encoding(node)
    ]
    assert found == []
    assert text_is_opened_without_encoding(ast.parse("path.read_text()").body[0].value)
    assert text_is_opened_without_encoding(ast.parse("open(path, 'w')").body[0].value)


def test_labels_are_read_alike_under_every_locale(tmp_path):
    content = '{"channel_names": {"0": "MR"}, "labels": {"Hintergrund": 0, "脾臓": 1}}'
    (tmp_path / "dataset.json").write_text(content, encoding="utf-8")
    code = "import sys; from unetrpp.dataset import *; print(ascii(read_dataset_info(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path)],
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
    )
    assert r"'\u813e\u81d3': 1" in done.stdout, done.stderr
