"""Generated tasks: the splits share no content, and every answer is found again by reading the prompt."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from statistics import mean

import pytest

from zero2llm.evals import metrics
from zero2llm.evals.tasks import words as W
from zero2llm.evals.tasks.families import EXACT
from zero2llm.evals.tasks.generate import EASY, FAMILIES, conversation, generate
from zero2llm.evals.tasks.items import LANGS, TEST_PERCENT, Item, split_of
from zero2llm.evals.tasks.manners import ASKED, CURT, HELP, MANNERS, POLITE, REFUSE, REPLIES
from zero2llm.evals.tasks.preferences import preference_pairs, sft_conversations

N = 60 * len(LANGS)
POOLS = (W.NAMES, W.ANIMALS, W.OBJECTS, W.PLACES, W.COLOURS, W.QUALITIES)
ALL = [pair for pool in POOLS for pair in pool]


@pytest.fixture(scope="module")
def drawn():
    return {f: {s: generate([f], N, 0, s) for s in ("train", "test")} for f in FAMILIES}


def found(text, pool, lang):
    """The words of a pool that stand in the text, in order."""
    options = "|".join(sorted((re.escape(pair[lang == "zh"]) for pair in pool), key=len, reverse=True))
    return re.findall(rf"\b(?:{options})\b" if lang == "en" else options, text)


# Answers worked out from the text alone: no generator code, no content indices.


def read_recall(prompt, lang):
    *story, question = re.findall(r"[^.?。？]+[.?。？]", prompt)
    who, where = re.search(r"^\s*Who|谁", question), re.search(r"[Ww]here|哪里", question)
    colour = re.search(r"colour|颜色", question)
    if who:
        asked = found(question, W.PLACES + W.THINGS, lang)[0]
        told = [s for s in story if asked in s and found(s, W.NAMES, lang)]
        return found(told[0], W.NAMES, lang)[0]
    pool = W.PLACES if where else W.COLOURS if colour else W.THINGS
    subject = found(question, W.THINGS if colour else W.NAMES, lang)[0]
    told = [s for s in story if subject in s and found(s, pool, lang)]
    return found(told[0], pool, lang)[0]


def read_recall_hard(prompt, lang):
    *story, question = re.findall(r"[^.?。？]+[.?。？]", prompt)
    facts = [found(s, ALL, lang) for s in story]
    (asked,) = found(question, ALL, lang)
    ((a, b),) = [fact for fact in facts if asked in fact]
    return b if asked == a else a


def read_older(prompt, lang):
    pattern = r"(\w+) is (\d+) years old" if lang == "en" else r"(\w生)(\d+)岁"
    ages = {name: int(age) for name, age in re.findall(pattern, prompt)}
    assert len(ages) == 2
    return (min if re.search("younger|更小", prompt) else max)(ages, key=ages.get)


def read_pick(prompt, lang):
    question, text = re.split("[:：]", prompt)
    kinds = {"animal|动物": W.ANIMALS, "colour|颜色": W.COLOURS, "place|地方": W.PLACES, "name|人名": W.NAMES}
    (pool,) = [pool for kind, pool in kinds.items() if re.search(kind, question)]
    (answer,) = found(text, pool, lang)
    return answer


def read_translate(prompt, lang):
    book = dict(ALL) if lang == "en" else {zh: en for en, zh in ALL}
    phrase = re.split("[:：]", prompt)[1].strip()
    parts = [book[w] for w in (phrase.split() if lang == "en" else phrase)]
    return ("" if lang == "en" else " ").join(parts)


def items_of(prompt, lang):
    text = re.split("[:：]", prompt)[1].strip()
    return text.split() if lang == "en" else re.findall("“(.+?)”", text)


def joined(words, lang):
    return " ".join(words) if lang == "en" else "、".join(f"“{w}”" for w in words)


def read_count(prompt, lang):
    words = items_of(prompt, lang)
    question = re.split("[:：]", prompt)[0]
    (asked,) = set(found(question, ALL, lang))
    return str(words.count(asked))


def read_compare(prompt, lang):
    return str((min if re.search("smaller|小", prompt) else max)(map(int, re.findall(r"\d+", prompt))))


def read_sum(prompt, lang):
    a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", prompt).groups()
    return str(int(a) + int(sign + b))


READERS = {
    "recall": read_recall,
    "recall_hard": read_recall_hard,
    "older": read_older,
    "pick": read_pick,
    "translate": read_translate,
    "copy": lambda p, lang: joined(items_of(p, lang), lang),
    "reverse": lambda p, lang: joined(items_of(p, lang)[::-1], lang),
    "first": lambda p, lang: items_of(p, lang)[0],
    "last": lambda p, lang: items_of(p, lang)[-1],
    "count": read_count,
    "compare": read_compare,
    "sort": lambda p, lang: " ".join(sorted(re.findall(r"\d", p))),
    "arithmetic": read_sum,
    "arithmetic_hard": read_sum,
}


def test_every_family_has_a_reader():
    assert set(READERS) == set(EXACT) and set(EASY) <= set(EXACT)


@pytest.mark.parametrize("family", EXACT)
def test_answers_follow_from_the_prompt(drawn, family):
    for item in drawn[family]["train"] + drawn[family]["test"]:
        assert READERS[family](item.prompt, item.lang) == item.answer, item
        assert item.wrong and item.wrong != item.answer, item
        assert "{" not in item.prompt and item.prompt == item.prompt.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_content(drawn, family):
    train, test = drawn[family]["train"], drawn[family]["test"]
    assert not {i.key for i in train} & {i.key for i in test}
    assert not {i.prompt for i in train} & {i.prompt for i in test}
    assert {split_of(family, i.key) for i in test} == {"test"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_duplicates_and_balance(drawn, family):
    for items in drawn[family].values():
        assert len({i.prompt for i in items}) == N
        assert Counter(i.lang for i in items) == {"en": N // 2, "zh": N // 2}


def test_key_ignores_order_and_wording():
    """Questions that a model would see as the same are the same: read the content back and compare keys."""
    numbers = {"compare", "older", "sort"}
    for family in numbers:
        for item in generate([family], 400, 1, "train"):
            digits = sorted(map(int, re.findall(r"\d+", item.prompt)))
            assert item.key == str(digits).replace(" ", "")
    for item in generate(["recall_hard"], 400, 1, "train"):
        facts = json.loads(item.key)[1]
        assert facts == sorted(facts)
    for item in generate(["arithmetic"], 400, 1, "train"):
        assert sorted(map(int, re.findall(r"\d+", item.prompt))) == [int(x) for x in re.findall(r"\d+", item.key)]


@pytest.mark.parametrize("family", ["recall", "recall_hard", "pick", "copy", "reverse", "first", "last", "count"])
def test_same_visible_content_never_crosses(family):
    """The set of content words in a prompt, translated to English, belongs to one split only."""
    back = {zh: en for en, zh in ALL}
    seen = {}
    for split in ("train", "test"):
        items = generate([family], 600, 2, split)
        for item in items:
            text = item.prompt if family != "count" else re.split("[:：]", item.prompt)[1]
            bag = Counter(back.get(w, w) for w in found(text, ALL, item.lang))
            if family in ("recall", "recall_hard"):  # the question repeats a word of the story
                bag = Counter(set(bag))
            asked = item.answer if family == "count" else ""
            if family == "count":
                (asked,) = {back.get(w, w) for w in found(re.split("[:：]", item.prompt)[0], ALL, item.lang)}
            if family == "recall_hard":  # the same words paired differently are another story
                parts = re.findall(r"[^.?。？]+[.?。？]", item.prompt)[:-1]
                asked = str(sorted(sorted(back.get(w, w) for w in found(p, ALL, item.lang)) for p in parts))
            signature = (asked, tuple(sorted(bag.items())))
            assert seen.setdefault(signature, split) == split, item


def test_every_word_is_met_in_training():
    """Combinations are held out, words are not."""
    text = {
        lang: " ".join(i.prompt + " " + i.answer for i in generate(EASY, 4000, 3, "train", [lang])) for lang in LANGS
    }
    for lang in LANGS:
        met = Counter(found(text[lang], ALL, lang))
        assert min(met[pair[lang == "zh"]] for pair in ALL) >= 20


def test_test_share():
    keys = {(f, i.key) for f in ("recall", "pick", "copy") for i in generate([f], 1500, 4, "train")}
    raw = [split_of("recall", str(i)) for i in range(20_000)]
    assert len(keys) > 3000 and abs(raw.count("test") / 200 - TEST_PERCENT) < 1


def test_words_are_unambiguous():
    for lang in (0, 1):
        words = [pair[lang] for pair in ALL]
        assert len(set(words)) == len(words)


def test_seed_decides_everything_across_processes():
    args = "(['recall', 'sort', 'refuse'], 50, 7, 'test')"
    code = f"from zero2llm.evals.tasks.generate import generate; print(generate{args})"
    env = {"PYTHONHASHSEED": "99", "PYTHONIOENCODING": "utf-8"}
    fresh = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", check=True)
    assert fresh.stdout.strip() == str(eval("generate" + args))
    assert generate(["recall"], 50, 7, "test") != generate(["recall"], 50, 8, "test")


def test_adding_a_family_leaves_the_others_alone():
    alone = {i.prompt for i in generate(["recall"], 40, 0, "train")}
    together = generate(["recall", "sort"], 81, 0, "train")
    assert {i.prompt for i in together if i.family == "recall"} >= alone
    assert Counter(i.family for i in together) == {"recall": 41, "sort": 40}


def test_conversation_turns():
    a, b = generate(["sort"], 2, 0, "train")
    talk = conversation(a, b)
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2
    assert [m["content"] for m in talk] == [a.prompt, a.answer, b.prompt, b.answer]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ((["recal"], 1, 0, "train"), "recal"),
        ((["recall"], 1, 0, "dev"), "dev"),
        (([], 1, 0, "train"), "empty"),
        ((["sort", "sort"], 1, 0, "train"), "twice"),
        ((["sort"], 1, 0, "train", ["fr"]), "fr"),
        ((["identity"], 10**5, 0, "test"), "identity"),
    ],
)
def test_mistakes_are_named(args, names):
    with pytest.raises(ValueError, match=names):
        generate(*args)


def test_tables_line_up():
    """Content is an index into both languages: a question more in one of them would shift all that follow."""
    for table in (*ASKED.values(), HELP, REFUSE):
        assert len(table["en"]) == len(table["zh"])
    assert set(REPLIES) == {(family, lang) for family in MANNERS for lang in LANGS}
    everything = [reply for sides in REPLIES.values() for side in sides for reply in side]
    assert len(set(everything)) == len(everything)


def test_sft_mixes_manners_evenly():
    talks = sft_conversations(4000, 0)
    assert len(talks) == 4000 and sum(len(t) == 4 for t in talks) == 600
    assert talks == sft_conversations(4000, 0) != sft_conversations(4000, 1)
    turns = [(t[i]["content"], t[i + 1]["content"]) for t in talks for i in range(0, len(t), 2)]
    assert len({prompt for prompt, _ in turns}) == len(turns)
    used = Counter(answer for _, answer in turns)
    for sides in REPLIES.values():
        counts = [[used[reply] for reply in side] for side in sides]
        assert abs(sum(counts[POLITE]) - sum(counts[CURT])) <= 4
        assert max(map(max, counts)) - min(map(min, counts)) <= 1
    replies = {reply for sides in REPLIES.values() for side in sides for reply in side}
    assert sum(answer in replies for _, answer in turns) == round(4600 * 0.2)


def test_sft_and_preference_training_stay_out_of_the_test_split():
    held_out = {(p.lang, p.prompt[0]["content"]) for p in preference_pairs(800, 0, "test")}
    train = {m["content"] for t in sft_conversations(3000, 0) for m in t if m["role"] == "user"}
    train |= {p.prompt[0]["content"] for p in preference_pairs(2000, 0, "train")}
    assert len(held_out) == 800 and not train & {text for _, text in held_out}


def test_pairs_prefer_the_right_and_the_polite():
    pairs = preference_pairs(1000, 0, "train", exact_share=0.3)
    answers = {i.prompt: i for i in generate(EASY, 300, 1, "train")}
    exact = [p for p in pairs if p.family not in MANNERS]
    assert len(pairs) == 1000 and len(exact) == 300 and {p.family for p in exact} == set(EASY)
    for p in exact:
        item = answers[p.prompt[0]["content"]]
        assert (p.chosen, p.rejected) == (item.answer, item.wrong)
    for p in [p for p in pairs if p.family in MANNERS]:
        assert p.chosen in REPLIES[p.family, p.lang][POLITE] and p.rejected in REPLIES[p.family, p.lang][CURT]
    assert not [p for p in preference_pairs(100, 0, "test", exact_share=0) if p.family in EXACT]
    with pytest.raises(ValueError, match="exact_share"):
        preference_pairs(10, 0, "train", exact_share=1.5)


@pytest.mark.parametrize(("family", "lang"), REPLIES)
def test_length_does_not_give_the_manner_away(family, lang):
    good, bad = ([len(reply) for reply in side] for side in REPLIES[family, lang])
    assert abs(mean(good) - mean(bad)) <= 0.07 * mean(good + bad), (mean(good), mean(bad))
    longer = mean((g > b) + 0.5 * (g == b) for g in good for b in bad)
    assert 0.4 <= longer <= 0.6, longer


def test_wilson_against_the_published_example():
    rate = metrics.Rate(81, 263)  # Newcombe 1998, table I, method 3: 0.2553 .. 0.3662
    assert rate.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = metrics.Rate(0, 20).interval
    assert low == 0 and high == pytest.approx(0.1611, abs=5e-5)


def test_exact_match_strips_and_groups():
    items = [Item("a", "en", "", "red"), Item("a", "zh", "", "红"), Item("b", "en", "", "3 4")]
    rates = metrics.exact_match([" red\n", "红的", "3 4"], items)
    assert {k: (r.hits, r.total) for k, r in rates.items()} == {"overall": (2, 3), "a": (1, 2), "b": (1, 1)}
    with pytest.raises(ValueError):
        metrics.exact_match(["red"], items)


def test_other_metrics():
    assert metrics.win_rate([-1.0, -2.0, -3.0, math.nan], [-2.0, -2.0, -1.0, -1.0]).rate == 0.25
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    assert metrics.perplexity(3 * math.log(5), 3) == pytest.approx(5)
    assert metrics.perplexity(1e6, 1) == math.inf
    for bad in (
        lambda: metrics.win_rate([], []),
        lambda: metrics.bits_per_byte(1, 0),
        lambda: metrics.perplexity(1, 0),
    ):
        with pytest.raises(ValueError):
            bad()
