"""How much better an answer was than expected: what the expectation is, is the whole difference.

    standardised   A_i = (R_i - mean) / (std + eps)          of the answers to one prompt (GRPO)
    centred        A_i = R_i - mean                           the same without the scale (Dr. GRPO)
    left_out       A_i = R_i - mean of the other answers      unbiased (RLOO)
    returns        G_t = sum_(s >= t) gamma^(s - t) r_s       no baseline yet (REINFORCE++ whitens them over the batch)
    gae            A_t = d_t + gamma lambda A_(t+1),  d_t = r_t + gamma V_(t+1) - V_t          a critic (PPO)

Source: 2402.03300 section 4.1.2; 2503.20783; 2402.14740 eq. 8; 2501.03262; 1506.02438 eq. 16.
Why not always / std: where a prompt is nearly solved or hopeless the std is small, and its few odd answers count most.
Rows of one prompt stand next to each other, ``samples`` of them. ``ok`` (B,) bool leaves out answers without a reward.
Shapes: rewards, ok (B,) -> (B,); per token (B, T), 0 off the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4


def _groups(rewards: Tensor, ok: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and ok as (prompts, samples), and each prompt's mean (prompts, 1)."""
    r, keep = rewards.view(-1, samples), ok.view(-1, samples).to(rewards.dtype)
    return r, keep, mean_over(r, keep, 1)


def mean_over(x: Tensor, keep: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The mean where ``keep``, dimensions kept; 0 of nothing. Of equal numbers it is exactly that number: where every answer got the
    same, nothing may be left that an optimizer without memory of size (Adam) would take for a direction."""
    n = keep.sum(dim, keepdim=True).clamp(min=1)
    about = (x * keep).sum(dim, keepdim=True) / n
    return about + ((x - about) * keep).sum(dim, keepdim=True) / n


def centred(rewards: Tensor, ok: Tensor, samples: int) -> Tensor:
    r, keep, mean = _groups(rewards, ok, samples)
    return ((r - mean) * keep).flatten()


def standardised(rewards: Tensor, ok: Tensor, samples: int) -> Tensor:
    """The unbiased standard deviation, over samples - 1; a prompt whose answers all got the same has advantage 0."""
    r, keep, mean = _groups(rewards, ok, samples)
    variance = ((r - mean).square() * keep).sum(1, keepdim=True) / (keep.sum(1, keepdim=True) - 1).clamp(min=1)
    return ((r - mean) * keep / (variance.sqrt() + EPS)).flatten()


def left_out(rewards: Tensor, ok: Tensor, samples: int) -> Tensor:
    """= n / (n - 1) times centred; an answer that is alone has nothing to be compared with: 0."""
    r, keep, mean = _groups(rewards, ok, samples)
    n = keep.sum(1, keepdim=True)
    return ((r - mean) * keep * n / (n - 1).clamp(min=1)).flatten()


def returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """(B, T) rewards per token -> what follows from each token on."""
    out, later = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = torch.where(mask[:, t].bool(), rewards[:, t] + gamma * later, later)
        out[:, t] = later
    return out * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns A + V, (B, T). Tokens off the mask (a tool's) are passed over; behind the last V is 0."""
    out = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        out[:, t] = torch.where(here, advantage, 0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    return out, (out + values) * mask


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over all masked tokens of the rollout, which is that of all ranks; the unbiased variance."""
    n = mask.sum()
    mean = mean_over(x, mask, (0, 1))
    variance = ((x - mean).square() * mask).sum() / (n - 1).clamp(min=1)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def at_last(score: Tensor, mask: Tensor) -> Tensor:
    """(B,) -> (B, T): a score stands at the last token that the policy wrote; nowhere in a row without one."""
    column = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (column * mask).amax(1, keepdim=True)
    return torch.where((column == last) & mask.bool(), score[:, None], 0)
