"""The perplexity filter against Kneser-Ney worked through in loops, its bounds, its cache; planted bugs."""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.golden.test_ngram import Loops
from zero2llm.core.config import parse
from zero2llm.data.document import Document, Removed
from zero2llm.data.ngram import KneserNey
from zero2llm.data.steps import perplexity, reference
from zero2llm.data.steps.perplexity import PerplexityConfig, PerplexityRankConfig
from zero2llm.data.steps.reference import END, FIRST, UNKNOWN, Scorer
from zero2llm.tokenizers.tokenizer import Tokenizer

ENGLISH = "the cat|a dog|my friend|the old man|her sister|a bird".split("|")
DOES = "sat on|looked at|walked to|found|went past|came from".split("|")
THINGS = "the mat.|the river.|a house.|the garden wall.|an apple tree.|the sea.".split("|")
CHINESE = "那只猫|一条狗|我的朋友|那位老人|她的妹妹|一只鸟".split("|")
ZH_DOES = "坐在|看着|走向|找到了|路过了|离开了".split("|")
ZH_THINGS = "那条河。|一座房子。|花园的墙。|一棵苹果树。|大海。|桌子。".split("|")


def sentences(n, seed, parts=(ENGLISH, DOES, THINGS), blank=" "):
    rng = random.Random(seed)
    return [blank.join(rng.choice(part) for part in parts * 3) for _ in range(n)]


def written(folder, name, texts):
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "en": (written(tmp_path, "en.jsonl", sentences(150, 1)),),
        "zh": (written(tmp_path, "zh.jsonl", sentences(150, 2, (CHINESE, ZH_DOES, ZH_THINGS), "")),),
    }


def by_hand(texts, text, order):
    """exp of the mean surprise, from dictionaries; characters seen once in ``texts`` are unknown."""
    counts = Counter("".join(texts))
    known = sorted(c for c, n in counts.items() if n > 1)
    number = {c: FIRST + i for i, c in enumerate(known)}
    ids = lambda t: np.array([END, *(number.get(c, UNKNOWN) for c in t), END])
    model = Loops(order, [ids(t) for t in texts], FIRST + len(known))
    row = ids(text).tolist()
    nats = [-math.log(model.prob(row[:at], row[at])) for at in range(1, len(row))]
    return math.exp(sum(nats) / len(nats))


def fitted(texts, order=3):
    """A model of these texts, with nothing held out."""
    counts = Counter("".join(texts))
    known = np.array(sorted(ord(c) for c, n in counts.items() if n > 1), np.uint32)
    made = Scorer(KneserNey(order), known, np.empty(0), None)
    made.model.fit([made.ids(text) for text in texts], FIRST + len(known))
    return made


# Checks that planted bugs must not pass


def test_formula():
    texts = [" ".join(text.split()) for text in sentences(12, 3)] + sentences(6, 4, (CHINESE, ZH_DOES, ZH_THINGS), "")
    made = fitted(texts)
    for text in (texts[0], "the cat saw q", "她的妹妹坐在木頭上", "z", ""):
        assert made.perplexity(text) == pytest.approx(by_hand(texts, text, 3), rel=1e-9)


def test_blanks_make_no_difference():
    made = fitted(sentences(12, 3))
    assert made.perplexity("the cat\n\n  sat ") == made.perplexity("the cat sat")


def test_unknown_characters_cost_as_much_as_rare_ones():
    made = fitted(["aabb", "aabbq", "abab", "abz"])
    assert made.characters.tolist() == [ord("a"), ord("b")]  # q and z stand once
    assert made.ids("aqé€").tolist() == [END, FIRST, UNKNOWN, UNKNOWN, UNKNOWN, END]
    assert made.perplexity("abé") == made.perplexity("ab€") < made.perplexity("é€€")


def check_held_out(files):
    made = reference.scorer("en", files["en"], "text", 3, None, None)
    texts = sentences(150, 1)
    out = [t for t in texts if reference.hashlib.sha256(t.encode()).digest()[0] < 26]
    rest = [t for t in texts if t not in out]
    assert len(made.held_out) == len(out) > 5 and not set(out) & set(rest)
    again = fitted(rest)
    assert np.allclose(made.held_out, sorted(again.perplexity(t) for t in out))


def check_decisions(files):
    cfg = PerplexityConfig(reference=files, order=3, percentiles=(0, 100), bounds={"en": (1.5, 4.0)})
    step = cfg.build()
    judge = lambda text, language: step(Document(text, "", {"language": language}))
    good = judge(sentences(1, 77)[0], "en")
    assert 1.5 < good.meta["perplexity"] < 4
    assert judge("on mat the past her looked xq", "en").reason == "perplexity too high"
    assert judge("墙那的树路猫", "zh").meta["perplexity"] > 20  # percentiles 0 .. 100 without bounds: nothing goes
    tight = replace(cfg, bounds={"en": (3.9, 4.0)}).build()(Document(sentences(1, 77)[0], "", {"language": "en"}))
    assert tight.reason == "perplexity too low"
    made = reference.scorer("zh", files["zh"], "text", 3, None, None)
    most = np.percentile(made.held_out, 90)
    step = PerplexityConfig(reference=files, order=3, percentiles=(0, 90)).build()
    for text in sentences(40, 5, (CHINESE, ZH_DOES, ZH_THINGS), ""):
        result = step(Document(text, ""))  # the script tells the language
        assert isinstance(result, Removed) == (round(made.perplexity(text), 2) > most)


def test_held_out(files):
    check_held_out(files)


def test_decisions(files):
    check_decisions(files)


def test_rank_cuts_each_language_at_its_own_percentiles():
    step = PerplexityRankConfig(percentiles=(10, 90)).build()
    docs = [
        Document("x", f"d{i}", {"language": "en" if i % 2 else "zh", "perplexity": (1 if i % 2 else 100) + i})
        for i in range(22)
    ]
    docs.append(Document("x", "fr", {"language": "fr", "perplexity": None}))
    rows = [step.sign(doc) for doc in docs]
    verdict = step.decide(np.concatenate(rows), np.arange(22))
    assert np.flatnonzero(~verdict.keep).tolist() == [0, 1, 20, 21]  # the least and the largest of 11 each
    assert verdict.group.tolist() == list(range(22))
    parts = np.split(verdict.keep, np.cumsum([len(row) for row in rows])[:-1])
    results = [step.apply(doc, keep) for doc, keep in zip(docs, parts, strict=True)]
    assert [isinstance(r, Removed) for r in results[:3]] == [True, True, False]
    assert results[-1].notes == {"perplexity_rank: no score for this language": 1}
    with pytest.raises(ValueError, match="a step `perplexity`"):
        step.sign(Document("x", "here"))
    assert step.decide(np.empty((0, 0)), np.empty(0)).keep.tolist() == []


# The cache, tokenizers, mistakes


def test_cache(files, tmp_path, monkeypatch):
    cfg = PerplexityConfig(reference=files, order=3, cache=str(tmp_path / "cache"))
    score = lambda: cfg.build()(Document("the cat walked to an apple tree.", "")).meta["perplexity"]
    first = score()
    stored = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name[:13] for name in stored] == ["perplexity-en", "perplexity-zh"]
    fit = reference.fit
    monkeypatch.setattr(reference, "fit", lambda *args: pytest.fail("fitted although cached"))
    assert score() == first
    monkeypatch.setattr(reference, "fit", fit)
    written(tmp_path, "en.jsonl", sentences(150, 9))  # other text: another model
    assert score() != first and len(list((tmp_path / "cache").iterdir())) == 3
    (tmp_path / "cache" / stored[1]).write_bytes(b"no model")
    with pytest.raises(ValueError, match="delete the file"):
        score()


def test_a_stored_model_is_the_model():
    model = fitted(sentences(20, 3)).model
    again = KneserNey.from_arrays(model.arrays())
    assert (again.order, again.vocab_size) == (model.order, model.vocab_size)
    assert np.array_equal(again.distribution([5, 6]), model.distribution([5, 6]))


def test_tokenizer_ids(files, tmp_path):
    Tokenizer.train(sentences(50, 1), 320).save(tmp_path / "tok")
    step = PerplexityConfig(
        reference={"en": files["en"]}, order=3, tokenizer=str(tmp_path / "tok"), remove=False
    ).build()
    good, bad = (step(Document(text, "")).meta["perplexity"] for text in (sentences(1, 77)[0], "xq zq vv jj qk"))
    assert good < 6 < bad


def test_languages_without_a_model_stay_and_are_counted(files):
    doc = Document("Ein Satz.", "", {"language": "de"})
    assert PerplexityConfig(reference=files, order=2).build()(doc) is doc
    assert doc.meta["perplexity"] is None and doc.notes == {"perplexity: no model for this language": 1}


def test_mistakes(files, tmp_path):
    with pytest.raises(ValueError, match="bounds for 'fr'"):
        PerplexityConfig(reference=files, bounds={"fr": (1, 2)})
    with pytest.raises(ValueError, match=r"percentiles = \[90, 10\]"):
        PerplexityConfig(reference=files, percentiles=(90, 10))
    with pytest.raises(ValueError, match="reference"):
        PerplexityConfig(reference={})
    few = written(tmp_path, "few.jsonl", ["one text"])
    with pytest.raises(ValueError, match="1 documents in .*few.jsonl leave"):
        PerplexityConfig(reference={"en": (few,)}).build()
    cfg = parse(PerplexityConfig, {"reference": {"en": [few]}, "bounds": {"en": [1, float("inf")]}})
    assert cfg.reference == {"en": (few,)} and cfg.bounds["en"] == (1.0, math.inf)


# Planted bugs


def no_mean(patch):
    patch.setattr(
        Scorer, "perplexity", lambda self, text: math.exp(self.model.nats([self.ids(text)])[0] / max(len(text), 1))
    )


def base_two(patch):
    right = Scorer.perplexity
    patch.setattr(Scorer, "perplexity", lambda self, text: math.log(right(self, text), 2))


def unknown_is_the_nearest_known(patch):
    def wrong(text, known):
        return np.minimum(np.searchsorted(known, reference.code_points(text)), len(known) - 1) + FIRST

    patch.setattr(reference, "character_ids", wrong)


def no_end(patch):
    right = Scorer.ids
    patch.setattr(Scorer, "ids", lambda self, text: right(self, text)[:-1] if text else right(self, text))


def blanks_stay(patch):
    def wrong(self, text):
        return np.concatenate([[END], reference.character_ids(text, self.characters), [END]])

    patch.setattr(Scorer, "ids", wrong)


def held_out_is_trained_on(patch):
    made = fitted(sentences(150, 1))

    class Greedy(KneserNey):
        def fit(self, docs, size):
            return super().fit([made.ids(text) for text in sentences(150, 1)], size)

    patch.setattr(reference, "KneserNey", Greedy)


def every_language_by_the_first_model(patch):
    patch.setattr(
        perplexity,
        "scorer",
        lambda language, files, *more: reference.scorer("en", [f.replace("zh", "en") for f in files], *more),
    )


def upper_bound_alone(patch):
    right = PerplexityConfig.build
    patch.setattr(
        PerplexityConfig,
        "build",
        lambda self: right(replace(self, bounds={k: (0.0, v[1]) for k, v in self.bounds.items()})),
    )


CHECKS = {
    "formula": lambda files: test_formula(),
    "blanks": lambda files: test_blanks_make_no_difference(),
    "unknown": lambda files: test_unknown_characters_cost_as_much_as_rare_ones(),
    "held out": check_held_out,
    "decisions": check_decisions,
}
BUGS = {
    no_mean: {"formula"},
    base_two: {"formula", "decisions"},
    unknown_is_the_nearest_known: {"formula", "unknown"},
    no_end: {"formula", "unknown"},
    blanks_stay: {"blanks"},
    held_out_is_trained_on: {"held out"},
    every_language_by_the_first_model: {"decisions"},
    upper_bound_alone: {"decisions"},
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug, files, monkeypatch):
    bug(monkeypatch)
    found = set()
    for name in BUGS[bug]:
        try:
            CHECKS[name](files)
        except (AssertionError, AttributeError):
            found.add(name)
    assert found == BUGS[bug]
