"""`zero2llm verify-export`: an export opened by the program it was made for, against the checkpoint it was made from.

    config.json with safetensors -> transformers        *.gguf -> llama.cpp
    adapter_config.json -> peft on its base             *.onnx -> onnxruntime

What is compared, and why in two steps where weights were rounded, stands in interop/checks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from zero2llm.adapters.wrap import unwrap
from zero2llm.core.files import load_tensors
from zero2llm.core.log import console
from zero2llm.interop.checks import (
    Check,
    Reader,
    check_chat,
    check_greedy,
    check_ids,
    check_logits,
    check_settings,
    check_weights,
    greedy_of,
    guarded,
    opened,
    read_back,
    told_loss,
)  # fmt: skip
from zero2llm.interop.foreign import Foreign
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.vocab import vocab_notes
from zero2llm.interop.gguf.write import plan_gguf
from zero2llm.interop.hf import load_hf, stops_of
from zero2llm.interop.onnx import OnnxRuntime
from zero2llm.interop.peft.read import load_peft
from zero2llm.interop.questions import CHATS, ODD, PROMPTS, TEXTS
from zero2llm.interop.read_hf import read_hf
from zero2llm.interop.score import as_language_model
from zero2llm.interop.verify import Transformers, base_of
from zero2llm.interop.verify_gguf import BLOCKS, LlamaCpp, check_rounding, in_full, kind_of
from zero2llm.lab.talk import find_checkpoint
from zero2llm.lab.verify_reward import reward_checks
from zero2llm.model.lm import LM
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.adapted import AdapterRun, dress, load_learned
from zero2llm.train.checkpoint import Checkpoint, generation_of

LONGEST = 256  # tokens of a text whose logits are compared
KINDS = {torch.bfloat16: "BF16", torch.float16: "F16"}  # of a folder with several, the coarsest counts
NEEDS = {"hf": ["transformers"], "peft": ["transformers", "peft"], "gguf": ["xllamacpp"], "onnx": ["transformers", "onnxruntime"]}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Asked:
    """The model with its tokenizer, and what both sides are asked. tokens : greedy ones, fewer where the model reads few."""

    model: LM
    tokenizer: Tokenizer
    texts: list[str]
    rows: list[list[int]]
    prompts: list[list[int]]
    tokens: int

    @staticmethod
    def of(model: LM, tokenizer: Tokenizer, prompts: list[str], tokens: int) -> Asked:
        longest = max(1, min(model.cfg.max_len - 1, LONGEST))  # llama.cpp wants room for what comes next
        texts = [*prompts, *PROMPTS[: max(0, len(PROMPTS) - len(prompts))]]
        prompt_ids = [ids for text in texts if (ids := tokenizer.encode(text))]
        tokens = min(tokens, model.cfg.max_len // 2)
        room = model.cfg.max_len - tokens
        rows = [ids[:longest] for ids in [*prompt_ids, *map(tokenizer.encode, TEXTS[-4:]), sum(prompt_ids, [])] if ids]
        return Asked(model, tokenizer, [*prompts, *TEXTS], rows, [ids[-room:] for ids in prompt_ids], tokens)

    def answers(self, model: LM) -> list[list[int]]:
        return [greedy_of(model, prompt, self.tokens) for prompt in self.prompts]


def verify_export(export: Path, checkpoint: Path, prompts: list[str] | None = None, tokens: int = 64, base: Path | None = None) -> bool:
    """Print a row for each check; whether all passed.

    prompts : besides the fixed texts.  base : of an adapter, where its base lies: for peft the folder that it is loaded
    onto, otherwise the checkpoint that it was trained on.
    Raises ValueError for an export that is none, or cut short; a checkpoint that is none; a missing package.
    """
    export, source = Path(export), find_checkpoint(checkpoint)
    kind = kind_of_export(export)
    model = source.load_model(None if kind == "peft" else base)
    scoring = model.cfg.score_head == "reward"
    if not scoring:
        as_language_model(model)  # a critic stays behind
    asked = Asked.of(model, Tokenizer.load(source.tokenizer_dir), prompts or [], tokens)
    table = Table(title=Text(f"{export} against {source.path}"), title_justify="left")
    for column in ("check", "measured", "limit", ""):
        table.add_column(column, overflow="fold")
    rows = list(reward_checks(export, kind, model, asked.tokenizer, asked.rows) if scoring else CHECKS[kind](export, asked, source, base))
    for row in rows:
        table.add_row(*map(Text, (row.name, row.measured, row.limit)), Text("ok", "green") if row.passed else Text("FAIL", "bold red"))
    console().print(table)
    failed = [row.name for row in rows if not row.passed]
    console().print(f"FAILED: {', '.join(failed)}" if failed else f"all {len(rows)} checks passed", style="bold red" if failed else "bold green")
    return not failed


def kind_of_export(export: Path) -> str:
    """hf, gguf, peft or onnx. Raises ValueError for anything else, and where the program that opens it is not installed."""
    if export.is_file() and export.suffix == ".gguf" or list(export.glob("*.gguf")):
        kind = "gguf"
    elif (export / "adapter_config.json").is_file():
        kind = "peft"
    elif (export / "model.onnx").is_file():
        kind = "onnx"
    elif (export / "config.json").is_file():
        kind = "hf"
    else:
        what = "neither a folder of transformers, a GGUF, an adapter of peft nor an ONNX folder"
        raise ValueError(f"{export}: " + (what if export.exists() else "no such file or folder"))
    for package in NEEDS[kind]:
        if find_spec(package) is None:
            raise ValueError(f"checking {kind} needs {package}: pip install 'zero2llm[verify]'")
    if kind in ("hf", "onnx") and (missing := [name for name in FILES if not (export / name).is_file()]):
        raise ValueError(f"{export}: lacks {' and '.join(missing)}; the export, or its download, has not ended")
    return kind


def _hf(export: Path, asked: Asked, source: Checkpoint, base: Path | None) -> Iterator[Check]:
    found = read_hf(export)
    reader = opened(export, lambda: Transformers(export))
    yield Check("opened by", reader.name, "", True)
    yield reader.check_names()
    stops = stops_of(generation_of(source.path), asked.tokenizer)
    yield guarded("control tokens", lambda: reader.check_control(asked.tokenizer, reader.stops, stops))
    yield from _spoken(reader, asked)
    kinds = {tensor.dtype for tensor in found.tensors.values()}
    model = yield from _stored(found, asked, next((KINDS[dtype] for dtype in KINDS if dtype in kinds), "F32"))
    yield from _computed(reader, model, asked, asked.answers(model))


def _peft(export: Path, asked: Asked, source: Checkpoint, base: Path | None) -> Iterator[Check]:
    where = base_of(export, base)
    cfg, state = load_hf(where)
    merged = LM(cfg)
    merged.load_state_dict(state)
    load_peft(merged.float(), export)
    merged = unwrap(merged).eval()
    reader = opened(export, lambda: Transformers(export, where))
    yield Check("opened by", reader.name, "", True)
    yield reader.check_names()
    yield from _spoken(reader, asked)
    model, run = asked.model, source.adapter()
    if run is not None and run.quantize is not None:
        model = _in_full(source, run)
        yield replace(told_loss(asked.model, model, asked.rows), name=f"base in full, not in {run.quantize}")
    yield guarded("weights read back", lambda: check_weights(model.state_dict(), merged.state_dict(), "F32"))
    yield from _computed(reader, model, asked, asked.answers(model))


def _in_full(source: Checkpoint, run: AdapterRun) -> LM:
    """The adapter on the base as it was before it was packed: what peft loads it onto."""
    model = dress(Checkpoint.open(run.base, resuming=False).load_model(), replace(run, quantize=None))
    load_learned(model, run, load_tensors(source.path / "model"))
    as_language_model(model)
    return unwrap(model).eval()


def _gguf(export: Path, asked: Asked, source: Checkpoint, base: Path | None) -> Iterator[Check]:
    files = [export] if export.is_file() else sorted(export.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{export}: holds {len(files)} GGUF files; name one of them")
    path, size, found, kind = files[0], asked.model.cfg.vocab_size, read_gguf(files[0]), kind_of(files[0])
    room = max(map(len, [*asked.rows, *asked.prompts])) + asked.tokens + 8
    llama = lambda file: closing(opened(export, lambda: LlamaCpp(file, size, room)))
    with in_full(path) if kind in BLOCKS else nullcontext() as copy:
        with llama(path) as reader:
            yield Check("opened by", f"{reader.name}; it gives log-probabilities of the next token, no logits", "", True)
            yield guarded("control tokens", lambda: reader.check_control(asked.tokenizer))
            yield from _spoken(reader, asked, vocab_notes(source.tokenizer_dir, size))
            model = yield from _stored(found, asked, kind)
            original = asked.model.state_dict(), asked.model.cfg, source.tokenizer_dir
            planned = lambda: plan_gguf(*original, kind.lower(), model_type=found.config["model_type"])
            yield guarded("rounding", lambda: check_rounding(planned(), path))
            answers = asked.answers(model)
            yield from _computed(reader, model, asked, answers, f", activations in 8 bits for {kind}" if copy else "")
        if copy is not None:
            with llama(copy) as reader:
                yield from _computed(reader, model, asked, answers, ", the file's values as F32")


def _onnx(export: Path, asked: Asked, source: Checkpoint, base: Path | None) -> Iterator[Check]:
    reader = opened(export, lambda: OnnxRuntime(export))
    yield Check("opened by", reader.name, "", True)
    yield guarded("control tokens", lambda: reader.check_control(asked.tokenizer))
    yield from _spoken(reader, asked)
    yield guarded("batches", lambda: reader.check_shapes(asked.model))
    yield from _computed(reader, asked.model, asked, asked.answers(asked.model))


CHECKS: dict[str, Callable[..., Iterator[Check]]] = {"hf": _hf, "peft": _peft, "gguf": _gguf, "onnx": _onnx}


def _spoken(reader: Reader, asked: Asked, notes: tuple[str, ...] = ()) -> Iterator[Check]:
    odd = ((), ODD, "; ".join(notes)) if notes else (ODD, (), "")
    yield guarded("token ids", lambda: check_ids(reader, asked.tokenizer, [*asked.texts, *odd[0]], odd[1], odd[2]))
    if asked.tokenizer.template:
        yield guarded("chat template", lambda: check_chat(reader, asked.tokenizer, CHATS))


def _stored(found: Foreign, asked: Asked, kind: str) -> Iterator[Check]:
    """Settings and weights; returns the model with the weights that were read back, or ours where they cannot be."""
    yield guarded("settings", lambda: check_settings(found, asked.model))
    original, back = asked.model.state_dict(), {}

    def weights() -> Check:
        back.update(read_back(found, asked.model.cfg))
        return check_weights(original, back, kind)

    row = guarded("weights read back", weights)
    yield row
    if not back or all(back[name].equal(tensor) for name, tensor in original.items()):
        return asked.model
    model = LM.clone(asked.model).eval()
    model.load_state_dict(back)
    if row.passed:
        yield told_loss(asked.model, model, asked.rows)
    return model


def _computed(reader: Reader, model: LM, asked: Asked, answers: list[list[int]], what: str = "") -> Iterator[Check]:
    spread = [1.0]

    def logits() -> Check:
        row, spread[0] = check_logits(reader, model, asked.rows)
        return row

    greedy = lambda: check_greedy(reader, model, asked.prompts, answers, spread[0])
    for name, check in ((reader.gives, logits), (f"{asked.tokens} greedy tokens", greedy)):
        yield replace(guarded(name, check), name=name + what)
