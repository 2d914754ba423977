"""Conversations and preferences as token items: ids with the loss mask that the chat template itself marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zero2llm.data.schemas import Message, Preference
from zero2llm.data.shards import Item
from zero2llm.data.sources import BadRecords
from zero2llm.tokenizers.tokenizer import Tokenizer


def conversation_item(messages: list[Message], tokenizer: Tokenizer, max_len: int) -> Item:
    """Ids and mask of one conversation. Too long: whole trailing turns go, as long as an answer remains.

    Raises ValueError if nothing trainable fits.
    """
    turns = list(messages)
    while turns:
        ids, mask = tokenizer.render(turns)
        if len(ids) <= max_len and any(mask):
            return ids, mask
        turns = turns[:-1]
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
    ids, _ = tokenizer.render(messages)
    raise ValueError(f"no answer fits into {max_len} tokens (the conversation has {len(ids)}); raise seq_len")


def conversation_items(
    all_messages: Iterable[list[Message]], tokenizer: Tokenizer, max_len: int, bad: BadRecords
) -> Iterator[Item]:
    """Items of many conversations; those that do not fit are named in ``bad``, never dropped unseen."""
    for number, messages in enumerate(all_messages, 1):
        try:
            yield conversation_item(messages, tokenizer, max_len)
        except ValueError as error:
            bad.add("conversations", number, str(error))


def pair_items(pairs: Iterable[Preference], tokenizer: Tokenizer, max_len: int, bad: BadRecords) -> Iterator[Item]:
    """Chosen, rejected, chosen, rejected ...; the loss is on the completions only. A pair that does not fit goes whole."""
    for number, pair in enumerate(pairs, 1):
        prompt, _ = tokenizer.render(pair.prompt, add_generation_prompt=True)
        sides = [tokenizer.render(pair.prompt + answer) for answer in (pair.chosen, pair.rejected)]
        longest = max(len(ids) for ids, _ in sides)
        if longest > max_len:
            bad.add("pairs", number, f"{longest} tokens do not fit into {max_len}; raise seq_len")
            continue
        for ids, mask in sides:
            n = len(prompt)
            assert ids[:n] == prompt, "the template must render a prompt as the beginning of the whole conversation"
            yield ids, [0] * n + list(mask[n:])
