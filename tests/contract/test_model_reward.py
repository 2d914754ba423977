"""A reward model as a rule: the score that the model gives the rendered conversation, refusals before anything is sampled, isolation."""

from __future__ import annotations

import json

import pytest
import torch

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.core.seq import Seq
from zero2llm.model.heads import add_score
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint
from zero2llm.train.rl.answer import Answer, Together
from zero2llm.train.rl.model_reward import ModelRewardConfig
from zero2llm.train.rl.rewards import Mixture, RegexConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    write_data(root / "data")
    zero2llm.run(zero2llm.make_recipe(**(recipe(root, "pretrain") | {"fit": {"steps": 2, "micro_rows": 4}})), quiet=True)
    reward = recipe(root, "dpo") | {"out": str(root / "reward"), "init": str(root / "pretrain"), "objective": {"kind": "reward"}, "fit": {"steps": 3, "micro_rows": 4}}
    reward["eval"] = {"every": 9}
    zero2llm.run(zero2llm.make_recipe(**reward), quiet=True)
    return root


@pytest.fixture(scope="module")
def judge(root):
    found = Checkpoint.open(root / "reward")
    return found.load_model(), Tokenizer.load(found.tokenizer_dir)


def answer(tokenizer, text: str, end: bool = True) -> Answer:
    ids, _ = tokenizer.render([{"role": "user", "content": "the sea"}], True)
    return Answer(text, "stop", 1, {}, [*ids, *tokenizer.encode(text), *([tokenizer.im_end_id] if end else [])])


def by_hand(model, tokenizer, text: str) -> float:
    """One row at a time, of the conversation as the template shows it, which is what the model was trained on."""
    ids, _ = tokenizer.render([{"role": "user", "content": "the sea"}, {"role": "assistant", "content": text}])
    with torch.no_grad():
        return float(model.score(model(torch.tensor([ids]), Seq.rows(1, len(ids)))[0])[0, -1])


def test_scores_are_those_of_whole_conversations(root, judge):
    model, tokenizer = judge
    texts = ["ship", "the whale sailed over", "x", "dark water and saw"]
    rule = ModelRewardConfig(path=str(root / "reward"), batch=3).build(tokenizer)
    assert isinstance(rule, Together)
    got = rule.score([answer(tokenizer, text, end) for text in texts for end in (True, False)])
    want = [by_hand(model, tokenizer, text) for text in texts for _ in range(2)]
    assert got == pytest.approx(want, abs=1e-5) and len({round(v, 6) for v in want}) == 4
    end = [*answer(tokenizer, "ship").ids[:-1], tokenizer.eos_id]
    assert rule.score([Answer("ship", "stop", 1, {}, end)])[0] == pytest.approx(want[0], abs=1e-5), "another end counts as the turn's"


def test_one_answer_that_does_not_fit_costs_no_other(root, judge):
    model, tokenizer = judge
    mixture = Mixture.of([RegexConfig(pattern=".*", weight=2.0), ModelRewardConfig(path=str(root / "reward"), weight=0.5)], tokenizer)
    got = mixture([answer(tokenizer, "ship"), answer(tokenizer, "sea " * 100), answer(tokenizer, "x")])
    assert got[1] is None and "the reward model reads 64" in mixture.first_failure
    assert [got[0], got[2]] == pytest.approx([2 + 0.5 * by_hand(model, tokenizer, text) for text in ("ship", "x")], abs=1e-5)


def test_a_mixture_keeps_failures_apart():
    def rule(a):
        if a.text == "bad":
            raise KeyError("nothing")
        return float("nan") if a.text == "nan" else 1.0

    both = Mixture([(1.0, rule), (10.0, Together(lambda answers: [f"no {a.text}" if a.text == "c" else 0.5 for a in answers]))])
    assert both([Answer(t, "stop", 1, {}) for t in ("a", "bad", "nan", "c", "d")]) == [6.0, None, None, None, 6.0]
    assert "nothing" in both.first_failure
    assert Mixture([(1.0, rule)])([]) == []


def test_a_critic_is_no_reward_model(root, judge, monkeypatch):
    right = Checkpoint.load_model

    def with_critic(self, *args):
        model = right(self, *args)
        add_score(model)
        return model

    monkeypatch.setattr(Checkpoint, "load_model", with_critic)
    with pytest.raises(ValueError, match="has a critic.*train reward"):
        ModelRewardConfig(path=str(root / "reward")).build(judge[1])


def test_what_cannot_serve_is_refused(root, judge, tmp_path):
    _, tokenizer = judge
    with pytest.raises(ValueError, match="pretrain has no score head.*train reward"):
        ModelRewardConfig(path=str(root / "pretrain")).build(tokenizer)
    other = Tokenizer.train(["another text of whales"] * 4, 270)
    with pytest.raises(ValueError, match="reward model: .*another vocabulary.*policy's tokenizer") as error:
        ModelRewardConfig(path=str(root / "reward")).build(other)
    assert "teacher" not in str(error.value).split(";")[-1]
    turned = Tokenizer(tokenizer.library, tokenizer.template.replace("\n", " "), tokenizer.roles)
    with pytest.raises(ValueError, match="another chat template"):
        ModelRewardConfig(path=str(root / "reward")).build(turned)
    with pytest.raises(ValueError, match="batch = 0"):
        ModelRewardConfig(path="x", batch=0)


PLAIN = """{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}{%- generation -%}{{- m['content'] + '<|im_end|>' -}}{%- endgeneration -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def rl(root, out, **changes) -> dict:
    data = {
        "out": str(out), "init": str(root / "pretrain"), "data": {"train": [str(root / "data" / "prompts.jsonl")], "valid_fraction": 0.2}, "objective": {"kind": "grpo"},
        "rollout": {"prompts": 4, "samples": 4, "max_tokens": 6}, "optim": {"kind": "adamw", "lr": 0.01}, "fit": {"steps": 2, "micro_rows": 8}, "seq_len": 64, "device": "cpu",
        "reward": [{"kind": "model", "path": str(root / "reward")}, {"kind": "code", "weight": 0.1, "seconds": 1}],
    }  # fmt: skip
    lines = [json.dumps({"prompt": f"the sea {i}", "answer": ["assert f(1) == 2"]}) for i in range(40)]
    (root / "data" / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return data | changes


def test_a_stage_with_both_rules(root, tmp_path):
    done = zero2llm.run(zero2llm.make_recipe(**rl(root, tmp_path / "run")), quiet=True)
    assert done.valid["valid_failed"] == 0 and abs(done.valid["valid_reward"]) > 0


def test_a_stage_refuses_before_it_samples(root, tmp_path, monkeypatch):
    monkeypatch.setattr("zero2llm.train.rl.source.Rollouts.collect", lambda self: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="no score head"):
        zero2llm.run(zero2llm.make_recipe(**rl(root, tmp_path / "run", reward=[{"kind": "model", "path": str(root / "pretrain")}])), quiet=True)
    (tmp_path / "plain.jinja").write_text(PLAIN, encoding="utf-8")
    asked = {"rollout": {"tools": ["calculator"], "turns": 2, "max_tokens": 6, "prompts": 4}, "reward": [{"kind": "tool"}], "chat_template": str(tmp_path / "plain.jinja")}
    with pytest.raises(ValueError, match="no place for tool"):
        zero2llm.run(zero2llm.make_recipe(**rl(root, tmp_path / "run2", **asked)), quiet=True)
