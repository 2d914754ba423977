"""`zero2llm import` from folders of Hugging Face: what comes along, and what is refused with one sentence and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zero2llm.cli import app
from zero2llm.core.seq import Seq
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

TEXTS = ["the sea and the ship and the whale " * 20, "一二三四五六七八九十" * 20]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """As transformers saves it: several shards with an index, generation settings, a tokenizer with a template."""
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.save(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, tie_word_embeddings=False, **sizes))
    model.generation_config.update(do_sample=True, temperature=0.4, top_p=0.9, eos_token_id=[0, 7])
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def call(*args) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["import", *map(str, args)])
    if isinstance(done.exception, ValueError):  # what the command line prints as one line
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_weights_tokenizer_and_settings_come_along(theirs, tmp_path):
    code, said = call(theirs, "--out", tmp_path / "ours")
    assert code == 0 and "2 layers of 32" in said
    made = Checkpoint.open(tmp_path / "ours")
    model, tokenizer = made.load_model(), Tokenizer.load(made.tokenizer_dir)
    ids = torch.tensor([tokenizer.encode("the ship and the sea")])
    with torch.no_grad():
        ours = model.logits(model(ids, Seq.rows(*ids.shape))[0])
        want = AutoModelForCausalLM.from_pretrained(theirs).eval()(ids).logits
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)
    assert tokenizer.stop_ids >= {0, 7}, "answers end where theirs do"
    assert json.loads((made.path / "generation_config.json").read_text(encoding="utf-8"))["temperature"] == 0.4
    code, said = call(theirs, "--out", tmp_path / "ours")
    assert code == 2 and "already exists" in said


def halves(folder):
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()


def short(folder):
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-100])


def no_config(folder):
    (folder / "config.json").unlink()


def foreign_tokenizer(folder):
    Tokenizer.train([*TEXTS, *(f"harpoon number {i}" for i in range(99))], 310).save(folder)


def no_such_stop(folder):
    data = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(data | {"eos_token_id": [0, 999]}), encoding="utf-8")


def too_wide(folder):
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(data | {"intermediate_size": 96}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage,words",
    [
        (halves, "safetensors"), (short, "safetensors"), (no_config, "config.json"), (foreign_tokenizer, "another model's"),
        (no_such_stop, "eos_token_id 999"), (too_wide, "tensors do not fit"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named_and_nothing_is_written(theirs, tmp_path, damage, words):
    shutil.copytree(theirs, tmp_path / "bad")
    damage(tmp_path / "bad")
    code, said = call(tmp_path / "bad", "--out", tmp_path / "ours")
    assert code == 2 and words in said and "bad" in said, said
    assert not (tmp_path / "ours").exists() and [p.name for p in tmp_path.iterdir()] == ["bad"]


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_a_pickle_with_code_runs_none_of_it(theirs, tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "executed")
    shutil.copytree(theirs, tmp_path / "bad", ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "bad" / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": evil}))
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model.embed_tokens.weight": evil}))
    for source in (tmp_path / "bad", tmp_path / "code.pth"):
        code, said = call(source, "--out", tmp_path / "ours")
        assert code == 2 and str(source) in said, said
    assert not (tmp_path / "executed").exists() and not (tmp_path / "ours").exists()
