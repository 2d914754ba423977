"""A Kneser-Ney model of text we trust, and what perplexity it gives to documents that it has not seen.

    every document of the reference files goes to the model, but one in ten (first byte of its SHA-256 below 26): held out
    characters    0 = begins and ends a document, 1 = unknown, 2 .. = those seen at least twice, by code point

A character seen once becomes "unknown", which so gets the probability of a rare character instead of none.

*Source*: `ngram.py`. *Why*: the reference decides what passes, so it is named in the recipe. 5 MB of English
and 1 MB of Chinese at order 4 take 9 s and 0.4 GB to fit, and 30 ms to load: a fitted model is kept in one .npz file, whose name
is a hash of everything that it was made of. Scoring takes about 1.5 us a character.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zero2llm.core.files import beside, sha256
from zero2llm.data.ngram import KneserNey
from zero2llm.data.sources import documents, expand
from zero2llm.tokenizers.tokenizer import Tokenizer

FORMAT = 1
END, UNKNOWN, FIRST = 0, 1, 2
LEAST_HELD_OUT = 5


@dataclass(frozen=True)
class Scorer:
    """``characters``: (V - 2,) the known code points, rising; empty with a tokenizer. ``held_out``: (M,) perplexities, rising."""

    model: KneserNey
    characters: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer | None

    def perplexity(self, text: str) -> float:
        nats, targets = self.model.nats([self.ids(text)])
        return math.exp(nats / targets)

    def ids(self, text: str) -> np.ndarray:
        """[end] + ids + [end]."""
        text = " ".join(text.split())
        if self.tokenizer:
            end = self.tokenizer.eos_id
            return np.array([end, *self.tokenizer.encode(text), end], np.int64)
        return np.concatenate([[END], character_ids(text, self.characters), [END]])


def character_ids(text: str, known: np.ndarray) -> np.ndarray:
    points = code_points(text)
    at = np.minimum(np.searchsorted(known, points), len(known) - 1)
    return np.where(known[at] == points, at + FIRST, UNKNOWN).astype(np.int64)


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def scorer(
    language: str, paths: Sequence[str], text_field: str, order: int, tokenizer: str | None, cache: str | None
) -> Scorer:
    """Fitted on the files, or read from ``cache`` where the same was fitted before."""
    library = Tokenizer.load(tokenizer) if tokenizer else None
    if not cache:
        return fit(language, paths, text_field, order, library)
    made_of = [FORMAT, order, text_field, library and library.fingerprint(), [sha256(path) for path in expand(paths)]]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    file = Path(cache) / f"perplexity-{language}-{name}.npz"
    if file.is_file():
        return load(file, library)
    made = fit(language, paths, text_field, order, library)
    save(made, file)
    return made


def fit(language: str, paths: Sequence[str], text_field: str, order: int, tokenizer: Tokenizer | None) -> Scorer:
    """Raises ValueError where the files hold too few documents, or too many different characters for the order."""
    seen: list[str] = []
    held_out: list[str] = []
    for text in documents(paths, text_field):
        first = hashlib.sha256(text.encode()).digest()[0]
        (held_out if first < 26 else seen).append(" ".join(text.split()))
    if len(held_out) < LEAST_HELD_OUT:
        raise ValueError(
            f"perplexity, reference {language!r}: {len(seen) + len(held_out)} documents in {', '.join(paths)} leave {len(held_out)} "
            f"to find the bounds on, at least {LEAST_HELD_OUT} are needed; give more, or cut the files into more documents"
        )
    counts: Counter[str] = Counter()
    for text in seen if tokenizer is None else ():
        counts.update(text)
    known = np.array(sorted(ord(c) for c, n in counts.items() if n > 1), np.uint32)
    made = Scorer(KneserNey(order), known, np.empty(0), tokenizer)
    made.model.fit([made.ids(text) for text in seen], tokenizer.vocab_size if tokenizer else FIRST + len(known))
    perplexities = np.sort([made.perplexity(text) for text in held_out])
    return Scorer(made.model, known, perplexities, tokenizer)


def save(made: Scorer, file: Path) -> None:
    """Whole or not at all: worker processes may fit and write the same model at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = beside(file)
    with open(part, "wb") as stream:
        np.savez(stream, characters=made.characters, held_out=made.held_out, **made.model.arrays())
    os.replace(part, file)


def load(file: Path, tokenizer: Tokenizer | None) -> Scorer:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        return Scorer(KneserNey.from_arrays(arrays), arrays["characters"], arrays["held_out"], tokenizer)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file}: not a fitted perplexity model ({error}); delete the file and it is made again"
        ) from error
