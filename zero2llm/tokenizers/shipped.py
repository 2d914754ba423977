"""The chat templates that come with zero2llm, each written from its published format.

Source: minimind's tokenizer_config.json of each generation; "Llama 2: Open Foundation and Fine-Tuned Chat Models"
(arXiv:2307.09288) and Meta's model cards of Llama 2 and 3; the Gemma formatting guide; Qwen's "Key Concepts" (ChatML)
and function calling guide; the cards of SmolLM2 and Qwen 3. Others (Llama 3.1, Mistral, SmolLM3, DeepSeek, gpt-oss ...)
are read from the tokenizer folder they come in: foreign.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from zero2llm.tokenizers.chat import chatml
from zero2llm.tokenizers.tokenizer import Tokenizer

MARK = re.compile(r"<\|[\w ]+\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")  # how control tokens are usually written


@dataclass(frozen=True)
class Shipped:
    """controls : strings that must be control tokens of the tokenizer.  end : the one that ends an answer.
    holds : what it has a place for beside user and assistant: system, tools, thinking."""

    controls: tuple[str, ...]
    end: str
    holds: tuple[str, ...]
    about: str


_IM = ("<|im_start|>", "<|im_end|>")
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_ALL = ("system", "tools", "thinking")
SHIPPED = {
    "chatml": Shipped(_IM, "<|im_end|>", _ALL, "the default: ChatML; tools and thoughts are text like any other"),
    "minimind-v1": Shipped(("<s>", "</s>"), "</s>", ("system",), "minimind of 2024: <s>role ... </s>"),
    "minimind-v2": Shipped(
        _IM, "<|im_end|>", ("system",), "minimind of early 2025: ChatML, a system turn always first"
    ),
    "minimind-v3": Shipped(
        (*_IM, *_MARKS, "<tool_response>", "</tool_response>"),
        "<|im_end|>",
        _ALL,
        "minimind from late 2025: a thinking block before every answer",
    ),  # fmt: skip
    "roleless": Shipped((*_IM, "<|endoftext|>"), "<|endoftext|>", (), "question, answer, no roles"),
    "llama-2": Shipped(("<s>", "</s>"), "</s>", ("system",), "[INST] question [/INST] answer"),
    "llama-3": Shipped(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        ("system",),
        "a header with the role, text, <|eot_id|>",
    ),  # fmt: skip
    "qwen2.5": Shipped((*_IM, *_MARKS[2:]), "<|im_end|>", ("system", "tools"), "ChatML with tools"),
    "qwen3": Shipped((*_IM, *_MARKS), "<|im_end|>", _ALL, "ChatML with tools; thoughts of the last answers only"),
    "gemma": Shipped(("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ("system",), "Gemma 1 to 3"),
    "smollm2": Shipped(_IM, "<|im_end|>", ("system",), "ChatML, a system turn always first"),
}


def shipped(name: str) -> str:
    """The template of that name. Raises ValueError naming those that exist."""
    if name not in SHIPPED:
        raise ValueError(f"there is no chat template {name!r}; there are: {', '.join(SHIPPED)}")
    if name == "chatml":
        return chatml()
    return (resources.files("zero2llm") / "tokenizers" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def check_controls(name: str, has: frozenset[str]) -> None:
    """Raises ValueError if a tokenizer with the control tokens ``has`` cannot write the template's control strings."""
    if missing := [c for c in SHIPPED[name].controls if c not in has]:
        raise ValueError(
            f"the chat template {name!r} needs the control tokens {', '.join(missing)}, which this tokenizer lacks; "
            "add them to the tokenizer or choose another template"
        )


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with another chat template: one of `SHIPPED` by name, or a .jinja file. Its end of turn stops generation.

    Raises ValueError if there is none, or it writes control tokens that the tokenizer lacks: they would become plain text.
    """
    controls, stops = frozenset(tokenizer.specials), tokenizer.roles.stops
    if template in SHIPPED:
        check_controls(template, controls)
        text, stops = shipped(template), tuple(dict.fromkeys([*stops, SHIPPED[template].end]))
    elif Path(template).is_file():
        text = Path(template).read_text(encoding="utf-8")
        if missing := sorted(set(MARK.findall(text)) - controls):
            raise ValueError(f"{template} writes {', '.join(missing)}, which this tokenizer does not have as control tokens; add them first")
    else:
        raise ValueError(f"chat template {template!r} is no file and none of: {', '.join(SHIPPED)}")
    return Tokenizer(tokenizer.library, text, replace(tokenizer.roles, stops=stops))
