"""What an imported model says about answering, its end tokens and its sampling, reaches every descendant and every export."""

from __future__ import annotations

import json
import shutil

import pytest

import zero2llm
from tests.contract.stages import recipe, write_data
from tests.contract.test_import import theirs  # noqa: F401
from zero2llm.lab.bring import import_checkpoint
from zero2llm.lab.convert import export_checkpoint, merge_checkpoint
from zero2llm.lab.talk import load_engine
from zero2llm.lab.tokens import add_tokens
from zero2llm.train.checkpoint import Checkpoint, generation_of

LORA = {"adapter": {"kind": "lora", "r": 2, "alpha": 4}, "optim": {"kind": "adamw", "lr": 0.01}}


def tune(root, name, init, **changes):
    small = {"eval": {"every": 2, "prompts": []}, "fit": {"steps": 2, "micro_rows": 4}, "out": str(root / name), "init": str(init)}
    small["data"] = {"train": [str(root / "short.jsonl")], "valid_fraction": 0.2}
    zero2llm.run(zero2llm.make_recipe(**(recipe(root, "sft") | small | changes)), quiet=True)


def exported(path, out) -> dict:
    """generation_config.json of the export of ``path``."""
    export_checkpoint(path, out, "hf")
    return json.loads((out / "generation_config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(theirs, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("settings")
    write_data(root / "data")
    talks = [[{"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": f"sea {i}"}] for i in range(40)]
    (root / "short.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    import_checkpoint(str(theirs), root / "base")
    tune(root, "lora", root / "base", **LORA)
    tune(root, "full", root / "base")
    return root


def test_an_adapter_its_merge_and_what_follows(root, tmp_path):
    asked = exported(root / "base", tmp_path / "hf-base")
    assert asked["eos_token_id"][:2] == [0, 7] and (asked["temperature"], asked["top_p"]) == (0.4, 0.9)
    assert exported(root / "lora", tmp_path / "hf-lora") == asked
    merge_checkpoint(root / "lora", tmp_path / "merged")
    assert generation_of(tmp_path / "merged") == generation_of(root / "base") and Checkpoint.open(tmp_path / "merged").verify()
    assert exported(tmp_path / "merged", tmp_path / "hf-merged") == asked
    tune(root, "again", tmp_path / "merged", chat_template="chatml")
    assert exported(root / "again", tmp_path / "hf-again") == asked
    for path in (root / "lora", tmp_path / "merged", root / "again"):
        assert load_engine(path).tokenizer.stop_ids == load_engine(root / "base").tokenizer.stop_ids >= {0, 7}


def test_a_fine_tuned_model_needs_no_parent(root, tmp_path):
    shutil.copytree(root / "full", tmp_path / "full")
    run = json.loads((tmp_path / "full" / "recipe.json").read_text(encoding="utf-8"))
    assert exported(tmp_path / "full", tmp_path / "hf") == exported(root / "base", tmp_path / "base") and run["init"]
    add_tokens(tmp_path / "full", ["<|more|>"], tmp_path / "more", special=True, overwrite=False)
    assert generation_of(tmp_path / "more") == generation_of(root / "base")


def test_a_parent_that_goes_while_training(root, tmp_path, monkeypatch):
    """A parent's run may prune the checkpoint that this one began with."""
    shutil.copytree(root / "base", tmp_path / "base")
    from zero2llm.train import hooks

    right = hooks.save_checkpoint

    def save(*args, **what):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        return right(*args, **what)

    monkeypatch.setattr(hooks, "save_checkpoint", save)
    tune(root, "orphan", tmp_path / "base")
    assert not (tmp_path / "base").exists()
    assert exported(root / "orphan", tmp_path / "hf") == exported(root / "base", tmp_path / "hf-base")


def test_what_an_export_cannot_say_is_named(root, tmp_path, capsys):
    shutil.copytree(root / "base", tmp_path / "base")
    given = generation_of(tmp_path / "base") | {"no_repeat_ngram_size": 3}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(given), encoding="utf-8")
    manifest = json.loads((tmp_path / "base" / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]["generation_config.json"]
    (tmp_path / "base" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "no_repeat_ngram_size" not in exported(tmp_path / "base", tmp_path / "hf")
    assert "no_repeat_ngram_size = 3" in capsys.readouterr().out


def test_a_model_of_ones_own_has_none(root, tmp_path):
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain", fit={"steps": 2, "micro_rows": 4})), quiet=True)
    made = Checkpoint.open(root / "pretrain")
    assert generation_of(made.path) == {} and not (made.path / "generation_config.json").exists()
