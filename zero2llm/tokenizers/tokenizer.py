"""The one tokenizer object that training, chat, evaluation and export share."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer as Library

from zero2llm.tokenizers.bpe import BPE, train_bpe
from zero2llm.tokenizers.bytes import alphabet, from_chars, readable
from zero2llm.tokenizers.chat import Message, chatml, render_spans, render_text
from zero2llm.tokenizers.fast import assemble, merges_of, split_of, train_library
from zero2llm.tokenizers.special import DOCUMENT, PAD, SPECIALS, TURN_END, TURN_START


class Tokenizer:
    """Byte-level BPE with control tokens and a chat template; any text goes in and comes out unchanged.

    eos_id starts and ends documents; pad_id never equals it; generation stops at any of ``stop_ids``.
    """

    def __init__(self, library: Library, template: str):
        self.library, self.template = library, template
        self.library.encode_special_tokens = True  # what a user types is text, even if it spells a control token
        missing = [s for s in SPECIALS if library.token_to_id(s) is None]
        if missing:
            raise ValueError(f"the tokenizer lacks the control tokens {', '.join(missing)}")
        self.eos_id, self.pad_id = library.token_to_id(DOCUMENT), library.token_to_id(PAD)
        self.im_start_id, self.im_end_id = library.token_to_id(TURN_START), library.token_to_id(TURN_END)
        self.vocab_size = library.get_vocab_size()
        merged = len(SPECIALS) + len({*alphabet(), *(a + b for a, b in merges_of(library))})
        if set(library.get_vocab().values()) != set(range(self.vocab_size)) or merged != self.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} entries, but control tokens, bytes and merges make {merged}, or its "
                "ids have a hole: the file is damaged"
            )
        self.special_ids = frozenset(library.token_to_id(s) for s in SPECIALS)
        self.stop_ids = frozenset({self.eos_id, self.im_end_id})

    @staticmethod
    def train(
        texts: Iterable[str],
        vocab_size: int,
        split: str = "qwen2",
        engine: Literal["handwritten", "library"] = "handwritten",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tokenizer:
        """Learn a vocabulary of ``vocab_size`` entries, control tokens and the 256 bytes included.

        Raises ValueError if that is too few, or the text too small to yield so many.
        """
        n_merges = vocab_size - len(SPECIALS) - 256
        if n_merges < 0:
            raise ValueError(
                f"vocab_size = {vocab_size} must be at least {len(SPECIALS) + 256}: control tokens and bytes"
            )
        if engine == "library":
            merges = train_library(texts, vocab_size, split)
        elif engine == "handwritten":
            merges = train_bpe(texts, n_merges, split, progress)
        else:
            raise ValueError(f"tokenizer engine {engine!r} is unknown; use handwritten or library")
        tokenizer = Tokenizer(assemble(merges, split), chatml())
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"the text yields a vocabulary of {tokenizer.vocab_size}, not {vocab_size}: give more text or ask for less"
            )
        return tokenizer

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """From a folder, or a tokenizer.json (then the chat template beside it). Raises ValueError if it cannot be read."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        template = file.with_name("chat_template.jinja")
        try:
            library = Library.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file}: cannot be read as a tokenizer ({error})") from error
        return Tokenizer(library, template.read_text(encoding="utf-8") if template.is_file() else chatml())

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja: transformers opens the folder as it is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.library.to_str(pretty=True), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": DOCUMENT,
            "eos_token": DOCUMENT,
            "pad_token": PAD,
            "extra_special_tokens": {},
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    def __reduce__(self):
        """A copy in another process is built anew: the library forgets that typed control strings are text."""
        return _rebuild, (self.library.to_str(), self.template)

    def encode(self, text: str) -> list[int]:
        """Token ids. Control strings in ``text`` are text like any other. Raises ValueError for half a surrogate pair."""
        return self.library.encode(_checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, on all cores."""
        return [e.ids for e in self.library.encode_batch_fast(list(map(_checked, texts)), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that form no character become U+FFFD. Raises ValueError for an id outside the vocabulary."""
        pieces = (self.token_bytes(i) for i in map(int, ids) if not (skip_special and i in self.special_ids))
        return b"".join(pieces).decode("utf-8", errors="replace")

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token; a control token's are its name."""
        names = [self.library.id_to_token(i) for i in range(self.vocab_size)]
        return [name.encode() if i in self.special_ids else from_chars(name) for i, name in enumerate(names)]

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary 0 .. {self.vocab_size - 1}")
        return self.pieces[token]

    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, 0 for control tokens: what bits per byte divides by."""
        return [0 if i in self.special_ids else len(piece) for i, piece in enumerate(self.pieces)]

    def show(self, token: int) -> str:
        """A token as a person reads it."""
        return readable(self.token_bytes(token))

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self)

    @property
    def split(self) -> str | None:
        """Name of the split rule, None if the file's is none of ours."""
        return split_of(self.library)

    def handwritten(self) -> BPE:
        """The same vocabulary on the handwritten encoder. Raises ValueError if the split rule is none of ours."""
        if self.split is None:
            raise ValueError("the tokenizer's split rule is none of ours; the handwritten encoder cannot follow it")
        return BPE(merges_of(self.library), self.split, first_id=len(SPECIALS))

    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges and split rule: what token files are checked against."""
        rule = self.split or json.loads(self.library.to_str())["pre_tokenizer"]
        merges = [[a.hex(), b.hex()] for a, b in merges_of(self.library)]
        return hashlib.sha256(json.dumps([SPECIALS, merges, rule], sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """A conversation's token ids and loss mask: 1 on what the assistant says and its end of turn.

        Raises ValueError naming the message that is malformed.
        """
        ids: list[int] = []
        mask: list[int] = []
        for span in render_spans(self.template, messages, SPECIALS, add_generation_prompt=add_generation_prompt):
            part = [self.library.token_to_id(span.text)] if span.special else self.encode(span.text)
            ids += part
            mask += [int(span.trained)] * len(part)
        return ids, mask

    def render_text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return render_text(self.template, messages, add_generation_prompt=add_generation_prompt)


def _rebuild(data: str, template: str) -> Tokenizer:
    return Tokenizer(Library.from_str(data), template)


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half a surrogate pair at character {error.start}: {text[error.start]!r}") from None
    return text


class StreamDecoder:
    """Text piece by piece: never half a character. All pieces together equal `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """What became certain with this token; empty while a character is incomplete."""
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The end: an incomplete character becomes U+FFFD."""
        return self.decoder.decode(b"", final=True)
