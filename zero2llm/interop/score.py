"""A reward model as transformers' classifier with one label, and back; a critic, which stays behind.

    theirs   logits[b] = W h[b, last]          W (1, D), no bias; last = the rightmost token that is not pad_token_id
    ours     score[b] = w . h[b, last] + bias           w (D,); last = the last real token

Source: transformers 5, GenericForSequenceClassification in modeling_layers.py, and GPT2ForSequenceClassification.
Why pad_token_id matters: they look at ids, not at the attention mask. Where the padding token also ends a text, the score
would be read one token early; then another control token pads. The bias has no place there: it moves all scores alike, so
no comparison of two changes. Neither has the vocabulary's head. problem_type regression: servers give the score as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from zero2llm.core.lazy import Lazy
from zero2llm.interop.hf_names import Rule
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer

ENDING = "ForSequenceClassification"
NAMES = {"gpt2": "GPT2" + ENDING, "gemma3_text": "Gemma3Text" + ENDING}  # elsewhere as the language model's
WITHOUT = ("mamba", "mamba2", "kimi_linear")
HEAD = "score.weight"


def trunk(cfg: ModelConfig) -> ModelConfig:
    """The model without its heads: a tied one has no weight."""
    return dataclasses.replace(cfg, score_head=False, tie_embeddings=True)


def as_language_model(model: LM) -> str | None:
    """Take a critic off. What was left out, in words for the user; None if there was nothing."""
    if model.score is None:
        return None
    model.score, model.cfg = None, dataclasses.replace(model.cfg, score_head=False)
    return f"left out: the score head ({model.cfg.d_model + 1} values), which only training needed"


def class_of(model_type: str, architecture: str) -> str:
    """Raises ValueError for a family that transformers has no such class of."""
    if model_type in WITHOUT:
        raise ValueError(f"no export of this reward model: transformers has no {architecture.removesuffix('ForCausalLM')}{ENDING}")
    return NAMES.get(model_type, architecture.replace("ForCausalLM", ENDING))


def head_rule() -> Rule:
    return Rule(
        (HEAD,), (HEAD, "score.bias"), lambda parts: [parts[0][None].contiguous()], lambda whole: [whole[0][0].contiguous(), whole[0].new_zeros(1)]
    )  # fmt: skip


def score_keys(model_type: str, architecture: str) -> dict:
    """What config.json says of the head."""
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    return {"architectures": [class_of(model_type, architecture)]} | labels


def is_classifier(config: dict) -> bool:
    return any(name.endswith(ENDING) for name in config.get("architectures") or ())


def check_head(tensors: Mapping[str, Lazy], source: str) -> None:
    """Raises ValueError for a classifier that is no reward model."""
    if HEAD not in tensors:
        raise ValueError(f"{source}: a classifier without {HEAD}; the head of a reward model is called so")
    if "score.bias" in tensors:
        raise ValueError(f"{source}: score.bias: transformers' decoders have none; a head with a bias is not supported")
    if (labels := tensors[HEAD].shape[0]) != 1:
        raise ValueError(f"{source}: {labels} labels; a reward model has one (num_labels = 1), and classifiers are not supported")


def padding(tokenizer: Tokenizer) -> int:
    """The token that pads texts to be scored: its own, unless a text can end with it. Raises ValueError if none can."""
    ends = set(tokenizer.stop_ids)
    if tokenizer.template:
        ends.add(tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0][-1])
    free = [i for i in (tokenizer.pad_id, tokenizer.bos_id, *sorted(tokenizer.special_ids)) if i is not None and i not in ends]
    if not free:
        raise ValueError("no export of this reward model: each control token of its tokenizer can end a text, and none is left to pad with")
    return free[0]


def score_notes(state: Mapping[str, Tensor], cfg: ModelConfig, tokenizer_dir: Path) -> list[str]:
    """What a reward model's export holds otherwise than the model, in words for the user."""
    notes, own = [], Tokenizer.load(tokenizer_dir)
    if bias := float(state["score.bias"]):
        notes.append(f"left out: the bias {bias:g} of the score head, which has no place there: their score + bias = ours, and no comparison changes")
    if not cfg.tie_embeddings:
        notes.append("left out: the vocabulary's head, which a classifier has no place for")
    if (pad := padding(own)) != own.pad_id:
        name = own.library.id_to_token
        notes.append(f"padding is {name(pad)!r}, not {name(own.pad_id)!r}: texts end with that, and transformers scores the last token that is no padding")
    return notes
