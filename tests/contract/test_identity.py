"""Conversations in which a model says who it is: varied, valid, without doubles, held-out wordings apart; and it learns them."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources

import pytest
from click.testing import CliRunner

from tests.contract.stages import recipe, write_data
from tests.contract.test_sft import tokenizer
from zero2llm.cli import app
from zero2llm.data.chats import conversation_items
from zero2llm.data.schemas import conversations
from zero2llm.data.sources import BadRecords
from zero2llm.lab.identity import identity_talks
from zero2llm.lab.recipe import BUILT_IN, load_recipe, make_recipe
from zero2llm.lab.stage import run_stage
from zero2llm.tokenizers.shipped import SHIPPED

NAME, BY = "小新 {by}", "Ada's lab"  # braces in a name stay as they are
WORDS = json.loads((resources.files("zero2llm") / "data" / "embedded" / "identity.json").read_text(encoding="utf-8"))


def run(*given, code=0):
    result = CliRunner().invoke(app, ["data", "identity", *map(str, given)])
    if code:
        assert isinstance(result.exception, ValueError), result.output
        return str(result.exception)
    assert result.exit_code == 0, result.exception
    return result.output


def asked(talks):
    return [talk["messages"][i]["content"] for talk in talks for i in range(0, len(talk["messages"]), 2)]


def answered(talks):
    return [talk["messages"][i]["content"] for talk in talks for i in range(1, len(talk["messages"]), 2)]


def chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text.replace("小新", "").replace("猫", ""))


def wording(question: str) -> str:
    """Without its opening, and with any other assistant's name as {other}."""
    for other in WORDS["others"]:
        question = question.replace(other, "{other}")
    lang = "zh" if chinese(question) else "en"
    for opening in sorted(WORDS["openings"][lang], key=len, reverse=True):
        if opening and question.startswith(opening):
            return question.removeprefix(opening)
    return question


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_wordings_are_different_and_complete(lang):
    everything = [ask for both in WORDS["topics"].values() for ask in both[lang]["ask"]] + [q for q, _ in WORDS["ordinary"][lang]]
    assert len(set(everything)) == len(everything) and all(map(str.strip, everything))
    for both in WORDS["topics"].values():
        says = both[lang]["say"]
        assert len(both[lang]["ask"]) >= 8 and len(set(says)) == len(says) >= 3
        assert all("{name}" in say or "{by}" in say for say in says)
    assert all(chinese(text) is (lang == "zh") for text in everything)


def test_records_are_varied_and_of_both_languages():
    talks = identity_talks(NAME, BY, 240)
    questions, answers = asked(talks), answered(talks)
    assert len(talks) == 240 and len(set(questions)) == len(questions), "no question twice"
    assert Counter(chinese(t["messages"][0]["content"]) for t in talks) == {True: 120, False: 120}
    assert Counter(len(t["messages"]) for t in talks) == {2: 180, 4: 60}
    named = [a for a in answers if NAME in a or BY in a]
    assert 0.5 < len(named) / len(answers) < 0.75, "most are about the model, not all"
    assert len(set(named)) > 35 and max(Counter(named).values()) <= 8, "no wording is luckier"
    assert not any("{" in text.replace(NAME, "") for text in questions + answers), "nothing is left to fill in"
    for talk in talks:  # an answer is of its question's language
        for q, a in zip(asked([talk]), answered([talk]), strict=True):
            assert q in " ".join(questions) and (chinese(q) is chinese(a) or "Translate" in q or "翻译" in q)


def test_held_out_wordings_stand_nowhere_else():
    train, valid = identity_talks(NAME, BY, 600), identity_talks(NAME, BY, 80, held_out=True)
    ours, theirs = set(map(wording, asked(train))), set(map(wording, asked(valid)))
    assert not ours & theirs and len(ours) > 120 and len(theirs) > 35
    everything = {ask for both in WORDS["topics"].values() for lang in both for ask in both[lang]["ask"]}
    everything |= {q for some in WORDS["ordinary"].values() for q, _ in some}
    assert ours | theirs <= everything and len(ours | theirs) > 0.95 * len(everything)


def test_same_seed_same_records_and_other_seeds_others():
    one = identity_talks(NAME, BY, 60)
    assert one == identity_talks(NAME, BY, 60) != identity_talks(NAME, BY, 60, seed=2)
    assert all(not chinese(q) for q in asked(identity_talks(NAME, BY, 60, langs=("en",))))
    pure = answered(identity_talks(NAME, BY, 60, ordinary=0))
    assert len(pure) == 60 and all(NAME in a or BY in a for a in pure)


def test_a_model_never_denies_its_own_name():
    talks = identity_talks("Qwen", BY, 600)
    assert not any("Qwen" in q for q in asked(talks)) and not any("not Qwen" in a or "不是Qwen" in a for a in answered(talks))


@pytest.mark.parametrize("template", SHIPPED)
def test_every_template_takes_them(tmp_path, template):
    run("--name", NAME, "--by", BY, "--out", tmp_path / "i.jsonl", "--n", 60, "--n-valid", 20)
    bad = BadRecords()
    for file, n in (("i.jsonl", 60), ("i-valid.jsonl", 20)):
        items = list(conversation_items(conversations([str(tmp_path / file)], bad), tokenizer(template), 1024, bad))
        assert len(items) == n and all(any(mask[1:]) for _, mask in items)


def test_the_verb_refuses_before_it_writes(tmp_path):
    out = tmp_path / "i.jsonl"
    assert "2 of them" in run("--name", "N", "--by", "b", "--out", out, "--n", 8, "--n-valid", 4)
    assert "already exists" in run("--name", "N", "--by", "b", "--out", out, code=2)
    run("--name", "N", "--by", "b", "--out", out, "--overwrite", "--lang", "zh", "--n", 10)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 10
    (tmp_path / "j-valid.jsonl").write_text("mine")
    assert "j-valid.jsonl already exists" in run("--name", "N", "--by", "b", "--out", tmp_path / "j.jsonl", code=2)
    for given, says in (
        (("--name", ""), "--name ''"), (("--name", "a\nb"), "one line"), (("--by", " x"), "without blanks"), (("--name", "x" * 81), "1 to 80"),
        (("--n", 1), "at least one each"), (("--n", 9000), "ask for fewer"), (("--n-valid", 900), "ask for fewer"), (("--ordinary", 1.0), "below 1"),
        (("--lang", "en", "--lang", "en"), "at least one each"),
    ):  # fmt: skip
        options = {"--name": "N", "--by": "b"} if given[0] not in ("--name", "--by") else {"--name": "N", "--by": "b"} | {given[0]: given[1]}
        extra = () if given[0] in options else given
        assert says in run(*[x for pair in options.items() for x in pair], *extra, "--out", tmp_path / "k.jsonl", code=2)
        assert not (tmp_path / "k.jsonl").exists() and not (tmp_path / "k-valid.jsonl").exists()
    assert "written as .jsonl" in run("--name", "N", "--by", "b", "--out", tmp_path / "k.csv", code=2)


def test_the_recipe_parses_and_a_model_learns_its_name(tmp_path):
    """The recipe's data and objective on a tiny model: the answers' loss falls, and every prompt of the recipe can be asked."""
    run("--name", "Nova", "--by", BY, "--out", tmp_path / "i.jsonl", "--n", 60)
    found = load_recipe(BUILT_IN / "sft-identity.yaml")
    assert found.objective.kind == "sft" and len(found.eval.prompts) >= 4
    write_data(tmp_path / "data")
    seldom = {"save": {"every_s": 600.0, "keep": 1}, "eval": {"every": 12, "prompts": ["Who are you?"], "sample_tokens": 4}}
    keys = recipe(tmp_path, "pretrain", **seldom)
    keys["model"]["max_len"] = 256
    run_stage(make_recipe(**keys), quiet=True)
    sft = recipe(tmp_path, "sft", data={"train": [str(tmp_path / "i.jsonl")], "valid": [str(tmp_path / "i-valid.jsonl")], "skip_bad_records": False}, seq_len=256, batch_tokens=1024, **seldom)
    sft["fit"]["steps"] = 24
    result = run_stage(make_recipe(**sft), quiet=True)
    records = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [r["valid_loss"] for r in records if "valid_loss" in r]
    assert losses[-1] < losses[0] - 0.1 and result.valid["valid_loss"] == losses[-1]
