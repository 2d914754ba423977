"""Sequence-level distillation: the teacher writes the answers, and the student is fine-tuned on them like on any others.

    y_hat(x) ~ p(y | x)^(1 / T)  or  argmax_y p(y | x) step by step (T = 0);     L = -log q(y_hat | x)

Source: 1606.07947 section 3.2 (they search with a beam; greedy or T <= 0.7 is the usual form for language models).
Why: only texts pass from one to the other, so the teacher may have any vocabulary, architecture, or be somebody's server; one run
of it serves any number of students.
What is lost: everything that p says besides the one answer.
An answer that was cut at max_tokens has no end and would teach to stop anywhere; an empty one teaches to say nothing. Both are
left out and counted.
Cost: one generation of the teacher a prompt. A run that was killed goes on behind its last whole line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.progress import track

from zero2llm.core.files import full_disk, read_json, sha256, write_atomic
from zero2llm.core.log import err_console
from zero2llm.data.schemas import Prompt, prompts
from zero2llm.data.sources import BadRecords, expand
from zero2llm.tokenizers.tokenizer import Tokenizer


class Writer(Protocol):
    """What writes: an `Engine`."""

    tokenizer: Tokenizer
    max_len: int

    def generate(self, prompts: list, sampling: Any) -> list: ...


def write_answers(
    engine: Writer, teacher: str, files: Sequence[str], out: str | Path, sampling: Any, *, batch: int = 64, quiet: bool = False
) -> dict[str, int]:
    """Let the teacher answer every prompt of ``files``; ``out`` becomes a file of conversations for objective sft.

    teacher : names its weights (`weights_hash`).  sampling : an engine's `Sampling`; prompt n draws from its seed and n. A file of
    conversations counts as prompts up to its last answer. Returns how many answers were kept, and left out by reason.
    Raises ValueError if ``out`` or what is left of an unfinished run was made from anything else.
    """
    out = Path(out)
    part, about = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.about")  # hidden: a folder of data may hold them
    made_from = _about(teacher, files, sampling, engine.tokenizer)
    if about.is_file() and read_json(about) != made_from:
        raise ValueError(f"{out}: was begun with another teacher, other prompts or another sampling; delete {about} and {part.name}, or choose another name")
    if out.exists() and not about.is_file():
        raise ValueError(f"{out} already exists and was not written by this; choose another place")
    if not out.exists():
        asked = list(prompts(files, BadRecords(skip=False)))
        _check_lengths(engine, asked)
        write_atomic(about, json.dumps(made_from, indent=1))
        done = whole_lines(part)
        starts = range(done, len(asked), batch)
        try:
            with open(part, "a", encoding="utf-8") as file:
                for start in track(starts, "teacher writes", console=err_console(), disable=quiet):
                    for record in answered(engine, asked[start : start + batch], start, sampling):
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise full_disk(error, out) from error
        write_atomic(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in _records(part) if "messages" in r))
    return _counts(part)


def answered(engine: Writer, asked: Sequence[Prompt], first: int, sampling: Any) -> Iterator[dict]:
    """A conversation for each prompt, or {"left_out": why}."""
    ids = [_ids(engine, prompt) for prompt in asked]
    each = [dataclasses.replace(sampling, seed=_seed(sampling.seed, first + i)) for i in range(len(asked))]
    for prompt, done in zip(asked, engine.generate(ids, each), strict=True):
        if done.finish == "length":
            yield {"left_out": "cut at max_tokens"}
        elif not done.text.strip():
            yield {"left_out": "empty"}
        else:
            tools = {"tools": prompt.messages.tools} if prompt.messages.tools else {}
            yield {"messages": [*prompt.messages, {"role": "assistant", "content": done.text}], **tools}


def whole_lines(part: Path) -> int:
    """How many records an unfinished run has written; half a line at the end is cut off."""
    if not part.is_file():
        return 0
    with open(part, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
    return data.count(b"\n")


def _ids(engine: Writer, prompt: Prompt) -> list[int]:
    return engine.tokenizer.render(list(prompt.messages), True, prompt.messages.tools)[0]


def _check_lengths(engine: Writer, asked: Sequence[Prompt]) -> None:
    if not asked:
        raise ValueError("the files hold no prompt")
    for prompt in asked:
        if (n := len(_ids(engine, prompt))) >= engine.max_len:
            raise ValueError(f"{prompt.where}: the prompt has {n} tokens, the teacher reads {engine.max_len}: shorten or remove it")


def _seed(seed: int | None, number: int) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, number)).encode()).digest()[:7], "big")


def _about(teacher: str, files: Sequence[str], sampling: Any, tokenizer: Tokenizer) -> dict:
    read = [sha256(Path(path)) for path in expand(files)]
    template = hashlib.sha256(tokenizer.template.encode()).hexdigest()
    return json.loads(json.dumps({"teacher": teacher, "prompts": read, "sampling": dataclasses.asdict(sampling), "template": template}))


def _records(part: Path) -> Iterator[dict]:
    with open(part, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _counts(part: Path) -> dict[str, int]:
    found = Counter(record.get("left_out", "written") for record in _records(part))
    return {"written": found.pop("written", 0), **found}
