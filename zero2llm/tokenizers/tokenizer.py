"""The one tokenizer object that training, chat, evaluation and export share."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Library

from zero2llm.tokenizers.bpe import BPE
from zero2llm.tokenizers.bytes import readable
from zero2llm.tokenizers.chat import Message, Style, chatml, render_spans, render_text
from zero2llm.tokenizers.decoding import Decoder, StreamDecoder
from zero2llm.tokenizers.engines import Tiktoken, tiktoken_engine
from zero2llm.tokenizers.exports import write_folder
from zero2llm.tokenizers.fast import is_own, merges_of, with_tokens
from zero2llm.tokenizers.imports.read import read
from zero2llm.tokenizers.nature import core_of, examine
from zero2llm.tokenizers.special import OWN, SPECIALS, TURN_END, TURN_START, Roles
from zero2llm.tokenizers.starts import text_start
from zero2llm.tokenizers.training import learn

ENOUGH = 40  # characters for each token of the vocabulary: from so much text on, making a faster engine pays
BROKEN = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as Python's surrogateescape shows them


class Tokenizer:
    """A vocabulary with control tokens and a chat template. Ours are byte-level BPE: any text comes back unchanged.

    bos_id starts a document, eos_id ends it (in ours one token does both); generation stops at any of ``stop_ids``.
    ``nature`` says what an imported one is made of, ``loss`` why a text may not come back ("" = every text does).
    """

    def __init__(self, library: Library, template: str, roles: Roles = OWN):
        self.library, self.template, self.roles = library, template, roles
        self.library.encode_special_tokens = True  # what a user types is text, even if it spells a control token
        needed = SPECIALS if roles == OWN else (roles.eos, roles.pad, roles.bos, *roles.stops)
        if missing := ", ".join(s for s in needed if library.token_to_id(s) is None):
            raise ValueError(f"the tokenizer lacks the control tokens {missing}")
        self.eos_id, self.pad_id, self.bos_id = map(library.token_to_id, (roles.eos, roles.pad, roles.bos))
        self.im_start_id, self.im_end_id = library.token_to_id(TURN_START), library.token_to_id(TURN_END)
        self.stop_ids = frozenset(map(library.token_to_id, roles.stops))
        self.added = library.get_added_tokens_decoder()
        control = {i for i, token in self.added.items() if token.special} | {self.eos_id, self.pad_id, self.bos_id, *self.stop_ids}
        self.special_ids, self.specials = frozenset(control), tuple(library.id_to_token(i) for i in sorted(control))
        self.vocab_size = 1 + max(library.get_vocab().values())
        data = json.loads(library.to_str())
        self.nature, core = examine(data)
        self.core = library if core is None else core_of(core)
        self.core.encode_special_tokens = True
        self.decoder = Decoder(library, self.nature, self.vocab_size, self.special_ids | self.added.keys())
        self.own, self._asked, self._fast = is_own(library, self.nature), 0, None
        self.start_ids = [self.bos_id] if self.own else text_start(library)  # what a prompt begins with

    @staticmethod
    def train(
        texts: Iterable[str],
        vocab_size: int,
        split: str = "qwen2",
        engine: str = "handwritten",
        progress: Callable[[int, int], None] | None = None,
        kind: str = "bpe",
    ) -> Tokenizer:
        """Learn a vocabulary of ``vocab_size`` entries, control tokens and the 256 bytes included.

        ``kind`` and ``engine`` as in training.py. Raises ValueError if that is too few, or the text too small to yield so many.
        """
        return Tokenizer(learn(texts, vocab_size, kind, split, engine, progress), chatml())

    @staticmethod
    def load(path: str | Path, split: str | None = None, eos: str | None = None) -> Tokenizer:
        """From a folder or file of any format in imports/: tokenizer.json, SentencePiece's .model, tiktoken ranks, GPT-2's.

        ``split``: the split rule of ranks, where the file's name does not tell. ``eos``: the token that ends a document,
        where the files do not say. Raises ValueError if it cannot be read.
        """
        found = read(Path(path), split, eos)
        template = found.template
        if template is None:  # ChatML, wherever its control tokens exist
            template = chatml() if {TURN_START, TURN_END} <= set(found.library.get_vocab()) else ""
        try:
            return Tokenizer(found.library, template, found.roles)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja: transformers opens the folder as it is."""
        write_folder(Path(folder), self.library, self.template, self.roles)

    def __reduce__(self):
        """A copy in another process is built anew."""
        return _rebuild, (self.library.to_str(), self.template, self.roles)

    @cached_property
    def engine(self) -> Tiktoken | str:
        """The faster engine, or why there is none. Making it takes some 20 µs for each token, to check that ids are the same."""
        if self.nature.form != "bytes":
            return f"its pieces are {self.nature.form}, not bytes"
        return tiktoken_engine(self.library, json.loads(self.library.to_str()), self.nature.split)

    def encode(self, text: str) -> list[int]:
        """Token ids. Control strings in ``text`` are text like any other. Raises ValueError for half a surrogate pair."""
        return self._encode(_checked(text), True)

    def _encode(self, text: str, start: bool) -> list[int]:
        if self._fast or self._pays(len(text)):
            return self._fast.encode(text)
        return self.core.encode(self.nature.prepared(text, start), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, on all cores."""
        texts = list(map(_checked, texts))
        if self._fast or self._pays(sum(map(len, texts))):
            return self._fast.encode_batch(texts)
        prepared = list(map(self.nature.prepared, texts))
        return [e.ids for e in self.core.encode_batch_fast(prepared, add_special_tokens=False)]

    def _pays(self, n: int) -> bool:
        """Whether, with ``n`` more characters to encode, a faster engine pays; then it is there."""
        self._asked += n
        if self._asked > ENOUGH * self.vocab_size and isinstance(self.engine, Tiktoken):
            self._fast = self.engine
        return self._fast is not None

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of bytes of any kind: stretches of UTF-8 as text, the rest byte by byte. `decode_bytes` gives them back.

        Raises ValueError if the vocabulary has no bytes.
        """
        single, ids = self.decoder.single_bytes(), []
        for part in filter(None, BROKEN.split(data.decode("utf-8", errors="surrogateescape"))):
            raw = part.encode("utf-8", errors="surrogateescape")
            more = [] if BROKEN.match(part) else self._encode(part, not ids)
            if self.decode_bytes([*ids[:1], *more]) != self.decode_bytes(ids[:1]) + raw:  # broken, or it would be normalised
                raw = b" " + raw if not ids and self.nature.drops_blank and raw.startswith(b" ") else raw  # decoding takes one
                more = [single[raw[i : i + 1]] for i in range(len(raw))]
            ids += more
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that form no character become U+FFFD. Raises ValueError for an id outside the vocabulary."""
        return self.decoder.decode([i for i in map(int, ids) if not (skip_special and i in self.special_ids)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for. Raises ValueError if the vocabulary has no bytes, or an id is outside of it."""
        return self.decoder.decode_bytes(ids)

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of every token; of a control token, and where the vocabulary has no bytes, its name."""
        return self.decoder.pieces

    def token_bytes(self, token: int) -> bytes:
        return self.decoder.token_bytes(token)

    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, 0 for control tokens: what bits per byte divides by. Where a blank is put
        before a text (``nature.drops_blank``), a document counts that one byte more. Raises ValueError without bytes."""
        if self.nature.form == "text":
            raise ValueError(f"bits per byte is not defined for this tokenizer: {self.loss}")
        return [0 if i in self.special_ids else len(piece) for i, piece in enumerate(self.pieces)]

    def show(self, token: int) -> str:
        """A token as a person reads it."""
        return readable(self.token_bytes(token))

    def stream(self, begins: bool = True) -> StreamDecoder:
        """``begins``: a text begins here, behind a control token or nothing; otherwise one goes on."""
        return StreamDecoder(self.decoder, begins)

    @property
    def split(self) -> str | None:
        """Name of the split rule, None if the file's is none of ours."""
        return self.nature.split

    @property
    def loss(self) -> str:
        """Why a text may not come back as it was; empty if every text does."""
        return self.nature.loss

    def handwritten(self) -> BPE:
        """The same vocabulary on the handwritten encoder. Raises ValueError if it is no byte-level BPE of ours."""
        if self.split is None or not self.own or len(self.added) > len(SPECIALS):
            raise ValueError("the handwritten encoder follows byte-level BPE of ours with a split rule of ours and no added tokens")
        return BPE(merges_of(self.library), self.split, first_id=len(SPECIALS))

    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges and split rule: what token files are checked against."""
        data = json.loads(self.library.to_str())
        if isinstance(scores := data["model"]["vocab"], list):  # the library does not read back the last digit that it wrote
            data["model"]["vocab"] = [[piece, f"{score:.5g}"] for piece, score in scores]
        about = [asdict(self.roles), [data[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")]]
        if self.own:
            more = [self.library.id_to_token(i) for i in sorted(self.added)][len(SPECIALS) :]
            merges = [[a.hex(), b.hex()] for a, b in merges_of(self.library)]
            about = [SPECIALS, merges, self.split or data["pre_tokenizer"], *([more] if more else [])]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def add_tokens(self, names: Sequence[str], special: bool = False) -> Tokenizer:
        """A tokenizer with more tokens at the end of the vocabulary; all ids so far stay.

        ``special``: control tokens, which no text can spell; otherwise they are found in text. Raises ValueError if one is
        empty, given twice or there already.
        """
        return Tokenizer(with_tokens(self.library, names, special, set(self.pieces)), self.template, self.roles)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[dict] | None = None,
               style: Style | None = None) -> tuple[list[int], list[int]]:  # fmt: skip
        """A conversation's token ids and loss mask: 1 on what the assistant says and its end of turn.

        ``tools`` and ``style`` as in chat.py. Raises ValueError naming the message that is malformed.
        """
        asked = {"add_generation_prompt": add_generation_prompt, "tools": tools, "style": self._style(style)}
        spans, ids, mask = render_spans(self.template, messages, self.specials, **asked), [], []
        for i, span in enumerate(spans):
            start = i == 0 or (spans[i - 1].special and self.nature.each)  # where SentencePiece puts a blank in front
            part = [self.library.token_to_id(span.text)] if span.special else self._encode(_checked(span.text), start)
            ids += part
            mask += [int(span.trained)] * len(part)
        return ids, mask

    def render_text(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[dict] | None = None,
                    style: Style | None = None) -> str:  # fmt: skip
        asked = {"add_generation_prompt": add_generation_prompt, "tools": tools, "style": self._style(style)}
        return render_text(self.template, messages, **asked)

    def _style(self, style: Style | None) -> Style:
        """With the names of control tokens, which templates may write."""
        if not self.template:
            raise ValueError("the tokenizer has no chat template; put a chat_template.jinja beside tokenizer.json")
        style, roles = style or Style(), self.roles
        names = {"bos_token": roles.bos, "eos_token": roles.eos, "pad_token": roles.pad}
        return replace(style, names=names | dict(style.names))


def _rebuild(data: str, template: str, roles: Roles) -> Tokenizer:
    return Tokenizer(Library.from_str(data), template, roles)


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half a surrogate pair at character {error.start}: {text[error.start]!r}") from None
    return text
