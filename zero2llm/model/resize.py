"""More tokens for a model that is trained already.

    new rows of the embedding, and of the head where it has its own  =  the mean of the rows so far

Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models": from the mean, a new token's logit is
the mean of all logits (a head is linear), so it cannot crowd out the old tokens, as a random row may.
Why: nothing else in the model depends on the vocabulary, so hidden states, and the logits of all old ids, stay bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from zero2llm.model.lm import LM

ROWS = ("embed.weight", "head.weight")  # (V, D) each; a tied head is the embedding


def resized(model: LM, used: int, size: int) -> LM:
    """A copy with ``size`` tokens, of which the first ``used`` keep their rows; rows between are the mean of those.

    ``used`` is the tokenizer's size so far: a model may have more rows, which no token has used. Raises ValueError if
    ``size`` is smaller than the model, or ``used`` larger.
    """
    old = model.cfg.vocab_size
    if not 0 < used <= old <= size:
        raise ValueError(f"a vocabulary of {old}, of which {used} are in use, cannot become one of {size}: it can only grow")
    twin = LM(replace(model.cfg, vocab_size=size)).to(model.embed.weight.device)
    state = model.state_dict()
    for name in ROWS:
        if name in state:
            rows = state[name][:used]
            mean = rows.to(torch.float32).mean(0, keepdim=True).to(rows.dtype)
            state[name] = torch.cat((rows, mean.expand(size - used, -1)))
    twin.load_state_dict(state)
    return twin.train(model.training)
