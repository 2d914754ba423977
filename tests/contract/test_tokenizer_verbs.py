"""`zero2llm tokenizer`: what each verb shows, writes and refuses; more tokens for a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from zero2llm.cli import app
from zero2llm.core.seq import Seq
from zero2llm.data.sources import documents
from zero2llm.lab.token_compare import domains, language, named
from zero2llm.lab.token_view import GROUPS, rows, select
from zero2llm.model.resize import resized
from zero2llm.tokenizers.bytes import SPLITS
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

TEXT = "embedded:zh_poetry_small"


def run(*args: str) -> str:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["tokenizer", *map(str, args)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "own"
    texts = list(documents([TEXT]))[:200] + list(documents(["embedded:en_moby_dick"]))[:8]
    Tokenizer.train(texts, 1500).save(path)
    return path


@pytest.mark.parametrize("kind,engine,size", [("bpe", "handwritten", 300), ("bpe", "library", 300), ("wordpiece", "library", 900), ("unigram", "library", 700)])
def test_train(kind, engine, size, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(list(documents(["embedded:en_moby_dick"]))[:6]), encoding="utf-8")
    out = run("train", tmp_path / "a.txt", "--out", tmp_path / "t", "--vocab-size", size, "--kind", kind, "--engine", engine)
    assert f"{size} tokens" in out and ("may not come back" in out) == (kind == "wordpiece")
    assert Tokenizer.load(tmp_path / "t").vocab_size == size
    with pytest.raises(ValueError, match="already exists"):
        run("train", tmp_path / "a.txt", "--out", tmp_path / "t", "--vocab-size", size, "--kind", kind, "--engine", engine)


@pytest.mark.parametrize(
    "options,match",
    [
        (["--kind", "bpi"], "kind 'bpi' is unknown; there are: bpe, wordpiece, unigram"),
        (["--engine", "fast"], "engine 'fast' is unknown; use handwritten or library or rustbpe"),
        (["--kind", "unigram", "--engine", "rustbpe"], "use handwritten or library"),
        (["--split", "gpt5"], "split rule 'gpt5' is unknown"),
        (["--vocab-size", "100"], "must be at least 260"),
        (["--kind", "unigram", "--engine", "library", "--vocab-size", "200"], "must be more than 260"),
    ],
)
def test_train_refuses(options, match, tmp_path):
    (tmp_path / "a.txt").write_text("the cat", encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        run("train", tmp_path / "a.txt", "--out", tmp_path / "t", *options)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "kind,engine,match",
    [
        ("wordpiece", "handwritten", r"raise vocab_size by \d+"),
        ("wordpiece", "library", "cannot hold the text's characters: it must be at least"),
        ("unigram", "handwritten", r"raise vocab_size by \d+"),
        ("unigram", "library", "cannot hold 260 control tokens and bytes and the text's characters"),
    ],
)
def test_a_size_below_the_number_of_characters_says_what_it_takes(kind, engine, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        run("train", TEXT, "--out", tmp_path / "t", "--vocab-size", 1000, "--kind", kind, "--engine", engine)
    if engine == "handwritten":  # the number that it names is enough
        more = int(str(error.value).split("raise vocab_size by ")[1].split(",")[0])
        assert f"{1000 + more} tokens" in run("train", TEXT, "--out", tmp_path / "t", "--vocab-size", 1000 + more, "--kind", kind)


def test_bad_records_are_left_out_where_asked(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the sea, the sea"}\n{"x": 1}\n', encoding="utf-8")
    for verb in (["train", tmp_path / "a.jsonl", "--out", tmp_path / "t", "--vocab-size", 262], ["view", folder, "--text", tmp_path / "a.jsonl"],
                 ["compare", folder, "--text", tmp_path / "a.jsonl"]):  # fmt: skip
        with pytest.raises(ValueError, match="line 2: no field 'text'.*--skip-bad-records"):
            run(*verb)
        assert "left out: " in run(*verb, "--skip-bad-records")


def test_encode_shows_ids_readable_forms_and_bytes(folder):
    out = run("encode", folder, "to the 你 [b]")
    assert out.startswith("to·the·") and out.splitlines()[0].endswith("·[b]")  # what looks like markup is text
    assert "bytes per token" in out and "20 74 68 65" in out and "14 bytes" in out


def test_encode_says_when_a_text_does_not_come_back(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(list(documents(["embedded:en_moby_dick"]))[:3]), encoding="utf-8")
    run("train", tmp_path / "a.txt", "--out", tmp_path / "t", "--vocab-size", 500, "--kind", "wordpiece", "--engine", "library")
    assert "it comes back as" in run("encode", tmp_path / "t", "the  whale")


def test_view_explains_and_shows(folder, tmp_path):
    out = run("view", folder, "--text", TEXT, "--sort", "frequency", "--limit", "5", "--html", tmp_path / "v.html")
    assert "garbled" in out and "e4 bd a0" in out.replace("\n", " ") and "乱码" in out
    page = (tmp_path / "v.html").read_text(encoding="utf-8")
    assert page.count("<tr>") >= 1500 and "ä½ł" in page and "<script" not in page and "http" not in page.split("</style>")[1]
    tokenizer = Tokenizer.load(folder)
    every = rows(tokenizer)
    assert {row.group for row in every} <= set(GROUPS) and [row.id for row in every] == list(range(1500))
    whole = next(row for row in every if row.group == "chinese")
    assert whole.raw != whole.shown and len(whole.shown) >= 1 and "\\x" not in whole.shown
    assert all("\\x" in row.shown for row in every if row.group == "part")
    assert every[0].group == "control" and every[0].shown == "<|endoftext|>"


def test_view_finds(folder):
    every = rows(Tokenizer.load(folder))
    assert [row.id for row in select(every, None, "300:303", "id")] == [300, 301, 302] and len(select(every, None, "7", "id")) == 1
    assert all("the" in row.shown for row in select(every, "the", None, "id")) and select(every, "the", None, "id")
    assert select(every, " the", None, "id") and select(every, "e4 bd", None, "id")
    assert [len(row.hex) for row in select(every, None, None, "length")[:2]] == sorted((len(row.hex) for row in every), reverse=True)[:2]
    with pytest.raises(ValueError, match="--ids x"):
        select(every, None, "x", "id")


def test_view_shows_how_a_token_was_merged(folder):
    tokenizer = Tokenizer.load(folder)
    token = max(range(tokenizer.vocab_size), key=lambda i: len(tokenizer.pieces[i]) if i > 3 else 0)
    out = run("view", folder, "--token", str(token))
    leaves = [line for line in out.splitlines() if "merge" not in line]
    assert len(leaves) == len(tokenizer.pieces[token]) and f"{token}" in out.splitlines()[0]
    with pytest.raises(ValueError, match="tokens: .*name one by its id"):
        run("view", folder, "--token", "no such token at all")
    with pytest.raises(ValueError, match="--sort frequency needs a text"):
        run("view", folder, "--sort", "frequency")


def test_a_vocabulary_without_merges_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(list(documents(["embedded:en_moby_dick"]))[:4]), encoding="utf-8")
    run("train", tmp_path / "a.txt", "--out", tmp_path / "t", "--vocab-size", 700, "--kind", "unigram", "--engine", "library")
    with pytest.raises(ValueError, match="Unigram has no merges"):
        run("view", tmp_path / "t", "--token", "300")
    assert "form: blanks. The file holds characters; <0xE4> is one byte" in run("view", tmp_path / "t", "--limit", "3")
    run("train", tmp_path / "a.txt", "--out", tmp_path / "w", "--vocab-size", 700, "--kind", "wordpiece", "--engine", "library")
    with pytest.raises(ValueError, match="WordPiece has no merges: its file keeps the pieces"):
        run("view", tmp_path / "w", "--token", "300")
    assert "one that begins with ## goes on with the word" in run("view", tmp_path / "w", "--limit", "3")


def test_compare(folder, tmp_path):
    (tmp_path / "en.txt").write_text("The whale. " * 50, encoding="utf-8")
    out = run("compare", folder, f"small={folder}", "--text", tmp_path / "en.txt", "--text", TEXT, "--sample-bytes", "9000", "--speed",
              "--html", tmp_path / "c.html")  # fmt: skip
    assert "en.txt" in out and "small" in out and "100%" in out and "all zh" in out and "MB/s" in out
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "<svg" in page and "tokens/character" in page and "<script" not in page
    tokenizer, text = Tokenizer.load(folder), "The whale. " * 50
    assert f"{len(text) / len(tokenizer.encode(text)):.2f}" in out
    assert [d.language for d in domains([], 3000, "text")] == ["Latin", "Latin", "zh", "zh", "zh"]
    assert language("Привет мир") == "other" and named(["a/b", "x=a/b"]) == {"b": "a/b", "x": "a/b"}
    with pytest.raises(ValueError, match="two tokenizers are called 'b'"):
        named(["a/b", "c/b"])


def test_texts_of_one_name_are_told_apart(folder, tmp_path):
    for place, text in (("a", "The whale. " * 9), ("b", "关关雎鸠。" * 9)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.txt").write_text(text, encoding="utf-8")
    both = [str(tmp_path / place / "x.txt") for place in "ab"]
    assert [(d.name, d.language) for d in domains(both, 99, "text")] == [(both[0], "Latin"), (both[1], "zh")]
    with pytest.raises(ValueError, match="is given twice"):
        domains([both[0], both[0]], 99, "text")
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        domains([str(tmp_path / "a.jsonl")], 99, "text", skip=True)


def test_convert(folder, tmp_path):
    out = run("convert", folder, "--out", tmp_path / "x.tiktoken", "--to", "tiktoken")
    assert "pat_str" in out and "<|im_end|>" in out
    assert repr(SPLITS["qwen2"]) in CliRunner().invoke(app, ["tokenizer", "convert", str(folder), "--out", str(tmp_path / "y"), "--to", "tiktoken"]).output
    run("convert", tmp_path / "x.tiktoken", "--split", "qwen2", "--out", tmp_path / "back")
    ours, back = Tokenizer.load(folder), Tokenizer.load(tmp_path / "back")
    for text in documents([TEXT]):
        assert ours.encode(text) == back.encode(text)
    with pytest.raises(ValueError, match="already exists"):
        run("convert", folder, "--out", tmp_path / "x.tiktoken", "--to", "tiktoken")


def test_what_ranks_leave_to_tiktoken_s_caller_is_told(folder, tmp_path):
    data = json.loads(Tokenizer.load(folder).add_tokens(["<think>"]).library.to_str()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    out = run("convert", tmp_path, "--out", tmp_path / "x.tiktoken", "--to", "tiktoken")
    assert "unicodedata.normalize('NFC', text)" in out and "<think>: found in text only with" in out
    assert "note" not in run("convert", folder, "--out", tmp_path / "y.tiktoken", "--to", "tiktoken")


def test_a_rule_that_is_none_of_ours_is_told(folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert "will need its name" in run("convert", tmp_path, "--out", tmp_path / "out").replace("\n", " ")
    with pytest.raises(ValueError, match="no tiktoken file can say what this tokenizer does"):
        run("convert", tmp_path, "--out", tmp_path / "x.tiktoken", "--to", "tiktoken")


# -------------------------------------------------------------------------------------------- more tokens for a model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[bool, Path]:
    """Tied and untied, written as training writes them."""
    from zero2llm.core.config import parse
    from zero2llm.core.seeds import seed_all
    from zero2llm.model.lm import LM
    from zero2llm.model.spec import ModelConfig
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.optim.build import build_optim
    from zero2llm.train.checkpoint import save_checkpoint
    from zero2llm.train.fit import FitState

    class Nothing:
        def state_dict(self):
            return {}

    root, out = tmp_path_factory.mktemp("runs"), {}
    Tokenizer.train(["the cat sat on the mat and a whale sang " * 9, "你好"], 280).save(root / "tokenizer")
    for tied in (True, False):
        seed_all(0)
        block = {"mixer": {"kind": "gqa", "n_heads": 2}, "ffn": {"kind": "glu", "hidden": 32}}
        data = {"vocab_size": 280, "d_model": 16, "max_len": 64, "layers": {"pattern": ["a"]}, "blocks": {"a": block}, "tie_embeddings": tied}
        model = LM(parse(ModelConfig, data))
        optim = build_optim(model, AdamWConfig())
        out[tied] = save_checkpoint(root / str(tied), model, root / "tokenizer", FitState(), optim, Nothing(), parent=None, metrics={})
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_add_keeps_everything_and_starts_from_the_mean(checkpoint, tied, tmp_path):
    out = run("add", checkpoint[tied], "<think>", "</think>", "--out", tmp_path / "more", "--special")
    assert "ids 280 to 281, a vocabulary of 282" in out
    old, new = Checkpoint.open(checkpoint[tied]), Checkpoint.open(tmp_path / "more")
    a, b = old.load_model(), new.load_model()
    ids = torch.tensor([[0, 100, 150, 279, 30]])
    with torch.no_grad():
        before, after = a.logits(a(ids, Seq.rows(1, 5))[0]), b.logits(b(ids, Seq.rows(1, 5))[0])
    assert torch.equal(before, after[..., :280]) and after.shape[-1] == 282
    torch.testing.assert_close(after[..., 280], before.mean(-1), atol=1e-6, rtol=1e-5)
    for name, tensor in a.state_dict().items():
        grown = b.state_dict()[name]
        assert torch.equal(grown[: len(tensor)] if grown.shape != tensor.shape else grown, tensor), name
    tokenizer = Tokenizer.load(new.tokenizer_dir)
    assert tokenizer.vocab_size == b.cfg.vocab_size == 282 and new.manifest["parent"] == str(checkpoint[tied])
    assert {280, 281} <= tokenizer.special_ids and tokenizer.encode("the cat") == Tokenizer.load(old.tokenizer_dir).encode("the cat")


def test_rows_that_no_token_used_are_filled_too(checkpoint):
    model = Checkpoint.open(checkpoint[False]).load_model()
    grown = resized(model, 270, 300)
    mean = model.head.weight[:270].mean(0)
    torch.testing.assert_close(grown.head.weight[270:], mean.expand(30, -1), atol=1e-6, rtol=1e-5)
    for used, size in ((270, 200), (281, 300), (0, 300)):
        with pytest.raises(ValueError, match="can only grow"):
            resized(model, used, size)


def test_a_token_that_is_there_is_refused_and_nothing_is_written(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="there already"):
        run("add", checkpoint[True], "<|im_end|>", "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="there already"):  # its file spells it Ġthe
        run("add", checkpoint[True], " the", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_grown_checkpoint_begins_a_stage(tmp_path):
    from tests.contract.stages import write_data, write_recipe
    from zero2llm.lab.recipe import load_recipe
    from zero2llm.lab.stage import run_stage

    write_data(tmp_path / "data")
    run_stage(load_recipe(write_recipe(tmp_path, "pretrain"), ["fit.steps=2"]), quiet=True)
    run("add", tmp_path / "pretrain", "<x>", "--out", tmp_path / "more")
    (tmp_path / "pretrain" / "tokenizer").rename(tmp_path / "elsewhere")  # as where the recipe names a folder
    assert run("encode", tmp_path / "pretrain", "a whale") == run("encode", tmp_path / "elsewhere", "a whale")
    result = run_stage(load_recipe(write_recipe(tmp_path, "sft", init=str(tmp_path / "more")), ["fit.steps=2"]), quiet=True)
    assert result.model.cfg.vocab_size == 301 == result.tokenizer.vocab_size


def test_another_chat_template(folder, tmp_path):
    more = Tokenizer.load(folder).add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"], special=True)
    more.save(tmp_path / "more")
    run("convert", tmp_path / "more", "--template", "qwen3", "--out", tmp_path / "qwen3")
    assert "tool_call" in Tokenizer.load(tmp_path / "qwen3").template
    with pytest.raises(ValueError, match="needs the control tokens <think>, "):
        run("convert", folder, "--template", "qwen3", "--out", tmp_path / "x")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own.jinja writes <\|user\|>"):
        run("convert", folder, "--template", tmp_path / "own.jinja", "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="no file and none of: chatml"):
        run("convert", folder, "--template", "qwen9", "--out", tmp_path / "x")
    gemma = more.add_tokens(["<bos>", "<start_of_turn>", "<end_of_turn>"], special=True)
    gemma.save(tmp_path / "g")
    run("convert", tmp_path / "g", "--template", "gemma", "--out", tmp_path / "gemma")
    again = Tokenizer.load(tmp_path / "gemma")
    assert again.library.token_to_id("<end_of_turn>") in again.stop_ids and again.stop_ids > more.stop_ids
