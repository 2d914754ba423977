"""Our models as folders that transformers opens, and theirs as ours; families/ holds a page for each architecture.

    config.json  model.safetensors (or shards with an index)  generation_config.json
    tokenizer.json  tokenizer_config.json  chat_template.jinja

Nothing here needs transformers; verify.py asks it for a second opinion.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

from zero2llm.core.files import new_folder, read_json, save_tensors
from zero2llm.core.lazy import lazy, open_tensors
from zero2llm.interop.foreign import check_names, plan
from zero2llm.interop.hf_config import from_hf_config, rules_of, to_hf_config
from zero2llm.interop.score import padding
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer

GENERATION_KEYS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "max_length", "max_new_tokens",
}  # fmt: skip


def to_hf_tensors(state: dict[str, Tensor], cfg: ModelConfig, model_type: str | None = None) -> dict[str, Tensor]:
    """Our state dict under their names and in their layout; a tied head is stored once.

    model_type : the family to write, where several compute the same (Phi-3 without LongRoPE is Mistral); None = the plainest.

    Raises ValueError listing tensors that are missing or too many.
    """
    rules = rules_of(cfg, model_type)
    if cfg.score_head == "reward":
        state = {name: tensor for name, tensor in state.items() if name != "head.weight"}  # a classifier has no place for it
    check_names([name for rule in rules for name in rule.ours], state, "model state")
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.pack([state[n] for n in rule.ours]), strict=True)
    }


def from_hf_tensors(tensors: dict[str, Tensor], cfg: ModelConfig, model_type: str | None = None) -> dict[str, Tensor]:
    """The inverse of `to_hf_tensors`, for tensors that are in memory. Raises ValueError as `plan` does."""
    made = plan({name: lazy(t) for name, t in tensors.items()}, cfg, model_type)
    return dict(zip(made.ours(), (tensor for part in made.parts() for tensor in part), strict=True))


def export_hf(state: dict[str, Tensor], cfg: ModelConfig, tokenizer_dir: Path, out: Path, generation: dict | None = None,
              *, overwrite: bool = False, model_type: str | None = None) -> Path:  # fmt: skip
    """Write a self-contained folder, whole or not at all. Returns ``out``.

    tokenizer_dir : holds tokenizer.json, tokenizer_config.json and, for chat models, chat_template.jinja.
    generation : any of GENERATION_KEYS. The tokens that end an answer are its ``eos_token_id`` (one id or several) and those
    at which our engine stops; without it, our tokenizer also says which tokens start and pad.
    Weights keep their dtype.  model_type : as in `to_hf_tensors`.
    A reward model becomes a classifier with one label, without generation settings; score.py says what differs.
    Raises ValueError before anything is written: no counterpart, a non-empty ``out``, a tokenizer that does not fit.
    """
    tensors = to_hf_tensors(state, cfg, model_type)
    _check_tokenizer(Path(tokenizer_dir), cfg)
    generation = _generation(generation or {}, Path(tokenizer_dir), cfg)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    ids = {key: generation.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    pad = padding(Tokenizer.load(tokenizer_dir)) if cfg.score_head == "reward" else None
    ids |= {} if pad is None else {"pad": pad}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    config = to_hf_config(cfg, **ids, dtype=dtype, model_type=model_type)
    with new_folder(Path(out), overwrite) as part:
        save_tensors(tensors, part)
        _write(part / "config.json", config)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, part / name)
        if pad is None:
            _write(part / "generation_config.json", generation)
        else:
            name = Tokenizer.load(tokenizer_dir).library.id_to_token(pad)
            _write(part / "tokenizer_config.json", read_json(part / "tokenizer_config.json") | {"pad_token": name})
    return Path(out)


def _write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation(given: dict, tokenizer_dir: Path, cfg: ModelConfig) -> dict:
    """generation_config.json with eos_token_id as a list; every id must exist in the vocabulary."""
    unknown = sorted(set(given) - GENERATION_KEYS)
    if unknown:
        raise ValueError(f"generation: unknown keys {unknown}; known: {', '.join(sorted(GENERATION_KEYS))}")
    own = Tokenizer.load(tokenizer_dir)
    if given.get("eos_token_id") in (None, []):
        given = {"bos_token_id": own.bos_id, "pad_token_id": own.pad_id} | given
    out = given | {"eos_token_id": stops_of(given, own)}
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        for token in out[name] if name == "eos_token_id" else [out.get(name)]:
            if token is not None and not 0 <= token < cfg.vocab_size:
                raise ValueError(f"generation: {name} {token} is outside the vocabulary of {cfg.vocab_size}")
    return out


def stops_of(generation: dict, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends an answer: those that came with the model, then those at which our engine stops."""
    eos = generation.get("eos_token_id")
    given = [eos] if isinstance(eos, int) else eos or []
    return list(dict.fromkeys([*given, *sorted(tokenizer.stop_ids)]))


def _check_tokenizer(folder: Path, cfg: ModelConfig) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: no such file; an export needs the tokenizer that the model was trained with"
            )
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokens["model"]["vocab"]  # a list of pieces with scores where the model is Unigram
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *(added["id"] for added in tokens["added_tokens"])]
    if (largest := max(ids)) >= cfg.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has id {largest}, the model a vocabulary of {cfg.vocab_size}")


def load_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict of a folder that transformers wrote, or `export_hf`. Tensors keep their dtype."""
    data = read_json(Path(folder) / "config.json")
    cfg = from_hf_config(data)
    made = plan(open_tensors(Path(folder)), cfg, data["model_type"], str(folder))
    return cfg, dict(zip(made.ours(), (tensor for part in made.parts() for tensor in part), strict=True))
