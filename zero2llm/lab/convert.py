"""Hand a checkpoint to other programs, and make an adapter and its base one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from zero2llm.core.log import console
from zero2llm.interop.gguf.write import FILE_TYPES, export_gguf, plan_gguf
from zero2llm.interop.hf import GENERATION_KEYS, export_hf
from zero2llm.interop.onnx import export_onnx
from zero2llm.interop.peft.write import save_peft
from zero2llm.interop.score import as_language_model, padding, score_notes
from zero2llm.lab.talk import find_checkpoint
from zero2llm.model.lm import LM
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint, generation_of, save_model

WRITTEN_ANEW = {"transformers_version", "_from_model_config"}  # how a generation_config.json came about, not how to answer


def export_checkpoint(path: Path, out: Path, to: str = "hf", *, kind: str | None = None, base: str | None = None,
                      model_type: str | None = None, overwrite: bool = False) -> Path:  # fmt: skip
    """Write the checkpoint in the format ``to``: hf, gguf, peft or onnx.

    kind : how a GGUF stores weights; None = f16.  base : of an adapter, where its base lies (hf, gguf, onnx), or what
    peft shall load it onto.  model_type : the family, where several of transformers compute the same.
    Raises ValueError, before anything is written, for a format or a part of the model without counterpart.
    """
    if to not in WRITERS:
        raise ValueError(f"--to {to!r} is not available; there are: {', '.join(WRITERS)}")
    if kind is not None and to != "gguf":
        raise ValueError(f"--type {kind} is how a GGUF stores weights; --to {to} keeps them as they are")
    source = find_checkpoint(path)
    WRITERS[to](source, out, kind, base, model_type, overwrite)
    return out


def _hf(source: Checkpoint, out: Path, kind: None, base: str | None, model_type: str | None, overwrite: bool) -> None:
    model = _language_model(source.load_model(base))
    scoring = model.cfg.score_head == "reward"
    notes = score_notes(model.state_dict(), model.cfg, source.tokenizer_dir) if scoring else []
    given = {} if scoring else generation_of(source.path)
    generation = {key: given[key] for key in given if key in GENERATION_KEYS}
    export_hf(model.state_dict(), model.cfg, source.tokenizer_dir, out, generation, overwrite=overwrite, model_type=model_type)
    dropped = sorted(given.keys() - GENERATION_KEYS - WRITTEN_ANEW)
    for note in [*notes, *(f"generation_config.json: {key} = {json.dumps(given[key])} is not written; add it where you need it" for key in dropped)]:
        _say(f"  {note}", "yellow")
    _say(f"wrote {out}: open it with transformers.AutoModelFor{'SequenceClassification' if scoring else 'CausalLM'}.from_pretrained({str(out)!r})")


def _language_model(model: LM) -> LM:
    """A critic stays behind, and that is said; a reward model's head is the model, and stays."""
    if model.cfg.score_head != "reward" and (note := as_language_model(model)):
        _say(f"  {note}", "yellow")
    return model


def _gguf(source: Checkpoint, out: Path, kind: str | None, base: str | None, model_type: str | None, overwrite: bool) -> None:
    if out.suffix != ".gguf":
        raise ValueError(f"--out {out}: a GGUF is one file; give it a name that ends in .gguf")
    model, kind = _language_model(source.load_model(base)), kind or "f16"
    if kind not in FILE_TYPES:
        raise ValueError(f"--type {kind!r} is not available; there are: {', '.join(FILE_TYPES)}")
    asked = {"name": out.stem, "model_type": model_type}
    notes = plan_gguf(model.state_dict(), model.cfg, source.tokenizer_dir, kind, **asked).notes
    export_gguf(model.state_dict(), model.cfg, source.tokenizer_dir, out, kind, overwrite=overwrite, **asked)
    for note in notes:
        _say(f"  {note}", "yellow")
    _say(f"wrote {out}, {out.stat().st_size / 1e6:,.1f} MB as {kind}: llama-cli -m {out}")


def _peft(source: Checkpoint, out: Path, kind: None, base: str | None, model_type: str | None, overwrite: bool) -> None:
    if source.adapter() is None:
        raise ValueError(f"{source.path} is a whole model, not an adapter; export it with --to hf or --to gguf")
    if base is None:
        raise ValueError("--to peft needs --base: what peft shall load the adapter onto, a hub id or a folder of transformers")
    model = _language_model(source.load_adapted())
    save_peft(model, out, base, model_type=model_type, overwrite=overwrite)
    if model.score is None:
        _say(f"wrote {out}: open it with peft.PeftModel.from_pretrained(base, {str(out)!r})")
        return
    for note in score_notes(model.state_dict(), model.cfg, source.tokenizer_dir):
        _say(f"  {note}", "yellow")
    _say(f"wrote {out}: open it with peft.PeftModel.from_pretrained(base, {str(out)!r}), base being an AutoModelForSequenceClassification with "
         f"num_labels=1 and pad_token_id={padding(Tokenizer.load(source.tokenizer_dir))}")  # fmt: skip


def _onnx(source: Checkpoint, out: Path, kind: None, base: str | None, model_type: str | None, overwrite: bool) -> None:
    if model_type is not None:
        raise ValueError(f"--model-type {model_type} is a family of transformers; an ONNX file holds the computation itself")
    model = _language_model(source.load_model(base))
    export_onnx(model, model.cfg, source.tokenizer_dir, out, overwrite)
    _say(f"wrote {out}: open {out / 'model.onnx'} with onnxruntime; tokens (batch, length) -> logits (batch, length, {model.cfg.vocab_size})")


WRITERS: dict[str, Callable] = {"hf": _hf, "gguf": _gguf, "peft": _peft, "onnx": _onnx}


def merge_checkpoint(path: Path, out: Path, base: str | None = None, overwrite: bool = False) -> Path:
    """An adapter and its base as one whole checkpoint. Raises ValueError if ``path`` is none, or its base is gone."""
    source = find_checkpoint(path)
    if source.adapter() is None:
        raise ValueError(f"{source.path} is a whole model already; there is nothing to merge")
    model = source.load_model(base)

    def save_tokenizer(folder: Path) -> None:
        shutil.copytree(source.tokenizer_dir, folder)

    save_model(model, save_tokenizer, out, source, overwrite)
    _say(f"wrote {out}: {json.dumps(source.adapter().config.kind)} merged into {base or source.adapter().base}")
    return out


def _say(text: str, style: str | None = None) -> None:
    console().print(text, style=style, markup=False, soft_wrap=True)
