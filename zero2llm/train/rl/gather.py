"""Rows of several ranks or rounds as one batch, and a batch as JSON and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.parallel.plan import World


def widened(batch: Batch, width: int) -> Batch:
    """Ragged rows with more padding on the right; of extra, what has a value per token too."""
    more = width - batch.tokens.shape[1]
    if not more:
        return batch
    extra = {key: F.pad(value, (0, more)) if value.ndim == 2 else value for key, value in batch.extra.items()}
    seq = Seq.ragged(batch.seq.seg.sum(1), width)
    return Batch(F.pad(batch.tokens, (0, more)), F.pad(batch.labels, (0, more), value=IGNORE), seq, extra, batch.group)


def joined(parts: Sequence[Batch]) -> Batch:
    """One below the other, as wide as the widest."""
    width = max(part.tokens.shape[1] for part in parts)
    parts = [widened(part, width) for part in parts]
    cat = lambda pick: torch.cat([pick(part) for part in parts])
    extra = {key: cat(lambda part, key=key: part.extra[key]) for key in parts[0].extra}
    return Batch(cat(lambda p: p.tokens), cat(lambda p: p.labels), Seq(cat(lambda p: p.seq.pos), cat(lambda p: p.seq.seg)), extra, parts[0].group)


def gathered(batch: Batch, world: World) -> Batch:
    """The rows of all ranks, in the ranks' order, on each of them; every rank gives equally many."""
    if world.size == 1:
        return batch
    widths = torch.zeros(world.size, dtype=torch.long)
    widths[world.rank] = batch.tokens.shape[1]
    batch = widened(batch, int(world.sum(widths).max()))

    def whole(x: Tensor) -> Tensor:
        slots = x.new_zeros(world.size, *x.shape)
        slots[world.rank] = x
        return world.sum(slots).cpu().flatten(0, 1)  # a number plus zeros is itself, to the bit

    seq = Seq(whole(batch.seq.pos), whole(batch.seq.seg))
    return Batch(whole(batch.tokens), whole(batch.labels), seq, {key: whole(value) for key, value in batch.extra.items()}, batch.group)


def packed(batch: Batch) -> dict:
    """As JSON: numbers in fp32 come back to the bit."""
    named = {"tokens": batch.tokens, "labels": batch.labels, "pos": batch.seq.pos, "group": torch.tensor(batch.group)} | {
        f"extra.{key}": value for key, value in batch.extra.items()
    }
    named |= {} if batch.seq.seg is None else {"seg": batch.seq.seg}
    return {key: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()} for key, value in named.items()}


def unpacked(data: dict) -> Batch:
    t = {key: torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])) for key, value in data.items()}
    extra = {key.removeprefix("extra."): value for key, value in t.items() if key.startswith("extra.")}
    return Batch(t["tokens"], t["labels"], Seq(t["pos"], t.get("seg")), extra, int(t["group"]))
