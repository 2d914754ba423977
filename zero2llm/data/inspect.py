"""A batch as the model sees it: every token with its label, document and whether it is trained."""

from __future__ import annotations

from html import escape

from rich.text import Text

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.log import console
from zero2llm.tokenizers.tokenizer import Tokenizer

STYLE = """body{font:15px/1.9 system-ui,sans-serif;margin:1rem auto;max-width:60rem;padding:0 1rem;background:#fff;color:#222}
span{padding:1px 2px;margin:0 1px;border-radius:3px;white-space:pre-wrap;overflow-wrap:anywhere}
.t{background:#bfe8c6}.n{background:#ececec;color:#666}.p{color:#bbb}.s{border-left:3px solid #c2410c;padding-left:4px}
.k{font-size:13px}@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}.t{background:#1f5130}.n{background:#2b2b2b;color:#999}}"""


def cells(batch: Batch, row: int):
    """(token, label, pos, seg, is predicted by the position before it and trained) of each position of a row."""
    tokens, labels, pos = batch.tokens[row].tolist(), batch.labels[row].tolist(), batch.seq.pos[row].tolist()
    seg = [1] * len(tokens) if batch.seq.seg is None else batch.seq.seg[row].tolist()
    for t, (token, label, p, s) in enumerate(zip(tokens, labels, pos, seg, strict=True)):
        trained = t > 0 and labels[t - 1] == token and s == seg[t - 1]
        yield token, label, p, s, trained


def inspect_terminal(batch: Batch, tokenizer: Tokenizer, rows: int) -> None:
    """Print ``rows`` rows: green = a target, grey = context only, | = a document begins, and the first labels as a table."""
    out = console()
    out.print(f"{len(batch)} rows x {batch.tokens.shape[1]} positions, {batch.n_targets()} targets", markup=False)
    for row in range(min(rows, len(batch))):
        line, listed = Text(f"row {row}: ", style="bold"), []
        for token, label, p, s, trained in cells(batch, row):
            if s == 0:
                continue
            if p == 0:
                line.append(" | ", style="bold red")
            line.append(tokenizer.show(token).replace("·", " "), style="black on green" if trained else "dim")
            if label != IGNORE and len(listed) < 12:
                listed.append(f"pos {p} (document {s}): {tokenizer.show(token)!r} -> {tokenizer.show(label)!r}")
        out.print(line)
        for text in listed:
            out.print("   " + text, markup=False)
    out.print("green: trained as a target; dim: context only; |: a document begins", style="dim")


def inspect_html(batch: Batch, tokenizer: Tokenizer, rows: int) -> str:
    """The same as a self-contained page; hovering over a token shows id, label, position and document."""
    body = []
    for row in range(min(rows, len(batch))):
        spans = []
        for token, label, p, s, trained in cells(batch, row):
            shown = "end" if label == IGNORE else f"{label} {tokenizer.show(label)!r}"
            title = f"id {token}, position {p}, document {s}, predicts {'nothing' if label == IGNORE else shown}"
            kind = "p" if s == 0 else ("t" if trained else "n") + (" s" if p == 0 else "")
            spans.append(f'<span class="{kind}" title="{escape(title)}">{escape(tokenizer.show(token))}</span>')
        body.append(f"<h2>row {row}</h2><p>{''.join(spans)}</p>")
    key = '<p class="k"><span class="t">trained as a target</span> <span class="n">context only</span> <span class="n s">a document begins</span> <span class="p">padding</span></p>'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>batch</title><style>{STYLE}</style><h1>{len(batch)} rows, {batch.n_targets()} targets</h1>{key}{''.join(body)}</html>"
    )
