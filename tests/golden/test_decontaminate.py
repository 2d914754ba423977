"""Decontamination against sets of token windows in plain Python, its cuts by hand; planted bugs."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from zero2llm.core.config import parse
from zero2llm.data.document import Document, Removed
from zero2llm.data.steps import decontaminate
from zero2llm.data.steps.decontaminate import BASE, Decontaminate, DecontaminateConfig, EvaluationSet, strings, windows

WORDS = [
    f"{a}{b}"
    for a in ("ka", "lo", "mi", "ne", "pu", "ro", "sa", "ti")
    for b in ("ban", "der", "fel", "gor", "hun", "jas")
]
HAN = "春江潮水連海平海上明月共潮生灩灩隨波千萬里何處江無流宛轉遶芳甸照花林皆似霰空流霜不覺飛汀白沙看見"


def write(folder, name, records):
    path = folder / name
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def step_of(tmp_path, texts, **keys):
    return DecontaminateConfig(
        against=(EvaluationSet(name="quiz", paths=(write(tmp_path, "quiz.jsonl", [{"text": t} for t in texts]),)),),
        **keys,
    ).build()


def say(n, seed, words=WORDS, blank=" "):
    rng = random.Random(seed)
    return blank.join(rng.choice(words) for _ in range(n))


def han(n, seed):
    return say(n, seed, HAN, "")


def hit(step, text):
    return isinstance(step(Document(text, "here")), Removed)


# Checks that planted bugs must not pass


def check_words(tmp_path):
    item = say(30, 1)
    step = step_of(tmp_path, [item])
    inside = lambda n: f"{say(40, 2)} {' '.join(item.split()[5 : 5 + n])} {say(40, 3)}"
    assert not hit(step, inside(12)) and hit(step, inside(13)) and hit(step, inside(30))
    shuffled = item.split()[5:18]
    shuffled[3], shuffled[4] = shuffled[4], shuffled[3]
    assert not hit(step, " ".join(shuffled))  # the same words in another order
    assert hit(step, " ".join(item.split()[:13])) and hit(step, " ".join(item.split()[-13:]))


def check_writing(tmp_path):
    step = step_of(tmp_path, ["It's the one, that (we) don't know: who wrote it, when, and WHERE it was."])
    assert hit(step, "its THE one that we dont know who wrote it when and where it was")
    assert hit(step, "“It’s the one -- that we don’t know; who\nwrote it — when? And where it was!")
    assert hit(step, "Ｉｔ's the one that we don't know who wrote it when and where")
    assert not hit(step, "It's the one that we do not know who wrote it when and where")


def check_chinese(tmp_path):
    item = han(45, 1)
    step = step_of(tmp_path, [item, say(20, 4)])
    inside = lambda n: f"{han(30, 2)}，{'，'.join(item[5 : 5 + n])}。{han(30, 3)}"
    assert not hit(step, inside(19)) and hit(step, inside(20))
    assert hit(step, f"{han(30, 2)} {say(20, 4)} {han(30, 3)}")  # an English question inside Chinese text


def check_short_items(tmp_path):
    step = step_of(tmp_path, [say(9, 1), say(7, 2), han(12, 3), han(11, 4), say(30, 5)])
    assert step.too_short == {"quiz": 2}
    assert hit(step, f"{say(5, 6)} {say(9, 1)} {say(5, 7)}") and hit(step, han(12, 3))
    assert not hit(step, f"{say(5, 6)} {say(7, 2)} {say(5, 7)}") and not hit(step, han(11, 4))
    assert not hit(step, " ".join(say(9, 1).split()[:8]))  # a short item counts only whole
    assert not hit(step, " ".join(say(30, 5).split()[:9]))  # and does not make a long one's start suspect


def check_cut(tmp_path):
    item = say(13, 1)
    keys = {"action": "cut", "margin": 3, "min_part": 5, "max_parts": 3}
    step = step_of(tmp_path, [item], **keys)
    left, right = say(20, 2).split(), say(12, 3).split()
    doc = Document(f"{' '.join(left)}. {item}; {' '.join(right)}!", "here", {"id": 7})
    first, second = step(doc)
    assert first.text == " ".join(left[:-3]) and second.text == " ".join(right[3:]) + "!"
    assert (first.where, second.where) == ("here, part 1", "here, part 2") and first.meta == second.meta == {"id": 7}
    size = len(f"{' '.join(left)}. {item}; {' '.join(right)}!") - len(first.text) - 1 - len(second.text)
    assert (
        first.notes == {"decontaminate: documents cut": 1, "decontaminate: characters cut": size} and not second.notes
    )
    assert [d.text for d in step(Document(f"{item} {' '.join(right)}", ""))] == [" ".join(right[3:])]
    assert step(Document(f"{' '.join(left[:7])} {item}", "")).detail.endswith("no part is long enough")
    assert [d.text for d in step(Document(f"{' '.join(left[:8])} {item}", ""))] == [" ".join(left[:5])]
    many = f" {item} ".join(say(11, i) for i in range(4))
    assert step(Document(many, "")).detail.endswith("cut into 4 parts")
    chinese = step_of(tmp_path, [han(20, 1)], **keys)  # margin 3 * 20 / 13 = 5 characters
    assert [d.text for d in chinese(Document(han(20, 2) + han(20, 1) + han(20, 3), ""))] == [
        han(20, 2)[:-5],
        han(20, 3)[5:],
    ]


def check_windows():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 40).astype(np.uint64) * np.uint64(2) + np.uint64(1)
    for n, found in zip((1, 7, 13, 40, 41, 60), windows(hashes, [1, 7, 13, 40, 41, 60]), strict=True):
        inverse = pow(BASE, -1, 1 << 64)
        expected = [
            (n + sum(int(hashes[i + j]) * pow(inverse, j, 1 << 64) for j in range(n))) % (1 << 64)
            for i in range(40 - n + 1)
        ]
        assert found.tolist() == expected


def check_against_sets(tmp_path):
    """Random items and documents: the same verdicts as sets of tuples give."""
    rng = random.Random(0)
    pool = [say(rng.randrange(8, 30), i, WORDS[:12]) if i % 2 else han(rng.randrange(13, 40), i) for i in range(40)]
    step, known = step_of(tmp_path, pool), set()
    for text in pool:
        tokens, n = (list(text), 20) if text[0] in HAN else (text.split(), 13)
        n = min(n, len(tokens))
        known |= {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
    verdicts = Counter()
    for i in range(300):
        piece = rng.choice(pool)
        tokens = list(piece) if piece[0] in HAN else piece.split()
        at = rng.randrange(len(tokens))
        part = tokens[at : at + rng.randrange(8, 30)]
        tokens = [*say(20, i, WORDS[:12]).split(), *part, *han(20, i)]
        expected = any(
            tuple(tokens[a : a + n]) in known for n in {len(k) for k in known} for a in range(len(tokens) - n + 1)
        )
        assert hit(step, " ".join(tokens)) == expected
        verdicts[expected] += 1
    assert min(verdicts[True], verdicts[False]) > 30


def test_words(tmp_path):
    check_words(tmp_path)


def test_writing(tmp_path):
    check_writing(tmp_path)


def test_chinese(tmp_path):
    check_chinese(tmp_path)


def test_short_items(tmp_path):
    check_short_items(tmp_path)


def test_cut(tmp_path):
    check_cut(tmp_path)


def test_windows():
    check_windows()


def test_against_sets(tmp_path):
    check_against_sets(tmp_path)


# Sets, reports, mistakes


def test_fields_and_the_report(tmp_path):
    assert list(strings(["a", {"role": "user", "content": "b"}, {"x": ["c", 3]}])) == ["a", "b", "c"]
    file = write(tmp_path, "chat.jsonl", [{"q": say(5, 1), "turns": [{"role": "user", "content": say(20, 2)}]}])
    quiz = EvaluationSet(name="chat", paths=(file,), fields=("q", "turns"))
    step = DecontaminateConfig(against=(quiz,)).build()
    found = step(Document(f"{say(9, 8)} {say(20, 2)}", "here"))
    assert found.reason == "overlaps chat"
    assert found.detail == f"{file}, line 1: {' '.join(say(20, 2).split()[:13])!r}"
    with pytest.raises(ValueError, match="line 1: no field 'question'; it has: q, turns"):
        DecontaminateConfig(against=(EvaluationSet(name="chat", paths=(file,), fields=("question",)),)).build()


def test_embedded_text_is_found_in_itself_and_not_elsewhere():
    songs = EvaluationSet(name="poetry", paths=("embedded:zh_poetry_small",))
    step = DecontaminateConfig(against=(songs,)).build()
    assert hit(step, "他在书里读到了这样几句：关关雎鸠在河之洲窈窕淑女君子好逑参差荇菜左右流之。")
    assert not hit(step, "昨天下午，我和朋友去了城里的图书馆。那里的书很多，我们在二楼找到了一本关于黄河的旧书。")


def test_words_forgotten_and_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(decontaminate, "MAX_WORDS", 10)
    step = step_of(tmp_path, [say(20, 1)])
    assert all(hit(step, say(20, 1)) and not hit(step, say(60, seed)) for seed in range(2, 9))
    assert len(step.hashes) < 100


def test_mistakes(tmp_path):
    quiz = {"name": "quiz", "paths": ["a.jsonl"]}
    assert parse(DecontaminateConfig, {"against": [quiz]}).against[0].fields == ("text",)
    for keys, message in (
        ({"against": []}, "against is empty"),
        ({"against": [quiz], "n": 5}, "shortest = 8 and n = 5"),
        ({"against": [quiz], "n_characters": 10}, "n_characters = 10 < n = 13"),
        ({"against": [quiz], "margin": -1}, "margin = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(DecontaminateConfig, keys)
    with pytest.raises(ValueError, match="no item of 'quiz' has 8 words"):
        step_of(tmp_path, ["too short"])
    for text in ("", " ", "\ud800", "。，", "a" * 100_000):
        doc = Document(text, "")
        assert step_of(tmp_path, [say(20, 1)])(doc) is doc


# Planted bugs


def order_of_words_is_lost(patch):
    def wrong(hashes, lengths):
        total = np.concatenate([np.zeros(1, np.uint64), hashes.cumsum()])
        return [total[n:] - total[:-n] + np.uint64(n) for n in lengths]

    patch.setattr(decontaminate, "windows", wrong)
    patch.setitem(globals(), "windows", wrong)


def last_window_is_lost(patch):
    right = windows
    patch.setattr(decontaminate, "windows", lambda hashes, lengths: [part[:-1] for part in right(hashes, lengths)])


def windows_depend_on_their_place(patch):
    def wrong(hashes, lengths):
        total = np.concatenate(
            [np.zeros(1, np.uint64), (hashes * decontaminate.powers(1024)[1][: len(hashes)]).cumsum()]
        )
        return [total[n:] - total[:-n] + np.uint64(n) for n in lengths]

    patch.setattr(decontaminate, "windows", wrong)


def capitals_differ(patch):
    patch.setattr(
        decontaminate,
        "unicodedata",
        type("N", (), {"normalize": lambda form, text: text + text[:1].swapcase() * text[:1].isupper()}),
    )


def blank_split_tokens(patch):
    patch.setattr(decontaminate, "_token", re.compile(r"\S+"))


def one_length_for_both_scripts(patch):
    right = DecontaminateConfig.build
    patch.setattr(DecontaminateConfig, "build", lambda self: right(decontaminate_replace(self, n_characters=self.n)))


def decontaminate_replace(cfg, **keys):
    from dataclasses import replace

    return replace(cfg, **keys)


def short_items_by_their_start(patch):
    right = Decontaminate._index
    patch.setattr(
        Decontaminate,
        "_index",
        lambda self, source, where, tokens, found: right(self, source, where, tokens[:8], found),
    )


def margin_on_one_side(patch):
    right = Decontaminate._cut

    def wrong(self, doc, hits, spans, removed):
        return right(self, doc, [(start + self.cfg.margin, item) for start, item in hits], spans, removed)

    patch.setattr(Decontaminate, "_cut", wrong)


CHECKS = {
    "words": check_words,
    "writing": check_writing,
    "chinese": check_chinese,
    "short": check_short_items,
    "cut": check_cut,
    "windows": lambda tmp_path: check_windows(),
    "sets": check_against_sets,
}
BUGS = {
    order_of_words_is_lost: {"words", "windows"},
    last_window_is_lost: {"words", "sets"},
    windows_depend_on_their_place: {"words", "chinese", "sets"},
    capitals_differ: {"writing"},
    blank_split_tokens: {"writing", "chinese"},
    one_length_for_both_scripts: {"chinese", "sets"},
    short_items_by_their_start: {"words", "short", "sets"},
    margin_on_one_side: {"cut"},
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    bug(monkeypatch)
    found = set()
    for name in BUGS[bug]:
        try:
            CHECKS[name](tmp_path)
        except (AssertionError, ValueError):
            found.add(name)
    assert found == BUGS[bug]
