"""Trust region policy optimisation: the step that gains most, to first order, among those that move the policy by at most delta.

    maximise g's  subject to  1/2 s'Hs <= delta,    g = grad of mean_t r_t A_t,    H = Hessian of mean_t KL(pi_old || pi) = Fisher
    H x = g by conjugate gradient,    s = sqrt(2 delta / x'Hx) x,    then s, s/2, s/4 ... until the gain is real and KL <= delta

Source: 1502.05477 section 6 and appendix C; delta 0.01, damping 0.1 and 10 steps of CG are those of OpenAI Baselines (trpo_mpi, mujoco).
Damping is part of H, under the root too.
H is never built: H v is the gradient of (grad KL)'v, a second backward pass through the first.
The honest exception: a step needs a solver, trials and a way back, so this method has its own loop, `fit_trpo`, with fit.py's state,
hooks and batches, and neither optimizer nor learning rate; what is logged as lr is what x was multiplied by.
Cost: 2 * cg_steps passes through the graph of a step, and (tokens, V) floats for the old distribution. PPO gets most of it for less.
Limits: fp32 (CG in fp64), attention by its plain formula, since fused kernels have no second derivative.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.parallel.plan import World
from zero2llm.train.fit import FitState, Hook
from zero2llm.train.guard import NonFiniteError, find_first_bad
from zero2llm.train.rl.advantages import standardised
from zero2llm.train.rl.aggregate import per_token
from zero2llm.train.rl.policy import Also, Played, PolicyLoss, Sums, Surrogate
from zero2llm.train.rl.ratios import token_ratio


@config
class TRPOConfig:
    """halvings : trials after the full step; if none will do, the weights stay."""

    kind: Literal["trpo"] = "trpo"
    delta: float = 0.01
    damping: float = 0.1
    cg_steps: int = 10
    halvings: int = 10

    def __post_init__(self) -> None:
        if self.delta <= 0 or self.damping < 0 or self.cg_steps < 1 or self.halvings < 0:
            raise ValueError(
                f"trpo: delta = {self.delta} must be positive, cg_steps = {self.cg_steps} at least 1, damping = {self.damping} and "
                f"halvings = {self.halvings} not negative"
            )

    def build(self) -> TRPO:
        return TRPO()


class TRPO:
    aggregate, kl, also = staticmethod(per_token), None, Also()

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        return Surrogate(*self.aggregate(-token_ratio(logp, old, mask) * adv, mask), torch.zeros_like(mask))


class NoState:
    """Where a checkpoint asks for an optimizer: there is none, and nothing to keep."""

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors, list(tensors)


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, small: float = 1e-10) -> Tensor:
    """x with product(x) = b, for a symmetric positive product; ends early once the residual is ``small`` of b."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr, enough = r.clone(), r @ r, small**2 * (b @ b)
    for _ in range(steps):
        if rr <= enough:
            break
        hp = product(p)
        alpha = rr / (p @ hp)
        x, r = x + alpha * p, r - alpha * hp
        before, rr = rr, r @ r
        p = r + rr / before * p
    return x


class Policy:
    """The model's trainable weights as one fp64 vector, and what a step asks of it; sums are over micro-batches and ranks."""

    def __init__(self, model: nn.Module, objective: PolicyLoss, micro: Sequence[Batch], world: World):
        self.model, self.objective, self.micro, self.world = model, objective, micro, world
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.tokens = max(float(world.sum(torch.tensor(float(sum(part.n_targets() for part in micro))))), 1.0)

    def weights(self) -> Tensor:
        return flat([p.detach() for p in self.params])

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        for p, part in zip(self.params, weights.split([p.numel() for p in self.params]), strict=True):
            p.copy_(part.view_as(p))

    def logp(self, part: Batch) -> Tensor:
        """(n, V) of the labelled positions."""
        hidden, _ = self.model(part.tokens, part.seq)
        logits = self.model.logits(hidden[part.labels != IGNORE])[:, : self.objective.vocab]
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.objective.temperature).log_softmax(-1)

    def loss(self) -> float:
        with torch.no_grad():
            return float(self.world.sum(sum(self.objective(self.model, part).total.double() for part in self.micro))) / self.tokens

    def gradient(self) -> tuple[Tensor, Sums]:
        """Of the loss, and its metrics."""
        total, sums = torch.zeros_like(self.weights()), {}
        for part in self.micro:
            loss = self.objective(self.model, part)
            total += flat(self.grad(loss.total))
            for name, (value, n) in loss.metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + value, old[1] + n)
        return self.world.sum(total) / self.tokens, sums

    def fisher(self, v: Tensor) -> Tensor:
        """H v at the present weights."""
        total, parts = torch.zeros_like(v), v.split([p.numel() for p in self.params])
        for part in self.micro:
            logp = self.logp(part)
            slope = self.grad(divergence(logp.detach(), logp), create_graph=True)
            total += flat(self.grad(sum((g * x.view_as(g).to(g.dtype)).sum() for g, x in zip(slope, parts, strict=True))))
        return self.world.sum(total) / self.tokens

    def grad(self, of: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of, self.params, create_graph=create_graph, allow_unused=True, materialize_grads=True)

    @torch.no_grad()
    def moved(self, old: Sequence[Tensor]) -> float:
        """mean KL(old || now) per token."""
        parts = (divergence(was, self.logp(part)).double() for was, part in zip(old, self.micro, strict=True))
        return float(self.world.sum(sum(parts))) / self.tokens


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in tensors])


def divergence(old: Tensor, new: Tensor) -> Tensor:
    """sum of KL(old || new) over rows of log-probabilities (n, V)."""
    return (old.exp() * (old - new)).sum()


@dataclass(frozen=True)
class Step:
    """scale : share of the full step that was taken, 0 = none.  factor : what the solution x was multiplied by.  kl : per token."""

    scale: float
    factor: float
    kl: float


def full_step(policy: Policy, gradient: Tensor, cfg: TRPOConfig) -> tuple[Tensor, float]:
    """The step that goes down the loss' ``gradient`` to the border of the region, and its factor."""
    product = lambda v: policy.fisher(v) + cfg.damping * v
    x = conjugate_gradient(product, -gradient, cfg.cg_steps)
    curvature = float(x @ product(x))
    factor = (2 * cfg.delta / curvature) ** 0.5 if curvature > 0 else 0.0
    return factor * x, factor


def trust_step(policy: Policy, gradient: Tensor, cfg: TRPOConfig) -> Step:
    """Changes the weights, or leaves them where no trial gained anything within the region."""
    start, before = policy.weights(), policy.loss()
    with torch.no_grad():
        old = [policy.logp(part) for part in policy.micro]
    step, factor = full_step(policy, gradient, cfg)
    for i in range(cfg.halvings + 1):
        policy.put(start + 0.5**i * step)
        kl = policy.moved(old)
        if policy.loss() < before and kl <= cfg.delta:
            return Step(0.5**i, 0.5**i * factor, kl)
    policy.put(start)
    return Step(0.0, 0.0, 0.0)


def fit_trpo(
    model: nn.Module, objective: PolicyLoss, batches: Iterable[Batch], cfg: TRPOConfig, *, steps: int, micro_rows: int = 8,
    state: FitState | None = None, hooks: Sequence[Hook] = (),
) -> FitState:  # fmt: skip
    """`fit` for this method. Save its checkpoints with `NoState()`; resumes as fit does. Raises NonFiniteError, ValueError as fit."""
    world, device, state = World.current(), next(model.parameters()).device, state or FitState()
    stream = iter(batches)
    model.train()
    while state.step < steps:
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            raise ValueError(f"the data ended after {state.step} of {steps} steps")
        micro = [part.to(device) for part in batch.split(micro_rows)]
        policy = Policy(model, objective, micro, world)
        with sdpa_kernel(SDPBackend.MATH):
            gradient, sums = policy.gradient()
            if not torch.isfinite(gradient).all():
                raise NonFiniteError(find_first_bad(model, objective, micro, state.step))
            step = trust_step(policy, gradient, cfg) if gradient.any() else Step(0.0, 0.0, 0.0)
        real = float(world.sum(torch.tensor(float(sum(int((p.seq.seg != 0).sum()) for p in micro)))))
        took = time.perf_counter() - began
        state.step, state.tokens, state.seconds = state.step + 1, state.tokens + int(real), state.seconds + took
        state.metrics = {name: float(world.sum(value) / world.sum(n).clamp(min=1)) for name, (value, n) in sums.items()}
        state.metrics |= {"step_kl": step.kl, "step_scale": step.scale, "lr": step.factor, "grad_norm": float(gradient.norm())}
        state.metrics |= {"tokens_per_s": real / took, "step_s": took, "skipped": float(step.scale == 0)}
        for hook in hooks:
            hook(state)
    return state
