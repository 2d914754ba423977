"""Multi-token prediction as a further term of the loss: position i also predicts the tokens behind the next one.

    L = L_next + weight / depth * sum_k L^k          L^k = sum_i -log p^k(x_(i+k+1)), over i whose i + k is in its document

Source: DeepSeek-V3 2412.19437 eqs. 24 and 25 (L^k divided by all T positions, as the next-token loss is, not by the
fewer that have a target). What a depth is stands in model/heads.py. `loss` in the log stays that of the next token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Aux
from zero2llm.model.heads import labels_ahead
from zero2llm.ops.xent import cross_entropy_plain, cross_entropy_sum


def entropy(hidden: Tensor, model: nn.Module, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats of the model's vocabulary head."""
    summed = cross_entropy_plain if torch.compiler.is_compiling() else cross_entropy_sum
    return summed(hidden, model.head_weight, labels, model.logit_softcap)


def tokens_ahead(model: nn.Module, hidden: Tensor, batch: Batch) -> tuple[Tensor, dict, Aux]:
    """(mean over depths of their sums in nats, `mtp` for the log, what the depths' blocks report).

    Raises ValueError where the model has no such depths.
    """
    if model.mtp is None:
        raise ValueError(
            "objective.mtp_weight is given, but the model was built without `mtp`: it has nothing to train"
        )
    states, aux = model.ahead(hidden, batch.tokens, batch.seq)
    labels = [labels_ahead(batch.labels, batch.seq, k) for k in range(1, len(states) + 1)]
    total = torch.stack([entropy(h, model, y) for h, y in zip(states, labels, strict=True)]).sum()
    count = torch.stack([(y != IGNORE).sum() for y in labels]).sum()
    return total / len(states), {"mtp": (total.detach(), count)}, aux
