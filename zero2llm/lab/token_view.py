"""`zero2llm tokenizer view`: a vocabulary as a person reads it, in the terminal and as a page without scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from zero2llm.core.files import write_atomic
from zero2llm.core.log import console
from zero2llm.data.sources import BadRecords, documents
from zero2llm.lab.data_tools import tell_bad
from zero2llm.lab.tokens import open_tokenizer
from zero2llm.tokenizers.bytes import readable, to_chars
from zero2llm.tokenizers.tokenizer import Tokenizer

SAMPLE = "你"


@dataclass(frozen=True)
class Row:
    """One token. ``raw``: as its file spells it; ``group``: one of GROUPS; ``count``: in the text that was given, or None."""

    id: int
    shown: str
    raw: str
    hex: str
    group: str
    count: int | None


GROUPS = {
    "control": "Control tokens: no text can spell them",
    "added": "Added tokens: found in text as a whole",
    "part": "Parts of characters: some bytes of one, or one and a piece of the next",
    "latin": "Latin letters, with or without a blank in front",
    "chinese": "Chinese characters",
    "letters": "Letters of other scripts",
    "other": "Digits, punctuation, blanks, symbols",
    "unused": "Ids that stand for nothing",
}


def rows(tokenizer: Tokenizer, counts: Counter[int] | None = None) -> list[Row]:
    """Every token in order of ids."""
    out = []
    for i, piece in enumerate(tokenizer.pieces):
        raw = tokenizer.library.id_to_token(i)
        group = "unused" if raw is None else "control" if i in tokenizer.special_ids else "added" if i in tokenizer.added else _group(piece)
        out.append(Row(i, readable(piece), raw or "", piece.hex(" "), group, None if counts is None else counts[i]))
    return out


def _group(piece: bytes) -> str:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "part"
    if any("\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or c >= "\U00020000" for c in text):
        return "chinese"
    letters = [c for c in text if c.isalpha()]
    return "other" if not letters else "latin" if max(letters) < "\u0250" else "letters"


def select(found: Iterable[Row], search: str | None, ids: str | None, order: str) -> list[Row]:
    """Those whose readable or raw form, or bytes in hexadecimal, hold ``search``; ``ids`` is a range 300:400 or one id.

    Raises ValueError for a range that is none.
    """
    found = list(found)
    if ids is not None:
        begin, colon, end = ids.partition(":")
        try:
            first = int(begin or 0)
            last = int(end or len(found)) if colon else first + 1
        except ValueError:
            raise ValueError(f"--ids {ids}: an id (300) or a range (300:400) was expected") from None
        found = found[first:last]
    if search:
        wanted = (search, search.replace(" ", "·"))
        found = [row for row in found if any(w in text for w in wanted for text in (row.shown, row.raw, row.hex))]
    if order == "frequency":
        found.sort(key=lambda row: (-(row.count or 0), row.id))
    elif order == "length":
        found.sort(key=lambda row: (-len(row.hex), row.id))
    return found


def explanation(tokenizer: Tokenizer) -> list[str]:
    """Why the file looks as it does, with this vocabulary's own example; the second line says it in Chinese."""
    if tokenizer.nature.form != "bytes":
        return [*_other_form(tokenizer), *([f"note: a text may not come back: {tokenizer.loss}"] if tokenizer.loss else [])]
    data, spelled = SAMPLE.encode(), to_chars(SAMPLE.encode())
    n = len(tokenizer.encode(SAMPLE))
    return [
        f"Why does the file look garbled? It holds bytes, not characters: {SAMPLE} is the {len(data)} bytes {data.hex(' ')}, and each byte is "
        f"written as a printable stand-in: {spelled}. Nothing is broken. Below, whole characters are shown as such, parts of one as \\x.., "
        f"a blank as ·. {SAMPLE} is {n} token{'s' if n > 1 else ''} here.",
        f"为什么词表里的中文像乱码？文件里存的是字节，不是汉字：“{SAMPLE}”是 {len(data)} 个字节 {data.hex(' ')}，每个字节用一个可打印的替身"
        f"字符写出来，就成了 {spelled}。词表没有坏。",
    ]


def _other_form(tokenizer: Tokenizer) -> list[str]:
    if tokenizer.nature.form == "blanks":
        sign = tokenizer.nature.blank
        return [
            f"form: blanks. The file holds characters{f', {sign} for a blank' if sign else ''}; <0xE4> is one byte, for characters without a piece of "
            "their own. Below, a blank is shown as ·.",
            f"词表里就是字符本身{f'，{sign} 代表空格' if sign else ''}；<0xE4> 是一个字节，用来拼出没有自己词条的字。下面空格显示为 ·。",
        ]
    if tokenizer.nature.model == "WordPiece":
        return ["form: text. The file holds words and parts of words; one that begins with ## goes on with the word before it.",
                "词表里是词和词的一部分；以 ## 开头的接在前一段后面。"]  # fmt: skip
    return ["form: text. The file holds pieces of text; what none of them spells is unknown.", "词表里是文本片段；拼不出的内容记为未知。"]


def count_tokens(tokenizer: Tokenizer, files: Sequence[str], field: str, skip: bool = False) -> Counter[int]:
    """How often each token occurs in the documents of ``files``; ``skip``: bad records are left out."""
    counts, bad = Counter(), BadRecords(skip=skip)
    for text in documents(files, field=field, bad=bad):
        counts.update(tokenizer.encode(text))
    tell_bad(bad)
    return counts


def merge_tree(tokenizer: Tokenizer, token: int) -> Tree:
    """How the token was made: its two parts, theirs, down to bytes. Raises ValueError for a vocabulary without merges."""
    model = json.loads(tokenizer.library.to_str())["model"]
    if model["type"] != "BPE":
        why = {"Unigram": "its tokens were chosen as wholes", "WordPiece": "its file keeps the pieces, not how they were joined"}
        raise ValueError(f"{model['type']} has no merges: {why.get(model['type'], 'only BPE has')}")
    made: dict[str, tuple[int, str, str]] = {}
    for rank, pair in enumerate(model["merges"]):
        a, b = pair.split(" ") if isinstance(pair, str) else pair
        made.setdefault(a + b, (rank, a, b))
    tokenizer.token_bytes(token)  # refuses an id outside the vocabulary
    return _branch(tokenizer, tokenizer.library.id_to_token(token), made)


def _branch(tokenizer: Tokenizer, name: str, made: dict) -> Tree:
    token, rank = tokenizer.library.token_to_id(name), made.get(name)
    tree = Tree(Text(f"{tokenizer.show(token)}  {token}" + (f"  (merge {rank[0] + 1})" if rank else "")))
    for part in rank[1:] if rank else ():
        tree.children.append(_branch(tokenizer, part, made))
    return tree


def view(path: Path, *, search: str | None, ids: str | None, order: str, limit: int, text: Sequence[str], field: str,
         token: str | None, html: Path | None, split: str | None, skip: bool = False) -> None:  # fmt: skip
    """Show a vocabulary, or how one token was merged. Raises ValueError for a tokenizer or token that is not there."""
    tokenizer = open_tokenizer(path, split)
    if token is not None:
        console().print(merge_tree(tokenizer, _token_id(tokenizer, token)))
        return
    if order == "frequency" and not text:
        raise ValueError("--sort frequency needs a text to count in: --text FILE or --text embedded")
    counts = count_tokens(tokenizer, text, field, skip) if text else None
    found = select(rows(tokenizer, counts), search, ids, order)
    for line in explanation(tokenizer):
        console().print(line, markup=False, style="dim")
    table = Table("id", "token", "in the file", "bytes", *(["times"] if counts is not None else []))
    for row in found[:limit]:
        times = [f"{row.count:,}"] if row.count is not None else []
        table.add_row(str(row.id), *map(escape, (row.shown, row.raw, row.hex)), *times)
    console().print(table)
    if len(found) > limit:
        console().print(f"{len(found) - limit:,} more of {len(found):,}: --limit, --ids 300:400, --search TEXT", style="dim", markup=False)
    if html is not None:
        write_page(html, tokenizer, found, str(path))
        console().print(f"wrote {html}", markup=False)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    """An id, or text that is one token."""
    if token.isdigit():
        return int(token)
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise ValueError(f"{token!r} is {len(ids)} tokens: {' '.join(f'{tokenizer.show(i)} ({i})' for i in ids)}; name one by its id")
    return ids[0]


def write_page(file: Path, tokenizer: Tokenizer, found: Sequence[Row], name: str) -> None:
    """One file, no network, no scripts: tokens by group, folded where there are many."""
    import jinja2

    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    groups = [(GROUPS[g], [row for row in found if row.group == g]) for g in GROUPS]
    kinds = Counter(row.group for row in found)
    page = env.get_template("token_view.html").render(
        title=f"Vocabulary of {Path(name).name}", lines=explanation(tokenizer), groups=[g for g in groups if g[1]], kinds=kinds, n=len(found),
        counted=bool(found) and found[0].count is not None,
    )
    write_atomic(file, page)
