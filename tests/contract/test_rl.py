"""Reinforcement learning end to end on a bandit: it is solved, stops anywhere and goes on, and ranks are one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count

import pytest
import torch

from tests.contract.rl_bandit import BAD, GOOD, KINDS, Letters, Prompts, Run, pay, several
from zero2llm.core.batch import IGNORE
from zero2llm.core.files import load_tensors
from zero2llm.core.seq import Seq
from zero2llm.parallel.plan import World
from zero2llm.train.checkpoint import Checkpoint, save_checkpoint
from zero2llm.train.fit import FitState
from zero2llm.train.rl.gather import joined
from zero2llm.train.rl.policy import MEANING, NOTE
from zero2llm.train.rl.trpo import NoState

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = ("grpo", "reinforce")
EVERYWHERE = {"lr", "grad_norm", "tokens_per_s", "step_s", "skipped", "loss", "win_rate", "margin", "moved_right", "logp_chosen", "logp_rejected"}


class Solved(Exception):
    pass


@torch.no_grad()
def chance(model):
    """Least probability of the paying token, over both prompts."""
    hidden, _ = model(torch.tensor([[BAD, GOOD]]), Seq.rows(1, 2))
    return float(model.logits(hidden)[0, :, :4].softmax(-1)[:, GOOD].min())


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_the_bandit_is_solved(kind):
    for seed in range(3):
        run = Run(kind, seed)
        assert chance(run.model) < 0.6

        def hook(state, run=run):
            assert set(state.metrics) <= set(MEANING) | EVERYWHERE, "every metric has a meaning"
            if state.step == 1 and "ratio" in state.metrics:
                assert state.metrics["ratio"] == pytest.approx(1, abs=1e-5) and state.metrics["clip_fraction"] == 0
                assert state.metrics["logp_gap"] < 1e-5
            if chance(run.model) > 0.9:
                raise Solved

        with pytest.raises(Solved):
            run.train(hook)


@pytest.mark.parametrize("kind", ["dapo", "ppo", "rft", "trpo", "online_dpo", "bapo"])
def test_a_run_goes_on_to_the_bit(kind):
    """Stopped after 5 of 8 steps: in the middle of the second rollout."""
    whole, kept = several(kind, World()), {}

    def keep(state):
        if state.step == 5:
            kept["weights"] = {k: v.clone() for k, v in whole.model.state_dict().items()}
            kept["optim"] = {k: v.clone() for k, v in whole.optim.state_tensors().items()}
            kept["data"], kept["fit"] = json.dumps(whole.source.state_dict()), FitState(state.step, state.tokens, state.seconds)

    whole.train(keep)
    again = several(kind, World())
    again.model.load_state_dict(kept["weights"])
    again.optim.load_state_tensors(kept["optim"])
    again.source.load_state_dict(json.loads(kept["data"]))
    again.train(state=kept["fit"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert json.loads(json.dumps(again.source.state_dict()["shape"])) == whole.source.state_dict()["shape"]
    if kind == "ppo":
        assert again.shape.also.reward_kl.beta != 0.05, "the adaptive weight has moved"


def test_a_checkpoint_of_trpo_resumes(tmp_path):
    whole, copied = several("trpo", World()), tmp_path / "letters"
    copied.mkdir()
    save = lambda state: state.step == 5 and save_checkpoint(
        tmp_path, whole.model, copied, state, NoState(), whole.source, parent=None, metrics={}
    )
    whole.train(save)
    again = several("trpo", World())
    state = Checkpoint.open(tmp_path).restore(again.model, NoState(), again.source)
    again.train(state=state)
    assert state.step == 8 and all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("key, value", [("seed", 9), ("prompts", "others")])
def test_the_state_of_another_run_is_refused(key, value):
    source = Run("grpo").source
    state = source.state_dict() | {key: value}
    with pytest.raises(ValueError, match=f"prompts' {key} was {value}"):
        source.load_state_dict(state)


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path):
    """Rollouts, whitening, bounds, further sampling and steps: every method, by two gloo ranks."""
    ours, theirs = tmp_path / "one", tmp_path / "two"
    command = ["-m", "tests.contract.rl_bandit"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(29100 + os.getpid() % 300)]
    for out, launch in ((ours, []), (theirs, torchrun)):
        done = subprocess.run([sys.executable, *launch, *command, str(out), *KINDS], env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        want, got = load_tensors(ours, kind), load_tensors(theirs, kind)
        rounding = 5e-3 if kind == "trpo" else 1e-4  # ten products with H, each on the last one's rounding
        torch.testing.assert_close(got.pop("seen"), want.pop("seen"), atol=rounding, rtol=rounding, msg=lambda m, kind=kind: f"{kind}: {m}")
        for name in want:  # Adam turns rounding in a near-zero gradient into a step of the learning rate
            torch.testing.assert_close(got[name], want[name], atol=max(rounding, 2e-3), rtol=0, msg=lambda m, kind=kind, name=name: f"{kind} {name}: {m}")


# What the source does with what it is given


def first(kind, reward=pay, **more):
    run = Run(kind, reward=reward, **more)
    return run, next(iter(run.source))


def test_flat_prompts_make_room_for_others():
    """Only every second prompt can be told right from wrong: DAPO's step holds none but those."""
    reward = lambda answer: pay(answer) if answer.record["g"] % 2 else 0.5
    run, batch = first("dapo", reward, samples=8, changes={"rounds": 8})
    adv = batch.extra["adv"].view(4, 8, -1)[..., 0]
    assert (adv != 0).any(1).all() and len(batch) == 32
    assert batch.extra[NOTE + "resampled"][0] >= 1 and run.source.drawn == 4 * (1 + int(batch.extra[NOTE + "resampled"][0]))
    assert batch.extra[NOTE + "flat"][0] >= 0.5, "what is logged is of everything that was played"


def test_flat_prompts_fill_up_after_the_last_round():
    run, batch = first("dapo", lambda answer: 1.0)
    assert len(batch) == 16 and not batch.extra["adv"].any()
    assert batch.extra[NOTE + "resampled"][0] == 2 and run.source.drawn == 12
    run, batch = first("grpo", lambda answer: 1.0)
    assert batch.extra[NOTE + "resampled"][0] == 0 and batch.extra[NOTE + "flat"][0] == 1


def test_failed_rewards_are_left_out_and_counted():
    def reward(answer):
        if answer.text.startswith("x"):
            raise KeyError("no such answer")
        return float("nan") if answer.text.startswith(".") else 1.0

    run, batch = first("grpo", reward, samples=8)
    lost = (batch.labels == IGNORE).all(1)
    assert 0 < lost.float().mean() < 1 and float(batch.extra[NOTE + "failed"][0]) == pytest.approx(float(lost.float().mean()))
    assert "no such answer" in run.source.reward.first_failure or "nan" in run.source.reward.first_failure


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("rft", "online_dpo")])
def test_a_rollout_without_any_reward_changes_nothing(kind):
    run = Run(kind, reward=lambda answer: float("nan"), steps=2)
    before = [p.clone() for p in run.model.parameters()]
    seen = []
    run.train(lambda state: seen.append((state.metrics["skipped"], state.metrics["failed"])))
    assert seen == [(1.0, 1.0)] * 2 and all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["rft", "online_dpo"])
def test_a_rollout_without_examples_is_sampled_again_then_skipped(kind):
    run = Run(kind, reward=lambda answer: 0.0, steps=2)
    before = [p.clone() for p in run.model.parameters()]
    seen = []
    run.train(lambda state: seen.append((state.metrics["skipped"], state.metrics["resampled"], state.metrics["loss"])))
    assert seen == [(1.0, 3.0, 0.0)] * 2 and all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_rft_keeps_what_is_right_and_distinct():
    """Equal sets: by hand from everything that was played."""
    run = Run("rft", reward=lambda answer: float("o" in answer.text), samples=16, max_tokens=2, changes={"most": 2})
    played = []
    play = run.source.play
    run.source.play = lambda: played.append(play()) or played[-1]
    batch = next(iter(run.source))
    wanted, said = [], {}
    for row in range(64):
        answer = tuple(played[0].labels[row][played[0].labels[row] != IGNORE].tolist())
        group = said.setdefault(row // 16, [])
        if GOOD in answer and answer not in group and len(group) < 2:
            group.append(answer)
            wanted.append((row // 16, answer))
    assert [tuple(x[x != IGNORE].tolist()) for x in batch.labels] == [answer for _, answer in wanted]
    assert float(batch.extra[NOTE + "kept"][0]) == pytest.approx(len(wanted) / 64) and float(batch.extra[NOTE + "repeated"][0]) > 0


def test_online_dpo_pairs_the_best_with_the_worst():
    run, batch = first("online_dpo", samples=6, max_tokens=3)
    assert batch.group == 2 and len(batch) % 2 == 0
    share = lambda row: pay(type("A", (), {"text": "".join("..xo"[t] for t in row[row != IGNORE]), "tokens": int((row != IGNORE).sum())}))
    scores = [share(row) for row in batch.labels]
    assert all(a > b for a, b in zip(scores[0::2], scores[1::2], strict=True))
    assert float(batch.extra[NOTE + "tied"][0]) == pytest.approx(1 - len(batch) / 2 / 4)


def test_what_does_not_divide_is_filled_up():
    """Five pairs for two minibatches and two ranks: two and four pairs, of which one is blank and counts nothing."""
    order = count()
    run = Run("online_dpo", reward=lambda answer: float(next(order)), samples=8, max_tokens=3, minibatches=2)
    run.source.cfg = replace(run.source.cfg, prompts=5)
    alone = run.source.collect()
    assert [len(b) for b in alone] == [6, 4] and all(b.extra["real"].all() for b in alone)
    run.source.world = World(0, 2)
    whole = joined(alone)
    blank = replace(whole.rows(slice(0, 2)), labels=torch.full_like(whole.labels[:2], IGNORE), extra={k: 0 * v[:2] for k, v in whole.extra.items()})
    steps = run.source.cut(joined([whole, blank]))
    assert [b.extra["real"].tolist() for b in steps] == [[1.0] * 6 + [0.0] * 2, [1.0] * 4]
    filled, plain = (run.objective(run.model, b) for b in (steps[0], steps[0].rows(slice(0, 6))))
    assert filled.count == plain.count == 3 and torch.equal(filled.total, plain.total)


@pytest.mark.parametrize(
    "kind, more, message",
    [("grpo", {"samples": 1}, "needs at least 2"), ("online_dpo", {"samples": 1, "prompts": 4}, "needs at least 2")],
)
def test_too_few_answers_are_refused(kind, more, message):
    with pytest.raises(ValueError, match=message):
        Run(kind, **({k: v for k, v in more.items() if k != "prompts"}))


def test_a_missing_reference_or_critic_is_refused():
    from zero2llm.train.rl.rewards import Mixture
    from zero2llm.train.rl.source import Rollouts

    run = Run("ppo")
    build = lambda model: Rollouts(model, Letters(), Prompts(), Mixture([]), run.shape, run.source.cfg, seed=0, world=World())
    with pytest.raises(ValueError, match="needs a reference"):
        build(run.model)
    run.shape.reference = False
    with pytest.raises(ValueError, match="score_head"):
        build(Run("grpo").model)
    with pytest.raises(ValueError, match="do not divide among 3 ranks"):
        Run("grpo", world=World(0, 3))
