"""Where nothing can be written, and where a fault was written down: one line that names the place, before any work."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from zero2llm.cli import app
from zero2llm.core import files
from zero2llm.core.files import full_disk, make_folder, new_file, new_folder, write_atomic
from zero2llm.lab.bring import find_foreign
from zero2llm.lab.recipe import load_recipe


def filled(place):
    with place as part:
        (part / "x" if part.is_dir() else part).write_text("y", encoding="utf-8")


@pytest.mark.parametrize("inside", ["", "a", "a/b"])
@pytest.mark.parametrize(
    "write",
    [make_folder, lambda p: write_atomic(p / "x.json", "{}"), lambda p: filled(new_file(p / "x")), lambda p: filled(new_folder(p / "x"))],
    ids=["folder", "text", "file", "filled"],
)
def test_a_file_where_a_folder_should_be(tmp_path, inside, write):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be made: \S*file is a file, not a folder; choose another place"):
        write(tmp_path / "file" / inside)
    assert [p.name for p in tmp_path.rglob("*")] == ["file"] and (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_folder_that_may_not_be_changed(tmp_path, monkeypatch):
    """Whoever runs the tests as root may change any."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    said = full_disk(PermissionError(errno.EACCES, "Permission denied"), tmp_path / "new" / "x")
    assert isinstance(said, ValueError) and f"{tmp_path} may not be changed" in str(said)
    other = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(files.os, "access", lambda path, mode: True)
    assert full_disk(other, tmp_path / "x") is other, "what could not be read is not blamed on the place to write"


def test_generated_files_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / "file" / "x.jsonl"
    done = CliRunner().invoke(app, ["data", "identity", "--name", "Nova", "--by", "me", "--out", str(out)])
    assert isinstance(done.exception, ValueError) and "is a file, not a folder" in str(done.exception)


@pytest.mark.parametrize(
    "given,words",
    [
        (["objective.kind=grppo"], ["command line, 'objective.kind=grppo': objective.kind = 'grppo' is not available; there are: 'clm'"]),
        (["adapter={kind: loar}"], ["command line, 'adapter={kind: loar}': adapter.kind = 'loar'", "'lora'"]),
        (["data.max_documents=-3"], ["data.max_documents = -3 must be positive"]),
        (["data.valid_rows=0"], ["data.valid_rows = 0 must be positive"]),
        (["data.train=[]"], ["sft.yaml, line", "and command line, 'data.train=[]': data: data.train is empty"]),
        (["adapter.kind=lora", "adapter.r=0"], ["command line: adapter: an adapter needs r = 0"]),
        (["seq_len=99999"], ["sft.yaml, line", "and command line, 'seq_len=99999': batch_tokens = 2048 must be a multiple of seq_len = 99999"]),
        (["fit.stepz=2"], ["unknown key 'fit.stepz'; did you mean 'steps'? known keys: "]),
    ],
)  # fmt: skip
def test_a_fault_on_the_command_line_is_found_there(given, words):
    with pytest.raises(ValueError) as said:
        load_recipe("sft", given)
    assert all(word in str(said.value) for word in words) and len(str(said.value).splitlines()) == 1, said.value


def test_folders_that_are_nobody_elses_model(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, so it is no folder that transformers wrote"):
        find_foreign(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="is a checkpoint of zero2llm already"):
        find_foreign(str(tmp_path))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a checkpoint of zero2llm already"):
        find_foreign(str(tmp_path / "run"))
