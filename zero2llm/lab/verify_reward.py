"""`zero2llm verify-export` of a reward model: transformers' classifier on the folder against the checkpoint, score by score.

    scores     max |theirs + bias - ours| <= 1e-4 std(ours)        ragged rows in one batch, padded on the right
    padding    the token that pads there is the one that config.json names, and ends no text
    weights    as stored: those that both have
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from zero2llm.core.seq import Seq
from zero2llm.interop.checks import Check, check_ids, check_weights, guarded, opened, read_back
from zero2llm.interop.questions import ODD, TEXTS
from zero2llm.interop.read_hf import read_hf
from zero2llm.interop.score import padding
from zero2llm.interop.verify import Classifier
from zero2llm.model.heads import row_scores
from zero2llm.model.lm import LM
from zero2llm.tokenizers.tokenizer import Tokenizer

SCALE = 1e-4  # of the spread of our scores


def reward_checks(export: Path, kind: str, model: LM, tokenizer: Tokenizer, rows: Sequence[list[int]]) -> Iterator[Check]:
    """Raises ValueError for an export that is no folder of transformers, or cannot be opened there."""
    if kind != "hf":
        raise ValueError(f"{export}: of a reward model only a folder of transformers can be checked, not {kind}")
    reader = opened(export, lambda: Classifier(export))
    yield Check("opened by", f"{reader.name}, {type(reader.model).__name__}", "", True)
    yield reader.check_names()
    pads = reader.model.config.pad_token_id, reader.tokenizer.pad_token_id
    yield Check("padding", f"config {pads[0]}, tokenizer {pads[1]}", str(padding(tokenizer)), set(pads) == {padding(tokenizer)})
    yield guarded("token ids", lambda: check_ids(reader, tokenizer, [*TEXTS, *ODD]))
    yield guarded("weights read back", lambda: _weights(export, model))
    yield guarded("scores", lambda: _scores(reader, model, rows, padding(tokenizer)))


def _weights(export: Path, model: LM) -> Check:
    found = read_hf(export)
    back = read_back(found, replace(model.cfg, tie_embeddings=True))  # its head of the vocabulary is not in the file
    original = {name: tensor for name, tensor in model.state_dict().items() if name in back and name != "score.bias"}
    return check_weights(original, back, "F32")


@torch.no_grad()
def _scores(reader: Classifier, model: LM, rows: Sequence[list[int]], pad: int) -> Check:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    seq = Seq.ragged(lengths, tokens.shape[1])
    ours = row_scores(model.score(model(tokens, seq)[0]), seq)
    worst, limit = float((reader.score(tokens, lengths) + model.score.bias - ours).abs().max()), SCALE * float(ours.std())
    return Check("scores", f"max {worst:.2g} on {len(rows)} texts in one batch", f"{limit:.2g}", worst <= limit)
