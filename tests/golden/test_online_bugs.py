"""Sampling, rows and their hand-out, online DPO's pairs, rejection sampling: checks by hand, and planted bugs that each must be caught."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from tests.contract import test_rl as contract
from tests.contract.rl_bandit import BAD, END, GOOD, PAD, Letters, Prompts, Run, pay
from tests.golden.planted import bug_tests
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.parallel.plan import World
from zero2llm.train.rl import advantages, online_dpo, rft, rollout, source
from zero2llm.train.rl.gather import joined
from zero2llm.train.rl.policy import NOTE, Played, Sampled, policy_logps
from zero2llm.train.rl.rollout import Episode, RolloutConfig
from zero2llm.train.rl.source import Rollouts, Taken

# What a rollout is


class Unlike:
    """Prompts of four lengths."""

    identity = {"prompts": "unlike"}

    def prompt(self, g):
        return [BAD, GOOD, BAD, BAD][: 1 + g % 4], {"answer": "o", "g": g}


def episodes(seed=3, number=5, which=(0, 1, 2, 3), **more):
    run = Run("grpo", seed=1)
    cfg = RolloutConfig(**{"prompts": 4, "samples": 4, "max_tokens": 6, "temperature": 0.7, "max_batch": 64} | more)
    asked = [(g, *Unlike().prompt(g)) for g in which]
    return run.model, rollout.play(run.model, Letters(), asked, cfg, seed, number)


def said(found):
    return [e.ids[len(e.trained) - sum(e.trained) :] for e in found]


def check_sampling():
    """Every answer has its own seed: of the run, the rollout, the prompt and its place, and of nothing else."""
    _, whole = episodes()
    answers = said(whole)
    assert len({tuple(a) for a in answers[:4]}) > 1, "answers to one prompt differ"
    assert answers != said(episodes(number=6)[1]) and answers != said(episodes(seed=4)[1])
    assert answers == said(episodes(max_batch=3)[1]), "what shares the batch changes nothing"
    assert answers[8:] == said(episodes(which=(2, 3))[1]), "nor what other ranks play"
    alike = said(episodes(which=(0, 4))[1])
    assert alike[:4] != alike[4:], "nor do two prompts that read the same share their answers"
    assert [e.record["g"] for e in whole] == [g for g in range(4) for _ in range(4)]


def check_episodes():
    """Prompt, then answer; the answer alone is trained on, and has the log-probabilities of what it was drawn from."""
    model, found = episodes()
    for e in found:
        n = len(Unlike().prompt(e.record["g"])[0])
        assert e.ids[:n] == Unlike().prompt(e.record["g"])[0] and e.trained == [0] * n + [1] * (len(e.ids) - n)
        assert e.finish == ("stop" if e.ids[-1] == END else "length") and len(e.ids) - n <= 6
        assert e.text == "".join("..xo"[t] for t in e.ids[n:] if t != END)
    batch, old = rollout.rows_of(found, torch.ones(len(found)), PAD)
    with torch.no_grad():
        again = policy_logps(model, model(batch.tokens, batch.seq)[0], batch.labels, 0.7, Letters.vocab_size)
    torch.testing.assert_close(old, again, atol=1e-5, rtol=0)
    assert (old[batch.labels != IGNORE] < 0).all()


TALK = [  # prompt 5 6, answer 7, a tool says 8 9, answer 2 1; and a prompt of one, answer 4
    Episode([5, 6, 7, 8, 9, 2, 1], [0, 0, 1, 0, 0, 1, 1], [0.0, 0.0, -0.1, 0.0, 0.0, -0.2, -0.3], "", "stop", {}),
    Episode([3, 4], [0, 1], [0.0, -0.4], "", "length", {}),
    Episode([3, 4, 4], [0, 1, 1], [0.0, -0.5, -0.6], "", "stop", {}),
]


def check_rows():
    """Position t holds what belongs to the token that t predicts."""
    batch, old = rollout.rows_of(TALK, torch.tensor([1.0, 1.0, 0.0]), 0)
    assert batch.tokens.shape == (3, 16) and batch.tokens[0].tolist() == [5, 6, 7, 8, 9, 2, 1] + [0] * 9
    at = lambda row: {t: int(label) for t, label in enumerate(batch.labels[row]) if label != IGNORE}
    assert at(0) == {1: 7, 4: 2, 5: 1} and at(1) == {0: 4} and at(2) == {}, "a row without a reward has no labels"
    beside = {0: {1: -0.1, 4: -0.2, 5: -0.3}, 1: {0: -0.4}}
    for row, want in beside.items():
        torch.testing.assert_close(old[row], torch.tensor([want.get(t, 0.0) for t in range(16)]))
    assert batch.seq.seg is not None and batch.seq.seg.sum(1).tolist() == [7, 2, 3] and batch.seq.pos[0, :7].tolist() == list(range(7))


# How it is handed out


def whole_rollout(n=6, unit=1):
    """Rows that know their number from 1, and a blank unit behind them, numbered 0."""
    number = torch.cat((torch.arange(1.0, n + 1), torch.zeros(unit)))
    tokens = number.long()[:, None].expand(-1, 2).contiguous()
    labels = torch.where(number[:, None] > 0, tokens, IGNORE)
    return Batch(tokens, labels, Seq.ragged(torch.full((n + unit,), 2), 2), {"n": number, "real": (number > 0).float()}, unit)


def handed(unit=1, n=6, world=None, number=0, **more):
    run = Run("online_dpo" if unit == 2 else "grpo", prompts=None, samples=4, **{"minibatches": 2, "epochs": 2} | more)
    run.source.world, run.source.number = world or World(), number
    return [b.extra["n"].int().tolist() for b in run.source.cut(whole_rollout(n, unit))], run.source.cut(whole_rollout(n, unit))


def check_hand_out():
    """Each epoch holds every row once, each in another order; only the first step is fresh."""
    steps, batches = handed()
    assert [len(s) for s in steps] == [3] * 4
    for epoch in (steps[:2], steps[2:]):
        assert sorted(epoch[0] + epoch[1]) == [1, 2, 3, 4, 5, 6]
    assert steps[0] + steps[1] != steps[2] + steps[3] and handed()[0] == steps and handed(number=1)[0] != steps
    assert [b.extra["fresh"].tolist() for b in batches] == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]
    assert handed(minibatches=1, epochs=1)[0] == [[1, 2, 3, 4, 5, 6]], "in one step there is no order to choose"


def check_filling():
    """What does not divide is filled up with blank rows, never with real ones; units stay together."""
    steps, batches = handed(n=5, world=World(0, 2))
    assert [len(s) for s in steps] == [4, 2, 4, 2] and sorted(steps[0] + steps[1]) == [0, 1, 2, 3, 4, 5]
    assert all((b.labels[b.extra["real"] == 0] == IGNORE).all() for b in batches)
    steps, _ = handed(unit=2, n=10, world=World(0, 2))
    assert [len(s) for s in steps] == [8, 4, 8, 4] and sorted(steps[0] + steps[1]) == [0, 0, *range(1, 11)]
    assert all(b == a + 1 or a == b == 0 for s in steps for a, b in zip(s[::2], s[1::2], strict=True))
    steps, _ = handed(n=1)
    assert [len(s) for s in steps] == [1] * 4 and sorted(steps[0] + steps[1]) == [0, 1], "no step is empty"


def check_shares():
    """Two ranks together ask what one process asks, and get the same answers; of a step each trains on its part."""
    alone = Run("grpo", max_tokens=4, prompts=Unlike())
    want = alone.source.play()
    parts = []
    for rank in (0, 1):
        run = Run("grpo", max_tokens=4, world=World(rank, 2), prompts=Unlike())
        sent = lambda batch, world: parts.append(batch) or batch
        with swapped(source, "gathered", sent):
            run.source.play()
        assert run.source.drawn == alone.source.drawn == 4
    both = joined(parts)
    assert torch.equal(both.tokens, want.tokens) and torch.equal(both.extra["old"], want.extra["old"]) and torch.equal(both.extra["reward"], want.extra["reward"])
    step, seen = want, []
    for rank in (0, 1):
        run = Run("grpo", world=World(rank, 2), prompts=Unlike())
        run.source.pending = [step]
        seen.append(next(iter(run.source)))
    assert torch.equal(joined(seen).tokens, step.tokens) and len(seen[0]) == len(seen[1])


def check_further_sampling():
    """Another round asks further prompts, never the same again."""
    asked = []
    run = Run("dapo", reward=lambda a: asked.append(a.record["g"]) or (pay(a) if a.record["g"] >= 8 else 0.5), samples=8, max_tokens=2)
    batch = next(iter(run.source))
    assert sorted(set(asked)) == list(range(run.source.drawn)) and run.source.drawn >= 12 and len(batch) == 32
    next(run_again := iter(run.source))
    assert max(asked) == run.source.drawn - 1 and run_again
    assert (batch.extra["adv"].view(4, 8, -1)[..., 0] != 0).any(1).all() or batch.extra[NOTE + "resampled"][0] == 2


def check_left_out():
    """An answer cut at max_tokens is, if so asked, no example: no label, no reward; nothing has failed."""
    run = Run("grpo", max_tokens=2, samples=8, truncated="leave_out")
    found = run.source.play()
    cut = found.extra["cut"].bool()
    assert 0 < int(cut.sum()) < len(cut) and torch.equal(cut, ~found.extra["ok"].bool()) and not found.extra["failed"].any()
    assert (found.labels[cut] == IGNORE).all() and not found.extra["reward"][cut].any() and (found.labels[~cut] != IGNORE).any(1).all()
    kept = Run("grpo", max_tokens=2, samples=8).source.play()
    assert kept.extra["ok"].all() and torch.equal(kept.extra["cut"].bool(), cut) and (kept.labels != IGNORE).any(1).all()
    adv = next(iter(run.source)).extra["adv"][:, 0]
    ok = found.extra["ok"].bool().view(4, 8)
    for g in range(4):  # the mean is that of those that stay
        torch.testing.assert_close(adv.view(4, 8)[g][ok[g]].sum(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert not adv[cut].any()


def check_place():
    """What is left of a rollout comes back from JSON to the bit, and what follows it too."""
    run = Run("dapo", reward=pay, samples=4, max_tokens=3, minibatches=2, epochs=2)
    stream = iter(run.source)
    next(stream), next(stream)
    kept = json.loads(json.dumps(run.source.state_dict()))
    again = Run("dapo", reward=pay, samples=4, max_tokens=3, minibatches=2, epochs=2)
    again.source.load_state_dict(kept)
    for a, b in zip((next(stream) for _ in range(4)), iter(again.source), strict=False):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and torch.equal(a.seq.seg, b.seq.seg)
        assert a.group == b.group and a.extra.keys() == b.extra.keys()
        assert all(torch.equal(v, b.extra[k]) for k, v in a.extra.items() if k != NOTE + "rollout_s")
    assert (again.source.number, again.source.drawn) == (run.source.number, run.source.drawn)


# What is chosen from it


def scored(reward, ok=None, answers=None, samples=4):
    """Rows whose labels are ``answers``; two prompts."""
    n = len(reward)
    answers = answers or [[10 + i] for i in range(n)]
    tokens = torch.zeros(n, 4, dtype=torch.long)
    labels = torch.full((n, 4), IGNORE)
    for i, answer in enumerate(answers):
        if ok is None or ok[i]:
            labels[i, 1 : 1 + len(answer)] = torch.tensor(answer)
    keep = torch.tensor(ok if ok is not None else [True] * n)
    batch = Batch(tokens, labels, Seq.ragged(torch.full((n,), 4), 4), {"n": torch.arange(float(n))})
    return Played(batch, torch.zeros(n, 4), torch.tensor(reward) * keep, keep, samples)


def check_pairs():
    """Best first, worst behind it; an answer without a reward is neither; equal ones make no pair."""
    pairs = online_dpo.OnlineDPOConfig().build()
    found = pairs.take(scored([0.2, 0.9, 0.1, 0.5, 3.0, -1.0, 2.0, 0.5]), 8)
    assert found.index.tolist() == [1, 2, 4, 5] and found.good == 4 and found.notes == {"tied": 0.0}
    found = pairs.take(scored([0.2, 0.9, 0.4, 0.5, -1.0, -2.0, -3.0, -4.0], [True, False, True, True, True, True, True, False]), 8)
    assert found.index.tolist() == [3, 0, 4, 6], "reward 0 of what failed is no reward"
    found = pairs.take(scored([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 2.0]), 8)
    assert found.index.tolist() == [4, 6] and found.good == 2 and found.notes == {"tied": 0.5}
    found = pairs.take(scored([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [True] + [False] * 7), 8)
    assert found.index.tolist() == [] and found.good == 0 and found.notes == {"tied": 1.0}, "one answer is no pair"
    played = scored([0.2, 0.9, 0.1, 0.5], samples=4)
    rows, notes = pairs.rows(replace(played, batch=played.batch.rows(pairs.take(played, 4).index)))
    assert rows.group == 2 and rows.tokens.shape == (2, 4) and rows.extra == {} and notes == {}
    assert (pairs.samples, pairs.unit, pairs.wanted(16), online_dpo.OnlineDPOConfig(rounds=3).build().rounds) == (2, 2, 2, 3)


def check_kept():
    """Right, distinct, at most so many of each prompt, in their order."""
    kept = lambda played, **more: rft.RFTConfig(**more).build().take(played, 8)
    found = kept(scored([1.0, 0.9, 1.0, 2.0, 0.0, 1.0, 1.0, 1.0]))
    assert found.index.tolist() == [0, 2, 3, 5, 6, 7] and found.good == 6 and found.notes == {"kept": 6 / 8, "repeated": 0.0}
    same = [[1], [2], [1], [3], [1], [1, 2], [1], [1]]
    found = kept(scored([1.0] * 8, answers=same))
    assert found.index.tolist() == [0, 1, 3, 4, 5], "another prompt may be answered alike"
    assert found.notes == {"kept": 5 / 8, "repeated": 3 / 8}
    assert kept(scored([1.0] * 8, answers=same), most=2).index.tolist() == [0, 1, 4, 5]
    assert kept(scored([1.0] * 8, [True, False] * 4), right=0.0).index.tolist() == [0, 2, 4, 6], "what failed is not right"
    assert kept(scored([0.5] * 8)).index.tolist() == [] and kept(scored([0.5] * 8), right=0.5).good == 8
    rows, _ = rft.RFTConfig().build().rows(scored([1.0] * 8))
    assert rows.extra == {} and rows.group == 1


def check_blanks_count_nothing():
    """Rows that fill up change neither loss nor count, and a step of nothing else is no step."""
    run = Run("rft", reward=pay)
    real = joined(run.source.cut(replace(run.source.play(), extra={"real": torch.ones(16)})))
    real = replace(real, extra={"real": torch.cat((torch.ones(8), torch.zeros(len(real) - 8)))})
    whole, part = run.objective(run.model, real), run.objective(run.model, real.rows(slice(0, 8)))
    assert torch.equal(whole.total, part.total) and whole.count == part.count == (real.labels[:8] != IGNORE).sum()
    nothing = run.objective(run.model, replace(real, extra={"real": torch.zeros(len(real))}))
    assert nothing.count == 0 and nothing.total == 0 and torch.isfinite(nothing.total)


def check_flat_is_nothing():
    """Equal rewards have advantage 0 and not a rounding of it, of which Adam would make a step; so has what is whitened."""
    g = torch.Generator().manual_seed(0)
    for n in range(2, 20):
        ok = torch.rand(50 * n, generator=g) < 0.8
        reward = torch.randn(50, generator=g).repeat_interleave(n) * ok
        for name in ("standardised", "centred", "left_out"):
            assert not getattr(advantages, name)(reward, ok, n).any(), (name, n)
        mask = torch.rand(8, n, generator=g) < 0.9
        assert not advantages.whitened(mask * torch.rand(1, generator=g), mask).any(), n


CHECKS = [
    check_flat_is_nothing, check_sampling, check_episodes, check_rows, check_hand_out, check_filling, check_shares, check_further_sampling, check_left_out, check_place,
    check_pairs, check_kept, check_blanks_count_nothing, contract.test_flat_prompts_make_room_for_others, contract.test_rft_keeps_what_is_right_and_distinct,
    contract.test_online_dpo_pairs_the_best_with_the_worst, contract.test_what_does_not_divide_is_filled_up, contract.test_failed_rewards_are_left_out_and_counted,
]  # fmt: skip


# Bugs


class swapped:
    """One attribute, for the length of a block."""

    def __init__(self, owner, name, wrong):
        self.owner, self.name, self.wrong = owner, name, wrong

    def __enter__(self):
        self.right = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.wrong)

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.right)


play, rows_of, seed_of = rollout.play, rollout.rows_of, rollout.seed_of
take, rows, right_take, cut, collect, own_play = online_dpo.Pairs.take, online_dpo.Pairs.rows, rft.Kept.take, Rollouts.cut, Rollouts.collect, Rollouts.play
state_dict, load, scoring = Rollouts.state_dict, Rollouts.load_state_dict, Rollouts.scored
everywhere = lambda patch, name, wrong: [patch.setattr(module, name, wrong) for module in (rollout, source)]


def samples_share_a_seed(patch):
    patch.setattr(rollout, "seed_of", lambda seed, number, which, k, *turn: seed_of(seed, number, which, *turn))


def prompts_share_a_seed(patch):
    patch.setattr(rollout, "seed_of", lambda seed, number, which, k, *turn: seed_of(seed, number, k, *turn))


def every_rollout_is_the_first(patch):
    patch.setattr(rollout, "seed_of", lambda seed, number, *rest: seed_of(seed, 0, *rest))


def every_run_is_the_first(patch):
    patch.setattr(rollout, "seed_of", lambda seed, *rest: seed_of(0, *rest))


def seeds_count_from_the_ranks_first_prompt(patch):
    here = lambda m, t, prompts, *rest: play(m, t, [(i, *p[1:]) for i, p in enumerate(prompts)], *rest)
    everywhere(patch, "play", here)


def prompt_is_trained_on(patch):
    everywhere(patch, "play", lambda *a: [replace(e, trained=[1] * len(e.ids)) for e in play(*a)])


def end_token_is_lost(patch):
    short = lambda e: replace(e, ids=e.ids[:-1], trained=e.trained[:-1], logps=e.logps[:-1]) if e.finish == "stop" and sum(e.trained) > 1 else e
    everywhere(patch, "play", lambda *a: [short(e) for e in play(*a)])


def logps_of_temperature_one(patch):
    def plain(m, t, prompts, cfg, *rest):
        found = play(m, t, prompts, cfg, *rest)
        return [replace(e, logps=[x * cfg.temperature for x in e.logps]) for e in found]

    everywhere(patch, "play", plain)


def logps_one_token_late(patch):
    everywhere(patch, "rows_of", lambda e, keep, pad: (rows_of(e, keep, pad)[0], rows_of(e, keep, pad)[1].roll(1, 1)))


def labels_not_shifted(patch):
    def same(e, keep, pad):
        batch, old = rows_of(e, keep, pad)
        return replace(batch, labels=batch.labels.roll(1, 1)), old

    everywhere(patch, "rows_of", same)


def tools_are_trained_on(patch):
    begun = lambda t: [int(any(t[: i + 1])) for i in range(len(t))]
    everywhere(patch, "rows_of", lambda e, keep, pad: rows_of([replace(x, trained=begun(x.trained)) for x in e], keep, pad))


def failed_rows_keep_labels(patch):
    everywhere(patch, "rows_of", lambda e, keep, pad: rows_of(e, torch.ones_like(keep), pad))


def pads_are_read(patch):
    def wide(e, keep, pad):
        batch, old = rows_of(e, keep, pad)
        return replace(batch, seq=Seq.rows(*batch.tokens.shape)), old

    everywhere(patch, "rows_of", wide)


SAMPLING = {
    samples_share_a_seed: {"check_sampling"}, prompts_share_a_seed: {"check_sampling"}, every_rollout_is_the_first: {"check_sampling"},
    every_run_is_the_first: {"check_sampling"}, seeds_count_from_the_ranks_first_prompt: {"check_shares"}, prompt_is_trained_on: {"check_episodes"},
    end_token_is_lost: {"check_episodes"}, logps_of_temperature_one: {"check_episodes"}, logps_one_token_late: {"check_rows", "check_episodes"},
    labels_not_shifted: {"check_rows", "check_episodes"}, tools_are_trained_on: {"check_rows"}, failed_rows_keep_labels: {"check_rows", "check_left_out"},
    pads_are_read: {"check_rows"},
}  # fmt: skip


def epochs_in_one_order(patch):
    patch.setattr(source, "seed_of", lambda seed, number, epoch: seed_of(seed, number, 0))


def rollouts_in_one_order(patch):
    patch.setattr(source, "seed_of", lambda seed, number, epoch: seed_of(seed, 0, epoch))


def never_shuffled(patch):
    patch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))


def all_is_fresh(patch):
    patch.setattr(Rollouts, "cut", lambda self, batch: [replace(b, extra=b.extra | {"fresh": torch.ones(len(b))}) for b in cut(self, batch)])


def filled_with_real_rows(patch):
    def wrong(self, batch):
        unit = self.shape.unit
        first = batch.rows(torch.cat((torch.arange(len(batch) - unit), torch.arange(unit))))
        return cut(self, first)

    patch.setattr(Rollouts, "cut", wrong)


def blank_is_handed_out(patch):
    patch.setattr(Rollouts, "cut", lambda self, batch: cut(self, joined([batch, batch.rows(slice(len(batch) - self.shape.unit, None))])))


def the_rest_is_dropped(patch):
    even = lambda self, b: b.rows(torch.arange(len(b) - len(b) % (2 * self.world.size)))
    patch.setattr(Rollouts, "cut", lambda self, batch: [even(self, b) if len(b) > 1 else b for b in cut(self, batch)])


def pairs_are_torn(patch):
    patch.setattr(Rollouts, "cut", lambda self, batch: [b.rows(torch.arange(len(b)).flip(0)) for b in cut(self, batch)])


def ranks_play_the_same(patch):
    patch.setattr(Rollouts, "play", lambda self: with_world(self, World(0, self.world.size), own_play))


def ranks_train_on_the_first_part(patch):
    def first(self):
        while True:
            batch = self.pending.pop(0)
            yield self.shape.before_step(batch.rows(slice(0, len(batch) // self.world.size)), self)

    right = Rollouts.__iter__
    patch.setattr(Rollouts, "__iter__", lambda self: first(self) if self.pending else right(self))


def with_world(self, world, call):
    right, self.world = self.world, world
    try:
        return call(self)
    finally:
        self.world = right


def rounds_ask_again(patch):
    def again(self):
        before = self.drawn
        found = own_play(self)
        self.drawn = before + (self.cfg.prompts if self.number else 0)
        return found

    patch.setattr(Rollouts, "play", again)


def flat_prompts_stay(patch):
    from zero2llm.train.rl.gradient import PolicyGradient

    patch.setattr(PolicyGradient, "take", lambda self, played, n: Taken(torch.arange(n), n, {}))


def never_again(patch):
    patch.setattr(source, "flat_groups", lambda reward, ok, samples: torch.zeros(len(reward) // samples, dtype=torch.bool))
    from zero2llm.train.rl import gradient

    patch.setattr(gradient, "flat_groups", source.flat_groups)


def cut_answers_count_as_failed(patch):
    def wrong(self, found):
        batch = scoring(self, found)
        return replace(batch, extra=batch.extra | {"failed": 1 - batch.extra["ok"]})

    patch.setattr(Rollouts, "scored", wrong)


def cut_answers_stay(patch):
    patch.setattr(Rollouts, "scored", lambda self, found: with_cfg(self, replace(self.cfg, truncated="score"), found))


def with_cfg(self, cfg, found):
    right, self.cfg = self.cfg, cfg
    try:
        return scoring(self, found)
    finally:
        self.cfg = right


def cut_answers_are_worth_nothing(patch):
    """They stay, with reward 0."""

    def wrong(self, found):
        batch = scoring(self, found)
        return replace(batch, extra=batch.extra | {"ok": torch.ones(len(batch))})

    patch.setattr(Rollouts, "scored", wrong)


def lost(*keys):
    def bug(patch):
        patch.setattr(Rollouts, "load_state_dict", lambda self, state: load(self, state | {k: [] if k == "pending" else 0 for k in keys}))

    bug.__name__ = "lost_" + "_".join(keys)
    return bug


def half_precision_state(patch):
    right = source.packed
    patch.setattr(source, "packed", lambda batch: right(replace(batch, extra={k: v.half().float() for k, v in batch.extra.items()})))


SOURCE = {
    epochs_in_one_order: {"check_hand_out"}, rollouts_in_one_order: {"check_hand_out"}, never_shuffled: {"check_hand_out"}, all_is_fresh: {"check_hand_out"},
    filled_with_real_rows: {"check_filling"}, blank_is_handed_out: {"check_hand_out", "check_filling"}, the_rest_is_dropped: {"check_filling", "check_hand_out"},
    pairs_are_torn: {"check_filling"}, ranks_play_the_same: {"check_shares"}, ranks_train_on_the_first_part: {"check_shares"},
    rounds_ask_again: {"check_further_sampling"}, flat_prompts_stay: {"flat_prompts_make_room_for_others"}, never_again: {"flat_prompts_make_room_for_others"},
    cut_answers_count_as_failed: {"check_left_out"}, cut_answers_stay: {"check_left_out"}, cut_answers_are_worth_nothing: {"check_left_out"},
    lost("pending"): {"check_place"}, lost("drawn"): {"check_place"}, lost("number"): {"check_place"}, half_precision_state: {"check_place"},
}  # fmt: skip


def picked(name, change):
    """``change`` : Taken, Played -> Taken."""

    def bug(patch):
        patch.setattr(online_dpo.Pairs, "take", lambda self, played, n: change(take(self, played, n), played))

    bug.__name__ = name
    return bug


def every_prompt_makes_a_pair(patch):
    def wrong(self, played, n):
        reward = torch.where(played.ok, played.reward, 0).view(-1, played.samples)
        index = torch.stack((reward.argmax(1), reward.argmin(1)), 1) + torch.arange(len(reward))[:, None] * played.samples
        return Taken(index.flatten(), index.numel(), {"tied": 0.0})

    patch.setattr(online_dpo.Pairs, "take", wrong)


def failed_answers_lose(patch):
    patch.setattr(online_dpo.Pairs, "take", lambda self, played, n: take(self, replace(played, ok=torch.ones_like(played.ok)), n))


def rows_are_no_pairs(patch):
    patch.setattr(online_dpo.Pairs, "rows", lambda self, played: (replace(rows(self, played)[0], group=1), {}))


def blanks_are_compared(patch):
    patch.setattr(Sampled, "__call__", lambda self, model, batch: self.objective(model, batch))


def pairs(*order):
    return lambda index: index.view(-1, 2)[:, list(order)].flatten()


PAIRS = {
    picked("loser_first", lambda t, p: replace(t, index=pairs(1, 0)(t.index))): {"check_pairs", "online_dpo_pairs_the_best_with_the_worst"},
    picked("best_against_itself", lambda t, p: replace(t, index=pairs(0, 0)(t.index))): {"check_pairs", "online_dpo_pairs_the_best_with_the_worst"},
    picked("all_of_the_first_prompt", lambda t, p: replace(t, index=t.index % p.samples)): {"check_pairs"},
    picked("won_reported_as_tied", lambda t, p: replace(t, notes={"tied": 1 - t.notes["tied"]})): {"check_pairs"},
    picked("pairs_counted_for_rows", lambda t, p: replace(t, good=t.good // 2)): {"check_pairs"},
    every_prompt_makes_a_pair: {"check_pairs"}, failed_answers_lose: {"check_pairs"}, rows_are_no_pairs: {"check_pairs", "online_dpo_pairs_the_best_with_the_worst"},
    blanks_are_compared: {"what_does_not_divide_is_filled_up", "check_blanks_count_nothing"},
}  # fmt: skip


def kept_with(name, change):
    """``change`` : (self, Played) -> Played, before anything is chosen; or None, to set something of self."""

    def bug(patch):
        patch.setattr(rft.Kept, "take", lambda self, played, n: right_take(self, change(self, played) or played, n))

    bug.__name__ = name
    return bug


def all_differ(self, played):
    """Row numbers stand in what is compared."""
    labels = played.batch.labels.clone()
    labels[:, 0] = torch.arange(len(labels))
    return replace(played, batch=replace(played.batch, labels=torch.where(played.ok[:, None], labels, IGNORE)))


def first_tokens_decide(self, played):
    labels = played.batch.labels.clone()
    labels[:, 2:] = IGNORE
    return replace(played, batch=replace(played.batch, labels=labels))


def shares_counted_by_what_is_right(patch):
    def wrong(self, played, n):
        found = right_take(self, played, n)
        return replace(found, notes={"kept": len(found.index) / max(int((played.reward >= self.right).sum()), 1), "repeated": found.notes["repeated"]})

    patch.setattr(rft.Kept, "take", wrong)


KEPT = {
    kept_with("more_than_right_is_asked", lambda s, p: replace(p, reward=p.reward - 1e-6)): {"check_kept"},
    kept_with("wrong_answers_stay", lambda s, p: replace(p, reward=p.reward * 0 + 9)): {"check_kept", "rft_keeps_what_is_right_and_distinct"},
    kept_with("failed_answers_are_right", lambda s, p: replace(p, ok=torch.ones_like(p.ok), batch=replace(p.batch, labels=p.batch.tokens + 1))): {"check_kept"},
    kept_with("without_a_limit", lambda s, p: setattr(s, "most", 99)): {"check_kept", "rft_keeps_what_is_right_and_distinct"},
    kept_with("one_limit_for_all_prompts", lambda s, p: replace(p, samples=len(p.reward))): {"check_kept"},
    kept_with("repetitions_stay", all_differ): {"check_kept"},
    kept_with("first_tokens_decide", first_tokens_decide): {"check_kept", "rft_keeps_what_is_right_and_distinct"},
    shares_counted_by_what_is_right: {"check_kept"},
}  # fmt: skip

right_groups = advantages._groups


def mean_of_the_sum(patch):
    """The mean as it comes, once."""

    def wrong(rewards, ok, samples):
        r, keep, _ = right_groups(rewards, ok, samples)
        return r, keep, (r * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)

    patch.setattr(advantages, "_groups", wrong)


def failed_answers_in_the_mean(patch):
    """With ok and failed answers alike the mean of equal rewards is another."""
    patch.setattr(advantages, "_groups", lambda rewards, ok, samples: right_groups(rewards, torch.ones_like(ok), samples))


FLAT = {mean_of_the_sum: {"check_flat_is_nothing"}, failed_answers_in_the_mean: {"check_flat_is_nothing"}}
_, test_bugs_of_flat_groups_are_caught = bug_tests(FLAT, CHECKS)

test_all_hold, test_bugs_of_sampling_are_caught = bug_tests(SAMPLING, CHECKS)
_, test_bugs_of_the_source_are_caught = bug_tests(SOURCE, CHECKS)
_, test_bugs_of_online_dpo_are_caught = bug_tests(PAIRS, CHECKS)
_, test_bugs_of_rejection_sampling_are_caught = bug_tests(KEPT, CHECKS)


def test_six_bugs_of_each():
    assert all(len(bugs) >= 6 for bugs in (SAMPLING, SOURCE, PAIRS, KEPT))
    assert Prompts.identity != Unlike.identity
