"""A user's mistake gets one clear line with value, place and fix, exit code 2, and nothing is overwritten."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.contract.stages import recipe, write_data, write_recipe
from zero2llm import cli
from zero2llm.core.config import json_schema
from zero2llm.core.files import new_folder
from zero2llm.data.pipeline.recipe import DataRecipe, load_data_recipe
from zero2llm.lab.recipe import load_recipe, make_recipe, recipe_schema
from zero2llm.lab.stage import run_stage


@pytest.fixture
def root(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path


def fails(capsys, monkeypatch, *args) -> str:
    """Run the command in this process; returns the one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["zero2llm", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


CASES = {
    "missing file": ("data.train=[nowhere.jsonl]", "nowhere.jsonl: no such file"),
    "unknown key": ("fit.stps=3", "unknown key 'fit.stps'; did you mean 'steps'"),
    "unknown preset": ("model.preset=qwen3-nanoo", "did you mean 'qwen3-nano'"),
    "heads": ("model.blocks.qwen3.mixer.n_kv_heads=3", "n_heads = 2 must be a multiple of n_kv_heads = 3"),
    "vocabulary": ("model.vocab_size=301", "has 300 tokens, model.vocab_size is 301"),
    "batch too large": ("batch_tokens=1048576", "one batch needs 32768: lower batch_tokens"),
    "batch does not divide": ("batch_tokens=100", "batch_tokens = 100 must be a multiple of seq_len = 32"),
    "no cuda": ("device=cuda", "device 'cuda' was asked for"),
    "wrong type": ("fit.steps=many", "fit.steps = 'many'"),
    "field": ("data.field=body", "text.jsonl, line 1: no field 'body'; it has: text"),
    "optimizer": ("optim.kind=sgdd", "sgdd"),
}


@pytest.mark.parametrize("case", CASES)
def test_recipe_faults(root, capsys, monkeypatch, case):
    override, message = CASES[case]
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    error = fails(capsys, monkeypatch, "train", write_recipe(root, "pretrain"), override, "--quiet")
    assert message in error
    assert not list((root / "pretrain").glob("checkpoints/*"))


def test_unknown_key_names_file_and_line(root, capsys, monkeypatch):
    path = write_recipe(root, "pretrain")
    path.write_text(path.read_text() + "sed: 3\n")
    line = len(path.read_text().splitlines())
    assert f"pretrain.yaml, line {line}: unknown key 'sed'; did you mean 'seed'?" in fails(capsys, monkeypatch, "train", path)


def test_bad_json_line_names_the_line_and_skipping_lists_it(root, capsys, monkeypatch):
    file = root / "data" / "text.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[6] = '{"text": "cut off'
    file.write_text("\n".join(lines), encoding="utf-8")
    error = fails(capsys, monkeypatch, "train", write_recipe(root, "pretrain"))
    assert "text.jsonl, line 7: not JSON" in error and "--skip-bad-records" in error
    run_stage(make_recipe(**recipe(root, "pretrain") | {"data": {**recipe(root, "pretrain")["data"], "skip_bad_records": True}}), overwrite=True, quiet=True)
    assert "line 7" in (root / "pretrain" / "data" / "bad_records.txt").read_text()


@pytest.mark.parametrize("content,message", [(b"", "the file is empty"), ("caf\u00e9".encode("latin-1"), "line 1: not UTF-8")])
def test_empty_and_foreign_files(root, capsys, monkeypatch, content, message):
    (root / "data" / "t.txt").write_bytes(content)
    error = fails(capsys, monkeypatch, "train", write_recipe(root, "pretrain"), f"data.train=[{root / 'data' / 't.txt'}]")
    assert message in error and "t.txt" in error


def test_a_used_folder_is_refused_and_kept(root, capsys, monkeypatch):
    (root / "pretrain").mkdir()
    (root / "pretrain" / "thesis.txt").write_text("years of work")
    assert "pass --resume" in fails(capsys, monkeypatch, "train", write_recipe(root, "pretrain"))
    assert (root / "pretrain" / "thesis.txt").read_text() == "years of work"
    assert "contradict" in fails(capsys, monkeypatch, "train", write_recipe(root, "pretrain"), "--resume", "--overwrite")


def test_full_disk_is_one_sentence_and_leaves_the_old_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("kept")
    with pytest.raises(ValueError, match="no space left while writing .*model; nothing was overwritten"):
        with new_folder(tmp_path / "model", overwrite=True) as part:
            (part / "new").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "model" / "old").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("verb", [("chat",), ("generate", "--prompt", "x"), ("export", "--out", "o")])
def test_no_checkpoint(tmp_path, capsys, monkeypatch, verb):
    assert "no such checkpoint folder" in fails(capsys, monkeypatch, verb[0], tmp_path / "none", *verb[1:])
    (tmp_path / "none").mkdir()
    assert "neither a checkpoint" in fails(capsys, monkeypatch, verb[0], tmp_path / "none", *verb[1:])


def test_an_impossible_option_is_one_line(tmp_path, capsys, monkeypatch):
    error = fails(capsys, monkeypatch, "generate", tmp_path, "--prompt", "x", "--temperature", "-1")
    assert "sampling needs temperature >= 0" in error and "temperature=-1.0" in error


def test_quickstart_refuses_a_foreign_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "x").write_text("mine")
    assert "no quickstart folder" in fails(capsys, monkeypatch, "quickstart", "--out", tmp_path)


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['zero2llm', '--help']\nfrom zero2llm import cli\ntry: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr


def test_importing_the_package_is_lazy_and_quiet():
    code = "import sys, zero2llm; assert 'torch' not in sys.modules; zero2llm.preset('gpt2'); print(sorted(dir(zero2llm))[0])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_schema_covers_every_field_and_accepts_the_shipped_recipes():
    schema = json.loads(recipe_schema())
    assert {"out", "init", "model", "data", "fit", "batch_tokens"} <= set(schema["properties"])
    assert "preset" in schema["$defs"]["ModelConfig"]["properties"]
    folder = os.path.join(os.path.dirname(cli.__file__), "recipes")
    for name in sorted(os.listdir(folder)):
        if name.endswith(".yaml"):
            load_recipe(os.path.join(folder, name))
    for name in sorted(os.listdir(os.path.join(folder, "data"))):
        load_data_recipe(os.path.join(folder, "data", name))
    assert {"sources", "steps", "splits"} <= set(json.loads(json_schema(DataRecipe))["properties"])


def test_every_configuration_field_is_read():
    """A key that parses and then does nothing is a lie: each field's name is read as an attribute somewhere."""
    import ast
    import dataclasses
    from pathlib import Path
    from typing import get_args, get_type_hints

    from zero2llm.lab.recipe import Recipe

    read = set()
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)

    seen = set()

    def visit(kind):
        for inner in get_args(kind):
            visit(inner)
        if dataclasses.is_dataclass(kind) and kind not in seen:
            seen.add(kind)
            for name, hint in get_type_hints(kind, include_extras=True).items():
                if not name.startswith("__"):
                    assert name in read, f"{kind.__name__}.{name} is read nowhere"
                    visit(hint)

    visit(Recipe)
    visit(DataRecipe)
    assert len(seen) > 15
