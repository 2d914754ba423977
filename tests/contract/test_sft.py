"""Fine-tuning on conversations, from a jsonl file to the gradient of one step: what is trained, what is cut, what is refused.

Which tokens an assistant said is decided by transformers' own renderer of the same template, not by ours. A token is
trained if the hidden state in front of it gets a gradient in one step of `fit`; all others must get exactly none.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import chain, groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from tests.contract.stages import recipe, write_data
from tests.contract.test_fit import tiny
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.data import chats, fitting, rows
from zero2llm.data import trained as trained_answers
from zero2llm.data.chats import conversation_item, conversation_items, pair_items
from zero2llm.data.schemas import conversations
from zero2llm.data.shapes import Preference
from zero2llm.data.sources import BadRecords
from zero2llm.data.turns import conversation
from zero2llm.lab.data_config import DataConfig
from zero2llm.lab.recipe import make_recipe
from zero2llm.lab.sets import build_sets
from zero2llm.lab.stage import run_stage
from zero2llm.model.lm import LM
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.chat import Style
from zero2llm.tokenizers.shipped import SHIPPED, shipped
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.fit import FitConfig, fit
from zero2llm.train.objectives.clm import CLM, CLMConfig

NAMES = list(SHIPPED)


def S(text): return {"role": "system", "content": text}
def U(text): return {"role": "user", "content": text}
def A(text, **more): return {"role": "assistant", "content": text, **more}
def T(text): return {"role": "tool", "content": text}


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}]
CALL = {"name": "weather", "arguments": {"city": "北京"}}
SAID = ("Yes, 你好.", "It is <b>20</b>°.", "Thanks!", "short", "A longer answer\n\nof two paragraphs.")


@cache
def tokenizer(template: str = "chatml") -> Tokenizer:
    """One token a byte, and the template's control tokens."""
    base = Tokenizer.train(["ab"], 260)
    lacking = [c for c in SHIPPED[template].controls if c not in base.specials]
    made = base.add_tokens(lacking, special=True) if lacking else base
    return Tokenizer(made.library, shipped(template), made.roles)


def talks(template: str) -> list[dict]:
    """Multi-turn records with everything that the template has a place for."""
    holds = SHIPPED[template].holds
    front = [S("Be kind. 请")] if "system" in holds else []
    think = {"reasoning_content": "let me see"} if "thinking" in holds else {}
    found = [
        [*front, U("Are you there?"), A(SAID[0]), U("And now?"), A(SAID[1])],
        [U("Bye"), A(SAID[2])],
        [*front, U("one"), A(SAID[3], **think), U("two"), A(SAID[4], **think)],
    ]
    records = [{"messages": talk} for talk in found]
    if "tools" in holds:
        agent = [*front, U("weather?"), A("", tool_calls=[CALL]), T('{"t": 20}'), A("20 度"), U("ok"), A("good")]
        records.append({"messages": agent, "tools": TOOLS})
    if "tools" in holds and "thinking" in holds:
        agent = [*front, U("and there?"), A("", tool_calls=[CALL], reasoning_content="I look 看"), T("[7]"), A("7 度", **think)]
        records.append({"messages": agent, "tools": TOOLS})
    return records


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def sets_of(folder, tok: Tokenizer, train: str, seq_len: int = 768, valid: str | None = None, **data):
    """The recipe's own loaders; nothing is mocked."""
    given = {"train": [train], "valid": [valid or train], **data}
    made = make_recipe(out=str(folder), init="unused", data=given, objective={"kind": "sft"}, fit={"steps": 1}, seq_len=seq_len, batch_tokens=seq_len)
    return build_sets(made, tok, folder, World())


def batches_of(folder, tok, train, **more) -> list[Batch]:
    return list(sets_of(folder, tok, train, **more).valid())


def packed(folder, template: str, **data) -> Batch:
    """All records of `talks` in one batch of packed rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = batches_of(folder, tokenizer(template), write(folder / "talks.jsonl", talks(template)), **data)
    return Batch(*(torch.cat([getattr(p, name) for p in parts]) for name in ("tokens", "labels")), Seq.of_segments(torch.cat([p.seq.seg for p in parts])))


@cache
def theirs(template: str) -> PreTrainedTokenizerFast:
    roles = tokenizer(template).roles
    names = {"bos_token": roles.bos, "eos_token": roles.eos, "pad_token": roles.pad}
    return PreTrainedTokenizerFast(tokenizer_object=Library.from_str(tokenizer(template).library.to_str()), **names)


def spoken_by_the_assistant(template: str) -> dict[tuple[int, ...], list[int]]:
    """ids -> which of them the assistant generates, of each record, after transformers."""
    found = {}
    for record in talks(template):
        wrapped = [m | ({"tool_calls": [{"type": "function", "function": c} for c in m["tool_calls"]]} if "tool_calls" in m else {}) for m in record["messages"]]
        out = theirs(template).apply_chat_template(wrapped, tools=record.get("tools"), chat_template=shipped(template), return_dict=True, return_assistant_tokens_mask=True)
        found[tuple(out["input_ids"])] = out["assistant_masks"]
    return found


def asked_for(ids: list[int], mask: list[int], tok: Tokenizer, train_on: str, thinking: bool) -> list[bool]:
    """Which of one record's tokens a recipe asks for, from what the assistant generates: its runs, or the last of them,
    each without what stands before its answer proper."""
    if train_on == "all":
        return [True] * len(ids)
    runs = [list(run) for said, run in groupby(range(len(ids)), key=lambda i: mask[i]) if said]
    want = [False] * len(ids)
    for run in runs[-1:] if train_on == "last" else runs:
        ends = [] if thinking else [k for k in range(1, len(run)) if tok.decode(ids[run[0] : run[k]]).endswith("</think>")]
        begin = ends[0] if ends else 0
        while ends and tok.decode([ids[run[begin]]]) == "\n":
            begin += 1
        for i in run[begin:]:
            want[i] = True
    return want


def expected(batch: Batch, template: str, train_on: str = "assistant", thinking: bool = True) -> torch.Tensor:
    """(B, T) bool: positions whose next token is to be learned."""
    masks, want = spoken_by_the_assistant(template), torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row in range(len(batch)):
        for number in range(1, int(batch.seq.seg[row].max()) + 1):
            at = (batch.seq.seg[row] == number).nonzero().flatten()
            ids = batch.tokens[row, at].tolist()
            asked = asked_for(ids, masks.pop(tuple(ids)), tokenizer(template), train_on, thinking)
            want[row, at[:-1]] = torch.tensor(asked)[1:]
    assert not masks, "every record stands in the batch"
    return want


def gradient_of_hidden(batch: Batch, vocab: int) -> torch.Tensor:
    """(B, T) size of the loss's gradient at each position, after one step of the loop."""
    model, seen = tiny(vocab, max_len=4096), []

    def keep(_, given, out):
        out[0].retain_grad()
        seen.append(out[0])

    model.register_forward_hook(keep)
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, CLMConfig(kind="sft").build(), [batch], build_optim(model, AdamWConfig(lr=1e-3)), FitConfig(steps=1, micro_rows=1))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "it was a real step"
    return torch.cat([hidden.grad.abs().sum(-1) for hidden in seen])


CHOICES = [("assistant", True), ("assistant", False), ("last", True), ("last", False), ("all", True)]  # train_on, thinking


def check_gradients(folder, template: str, train_on: str = "assistant", thinking: bool = True) -> None:
    batch = packed(folder, template, train_on=train_on, train_thinking=thinking, too_long="start")
    assert int(batch.seq.seg.max()) >= 2, "several conversations share a row"
    want, size = expected(batch, template, train_on, thinking), gradient_of_hidden(batch, tokenizer(template).vocab_size)
    assert torch.equal(batch.labels != IGNORE, want)
    assert (size[~want] == 0).all(), "what is not to be learned gets exactly no gradient"
    assert (size[want] > 0).all(), "every token of the answers and every end of turn gets one"
    assert torch.equal(batch.labels[want], batch.tokens.roll(-1, 1)[want])


def cases() -> list:
    """Without thoughts, a template that has no place for them must give what it gives with them: slow, as it is the same again."""
    again = lambda name, thinking: pytest.mark.slow if not thinking and "thinking" not in SHIPPED[name].holds else ()
    return [pytest.param(name, *choice, marks=again(name, choice[1])) for name in NAMES for choice in CHOICES]


@pytest.mark.parametrize(("template", "train_on", "thinking"), cases())
def test_gradient_is_zero_but_on_what_is_to_be_learned(tmp_path, template, train_on, thinking):
    check_gradients(tmp_path, template, train_on, thinking)


@pytest.mark.parametrize("template", [name for name in NAMES if "thinking" in SHIPPED[name].holds])
def test_without_thoughts_less_is_learned_and_nothing_else_changes(tmp_path, template):
    whole, without = (packed(tmp_path / str(on), template, train_thinking=on) for on in (True, False))
    assert torch.equal(whole.tokens, without.tokens)
    gone = whole.labels[(whole.labels != IGNORE) & (without.labels == IGNORE)]
    text = tokenizer(template).decode(gone.tolist())
    assert "let me see" in text and "</think>" in text and not any(said in text for said in (*SAID, "weather", "度"))
    assert (without.labels == whole.labels)[without.labels != IGNORE].all()


@pytest.mark.parametrize("template", NAMES)
def test_other_peoples_words_are_no_labels(tmp_path, template):
    """The same conversations with other words of the same length from user, system and tool: the labels do not change,
    and the loss does not see what stands in front of those words' places."""
    one = packed(tmp_path / "one", template)
    swap = lambda m: m if m["role"] == "assistant" else m | {"content": m["content"].translate(str.maketrans("aeot", "uizk"))}
    other = [r | {"messages": [swap(m) for m in r["messages"]]} for r in talks(template)]
    (two,) = batches_of(tmp_path / "two", tokenizer(template), write(tmp_path / "two.jsonl", other), seq_len=one.tokens.shape[1] * len(one))
    shown = lambda b: sorted(tuple(b.labels[r][(b.seq.seg[r] == n) & (b.labels[r] != IGNORE)].tolist()) for r in range(len(b)) for n in range(1, int(b.seq.seg[r].max()) + 1))
    assert shown(one) == shown(two) and not torch.equal(one.tokens.sort().values, two.tokens[:, : one.tokens.shape[1]].sort().values)

    model = tiny(tokenizer(template).vocab_size, max_len=4096)
    total = lambda: float(CLM()(model, one).total.detach())
    right = total()
    for at, changes in ((one.labels == IGNORE, False), (one.labels != IGNORE, True)):
        noise = torch.randn(*at.shape, 16) * at[..., None]
        handle = model.register_forward_hook(lambda _, given, out: (out[0] + noise, out[1]))  # noqa: B023  (removed below)
        assert (total() != right) is changes
        handle.remove()


LABELLED = {  # what the labels of SAID spell, where it is not simply the answer and the end of turn
    "llama-2": [" Yes, 你好. </s> It is <b>20</b>°. </s>", " Thanks! </s>", " short </s> A longer answer\n\nof two paragraphs. </s>"],
    "qwen3": ["<think>\n\n</think>\n\nIt is <b>20</b>°.<|im_end|>", "<think>\n\n</think>\n\nThanks!<|im_end|>", "<think>\nlet me see\n</think>\n\nA longer answer\n\nof two paragraphs.<|im_end|>"],
    "chatml": ["Yes, 你好.<|im_end|>It is <b>20</b>°.<|im_end|>", "Thanks!<|im_end|>", "<think>\nlet me see\n</think>\n\nshort<|im_end|><think>\nlet me see\n</think>\n\nA longer answer\n\nof two paragraphs.<|im_end|>"],
    "minimind-v3": ["Yes, 你好.<|im_end|>It is <b>20</b>°.<|im_end|>", "Thanks!<|im_end|>", "let me see\n</think>\n\nshort<|im_end|>let me see\n</think>\n\nA longer answer\n\nof two paragraphs.<|im_end|>"],
}  # fmt: skip


@pytest.mark.parametrize("template", NAMES)
def test_labels_spell_what_the_assistant_says(tmp_path, template):
    tok, batch = tokenizer(template), packed(tmp_path, template)
    end = SHIPPED[template].end
    plain = [f"{SAID[0]}{end}{SAID[1]}{end}", f"{SAID[2]}{end}", f"{SAID[3]}{end}{SAID[4]}{end}"]
    spelled = set()
    for row in range(len(batch)):
        for number in range(1, int(batch.seq.seg[row].max()) + 1):
            labels = batch.labels[row][(batch.seq.seg[row] == number) & (batch.labels[row] != IGNORE)]
            spelled.add(tok.decode(labels.tolist()))
    assert set(LABELLED.get(template, plain)) <= spelled and len(spelled) == len(talks(template))


# Packing


def check_packing(folder) -> None:
    """One packed batch and each conversation alone: the same loss and the same gradient of every weight."""
    batch = packed(folder, "chatml")
    assert int(batch.seq.seg.max()) >= 3
    model = tiny(tokenizer().vocab_size, max_len=4096).double()
    whole = CLM()(model, batch)
    want = torch.autograd.grad(whole.total, list(model.parameters()))
    total, count, got = 0.0, 0, [torch.zeros_like(p) for p in model.parameters()]
    tok = tokenizer()
    for record in talks("chatml"):
        ids, mask = conversation_item(conversation(record["messages"], record.get("tools")), tok, 4096)
        tokens = torch.tensor([ids])
        loss = CLM()(model, Batch.shifted(tokens, torch.tensor([mask]), Seq.rows(1, len(ids))))
        total, count = total + float(loss.total.detach()), count + int(loss.count)
        for sum_, grad in zip(got, torch.autograd.grad(loss.total, list(model.parameters())), strict=True):
            sum_ += grad
    assert count == int(whole.count) and total == pytest.approx(float(whole.total.detach()), rel=1e-6)
    for a, b in zip(got, want, strict=True):  # the loss's softmax runs in fp32
        torch.testing.assert_close(a, b, atol=3e-6 * float(b.abs().max()), rtol=0)


def test_packed_is_separate(tmp_path):
    check_packing(tmp_path)


# Every schema, from a file to labels


SCHEMAS = {
    "messages": ({"messages": [S("s"), U("q"), A("a"), U("q2"), A("b")]}, ["a", "b"]),
    "conversations": ({"conversations": [U("q"), A("a")]}, ["a"]),
    "ShareGPT": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["a"]),
    "prompt and response": ({"prompt": "q", "response": "a"}, ["a"]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, ["a"]),
    "instruction, input, output": ({"instruction": "q", "input": "x", "output": "a", "history": [["h", "b"]]}, ["b", "a"]),
    "tools as strings": ({"conversations": [S("") | {"tools": json.dumps(TOOLS)}, U("q"), A("", tool_calls=json.dumps([CALL])), T("20"), A("a")]},
                         ['<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>', "a"]),
    "tools as objects": ({"messages": [U("q"), A("", tool_calls=[CALL]), T("20"), A("a")], "tools": TOOLS},
                         ['<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>', "a"]),
    "thoughts": ({"messages": [U("q"), A("a", reasoning_content="hm")]}, ["<think>\nhm\n</think>\n\na"]),
}  # fmt: skip


def spelled(tok, batches):
    return ["".join(tok.decode(b.labels[r][b.labels[r] != IGNORE].tolist())) for b in batches for r in range(len(b))]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_reaches_the_labels(tmp_path, name):
    record, answers = SCHEMAS[name]
    (text,) = spelled(tokenizer(), batches_of(tmp_path / "run", tokenizer(), write(tmp_path / "a.jsonl", [record])))
    assert text == "".join(a + "<|im_end|>" for a in answers)


def test_a_named_schema_of_agents_and_thoughts_without_loss(tmp_path):
    agent = {"conversations": [S("") | {"tools": TOOLS}, U("q"), A("a", reasoning_content="hm")], "gt": ["7"]}
    file = write(tmp_path / "agent.json", [])
    (tmp_path / "agent.json").write_text(json.dumps([agent]), encoding="utf-8")
    (text,) = spelled(tokenizer(), batches_of(tmp_path / "run", tokenizer(), file, sft_schema="agent", train_thinking=False))
    assert text == "a<|im_end|>"


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}, {"loss": False}, {"weight": 0.0, "train": False}])
def test_an_answer_that_a_file_leaves_out(tmp_path, key):
    record = {"messages": [U("q"), A("a", **key), U("q2") | key, A("b", **{k: 1 for k in key})]}
    file = write(tmp_path / "a.jsonl", [record])
    assert spelled(tokenizer(), batches_of(tmp_path / "run", tokenizer(), file)) == ["b<|im_end|>"]
    with pytest.raises(ValueError, match="a.jsonl, line 1: message 1 .assistant.: train is false, and data.train_on = all"):
        batches_of(tmp_path / "all", tokenizer(), file, train_on="all")


# Which answers


TALK = [S("s"), U("q1"), A("a1"), U("q2"), A("a2"), U("q3"), A("a3")]


def trained(tok, item):
    return tok.decode([i for i, m in zip(*item, strict=True) if m])


@pytest.mark.parametrize("template", NAMES)
def test_the_last_answer_or_every_token(template):
    tok, talk = tokenizer(template), TALK if "system" in SHIPPED[template].holds else TALK[1:]
    whole, notes = conversation_item(talk, tok, 999), Counter()
    last = conversation_item(talk, tok, 999, notes=notes, too_long="start", train_on="last")
    assert last[0] == whole[0] and notes == {"answers before the last": 2}
    said = trained(tok, last)
    assert "a3" in said and said.endswith(SHIPPED[template].end) and "a2" not in said and trained(tok, whole).endswith(said)
    ids, mask = conversation_item(talk, tok, 999, train_on="all")
    assert ids == whole[0] and mask == [1] * len(ids)


@pytest.mark.parametrize("template", NAMES)
def test_an_answer_that_its_record_leaves_out(template):
    tok, talk = tokenizer(template), TALK[1:]
    whole = conversation_item(talk, tok, 999)
    for i in (1, 3, 5):
        notes, some = Counter(), [m | ({"train": False} if j == i else {}) for j, m in enumerate(talk)]
        if template == "qwen3" and i == 5:  # this template trains the last answer only
            with pytest.raises(ValueError, match="nothing in it is trained.*left out by its record"):
                conversation_item(some, tok, 999)
            continue
        ids, mask = conversation_item(some, tok, 999, notes=notes)
        assert ids == whole[0] and notes["answers left out by their record"] == 1
        said, all_said = trained(tok, (ids, mask)), trained(tok, whole)
        assert f"a{i // 2 + 1}" not in said and all(f"a{n}" in said for n in (1, 2, 3) if f"a{n}" in all_said and n != i // 2 + 1)
        assert said.count(SHIPPED[template].end) == all_said.count(SHIPPED[template].end) - (f"a{i // 2 + 1}" in all_said)


def test_what_cannot_be_left_out_is_refused():
    tok = tokenizer()
    assert conversation_item([U("q") | {"train": False}, A("a")], tok, 99) == conversation_item([U("q"), A("a")], tok, 99)
    with pytest.raises(ValueError, match=r"message 1 \(assistant\): train is false, and data.train_on = all"):
        conversation_item([U("q"), A("a", train=False)], tok, 99, train_on="all")
    with pytest.raises(ValueError, match="every answer left out"):
        conversation_item([U("q"), A("a", train=False)], tok, 99)
    with pytest.raises(ValueError, match="pair 1: train is false in an answer"):
        list(pair_items([Preference([U("q")], [A("a", train=False)], [A("b")])], tok, 99, BadRecords()))
    rewriting = "{% for m in messages %}<|im_start|>{{ m.content }}{% if loop.last %} (the end){% endif %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="message 3 .*otherwise when more follows"):
        conversation_item([U("q"), A("a"), U("q"), A("a")], Tokenizer(tok.library, rewriting, tok.roles), 99, train_on="last")


@pytest.mark.parametrize(("data", "says"), [
    ({"train_on": "last"}, "last trains the very answer that data.too_long: turns drops"),
    ({"train_on": "all", "train_thinking": False}, "thoughts too"),
])  # fmt: skip
def test_choices_that_contradict_each_other(data, says):
    with pytest.raises(ValueError, match=says):
        DataConfig(train=("x",), **data)


def test_choices_of_conversations_are_refused_elsewhere(tmp_path):
    write_data(tmp_path / "data")
    keys = recipe(tmp_path, "pretrain")
    keys["data"]["too_long"] = "start"
    with pytest.raises(ValueError, match="are for conversations; objective clm reads documents"):
        run_stage(make_recipe(**keys), quiet=True)


# Too long


LONG = [S("sys"), U("u1"), A("a1"), U("u2"), A("", tool_calls=[CALL]), T("20"), A("a2"), U("u3"), A("a3")]
KEPT = {  # policy -> (messages kept by number, each with the next smaller length)
    "turns": [(0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4), (0, 1, 2)],
    "start": [(0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 3, 4, 5, 6, 7, 8), (0, 7, 8)],
    "refuse": [(0, 1, 2, 3, 4, 5, 6, 7, 8)],
}


def check_too_long(policy: str) -> None:
    tok, too_long = tokenizer(), {"too_long": policy}
    sizes = [len(tok.render([LONG[i] for i in kept])[0]) for kept in KEPT[policy]]
    assert sizes == sorted(sizes, reverse=True)
    for kept, least, most in zip(KEPT[policy], sizes, [sizes[0], *(size - 1 for size in sizes)], strict=False):
        for room in (least, most):
            notes = Counter()
            item = conversation_item(LONG, tok, room, notes=notes, **too_long)
            assert item == tok.render([LONG[i] for i in kept]), (policy, room)
            assert notes == ({"turns that did not fit": len(LONG) - len(kept)} if len(kept) < len(LONG) else {})
    with pytest.raises(ValueError, match={"turns": "no answer fits", "start": "the last question and its answer have", "refuse": "tokens do not fit into"}[policy]):
        conversation_item(LONG, tok, sizes[-1] - 1, **too_long)


@pytest.mark.parametrize("policy", KEPT)
def test_what_goes_where_a_conversation_is_too_long(policy):
    check_too_long(policy)


def test_a_greeting_goes_first_and_tools_stay():
    tok, talk = tokenizer(), conversation([S("s"), A("hi"), U("u1"), A("a1")], TOOLS)
    item = conversation_item(talk, tok, len(conversation_item(talk, tok, 999)[0]) - 1, too_long="start")
    assert item == conversation_item(conversation([S("s"), U("u1"), A("a1")], TOOLS), tok, 999)


def test_what_stays_must_train_something():
    tok, talk = tokenizer(), [U("u1"), A("a1", train=False), U("u2"), A("a2")]
    room = len(tok.render(talk)[0]) - 1
    with pytest.raises(ValueError, match=f"what fits into {room} tokens holds no answer that is trained"):
        conversation_item(talk, tok, room)
    assert trained(tok, conversation_item(talk, tok, room, too_long="start")) == "a2<|im_end|>"


# Records that train nothing: named with file and line, or counted


def test_a_record_without_a_trained_token_names_its_line(tmp_path, capsys):
    good, useless = {"messages": [U("q"), A("a")]}, {"messages": [U("q" * 90), A("a")]}
    file = write(tmp_path / "chat.jsonl", [good, good, useless, good])
    for policy, says in (("turns", "no answer fits into 80"), ("start", "the last question and its answer have"), ("refuse", "do not fit into 80")):
        with pytest.raises(ValueError, match=rf"chat.jsonl, line 3: .*{says}") as error:
            batches_of(tmp_path / policy, tokenizer(), file, seq_len=80, too_long=policy)
        assert "\n" not in str(error.value) and not (tmp_path / policy / "data" / "train").exists()
        batches = batches_of(tmp_path / policy, tokenizer(), file, seq_len=80, too_long=policy, skip_bad_records=True)
        assert "".join(spelled(tokenizer(), batches)) == "a<|im_end|>" * 3
        listed = (tmp_path / policy / "data" / "bad_records.txt").read_text().splitlines()
        assert len(listed) == 2 and all("chat.jsonl, line 3: " in line for line in listed)  # read for each side
        assert "2 bad records left out; the first:" in " ".join(capsys.readouterr().out.split())


def test_where_every_record_is_bad_the_first_is_named(tmp_path):
    file = write(tmp_path / "chat.jsonl", [{"messages": [U("q" * 90), A("a")]}] * 3)
    with pytest.raises(ValueError, match="no usable record; 3 bad records were left out, the first: .*chat.jsonl, line 1: no answer fits"):
        batches_of(tmp_path / "run", tokenizer(), file, seq_len=80, skip_bad_records=True)


def test_what_goes_is_shown_before_training(tmp_path, capsys):
    file = write(tmp_path / "chat.jsonl", [{"messages": TALK}, {"messages": TALK[:3]}])
    batches_of(tmp_path / "run", tokenizer(), file, seq_len=60, too_long="start")
    assert "turns that did not fit: 4" in capsys.readouterr().out


def test_records_that_share_a_system_turn_are_still_held_out(tmp_path):
    """The question decides, not the system turn that all records begin with."""
    records = [{"messages": [S("the same"), U(f"question {i}"), A(f"{i}.")]} for i in range(60)]
    made = make_recipe(out=str(tmp_path / "run"), init="unused", data={"train": [write(tmp_path / "c.jsonl", records)], "valid_fraction": 0.3},
                       objective={"kind": "sft"}, fit={"steps": 1}, seq_len=128, batch_tokens=128)  # fmt: skip
    sets = build_sets(made, tokenizer(), tmp_path / "run", World())
    held_out = "".join(spelled(tokenizer(), sets.valid())).count("<|im_end|>")
    assert 8 <= held_out <= 30


# Whatever arrives: an item with something to train, or one counted reason


WORDS = st.text(alphabet="ab 你é<|\n", min_size=1, max_size=12).filter(lambda s: s.strip())
TURN = st.one_of(
    WORDS.map(U), WORDS.map(A), WORDS.map(A), st.builds(lambda t: A(t, train=False), WORDS), st.just(A("", tool_calls=[CALL])),
    WORDS.map(T), st.builds(lambda a, b: A(a, reasoning_content=b), WORDS, WORDS),
)  # fmt: skip
RECORDS = st.lists(st.builds(lambda s, turns: s + turns, st.sampled_from([[], [S("sys")]]), st.lists(TURN, min_size=1, max_size=8)), min_size=1, max_size=5)


@settings(max_examples=120, deadline=None)
@given(RECORDS, st.integers(3, 260), st.sampled_from(["turns", "start", "refuse"]), st.sampled_from(["assistant", "last", "all"]), st.booleans())
def test_any_conversation_trains_something_or_is_counted(records, seq_len, too_long, train_on, thinking):
    tok, bad, kept = tokenizer(), BadRecords(skip=True), 0
    for number, record in enumerate(records):
        notes, before = Counter(), bad.total
        asked = {"style": Style(train_thinking=thinking), "notes": notes, "too_long": too_long, "train_on": train_on}
        for ids, mask in conversation_items([record], tok, seq_len, bad, **asked):
            kept += 1
            assert len(ids) <= seq_len and len(mask) == len(ids) and any(mask[1:]), number
            batch = Batch.shifted(torch.tensor([ids]), torch.tensor([mask]), Seq.rows(1, len(ids)))
            assert batch.n_targets() > 0
            ends = [i for i, (m, after) in enumerate(zip(mask, [*mask[1:], 0], strict=True)) if m and not after]
            if train_on != "all":  # no answer is cut: what is trained stops at an end of turn, or where a thought begins
                assert all(ids[i] == tok.im_end_id for i in ends)
            gone = notes["turns that did not fit"]
            texts = [m["content"] for m in record]
            shown = tok.decode(ids)
            assert gone == 0 or too_long != "refuse"
            stays = texts[: len(texts) - gone] if too_long != "start" else texts[len(texts) - 1 :]
            assert all(t in shown for t in stays)
            assert gone or ids == tok.render([{k: v for k, v in m.items() if k != "train"} for m in record])[0]
        assert bad.total - before in (0, 1)
    assert kept + bad.total == len(records), "no record is dropped uncounted"


@settings(max_examples=25, deadline=None)
@given(RECORDS, st.integers(40, 260), st.sampled_from(["turns", "start", "refuse"]))
def test_files_lose_no_record_uncounted(tmp_path_factory, records, seq_len, too_long):
    folder = tmp_path_factory.mktemp("files")
    file = write(folder / "r.jsonl", [{"messages": [{k: v for k, v in m.items() if k != "train"} for m in r]} for r in records])
    bad = BadRecords(skip=True)
    items = list(conversation_items(conversations([file], bad), tokenizer(), seq_len, bad, too_long=too_long))
    assert len(items) + bad.total == len(records)
    assert all("r.jsonl, line" in line for line in bad.found)


# Planted bugs: each must be caught by a check above.


def shift_by_one(patch):
    """The mask one token late: the first answer token is never trained."""
    right = Batch.shifted
    patch.setattr(Batch, "shifted", staticmethod(lambda tokens, mask, seq, **more: right(tokens, mask.roll(1, 1), seq, **more)))


def labels_not_shifted(patch):
    right = Batch.shifted

    def wrong(tokens, mask, seq, **more):
        made = right(tokens, mask, seq, **more)
        return Batch(tokens, torch.where(made.labels != IGNORE, tokens, IGNORE), seq, **more)

    patch.setattr(Batch, "shifted", staticmethod(wrong))


def end_of_turn_not_trained(patch):
    right = Tokenizer.render

    def wrong(self, *given, **more):
        ids, mask = right(self, *given, **more)
        return ids, [m and after for m, after in zip(mask, [*mask[1:], 0], strict=True)]

    patch.setattr(Tokenizer, "render", wrong)


def padding_trained(patch):
    right = Batch.shifted

    def wrong(tokens, mask, seq, **more):
        made = right(tokens, mask, seq, **more)
        return Batch(tokens, torch.where(seq.seg == 0, tokens, made.labels), seq, **more)

    patch.setattr(Batch, "shifted", staticmethod(wrong))


def documents_leak(patch):
    class Blind(Seq):
        @staticmethod
        def of_segments(seg):
            return Seq(Seq.of_segments((seg > 0).int()).pos, (seg > 0).int())

    patch.setattr(rows, "Seq", Blind)


def system_trained(patch):
    right = Tokenizer.render

    def wrong(self, messages, *given, **more):
        ids, mask = right(self, messages, *given, **more)
        return ids, [1] * 8 + mask[8:] if messages[0]["role"] == "system" else mask

    patch.setattr(Tokenizer, "render", wrong)


def half_an_answer_kept(patch):
    def wrong(messages, render, max_len, too_long="turns"):
        ids, mask = render(messages)
        return messages, (ids[:max_len], mask[:max_len])

    patch.setattr(chats, "fitted", wrong)


def calls_cut_from_their_results(patch):
    """Turns go one by one from the start, so that a result may stand without its call."""
    right = fitting.shorter
    patch.setattr(fitting, "shorter", lambda m, policy: (m[:1] + m[n:] for n in range(2, len(m))) if policy == "start" else right(m, policy))


def the_next_answer_is_left_out_too(patch):
    right = chats.marked

    def wrong(messages, render, train_on):
        out = {i + 2 for i, m in enumerate(messages) if m.get("train") is False}
        return right([m | ({"train": False} if i in out else {}) for i, m in enumerate(messages)], render, train_on)

    patch.setattr(chats, "marked", wrong)


def nothing_trained_kept(patch):
    """What fits is kept, whether or not it trains anything."""

    def wrong(messages, render, max_len, too_long="turns"):
        tried = ((turns, render(turns)) for turns in chain([messages], fitting.shorter(messages, too_long)))
        return next((turns, item) for turns, item in tried if len(item[0]) <= max_len)

    patch.setattr(chats, "fitted", wrong)


def thoughts_trained(patch):
    right = Tokenizer.render
    patch.setattr(Tokenizer, "render", lambda self, messages, prompt=False, **more: right(self, messages, prompt))


def the_first_answer_is_the_last(patch):
    right = trained_answers.marked

    def wrong(messages, render, train_on):
        if train_on != "last":
            return right(messages, render, train_on)
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        out = [m | ({"train": False} if m["role"] == "assistant" and i > first else {}) for i, m in enumerate(messages)]
        return right(out, render, "assistant")

    patch.setattr(chats, "marked", wrong)


CHECKS = {
    "gradients": lambda folder: check_gradients(folder, "chatml"),
    "thoughts": lambda folder: check_gradients(folder, "qwen3", thinking=False),
    "last": lambda folder: check_gradients(folder, "chatml", "last"),
    "empty": lambda folder: test_what_stays_must_train_something(),
    "packing": check_packing,
    "too long": lambda folder: [check_too_long(policy) for policy in KEPT],
    "left out": lambda folder: test_an_answer_that_its_record_leaves_out("chatml"),
}
BUGS = {
    shift_by_one: "gradients", labels_not_shifted: "gradients", end_of_turn_not_trained: "gradients", padding_trained: "gradients",
    documents_leak: "packing", system_trained: "gradients", half_an_answer_kept: "too long", calls_cut_from_their_results: "too long",
    the_next_answer_is_left_out_too: "left out", nothing_trained_kept: "empty", thoughts_trained: "thoughts", the_first_answer_is_the_last: "last",
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    check = CHECKS[BUGS[bug]]
    check(tmp_path / "right")
    bug(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, pytest.fail.Exception)):
        check(tmp_path / "wrong")


# The whole stage


def test_a_stage_with_every_choice(tmp_path):
    write_data(tmp_path / "data")
    seldom = {"save": {"every_s": 600.0, "keep": 1}, "fit": {"steps": 2}}
    run_stage(make_recipe(**recipe(tmp_path, "pretrain", **seldom)), quiet=True)
    keys = recipe(tmp_path, "sft", **seldom)
    keys["data"] |= {"train_on": "last", "too_long": "start"}
    keys["objective"] |= {"neftune": 5.0}
    result = run_stage(make_recipe(**keys), quiet=True)
    assert result.valid["valid_loss"] > 0 and isinstance(result.model, LM)
