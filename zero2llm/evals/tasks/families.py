"""The table of the families with one exact answer.

Each is a function that draws content (indices and numbers), chooses a wording and returns (key, prompt, answer, wrong).
Keys are sorted wherever order does not change what is being learned: 3+41 and 41+3 share one, and so do all orders of
one list, so the test split holds content that training never saw in any form.
"""

from __future__ import annotations

from zero2llm.evals.tasks.items import Family
from zero2llm.evals.tasks.lists import copy, count, first, last, pick, reverse, translate
from zero2llm.evals.tasks.numbers import arithmetic, arithmetic_hard, compare, sort
from zero2llm.evals.tasks.stories import older, recall, recall_hard

READING = (recall, recall_hard, older)
WORDS = (pick, translate, copy, reverse, first, last, count)
NUMBERS = (compare, sort, arithmetic, arithmetic_hard)

EXACT = {write.__name__: Family(write.__name__, write) for write in READING + WORDS + NUMBERS}
