"""What alignment is given that it cannot learn from: refused with its place, or left out and counted; never a silent NaN.

Everything goes through a recipe: files or a reward in, metrics.jsonl and weights out.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

import zero2llm
from tests.contract.stages import recipe, write_data
from tests.contract.test_online_stage import KINDS, rl
from zero2llm.core.files import load_tensors
from zero2llm.lab import online, stage
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint, latest, save_model
from zero2llm.train.rl.rewards import Mixture
from zero2llm.train.telemetry import read_metrics

PAIRS = ("dpo", "ipo", "orpo", "simpo", "cpo", "reward", "kto")
GROUPS = ("grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "bapo", "rloo", "trpo", "online_dpo")
STILL = {"optim": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.0}}  # what moves the weights is the gradient alone
slow = lambda kinds, quick: [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model that has seen a little text, prompts, and the same model if it could only say the end token."""
    root = tmp_path_factory.mktemp("bad")
    write_data(root / "data")
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain") | {"fit": {"steps": 2, "micro_rows": 4}}), quiet=True)
    lines(root / "data" / "prompts.jsonl", [{"prompt": f"the sea {'and the ship ' * (i % 3)}{i}", "answer": "the"} for i in range(40)])
    found = Checkpoint.open(root / "pretrain")
    model, tokenizer = found.load_model(), Tokenizer.load(found.tokenizer_dir)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()  # what goes in comes out
        model.embed.weight.fill_(0.25)
        model.embed.weight[sorted(tokenizer.stop_ids)[-1]] = 2.5
    save_model(model, tokenizer.save, root / "silent", found)
    return root


def lines(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def go(made):
    return zero2llm.run(zero2llm.make_recipe(**made), quiet=True)


def logged(out):
    """What a run wrote down, every number of it finite."""
    rows = read_metrics(out / "metrics.jsonl")
    for row in rows:
        wrong = {name: value for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        assert not wrong, (row.get("step"), wrong)
    return [row for row in rows if row["kind"] == "train"]


def weights(run):
    found = load_tensors(latest(run).path / "model")
    assert all(torch.isfinite(t).all() for t in found.values())
    return found


def unmoved(root, run, start="pretrain"):
    before = load_tensors((latest(root / start).path if (root / start / "checkpoints").is_dir() else root / start) / "model")
    after = weights(run)
    return all(before[name].equal(after[name]) for name in before)


# Pairs and judged answers from files


def preference(root, out, kind, path, **changes):
    start = {"out": str(out), "init": str(root / "pretrain"), "objective": {"kind": kind}, "eval": {"every": 2}, "fit": {"steps": 2, "micro_rows": 4}}
    return recipe(root, "dpo") | start | {"data": {"train": [path], "valid_fraction": 0.2, **changes}, "save": {"every_s": 60.0, "keep": 2}}


LONG = "the sea and the ship " * 40
FAULTS = {  # pairs, and what is said of them
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "equal when shown": ({"prompt": "a", "chosen": "b", "rejected": "b  "}, "chosen and rejected are the same"),
    "no chosen": ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' holds no text"),
    "no rejected": ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' holds no text"),
    "long prompt": ({"prompt": LONG, "chosen": "b", "rejected": "c"}, "tokens do not fit into 64; raise seq_len"),
    "long answer": ({"prompt": "a", "chosen": LONG, "rejected": "c"}, "tokens do not fit into 64; raise seq_len"),
}
JUDGED = {
    "no completion": ({"prompt": "a", "completion": "", "label": True}, "'completion' holds no text"),
    "a blank completion": ({"prompt": "a", "completion": " ", "label": False}, "'completion' holds no text"),
    "long prompt": ({"prompt": LONG, "completion": "b", "label": True}, "tokens do not fit into 64; raise seq_len"),
}


def mixed(root, folder, bad, kind):
    """Good records with the bad ones behind the first of them; equal pairs are left out without being asked to."""
    good = [json.loads(line) for line in (root / "data" / "pairs.jsonl").read_text("utf-8").splitlines()]
    if kind == "kto":
        good = [{"prompt": r["prompt"], "completion": r["chosen" if i % 2 else "rejected"], "label": bool(i % 2)} for i, r in enumerate(good)]
    return lines(folder / "records.jsonl", [good[0], *bad, *good[1:]])


@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.startswith("equal")])
@pytest.mark.parametrize("kind", slow(PAIRS[:-1], ("dpo",)))
def test_a_pair_that_cannot_be_read_stops_the_run_before_it_begins(root, tmp_path, kind, fault):
    record, says = FAULTS[fault]
    with pytest.raises(ValueError, match=f"records.jsonl.*line 2.*{says}"):
        go(preference(root, tmp_path / "run", kind, mixed(root, tmp_path, [record], kind)))


@pytest.mark.parametrize("fault", JUDGED)
def test_a_judged_answer_that_cannot_be_read_stops_the_run_before_it_begins(root, tmp_path, fault):
    record, says = JUDGED[fault]
    with pytest.raises(ValueError, match=f"records.jsonl.*line 2.*{says}"):
        go(preference(root, tmp_path / "run", "kto", mixed(root, tmp_path, [record], "kto")))


@pytest.mark.parametrize("kind", slow(PAIRS, ("dpo", "kto")))
def test_bad_records_are_left_out_listed_and_counted(root, tmp_path, capsys, kind):
    """What remains trains exactly as if they had never stood there."""
    bad = [record for record, _ in (JUDGED if kind == "kto" else FAULTS).values()]
    clean, out = tmp_path / "clean", tmp_path / "run"
    clean.mkdir()
    go(preference(root, out, kind, mixed(root, tmp_path, bad, kind), skip_bad_records=True))
    assert f"{len(bad)} bad records left out" in " ".join(capsys.readouterr().out.split())
    listed = (out / "data" / "bad_records.txt").read_text("utf-8")
    for number, (_, says) in enumerate((JUDGED if kind == "kto" else FAULTS).values(), 2):
        assert any(f"line {number}:" in line and says in line for line in listed.splitlines()), (number, says)
    go(preference(root, clean / "run", kind, mixed(root, clean, [], kind)))
    for a, b in zip(logged(out), logged(clean / "run"), strict=True):
        assert {k: v for k, v in a.items() if k not in CLOCK} == {k: v for k, v in b.items() if k not in CLOCK}
    a, b = weights(out), weights(clean / "run")
    assert all(a[name].equal(b[name]) for name in a)


CLOCK = {"time", "seconds", "tokens_per_s", "step_s", "rollout_s", "memory_mb"}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_equal_pairs_need_no_permission_and_a_file_of_nothing_else_is_refused(root, tmp_path, capsys, kind):
    equal = [FAULTS["equal"][0]]
    good = [json.loads(line) for line in (root / "data" / "pairs.jsonl").read_text("utf-8").splitlines()]
    go(preference(root, tmp_path / "run", kind, lines(tmp_path / "some.jsonl", [*good, *equal])))
    assert "1 bad records left out" in " ".join(capsys.readouterr().out.split()) and logged(tmp_path / "run")
    with pytest.raises(ValueError, match=r"30 bad records were left out, the first: .*line 1: chosen and rejected are the same"):
        go(preference(root, tmp_path / "none", kind, lines(tmp_path / "all.jsonl", equal * 30)))


# Prompts


def test_prompts_longer_than_the_window(root, tmp_path, capsys):
    """The window is seq_len less what an answer may take."""
    prompts = [{"prompt": f"say {i}"} for i in range(30)]
    path = lines(tmp_path / "p.jsonl", [prompts[0], {"prompt": LONG}, *prompts[1:]])
    made = rl(root, "grpo", tmp_path / "run", fit={"steps": 2, "micro_rows": 8})
    with pytest.raises(ValueError, match=r"line 2: a prompt of \d+ tokens does not fit into 58; raise seq_len"):
        go(made | {"data": {"train": [path], "valid_fraction": 0.2}})
    skipping = made | {"out": str(tmp_path / "skip"), "data": {"train": [path], "valid_fraction": 0.2, "skip_bad_records": True}}
    go(skipping)
    assert "1 bad records left out" in " ".join(capsys.readouterr().out.split())
    assert len(logged(tmp_path / "skip")) == 2 and "line 2" in (tmp_path / "skip" / "data" / "bad_records.txt").read_text("utf-8")
    with pytest.raises(ValueError, match="longer than the checkpoint reads: 64"):
        go(made | {"out": str(tmp_path / "wide"), "seq_len": 128})


# Answers without a word, and rewards that tell nothing


def method(kind):
    return {"kind": kind} | ({"length": 6} if kind == "dr_grpo" else {})


def played(root, tmp_path, monkeypatch, kind, reward=None, init="pretrain", steps=2, **changes):
    """A run of ``kind`` whose reward is ``reward(answer)``; its rows of the log."""
    if reward is not None:
        monkeypatch.setattr(online.Mixture, "of", staticmethod(lambda *_: Mixture([(1.0, reward)])))
    quiet = {"fit": {"steps": steps, "micro_rows": 8}, "save": {"every_s": 60.0, "keep": 2}, "eval": {"every": steps}}
    made = rl(root, kind, tmp_path / "run", **{"objective": method(kind), "init": str(root / init)} | STILL | quiet | changes)
    go(made)
    return logged(tmp_path / "run")


@pytest.mark.parametrize("kind", slow(KINDS, ("grpo", "ppo")))
def test_a_policy_that_says_nothing(root, tmp_path, monkeypatch, kind):
    """Answers of the end token alone are trained on like any other: their text is empty, their length 1."""
    seen = set()
    rows = played(root, tmp_path, monkeypatch, kind, lambda answer: seen.add((answer.text, answer.finish)) or 1.0, init="silent")
    assert seen == {("", "stop")} and all(row["length"] == 1 and row["truncated"] == 0 and row["failed"] == 0 for row in rows)
    assert all(row["flat"] == 1 for row in rows)
    if kind in GROUPS:
        assert all(row["grad_norm"] == 0 for row in rows) and unmoved(root, tmp_path / "run", "silent")


@pytest.mark.parametrize("kind", slow(GROUPS, ("grpo", "dapo", "online_dpo")))
def test_answers_that_are_all_worth_the_same_teach_nothing(root, tmp_path, monkeypatch, kind):
    """Not even rounding: 0.1 is no sum of halves, the mean of eight of it may be another number, and Adam makes a full step of anything."""
    null = {"objective": method(kind) | ({"reward_kl": None} if kind == "rloo" else {})}
    rows = played(root, tmp_path, monkeypatch, kind, lambda answer: 0.1, **null, rollout={"prompts": 4, "samples": 8, "max_tokens": 6})
    assert all(row["flat"] == 1 and row["grad_norm"] == 0 and row["reward"] == pytest.approx(0.1) for row in rows)
    assert unmoved(root, tmp_path / "run")
    if kind in ("trpo", "online_dpo"):
        assert all(row["skipped"] == 1 for row in rows)
    if kind == "online_dpo":
        assert all(row["tied"] == 1 for row in rows)
    if kind in ("dapo", "online_dpo"):
        assert all(row["resampled"] == {"dapo": 2, "online_dpo": 3}[kind] for row in rows), "it was tried again first"


def sometimes(kind):
    """Every third answer has no reward: the rule raises, or gives what is no number."""
    wrong = {"raises": lambda: {}["nothing"], "nan": lambda: math.nan, "inf": lambda: math.inf, "-inf": lambda: -math.inf, "text": lambda: "good"}[kind]
    return lambda answer: wrong() if sum(map(ord, answer.text)) % 3 == 0 else float(len(answer.text) % 4) + 1


@pytest.mark.parametrize("fault", slow(["raises", "nan", "inf", "-inf", "text"], ("raises", "nan")))
@pytest.mark.parametrize("kind", slow(KINDS, ("ppo",)))
def test_answers_whose_reward_fails_are_left_out_and_counted(root, tmp_path, monkeypatch, capsys, kind, fault):
    rows = played(root, tmp_path, monkeypatch, kind, sometimes(fault))
    assert all(0 < row["failed"] < 1 for row in rows) and all(row["reward"] >= 1 for row in rows), "the mean is of those that were scored"
    assert not all(row["skipped"] for row in rows) and not unmoved(root, tmp_path / "run")


@pytest.mark.parametrize("kind", slow(KINDS, ("grpo", "trpo", "online_dpo")))
def test_a_rollout_without_a_single_reward_is_a_skipped_step(root, tmp_path, monkeypatch, kind):
    def broken(answer):
        raise RuntimeError("the judge is asleep")

    rows = played(root, tmp_path, monkeypatch, kind, broken)
    assert all(row["failed"] == 1 and row["skipped"] == 1 and row["grad_norm"] == 0 for row in rows) and unmoved(root, tmp_path / "run")
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl", "valid"):
        assert row["valid_failed"] == 1 and not {"valid_reward", "valid_loss"} & set(row), "no reward is no reward of 0"


def test_a_single_answer_with_a_reward_is_compared_with_nothing(root, tmp_path, monkeypatch):
    """One of all: no mean, no deviation, no gradient."""
    monkeypatch.setattr(stage, "answered", lambda *_: {"reward": 0.0, "loss": 0.0, "failed": 0.0})
    first = []

    def reward(answer):
        first.append(answer)
        if len(first) > 1:
            raise ValueError("only the first is scored")
        return 3.0

    rows = played(root, tmp_path, monkeypatch, "grpo", reward, steps=1, rollout={"prompts": 4, "samples": 4, "max_tokens": 6})
    assert rows[0]["failed"] == pytest.approx(15 / 16) and rows[0]["grad_norm"] == 0 and rows[0]["reward"] == 3


def test_answers_that_are_all_cut_and_left_out(root, tmp_path, monkeypatch):
    """Nothing failed, and nothing is left to learn from."""
    rows = played(root, tmp_path, monkeypatch, "grpo", lambda answer: 1.0, rollout={"prompts": 4, "samples": 4, "max_tokens": 1, "truncated": "leave_out"})
    cut = [row["truncated"] for row in rows]
    assert all(c > 0.9 for c in cut) and all(row["failed"] == 0 for row in rows)
    assert all(row["skipped"] == 1 for row, c in zip(rows, cut, strict=True) if c == 1)


# A teacher with another vocabulary


def test_a_teacher_with_another_vocabulary_is_refused_before_any_work(root, tmp_path):
    """The recipe's student brings a tokenizer of its own."""
    write_data(tmp_path / "data")
    words = [{"text": f"{w} zebra quick jumping fox {i} lazily" } for i, w in enumerate("one two three four five six".split() * 40)]
    lines(tmp_path / "data" / "text.jsonl", words)
    made = recipe(tmp_path, "pretrain") | {"fit": {"steps": 1, "micro_rows": 4}, "eval": {"every": 1}}
    go(made)
    student = recipe(root, "sft") | {"out": str(tmp_path / "student"), "init": str(root / "pretrain"), "objective": {"kind": "distill"}}
    student |= {"teacher": {"path": str(tmp_path / "pretrain")}, "data": {"train": [str(root / "data" / "chat.jsonl")], "valid_fraction": 0.2, "reads": "conversations"}}
    with pytest.raises(ValueError, match=r"teacher .* has another vocabulary: id \d+ is .*sequence-level distillation"):
        go(student)
    assert not (tmp_path / "student" / "checkpoints").exists()
