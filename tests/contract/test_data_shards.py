"""Token files: whole or absent, checked, reused; splits by content; conversations and pairs as masked items."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest

from zero2llm.data.chats import conversation_items, pair_items
from zero2llm.data.schemas import Preference, conversations, preferences
from zero2llm.data.shards import TokenShards, build_shards, document_items, share, split_documents
from zero2llm.data.sources import BadRecords, documents
from zero2llm.tokenizers.tokenizer import Tokenizer


class Bytes:
    """A tokenizer of single bytes: id = byte + 2, 0 ends documents and turns, 1 is padding."""

    bos_id, eos_id, pad_id = 0, 0, 1

    def __init__(self, vocab_size=258, name="bytes"):
        self.vocab_size, self.name = vocab_size, name

    def encode(self, text): return [b + 2 for b in text.encode()]
    def encode_batch(self, texts): return [self.encode(t) for t in texts]
    def decode(self, ids): return bytes(i - 2 for i in ids if i > 1).decode()
    def byte_lengths(self): return [0, 0] + [1] * (self.vocab_size - 2)
    def fingerprint(self): return self.name

    def render(self, messages, add_generation_prompt=False):
        ids, mask = [], []
        for m in messages:
            head, body = self.encode(m["role"][0] + ":"), [*self.encode(m["content"]), 0]
            ids, mask = ids + head + body, mask + [0] * len(head) + [int(m["role"] == "assistant")] * len(body)
        return ids + self.encode("a:") * add_generation_prompt, mask + [0, 0] * add_generation_prompt


@cache
def bpe():
    return Tokenizer.train(["hello there\n\n\n\nwhat is it\n\n\nanswer\n\n\n" * 50], 280)


TEXTS = ["first", "第二篇", "x", "the last one"]


def build(tmp_path, tokenizer=None, key="k", texts=TEXTS, name="data"):
    tokenizer = tokenizer or Bytes()
    return build_shards(document_items(texts, tokenizer, batch=3), tmp_path / name, tokenizer=tokenizer, key=key, kind="clm")


def test_documents_come_back(tmp_path):
    shards, tokenizer = build(tmp_path), Bytes()
    assert len(shards) == 4 and shards.tokens[:1].dtype == np.uint16 and shards.mask is None
    for i, text in enumerate(TEXTS):
        item = shards.tokens[shards.offsets[i] : shards.offsets[i + 1]].tolist()
        assert item == [tokenizer.eos_id, *tokenizer.encode(text)]
    assert shards.manifest["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert shards.manifest["tokens"] == shards.manifest["text_bytes"] + 4
    shards.close()


@pytest.mark.parametrize("vocab, dtype", [(65_536, "uint16"), (65_537, "uint32"), (200_000, "uint32")])
def test_ids_are_stored_wide_enough(tmp_path, vocab, dtype):
    ids = [0, vocab - 1, 5]
    shards = build_shards([(ids, None)], tmp_path / "data", tokenizer=Bytes(vocab), key="k", kind="clm")
    assert shards.tokens[:].dtype == dtype and shards.tokens[:].tolist() == ids
    shards.close()
    with pytest.raises(ValueError, match=f"item 1 .*{vocab}"):
        build_shards([([1], None), ([vocab], None)], tmp_path / "b", tokenizer=Bytes(vocab), key="k", kind="clm")
    assert not (tmp_path / "b").exists()


def test_reuse_by_key_and_tokenizer(tmp_path):
    def never():
        raise AssertionError("the items were read again")
        yield

    build(tmp_path).close()
    build_shards(never(), tmp_path / "data", tokenizer=Bytes(), key="k", kind="clm").close()
    again = build(tmp_path, key="other", texts=["new"])
    assert len(again) == 1
    again.close()
    another = build(tmp_path, tokenizer=Bytes(name="another"), key="other", texts=["new", "newer"])
    assert len(another) == 2
    another.close()


def test_wrong_tokenizer_and_damage_are_refused(tmp_path):
    build(tmp_path).close()
    folder = tmp_path / "data"
    TokenShards.open(folder, "bytes", verify=True).close()
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenShards.open(folder, "another")
    whole = (folder / "tokens-00000.bin").read_bytes()
    flipped = bytearray(whole)
    flipped[7] ^= 1
    (folder / "tokens-00000.bin").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin.*sha256"):
        TokenShards.open(folder, verify=True)
    (folder / "tokens-00000.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin.*cut short"):
        TokenShards.open(folder)
    (folder / "tokens-00000.bin").write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, word in [({"format": 99}, "format 99"), ({"sizes": None}, "lacks sizes")]:
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in (manifest | change).items() if v is not None}))
        with pytest.raises(ValueError, match=word):
            TokenShards.open(folder)


def test_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"step": 1}')  # a checkpoint has one too
    with pytest.raises(ValueError, match="other files"):
        build(tmp_path)
    assert (tmp_path / "data" / "manifest.json").read_text() == '{"step": 1}'


@pytest.mark.parametrize(
    "items, word",
    [
        ([], "no usable record"),
        ([([], None)], "no token"),
        ([([3, 4], [1])], "mask of 1"),
        ([([3], None), ([3], [1])], "1 of 2 items"),
        ([([-1], None)], "outside"),
    ],
)
def test_malformed_items(tmp_path, items, word):
    with pytest.raises(ValueError, match=word):
        build_shards(items, tmp_path / "data", tokenizer=Bytes(), key="k", kind="sft")
    assert not list(tmp_path.iterdir())


def test_killed_while_writing_leaves_nothing_that_opens(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[2])
from test_data_shards import Bytes, build_shards
from pathlib import Path
def items():
    for i in range(10**9):
        yield [5] * 100, None
        if i == 20000:
            print("writing", flush=True)
build_shards(items(), Path(sys.argv[1]) / "data", tokenizer=Bytes(), key="k", kind="clm")
"""
    here = os.path.dirname(os.path.abspath(__file__))
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), here], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "writing"
    finally:
        child.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        child.wait()
        child.stdout.close()
    time.sleep(0.05)
    assert not (tmp_path / "data").exists()
    with build(tmp_path).path.joinpath("manifest.json").open() as file:
        assert json.load(file)["items"] == 4


def test_split_has_no_leak_and_does_not_move():
    texts = [f"document {i % 700}" for i in range(1000)]  # 300 stand twice
    train, valid = split_documents(texts, 0.2)
    assert not set(train) & set(valid) and len(train) + len(valid) == 1000
    assert 0.15 < len(set(valid)) / 700 < 0.25
    assert split_documents(list(reversed(texts)), 0.2) == (train[::-1], valid[::-1])
    more, _ = split_documents([*texts, "new"], 0.2)
    assert more[: len(train)] == train
    # from hashlib alone; Python's own hash() would differ in every process
    assert share("document 0") == pytest.approx(int("19e6bd2cd5bf6096", 16) / 2**64)


def U(text): return {"role": "user", "content": text}
def A(text): return {"role": "assistant", "content": text}


def test_conversations_keep_whole_turns(tmp_path):
    tokenizer, messages = Bytes(), [U("one"), A("1"), U("two"), A("22")]
    full = len(tokenizer.render(messages)[0])
    for max_len, kept in ((full, 4), (full - 1, 2), (len(tokenizer.render(messages[:2])[0]), 2)):
        ((ids, mask),) = conversation_items([messages], tokenizer, max_len, BadRecords())
        assert (ids, mask) == tokenizer.render(messages[:kept]) and any(mask)
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "response": "a"}\n' + json.dumps({"prompt": "q" * 99, "response": "a"}))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no answer fits into 50 tokens"):
        list(conversation_items(conversations([str(file)], BadRecords()), tokenizer, 50, BadRecords()))
    bad = BadRecords(skip=True)
    assert len(list(conversation_items(conversations([str(file)], bad), tokenizer, 50, bad))) == 1 and len(bad.found) == 1


def test_a_template_that_marks_nothing_is_named():
    class Silent(Bytes):
        def render(self, messages, add_generation_prompt=False):
            ids, _ = super().render(messages, add_generation_prompt)
            return ids, [0] * len(ids)

    with pytest.raises(ValueError, match="generation"):
        list(conversation_items([[U("q"), A("a")]], Silent(), 50, BadRecords()))
    with pytest.raises(ValueError, match="pair 1: .*generation"):
        list(pair_items([Preference([U("q")], [A("a")], [A("b")])], Silent(), 50, BadRecords()))


@pytest.mark.parametrize("answer", ["fine", "\n\nfine", "\n", " x", "<|im_end|>", "多行\n答"])
def test_pairs_train_the_completion_and_its_end_only(answer):
    """An answer that begins with line breaks melts with the header's own one: the cut must not lie there."""
    tokenizer, prompt = bpe(), [U("q"), A("earlier answer"), U("what is it")]
    pair = Preference(prompt, [A(answer)], [A("no")])
    (ids, mask), (_, other) = pair_items([pair], tokenizer, 200, BadRecords())
    assert ids == tokenizer.render([*prompt, A(answer)])[0]
    assert not any(mask[: len(tokenizer.render(prompt)[0])])  # the earlier answer is prompt here
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(trained, skip_special=True).strip("\n") == answer.strip("\n")
    assert trained[-1] == tokenizer.im_end_id and sum(other) >= 2


def test_a_pair_that_does_not_fit_goes_whole(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b" * 90}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    bad = BadRecords(skip=True)
    assert len(list(pair_items(preferences([str(file)], bad), Bytes(), 40, bad))) == 2
    assert "p.jsonl, line 1: 97 tokens do not fit into 40" in bad.found[0]


def test_real_tokenizer_counts_the_bytes_of_the_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    shards = build_shards(document_items(documents([str(file)]), bpe()), tmp_path / "data", tokenizer=bpe(), key="k", kind="clm")
    assert shards.manifest["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    shards.close()
