"""Normalising, web pages, boilerplate, language by script and sampling: by hand, as laws, with planted bugs.

Nothing here needs an optional package: those are compared in tests/parity/test_clean_oracles.py.
"""

import re
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.core.config import parse
from zero2llm.data.document import Document, Removed
from zero2llm.data.steps import boilerplate, html, language, sample
from zero2llm.data.steps.boilerplate import BoilerplateConfig
from zero2llm.data.steps.html import HtmlConfig, plain, strip_markdown
from zero2llm.data.steps.language import LanguageConfig, by_script
from zero2llm.data.steps.normalise import NormaliseConfig
from zero2llm.data.steps.sample import SampleConfig


def doc(text: str, **meta) -> Document:
    return Document(text, "here", meta)


def normalised(text: str, **options) -> Document | Removed:
    return NormaliseConfig(**{"fix_mojibake": False, **options}).build()(doc(text))


# normalise

NORMAL = [
    ("a\r\nb\rc\x0cd\x85e\u2028f", "a\nb\nc\nd\ne\nf", {"line ends": 5}),
    ("\x1b[31mred\x1b[0m\x00\x07 \x9f", "red", {"control characters": 5, "trailing blanks": 1}),
    ("\ufeffzero\u200bwidth\u2060 so\xadft \u202eword", "zerowidth soft word", {"invisible characters": 5}),
    ("caf\u0065\u0301 한국 한국", "café 한국 한국", {"not in NFC": 1}),
    ("a\xa0b\u2009c", "a b c", {"odd blanks": 2}),
    (
        "    def f(x):   return  1  \n\n\n\n\nend\t ",
        "    def f(x): return 1\n\n\nend",
        {"runs of blanks": 2, "trailing blanks": 2, "runs of empty lines": 1},
    ),
    ("\ud83d\ude00 and \ud83d", "😀 and \ufffd", {"half surrogates": 2}),
    ("　　中文，全角！（１２Ａ）……「好」①㈱ﬁ㎏👨‍👩‍👧", "　　中文，全角！（１２Ａ）……「好」①㈱ﬁ㎏👨‍👩‍👧", {}),
    ("神\ufa19 \uf90a", "神神 金".replace("神神", "神\u795e"), {"not in NFC": 1}),
]


@pytest.mark.parametrize(("text", "expected", "notes"), NORMAL, ids=range(len(NORMAL)))
def test_normalise_by_hand(text, expected, notes):
    out = normalised(text)
    assert out.text == expected and out.notes == notes


def test_normalise_options():
    assert normalised("ＡＢ１２，。！", full_width_to_half=True).text == "AB12，。！"
    assert normalised("①，ﬁ", form="nfkc").text == "1,fi"
    assert normalised("e\u0301", form="none").text == "e\u0301"
    assert normalised("a   b  \n\n\n\n\nc", collapse_blanks=False, max_empty_lines=None).text == "a   b  \n\n\n\n\nc"
    assert normalised("a\n\n\nb", max_empty_lines=0).text == "a\nb"
    assert normalised(" \x00\u200b\n") == Removed("empty", "nothing but blanks and control characters")
    with pytest.raises(ValueError, match="max_empty_lines = -1"):
        parse(NormaliseConfig, {"max_empty_lines": -1})


HAN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
MIXED = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from([*"\u200b\ufeff\r\n\t \x1b[m\xa0\x85Ａ，。中文神\ufa19e\u0301\ud83d\ude00\u3000"]),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(MIXED, st.sampled_from(["nfc", "nfkc", "none"]), st.booleans(), st.integers(0, 2))
def test_normalise_is_idempotent_and_keeps_chinese(text, form, narrow, empty):
    out = normalised(text, form=form, full_width_to_half=narrow, max_empty_lines=empty)
    if isinstance(out, Document):
        once = out.text
        again = normalised(once, form=form, full_width_to_half=narrow, max_empty_lines=empty)
        assert again.text == once and not again.notes
        wanted = Counter(re.findall(HAN, unicodedata.normalize("NFKC" if form == "nfkc" else "NFC", text)))
        assert not wanted - Counter(re.findall(HAN, unicodedata.normalize("NFKC" if form == "nfkc" else "NFC", once)))


@pytest.mark.parametrize(
    "unit", [" ", "a ", " \t", "\n", "\r", " \n", "\x1b[", "\x1b[1;", "\u200b", "Ã", "e\u0301", "\ud83d"]
)
def test_normalise_time_is_linear(unit):
    start = time.process_time()
    normalised(("x" + unit * 100_000)[:100_000] + "x")
    assert time.process_time() - start < 2


# html

PAGE = """<!DOCTYPE html><html><head><title>A &amp; B
 title</title><style>p {x: y}</style></head><body><nav><a href="/">Home</a><ul><li>Menu</ul></nav>
<h1>Heading</h1><p>One <b>bold</b>
word &lt;tag&gt; &eacute;&#x4e2d;.<p>中文段落
换行 不断。<br>新行<script>var a = "<p>no</p>";</script><!-- no -->
<ul><li>first<li>second</li></ul><table><tr><td>a</td><td>b</td></tr></table><pre>  x = 1
    y</pre><aside>Advert</aside><footer>© 2024</footer><p>End</body></html>"""


def check_page():
    text, title = plain(PAGE)
    assert title == "A & B title"
    assert (
        text
        == "Heading\n\nOne bold word <tag> é中.\n\n中文段落换行 不断。\n新行\n\n- first\n- second\n\na b\n\n  x = 1\n    y\n\nEnd"
    )


def check_open_tags():
    assert plain("<div><nav>menu<p>more</div><p>text")[0] == "text"
    assert plain("<title>t</title><p>no head, <i>no body")[0] == "no head, no body"
    assert plain("<head><title>t</title><p>head is never closed")[0] == "head is never closed"
    assert plain("a < b && c > d")[0] == "a < b && c > d"
    assert plain("<svg><title>no</title></svg><title>yes</title>x") == ("x", "yes")
    assert plain("</nav></p>x<![odd[ y ]]><![CDATA[z]]>")[0].startswith("x")


def test_plain_engine_by_hand():
    check_page()
    check_open_tags()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<p>",
                "</p>",
                "<nav>",
                "</nav>",
                "<div",
                ">",
                "<![",
                "<!--",
                "-->",
                "</",
                "<script>",
                "</script>",
                "&#",
                "&amp;",
                "<td>",
                "<pre>",
                "x",
                "中\n文",
                " ",
                '"',
                "<?",
            ]
        )
        | st.text(max_size=4),
        max_size=30,
    ).map("".join)
)
def test_plain_engine_takes_anything(text):
    out, _ = plain(text)
    assert out == out.strip() and "\n\n\n" not in out


@pytest.mark.parametrize(
    "unit",
    [
        "<p>",
        "<div><nav>",
        "</p>",
        "<",
        "<!",
        "&",
        "中\n",
        "\n ",
        "<p> \n",
        "<a b='",
        "<a ",
        "</a",
        '<a b="',
        "<!--",
        "<?",
        "<![",
        "<pre>\n </pre>",
    ],
)
def test_plain_engine_time_is_linear(unit):
    start = time.process_time()
    plain((unit * 50_000)[:50_000])
    strip_markdown((unit * 50_000)[:50_000])
    assert time.process_time() - start < 6


def test_html_step():
    step = HtmlConfig(engine="plain").build()
    out = step(doc("<title>T</title><p>Hi</p>", format="html"))
    assert (out.text, out.meta, out.notes) == ("Hi", {"format": "txt", "title": "T"}, {"HTML pages to text": 1})
    assert step(doc("<p>Hi</p>", title="mine", format="html")).meta["title"] is not None
    assert step(doc("<p>Hi</p>")).text == "<p>Hi</p>" and step(doc("# Hi", format="md")).text == "# Hi"
    assert step(doc("<script>x</script>", format="html")) == Removed("no text in the page", "")
    assert HtmlConfig(engine="plain", always=True).build()(doc("<p>Hi")).text == "Hi"


MARKDOWN = """---
title: "From the head"
---
# Big *title* #

Some **bold**, *it*, ***both***, `code`, ~~gone~~ and [a link](http://x.y "t"), ![a picture](p.png), 2 * 3 * 4, snake_case_name.

> quoted
- item
1. one

| a | b |
|---|:-:|
| 1 | 中 |

---

```python
x = a * b * c  # **not** bold
```
C# is a language"""


def test_markdown_by_hand():
    text, title = strip_markdown(MARKDOWN)
    assert title == "From the head"
    assert text == (
        "Big title\n\nSome bold, it, both, code, gone and a link, a picture, 2 * 3 * 4, snake_case_name.\n\nquoted\n- item\n1. one\n\n"
        "a  b\n1  中\n\nx = a * b * c  # **not** bold\nC# is a language"
    )
    out = HtmlConfig(engine="plain", markdown="strip").build()(doc("## 二\n# 标题\n", format="md"))
    assert (out.text, out.meta["title"]) == ("二\n标题", "二")


# boilerplate

BOILERPLATE = {
    "cookies": ["We use cookies to improve your experience.", "Accept all cookies", "本网站使用Cookie来改善体验"],
    "script": [
        "Please enable JavaScript to view this page.",
        "JavaScript is disabled in your browser.",
        "请启用JavaScript",
        "您的浏览器不支持视频播放",
    ],
    "placeholder": ["Lorem ipsum dolor sit amet, consectetur", "此处填写内容"],
    "copyright": [
        "© 2024 Example Inc.",
        "Copyright (c) 2019-2024 Me. All rights reserved.",
        "版权所有 某某公司",
        "京ICP备12345678号-1",
        "京公网安备11010502030000号",
        "未经授权，不得转载",
        "责任编辑：张三",
    ],
    "navigation": [
        "Read more...",
        "» Next page »",
        "Back to top",
        "首页 > 新闻 > 正文",
        "上一篇：春天来了",
        "下一篇",
        "点击查看更多",
        "第1页 共 5 页",
        "Page 2 of 10",
    ],
    "sharing": [
        "Share on Facebook",
        "Share: Facebook | Twitter | Email",
        "分享到：微信 微博",
        "1,234 views",
        "阅读量：1024",
        "12人点赞",
        "扫一扫关注公众号",
    ],
    "account": ["Log in", "登录/注册", "Subscribe to our weekly newsletter today"],
    "advert": ["Advertisement", "加入购物车", "Sponsored by Acme Corp"],
}
PROSE = [
    "She likes to share cookies with her friends.",
    "We need a script for the play.",
    "JavaScript was designed in ten days.",
    "report.",
    "Reply",
    "Home!",
    "next",
    "他把上一篇文章读完，又开始读下一篇。",
    "我们登录了火星。",
    "这首歌的版权归作者。",
    "分享是一种快乐。",
    "第一页写着他的名字",
    "Copyright law protects authors.",
    "In 2024 all views were heard.",
    "广告业在1990年代发展迅速。",
    "The newsletter told us to subscribe to nothing.",
    "他点赞了12人的文章",
    "",
]


def test_boilerplate_lists_by_hand():
    for name, lines in BOILERPLATE.items():
        for line in lines:
            assert boilerplate.rule_of(line, boilerplate.PHRASE_RULE, boilerplate.COMPILED) == name, line
    for line in PROSE:
        assert boilerplate.rule_of(line, boilerplate.PHRASE_RULE, boilerplate.COMPILED) is None, line


def test_boilerplate_step():
    step = BoilerplateConfig().build()
    out = step(doc("首页\n\n  正文第一段。\n\n正文第二段。\nRead more\nShare on X\n"))
    assert out.text == "  正文第一段。\n\n正文第二段。" and out.notes == {"lines: navigation": 2, "lines: sharing": 1}
    text = "\n\nNothing to remove here. \n"
    assert step(doc(text)).text == text
    assert step(doc("Log in\n\nAdvertisement")) == Removed("only boilerplate", "account, advert")
    only = parse(BoilerplateConfig, {"rules": ["advert"]}).build()
    assert only(doc("Log in\nAdvertisement\n版权所有")).text == "Log in\n版权所有"
    long = "We use cookies " + "x" * 200
    assert step(doc(long)).text == long
    for options, message in (
        ({"rules": ()}, "choose from"),
        ({"rules": ("cookie",)}, "choose from"),
        ({"max_line": 0}, "max_line = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            BoilerplateConfig(**options)


def test_boilerplate_hints_are_necessary():
    """A pattern may only be skipped where its hints prove that it cannot match."""
    for line in [line.lower() for lines in BOILERPLATE.values() for line in lines]:
        for rule, hints, pattern in boilerplate.COMPILED:
            if pattern.search(line):
                assert any(hint in line for hint in hints), (rule, line)
    assert {name for name, _, _ in boilerplate.PATTERNS} | set(boilerplate.PHRASES) == set(BOILERPLATE)


def test_boilerplate_time_is_bounded():
    text = (
        "\n".join(("share " * 33, "a" * 200, "首页 > " * 30, "cookie we use " * 14, "1" * 200, "转载未经" * 50)) + "\n"
    )
    start = time.process_time()
    BoilerplateConfig().build()(doc(text * 80))  # 100 kB
    assert time.process_time() - start < 3


# language

SCRIPTS = [
    ("今天天气很好，我们去公园散步吧。", "zh"),
    ("這本書很難，但是我想把它讀完。", "zh"),
    ("鄭伯克段於鄢", "zh"),
    ("〇々", "zh"),
    ("iPhone 15 Pro Max 发布了，价格从 7999 元起。", "zh"),
    ("“優の良品”是一家来自香港的连锁零食店，在许多城市都有分店。", "zh"),
    ("東京は日本の首都です。", "ja"),
    ("日本国憲法第九条について議論する必要がある。", "ja"),
    ("カタカナデカイタ", "ja"),
    ("서울은 대한민국의 수도입니다.", "ko"),
    ("大韓民國의 首都는 서울이다", "ko"),
    ("The word 道 (dao) means the way.", None),
    ("Москва — столица России.", None),
    ("Il pleut depuis ce matin.", None),
    ("12345 !!! ①", "und"),
    ("", "und"),
]


def check_scripts():
    for text, expected in SCRIPTS:
        assert by_script(text)[0] == expected, text
    assert (
        by_script("中文ab")[1] == pytest.approx(8 / 10)
        and by_script("中文")[1] == 1.0
        and by_script("中abcd") == ("zh", 0.5)
    )
    assert by_script("中abcde")[0] is None


def test_language_by_script():
    check_scripts()


SCRIPT_BUGS = {
    "one letter counts like one": ("CJK_WEIGHT", 1),
    "a Chinese letter outweighs a sentence": ("CJK_WEIGHT", 40),
    "one kana makes Japanese": ("SHARE", 1000),
    "kana need a majority": ("SHARE", 1),
    "katakana is no kana": ("KANA", re.compile("[ぁ-ゟ]")),
    "punctuation counts": ("LETTER", re.compile(r"\S")),
    "digits are letters": ("LETTER", re.compile(r"\w")),
    "Han without the number nought": ("HAN", re.compile("[\u4e00-\u9fff]")),
    "no hangul": ("HANGUL", re.compile("[\u1100-\u11ff]")),
}


@pytest.mark.parametrize("bug", SCRIPT_BUGS)
def test_planted_script_bugs_are_caught(bug, monkeypatch):
    monkeypatch.setattr(language, *SCRIPT_BUGS[bug])
    with pytest.raises(AssertionError):
        check_scripts()


def fake(answer):
    return lambda: (lambda text: answer, frozenset({"zh", "ja", "ko", "en", "fr", "und"}))


def test_language_step(monkeypatch):
    monkeypatch.setattr(language, "model", fake(("fr", 0.98)))
    step = LanguageConfig(keep=("en", "zh"), min_probability=0.5).build()
    assert step(doc("Il pleut.")) == Removed("language", "fr 0.98")
    assert step(doc("123")) == Removed("language", "und 0.00")
    out = step(doc("秋风清，秋月明。"))
    assert out.meta == {"language": "zh", "language_score": 1.0}
    assert LanguageConfig().build()(doc("Il pleut.")).meta["language"] == "fr"
    monkeypatch.setattr(language, "model", fake(("en", 0.32)))
    assert step(doc("Ok.")) == Removed("language", "fr 0.98")  # built before
    assert LanguageConfig(min_probability=0.5).build()(doc("Ok.")) == Removed("language uncertain", "en 0.32 < 0.5")
    monkeypatch.setattr(language, "model", fake(("yue", 0.9)))
    assert LanguageConfig().build()(doc("abc")).meta["language"] == "zh"
    with pytest.raises(ValueError, match="does not know xx; it knows en, fr"):
        LanguageConfig(keep=("xx",)).build()
    for options in ({"keep": ()}, {"keep": ("english",)}, {"min_probability": 1.5}, {"max_characters": 3}):
        with pytest.raises(ValueError, match="keep|min_probability|max_characters"):
            LanguageConfig(**options)


def test_excerpts_come_from_the_whole_text():
    text = "a" * 100 + "b" * 100 + "c" * 100 + "d" * 100
    assert language.excerpts(text, 40) == "a" * 10 + "\n" + "b" * 10 + "\n" + "c" * 10 + "\n" + "d" * 10
    assert language.excerpts("short", 40) == "short"


# sample


def test_sample_is_a_share_and_depends_on_the_text_alone():
    texts = [f"文档 {i}" for i in range(4000)]
    kept = {
        share: [t for t in texts if isinstance(SampleConfig(share=share, seed=3).build()(doc(t)), Document)]
        for share in (0.1, 0.2, 1.0)
    }
    assert set(kept[0.1]) < set(kept[0.2]) and kept[1.0] == texts
    assert abs(len(kept[0.2]) - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5
    other = [t for t in texts if isinstance(SampleConfig(share=0.2, seed=4).build()(doc(t)), Document)]
    assert len(set(other) & set(kept[0.2])) < 300
    assert sample.draw(3, "文档 0") == sample.draw(3, "文档 0") == 0.48834343407393943
    assert SampleConfig(share=1e-9).build()(doc("x")) == Removed("not in the sample")
    for share in (0.0, 1.1, -1):
        with pytest.raises(ValueError, match="share ="):
            SampleConfig(share=share)


@pytest.mark.parametrize(
    ("module", "config", "text"),
    [
        ("ftfy", NormaliseConfig(), "fix_mojibake needs ftfy"),
        ("trafilatura", HtmlConfig(), "needs an extra"),
        ("py3langid.langid", LanguageConfig(), "needs py3langid"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(module, config, text, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    language.model.cache_clear()
    with pytest.raises(ValueError, match=text):
        config.build()


def test_hidden_elements_are_what_the_page_says():
    for tag in html.HIDDEN - {"head"}:
        assert "secret" not in plain(f"<p>a</p><{tag}>secret</{tag}><p>b</p>")[0], tag
    for tag in ("main", "article", "section", "header", "figcaption", "blockquote", "span", "em", "unknown-tag"):
        assert plain(f"<p>a</p><{tag}>said</{tag}><p>b</p>")[0].split() == ["a", "said", "b"], tag
