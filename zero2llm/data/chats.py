"""Conversations and preferences as token items: ids with the loss mask that the chat template itself marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zero2llm.data.schemas import Conversation, Message, Preference
from zero2llm.data.shards import Item
from zero2llm.data.sources import BadRecords
from zero2llm.tokenizers.tokenizer import Tokenizer


def conversation_item(messages: list[Message], tokenizer: Tokenizer, max_len: int) -> Item:
    """Ids and mask of one conversation. Too long: whole trailing turns go, as long as an answer remains.

    Raises ValueError if nothing trainable fits.
    """
    turns, ids = list(messages), []
    while turns:
        ids, mask = tokenizer.render(turns)
        if not any(mask):
            raise ValueError("nothing in it is trained: no assistant message, or a template without {% generation %}")
        if len(ids) <= max_len:
            return ids, mask
        turns.pop()
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
    raise ValueError(f"no answer fits into {max_len} tokens (the first ends at {len(ids)}); raise seq_len")


def conversation_items(
    all_messages: Iterable[list[Message]], tokenizer: Tokenizer, max_len: int, bad: BadRecords
) -> Iterator[Item]:
    """Items of many conversations; those that do not fit are named in ``bad``, never dropped unseen."""
    for number, messages in enumerate(all_messages, 1):
        try:
            item = conversation_item(messages, tokenizer, max_len)
        except ValueError as error:
            bad.reject(_place(messages, f"conversation {number}"), str(error))
        else:
            yield item


def pair_item(pair: Preference, tokenizer: Tokenizer, max_len: int) -> tuple[Item, Item]:
    """The chosen and the rejected side, prompt included; the loss is on the completion only.

    The completion begins where the rendered prompt ends. It is cut before the assistant's header, at a control token,
    because behind it an answer's first characters may melt with the header's line break into one token.
    Raises ValueError if a side is longer than ``max_len``, or the template renders the prompt otherwise when more follows.
    """
    prompt, _ = tokenizer.render(pair.prompt)
    sides = []
    for answer in (pair.chosen, pair.rejected):
        ids, mask = tokenizer.render(pair.prompt + answer)
        if len(ids) > max_len:
            raise ValueError(f"{len(ids)} tokens do not fit into {max_len}; raise seq_len")
        if ids[: len(prompt)] != prompt:
            raise ValueError("the chat template renders this prompt differently when an answer follows")
        mask = [0] * len(prompt) + list(mask[len(prompt) :])
        if not any(mask):
            raise ValueError("nothing in an answer is trained: a template without {% generation %}?")
        sides.append((ids, mask))
    return sides[0], sides[1]


def pair_items(pairs: Iterable[Preference], tokenizer: Tokenizer, max_len: int, bad: BadRecords) -> Iterator[Item]:
    """Chosen, rejected, chosen, rejected ... A pair that does not fit goes whole, and is named in ``bad``."""
    for number, pair in enumerate(pairs, 1):
        try:
            sides = pair_item(pair, tokenizer, max_len)
        except ValueError as error:
            bad.reject(pair.where or f"pair {number}", str(error))
        else:
            yield from sides


def _place(messages: list[Message], otherwise: str) -> str:
    return (messages.where if isinstance(messages, Conversation) else "") or otherwise
