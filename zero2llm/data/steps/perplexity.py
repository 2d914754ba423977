"""Perplexity filter: is a document as predictable as text we trust?

    ppl(document) = exp( -1/T  sum_t  ln P(x_t | x_{t-n+1} .. x_{t-1}) )         P: Kneser-Ney (`ngram.py`), one model a language
    x             = characters, blanks squeezed to one | ids of a tokenizer

`perplexity` writes ``meta["perplexity"]`` and keeps what lies between two bounds: given ones, or percentiles of held-out
documents of the reference (`reference.py`). A language without a model is kept and counted. `perplexity_rank` keeps what lies between two
percentiles of the corpus itself, language by language, by the scores that a `perplexity` step before it wrote.

*Source*: Wenzek et al. 2020, "CCNet", 1911.00359, section 3.3: 5-gram Kneser-Ney trained on Wikipedia, over SentencePiece tokens;
the corpus cut by its percentiles, language by language. *Why*: catches word salad, mixed-up encodings and keyword lists that
satisfy every count. It also dislikes whatever the reference lacks: dialect, verse, code. Very low is bad as well: loops and
boilerplate are easy to predict. A character of Chinese tells more than one of English, so no bound serves both languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal

import numpy as np

from zero2llm.core.config import config
from zero2llm.data.document import CorpusStep, Document, Removed, Result, Step, Verdict
from zero2llm.data.steps.reference import Scorer, scorer
from zero2llm.data.steps.words import language_of

Range = tuple[float, float]


@config
class PerplexityConfig:
    """``reference``: language -> files of good text.  ``bounds``: language -> lowest and highest perplexity kept.

    Without ``bounds`` a language keeps what lies between ``percentiles`` of its held-out reference. ``remove: false`` only scores.
    ``cache``: folder that keeps fitted models; without one each worker process fits its own.
    """

    kind: Literal["perplexity"] = "perplexity"
    looks_at: ClassVar[str] = "document"
    reference: dict[str, tuple[str, ...]]
    text_field: str = "text"
    order: int = 4
    tokenizer: str | None = None
    bounds: dict[str, Range] = field(default_factory=dict)
    percentiles: Range = (0.0, 99.0)
    remove: bool = True
    cache: str | None = None

    def __post_init__(self):
        if not self.reference:
            raise ValueError("reference is empty: name good text, {en: [files], zh: [files]}")
        for language, files in self.reference.items():
            if not files:
                raise ValueError(f"reference, {language}: no file is named")
        for language, pair in self.bounds.items():
            if language not in self.reference:
                raise ValueError(f"bounds for {language!r}, but reference has no {language!r}")
            ordered(f"bounds, {language}", pair)
        ordered("percentiles", self.percentiles, 100)
        if self.order < 1:
            raise ValueError(f"order = {self.order}: an n-gram has at least one token")

    def build(self) -> Step:
        """Fits or loads the models. Raises ValueError for reference files that cannot be used."""
        models = {
            language: scorer(language, files, self.text_field, self.order, self.tokenizer, self.cache)
            for language, files in sorted(self.reference.items())
        }
        bounds = {
            language: self.bounds.get(language) or self.from_percentiles(model) for language, model in models.items()
        }

        def step(doc: Document) -> Result:
            language = language_of(doc)
            if language not in models:
                doc.meta["perplexity"] = None
                doc.notes["perplexity: no model for this language"] += 1
                return doc
            doc.meta["perplexity"] = score = round(models[language].perplexity(doc.text), 2)
            low, high = bounds[language]
            if not self.remove or low <= score <= high:
                return doc
            if score > high:
                return Removed("perplexity too high", f"{score} > {high:.2f} ({language})")
            return Removed("perplexity too low", f"{score} < {low:.2f} ({language})")

        return step

    def from_percentiles(self, model: Scorer) -> Range:
        low, high = np.percentile(model.held_out, self.percentiles)
        return (
            float(low) if self.percentiles[0] > 0 else 0.0,
            float(high) if self.percentiles[1] < 100 else float("inf"),
        )


@config
class PerplexityRankConfig:
    """Keeps documents between two percentiles of the corpus, language by language; both ends stay."""

    kind: Literal["perplexity_rank"] = "perplexity_rank"
    looks_at: ClassVar[str] = "corpus"
    percentiles: Range = (0.0, 95.0)

    def __post_init__(self):
        ordered("percentiles", self.percentiles, 100)

    def build(self) -> CorpusStep:
        return PerplexityRank(self.percentiles)


class PerplexityRank:
    def __init__(self, percentiles: Range):
        self.percentiles = percentiles

    def sign_many(self, docs: Sequence[Document]) -> list[np.ndarray]:
        return [self.sign(doc) for doc in docs]

    def sign(self, doc: Document) -> np.ndarray:
        """(1, 2) float64: the language's letters as a number, the score; (0, 2) for a language without a model."""
        if "perplexity" not in doc.meta:
            raise ValueError(
                f"{doc.where}: perplexity_rank found no score; put a step `perplexity` with remove: false before it"
            )
        if doc.meta["perplexity"] is None:
            return np.empty((0, 2))
        return np.array([[int.from_bytes(language_of(doc).encode()[:6], "big"), doc.meta["perplexity"]]], np.float64)

    def decide(self, rows: np.ndarray, owner: np.ndarray) -> Verdict:
        keep = np.ones(len(rows), bool)
        for language in np.unique(rows[:, 0]) if len(rows) else ():
            mine = rows[:, 0] == language
            low, high = np.percentile(rows[mine, 1], self.percentiles)
            keep[mine] = (rows[mine, 1] >= low) & (rows[mine, 1] <= high)
        return Verdict(keep, np.arange(len(rows)))

    def apply(self, doc: Document, keep: np.ndarray) -> Result:
        if not len(keep):
            doc.notes["perplexity_rank: no score for this language"] += 1
        elif not keep[0]:
            low, high = self.percentiles
            detail = f"{doc.meta['perplexity']} lies outside the percentiles {low:g} .. {high:g} ({language_of(doc)})"
            return Removed("perplexity out of the corpus's range", detail)
        return doc


def ordered(name: str, pair: Range, most: float = float("inf")) -> None:
    if not 0 <= pair[0] < pair[1] <= most:
        raise ValueError(f"{name} = {list(pair)}: two rising numbers from 0 to {most:g} are needed")
