"""Talk to a checkpoint: one-off prompts, and a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from zero2llm.core.device import pick_device
from zero2llm.core.log import console, err_console
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

Message = dict[str, str]


def find_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint, the latest of a run, or the last stage in the output folder of `zero2llm quickstart`."""
    path = Path(path)
    if not (path / "manifest.json").is_file():
        stages = [path / stage for stage in ("dpo", "sft", "pretrain") if (path / stage / "checkpoints").is_dir()]
        path = next(iter(stages), path)
    return Checkpoint.open(path, resuming=False)


def load_engine(path: str | Path, device: str = "auto", max_batch: int = 32) -> Engine:
    """An engine for anything that `find_checkpoint` finds."""
    checkpoint = find_checkpoint(path)
    model = checkpoint.load_model().to(pick_device(device))
    return Engine(model, Tokenizer.load(checkpoint.tokenizer_dir), max_batch=max_batch)


def chat_prompt(engine: Engine, messages: list[Message], answer_tokens: int) -> list[int]:
    """Token ids that ask for the next assistant turn. When the window is full, the oldest exchanges are forgotten."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    room = engine.max_len - min(answer_tokens, engine.max_len // 2)
    while True:
        ids, _ = engine.tokenizer.render(system + turns, add_generation_prompt=True)
        if len(ids) <= room or len(turns) <= 1:
            return ids
        turns = turns[2:]


def stream_answer(engine: Engine, messages: list[Message], sampling: Sampling) -> Iterator[str]:
    """Pieces of the assistant's next message."""
    yield from engine.stream(chat_prompt(engine, messages, sampling.max_tokens), sampling)


def generate_texts(path: Path, prompts: list[str], sampling: Sampling, *, chat: bool, device: str) -> None:
    """Print one completion per prompt; several prompts are decoded as one batch."""
    engine = load_engine(path, device)
    if chat:
        ids = [chat_prompt(engine, [{"role": "user", "content": p}], sampling.max_tokens) for p in prompts]
    else:
        ids = [[*engine.tokenizer.start_ids, *engine.tokenizer.encode(p)] for p in prompts]
    if len(prompts) == 1:
        print("" if chat else prompts[0], end="", flush=True)
        for piece in engine.stream(ids[0], sampling):
            print(piece, end="", flush=True)
        print()
        return
    for prompt, done in zip(prompts, engine.generate(ids, sampling), strict=True):
        console().rule()
        print((prompt + "\n" if chat else prompt) + done.text)


def chat_loop(path: Path, sampling: Sampling, *, system: str | None, device: str) -> None:
    """A conversation until Ctrl-D or /quit. Ctrl-C during an answer stops the answer; at the prompt it leaves."""
    engine = load_engine(path, device)
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    interactive = sys.stdin.isatty()
    err_console().print(f"{path}: /new starts afresh, /quit leaves, Ctrl-C stops an answer", style="dim", markup=False)
    while True:
        try:
            text = input("you> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/new":
            messages = list(first)
            continue
        if text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _answer(engine, messages, sampling)})


def _answer(engine: Engine, messages: list[Message], sampling: Sampling) -> str:
    pieces: list[str] = []
    print("bot> ", end="", flush=True)
    try:
        for piece in stream_answer(engine, messages, sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        engine.abort()
        print(" [stopped]", end="")
    except ValueError as error:
        print(f"[{error}]", end="")
    print()
    return "".join(pieces)
