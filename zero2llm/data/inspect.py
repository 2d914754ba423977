"""A batch as the model sees it: every token with its label, document and whether it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from rich.text import Text

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.log import console
from zero2llm.tokenizers.tokenizer import Tokenizer

STYLE = """body{font:15px/1.9 system-ui,sans-serif;margin:1rem auto;max-width:60rem;padding:0 1rem;background:#fff;color:#222}
span{padding:1px 2px;margin:0 1px;border-radius:3px;white-space:pre-wrap;overflow-wrap:anywhere;position:relative}
.t{background:#bfe8c6}.n{background:#ececec;color:#666}.p{color:#bbb}.s{border-left:3px solid #c2410c;padding-left:4px}
.e{border:1px dashed #2f855a;font-size:12px}.k{font-size:13px}
[data-tip]:is(:hover,:focus)::after{content:attr(data-tip);position:absolute;left:0;top:1.7em;z-index:1;width:max-content;max-width:70vw;
padding:2px 8px;border-radius:4px;background:#222;color:#fff;font-size:13px}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}.t{background:#1f5130}.n{background:#2b2b2b;color:#999}}"""


@dataclass(frozen=True)
class Cell:
    """One position of a row. ``trained``: the position before it must predict it. ``elsewhere``: this position must
    predict a token that does not stand next in the row: the document's end, or its continuation in another row."""

    token: int
    label: int
    pos: int
    seg: int
    trained: bool
    elsewhere: bool


def cells(batch: Batch, row: int) -> Iterator[Cell]:
    tokens, labels, pos = batch.tokens[row].tolist(), batch.labels[row].tolist(), batch.seq.pos[row].tolist()
    seg = [1] * len(tokens) if batch.seq.seg is None else batch.seq.seg[row].tolist()
    for t, token in enumerate(tokens):
        trained = t > 0 and seg[t] == seg[t - 1] != 0 and labels[t - 1] != IGNORE
        next_here = t + 1 < len(tokens) and seg[t + 1] == seg[t]
        yield Cell(token, labels[t], pos[t], seg[t], trained, labels[t] != IGNORE and not next_here)


def inspect_terminal(batch: Batch, tokenizer: Tokenizer, rows: int) -> None:
    """Print ``rows`` rows: green = a target, grey = context only, | = a document begins, and the first labels as a table."""
    out = console()
    out.print(f"{len(batch)} rows x {batch.tokens.shape[1]} positions, {batch.n_targets()} targets", markup=False)
    for row in range(min(rows, len(batch))):
        line, listed = Text(f"row {row}: ", style="bold"), []
        for cell in cells(batch, row):
            if cell.seg == 0:
                continue
            if cell.pos == 0:
                line.append(" | ", style="bold red")
            line.append(tokenizer.show(cell.token), style="black on green" if cell.trained else "dim")
            if cell.elsewhere:
                line.append(f"[{tokenizer.show(cell.label)}]", style="green")
            if cell.label != IGNORE and len(listed) < 12:
                listed.append(
                    f"pos {cell.pos} (document {cell.seg}): {tokenizer.show(cell.token)!r} -> {tokenizer.show(cell.label)!r}"
                )
        out.print(line)
        for text in listed:
            out.print("   " + text, markup=False)
    key = "green: trained as a target; dim: context only; |: a document begins; [x]: a target that does not stand next in the row"
    out.print(key, style="dim", markup=False)


def inspect_html(batch: Batch, tokenizer: Tokenizer, rows: int) -> str:
    """The same as a self-contained page; hovering over or tapping a token shows id, label, position and document."""
    body = []
    for row in range(min(rows, len(batch))):
        spans = "".join(_span(cell, tokenizer) for cell in cells(batch, row))
        body.append(f"<h2>row {row}</h2><p>{spans}</p>")
    key = (
        '<p class="k"><span class="t">trained as a target</span> <span class="n">context only</span> '
        '<span class="n s">a document begins</span> <span class="e">a target that does not stand next in the row</span> '
        '<span class="p">padding</span></p>'
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>batch</title><style>{STYLE}</style><h1>{len(batch)} rows, {batch.n_targets()} targets</h1>{key}{''.join(body)}</html>"
    )


def _span(cell: Cell, tokenizer: Tokenizer) -> str:
    aim = "nothing" if cell.label == IGNORE else f"{cell.label} {tokenizer.show(cell.label)!r}"
    tip = f"id {cell.token}, position {cell.pos}, document {cell.seg}, predicts {aim}"
    kind = "p" if cell.seg == 0 else ("t" if cell.trained else "n") + (" s" if cell.pos == 0 else "")
    tail = f'<span class="e">{escape(tokenizer.show(cell.label))}</span>' if cell.elsewhere else ""
    # tabindex: a phone has no pointer to hover with, but a tap gives focus
    return (
        f'<span class="{kind}" tabindex="0" data-tip="{escape(tip)}">{escape(tokenizer.show(cell.token))}</span>{tail}'
    )
