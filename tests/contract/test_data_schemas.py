"""Every record shape in the wild: told apart by keys or named, kept whole, or refused with one clear reason; and as items."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.data import chats, schemas, shapes, turns
from zero2llm.data.chats import (
    conversation_item,
    conversation_items,
    image_items,
    judged_items,
    pair_items,
    prompt_items,
)
from zero2llm.data.pictures import image_path
from zero2llm.data.schemas import (
    SCHEMAS,
    Preference,
    as_conversation,
    as_messages,
    as_preference,
    conversations,
    describe,
    detect,
    image_texts,
    judged,
    parse,
    parse_all,
    prompts,
)
from zero2llm.data.sources import BadRecords
from zero2llm.data.token_writer import TokenWriter
from zero2llm.tokenizers.chat import Style
from zero2llm.tokenizers.shipped import shipped
from zero2llm.tokenizers.tokenizer import Tokenizer


def S(text): return {"role": "system", "content": text}
def U(text): return {"role": "user", "content": text}
def A(text, **more): return {"role": "assistant", "content": text, **more}
def T(text): return {"role": "tool", "content": text}


def lines(path, *records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return [str(path)]


TOOL = {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}
CALL = {"name": "weather", "arguments": {"city": "北京"}}
DIALOGUE = [U("q"), A("a")]

DETECTED = {
    "text": [{"text": "一篇"}, {"text": "x", "id": 3, "meta": {"source": "web"}}, {"text": "x", "messages": None}],
    "conversation": [{"messages": DIALOGUE}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"messages": DIALOGUE, "prompt": "q", "prompt_id": "7"}],
    "single-turn": [{"prompt": "q", "response": "a"}, {"instruction": "i", "input": "", "output": "o"}, {"prompt": "q", "completion": "a"}],
    "preference": [{"chosen": DIALOGUE, "rejected": [U("q"), A("b")]}, {"prompt": "q", "chosen": "a", "rejected": "b"}],
    "unpaired": [{"prompt": "q", "completion": "a", "label": True}, {"prompt": [U("q")], "completion": [A("a")], "label": False}],
    "prompt": [{"prompt": "1+1", "answer": "2"}, {"prompt": [U("q")]}, {"prompt": "1+1", "answer": 2}],
    "agent": [{"conversations": [U("q"), A("")], "gt": ["7"]}],
    "image-text": [{"image": "a.jpg", "conversations": [U("<image>\nq"), A("a")]}, {"images": ["a.jpg"], "messages": [U("<image>q"), A("a")]}],
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_schema_is_told_by_its_keys(name):
    for record in DETECTED[name]:
        assert detect(record) == name
        assert parse(record) == parse(record, schema=name)
    assert SCHEMAS[name].about in describe(name) and "+".join(SCHEMAS[name].keys[0]) in describe(name)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": "x", "messages": DIALOGUE}, ["fits text and conversation", "it has: text, messages", "single-turn: instruction+output"]),
        ({"instruction": "i", "output": "o", "text": "both"}, ["fits text and single-turn"]),
        ({"messages": DIALOGUE, "chosen": "a", "rejected": "b"}, ["fits conversation and preference"]),
        ({"body": "x", "title": 1}, ["fits no schema", "it has: body, title", "text: text", "unpaired: prompt+completion+label"]),
        ({}, ["fits no schema", "nothing"]),
        (["x"], ["an object was expected, this is a list"]),
        ("x", ["this is a str"]),
        (None, ["NoneType"]),
    ],
)
def test_nothing_is_guessed(record, words):
    with pytest.raises(ValueError) as caught:
        parse(record)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_named_schema_is_taken_at_its_word():
    record = {"text": "<chat>", "messages": DIALOGUE, "prompt": "q", "response": "other"}
    assert parse(record, schema="text") == "<chat>" and parse(record, schema="conversation") == DIALOGUE
    assert parse(record, schema="single-turn") == [U("q"), A("other")]
    assert parse(record, schema="prompt").messages == [U("q")]
    with pytest.raises(ValueError, match="no schema 'chat'; there are: text, conversation"):
        parse(record, schema="chat")
    with pytest.raises(ValueError, match="needed"):
        parse(record, schema="agent")


def test_readers_take_a_name_too(tmp_path):
    both = lines(tmp_path / "a.jsonl", {"messages": DIALOGUE, "prompt": "q", "response": "other"})
    with pytest.raises(ValueError, match=r"line 1: it may be read in 2 ways \(a list of messages, prompt\+response\)"):
        list(conversations(both, BadRecords()))
    assert [list(c) for c in conversations(both, BadRecords(), schema="single-turn")] == [[U("q"), A("other")]]
    assert [list(c) for c in conversations(both, BadRecords(), schema="conversation")] == [DIALOGUE]
    with pytest.raises(ValueError, match="schema 'text' does not serve here; these do: conversation"):
        list(conversations(both, BadRecords(), schema="text"))


def test_all_records_of_a_mixed_file_are_walked_through(tmp_path):
    every = [r for records in DETECTED.values() for r in records]
    file = lines(tmp_path / "a.jsonl", *every, {"body": 1}, {"prompt": "q", "completion": "", "label": True})
    bad = BadRecords(skip=True)
    found = list(parse_all(file, bad))
    assert Counter(name for _, name, _ in found) == {name: len(records) for name, records in DETECTED.items()}
    assert [where.rpartition("line ")[2] for where, _, _ in found] == [str(i + 1) for i in range(len(every))]
    assert len(bad.found) == 2 and "fits no schema" in bad.found[0] and "'completion' holds no text" in bad.found[1]


# Messages

MESSAGES = {
    "content before role": ([{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}], DIALOGUE),
    "ShareGPT": ([{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], [S("s"), *DIALOGUE]),
    "tools and thoughts as strings": (
        [{**S(""), "tools": json.dumps([TOOL])}, U("q"), A("", tool_calls=json.dumps([CALL]), reasoning_content="想"), T('{"t": 20}'), A("20 度", reasoning_content="")],
        [S(""), U("q"), A("", reasoning_content="想", tool_calls=[CALL]), T('{"t": 20}'), A("20 度")],
    ),
    "tools and thoughts as objects": (
        [{**S(""), "tools": [TOOL]}, U("q"), A(None, tool_calls=[CALL], reasoning_content="想"), T({"t": 20}), A("20 度")],
        [S(""), U("q"), A("", reasoning_content="想", tool_calls=[CALL]), T('{"t": 20}'), A("20 度")],
    ),
    "OpenAI": (
        [{**S(""), "tools": [TOOL]}, U("q"), {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"北京\"}"}}]}, {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "0"}]}, {"role": "assistant", "content": [{"type": "text", "text": "20"}]}],
        [S(""), U("q"), A("", tool_calls=[{**CALL, "id": "c1"}]), {**T("20"), "tool_call_id": "c1"}, A("20")],
    ),
    "OpenAI, old": (
        [{**S(""), "tools": [TOOL]}, U("q"), {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}, {"role": "function", "name": "weather", "content": "20"}, A("20")],
        [S(""), U("q"), A("", tool_calls=[{"name": "weather", "arguments": {}}]), {**T("20"), "name": "weather"}, A("20")],
    ),
    "LLaMA-Factory": (
        [{**S(""), "tools": [TOOL]}, {"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "[20]"}, {"from": "gpt", "value": "20"}],
        [S(""), U("q"), A("", tool_calls=[CALL]), T("[20]"), A("20")],
    ),
    "empty optional strings": (
        [{**S("s"), "tools": "", "reasoning_content": "", "tool_calls": ""}, {**U("q"), "tools": None}, A("a", tool_calls="", reasoning_content=None, weight=1)],
        [S("s"), U("q"), A("a")],
    ),
    "keys that templates may read": ([{**U("q"), "name": "Ann"}, A("a", id=7)], [{**U("q"), "name": "Ann"}, A("a", id=7)]),
    "a tool that returns text in an object": ([U("q"), A("", tool_calls=[CALL]), T({"text": "x"}), A("a")], [U("q"), A("", tool_calls=[CALL]), T('{"text": "x"}'), A("a")]),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_kept_whole(name):
    given, expected = MESSAGES[name]
    found = as_messages(given)
    assert list(found) == expected
    assert found.tools == ([TOOL] if any(m.get("tools") for m in given) else None)
    assert as_conversation({"conversations": given}) == expected


@pytest.mark.parametrize(
    "messages, word",
    [
        ([U("q"), A("a", tool_calls="[{")], "message 1 .assistant.: tool_calls are not JSON"),
        ([U("q"), A("a", tool_calls="7")], "a list of calls was expected"),
        ([U("q"), A("a", tool_calls=[{"arguments": {}}])], "a call needs a name"),
        ([U("q"), A("a", tool_calls=[{"name": "f", "arguments": "x"}])], "arguments of the call of 'f' are not JSON"),
        ([U("q"), A("a", tool_calls=[{"name": "f", "arguments": [1]}])], "not an object"),
        ([U("q"), A("a", tool_calls=[{"name": "f", "mood": 1}])], "dropped unseen"),
        ([U("q"), A("a", tool_calls=[{"type": "retrieval", "function": {"name": "f"}}])], "dropped unseen"),
        ([{**U("q"), "tool_calls": [CALL]}, A("a")], "only an assistant calls tools"),
        ([{**U("q"), "reasoning_content": "hm"}, A("a")], "only an assistant calls tools and thinks"),
        ([U("q"), A("a", reasoning_content="x", reasoning="y")], "reasoning_content and reasoning differ"),
        ([U("q"), A("a", reasoning_content=7)], "reasoning_content: content is .7., not text"),
        ([{**S("s"), "tools": "[{"}, *DIALOGUE], "message 0: tools are not JSON"),
        ([{**S("s"), "tools": ["weather"]}, *DIALOGUE], "an object with a name was expected"),
        ([{**S("s"), "tools": [TOOL]}, {**U("q"), "tools": [{"name": "other"}]}, A("a")], "tools stand in two places and differ"),
        ([U("q"), A("a", weight=0.5)], "weight 0.5 cannot be honoured"),
        ([U("q"), A("a", weight=0, train=True)], "weight and train contradict each other"),
        ([{**U("q"), "images": ["a.png"]}, A("a")], "'images' would be dropped unseen"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A("a")], "not text"),
        ([{"role": "user", "content": {"text": "q", "lang": "en"}}, A("a")], "not text"),
        ([{"role": "user", "from": "gpt", "content": "q"}, A("a")], "role 'user' is not known"),
        ([{"role": ["user"], "content": "q"}], "is not known"),
        ([U("q"), A(None, reasoning_content="only a thought")], "content is None"),
        ([U("q"), A("", reasoning_content="only a thought")], "holds no text"),
        ([U("q"), A("a\ud83d")], "half a character"),
    ],
)
def test_what_is_not_understood_is_refused(messages, word):
    with pytest.raises(ValueError, match=word) as caught:
        as_messages(messages)
    assert "message" in str(caught.value) or "tools" in str(caught.value)


def test_what_stands_beside_the_messages():
    assert as_conversation({"system": "s", "tools": json.dumps([TOOL]), "conversations": DIALOGUE}) == [S("s"), *DIALOGUE]
    assert as_conversation({"system": "s", "tools": [TOOL], "conversations": DIALOGUE}).tools == [TOOL]
    assert as_conversation({"system": "s", "messages": [S("s"), *DIALOGUE]}) == [S("s"), *DIALOGUE]
    assert as_conversation({"tools": [TOOL], "messages": [{**S(""), "tools": json.dumps([TOOL])}, *DIALOGUE]}).tools == [TOOL]
    assert as_conversation({"instruction": "i", "output": "o", "tools": [TOOL]}).tools == [TOOL]
    for record, word in (
        ({"system": "s", "messages": [S("other"), *DIALOGUE]}, "beside the one in its messages"),
        ({"messages": DIALOGUE, "conversations": DIALOGUE}, "messages and conversations"),
        ({"messages": DIALOGUE, "images": ["a.png"]}, "'images' would be dropped"),
        ({"prompt": "q", "response": "a", "image": "a.png"}, "'image' would be dropped"),
        ({"prompt": "q", "response": "a", "completion": "b"}, "2 ways"),
        ({"instruction": "i", "input": {"x": 1}, "output": "o"}, "'input'"),
        ({"messages": DIALOGUE, "tools": [{"x": 1}]}, "the record: tools hold"),
    ):
        with pytest.raises(ValueError, match=word):
            as_conversation(record)


# Preferences, judged answers, prompts


def test_preferences_in_every_shape():
    history = [S("s"), U("q0"), A("a0"), U("q")]
    expected = Preference([U("q")], [A("good")], [A("bad")])
    flipped = [{"content": "q", "role": "user"}, {"content": "good", "role": "assistant"}]
    for record in (
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": flipped, "rejected": [U("q"), A("bad")]},
        {"prompt": "q", "chosen": flipped, "rejected": [U("q"), A("bad")]},
        {"prompt": [U("q")], "chosen": [A("good")], "rejected": [A("bad")]},
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
    ):
        assert as_preference(record) == expected
    record = {"system": "s", "history": [["q0", "a0"]], "prompt": "q", "chosen": "good", "rejected": "bad"}
    assert as_preference(record).prompt == history
    assert as_preference({"chosen": [*history, A("good")], "rejected": [*history, A("bad")]}).prompt == history


def test_preferences_by_calls_and_thoughts():
    tools = [{**S(""), "tools": [TOOL]}, U("q")]
    pair = as_preference({"chosen": [*tools, A("", tool_calls=[CALL])], "rejected": [*tools, A("I do not know")]})
    assert pair.tools == [TOOL] and pair.chosen == [A("", tool_calls=[CALL])]
    other = A("", tool_calls=[{**CALL, "arguments": {"city": "上海"}}])
    assert as_preference({"chosen": [*tools, A("", tool_calls=[CALL])], "rejected": [*tools, other]}).rejected == [other]
    pair = as_preference({"prompt": "q", "chosen": [A("a", reasoning_content="x")], "rejected": [A("a", reasoning_content="y")]})
    assert pair.chosen[0]["reasoning_content"] == "x"


def test_judged_answers(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a", "label": True}, {"prompt": [U("q")], "completion": [A("b")], "label": 0},
        {"prompt": "q", "completion": [U("q"), A("a")], "label": True}, {"prompt": "q", "completion": "a", "label": "yes"},
        {"prompt": "q", "completion": [U("x")], "label": True}, {"prompt": "q", "completion": "a"},
    ]  # fmt: skip
    bad = BadRecords(skip=True)
    found = list(judged(lines(tmp_path / "a.jsonl", *rows), bad))
    assert [(list(j.prompt), j.completion, j.label) for j in found] == [([U("q")], [A("a")], True), ([U("q")], [A("b")], False), ([U("q")], [A("a")], True)]
    assert found[1].where.endswith("line 2")
    assert ["label is 'yes'" in bad.found[0], "begin with an assistant" in bad.found[1], "it has: prompt, completion" in bad.found[2]] == [True] * 3


def test_prompts_of_every_kind(tmp_path):
    rows = [
        {"conversations": [U("q"), A("dropped")]}, {"conversations": [U("q"), A("")]}, {"messages": [U("q0"), A("a0"), U("q")]}, {"prompt": "1+1", "answer": 2},
        {"prompt": [S("s"), U("q")], "answer": "x"}, {"conversations": [{**S(""), "tools": json.dumps([TOOL])}, U("q"), A("")], "gt": ["20", 3]},
        {"conversations": [U("q"), A("", tool_calls=[CALL]), T("20"), A("20")], "gt": "20"}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]  # fmt: skip
    found = list(prompts(lines(tmp_path / "a.jsonl", *rows), BadRecords()))
    assert [list(p.messages) for p in found] == [
        [U("q")], [U("q")], [U("q0"), A("a0"), U("q")], [U("1+1")], [S("s"), U("q")], [S(""), U("q")], [U("q"), A("", tool_calls=[CALL]), T("20")], [U("q")],
    ]  # fmt: skip
    assert [p.answer for p in found] == [None, None, None, 2, "x", None, None, None]
    assert [p.gt for p in found] == [()] * 5 + [("20", 3), ("20",), ()] and found[5].messages.tools == [TOOL]
    file = tmp_path / "b.txt"
    file.write_text("# ask these\nfirst 问题\n\n  second  \n#third\n", encoding="utf-8")
    found = list(prompts([str(file)], BadRecords()))
    assert [(p.messages[0]["content"], p.where) for p in found] == [("first 问题", f"{file}, line 2"), ("second", f"{file}, line 4")]


@pytest.mark.parametrize(
    "record, schema, word",
    [
        ({"conversations": [A("a")]}, None, "no message is left"),
        ({"conversations": [U("q"), A("a"), A("b")]}, None, "ends with 'assistant'"),
        ({"conversations": [S("s")]}, None, "ends with 'system'"),
        ({"conversations": [U("q")], "gt": [True]}, None, "gt holds True"),
        ({"conversations": [U("q")], "gt": []}, "agent", "gt is needed"),
        ({"text": "x"}, None, "fits no schema; it has: text"),
        ({"prompt": "q", "image": "a.jpg"}, None, "'image' would be dropped"),
        ({"prompt": " "}, None, "'prompt' holds no text"),
        ({"messages": []}, "conversation", "non-empty list"),
        ({"answer": 2}, "prompt", "prompt is needed"),
    ],
)
def test_what_is_no_prompt(tmp_path, record, schema, word):
    with pytest.raises(ValueError, match=word):
        list(prompts(lines(tmp_path / "a.jsonl", record), BadRecords(), schema=schema))


# Pictures


def test_pictures_are_found_in_their_folder_only(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "deep" / "b.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert image_path(folder, "deep/b.jpg") == (folder / "deep" / "b.jpg").resolve()
    asked = lambda image: {"image": image, "conversations": [U("<image>\n这是什么？"), A("a picture")]}
    names = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "none.jpg", "deep", "", 7]
    two = {"image": ["a.jpg", "deep/b.jpg"], "conversations": [U("<image> or <image>?"), A("both")]}
    rows = [*map(asked, names), two, {**two, "image": "a.jpg"}, {"image": "a.jpg", "conversations": [U("<image>"), A("<image>")]}]
    bad = BadRecords(skip=True)
    found = list(image_texts(lines(tmp_path / "a.jsonl", *rows), folder, bad))
    assert [f.images for f in found] == [("a.jpg",), ("a.jpg", "deep/b.jpg")] and found[1].where.endswith("line 9")
    reasons = ["outside the folder"] * 3 + ["is not in the folder"] * 2 + ["one file name"] * 2 + ["2 <image> in the text, but 1 image", "2 <image>"]
    assert len(bad.found) == len(reasons) and all(r in b for r, b in zip(reasons, bad.found, strict=True))


# Items


@cache
def tokenizer(template="chatml") -> Tokenizer:
    """Bytes and control tokens; the template by name."""
    base = Tokenizer.train(["ab"], 260)
    with_image = base.add_tokens(["<|image|>"], special=True)
    return Tokenizer(with_image.library, shipped(template), with_image.roles)


def trained(item):
    ids, mask = item[:2]
    return tokenizer().decode([i for i, m in zip(ids, mask, strict=True) if m])


def test_tools_reach_the_template_and_survive_truncation():
    talk = as_conversation({"messages": [{**S(""), "tools": [TOOL]}, U("q"), A("", tool_calls=[CALL]), T("20"), A("20 度"), U("more"), A("no")]})
    ids, mask = conversation_item(talk, tokenizer(), 10_000)
    assert "天气" in tokenizer().decode(ids) and "天气" not in trained((ids, mask))
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
    assert trained((ids, mask)) == f"{called}20 度<|im_end|>no<|im_end|>"
    sizes = [len(conversation_item(turns.conversation(talk[:n], talk.tools), tokenizer(), 10_000)[0]) for n in (3, 5, 7)]
    for n, kept, gone in ((sizes[2], 3, 0), (sizes[2] - 1, 2, 2), (sizes[1], 2, 2), (sizes[1] - 1, 1, 4), (sizes[0], 1, 4)):
        notes = Counter()
        item = conversation_item(talk, tokenizer(), n, notes=notes)
        assert len(item[0]) <= n and any(item[1]) and trained(item).count("<|im_end|>") == kept
        assert notes == ({"turns that did not fit": gone} if gone else {})
    with pytest.raises(ValueError, match="no answer fits"):
        conversation_item(talk, tokenizer(), sizes[0] - 1)


def test_answers_that_a_template_rewrites_are_counted():
    talk = [U("q"), A("a"), U("q"), A("b")]
    notes = Counter()
    (item,) = conversation_items([talk], tokenizer("qwen3"), 1000, BadRecords(), notes=notes)
    assert trained(item) == "<think>\n\n</think>\n\nb<|im_end|>" and notes == {"answers not trained": 1}
    notes = Counter()
    (item,) = conversation_items([talk], tokenizer("qwen3"), 1000, BadRecords(), Style({"keep_thinking": True}), notes)
    assert trained(item).count("<|im_end|>") == 2 and not notes


def test_thoughts_left_out_of_the_loss():
    talk = [U("q"), A("a", reasoning_content="hm")]
    with_thought = conversation_item(talk, tokenizer(), 1000)
    without = conversation_item(talk, tokenizer(), 1000, Style(train_thinking=False))
    assert with_thought[0] == without[0]
    assert trained(with_thought) == "<think>\nhm\n</think>\n\na<|im_end|>" and trained(without) == "a<|im_end|>"


def test_items_with_what_belongs_to_them(tmp_path):
    rows = [{"prompt": "q", "completion": "good", "label": True}, {"prompt": "q", "completion": "b" * 90, "label": False}, {"prompt": "q", "completion": "bad", "label": False}]
    bad = BadRecords(skip=True)
    items = list(judged_items(judged(lines(tmp_path / "k.jsonl", *rows), bad), tokenizer(), 60, bad))
    assert [(trained(i), i[2]) for i in items] == [("good<|im_end|>", {"label": True}), ("bad<|im_end|>", {"label": False})]
    assert len(bad.found) == 1 and "k.jsonl, line 2" in bad.found[0] and "do not fit into 60" in bad.found[0]
    rows = [{"prompt": "1+1", "answer": 2}, {"conversations": [{**S("s"), "tools": [TOOL]}, U("?"), A("")], "gt": ["7"]}, {"prompt": "x" * 900}]
    bad = BadRecords(skip=True)
    items = list(prompt_items(prompts(lines(tmp_path / "p.jsonl", *rows), bad), tokenizer(), 600, bad))
    assert [(mask, extra) for _, mask, extra in items] == [(None, {"answer": 2}), (None, {"gt": ["7"]})]
    assert all(tokenizer().decode(ids).endswith("<|im_start|>assistant\n") for ids, _, _ in items) and "天气" in tokenizer().decode(items[1][0])
    assert "a prompt of" in bad.found[0] and "line 3" in bad.found[0]
    with TokenWriter(tmp_path, tokenizer(), 1 << 20) as writer:
        writer.add_all(items)
    assert writer.counts()["items"] == 2 and json.loads((tmp_path / "extra.jsonl").read_text().splitlines()[1]) == {"gt": ["7"]}


def test_pairs_with_tools():
    tools = [{**S(""), "tools": [TOOL]}, U("q")]
    pair = as_preference({"chosen": [*tools, A("", tool_calls=[CALL])], "rejected": [*tools, A("no")]})
    chosen, rejected = pair_items([pair], tokenizer(), 1000, BadRecords())
    assert trained(rejected) == "no<|im_end|>" and trained(chosen).startswith("<tool_call>") and "天气" in tokenizer().decode(chosen[0])


def test_pictures_become_placeholders(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    row = {"image": "a.jpg", "conversations": [U("<image>\nwhat? <|image|>"), A("一只猫"), U("sure?"), A("yes" * 30)]}
    records = lambda: image_texts(lines(tmp_path / "v.jsonl", row), tmp_path, BadRecords())
    image = tokenizer().library.token_to_id("<|image|>")
    for max_len, said in ((1000, "一只猫<|im_end|>" + "yes" * 30 + "<|im_end|>"), (90, "一只猫<|im_end|>")):
        ((ids, mask, extra),) = image_items(records(), tokenizer(), max_len, BadRecords(), image_token="<|image|>", n_tokens=5)
        assert ids.count(image) == 5 and not any(m for i, m in zip(ids, mask, strict=True) if i == image)
        assert trained((ids, mask)) == said and extra == {"images": ["a.jpg"]}
        start = ids.index(image)
        assert ids[start : start + 5] == [image] * 5 and tokenizer().decode(ids[start + 5 :]).startswith("\nwhat? <|image|>")
    with pytest.raises(ValueError, match="control token"):
        list(image_items(records(), tokenizer(), 99, BadRecords(), image_token="<image>", n_tokens=5))
    typed = [chats.Pictured(turns.conversation([U("\U0010fff3<image>"), A("a")]), ("a.jpg",))]
    with pytest.raises(ValueError, match=r"picture 1: .*reserved"):
        list(image_items(typed, tokenizer(), 99, BadRecords(), image_token="<|image|>", n_tokens=5))


# Whatever arrives: a value or one reason, never another error

LEAF = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "x", "user", "assistant", "[]", "{", '[{"name": "f"}]', "<image>", "\ud800", "gpt"])
KEYS = sorted({k for s in SCHEMAS.values() for group in s.keys for k in group} | turns.READ | {"system", "history", "input", "tools", "answer", "name"})
VALUE = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12)
TURN = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": VALUE, "tool_calls": VALUE, "reasoning_content": VALUE, "tools": VALUE})
RECORD = st.dictionaries(st.sampled_from(KEYS), VALUE | st.lists(TURN, max_size=4), max_size=5)


@settings(max_examples=250, deadline=None)
@given(RECORD | VALUE)
def test_any_record_gives_a_value_or_one_reason(record):
    for name in (None, *SCHEMAS):
        try:
            parse(record, schema=name)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
    for read in (as_conversation, as_preference, as_messages, schemas._any_prompt):
        try:
            read(record)
        except ValueError as error:
            assert str(error)


# Planted bugs: each must be caught by a check above.


def unequal(a, b):
    return len(a) == len(b) and all(x["role"] == y["role"] for x, y in zip(a, b, strict=True))


BUGS = {
    "roles by position": (lambda: test_messages_are_kept_whole("ShareGPT"), turns, "ROLE_NAMES", {"system": "user", "human": "assistant", "gpt": "user"}),
    "tools dropped": (lambda: test_messages_are_kept_whole("OpenAI"), turns, "as_tools", lambda value, where: None),
    "calls dropped": (lambda: test_messages_are_kept_whole("tools and thoughts as strings"), turns, "as_calls", lambda value, where: []),
    "thoughts dropped": (lambda: test_messages_are_kept_whole("tools and thoughts as objects"), turns, "_thought", lambda turn, where: ""),
    "prompt doubled": (lambda: test_a_prompt_inside_a_completion_is_not_doubled(), shapes, "_behind", lambda prompt, said: said),
    "prompts never recognised": (test_preferences_in_every_shape, shapes, "_same", lambda a, b: a is b),
    "answers compared by role only": (test_preferences_in_every_shape, shapes, "_same", unequal),
    "answers compared without calls": (test_preferences_by_calls_and_thoughts, shapes, "_same", lambda a, b: [(m["role"], m["content"]) for m in a] == [(m["role"], m["content"]) for m in b]),
    "the last answer stays in the prompt": (lambda: test_the_last_answer_is_no_part_of_a_prompt(), shapes, "ANSWERING", ()),
    "the first schema that fits": (lambda: test_nothing_is_guessed({"text": "x", "messages": DIALOGUE}, ["fits"]), schemas, "detect", lambda record, among=(): "text"),
    "tools not given to the template": (test_tools_reach_the_template_and_survive_truncation, chats, "rendered", lambda messages, tokenizer, tools=None, style=None: tokenizer.render(messages)),
}  # fmt: skip


def test_a_prompt_inside_a_completion_is_not_doubled():
    assert parse({"prompt": "q", "completion": [U("q"), A("a")], "label": True}).completion == [A("a")]
    assert parse({"prompt": "q", "completion": [U("q"), A("a")]}) == DIALOGUE


def test_the_last_answer_is_no_part_of_a_prompt():
    assert shapes.as_spoken_prompt({"conversations": [U("q"), A("dropped")]}).messages == [U("q")]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    check, module, name, wrong = BUGS[bug]
    check()
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check()
