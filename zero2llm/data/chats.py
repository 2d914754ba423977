"""Conversations, pairs, judged answers, prompts and pictures as token items: ids with the loss mask of the chat template.

An item is (ids, mask) or (ids, mask, extra), extra being what else belongs to it as a JSON object: {"label": true} of a
judged answer, {"answer": ...} or {"gt": [...]} of a prompt, {"images": [...]} of a picture.

Too long: whole turns go (fitting.py). A side of a pair, a judged answer and a prompt are never cut: what is left would be
another answer, or another question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from zero2llm.data.fitting import Marked, TooLong, fitted
from zero2llm.data.pictures import IMAGE_MARK
from zero2llm.data.schemas import Conversation, Judged, Message, Pictured, Preference, Prompt
from zero2llm.data.shapes import SameAnswers
from zero2llm.data.sources import BadRecords
from zero2llm.data.token_writer import Item
from zero2llm.data.trained import LEFT_OUT, TrainOn, left_out, marked
from zero2llm.tokenizers.chat import Style, render_ids
from zero2llm.tokenizers.tokenizer import Tokenizer

IMAGE = "\U0010fff3"  # stands for a picture while the text is rendered; a private character


def rendered(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: list[dict] | None = None, *, prompt: bool = False,
    style: Style | None = None, image: Sequence[int] | None = None,
) -> Marked:  # fmt: skip
    """Ids and mask. ``prompt``: the model's turn comes next. ``image``: the ids that stand for one picture."""
    messages = [{k: v for k, v in m.items() if k != LEFT_OUT} for m in messages]
    if tools:  # they ride on the first message as far as the template
        messages = [{**messages[0], "tools": tools}, *messages[1:]]
    if image is None:
        more = {} if style is None else {"style": style}
        return tokenizer.render(messages, prompt, **more)
    controls = {tokenizer.library.id_to_token(i): i for i in sorted(tokenizer.special_ids)}
    roles, style = tokenizer.roles, style or Style()
    names = {"bos_token": roles.bos, "eos_token": roles.eos, "pad_token": roles.pad, **style.names}
    asked = {"add_generation_prompt": prompt, "style": Style(names, style.train_thinking)}
    controls |= {IMAGE: -1}
    ids, mask = render_ids(tokenizer.template, messages, tokenizer.encode, controls, **asked)
    pairs = [(i, m) for one, m in zip(ids, mask, strict=True) for i in ([one] if one >= 0 else image)]
    return [i for i, _ in pairs], [m for _, m in pairs]


def conversation_item(
    messages: list[Message],
    tokenizer: Tokenizer,
    max_len: int,
    style: Style | None = None,
    notes: Counter[str] | None = None,
    *,
    too_long: TooLong = "turns",
    train_on: TrainOn = "assistant",
) -> Marked:
    """Ids and mask of one conversation; what goes where it is too long stands in fitting.py, what is trained in trained.py.

    ``notes`` counts what is not trained: turns that went, answers that the record or ``train_on`` leaves out, and answers
    that the template shows otherwise than they were given. Raises ValueError if nothing trainable fits.
    """
    tools = messages.tools if isinstance(messages, Conversation) else None
    render = partial(rendered, tokenizer=tokenizer, tools=tools, style=style)
    turns, item = fitted(messages, lambda some: marked(some, render, train_on), max_len, too_long)
    if notes is not None:
        _count(notes, messages, turns, item[1], train_on)
    return item


def _count(
    notes: Counter[str], messages: list[Message], turns: list[Message], mask: list[int], train_on: TrainOn
) -> None:
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    asked = [turn for turn in (answers[-1:] if train_on == "last" else answers) if not left_out(turn)]
    trained = sum(now > before for before, now in zip([0, *mask], mask, strict=False))
    gone = {
        "turns that did not fit": len(messages) - len(turns),
        "answers left out by their record": sum(map(left_out, answers)),
        "answers before the last": len(answers) - 1 if train_on == "last" else 0,
        "answers not trained": max(len(asked) - trained, 0) if train_on != "all" else 0,
    }
    notes.update({reason: n for reason, n in gone.items() if n})


def conversation_items(
    all_messages: Iterable[list[Message]], tokenizer: Tokenizer, max_len: int, bad: BadRecords,
    style: Style | None = None, notes: Counter[str] | None = None, *, too_long: TooLong = "turns",
    train_on: TrainOn = "assistant",
) -> Iterator[Item]:  # fmt: skip
    """Items of many conversations; those that do not fit are named in ``bad``, never dropped unseen."""
    choice = {"style": style, "notes": notes, "too_long": too_long, "train_on": train_on}
    make = partial(conversation_item, tokenizer=tokenizer, max_len=max_len, **choice)
    return _each(all_messages, make, bad, "conversation")


def _each(records: Iterable[Any], make: Callable[[Any], Any], bad: BadRecords, kind: str) -> Iterator[Any]:
    """What ``make`` makes of every record; those that it refuses are named by their place, or else their number."""
    for number, record in enumerate(records, 1):
        try:
            made = make(record)
        except ValueError as error:
            where = "" if type(record) is list else record.where  # bare lists of messages come from callers in Python
            tell = bad.leave_out if isinstance(error, SameAnswers) else bad.reject
            tell(where or f"{kind} {number}", str(error))
        else:
            yield made


def _refuse_left_out(messages: Sequence[Message]) -> None:
    for message in messages:
        if message["role"] == "assistant" and left_out(message):
            raise ValueError("train is false in an answer, which only fine-tuning on conversations can honour; remove the key or the answer")


def _side(
    prompt: Sequence[Message], answer: Sequence[Message], tools: list[dict] | None, tokenizer: Tokenizer, max_len: int,
    style: Style | None,
) -> Marked:  # fmt: skip
    """A prompt and an answer; the loss is on the answer only.

    The answer begins where the rendered prompt ends. It is cut before the assistant's header, at a control token,
    because behind it an answer's first characters may melt with the header's line break into one token.
    """
    _refuse_left_out(answer)
    before, _ = rendered(prompt, tokenizer, tools, style=style)
    ids, mask = rendered([*prompt, *answer], tokenizer, tools, style=style)
    if len(ids) > max_len:
        raise ValueError(f"{len(ids)} tokens do not fit into {max_len}; raise seq_len")
    if ids[: len(before)] != before:
        raise ValueError("the chat template renders this prompt differently when an answer follows")
    mask = [0] * len(before) + list(mask[len(before) :])
    if not any(mask):
        raise ValueError("nothing in an answer is trained: a template without {% generation %}?")
    return ids, mask


def pair_item(
    pair: Preference, tokenizer: Tokenizer, max_len: int, style: Style | None = None
) -> tuple[Marked, Marked]:
    """The chosen and the rejected side, prompt included; the loss is on the completion only.

    Raises ValueError if a side is longer than ``max_len``, or the template renders the prompt otherwise when more follows;
    SameAnswers if the two are the same tokens.
    """
    chosen, rejected = (
        _side(pair.prompt, answer, pair.tools, tokenizer, max_len, style) for answer in (pair.chosen, pair.rejected)
    )
    if chosen[0] == rejected[0]:
        raise SameAnswers("chosen and rejected are the same once the chat template has shown them")
    return chosen, rejected


def pair_items(
    pairs: Iterable[Preference], tokenizer: Tokenizer, max_len: int, bad: BadRecords, style: Style | None = None, *,
    margins: bool = False,
) -> Iterator[Item]:  # fmt: skip
    """Chosen, rejected, chosen, rejected ... A pair that does not fit goes whole, and is named in ``bad``.

    ``margins``: each side says {"margin": by how much the chosen one is better}."""

    def item(pair: Preference) -> list[Item]:
        extra = ({"margin": pair.margin},) if margins else ()
        return [(*side, *extra) for side in pair_item(pair, tokenizer, max_len, style)]

    for sides in _each(pairs, item, bad, "pair"):
        yield from sides


def judged_items(
    answers: Iterable[Judged], tokenizer: Tokenizer, max_len: int, bad: BadRecords, style: Style | None = None
) -> Iterator[Item]:
    """KTO: a prompt and an answer each, the loss on the answer; extra: {"label": bool}."""

    def item(one: Judged) -> Item:
        ids, mask = _side(one.prompt, one.completion, one.prompt.tools, tokenizer, max_len, style)
        return ids, mask, {"label": one.label}

    return _each(answers, item, bad, "answer")


def prompt_items(
    prompts: Iterable[Prompt], tokenizer: Tokenizer, max_len: int, bad: BadRecords, style: Style | None = None, *,
    tools: list[dict] | None = None,
) -> Iterator[Item]:  # fmt: skip
    """RL: what the model continues, without a mask; extra: {"answer": ...}, {"gt": [...]} where there are. ``tools``: what can be
    called, named to the model where a prompt names nothing."""

    def item(one: Prompt) -> Item:
        named = one.messages.tools or tools
        if tools and named != tools:
            raise ValueError("its tools are not those of rollout.tools; remove them from the record, or change the recipe")
        ids, _ = rendered(one.messages, tokenizer, named, prompt=True, style=style)
        if len(ids) > max_len:
            raise ValueError(f"a prompt of {len(ids)} tokens does not fit into {max_len}; raise seq_len")
        extra = {"answer": one.answer} if one.answer is not None else {}
        return ids, None, extra | ({"gt": list(one.gt)} if one.gt else {})

    return _each(prompts, item, bad, "prompt")


def image_items(
    records: Iterable[Pictured], tokenizer: Tokenizer, max_len: int, bad: BadRecords, *, image_token: str, n_tokens: int,
    style: Style | None = None,
) -> Iterator[Item]:  # fmt: skip
    """Conversations about pictures: every <image> becomes ``n_tokens`` of ``image_token``, which the picture's features
    replace; extra: {"images": [names in order]}. Raises ValueError if the tokenizer has no such control token."""
    token = tokenizer.library.token_to_id(image_token)
    if token is None or token not in tokenizer.special_ids or n_tokens < 1:
        raise ValueError(
            f"image_token {image_token!r} must be a control token of the tokenizer, and n_tokens = {n_tokens} positive"
        )
    render = partial(rendered, tokenizer=tokenizer, style=style, image=[token] * n_tokens)

    def item(one: Pictured) -> Item:
        if any(IMAGE in m["content"] for m in one.messages):
            raise ValueError("holds a character reserved for rendering (U+10FFF3)")
        turns = [{**m, "content": m["content"].replace(IMAGE_MARK, IMAGE)} for m in one.messages]
        _refuse_left_out(turns)
        _, (ids, mask) = fitted(turns, partial(render, tools=one.messages.tools), max_len)
        return ids, mask, {"images": list(one.images[: ids.count(token) // n_tokens])}

    return _each(records, item, bad, "picture")
