"""What all preference objectives share: a row's log-probability, its two reductions, and what is logged of a pair.

    sum    log pi(y | x) = sum_t log pi(y_t | x, y_<t)           over the labelled tokens: DPO, KTO, CPO
    mean   a = log pi(y | x) / |y|                               per labelled token: SimPO, ORPO, TRL's IPO

Why: the sum is the probability that the equations name; the mean takes away what length alone does to it. Taking one for the
other is the classic error, so each objective says which it takes.
Cost: the vocabulary's product is made for labelled positions alone; prompts and the padding inside a micro-batch pay for
the layers only, padding behind its longest row for nothing.
Shapes: rows come as chosen 0, rejected 0, chosen 1, rejected 1 ... (batch.group = 2), labels only on completions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Aux
from zero2llm.ops.xent import token_logps
from zero2llm.train.loss import Loss, hidden_states


def row_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Aux]:
    """(B,) sums of log p over each row's labelled tokens in nats, (B,) how many those are, and what layers report."""
    hidden, aux = hidden_states(model, batch)
    keep = batch.labels != IGNORE
    if torch.compiler.is_compiling():  # shapes that do not depend on the data
        logps = token_logps(hidden, model.head_weight, batch.labels, model.logit_softcap)
    else:
        found = token_logps(hidden[keep], model.head_weight, batch.labels[keep], model.logit_softcap)
        logps = found.new_zeros(keep.shape).masked_scatter(keep, found)
    return logps.sum(-1), keep.sum(-1), aux


def sequence_logps(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) sums of log p over each row's labelled tokens, in nats."""
    return row_logps(model, batch)[0]


def per_token(sums: Tensor, counts: Tensor) -> Tensor:
    """(B,) means over each row's labelled tokens; 0 where a row has none."""
    return sums / counts.clamp(min=1)


def sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(2 P,) -> chosen (P,), rejected (P,)."""
    return rows[0::2], rows[1::2]


def reported(aux: Aux, units: Tensor) -> tuple[Tensor | int, dict[str, tuple[Tensor, Tensor]]]:
    """What layers report, for the loss (a router's balance counts once per unit) and for the log."""
    losses = sum(value for name, value in aux.items() if name.endswith("_loss")) * units
    return losses, {name: (value.detach(), torch.ones_like(units)) for name, value in aux.items()}


def pair_loss(losses: Tensor, margin: Tensor, sums: Tensor, aux: Aux, further: Tensor | int = 0) -> Loss:
    """The loss of P pairs and what is logged of them.

    losses : (P,) the objective's own.  margin : (P,) how far it finds the chosen answer ahead, in its own unit.
    sums : (2 P,) log p of the rows.  further : (P,) or 0, joins the loss but not the `loss` of the log.
    """
    chosen, rejected = sides(sums)
    pairs = torch.tensor(len(losses), device=losses.device)
    more, log = reported(aux, pairs)
    values = {
        "loss": losses,
        "margin": margin,
        "moved_right": (margin > 0).float(),
        "win_rate": (chosen > rejected).float(),  # share where the model itself prefers the chosen answer
        "logp_chosen": chosen,
        "logp_rejected": rejected,
    }
    log |= {name: (value.detach().sum(), pairs) for name, value in values.items()}
    return Loss((losses + further).sum() + more, pairs, log)
