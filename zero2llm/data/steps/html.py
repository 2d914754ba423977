"""A web page's text without its markup; on request Markdown's text without its signs.

engine trafilatura: finds the article among menus, teasers and comments, and drops paragraphs that a page repeats (Barbaresi 2021, ACL demo).
engine plain, handwritten and without extras: every tag goes; scripts, styles, menus, side columns, footers and form controls go with what they hold; a block begins a new line;
blanks are one, as in a browser, and none between two Chinese characters.

Why: markup is most of a page's bytes and says nothing; the plain engine keeps all prose but also teasers and comments.
Costs 3 MB/s of HTML (trafilatura) and 7 MB/s (plain). Nothing is ever fetched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Document, Removed, Step

Page = tuple[str, str]  # text, title

HIDDEN = frozenset(
    "head script style noscript template svg math iframe object canvas nav aside footer button select textarea dialog".split()
)
PARAGRAPHS = frozenset(
    "p h1 h2 h3 h4 h5 h6 blockquote pre ul ol dl table section article main header hr figure form".split()
)
LINES = frozenset("div li dt dd tr br address figcaption caption body fieldset details summary".split())
VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
CJK = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
BETWEEN_CJK = re.compile(rf"(?<=[{CJK}])\s+(?=[{CJK}])")
ODD_SECTION = re.compile(
    r"<!\[(?!CDATA\[|if|else|endif)", re.IGNORECASE
)  # html.parser stops at these with an AssertionError

UNCLOSED = re.compile(r"<(?=[a-zA-Z/][^<>]*(?:<|$))")


@config
class HtmlConfig:
    """Looks at documents whose meta["format"] is html or md; ``always`` takes every document for a web page.

    markdown: what happens to documents in Markdown. Their signs are worth learning for a chat model: keep is the default.
    """

    kind: Literal["html"] = "html"
    looks_at: ClassVar[str] = "document"
    engine: Literal["trafilatura", "plain"] = "trafilatura"
    always: bool = False
    markdown: Literal["keep", "strip"] = "keep"

    def build(self) -> Step:
        """Raises ValueError if trafilatura is asked for and not installed."""
        extract = trafilatura_engine() if self.engine == "trafilatura" else plain

        def step(doc: Document) -> Document | Removed:
            form = doc.meta.get("format")
            if self.always or form in ("html", "htm"):
                return replaced(doc, extract(doc.text), "HTML pages to text")
            if self.markdown == "strip" and form in ("md", "markdown"):
                return replaced(doc, strip_markdown(doc.text), "Markdown to text")
            return doc

        return step


def replaced(doc: Document, page: Page, note: str) -> Document | Removed:
    text, title = page
    if not text.strip():
        return Removed("no text in the page", title[:200])
    doc.text = text
    doc.meta["format"] = "txt"  # a second html step has nothing to do
    if title:
        doc.meta.setdefault("title", title)
    doc.notes[note] += 1
    return doc


def trafilatura_engine() -> Callable[[str], Page]:
    try:
        from trafilatura import extract
    except ImportError as error:
        raise ValueError(
            "engine: trafilatura needs an extra: pip install 'zero2llm[data]', or set engine: plain"
        ) from error

    def engine(html: str) -> Page:
        # deduplicate remembers earlier pages, so the answer would depend on the order of documents
        text = extract(html, include_comments=False, include_tables=True, deduplicate=False) if html.strip() else ""
        return text or "", title_of(html)

    return engine


def title_of(html: str) -> str:
    reader = Reader()
    reader.feed(readable(html[:20_000]))
    return reader.found_title()


def readable(html: str) -> str:
    """What html.parser can read: it looks for the end of each tag to the end of the page, which costs the square of a broken one."""
    html = ODD_SECTION.sub("&lt;![", without_comments(html))
    return UNCLOSED.sub("&lt;", html) if len(UNCLOSED.findall(html)) > 200 else html


def without_comments(html: str) -> str:
    """One that nobody closed is text."""
    parts, at = [], 0
    while (start := html.find("<!--", at)) >= 0 and (end := html.find("-->", start + 4)) >= 0:
        parts.append(html[at:start])
        at = end + 3
    return "".join([*parts, html[at:].replace("<!--", "&lt;!--")])


def plain(html: str) -> Page:
    reader = Reader()
    reader.feed(readable(html))
    reader.close()
    return tidy("".join(reader.out)), reader.found_title()


class Reader(HTMLParser):
    """Collects text in ``out``. A tag that nobody closed ends with the element around it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.title: list[str] = []
        self.open: list[str] = []
        self.count: Counter[str] = Counter()  # of each name in open: looking through the list would cost its length
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._break(tag)
        if tag == "li":
            self._put("- ")
        elif tag in ("td", "th"):
            self._put(" ")
        if tag == "body" or (tag in PARAGRAPHS and self.count["head"]):
            self.handle_endtag("head")  # HTML allows to leave </head> out
        if tag not in VOID:
            self.open.append(tag)
            self.count[tag] += 1
            self.hidden += tag in HIDDEN

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.count[tag]:
            last = self.open.pop()
            self.count[last] -= 1
            self.hidden -= last in HIDDEN
            if last == tag:
                break
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self.count["title"] and not self.count["svg"]:
            self.title.append(data)
        elif self.count["pre"]:
            self._put(data, as_it_is=True)
        else:
            self._put(re.sub(r"\s+", " ", BETWEEN_CJK.sub(lambda m: "" if "\n" in m[0] else " ", data)))

    def found_title(self) -> str:
        return " ".join("".join(self.title).split())

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS or tag in LINES:
            self._put("\n\n" if tag in PARAGRAPHS else "\n", as_it_is=True)

    def _put(self, text: str, as_it_is: bool = False) -> None:
        if not as_it_is and (not self.out or self.out[-1][-1].isspace()):
            text = text.lstrip()
        if text and not self.hidden:
            self.out.append(text)


def tidy(text: str) -> str:
    """No blanks at the end of a line, at most one empty line."""
    text = re.sub(r"(?<![ \t])[ \t]+(?=\n)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


FENCE = re.compile(r"[ ]{0,3}(```|~~~)")
RULE = re.compile(r"[ ]{0,3}([-*_])[ ]*(?:\1[ ]*){2,200}")
LINE_SIGNS = re.compile(r"^[ ]{0,3}(?:#{1,6}[ \t]+|(?:>[ ]?){1,20})")
IMAGE = re.compile(r"!\[([^\]\n]{0,500})\]\([^)\n]{0,2000}\)")
LINK = re.compile(r"\[([^\[\]\n]{1,500})\](?:\([^)\n]{0,2000}\)|\[[^\]\n]{0,200}\])")
STRESS = re.compile(
    r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]{1,500})(?<=[^\s*])\1(?![\w*])|(?<![\w_])(_{1,3})(?=[^\s_])([^_\n]{1,500})(?<=[^\s_])\3(?![\w_])"
)
STRIKE = re.compile(r"~~([^~\n]{1,500})~~")
CODE = re.compile(r"`([^`\n]{1,500})`")
TABLE_RULE = re.compile(r"[ ]*\|?[ ]*:?-{1,100}:?[ ]*(?:\|[ ]*:?-{1,100}:?[ ]*){0,100}\|?[ ]*")


def strip_markdown(text: str) -> Page:
    """Markdown's words: headings, emphasis, links and tables lose their signs; code in fences stays as it is."""
    text, title = front_matter(text)
    out, fence = [], ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        elif fence:
            out.append(line)
        elif not RULE.fullmatch(line) and not ("|" in line and TABLE_RULE.fullmatch(line)):
            bare = strip_signs(LINE_SIGNS.sub("", line))
            if re.match(r"[ ]{0,3}#{1,6}[ \t]", line):
                bare = re.sub(r"(?<![ \t])[ \t]+#{1,6}[ \t]*$", "", bare)
                title = title or bare.strip()
            out.append(bare)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n"), title


def strip_signs(line: str) -> str:
    if line.lstrip().startswith("|") and line.rstrip().endswith("|"):
        line = "  ".join(cell.strip() for cell in line.strip().strip("|").split("|"))
    line = LINK.sub(r"\1", IMAGE.sub(r"\1", line))
    line = STRESS.sub(lambda m: m[2] or m[4], STRIKE.sub(r"\1", line))
    return CODE.sub(r"\1", line)


def front_matter(text: str) -> Page:
    """The text after a block between two lines of ---, and the title that stands in it."""
    if not text.startswith("---\n") or (end := text.find("\n---\n", 3)) < 0:
        return text, ""
    found = re.search(r"^title:[ \t]*(.+)$", text[:end], re.MULTILINE)
    return text[end + 5 :], found[1].strip(" \"'") if found else ""
