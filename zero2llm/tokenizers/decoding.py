"""Text from ids, whole and piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable
from functools import cached_property

from tokenizers import Tokenizer as Library

from zero2llm.tokenizers.nature import BYTES, Nature, spelled


class Decoder:
    """A vocabulary from the side of ids. ``named``: ids that stand for a name (control and added tokens)."""

    def __init__(self, library: Library, nature: Nature, size: int, named: Container[int]):
        self.library, self.nature, self.size, self.named = library, nature, size, named

    @cached_property
    def pieces(self) -> list[bytes]:
        return spelled(self.library, self.size, self.nature, self.named)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.size:
            raise ValueError(f"token id {token} is outside the vocabulary 0 .. {self.size - 1}")
        return self.pieces[token]

    def single_bytes(self) -> dict[bytes, int]:
        """The token of every single byte. Raises ValueError if the vocabulary has no bytes."""
        found = {piece: i for i, piece in enumerate(self.pieces) if len(piece) == 1 and i not in self.named}
        if self.nature.form == "blanks":  # there a letter has two tokens, its own and its byte's
            found |= {bytes([b]): self.library.token_to_id(name) for b, name in enumerate(BYTES)}
        if self.nature.form == "text" or len(found) < 256:
            raise ValueError(f"the tokenizer cannot spell bytes: {self.nature.loss}")
        return found

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self.nature.form == "text":
            raise ValueError(f"the tokenizer cannot spell bytes: {self.nature.loss}")
        whole = b"".join(map(self.token_bytes, ids))
        return whole.removeprefix(b" ") if self.nature.drops_blank else whole

    def decode(self, ids: list[int]) -> str:
        """Without bytes the library's decoder puts blanks between words, and control tokens are words like others."""
        if self.nature.form != "text":
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        for i in ids:
            self.token_bytes(i)  # refuses an id outside the vocabulary
        return self.library.decode(ids, skip_special_tokens=False)


class StreamDecoder:
    """Text piece by piece: never half a character. All pieces together equal `Decoder.decode`."""

    def __init__(self, decoder: Decoder, begins: bool = True):
        self.decoder = decoder
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.began = not (begins and decoder.nature.drops_blank)  # the blank that was put before the text is not part of it
        self.ids: list[int] = []  # so far, and what was said of them, where only whole texts can be decoded
        self.said = ""

    def push(self, token: int) -> str:
        """What became certain with this token; empty while a character is incomplete."""
        piece = self.decoder.token_bytes(token)
        if self.decoder.nature.form == "text":
            self.ids.append(token)
            whole = self.decoder.decode(self.ids)
            return self._more(whole) if whole.startswith(self.said) else ""
        if piece and not self.began:
            piece, self.began = piece.removeprefix(b" "), True
        return self.utf8.decode(piece)

    def flush(self) -> str:
        """The end: an incomplete character becomes U+FFFD."""
        if self.decoder.nature.form == "text":
            return self._more(self.decoder.decode(self.ids))
        return self.utf8.decode(b"", final=True)

    def _more(self, whole: str) -> str:
        new, self.said = whole[len(self.said) :], whole
        return new
