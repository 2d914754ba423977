"""A model of somebody else, whatever the format: what readers find and `import_model` turns into a checkpoint of ours.

    reader (hf | gguf | minimind | nanogpt) -> Foreign -> rules of its family (families/) -> model/*.safetensors

Every reader speaks transformers' language: its keys of config.json, its names of tensors, its tokenizer files. So each
family is described once. Tensors are read, turned and written one rule at a time: memory holds the largest one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.core.config import to_dict
from zero2llm.core.files import hashes, new_folder, read_json
from zero2llm.core.lazy import Lazy, write_tensors
from zero2llm.interop.hf_config import from_hf_config, page_of, rules_of
from zero2llm.interop.hf_names import Rule
from zero2llm.interop.score import check_head
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer

OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq")


@dataclass(frozen=True)
class Foreign:
    """config : as config.json would say it.  tensors : by transformers' names.  generation : generation_config.json.

    save_tokenizer : writes tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja into a folder.
    notes : what came along otherwise than it was, in words for the user.
    """

    source: str
    config: dict
    tensors: dict[str, Lazy]
    save_tokenizer: Callable[[Path], None]
    generation: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How a model's tensors become ours: which of theirs, after cleaning, each rule takes."""

    cfg: ModelConfig
    rules: list[Rule]
    theirs: dict[str, Lazy]

    def ours(self) -> dict[str, Lazy]:
        """Names, shapes and dtypes that `parts` will yield, in its order."""
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in LM(self.cfg).state_dict().items()}
        nothing = lambda: torch.empty(0)
        return {
            name: Lazy(shapes[name], self.theirs[rule.theirs[0]].dtype, nothing) for rule in self.rules for name in rule.ours
        }

    def parts(self) -> Iterator[list[Tensor]]:
        """Our tensors, one rule after the other."""
        for rule in self.rules:
            yield list(rule.unpack([self.theirs[name].load() for name in rule.theirs]))


def plan(tensors: Mapping[str, Lazy], cfg: ModelConfig, model_type: str | None = None, source: str = "weights") -> Plan:
    """Raises ValueError listing tensors that are missing, too many or mis-shaped, or a head that is tied but differs.

    Buffers of old files (causal masks, inverse frequencies) are passed over.
    """
    rules = rules_of(cfg, model_type)
    tensors = page_of(cfg, model_type).clean({name: t for name, t in tensors.items() if not name.endswith(OLD_BUFFERS)}, cfg)
    if cfg.score_head:
        check_head(tensors, source)
    elif cfg.tie_embeddings:
        embedding = rules[0].theirs[0]
        head = tensors.pop("lm_head.weight", None)
        if head is not None and embedding in tensors and not torch.equal(head.load(), tensors[embedding].load()):
            raise ValueError(f"{source}: lm_head.weight differs from {embedding}, but the embeddings are tied")
    with torch.device("meta"):
        state = LM(cfg).state_dict()
        expected = {n: t for rule in rules for n, t in zip(rule.theirs, rule.pack([state[n] for n in rule.ours]), strict=True)}
    check_names(expected, tensors, source)
    wrong = [
        f"{n} is {tensors[n].shape}, expected {tuple(e.shape)}" for n, e in expected.items() if tensors[n].shape != tuple(e.shape)
    ]
    if wrong:
        raise ValueError(f"{source}: tensors do not fit the configuration: {some(wrong)}")
    return Plan(cfg, rules, tensors)


def check_names(expected, found, what: str) -> None:
    missing, extra = [n for n in expected if n not in found], sorted(set(found) - set(expected))
    if missing or extra:
        raise ValueError(f"{what}: missing {some(missing)}, unexpected {some(extra)}")


def some(items: list[str], most: int = 12) -> str:
    return "; ".join(items[:most]) + (f" ... ({len(items)} in all)" if len(items) > most else "") or "nothing"


def import_model(found: Foreign, out: Path, overwrite: bool = False) -> ModelConfig:
    """Write a checkpoint that every verb opens, whole or not at all.

    Raises ValueError before anything is written: an unsupported setting, tensors that do not fit, a tokenizer with more
    entries than the model.
    """
    cfg = from_hf_config(found.config)
    made = plan(found.tensors, cfg, found.config["model_type"], found.source)
    with new_folder(out, overwrite) as part:
        (part / "tokenizer").mkdir()
        found.save_tokenizer(part / "tokenizer")
        tokenizer = Tokenizer.load(part / "tokenizer")
        if tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(
                f"{found.source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {cfg.vocab_size}: it is another model's"
            )
        _stop_as_there(found, tokenizer, part / "tokenizer" / "tokenizer_config.json")
        write_tensors(made.ours(), made.parts(), part / "model")
        _json(part / "config.json", {"format": 1, "model": to_dict(cfg)})
        if found.generation:
            _json(part / "generation_config.json", found.generation)
        manifest = {"format": 1, "step": 0, "tokens": 0, "parent": None, "metrics": {}, "source": found.source}
        _json(part / "manifest.json", manifest | {"sha256": hashes(part)})
    return cfg


def _stop_as_there(found: Foreign, tokenizer: Tokenizer, config: Path) -> None:
    """Where its generation settings name further tokens that end an answer (as GLM's <|user|>), ours stops at them too."""
    said = found.generation.get("eos_token_id")
    ids = [said] if isinstance(said, int) else said or []
    if beyond := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise ValueError(f"{found.source}: eos_token_id {beyond[0]} of its generation settings is no token: there are {tokenizer.vocab_size}")
    if more := [tokenizer.library.id_to_token(i) for i in ids if i not in tokenizer.stop_ids]:
        _json(config, read_json(config) | {"stop_tokens": [*tokenizer.roles.stops, *more]})


def _json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
