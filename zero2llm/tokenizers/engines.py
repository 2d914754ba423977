"""The fastest program for a vocabulary, with the same ids: tiktoken to encode, rustbpe to learn, where they can be used.

    tokenizers   any vocabulary                                                     about 4 MB of text a second and core
    tiktoken     byte-level BPE whose ids rise with its merges, and a split rule of ours   about 4 times that

tiktoken joins whichever neighbours spell the token of the lowest id; BPE joins the pair of the first merge. That is the
same if every merge makes a token of its own, ids rise in the order of merges, and every token's own bytes come back as that
token: until its pair is joined, a token's bytes inside a text are cut as they are alone. `refusal` checks just that.
rustbpe counts like the others; of equally frequent pairs it takes the one with the lowest byte values (ours: the lowest ids,
where printable bytes come first), so a few tokens differ. Both are optional: pip install 'zero2llm[fast]'.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing import parent_process
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Library
from tokenizers import models

from zero2llm.tokenizers.bytes import SPLITS, alphabet, char_to_byte, from_chars, splitter, to_chars
from zero2llm.tokenizers.ladder import Pair

if TYPE_CHECKING:
    import tiktoken

HELP = "pip install 'zero2llm[fast]'"
LONG = 500_000  # characters; its regular expressions overflow at a million blanks in a row
BLANKS = re.compile(r"\s{100000}")
# Characters that NFC leaves as they are, whatever stands beside them: Latin, general punctuation, Chinese, full-width forms.
NOT_PLAIN = re.compile("[^\u0000-\u02ff\u2010-\u2027\u3001-\u3029\u30fb\u3400-\u4dbf\u4e00-\u9fff\uff01-\uff5e]")


def cores() -> int:
    """Cores that this process may use: one if it is a worker, whose neighbours have the others."""
    if parent_process() is not None:
        return 1
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1


class Tiktoken:
    """Encode with tiktoken; text that it would treat otherwise goes to ``library``."""

    def __init__(self, library: Library, encoding: tiktoken.Encoding, nfc: bool, symbols: Sequence[str]):
        self.library, self.ordinary, self.nfc, self.symbols = library, encoding.encode_ordinary, nfc, symbols
        self.plain = -1 if nfc or symbols else LONG  # characters of a text that needs no look before it is encoded

    def encode(self, text: str) -> list[int]:
        if len(text) <= self.plain:
            return self.ordinary(text)
        if (
            (len(text) > LONG and BLANKS.search(text))
            or (self.nfc and NOT_PLAIN.search(text))
            or any(symbol in text for symbol in self.symbols)
        ):
            return self.library.encode(text, add_special_tokens=False).ids
        return self.ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all cores: each thread takes a run of texts, and the interpreter's lock is free while it encodes."""
        n = cores()
        if n == 1 or len(texts) < 2:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(n) as pool:
            return [ids for part in pool.map(lambda part: [self.encode(t) for t in part], _runs(texts, 4 * n)) for ids in part]


def _runs(texts: Sequence[str], n: int) -> list[Sequence[str]]:
    """About ``n`` runs of neighbours with about as many characters each."""
    share, begin, size, runs = sum(map(len, texts)) / n, 0, 0, []
    for i, text in enumerate(texts, 1):
        size += len(text)
        if size >= share or i == len(texts):
            runs.append(texts[begin:i])
            begin, size = i, 0
    return runs


def tiktoken_engine(library: Library, data: dict, split: str | None) -> Tiktoken | str:
    """The engine for the tokenizer.json ``data`` with the split rule ``split``, or why there is none."""
    try:
        import tiktoken
    except ImportError:
        return f"tiktoken is not installed: {HELP}"
    if reason := refusal(data, split):
        return reason
    encoding = tiktoken.Encoding("zero2llm", pat_str=SPLITS[split], mergeable_ranks=ranks_of(data), special_tokens={})
    symbols = [token["content"] for token in data["added_tokens"] if not token["special"]]
    nfc = data.get("normalizer") is not None
    text = NOT_PLAIN.sub("", probe()) if nfc else probe()
    if encoding.encode_ordinary(text) != library.encode(text, add_special_tokens=False).ids:
        return "tiktoken cuts a test text otherwise: its version knows other characters"
    return Tiktoken(library, encoding, nfc, symbols)


def made_by_merges(model: dict) -> list[int]:
    """The id that each merge makes, in the order of merges."""
    vocab = model["vocab"]
    return [vocab["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]


def ranks_of(data: dict) -> dict[bytes, int]:
    """Bytes and id of every piece that text can become: single bytes, what merges make, and with ``ignore_merges`` any."""
    model = data["model"]
    added = {token["content"] for token in data["added_tokens"]}
    bytes_, made = {to_chars(b) for b in alphabet()}, set(made_by_merges(model))
    every = model.get("ignore_merges")
    chosen = {n: i for n, i in model["vocab"].items() if n in bytes_ or i in made or (every and n not in added)}
    return {from_chars(name): i for name, i in chosen.items() if char_to_byte().keys() >= set(name)}


def refusal(data: dict, split: str | None) -> str:
    """Why tiktoken's ids could differ; empty if they cannot."""
    model, normal = data["model"], data.get("normalizer")
    if model["type"] != "BPE" or split is None:
        return f"{model['type']} with " + (f"the split rule {split}" if split else "a split rule that is none of ours")
    if normal is not None and normal["type"] != "NFC":
        return f"its normalizer {normal['type']} rewrites text"
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "dropout, or marks at word borders"
    if missing := [b for b in alphabet() if to_chars(b) not in model["vocab"]]:
        return f"{len(missing)} single bytes have no token"
    if any(a > b for a, b in pairwise(made_by_merges(model))):
        return "its ids do not rise in the order of its merges"
    return _odd_token(data)


def _odd_token(data: dict) -> str:
    """A token whose own bytes do not come back as that token. With ``ignore_merges`` both programs look a whole piece up
    first, so there such a token does no harm unless tiktoken could also build it from two parts that no merge joins."""
    model, ranks = data["model"], ranks_of(data)
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    join, known = models.BPE(vocab=model["vocab"], merges=pairs).tokenize, set(pairs)
    for token, i in ranks.items():
        if len(token) > 1 and [part.id for part in join(to_chars(token))] != [i]:
            parts = parts_of(token, ranks)
            if not model.get("ignore_merges") or (len(parts) == 2 and tuple(map(to_chars, parts)) not in known):
                return f"token {i} is never reached by its own bytes"
    return ""


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The token's bytes, joined as long as that makes tokens of a lower rank: two parts are the merge that makes it."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def merges_of_ranks(ranks: dict[bytes, int]) -> tuple[list[Pair], list[bytes]]:
    """The merge behind every token of more than one byte, in order, and the tokens that no merge makes (text becomes
    such a token only as a whole piece)."""
    merges, whole = [], []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = parts_of(token, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            whole.append(token)
    return merges, whole


def train_rustbpe(texts: Iterable[str], n_merges: int, split: str) -> list[Pair]:
    """Merges learned by rustbpe. Raises ValueError if it is not installed."""
    splitter(split)  # refuses an unknown name
    try:
        import rustbpe
    except ImportError:
        raise ValueError(f"engine rustbpe is not installed: {HELP}, or take engine library") from None
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), 256 + n_merges, pattern=SPLITS[split])
    return merges_of_ranks({bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()})[0]


def probe() -> str:
    """A text with every character of the first plane and some of the others, alone and behind letters, digits and blanks."""
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 97)]
    return "".join(map(chr, codes)) + "".join(f" a{chr(c)}1{chr(c)}\n {chr(c)}" for c in codes[::37]) + "It'S we'Ll 'ſ  \r\n\n  x"
