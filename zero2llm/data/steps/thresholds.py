"""One table of thresholds for each language, and what a recipe changes in it.

    languages: {zh: {min_words: 20}, fr: {stop_words: [le, la, de, et, que]}}

A language that the step knows keeps its other thresholds. One it does not know starts from ``other``: the English numbers
without those that only fit English. Documents judged by ``other`` are counted in the notes, so that a report shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zero2llm.core.config import parse, to_dict
from zero2llm.data.document import Document, Removed, Result, Step
from zero2llm.data.steps.words import language_of

Rules = TypeVar("Rules")
Changes = dict[str, dict[str, Any]]  # language -> thresholds that differ


def tables(step: str, defaults: Mapping[str, Rules], changes: Changes) -> dict[str, Rules]:
    """Thresholds of every language, ``changes`` applied. Raises ValueError for an unknown name or an impossible value."""
    found = dict(defaults)
    for language, change in changes.items():
        base = found.get(language, defaults["other"])
        found[language] = parse(type(base), {**to_dict(base), **change}, source=f"{step}, languages.{language}")
    return found


def rules_of(step: str, table: Mapping[str, Rules], doc: Document) -> Rules:
    language = language_of(doc)
    if language in table:
        return table[language]
    doc.notes[f"{step}: no thresholds of its own for this language"] += 1
    return table["other"]


def by_rules(step: str, table: Mapping[str, Rules], fault: Callable[[str, Rules], Removed | None]) -> Step:
    """A step that removes a document for the first ``fault`` of its text by its language's rules."""

    def look(doc: Document) -> Result:
        return fault(doc.text, rules_of(step, table, doc)) or doc

    return look
