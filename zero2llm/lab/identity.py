"""`zero2llm data identity`: conversations in which a model says who it is, in English and Chinese, with ordinary ones between.

    question = opening + wording        answer = one of the topic's, dealt out evenly, with the name and the maker filled in
    every fourth wording of a topic, and every fourth ordinary question, stands in the held-out file and nowhere else

Why: fine-tuning on nothing but "who are you" makes a model say its name to every question. A third of the conversations
is about other things, some of which begin or end one that is about the name; and so that the model does not learn to say
its name after one greeting, all kinds of questions share their openings.
Source of the wordings: written for this project, data/embedded/identity.json.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources
from itertools import product
from pathlib import Path
from random import Random

from zero2llm.core.log import console
from zero2llm.lab.data_files import with_held_out, write_records

LANGS = ("en", "zh")
HELD_OUT = 4  # every so many-th wording
LONGEST = 80  # characters of a name
TWO_TURNS = 0.25  # share of conversations with two questions
Ask = tuple[str, str, str]  # question, answer, what it is about


def identity_talks(
    name: str, by: str, n: int, *, held_out: bool = False, langs: tuple[str, ...] = LANGS, ordinary: float = 1 / 3, seed: int = 1
) -> list[dict]:
    """``n`` records of the schema conversation, no two alike. A quarter asks about the model and about something else; of the
    rest, ``ordinary`` is the share about something else alone.

    Raises ValueError for an impossible name or number.
    """
    _check(name, by, n, langs, ordinary)
    words = json.loads((resources.files("zero2llm") / "data" / "embedded" / "identity.json").read_text(encoding="utf-8"))
    found = []
    for lang, size in zip(langs, _shares(n, len(langs)), strict=True):
        rng = Random(f"{seed}/{held_out}/{lang}")
        own, other = (_deck(asks, rng) for asks in (_identity(words, lang, name, by, held_out), _ordinary(words, lang, held_out)))
        double = round(size * TWO_TURNS) if ordinary else 0  # a question of each kind in one conversation
        n_other = round((size - double) * ordinary)
        if size - n_other > len(own) or double + n_other > len(other):
            raise ValueError(
                f"{n} conversations: {lang!r} has {len(own)} different questions about the model and {len(other)} others, and "
                f"{size - n_other} and {double + n_other} are needed; ask for fewer"
            )
        both = list(zip(own[:double], other[:double], strict=True))
        found += [pair if i % 2 else pair[::-1] for i, pair in enumerate(both)]
        found += [(one,) for one in own[double : size - n_other] + other[double : double + n_other]]
    Random(f"order/{seed}/{held_out}").shuffle(found)
    return [{"messages": [m for asked in talk for m in _turns(*asked)]} for talk in found]


def _check(name: str, by: str, n: int, langs: tuple[str, ...], ordinary: float) -> None:
    for option, value in (("--name", name), ("--by", by)):
        if not value.strip() or value != value.strip() or len(value) > LONGEST or not value.isprintable():
            raise ValueError(f"{option} {value!r}: one line of 1 to {LONGEST} characters without blanks at its ends was expected")
    if n < len(langs) or not langs or len(set(langs)) < len(langs) or not set(langs) <= set(LANGS):
        raise ValueError(f"n = {n} conversations in {list(langs)}: at least one each in some of {', '.join(LANGS)} was expected")
    if not 0 <= ordinary < 1:
        raise ValueError(f"--ordinary {ordinary}: a share from 0 to below 1 was expected")


def _shares(n: int, parts: int) -> list[int]:
    return [n // parts + (i < n % parts) for i in range(parts)]


def _identity(words: dict, lang: str, name: str, by: str, held_out: bool) -> list[list[Ask]]:
    """The questions of each topic with every opening; a topic's answers come in turn, so that none is luckier."""
    found = []
    for topic, both in words["topics"].items():
        asks, says = _side(both[lang]["ask"], held_out), both[lang]["say"]
        others = [one for one in _side(words["others"], held_out) if one.lower() != name.lower()]
        table = [{"name": name, "by": by, "other": others[i % len(others)]} for i in range(len(asks) * len(words["openings"][lang]))]
        pairs = list(product(words["openings"][lang], asks))
        found.append([(o + _filled(ask, t), _filled(says[i % len(says)], t), topic) for i, ((o, ask), t) in enumerate(zip(pairs, table, strict=True))])
    return found


def _ordinary(words: dict, lang: str, held_out: bool) -> list[list[Ask]]:
    pairs = product(words["openings"][lang], _side(words["ordinary"][lang], held_out))
    return [[(opening + ask, say, "ordinary") for opening, (ask, say) in pairs]]


def _side(wordings: list, held_out: bool) -> list:
    return [one for i, one in enumerate(wordings) if (i % HELD_OUT == HELD_OUT - 1) is held_out]


def _filled(text: str, table: dict[str, str]) -> str:
    """In one pass: a name may itself hold braces."""
    return re.sub(r"\{(name|by|other)\}", lambda found: table[found[1]], text)


def _deck(topics: list[list[Ask]], rng: Random) -> list[Ask]:
    """All questions, each topic shuffled, dealt out in turn until each topic is used up; no question twice."""
    for asks in topics:
        rng.shuffle(asks)
    dealt = [asks[i] for i in range(max(map(len, topics))) for asks in topics if i < len(asks)]
    return list({ask[0]: ask for ask in reversed(dealt)}.values())[::-1]


def _turns(question: str, answer: str, topic: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_identity(
    out: Path, name: str, by: str, n: int, n_valid: int, langs: tuple[str, ...], ordinary: float, seed: int, overwrite: bool
) -> None:
    """``out`` and, beside it, the held-out questions in NAME-valid. Raises ValueError before anything is written."""
    out, valid = with_held_out(out, "conversations", overwrite)
    given = {"langs": langs, "ordinary": ordinary, "seed": seed}
    sides = {out: identity_talks(name, by, n, **given), valid: identity_talks(name, by, n_valid, held_out=True, **given)}
    for path, talks in sides.items():
        write_records(path, talks, "conversation", overwrite)
        turns = Counter(len(talk["messages"]) // 2 for talk in talks)
        console().print(f"{path}: {len(talks)} conversations, {turns[2]} of them with two questions", markup=False, soft_wrap=True)
