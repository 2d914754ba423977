"""Control tokens: strings that no text can spell. In ours they come first, so their ids do not move with the vocabulary size."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

DOCUMENT = "<|endoftext|>"  # starts and ends a document
PAD = "<|pad|>"  # never the end token: a masked end would never be learned
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIALS = (DOCUMENT, PAD, TURN_START, TURN_END)

ENDS = (DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "[SEP]")  # of a document, the likeliest first
STARTS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")
PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>", "[UNK]", "<|unk|>")
TURN_ENDS = (TURN_END, "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")  # generation stops there too


@dataclass(frozen=True)
class Roles:
    """Which token does what, by name. ``bos`` starts a document, ``eos`` ends it; where a vocabulary has no token for the
    start, the end's serves, as in ours. Padding is known by its place, never by its id, so ``pad`` may be any token."""

    eos: str
    pad: str
    bos: str
    stops: tuple[str, ...]


OWN = Roles(DOCUMENT, PAD, DOCUMENT, (DOCUMENT, TURN_END))


def guess_roles(names: Sequence[str], said: Mapping[str, str]) -> Roles:
    """Roles from what a file says (any of eos, pad, bos) and, for the rest, from names that tokenizers usually have.

    Raises ValueError if nothing says which token ends a document.
    """
    for role, name in said.items():
        if name not in names:
            raise ValueError(f"the {role} token {name!r} is not in the vocabulary")
    eos = said.get("eos") or _first(ENDS, names)
    if eos is None:
        raise ValueError(f"no token is known to end a document; name it (tokenizer convert --eos, in Python eos=), for example one of: {', '.join(names[:8]) or 'none'}")
    pad = said.get("pad") or _first(PADS, names) or eos
    ends = [name for name in (*ENDS, *TURN_ENDS) if name in names and name not in ("[SEP]", pad)]
    return Roles(eos, pad, said.get("bos") or _first(STARTS, names) or eos, tuple(dict.fromkeys([eos, *ends])))


def _first(wanted: Sequence[str], names: Container[str]) -> str | None:
    return next((name for name in wanted if name in names), None)
