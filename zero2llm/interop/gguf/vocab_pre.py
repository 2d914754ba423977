"""How a byte-level vocabulary cuts text, under the name that a GGUF file gives the rule.

    tokenizer.ggml.pre = "llama-bpe"  <->  the pre_tokenizer of tokenizer.json: one cut after the other, each piece of text cut again

Source: the names are llama.cpp's (llama-vocab.cpp, llm_tokenizer_bpe), the rules those of the tokenizers that they were made
for: openai/gpt-2, SmolLM2, Llama 3, Qwen2, DeepSeek, Mistral's Tekken, OpenAI's o200k.
Why: a GGUF file stores a name where tokenizer.json stores the rule. Another rule gives other tokens, with no sign of it but
worse answers, so a name or a rule that does not stand here is an error.

    cuts    regular expressions; every match becomes a piece, and so does what stands between two matches
    whole   a piece that is a token as it stands is taken without merging (`ignore_merges`)
    bos     llama.cpp puts the start token before a text unless the file says otherwise
    near    where llama.cpp's own form of the rule cuts otherwise; the tokenizer read from a file follows the model's rule
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from zero2llm.tokenizers.bytes import SPLITS
from zero2llm.tokenizers.imports.ranks import O200K
from zero2llm.tokenizers.nature import steps

GPT2, LLAMA3, QWEN2 = SPLITS["gpt2"], SPLITS["llama3"], SPLITS["qwen2"]
DIGIT, NUMBER = r"\p{N}", r"\p{N}+"
SPELLED_OUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's rule as others write it

_LOW, _UP = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SEED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The letters that have a case, as DeepSeek LLM lists them.
CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\u0386Έ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3"
    "ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
EASTERN = "[一-龥ࠀ-一가-\ud7ff]+"
DEEPSEEK = (r"[\r\n]", rf"\s?[{CASED}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", EASTERN)
COARSE = "llama.cpp takes letters beyond A-Z for both cases and cuts at combining marks: such words may get other tokens there"
SPACES = "llama.cpp cuts otherwise at rare blanks (U+2003, U+3000)"


@dataclass(frozen=True)
class Rule:
    cuts: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    near: str = ""


def _rules() -> dict[str, Rule]:
    """The usual name of a rule first."""
    out: dict[str, Rule] = {}
    for names, rule in (
        ("gpt-2 phi-2 mpt olmo jais trillion exaone4 a.x-4.0 mellum gigachat granite-docling", Rule((GPT2,))),
        ("smollm starcoder refact command-r codeshell exaone minerva-7b", Rule((DIGIT, GPT2))),
        ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", Rule((LLAMA3,), whole=True, bos=True)),
        ("smaug-bpe dbrx chatglm-bpe glm4", Rule((LLAMA3,))),
        ("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan", Rule((QWEN2,))),
        ("qwen35", Rule((MARKS,))),
        ("gpt-4o llama4", Rule((O200K,), near=COARSE)),
        ("tekken", Rule((TEKKEN,), whole=True, bos=True, near=COARSE)),
        ("deepseek-llm", Rule((*DEEPSEEK, NUMBER), near=SPACES)),
        ("deepseek-coder", Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EASTERN, DIGIT), near=SPACES)),
        ("deepseek-v3", Rule((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3))),
        ("seed-coder", Rule((SEED,))),
        ("default", Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, NUMBER, "[0-9][0-9][0-9]"))),
    ):
        out |= dict.fromkeys(names.split(), rule)
    return out


RULES = _rules()


def rule_of(name: str | None) -> Rule:
    """Raises ValueError for a name that does not stand here."""
    if name in RULES:
        return RULES[name]
    what = f"names the split rule {name!r} (tokenizer.ggml.pre)" if name else "does not name its split rule (tokenizer.ggml.pre)"
    raise ValueError(f"the file {what}; without it text would become other tokens. Known are: {', '.join(RULES)}")


def splitter_of(rule: Rule) -> pre_tokenizers.PreTokenizer:
    """The rule as the tokenizers library has it, in the form that the models' own files have."""
    *first, last = rule.cuts
    parts = [_cut(r) for r in (first if last == GPT2 else rule.cuts)]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == GPT2))
    return pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]


def _cut(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule in (DIGIT, NUMBER):
        return pre_tokenizers.Digits(individual_digits=rule == DIGIT)
    return pre_tokenizers.Split(Regex(rule), "isolated")


def cuts_of(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions of a pre_tokenizer, one after the other. Raises ValueError naming a step that is no such cut."""
    cuts, parts = [], steps(pre_tokenizer, "pretokenizers")
    for i, step in enumerate(parts):
        match step:
            case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
                cuts.append(GPT2 if rule == SPELLED_OUT else rule)
            case {"type": "Digits", "individual_digits": single}:
                cuts.append(DIGIT if single else NUMBER)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": own} if i == len(parts) - 1:
                return (*cuts, GPT2) if own else tuple(cuts)
            case _:
                raise ValueError(f"GGUF has no name for the step {step['type']} of its pre_tokenizer ({step})")
    raise ValueError("its pre_tokenizer does not end with ByteLevel, as GGUF's byte-level vocabularies do")


def names_of(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The names of exactly this rule, the usual one first. Raises ValueError if there is none."""
    cuts = cuts_of(pre_tokenizer)
    if found := [name for name, rule in RULES.items() if rule.cuts == cuts]:
        return found
    rule = " then ".join(cuts) or "none"
    raise ValueError(f"its split rule has no name in GGUF, and under another name text would become other tokens: {rule}")
