"""The conformance table: every mechanism run through what every mechanism must do; each cell a measured error or a reason.

    zero2llm conformance --out docs/conformance.md

Nothing in it is written by hand. A model of two layers in float64 with parameters far from their initial values (zeros
hide errors) is asked for the same numbers along different roads; the cell is the largest difference. The column of
independent oracles comes from running the parity tests of a source checkout.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.adapters.lora import ALL_LINEAR, LoRAConfig
from zero2llm.adapters.targets import chosen
from zero2llm.adapters.wrap import merge, wrap
from zero2llm.core.config import parse, to_dict
from zero2llm.core.files import read_json, write_atomic
from zero2llm.core.log import console
from zero2llm.core.seq import Seq
from zero2llm.interop.hf_config import family_of
from zero2llm.lab.variants import PARTS, swapped
from zero2llm.model.cost import parameters, state_bytes
from zero2llm.model.lm import LM
from zero2llm.model.presets import llama
from zero2llm.model.spec import ModelConfig

T, VOCAB = 63, 29
Check = Callable[[LM], float]


@dataclass(frozen=True)
class Row:
    """One mechanism: which part of the model it is, its name, and its cells in the order of the columns."""

    part: str
    name: str
    cells: tuple[str, ...]


def model_of(part: str, name: str, dtype: torch.dtype = torch.float64) -> LM:
    """Two small layers with ``name`` as their ``part``, every parameter random and far from zero."""
    base = to_dict(llama(VOCAB, 32, 2, 2, 2, 48, 128, tied=True))
    cfg = parse(ModelConfig, swapped(base, part, name), source="conformance")
    torch.manual_seed(0)
    model = LM(cfg).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1))
    return model.eval()


def tokens(rows: int = 2, n: int = T) -> Tensor:
    return torch.randint(0, VOCAB, (rows, n), generator=torch.Generator().manual_seed(n))


def causality(model: LM) -> float:
    """Largest change of an output by a later token, in eval (batch norm in training is not seen). Must be exactly 0."""
    x, worst = tokens(), 0.0
    full = model(x, Seq.rows(2, T))[0]
    for t in (1, 7, 40, T - 1):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        worst = max(worst, float((full - model(changed, Seq.rows(2, T))[0])[:, :t].abs().max()))
    return worst


def packed(model: LM) -> float:
    """Documents side by side in one row against each alone."""
    seg = torch.zeros(1, T, dtype=torch.int32)
    ends = [(0, 7), (7, 8), (8, 40), (40, 58)]
    for number, (begin, end) in enumerate(ends, 1):
        seg[0, begin:end] = number
    x = tokens(1)
    full = model(x, Seq.of_segments(seg))[0]
    return max(float((full[:, a:b] - model(x[:, a:b], Seq.rows(1, b - a))[0]).abs().max()) for a, b in ends)


def streamed(model: LM) -> float:
    """In pieces of 7, 1, 1, 20, 1 and 33 tokens against all at once."""
    x, seq, states, at, parts = tokens(), Seq.rows(2, T), model.init_states(2, T), 0, []
    for n in (7, 1, 1, 20, 1, 33):
        parts.append(model(x[:, at : at + n], seq.window(at, at + n), states)[0])
        at += n
    return float((torch.cat(parts, 1) - model(x, seq)[0]).abs().max())


def ragged(model: LM) -> float:
    """Prompts of 7, 20 and 1 tokens in one padded batch, then three decoding steps, against each row alone."""
    lengths, x, states = torch.tensor([7, 20, 1]), tokens(3, 23), model.init_states(3, 30)
    model(x[:, :20], Seq.ragged(lengths, 20), states)
    steps = torch.cat([model(x[:, 20 + i : 21 + i], Seq((lengths + i)[:, None]), states)[0] for i in range(3)], 1)
    alone = [model(torch.cat((x[r, :n], x[r, 20:]))[None], Seq.rows(1, n + 3))[0][0, n:] for r, n in enumerate(lengths)]
    return float((steps - torch.stack(alone)).abs().max())


def recomputed(model: LM) -> float:
    """Gradients with activation checkpointing against those without, relative to the largest."""
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        with torch.enable_grad():
            hidden, aux = model(tokens(), Seq.rows(2, T))
            (hidden.sin().sum() + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def compiled(part: str, name: str) -> str:
    """torch.compile of the forward pass alone, whole graph, fp32, against eager, relative to the output's spread."""
    model = model_of(part, name, torch.float32)
    torch._dynamo.reset()
    whole = model(tokens(), Seq.rows(2, T))[0]
    other = torch.compile(model, fullgraph=True)(tokens(), Seq.rows(2, T))[0]
    return number(float((whole - other).abs().max() / whole.std()))


def predicted(model: LM) -> str:
    """Parameters and decoding state against model/cost.py."""
    counted = sum(p.numel() for p in model.parameters())
    kept = sum(s.nbytes() for s in model.float().init_states(1, 40))
    faults = [] if counted == parameters(model.cfg)["total"] else [f"{counted} parameters"]
    faults += [] if kept == state_bytes(model.cfg, 40, 4) else [f"{kept} bytes"]
    return "wrong: " + ", ".join(faults) if faults else "exact"


def adapted(model: LM) -> str:
    """LoRA with random factors on every projection: its output beside the weights against that with it merged; on how much of the matrices."""
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    inside = sum(model.get_submodule(path).weight.numel() for path in chosen(model, (ALL_LINEAR,)) if path.startswith("blocks."))
    wrap(model.eval(), LoRAConfig(r=2))
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 4)
    beside = model(tokens(), Seq.rows(2, T))[0]
    merge(model)
    return f"{number(float((beside - model(tokens(), Seq.rows(2, T))[0]).abs().max()))} ({inside / max(matrices, 1):.0%})"


def exportable(model: LM) -> str:
    try:
        return family_of(model.cfg)
    except ValueError as error:
        return "no: " + str(error).rpartition("which has no counterpart of ")[2].split(";")[0][:80]


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


MEASURED: dict[str, Check] = {
    "sees the future": causality,
    "packed = separate": packed,
    "streamed = whole": streamed,
    "ragged batch": ragged,
    "recomputed gradient": recomputed,
}
STATED = {"cost model": predicted, "LoRA": adapted, "transformers": exportable}
COLUMNS = ("oracle, forward", "oracle, backward", *MEASURED, "compiled", *STATED)


def attempt(check: Callable[[], str]) -> str:
    """The cell, or the reason why there is none."""
    try:
        with torch.no_grad():
            return check()
    except Exception as error:  # a table of what fails must not fail
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:70]}"


def row(part: str, name: str, oracles: dict[str, dict], compiling: bool) -> Row:
    found = oracles.get(f"{part}:{name}", {})
    shown = [f"{number(found[way]['error'])} ({found[way]['of']})" if way in found else "none" for way in ("forward", "backward")]
    made = attempt(lambda: str(model_of(part, name) is None))
    if made.startswith("no:"):
        return Row(part, name, (*shown, *[made] * (len(COLUMNS) - 2)))
    cells = [attempt(lambda c=c: number(c(model_of(part, name)))) for c in MEASURED.values()]
    cells.append(attempt(lambda: compiled(part, name)) if compiling else "not run")
    return Row(part, name, (*shown, *cells, *(attempt(lambda c=c: c(model_of(part, name))) for c in STATED.values())))


def run_oracles() -> dict[str, dict]:
    """Errors that the parity tests measure, as {part:name: {forward: {error, of}, backward: ...}}; {} without a checkout."""
    tests = Path(__file__).parent.parent.parent / "tests" / "parity"
    if not tests.is_dir():
        console().print("no source checkout: the oracle columns stay empty", style="yellow")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "oracles.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "oracle", str(tests), f"--oracles={out}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=tests.parent.parent, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
        if not out.is_file():
            raise ValueError(f"the parity tests did not run: {(done.stdout + done.stderr)[-500:]}")
        return read_json(out)


def table(rows: list[Row]) -> str:
    """The page, as Markdown."""
    lines = [
        "# Conformance", "",
        f"Made by `zero2llm conformance` on {date.today()}: Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, "
        f"{platform.machine()}. Each number is the largest difference that was measured on this run; float64 unless said.", "",
    ]  # fmt: skip
    for part in dict.fromkeys(r.part for r in rows):
        lines += [f"## {part}", "", "| name | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
        lines += [f"| {r.name} | " + " | ".join(cell.replace("|", "/") for cell in r.cells) + " |" for r in rows if r.part == part]
        lines.append("")
    return "\n".join([*lines, *MEANING]) + "\n"


MEANING = (
    "- **oracle**: largest difference from an independent implementation (fp32 as a rule; relative to the largest value where that is above 1), measured by the parity tests; backward: of gradients too.",
    f"- **sees the future**: change of an output by a later token. **packed**: {packed.__doc__}",
    f"- **streamed**: {streamed.__doc__} **ragged**: {ragged.__doc__}",
    f"- **recomputed gradient**: {recomputed.__doc__} **compiled**: {compiled.__doc__}",
    f"- **cost model**: {predicted.__doc__} **LoRA**: {adapted.__doc__}",
    "- **transformers**: the architecture that the model is exported as, or why there is none.",
)


def conformance(out: Path | None, parts: list[str], compiling: bool, oracles: bool) -> list[Row]:
    """Run everything and show it; write the page to ``out``. Raises ValueError for a part that does not exist."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part is called {part!r}; there are: {', '.join(PARTS)}")
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a Markdown file")
    found = run_oracles() if oracles else {}
    rows = []
    for part in parts or PARTS:
        for name in PARTS[part]:
            rows.append(row(part, name, found, compiling))
            console().print(f"{part} {name}: " + ", ".join(f"{c} {v}" for c, v in zip(COLUMNS, rows[-1].cells, strict=True)), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write_atomic(out, table(rows))
        console().print(f"wrote {out}", markup=False)
    return rows
