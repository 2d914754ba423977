"""What an export must have in common with its model, asked of an independent program that has it open.

    ids        theirs(text) = ours(text)                         for every text
    chat       rendered text and its ids, equal                  for every conversation that the template can hold
    logits     max |theirs - ours| <= limit * std(ours)          ours: our code on the weights *read back* from the export
    greedy     the same most probable tokens; where two are nearer than 2 * limit * std(ours), either is right and is told:
               of an answer that parts from ours, every token is judged by our logits behind the tokens before it
    weights    |read back - original| / |original| <= what the kind of storage can lose, for every tensor
    rounding   |stored - rounded original| / |original| <= 1e-3: of a GGUF, that the file's blocks are these and no others
    settings   the export's configuration describes the same function
    loss       KL(original || read back) in nats a token, and perplexity before and after: told, not judged

Why two comparisons in place of one: read back = original shows that rounding alone lies between them, and the reader
against what was read back, free of that rounding, shows that both sides mean the same by the same bytes. A mistake made
alike in writing and reading fails the second, any other the first. A reader that rounds activations too is asked twice,
about a copy without such rounding and about the export itself: see verify_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from zero2llm.core.seq import Seq
from zero2llm.interop.families.family import differences
from zero2llm.interop.foreign import Foreign, plan, some
from zero2llm.interop.hf_config import from_hf_config
from zero2llm.model.lm import LM
from zero2llm.tokenizers.chat import Style
from zero2llm.tokenizers.tokenizer import Tokenizer

# What a kind may lose of a matrix, |error| / |weights|. Of 16 bits the last; of a block of 32 with largest value m the error is
# at most m / (2 * 127 sqrt 3) or m / (8 sqrt 3) a weight, and its root mean square at least m / sqrt 32.
LOSS = {"F32": 1e-4, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.015, "Q4_0": 0.42}
R = TypeVar("R")
FLOOR = -87.0  # of log-probabilities: e^-87 is the smallest number that fp32 holds in full


@dataclass(frozen=True)
class Check:
    """A row of the table: what was measured, what it may be, and whether it is."""

    name: str
    measured: str
    limit: str
    passed: bool


@dataclass(frozen=True)
class Chat:
    """names : what the template may read besides, as enable_thinking."""

    messages: list[dict]
    tools: list[dict] | None = None
    names: tuple[tuple[str, Any], ...] = ()


class Reader(Protocol):
    """An independent program with the export open.

    scale : the limit of a logit's error, in standard deviations of ours.  gives : log-probs are compared as such.
    """

    name: str
    scale: float
    gives: Literal["logits", "log-probs"]

    def encode(self, text: str) -> list[int]: ...  # control strings are text, nothing is put around it
    def render(self, chat: Chat) -> str: ...  # ready for an answer
    def encode_chat(self, rendered: str) -> list[int]: ...  # control strings are tokens
    def scores(self, ids: list[int]) -> Tensor: ...  # (k, V) fp32, of the last k positions
    def greedy(self, ids: list[int], guess: list[int]) -> list[int]: ...  # up to len(guess) tokens; may end where the guess is wrong


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A reader that raises has failed the check: what it says is the measurement."""
    try:
        return check()
    except Exception as error:  # each program has its own kinds
        text = " ".join(str(error).split()) or "no message"
        return Check(name, f"{type(error).__name__}: {text[:300]}", "no error", False)


def opened(export: Path, reader: Callable[[], R]) -> R:
    """Each program has its own kinds of errors; all of them mean that the export is no use."""
    try:
        return reader()
    except Exception as error:
        raise ValueError(f"{export}: cannot be opened ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


def check_ids(reader: Reader, tokenizer: Tokenizer, texts: Sequence[str], told: Sequence[str] = (), why: str = "") -> Check:
    """``told`` : texts that are known to differ (``why``); they are reported and not judged."""
    unequal = [text for text in texts if reader.encode(text) != tokenizer.encode(text)]
    known = [text for text in told if reader.encode(text) != tokenizer.encode(text)]
    measured = f"{len(texts) - len(unequal)} of {len(texts)} texts"
    if unequal:
        measured += f"; not {unequal[0][:40]!r}: {reader.encode(unequal[0])[:8]}, ours {tokenizer.encode(unequal[0])[:8]}"
    if known:
        measured += f"; {len(known)} differ as is known: {why}"
    return Check("token ids", measured, "all equal", not unequal)


def check_chat(reader: Reader, tokenizer: Tokenizer, chats: Sequence[Chat]) -> Check:
    """Of conversations that our template refuses, none is asked."""
    asked, faults = 0, []
    for i, chat in enumerate(chats):
        style = {"tools": chat.tools, "style": Style(dict(chat.names))}
        try:
            text, ids = tokenizer.render_text(chat.messages, True, **style), tokenizer.render(chat.messages, True, **style)[0]
        except ValueError:
            continue
        asked += 1
        theirs = reader.render(chat)
        if theirs != text:
            at = next((k for k, (a, b) in enumerate(zip(theirs, text, strict=False)) if a != b), min(len(theirs), len(text)))
            faults.append(f"conversation {i + 1} at character {at}: {theirs[at : at + 30]!r}, ours {text[at : at + 30]!r}")
        elif reader.encode_chat(theirs) != ids:
            faults.append(f"conversation {i + 1} has other ids")
    measured = f"{asked - len(faults)} of {asked} conversations" + (f" ({len(chats) - asked} the template cannot hold)" if asked < len(chats) else "")
    return Check("chat template", "; ".join([measured, *faults[:2]]), "text and ids equal", not faults)


@torch.no_grad()
def logits_of(model: LM, ids: Sequence[int]) -> Tensor:
    row = torch.tensor([list(ids)])
    return model.logits(model(row, Seq.rows(*row.shape))[0])[0].float()


@torch.no_grad()
def greedy_of(model: LM, ids: Sequence[int], n: int) -> list[int]:
    """The ``n`` most probable tokens after ``ids``, whatever ends a text."""
    states, row, out = model.init_states(1, len(ids) + n), torch.tensor([list(ids)]), []
    while len(out) < n:
        hidden = model(row, Seq.rows(*row.shape, start=len(ids) + len(out) - row.shape[1]), states)[0]
        out.append(int(model.logits(hidden[:, -1]).argmax()))
        row = torch.tensor([out[-1:]])
    return out


def check_logits(reader: Reader, model: LM, rows: Sequence[list[int]]) -> tuple[Check, float]:
    """And the spread of our logits, by which differences are judged."""
    worst, found, places = 0.0, [], 0
    for ids in rows:
        ours, theirs = logits_of(model, ids), reader.scores(ids)
        found.append(ours)
        ours = ours[len(ours) - len(theirs) :]
        if reader.gives == "log-probs":
            ours, theirs = (x.log_softmax(-1).clamp(min=FLOOR) for x in (ours, theirs))
        error = (ours - theirs[:, : ours.shape[1]]).abs().max() if theirs.shape[1] >= ours.shape[1] else torch.tensor(torch.inf)
        worst, places = max(worst, float(error.nan_to_num(torch.inf))), places + len(theirs)
    spread = float(torch.cat(found).std())
    measured = f"max {worst:.2g} = {worst / spread:.2g} x spread, {places} positions of {len(rows)} texts"
    return Check(reader.gives, measured, f"{reader.scale:g} x spread ({spread:.3g})", worst <= reader.scale * spread), spread


def check_greedy(reader: Reader, model: LM, prompts: Sequence[list[int]], answers: Sequence[list[int]], spread: float) -> Check:
    """``answers`` : ours, by `greedy_of`."""
    n, near, exact, ties, faults = len(answers[0]), 2 * reader.scale * spread, 0, [], []
    for number, (prompt, ours) in enumerate(zip(prompts, answers, strict=True), 1):
        theirs = reader.greedy(prompt, ours)
        while len(theirs) < n and (more := reader.greedy(prompt + theirs, greedy_of(model, prompt + theirs, n - len(theirs)))):
            theirs = theirs + more
        if theirs == ours:
            exact += 1
            continue
        rows = logits_of(model, prompt + theirs)[len(prompt) - 1 :]
        gaps = [float(row.max() - row[token]) if token < len(row) else torch.inf for row, token in zip(rows, theirs, strict=False)]
        far = next((k for k, gap in enumerate(gaps) if not gap <= near), None)
        if far is not None:
            faults.append(f"prompt {number} parts at token {far + 1}, ours is {gaps[far]:.2g} above theirs")
        elif len(theirs) < n:
            faults.append(f"prompt {number} ends after {len(theirs)} tokens")
        ties += [gap for gap in gaps[:far] if gap > 0]
    measured = f"{len(prompts) - len(faults)} of {len(prompts)} prompts"
    told = [f"{exact} word for word", f"{len(ties)} near-ties taken the other way, largest gap {max(ties):.2g}"] if ties else []
    return Check(f"{n} greedy tokens", "; ".join([measured, *told, *faults[:2]]), f"all equal, ties nearer than {near:.2g}", not faults)


def read_back(found: Foreign, cfg, model_type: str | None = None) -> dict[str, Tensor]:
    """The export's tensors as ours, for a model of ``cfg``. Raises ValueError as `plan` does."""
    made = plan(found.tensors, cfg, model_type or found.config["model_type"], found.source)
    return dict(zip(made.ours(), (tensor.float() for part in made.parts() for tensor in part), strict=True))


def check_settings(found: Foreign, model: LM) -> Check:
    faults = differences(model.cfg, from_hf_config(found.config))
    return Check("settings", f"differ: {some(faults, 4)}" if faults else f"{found.config['model_type']}, as the checkpoint's", "equal", not faults)


def check_weights(original: dict[str, Tensor], back: dict[str, Tensor], kind: str) -> Check:
    """``kind`` is that of matrices; vectors are always fp32 in a GGUF and are judged so where matrices are coarser."""
    worst, where, faults = 0.0, "", []
    for name, tensor in original.items():
        tensor = tensor.float()
        error = float((back[name] - tensor).norm() / tensor.norm().clamp(min=1e-30))
        limit = LOSS["F32"] if tensor.ndim < 2 and kind in ("Q8_0", "Q4_0") else LOSS[kind]
        if not error <= limit:
            faults.append(f"{name} {error:.2g}")
        if error > worst:
            worst, where = error, f" ({name})"
    measured = f"max {worst:.2g}{where} of {len(original)} tensors" + (f"; too far: {some(faults, 3)}" if faults else "")
    return Check("weights read back", measured, f"{LOSS[kind]:g} relative, {kind}", not faults)


def told_loss(original: LM, back: LM, rows: Sequence[list[int]]) -> Check:
    """What rounding has cost on ``rows``."""
    divergence, before, after, count = 0.0, 0.0, 0.0, 0
    for ids in rows:
        p, q = (logits_of(model, ids)[:-1].log_softmax(-1) for model in (original, back))
        target = torch.tensor(ids[1:])[:, None]
        divergence += float((p.exp() * (p - q)).sum())
        before, after = before - float(p.gather(1, target).sum()), after - float(q.gather(1, target).sum())
        count += len(target)
    mean = lambda total: total / max(count, 1)
    perplexity = [float(torch.tensor(mean(x)).exp()) for x in (before, after)]
    measured = f"KL {mean(divergence):.2g} nats a token, perplexity {perplexity[0]:.5g} -> {perplexity[1]:.5g} on {count} tokens"
    return Check("cost of rounding", measured, "told", True)
