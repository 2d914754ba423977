"""Policy gradients by hand: every method's loss and advantage in loops, and what must hold of each of them.

The checks take a method, so that test_rl_bugs.py can hand them wrong ones.
"""

import math
from dataclasses import replace

import pytest
import torch

from tests.golden.rl_cases import ADV, CONFIGS, EXACT, LENGTHS, T, extra, loss_of, mask_of, played, rows
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.parallel.plan import World
from zero2llm.train.rl import bapo, trpo
from zero2llm.train.rl.bapo import BAPOConfig
from zero2llm.train.rl.kl import KLConfig, RewardKLConfig, k1, k2, k3, penalty
from zero2llm.train.rl.methods import MethodConfig
from zero2llm.train.rl.policy import PolicyLoss
from zero2llm.train.rl.reinforce import REINFORCEConfig
from zero2llm.train.rl.trpo import Policy, TRPOConfig, conjugate_gradient, full_step, trust_step

METHODS = list(CONFIGS)
low_high = {"grpo": (0.8, 1.2), "dr_grpo": (0.8, 1.2), "dapo": (0.8, 1.28), "bapo": (0.75, 1.4), "ppo": (0.8, 1.2), "reinforce_pp": (0.8, 1.2)}
dual = {"bapo": 1.5, "ppo": 1.5}


# Losses in loops. Tokens are scalars; gradients come from the same loops.


def clipped(r, a, low, high):
    """min(r a, clip(r) a), written as its four cases."""
    if a >= 0:
        return r * a if r <= high else high * a + 0 * r
    return r * a if r >= low else low * a + 0 * r


def token_term(name, logp, old, a):
    """- gain of one token."""
    r = (logp - old).exp()
    if name == "cispo":
        return -min(float(r.detach()), 1.3) * a * logp
    if name == "sapo":
        tau = 1.0 if a > 0 else 1.05
        return -4 / tau / (1 + (-tau * (r - 1)).exp()) * a
    if name == "trpo":
        return -r * a
    if name == "reinforce":
        return -a * logp
    gain = clipped(r, a, *low_high[name])
    if name in dual and a < 0 and gain < dual[name] * a:
        gain = dual[name] * a + 0 * r
    return -gain


def answer_term(name, logp, old, a):
    """- gain of a whole answer, from lists of its tokens."""
    away = [x - y for x, y in zip(logp, old, strict=True)]
    if name == "rloo":
        return -clipped(sum(away).exp(), a, 0.8, 1.2)
    if name.startswith("gspo"):
        return -clipped((sum(away) / len(away)).exp(), a, 0.95, 1.08)
    held = [l if (l <= 0.3 if a > 0 else l >= -0.2) else (0.3 if a > 0 else -0.2) + 0 * l for l in away]
    return -a * (sum(held) / len(held)).exp()


def loss_by_hand(name, logp, old, adv):
    total, tokens = 0.0, sum(LENGTHS)
    for i, n in enumerate(LENGTHS):
        if name in ("gspo", "gspo_token", "gmpo", "rloo"):
            total = total + answer_term(name, list(logp[i, :n]), list(old[i, :n]), float(adv[i, 0])) / 4
            continue
        weight = {"grpo": 1 / (4 * n), "sapo": 1 / (4 * n), "dr_grpo": 1 / (4 * 9), "reinforce": 1 / 4}.get(name, 1 / tokens)
        for t in range(n):
            total = total + weight * token_term(name, logp[i, t], old[i, t], float(adv[i, t if adv.shape[1] > 1 else 0]))
    return total


def check_loss(name, method):
    per_token = name in ("dapo", "bapo", "ppo", "reinforce_pp", "trpo", "cispo", "grpo", "sapo", "dr_grpo")
    for seed in range(3):
        logp, old, adv, mask = rows(seed)
        for a in (adv, adv + torch.randn(4, T, dtype=torch.double)) if per_token else (adv,):
            ours, made = loss_of(method, logp, old, a, mask)
            theirs = loss_by_hand(name, logp, old, a)
            torch.testing.assert_close(ours, theirs, **EXACT)
            torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (ours, theirs)), **EXACT)


# Advantages in loops


def mean(xs):
    return sum(xs) / len(xs)


def reward_by_hand(p, i, beta):
    return float(p.reward[i]) - beta * sum(float(p.old[i, t] - p.ref[i, t]) for t in range(p.mask.shape[1]) if p.mask[i, t])


def advantage_by_hand(name, p):
    n, width = p.mask.shape
    out = torch.zeros(n, width, dtype=torch.double)
    groups = [[i for i in range(g, g + p.samples) if p.ok[i]] for g in range(0, n, p.samples)]
    if name in ("reinforce_pp", "ppo"):
        return per_token_by_hand(name, p)
    for group in groups:
        for i in group:
            if name == "rloo":
                a = reward_by_hand(p, i, 0.05) - mean([reward_by_hand(p, j, 0.05) for j in group if j != i])
            elif name == "reinforce":
                a = float(p.reward[i]) - mean([float(p.reward[j]) for g in groups for j in g])
            else:
                r = [float(p.reward[j]) for j in group]
                a = float(p.reward[i]) - mean(r)
                a = a if name == "dr_grpo" else a / (math.sqrt(sum((x - mean(r)) ** 2 for x in r) / (len(r) - 1)) + 1e-4)
            out[i] = a
    return out * p.mask


def per_token_by_hand(name, p):
    beta, lam = (0.05, 0.95) if name == "ppo" else (0.01, None)
    found = {}
    for i in range(len(p.mask)):
        mine = [t for t in range(p.mask.shape[1]) if p.mask[i, t]]
        later, next_value = 0.0, 0.0
        for t in reversed(mine):
            r = -beta * float(p.old[i, t] - p.ref[i, t]) + (float(p.reward[i]) if t == mine[-1] else 0)
            if name == "ppo":
                later = r + next_value - float(p.values[i, t]) + lam * later
                next_value = float(p.values[i, t])
            else:
                later = r + later
            found[i, t] = later
    m = mean(list(found.values()))
    std = math.sqrt(sum((x - m) ** 2 for x in found.values()) / (len(found) - 1))
    out = torch.zeros(p.mask.shape, dtype=torch.double)
    for (i, t), value in found.items():
        out[i, t] = (value - m) / std
    return out


def check_advantage(name, method):
    for p in (played(), played(seed=1), played(ok=(True, True, False, True, True, True))):
        ours = (method.advantages(p).expand_as(p.old)) * p.mask
        torch.testing.assert_close(ours, advantage_by_hand(name, p), atol=1e-7, rtol=0)  # 1e-8 beside the variance
    if name == "ppo":
        p = played(seed=2)
        adv, target = method.also.critic.estimate(p)
        torch.testing.assert_close(target, (adv + p.values) * p.mask, **EXACT)


# What must hold of every method


def check_extreme(name, method):
    for far in (80.0, -80.0):
        logp, old, adv, mask = rows(0)
        logp = (old + far * mask).detach().requires_grad_()
        loss, _ = loss_of(method, logp, old, adv, mask)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


def check_split(name, method):
    logp, old, adv, mask = rows(2)
    whole = method.surrogate(logp, old, adv, mask, extra(old, adv))
    for cut in (1, 2, 3):
        parts = [method.surrogate(*(x[s] for x in (logp, old, adv, mask)), extra(old[s], adv[s])) for s in (slice(0, cut), slice(cut, 4))]
        torch.testing.assert_close(parts[0].total + parts[1].total, whole.total, **EXACT)
        assert parts[0].count + parts[1].count == whole.count


def check_padding(name, method):
    found = []
    for width in (T, T + 5):
        logp, old, adv, mask = rows(1, width)
        noise = torch.where(mask, 0.0, 3.0).double()  # what stands behind an answer is not 0 in general
        loss, _ = loss_of(method, logp + noise, old - noise, adv, mask)
        grad = torch.autograd.grad(loss, logp)[0]
        assert not grad[~mask].any()
        found.append((loss, grad[:, :T]))
    torch.testing.assert_close(*found, **EXACT)


def check_first_update(name, method):
    """ratio 1, nothing clipped, and the gradient of REINFORCE with this method's weights."""
    _, old, adv, mask = rows(3)
    logp = old.clone().requires_grad_()
    loss, made = loss_of(method, logp, old, adv, mask)
    assert not (made.clipped & mask).any()
    lengths = torch.tensor(LENGTHS)[:, None]
    answer = {"dr_grpo": torch.full((4, 1), 1 / 36), "reinforce": torch.full((4, 1), 0.25), "rloo": torch.full((4, 1), 0.25)}
    weight = answer.get(name, 1 / (4 * lengths) if name in ("grpo", "gspo", "gspo_token", "gmpo", "sapo") else torch.full((4, 1), 1 / 18))
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], -weight.double() * adv * mask, atol=1e-7, rtol=0)


CHECKS = [check_loss, check_advantage, check_extreme, check_split, check_padding, check_first_update]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_method(name, check):
    check(name, CONFIGS[name].build())


@pytest.mark.parametrize("name", METHODS)
def test_configs_come_back_from_data(name):
    assert parse(MethodConfig, to_dict(CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"kind": "grpo", "clip": 1.5}, "clip = 1.5"), ({"kind": "dr_grpo", "length": 0}, "length = 0"), ({"kind": "dapo", "rounds": 0}, "rounds = 0"),
        ({"kind": "gspo", "clip_high": 0}, "clip_high = 0"), ({"kind": "gmpo", "clip_low": -1}, "clip_low = -1"), ({"kind": "cispo", "cap": 0.5}, "cap = 0.5"),
        ({"kind": "sapo", "tau_bad": 0}, "tau_bad = 0"), ({"kind": "bapo", "low": [0.9, 0.6]}, "low = "), ({"kind": "rloo", "clip": 0}, "clip = 0"),
        ({"kind": "reinforce_pp", "gamma": 2}, "gamma = 2"), ({"kind": "ppo", "dual": 1}, "dual = 1"), ({"kind": "trpo", "delta": 0}, "delta = 0"),
        ({"kind": "rft", "most": 0}, "most >= 1"), ({"kind": "online_dpo", "rounds": 0}, "rounds = 0"), ({"kind": "ppo", "reward_kl": {"beta": 0}}, "beta = 0"),
        ({"kind": "online_dpo", "dpo": {"reference": "precomputed"}}, "precomputed"),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse(MethodConfig, data)


def test_reinforce_without_baseline_and_with_kl():
    p = played()
    adv = REINFORCEConfig(baseline="none").build().advantages(p)
    torch.testing.assert_close(adv.squeeze(1), p.reward, **EXACT)
    adv = REINFORCEConfig(baseline="none", reward_kl=RewardKLConfig(beta=0.3)).build().advantages(p)
    torch.testing.assert_close(adv.squeeze(1), torch.tensor([reward_by_hand(p, i, 0.3) for i in range(6)], dtype=torch.double), **EXACT)


# KL estimators: the table of kl.py, by exact enumeration over 6 tokens


def kl_table():
    torch.manual_seed(0)
    z, ref = torch.randn(6, dtype=torch.double, requires_grad=True), torch.randn(6, dtype=torch.double).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.exp()
    grad = lambda x: torch.autograd.grad(x, z, retain_graph=True)[0]
    reverse, forward = (p * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    expected = lambda x: (p.detach() * x).sum()  # of a loss whose tokens were sampled from pi
    return logp, ref, p, grad, reverse, forward, expected


def test_kl_estimators_as_values():
    logp, ref, p, _, reverse, _, expected = kl_table()
    torch.testing.assert_close(expected(k1(logp, ref)), reverse, **EXACT)
    torch.testing.assert_close(expected(k3(logp, ref)), reverse, **EXACT)
    assert (k3(logp, ref) >= 0).all() and (expected(k2(logp, ref)) - reverse).abs() > 1e-2
    variance = lambda x: expected((x - reverse) ** 2)
    assert variance(k3(logp, ref)) < variance(k1(logp, ref))


def test_kl_estimators_as_losses():
    logp, ref, _, grad, reverse, forward, expected = kl_table()
    old = logp.detach()
    torch.testing.assert_close(grad(expected(k1(logp, ref))), torch.zeros(6, dtype=torch.double), **EXACT)
    torch.testing.assert_close(grad(expected(penalty("k2", logp, old, ref))), grad(reverse), **EXACT)
    torch.testing.assert_close(grad(expected(penalty("k3", logp, old, ref))), grad(forward), **EXACT)
    torch.testing.assert_close(grad(expected(penalty("ratio_k3", logp, old, ref))), grad(reverse), **EXACT)
    torch.testing.assert_close(grad(expected((logp - old).exp() * k1(logp, ref))), grad(reverse), **EXACT)


def test_the_ratio_also_corrects_for_tokens_of_another_policy():
    logp, ref, _, grad, reverse, _, _ = kl_table()
    old = torch.randn(6, dtype=torch.double).log_softmax(0)
    torch.testing.assert_close(grad((old.exp() * penalty("ratio_k3", logp, old, ref)).sum()), grad(reverse), **EXACT)


def test_kl_is_finite_far_away():
    for far in (80.0, -80.0):
        logp = torch.tensor([far], requires_grad=True)
        for name in ("k2", "k3", "ratio_k3"):
            value = penalty(name, logp, torch.zeros(1), torch.zeros(1)).sum()
            assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, logp)[0]).all()


def test_adaptive_kl_moves_by_at_most_a_fifth_of_its_gain():
    kl = RewardKLConfig(beta=1.0, target=2.0, gain=0.5).build()
    for seen, factor in ((100.0, 1.1), (0.0, 0.9), (2.0, 1.0), (2.2, 1.05)):
        before = kl.beta
        kl.adapt(seen)
        assert kl.beta == pytest.approx(before * factor)
    fixed = RewardKLConfig(beta=1.0).build()
    fixed.adapt(100.0)
    assert fixed.beta == 1.0


# BAPO's search


def brute_force(negative, positive, target):
    """The documented order, written as a list of all places that the walk may come by."""
    places = [(low, 0) for low in range(len(negative))] + [(len(negative) - 1, high) for high in range(1, len(positive))]
    good = [place for place in places if positive[place[1]] >= target * negative[place[0]]]
    return good[0] if good else places[-1]


def check_bapo_search():
    cfg = BAPOConfig()
    lows, highs = bapo.walk(*cfg.low, cfg.step), bapo.walk(*cfg.high, cfg.step)
    assert lows[0] == 0.6 and lows[-1] == 0.9 and highs[0] == 1.2 and highs[-1] == 3.0
    assert all(0 < b - a <= cfg.step + 1e-9 for walk in (lows, highs) for a, b in zip(walk[:-1], walk[1:], strict=True))
    met = set()
    for seed in range(20):
        logp, old, adv, mask = rows(seed, noise=0.8)
        r = (logp - old).detach().exp()
        found = bapo.pushes(r, adv, mask, lows, highs).tolist()
        negative, positive = found[: len(lows)], found[len(lows) :]
        cells = [(float(r[i, t]), float(adv[i, 0])) for i in range(4) for t in range(LENGTHS[i])]
        assert negative == pytest.approx([-sum(x * a for x, a in cells if a < 0 and x >= low) for low in lows])
        assert positive == pytest.approx([sum(x * a for x, a in cells if a > 0 and x <= high) for high in highs])
        assert all(a <= b for a, b in zip(positive[:-1], positive[1:], strict=True)), "raising high never lowers P"
        assert all(a >= b for a, b in zip(negative[:-1], negative[1:], strict=True)), "raising low never raises N"
        for target in (0.0, 0.5, 1.0, 2.0, 1e9):
            place = bapo.search(negative, positive, target)
            assert place == brute_force(negative, positive, target)
            met.add(place)
    assert len(met) > 6
    assert bapo.search([0.0, 0.0], [0.0, 0.0], 0.5) == (0, 0), "no bad token"
    assert bapo.search([1.0, 1.0], [0.0, 0.0], 0.5) == (1, 1), "no good token"


def check_bapo_bounds():
    logp, old, adv, mask = rows(5, noise=0.8)
    tokens = torch.where(mask, 1, IGNORE)
    batch = Batch(tokens.clamp(min=0), tokens, Seq.ragged(torch.tensor(LENGTHS), T), {"old": old, "adv": adv})
    found = BAPOConfig(target=0.0, dual=None).build().bounds(logp.detach(), batch, World())
    assert found["low"].tolist() == pytest.approx([0.6] * 4) and found["high"].tolist() == pytest.approx([1.2] * 4)
    method = BAPOConfig(target=0.0, dual=None).build()
    made = method.surrogate(logp, old, adv, mask, {k: v.double() for k, v in found.items()})
    total = -sum(clipped((logp[i, t] - old[i, t]).exp(), ADV[i], 0.6, 1.2) for i in range(4) for t in range(LENGTHS[i]))
    torch.testing.assert_close(made.total, total, atol=1e-6, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (made.total, total)), atol=1e-6, rtol=0)
    far = BAPOConfig(target=1e9).build().bounds(logp.detach(), batch, World())
    assert float(far["low"][0]) == pytest.approx(0.9) and float(far["high"][0]) == pytest.approx(3.0)


def test_bapo_search():
    check_bapo_search()


def test_bapo_bounds():
    check_bapo_bounds()


# TRPO's step on a model that is small enough to build H


def small_policy(score=False):
    torch.manual_seed(0)
    block = {"mixer": {"kind": "gqa", "n_heads": 2, "position": {"kind": "rope", "base": 50.0}}, "ffn": {"kind": "mlp", "hidden": 6}, "norm": {"kind": "rms"}}
    data = {"vocab_size": 5, "d_model": 4, "max_len": 8, "layers": {"pattern": ["b"]}, "blocks": {"b": block}, "tie_embeddings": True, "score_head": score}
    model = LM(parse(ModelConfig, data)).double()
    lengths = torch.tensor([6, 4, 5])
    tokens = torch.randint(0, 5, (3, 6))
    seq = Seq.ragged(lengths, 6)
    batch = Batch.shifted(tokens, torch.arange(6)[None] >= 2, seq)
    objective = PolicyLoss(TRPOConfig().build(), 1.3)
    old = torch.zeros(3, 6, dtype=torch.double)
    batch = replace(batch, extra={"old": old, "adv": torch.tensor([[1.0], [-0.5], [0.7]]).double().expand(3, 6), "fresh": torch.ones(3)})
    with torch.no_grad():
        from zero2llm.train.rl.policy import policy_logps

        old = policy_logps(model, model(batch.tokens, batch.seq)[0], batch.labels, 1.3)
    return Policy(model, objective, replace(batch, extra=batch.extra | {"old": old}).split(2), World())


def hessian(policy):
    """Of mean KL(old || new), by torch.func on the flat weights."""
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    start = policy.weights()
    shapes = [p.shape for p in policy.params]

    def mean_kl(weights):
        parts = [w.view(s) for w, s in zip(weights.split([math.prod(s) for s in shapes]), shapes, strict=True)]
        total = 0.0
        for part, was in zip(policy.micro, old, strict=True):
            hidden, _ = torch.func.functional_call(policy.model, dict(zip(names, parts, strict=True)), (part.tokens, part.seq))
            head = parts[names.index("embed.weight")]
            logp = ((hidden @ head.t())[part.labels != IGNORE] / 1.3).log_softmax(-1)
            total = total + (was.exp() * (was - logp)).sum()
        return total / policy.tokens

    with torch.no_grad():
        old = [policy.logp(part) for part in policy.micro]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(mean_kl, start)


def check_trpo():
    policy, cfg = small_policy(), TRPOConfig(damping=0.1, cg_steps=400)
    H = hessian(policy)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for seed in range(3):
            v = torch.randn(len(H), dtype=torch.double, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(policy.fisher(v), H @ v, atol=1e-9, rtol=0)
        gradient, sums = policy.gradient()
        assert float(sums["ratio"][0] / sums["ratio"][1]) == pytest.approx(1)
        damped = H + 0.1 * torch.eye(len(H), dtype=torch.double)
        step, factor = full_step(policy, gradient, cfg)
        torch.testing.assert_close(step / factor, torch.linalg.solve(damped, -gradient), atol=1e-7, rtol=0)
        assert float(step @ damped @ step) / 2 == pytest.approx(cfg.delta, rel=1e-9)
        assert float(step @ gradient) < 0
        before, old = policy.loss(), [policy.logp(part).detach() for part in policy.micro]
        done = trust_step(policy, gradient, cfg)
        new = [policy.logp(part).detach() for part in policy.micro]
        kl = sum(sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for o, n in zip(old, new, strict=True) for x, y in zip(o.tolist(), n.tolist(), strict=True))
        assert done.kl == pytest.approx(kl / 9, rel=1e-9), "9 labels; from old to new"
        assert 0 < done.kl <= cfg.delta and done.scale > 0 and policy.loss() < before


def check_cg():
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(9, 9, dtype=torch.double, generator=g)
        a, b = a @ a.t() + torch.eye(9), torch.randn(9, dtype=torch.double, generator=g)
        torch.testing.assert_close(conjugate_gradient(lambda v, a=a: a @ v, b, 40), torch.linalg.solve(a, b), atol=1e-8, rtol=0)
    assert not conjugate_gradient(lambda v: v, torch.zeros(3), 5).any()


def check_trpo_holds_the_region():
    """A step that would leave the region is halved until it does not; where nothing helps the weights stay."""
    policy = small_policy()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient, _ = policy.gradient()
        start = policy.weights()
        done = trust_step(policy, -gradient, TRPOConfig(delta=1e-5, halvings=3))
        assert done == trpo.Step(0.0, 0.0, 0.0) and torch.equal(policy.weights(), start)
        done = trust_step(policy, gradient, TRPOConfig(delta=0.01, damping=1e-3))
        assert 0 < done.kl <= 0.01 and done.scale == 0.5


def test_trpo_step():
    check_trpo()


def test_conjugate_gradient():
    check_cg()


def test_trpo_holds_the_region():
    check_trpo_holds_the_region()


def test_kl_weight_must_be_positive():
    with pytest.raises(ValueError, match="weight = 0"):
        KLConfig(weight=0)
    assert mask_of().sum() == 18
