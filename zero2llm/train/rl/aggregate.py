"""From a value per token to one number: which answers weigh how much. Each returns (sum, count); the loop divides.

    per_answer     sum_i (1 / T_i) sum_t x_it,  B           every answer weighs the same: a token of a long one less
    per_token      sum_i sum_t x_it,  sum_i T_i             every token weighs the same: a long answer more
    constant       sum_i (1 / L) sum_t x_it,  B             every token weighs the same in every step, however long the others are

Source: GRPO 2402.03300 eq. 3 (per_answer); DAPO 2503.14476 eq. 8 (per_token); Dr. GRPO 2503.20783 section 3.2 (constant: with
1 / T_i a wrong answer is punished less the longer it is, so wrong answers grow).
Counts are those of the global batch, over micro-batches and ranks, because the loop sums them before it divides.
"""

from __future__ import annotations

from torch import Tensor


def answers(mask: Tensor) -> Tensor:
    """How many rows hold an answer at all."""
    return mask.any(1).sum()


def per_answer(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).sum(), answers(mask)


def per_token(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return (x * mask).sum(), mask.sum()


def constant(x: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return (x * mask).sum() / length, answers(mask)
