"""AdaLoRA: a budget of ranks for the whole model, spent where they matter; ranks are singular values that can be put out.

    y = W x + b + s B (E * (A drop(x))),   s = alpha / (init_r + 1e-5)     A (r, K), B (N, r) normal 0.02,  E (r, 1) zero
    penalty     orth_weight * mean over all A and B of |A A^T - I|, |B^T B - I|            Frobenius norms
    I = |w g|,   I' <- b1 I' + (1 - b1) I,   U <- b2 U + (1 - b2) |I - I'|                 of each value w with gradient g
    score of (row of A, E, column of B) i:  S(E_i) + mean_k S(A_ik) + mean_n S(B_ni),  S = I' U
    budget(t)   init_r, until t = warmup;  target_r + (init_r - target_r) (1 - (t - warmup) / (T - final - warmup))^3 down
                to target_r at t = T - final; times the number of projections, rounded down. The best stay, E of others = 0

Source: 2303.10512 eq. 3 to 12; where the paper squares the norms of the penalty and sums them, its code and peft take the
mean of norms, and so do we. Ties go to the earlier triplet, so that the budget is met to the unit (peft drops all).
Why: the same number of ranks does more where importance differs by layer; the final fine-tuning runs at target_r on average.
Cost: two more values for each adapter value (importance and uncertainty), in the state dict, so that resuming is exact.
Shapes: x (..., K) -> (..., N).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.adapters.adapted import working
from zero2llm.adapters.lora import ALL_LINEAR, check_factors, factors
from zero2llm.adapters.lowrank import adapted
from zero2llm.core.config import config


@config
class AdaLoRAConfig:
    kind: Literal["adalora"] = "adalora"
    init_r: int = 12
    target_r: int = 8  # on average, at the end
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    lr_ratio: float = 1.0
    beta1: float = 0.85  # of the importance
    beta2: float = 0.85  # of its uncertainty
    warmup: int = 0  # steps at init_r
    final: int = 0  # steps at the ranks that remain
    every: int = 1  # steps between two allocations
    orth_weight: float = 0.5

    def __post_init__(self) -> None:
        check_factors(self.init_r, self.alpha, self.dropout, self.targets, self.lr_ratio)
        if not 1 <= self.target_r < self.init_r:
            raise ValueError(f"adalora needs 1 <= target_r = {self.target_r} < init_r = {self.init_r}")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1) or self.orth_weight < 0:
            raise ValueError(
                f"beta1 = {self.beta1} and beta2 = {self.beta2} must be in (0, 1), orth_weight = {self.orth_weight} not negative"
            )
        if min(self.warmup, self.final) < 0 or self.every < 1:
            raise ValueError(
                f"warmup = {self.warmup} and final = {self.final} may not be negative, every = {self.every} at least 1"
            )

    def check(self, total: int) -> None:
        """Raises ValueError if ``total`` steps leave none for the budget to fall."""
        if self.warmup >= total - self.final:
            raise ValueError(f"adalora: warmup = {self.warmup} and final = {self.final} leave no step of {total} in between")

    @property
    def scale(self) -> float:
        return self.alpha / (self.init_r + 1e-5)

    def build(self, weight: Tensor) -> AdaLoRA:
        return AdaLoRA(weight, self)

    def budget(self, step: int, total: int, n: int) -> int:
        """Ranks that ``n`` projections have together after ``step`` of ``total`` steps."""
        first, last = self.init_r * n, self.target_r * n
        if step <= self.warmup:
            return first
        if step > total - self.final:
            return last
        left = 1 - (step - self.warmup) / (total - self.final - self.warmup)
        return int((first - last) * left**3 + last)


class AdaLoRA(nn.Module):
    def __init__(self, weight: Tensor, cfg: AdaLoRAConfig):
        super().__init__()
        self.cfg, self.scale = cfg, cfg.scale
        self.a, self.b = factors(weight, cfg.init_r)
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        self.e = nn.Parameter(self.a.new_zeros(cfg.init_r, 1))
        for name in "aeb":
            self.register_buffer(f"{name}_importance", torch.zeros_like(self.get_parameter(name)))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(self.get_parameter(name)))
        self.register_buffer("kept", torch.ones(cfg.init_r, dtype=torch.bool, device=weight.device))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return adapted(base, x, self.a * self.e, self.b, self.scale, self.cfg.dropout if self.training else 0.0)

    def merged(self, weight: Tensor) -> Tensor:
        return (weight.to(self.a.dtype) + self.scale * (self.b @ (self.a * self.e))).to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """With the singular values in A, and without those that are out."""
        alive = self.e[:, 0] != 0
        return (self.a * self.e)[alive], self.b[:, alive]

    def rates(self) -> dict[str, float]:
        return {"a": 1.0, "e": 1.0, "b": self.cfg.lr_ratio}

    def observe(self) -> None:
        """Take the importance of this step into the averages."""
        for name in "aeb":
            p = self.get_parameter(name)
            if p.grad is None:
                raise ValueError(
                    "adalora: no gradient to judge by; call after_step between the optimizer's step and zero_grad"
                )
            importance, uncertainty = self.get_buffer(f"{name}_importance"), self.get_buffer(f"{name}_uncertainty")
            now = (p * p.grad).abs()
            importance.lerp_(now, 1 - self.cfg.beta1)
            uncertainty.lerp_((now - importance).abs(), 1 - self.cfg.beta2)

    def scores(self) -> Tensor:
        """(r,) of the triplets."""
        a, e, b = (self.get_buffer(f"{n}_importance") * self.get_buffer(f"{n}_uncertainty") for n in "aeb")
        return e[:, 0] + a.mean(1) + b.mean(0)


def penalty(model: nn.Module) -> Tensor:
    """What joins the mean loss per token, so that A and B stay close to orthogonal; 0 without an active AdaLoRA."""
    found = [adapter for _, adapter in working(model) if isinstance(adapter, AdaLoRA)]
    if not found:
        return torch.zeros((), device=next(model.parameters()).device)
    norms = []
    for adapter in found:
        for gram in (adapter.a @ adapter.a.t(), adapter.b.t() @ adapter.b):
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return found[0].cfg.orth_weight * torch.stack(norms).mean()


@torch.no_grad()
def after_step(model: nn.Module, step: int, total: int) -> None:
    """Between the optimizer's step number ``step`` (the first is 1) and its zero_grad: judge, allocate, put out.

    Does nothing without an active AdaLoRA. Raises ValueError if gradients are gone, or ``total`` leaves no room.
    """
    found = [adapter for _, adapter in working(model) if isinstance(adapter, AdaLoRA)]
    if not found:
        return
    cfg, settled = found[0].cfg, total - found[0].cfg.final
    cfg.check(total)
    if step < settled:
        for adapter in found:
            adapter.observe()
    if step == settled or (cfg.warmup < step < settled and step % cfg.every == 0):
        _allocate(found, cfg.budget(step, total, len(found)))
    elif step < settled:
        return  # what was put out last time may learn again until the next allocation
    for adapter in found:
        adapter.e.masked_fill_(~adapter.kept[:, None], 0.0)


def _allocate(found: list[AdaLoRA], budget: int) -> None:
    scores = torch.cat([adapter.scores() for adapter in found])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = True
    for adapter, part in zip(found, kept.split([len(adapter.kept) for adapter in found]), strict=True):
        adapter.kept.copy_(part)
