"""`zero2llm tokenizer compare`: how many bytes a token holds, by language and domain, for any tokenizers side by side.

    bytes per token       the same text in fewer tokens is cheaper to train on, and more of it fits in the context
    tokens per character  the same from the reader's side: about 0.25 for English, below 1 for Chinese if it was learned

Why both: a Chinese character is three bytes, an English letter one, so bytes per token alone flatters Chinese.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from zero2llm.core.files import write_atomic
from zero2llm.core.log import console
from zero2llm.data.sources import EMBEDDED, BadRecords, documents
from zero2llm.lab import charts
from zero2llm.lab.data_tools import tell_bad
from zero2llm.lab.tokens import open_tokenizer
from zero2llm.tokenizers.engines import Tiktoken
from zero2llm.tokenizers.tokenizer import Tokenizer

COLOURS = ("blue", "clay", "green", "plum", "grey")


@dataclass(frozen=True)
class Domain:
    name: str
    language: str
    texts: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(len(t.encode()) for t in self.texts)


@dataclass(frozen=True)
class Score:
    """One tokenizer on one domain. ``back``: the share of texts that decode to themselves; ``speed``: MB a second, one core."""

    tokenizer: str
    domain: str
    bytes_per_token: float
    tokens_per_character: float
    back: float
    speed: float | None


def domains(files: Sequence[str], sample: int, field: str, skip: bool = False) -> list[Domain]:
    """Every file, or the embedded texts, each cut to about ``sample`` bytes of documents; ``skip``: bad records are left out.

    Raises ValueError for a text without a document, or one that is given twice.
    """
    files, bad, out = list(files or [f"embedded:{n}" for n in EMBEDDED]), BadRecords(skip=skip), []
    short = [Path(name).name.removeprefix("embedded:") for name in files]
    for name, label in zip(files, short, strict=True):
        texts, size = [], 0
        for text in documents([name], field=field, bad=bad):
            texts.append(text)
            size += len(text.encode())
            if size >= sample:
                break
        if not size or files.count(name) > 1:
            raise ValueError(f"--text {name}: {'is given twice' if size else 'holds no text'}")
        out.append(Domain(label if short.count(label) == 1 else name, language("".join(texts)), tuple(texts)))
    tell_bad(bad)
    return out


def language(text: str) -> str:
    """By its letters: zh where a third of them are Chinese characters, Latin script where most are, else another one."""
    letters = [c for c in text[:100_000] if c.isalpha()]
    chinese = sum("\u3400" <= c <= "\u9fff" for c in letters)
    latin = sum(c < "\u0250" for c in letters)
    return "zh" if 3 * chinese > len(letters) else "Latin" if 2 * latin > len(letters) else "other"


def measure(name: str, tokenizer: Tokenizer, domain: Domain, timed: bool) -> Score:
    """Raises nothing: a tokenizer that loses text says so in ``back``."""
    encode = tokenizer.engine.encode if timed and isinstance(tokenizer.engine, Tiktoken) else tokenizer.encode
    for text in domain.texts if timed else ():  # caches and regular expressions are made on the way
        encode(text)
    began = time.perf_counter()
    ids = [encode(text) for text in domain.texts]
    seconds = time.perf_counter() - began
    n, back = sum(map(len, ids)), sum(tokenizer.decode(i) == t for i, t in zip(ids, domain.texts, strict=True))
    return Score(name, domain.name, domain.n_bytes / max(n, 1), n / max(sum(map(len, domain.texts)), 1),
                 back / max(len(domain.texts), 1), domain.n_bytes / max(seconds, 1e-9) / 1e6 if timed else None)  # fmt: skip


def named(paths: Sequence[str]) -> dict[str, str]:
    """Paths by the name that the table gives them: NAME=PATH, or the last part of the path that tells them apart."""
    out: dict[str, str] = {}
    for text in paths:
        name, equals, path = text.partition("=")
        if not equals:
            path = text
            parts = [p for p in Path(text).parts if p not in ("tokenizer", "/", "tokenizer.json")]
            name = parts[-1] if parts else text
        if name in out:
            raise ValueError(f"two tokenizers are called {name!r}; name them: NAME=PATH")
        out[name] = path
    return out


def totals(scores: Sequence[Score], found: Sequence[Domain]) -> dict[tuple[str, str], float]:
    """Bytes per token of each tokenizer over all domains of a language."""
    size, tokens = {}, {}
    by_name = {d.name: d for d in found}
    for score in scores:
        domain = by_name[score.domain]
        key = (score.tokenizer, domain.language)
        size[key] = size.get(key, 0) + domain.n_bytes
        tokens[key] = tokens.get(key, 0) + domain.n_bytes / score.bytes_per_token
    return {key: size[key] / tokens[key] for key in size}


def compare(paths: Sequence[str], *, text: Sequence[str], sample: int, field: str, speed: bool, html: Path | None,
            split: str | None, skip: bool = False) -> list[Score]:  # fmt: skip
    """Print the table, write the page if asked. Raises ValueError for a path that holds no tokenizer."""
    tokenizers = {name: open_tokenizer(path, split) for name, path in named(paths).items()}
    found = domains(text, sample, field, skip)
    scores = [measure(name, t, domain, speed) for name, t in tokenizers.items() for domain in found]
    for name, t in tokenizers.items():
        console().print(f"{name}: {t.vocab_size:,} entries, {t.nature.model}", markup=False)
    console().print(in_terminal(found, scores))
    console().print("bytes = bytes per token: more is cheaper; per char = tokens per character; back = texts that decode to themselves; a small vocabulary trained on such text may beat a large one", style="dim", markup=False)
    for name, t in tokenizers.items():
        if t.loss:
            console().print(f"{name}: a text may not come back: {t.loss}", style="yellow", markup=False)
    if html is not None:
        write_page(html, tokenizers, found, scores)
        console().print(f"wrote {html}", markup=False)
    return scores


def in_terminal(found: Sequence[Domain], scores: Sequence[Score]) -> Table:
    """Narrow enough for 80 columns: a bar for each text and tokenizer, then the totals of each language."""
    timed = any(s.speed is not None for s in scores)
    shown = Table("text", "tokenizer", "bytes", "", "per char", "back", *(["MB/s"] if timed else []), box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    width = max(s.bytes_per_token for s in scores)
    bar = lambda value: "█" * max(round(12 * value / width), 1)
    for domain in found:
        for i, s in enumerate([s for s in scores if s.domain == domain.name]):
            numbers = [f"{s.bytes_per_token:.2f}", bar(s.bytes_per_token), f"{s.tokens_per_character:.2f}", f"{s.back:.0%}"]
            shown.add_row(Text("" if i else domain.name), Text(s.tokenizer), *numbers, *([f"{s.speed:.1f}"] if timed else []))
    for (name, code), value in totals(scores, found).items():
        shown.add_row(f"all {code}", Text(name), f"{value:.2f}", bar(value))
    return shown


def table(tokenizers: dict[str, Tokenizer], found: Sequence[Domain], scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """One row for each domain and tokenizer, then one for each language."""
    timed = any(s.speed is not None for s in scores)
    heads = ["text", "language", "tokenizer", "entries", "bytes/token", "tokens/character", "comes back", *(["MB/s"] if timed else [])]
    by_key, body = {(s.tokenizer, s.domain): s for s in scores}, []
    for domain in found:
        for name, t in tokenizers.items():
            s = by_key[name, domain.name]
            numbers = [f"{s.bytes_per_token:.2f}", f"{s.tokens_per_character:.2f}", f"{s.back:.0%}"]
            body.append([domain.name, domain.language, name, f"{t.vocab_size:,}", *numbers, *([f"{s.speed:.1f}"] if timed else [])])
    for (name, code), value in totals(scores, found).items():
        body.append(["all", code, name, f"{tokenizers[name].vocab_size:,}", f"{value:.2f}", "", "", *([""] if timed else [])])
    return heads, body


def chart(tokenizers: Sequence[str], found: Sequence[Domain], scores: Sequence[Score]) -> str:
    """Bytes per token as bars, tokenizers side by side for each text."""
    by_key = {(s.tokenizer, s.domain): s.bytes_per_token for s in scores}
    series = [(name, COLOURS[i % len(COLOURS)], [by_key[name, d.name] for d in found]) for i, name in enumerate(tokenizers)]
    label = "Bytes per token: " + "; ".join(f"{n} " + ", ".join(f"{v:.2f}" for v in values) for n, _, values in series)
    return charts.bars([d.name for d in found], series, lambda v: f"{v:.2f}", label=label)


def write_page(file: Path, tokenizers: dict[str, Tokenizer], found: Sequence[Domain], scores: Sequence[Score]) -> None:
    import jinja2

    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    heads, body = table(tokenizers, found, scores)
    notes = [f"{name}: a text may not come back: {t.loss}" for name, t in tokenizers.items() if t.loss]
    page = env.get_template("token_compare.html").render(svg=chart(list(tokenizers), found, scores), heads=heads, body=body, notes=notes)
    write_atomic(file, page)
