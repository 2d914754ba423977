"""What a checkpoint can do, measured the same way before and after each stage."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.data.ngram import KneserNey
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.evals.metrics import Rate, bits_per_byte, exact_match, win_rate
from zero2llm.evals.tasks.items import Item
from zero2llm.model.lm import LM
from zero2llm.train.objectives.pairs import sequence_logps


def peak_rss_mb() -> float:
    """Most memory that this process has held so far, MiB."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**20
    status = Path("/proc/self/status")  # of Linux, where getrusage counts what the program held that started this one
    if status.is_file() and (own := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(own[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def answers(engine: Engine, prompts: Sequence[str], max_tokens: int = 40) -> list[str]:
    """Greedy replies to single user messages."""
    ids = [engine.tokenizer.render([{"role": "user", "content": p}], add_generation_prompt=True)[0] for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of like length share a wave: less padding
    done = engine.generate([ids[i] for i in order], Sampling(max_tokens=max_tokens, temperature=0))
    texts = dict(zip(order, (completion.text for completion in done), strict=True))
    return [texts[i] for i in range(len(ids))]


def task_accuracy(engine: Engine, items: Sequence[Item]) -> dict[str, Rate]:
    """Exact match per family, per language (``en``, ``zh``) and ``overall``."""
    outputs = answers(engine, [item.prompt for item in items])
    rates = exact_match(outputs, items)
    for lang in sorted({item.lang for item in items}):
        pairs = [(o, i) for o, i in zip(outputs, items, strict=True) if i.lang == lang]
        rates[lang] = exact_match(*zip(*pairs, strict=True))["overall"]
    return rates


@torch.no_grad()
def preference_rate(model: LM, batches: Iterable[Batch], micro_rows: int = 16) -> Rate:
    """Share of pairs whose chosen reply the model finds likelier than the rejected one."""
    logps = torch.cat([sequence_logps(model, part) for batch in batches for part in batch.split(micro_rows)])
    return win_rate(logps[0::2].tolist(), logps[1::2].tolist())


def documents_of(batches: Iterable[Batch]) -> list[np.ndarray]:
    """The documents (or pieces of them) in packed rows, each with its last target: exactly what the model was shown."""
    docs = []
    for batch in batches:
        for row in range(len(batch)):
            seg = batch.seq.seg[row] if batch.seq.seg is not None else torch.ones_like(batch.tokens[row])
            for number in seg.unique().tolist():
                where = (seg == number) & (batch.labels[row] != IGNORE)
                if number and bool(where.any()):
                    last = batch.labels[row][where][-1:]
                    docs.append(torch.cat([batch.tokens[row][where], last]).numpy())
    return docs


def ngram_marks(
    seen: list[np.ndarray], held_out: list[np.ndarray], vocab_size: int, byte_lengths: Tensor
) -> dict[str, float]:
    """Bits per byte on ``held_out`` of Kneser-Ney models fitted on the tokens that the neural model was shown."""
    n_bytes = sum(int(byte_lengths[torch.from_numpy(doc[1:])].sum()) for doc in held_out)
    return {
        name: bits_per_byte(KneserNey(order).fit(seen, vocab_size).nats(held_out)[0], n_bytes)
        for order, name in ((2, "Kneser-Ney bigram"), (3, "Kneser-Ney trigram"))
    }
