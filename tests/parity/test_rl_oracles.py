"""Policy gradients against TRL, torchtune, verl and torchrl: loss and gradient in fp64, ragged rows, both signs, beyond both clips."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tests.golden.rl_cases import EXACT, T, loss_of, mask_of, rows
from zero2llm.train.rl.advantages import gae, left_out, returns, standardised, whitened
from zero2llm.train.rl.bapo import BAPOConfig
from zero2llm.train.rl.cispo import CISPOConfig
from zero2llm.train.rl.dapo import DAPOConfig
from zero2llm.train.rl.dr_grpo import DrGRPOConfig
from zero2llm.train.rl.gmpo import GMPOConfig
from zero2llm.train.rl.grpo import GRPOConfig
from zero2llm.train.rl.gspo import GSPOConfig
from zero2llm.train.rl.kl import RewardKLConfig, penalty
from zero2llm.train.rl.ppo import PPOConfig, value_loss
from zero2llm.train.rl.reinforce_pp import REINFORCEPPConfig
from zero2llm.train.rl.rewards import Answer, OverlongConfig
from zero2llm.train.rl.rloo import RLOOConfig
from zero2llm.train.rl.sapo import SAPOConfig


def imported(name, **stubs):
    """A module whose own imports ask for packages that nothing here needs: those are stood in for, and taken away again."""
    before = {key: sys.modules.get(key) for key in stubs}
    sys.modules.update(stubs)
    try:
        return importlib.import_module(name)
    finally:
        for key, value in before.items():
            if value is None:
                del sys.modules[key]
            else:
                sys.modules[key] = value


def empty(name, **content):
    module = types.ModuleType(name)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    module.__dict__.update(content)
    return module


def need(*names):
    """As importorskip, for packages that cannot be imported without the stubs."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def verl():
    need("verl", "tensordict", "omegaconf", "orjson")
    ray = [name for name in ("ray", "ray.experimental", "ray.experimental.state", "ray.util", "codetiming") if name not in sys.modules]
    return imported("verl.trainer.ppo.core_algos", **{name: MagicMock(__spec__=None) for name in ray})


@pytest.fixture(scope="module")
def torchtune():
    need("torchtune")
    form = type("NF4Tensor", (), {})
    names = {"torchao": empty("torchao"), "torchao.dtypes": empty("torchao.dtypes")}
    names["torchao.dtypes.nf4tensor"] = empty("torchao.dtypes.nf4tensor", NF4Tensor=form, linear_nf4=None, to_nf4=None)
    imported("torchtune.rlhf.loss", **names)
    return importlib.import_module("torchtune.rlhf")


class Accelerator:
    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True
    gather = gather_for_metrics = staticmethod(lambda x: x)

    def reduce(self, x, reduction):
        return x


def trl_loss(trainer, logp, old, adv, mask, ref=None, **own):
    """A trainer's `_compute_loss` without the trainer."""
    args = SimpleNamespace(use_bias_correction_kl=own.pop("bias_correction", True), delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.0625,
                           steps_per_generation=1)  # fmt: skip
    stub = SimpleNamespace(
        accelerator=Accelerator(), _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, model=torch.nn.Linear(1, 1),
        aux_loss_enabled=False, args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, beta=0.0,
        importance_sampling_level="token", loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, max_completion_length=9,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    stub.__dict__.update(own)
    ids = torch.zeros(len(mask), 2, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": mask.long(), "completion_mask": mask.long(), "advantages": adv.squeeze(1),
        "old_per_token_logps": old, "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum(), "ref_per_token_logps": ref,
    }  # fmt: skip
    return trainer._compute_loss(stub, None, inputs)


def equal(method, oracle, seeds=range(4)):
    """Loss and gradient; the clips must really have been met."""
    met = 0
    for seed in seeds:
        logp, old, adv, mask = rows(seed)
        ours, made = loss_of(method, logp, old, adv, mask)
        met += int(made.clipped.sum())
        theirs = oracle(logp, old, adv, mask)
        torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (ours, theirs)), **EXACT)
    return met


CASES = {
    "grpo": (GRPOConfig(), {}),
    "dr_grpo": (DrGRPOConfig(length=9), {"loss_type": "dr_grpo"}),
    "dapo": (DAPOConfig(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (GSPOConfig(clip_low=0.05, clip_high=0.08), {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08}),
    "cispo": (CISPOConfig(cap=1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": (SAPOConfig(tau_bad=1.0625), {"loss_type": "sapo"}),  # TRL rounds it to fp32: one that it can hold
}


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_trl_grpo(name):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    cfg, own = CASES[name]
    met = equal(cfg.build(), lambda *case: trl_loss(trainer, *case, **own))
    assert met or name == "sapo"


def test_gspo_token_equals_trl():
    trainer = pytest.importorskip("trl.experimental.gspo_token.grpo_trainer").GRPOTrainer
    own = {"importance_sampling_level": "sequence_token", "epsilon_low": 0.05, "epsilon_high": 0.08}
    assert equal(GSPOConfig(clip_low=0.05, clip_high=0.08, form="token").build(), lambda *case: trl_loss(trainer, *case, **own))


def test_gmpo_equals_trl():
    trainer = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    assert equal(GMPOConfig(clip_low=0.2, clip_high=0.3).build(), lambda *case: trl_loss(trainer, *case, epsilon_low=0.2, epsilon_high=0.3))


def test_rloo_equals_trl():
    trainer = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    assert equal(RLOOConfig().build(), lambda *case: trl_loss(trainer, *case))


@pytest.mark.parametrize("estimator, corrected", [("ratio_k3", True), ("k3", False)])
def test_kl_penalty_equals_trl(estimator, corrected):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logp, old, adv, mask = rows(1)
    ref = (old - 0.3 * torch.randn_like(old)) * mask
    method = GRPOConfig().build()
    ours = loss_of(method, logp, old, adv, mask)[0] + 0.07 * method.aggregate(penalty(estimator, logp, old, ref), mask)[0] / 4
    theirs = trl_loss(trainer, logp, old, adv, mask, ref, beta=0.07, bias_correction=corrected)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (ours, theirs)), **EXACT)


def test_overlong_equals_trl():
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [1, 79, 80, 81, 90, 99, 100, 101, 200]
    rule = OverlongConfig(limit=100, buffer=20).build()
    ours = [rule(Answer("", "stop", n, {})) for n in lengths]
    assert ours == pytest.approx(theirs(completion_ids=[[0] * n for n in lengths]), abs=1e-12)


def test_ppo_equals_torchtune(torchtune):
    oracle = importlib.import_module("torchtune.rlhf.loss").PPOLoss(epsilon=0.2, value_clip_range=0.2, value_coeff=0.1)
    cfg = PPOConfig()
    method = cfg.build()
    for seed in range(4):
        logp, old, _, mask = rows(seed)
        g = torch.Generator().manual_seed(seed)
        adv, was, target = (torch.randn(4, T, generator=g, dtype=torch.double) for _ in range(3))
        values = (was + 0.4 * torch.randn(4, T, generator=g, dtype=torch.double)).requires_grad_()
        critic, found = method.also.critic(values, {"values": was, "returns": target}, mask)
        made = method.surrogate(logp, old, adv, mask, {})
        ours = (made.total + critic) / made.count
        # its mean divides by n + 1e-8
        theirs = oracle(old, logp, adv, was, values, target, mask, mask)
        torch.testing.assert_close(ours, theirs[0], atol=1e-9, rtol=0)
        torch.testing.assert_close(found["value_loss"][0] / found["value_loss"][1], theirs[2], atol=1e-9, rtol=0)
        ours, theirs = (torch.autograd.grad(x, (logp, values)) for x in (ours, theirs[0]))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert (value_loss(values, was, target, 0.2) > value_loss(values, was, target, None)).any()


def test_whiten_equals_torchtune(torchtune):
    x, mask = torch.randn(4, T, dtype=torch.double), mask_of()
    # its "shift_mean" adds the mean back; the count in its mean is n + 1e-8
    torch.testing.assert_close(whitened(x, mask), torchtune.whiten(x, mask, shift_mean=False) * mask, atol=1e-7, rtol=0)


def test_gae_equals_torchtune_and_torchrl(torchtune):
    full = torch.ones(4, T, dtype=torch.bool)
    rewards, values = torch.randn(4, T, dtype=torch.double), torch.randn(4, T, dtype=torch.double)
    adv, target = gae(rewards, values, full, 0.875, 0.75)
    torch.testing.assert_close(target, torchtune.estimate_advantages(values, rewards, 0.875, 0.75)[1], **EXACT)
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    done = torch.zeros(4, T, 1, dtype=torch.bool)
    done[:, -1] = True
    following = torch.cat((values[:, 1:], torch.zeros(4, 1, dtype=torch.double)), 1)
    theirs = functional.generalized_advantage_estimate(0.875, 0.75, values[..., None], following[..., None], rewards[..., None], done)
    torch.testing.assert_close((adv, target), tuple(x.squeeze(-1) for x in theirs), **EXACT)


def with_tool_turn():
    """The third answer has a tool's tokens in the middle."""
    mask = mask_of()
    mask[0, 2:4] = False
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("mask", [mask_of(), with_tool_turn()], ids=["ragged", "tool"])
def test_advantages_equal_verl(verl, mask):
    rewards, values = (torch.randn(4, T, dtype=torch.double) * mask for _ in range(2))
    # verl's first step reads a value behind the mask as next: 0 there, as here
    adv, target = gae(rewards, values, mask, 0.875, 0.75)
    theirs, their_target = verl.compute_gae_advantage_return(rewards, values, mask.double(), 0.875, 0.75)
    torch.testing.assert_close(target, their_target * mask, **EXACT)
    torch.testing.assert_close(whitened(adv, mask), theirs * mask, atol=1e-6, rtol=0)
    G = returns(rewards, mask, 0.9)
    theirs, their_returns = verl.compute_reinforce_plus_plus_outcome_advantage(rewards, mask.double(), config=SimpleNamespace(gamma=0.9))
    torch.testing.assert_close(G, their_returns, **EXACT)
    torch.testing.assert_close(whitened(G, mask), theirs, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_group_advantages_equal_verl(verl):
    import numpy as np

    mask, reward, ok = mask_of(), torch.randn(4, dtype=torch.double), torch.ones(4, dtype=torch.bool)
    scores = torch.zeros(4, T, dtype=torch.double)
    scores[:, 0] = reward
    for samples in (2, 4):
        index = np.arange(4) // samples
        rloo, _ = verl.compute_rloo_outcome_advantage(scores.clone(), mask.double(), index)
        torch.testing.assert_close(left_out(reward, ok, samples)[:, None] * mask, rloo, **EXACT)
        # eps 1e-6 beside the std there, 1e-4 here as in TRL
        grpo, _ = verl.compute_grpo_outcome_advantage(scores.clone(), mask.double(), index, epsilon=1e-4)
        torch.testing.assert_close(standardised(reward, ok, samples)[:, None] * mask, grpo, **EXACT)


class Settings(SimpleNamespace):
    """verl's ActorConfig, as far as its losses read it."""

    def get(self, name, default):
        return self.__dict__.get(name, default)


@pytest.mark.slow
def test_clipped_losses_equal_verl(verl):
    """PPO and REINFORCE++ clip as its vanilla loss does, with the dual clip; BAPO within given bounds too."""
    plain = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "global_batch_info": {}}
    loss = lambda settings: lambda logp, old, adv, mask: verl.compute_policy_loss_vanilla(
        old, logp, adv.expand_as(logp), mask.double(), "token-mean", settings
    )[0]
    assert equal_nearly(PPOConfig(dual=1.5).build(), loss(Settings(**plain, clip_ratio_c=1.5)))
    assert equal_nearly(REINFORCEPPConfig().build(), loss(Settings(**plain, clip_ratio_c=1e9)))
    moved = plain | {"clip_ratio_low": 0.25, "clip_ratio_high": 0.4, "clip_ratio_c": 1.6}
    assert equal_nearly(BAPOConfig(dual=1.6).build(), loss(Settings(**moved)))


def equal_nearly(method, oracle):
    """Its mean over tokens divides by n + 1e-8."""
    met = 0
    for seed in range(4):
        logp, old, adv, mask = rows(seed, noise=0.8)
        ours, made = loss_of(method, logp, old, adv, mask)
        met += int(made.clipped.sum())
        theirs = oracle(logp, old, adv, mask)
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (ours, theirs)), atol=1e-8, rtol=0)
    return met


@pytest.mark.slow
def test_adaptive_kl_equals_verl(verl):
    ours, theirs = RewardKLConfig(beta=0.2, target=6.0, gain=0.1).build(), verl.AdaptiveKLController(0.2, 6.0, 1000)
    for kl in (0.0, 3.0, 5.9, 6.0, 6.5, 60.0, 7.0, -1.0):
        ours.adapt(kl)
        theirs.update(kl, 100)
        assert ours.beta == pytest.approx(theirs.value, rel=1e-12)
