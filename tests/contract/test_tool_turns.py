"""Answers over several turns: which tokens are the model's, with which probabilities, what a tool answers, and where it ends."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.golden.planted import bug_tests
from tests.golden.rl_cases import CONFIGS, EXACT, extra, rows
from zero2llm.core.config import parse
from zero2llm.engine.engine import Engine
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.chat import chatml, render_text
from zero2llm.tokenizers.shipped import with_template
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl import rollout, tools
from zero2llm.train.rl.advantages import gae, returns
from zero2llm.train.rl.answer import Answer
from zero2llm.train.rl.grpo import GRPOConfig
from zero2llm.train.rl.methods import assemble
from zero2llm.train.rl.policy import NOTE, policy_logps
from zero2llm.train.rl.rewards import ExactConfig, Mixture, ToolConfig
from zero2llm.train.rl.rollout import RolloutConfig, play, rows_of
from zero2llm.train.rl.source import Rollouts
from zero2llm.train.rl.tools import Call, Toolbox, schemas

SCHEMAS = schemas(["calculator"])


def trained_tokenizer():
    """On what the tests say, so that prompts are short."""
    talk = [{"role": "user", "content": "What is 5 + 1?"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "5 + 1"}}]}]
    text = render_text(chatml(), talk, tools=SCHEMAS)
    return Tokenizer.train([text] * 4, 400)


TOKENIZER = trained_tokenizer()
CFG = RolloutConfig(prompts=2, samples=2, max_tokens=500, temperature=0.7, tools=("calculator",), turns=3)
ONE = replace(CFG, samples=1)
END = TOKENIZER.im_end_id


def call(expression: str) -> dict:
    return {"name": "calculator", "arguments": {"expression": expression}}


def said(*calls, content="") -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)} if calls else {"role": "assistant", "content": content}


def tool(result: str) -> dict:
    return {"role": "tool", "content": result}


def question(i: int) -> dict:
    return {"role": "user", "content": f"What is {i} + 1?"}


def ids_of(turn: dict) -> list[int]:
    """What the model would write to say this turn."""
    ids, mask = TOKENIZER.render([question(0), turn], tools=SCHEMAS)
    return [i for i, m in zip(ids, mask, strict=True) if m]


def small_model(score=False):
    torch.manual_seed(0)
    block = {"mixer": {"kind": "gqa", "n_heads": 2, "position": {"kind": "rope", "base": 50.0}}, "ffn": {"kind": "glu", "hidden": 16}, "norm": {"kind": "rms"}}
    data = {"vocab_size": 408, "d_model": 16, "max_len": 1500, "layers": {"pattern": ["b"]}, "blocks": {"b": block}, "final_norm": {"kind": "rms"}}
    return LM(parse(ModelConfig, data | {"tie_embeddings": True, "score_head": score})).eval()


class Scripted(Engine):
    """The engine, but which tokens are drawn stands in a script: turns of each conversation. Their log-probs are the model's."""

    script: dict[int, list[list[int]]] = {}  # number of the question -> tokens of its turns
    asked: list = []

    def _sample(self, logits):
        logits[:, self.tokenizer.vocab_size :] = -float("inf")
        tokens = []
        for request in self.running:
            text = self.tokenizer.decode(request.prompt)
            turn = text.count("<|im_start|>assistant") - 1
            tokens.append(self.script[int(text.split("What is ")[1].split()[0])][turn][len(request.output)])
        tokens = torch.tensor(tokens)
        self.seen.scatter_(1, tokens[:, None], True)
        self._note(logits, tokens)
        return tokens

    def submit(self, prompt, sampling=None):
        self.asked.append((list(prompt), sampling))
        return super().submit(prompt, sampling)


def played(*turns, cfg=CFG, numbers=(5,), model=None, script=None):
    """Each question answered by the same scripted turns (messages, or ids), or by its own of ``script``."""
    same = [turn if isinstance(turn, list) else ids_of(turn) for turn in turns]
    Scripted.script, Scripted.asked = script or {n: same for n in range(100)}, []
    asked = [(n, TOKENIZER.render([question(n)], True, SCHEMAS)[0], {"answer": "6", "g": n}) for n in numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "Engine", Scripted)
        return play(model or small_model(), TOKENIZER, asked, cfg, 1, 0)


def check_ids():
    """Prompt, calls, results and answer are what the template makes of the whole conversation, and so is the mask."""
    for calls, results in (([call("5 + 1")], ["6"]), ([call("5 * 5"), call("1 / 4")], ["25", "0.25"])):
        for e in played(said(*calls), said(content="It is 6.")):
            talk = [question(5), said(*calls), *map(tool, results), said(content="It is 6.")]
            ids, mask = TOKENIZER.render(talk, tools=SCHEMAS)
            assert e.ids == ids[: len(e.ids)] and e.trained == mask[: len(e.ids)] and not any(mask[len(e.ids) :])
            assert (e.text, e.finish, e.turns, [c.result for c in e.calls]) == ("It is 6.", "stop", 2, results)


def check_sampled_ids_stay():
    """A call spelled byte by byte, as no encoder would: its ids are kept."""
    odd = [i for one in TOKENIZER.decode(ids_of(said(call("5 + 1")))[:-1]) for i in TOKENIZER.encode(one)] + [END]
    assert odd != ids_of(said(call("5 + 1")))
    e = played(odd, said(content="6"))[0]
    start = len(TOKENIZER.render([question(5)], True, SCHEMAS)[0])
    assert e.ids[start : start + len(odd)] == odd and e.trained[start : start + len(odd)] == [1] * len(odd) and e.calls[0].result == "6"


def check_logps():
    """Of all trained tokens, from a fresh forward pass over the padded rows."""
    model = small_model()
    episodes = played(said(call("5 + 1")), said(call("1 /")), said(content="6"), numbers=(5, 77), model=model)
    episodes += played(said(content="no"), model=model)
    batch, old = rows_of(episodes, torch.ones(len(episodes)), TOKENIZER.pad_id)
    with torch.no_grad():
        want = policy_logps(model, model(batch.tokens, batch.seq)[0], batch.labels, CFG.temperature, TOKENIZER.vocab_size)
    assert (want - old).abs().max() < 1e-4 and (want != 0).sum() == (batch.labels != -100).sum() == sum(sum(e.trained) for e in episodes)
    assert all(len(e.ids) == len(e.trained) == len(e.logps) for e in episodes)


BAD = {  # what stands between <tool_call> and its end -> words of the tool's answer
    "calculator(1)": "not JSON", "[1]": "an object with a name", '{"arguments": {}}': "an object with a name", '{"name": 3}': "an object with a name",
    '{"name": "python", "arguments": {"code": "1"}}': "no tool 'python'; there are: calculator", '{"name": "calculator"}': "needs the arguments expression",
    '{"name": "calculator", "arguments": "1"}': "needs the arguments", '{"name": "calculator", "arguments": {"expression": 3}}': "as text",
    '{"name": "calculator", "arguments": {"expression": "1", "x": "1"}}': "needs the arguments", '{"name": "calculator", "arguments": {"expression": "1/0"}}': "division by zero",
    '{"name": "calculator", "arguments": {"expression": "1"}, "id": 1}': "nothing else", "": "not JSON", '{"name": "\\ud800", "arguments": {}}': "no tool",
    '{"name": "\\udbff\\udff0"}': "no tool",
}  # fmt: skip


def check_errors():
    """The model reads what was wrong, in a turn of the tool's, and it is counted."""
    each = {n: [[*TOKENIZER.encode(f"<tool_call>\n{inside}\n</tool_call>"), END], ids_of(said(content="?"))] for n, inside in enumerate(BAD)}
    for e, (inside, words) in zip(played(script=each, cfg=ONE, numbers=list(each)), BAD.items(), strict=True):
        assert [c.failed for c in e.calls] == [True] and words in e.calls[0].result and len(e.calls[0].result) < 200, inside
        assert f"<|im_start|>tool\n{e.calls[0].result}<|im_end|>\n<|im_start|>assistant\n?" in TOKENIZER.decode(e.ids) and e.turns == 2
    unclosed = played([*TOKENIZER.encode('so <tool_call>{"name"'), END], said(content="?"))[0]
    assert unclosed.calls[0].failed and "not JSON" in unclosed.calls[0].result
    both = played([*TOKENIZER.encode("<tool_call>{}</tool_call>" + TOKENIZER.decode(ids_of(said(call("2*3")))[:-1])), END], said(content="6"))[0]
    assert [c.failed for c in both.calls] == [True, False] and both.calls[1].result == "6"


def check_budget():
    """max_tokens counts everything behind the prompt; what is cut says so, and a reply that leaves no room is not given."""
    whole = played(said(call("5 + 1")), said(content="It is 6."))[0]
    behind = len(whole.ids) - len(TOKENIZER.render([question(5)], True, SCHEMAS)[0])
    first, last = len(ids_of(said(call("5 + 1")))), len(ids_of(said(content="It is 6.")))
    for budget in (behind, behind - 1, behind - last + 1, behind - last, first, first - 1):
        cfg = RolloutConfig(prompts=2, samples=1, max_tokens=budget, tools=("calculator",), turns=3)
        e = played(said(call("5 + 1")), said(content="It is 6."), cfg=cfg)[0]
        got = len(e.ids) - len(whole.ids) + behind
        assert got <= budget and e.ids == whole.ids[: len(e.ids)] and e.trained == whole.trained[: len(e.ids)]
        assert e.finish == ("stop" if budget == behind else "length"), budget
        assert len(e.calls) == (1 if budget > behind - last else 0) and e.trained[-1] == 1


def check_window():
    """Nor does a row outgrow the model."""
    model = small_model()
    whole = played(said(call("5 + 1")), said(content="It is 6."), model=model)[0]
    first = sum(whole.trained) - len(ids_of(said(content="It is 6.")))
    with pytest.MonkeyPatch.context() as patch:
        cut = len(TOKENIZER.render([question(5)], True, SCHEMAS)[0]) + first + 5
        patch.setattr(Scripted, "__init__", lambda self, *a, **k: Engine.__init__(self, *a, **k, max_len=cut))
        e = played(said(call("5 + 1")), said(content="It is 6."), model=model)[0]
    assert len(e.ids) <= cut and e.finish == "length" and e.turns == 1 and not e.calls


def check_turns():
    """Calls of the last turn are not answered; without a call the first turn is the last."""
    e = played(*[said(call("5 + 1"))] * 3)[0]
    assert (e.turns, len(e.calls), e.finish, e.trained[-1]) == (3, 2, "stop", 1) and e.ids[-1] == END
    e = played(said(content="6"))[0]
    assert (e.turns, e.calls, e.finish) == (1, (), "stop")
    other = played([*ids_of(said(call("5 + 1")))[:-1], TOKENIZER.eos_id])[0]
    assert (other.turns, other.calls) == (1, ()), "a turn that the template would end otherwise cannot be gone on with"


def check_sampling():
    """Every turn of every answer draws from a seed of its own, and may be as long as is left."""
    episodes = played(said(call("5 + 1")), said(call("7 - 1")), said(content="6"), numbers=(5, 6))
    assert len(Scripted.asked) == 12 and len({s.seed for _, s in Scripted.asked}) == 12
    start = len(TOKENIZER.render([question(5)], True, SCHEMAS)[0])
    assert all(s.max_tokens == CFG.max_tokens - (len(prompt) - start) and s.temperature == CFG.temperature and s.logprobs for prompt, s in Scripted.asked)
    assert [e.record["g"] for e in episodes] == [5, 5, 6, 6]


CHECKS = [check_ids, check_sampled_ids_stay, check_logps, check_errors, check_budget, check_window, check_turns, check_sampling]


def replies_are_trained(patch):
    def environment(self, calls, ids):
        self.said, self.trained, self.logps = self.said + ids, self.trained + [1] * len(ids), self.logps + [0.0] * len(ids)
        self.calls += tuple(calls)

    patch.setattr(rollout.Talk, "environment", environment)


def logps_slip_by_one(patch):
    right = rollout.Talk.policy
    patch.setattr(rollout.Talk, "policy", lambda self, done: (right(self, done), self.logps.append(self.logps.pop(0)))[0])


def replies_begin_late(patch):
    right = Toolbox.reply
    patch.setattr(Toolbox, "reply", lambda self, calls: right(self, calls)[1:])


def replies_are_tokens_again(patch):
    right = rollout.Talk.policy

    def policy(self, done):
        right(self, done)
        self.said = [i for i in self.said if i != END]
        ids = TOKENIZER.encode(TOKENIZER.decode(self.said))
        self.said, self.trained, self.logps = ids + [END], [1] * (len(ids) + 1), [0.0] * (len(ids) + 1)

    patch.setattr(rollout.Talk, "policy", policy)


def errors_are_results(patch):
    right = Toolbox.answered
    patch.setattr(Toolbox, "answered", lambda self, text: Call(right(self, text).result, False))


def only_the_first_call(patch):
    right = Toolbox.calls
    patch.setattr(Toolbox, "calls", lambda self, ids: right(self, ids)[:1])


def one_seed_for_all_turns(patch):
    right = rollout.seed_of
    patch.setattr(rollout, "seed_of", lambda *numbers: right(*numbers[:4]))


def replies_are_free(patch):
    right = rollout.converse
    more = lambda sampling: lambda row, turn, left: sampling(row, turn, CFG.max_tokens if turn else left)
    patch.setattr(rollout, "converse", lambda engine, prompts, cfg, sampling: right(engine, prompts, cfg, more(sampling)))


def the_window_is_forgotten(patch):
    right = rollout.after
    patch.setattr(rollout, "after", lambda talk, tools, cfg, max_len: right(talk, tools, cfg, 10**9))


def the_last_call_is_answered(patch):
    right = rollout.after

    def after(talk, tools, cfg, max_len):
        found = right(talk, tools, cfg, max_len)
        if talk.turns == cfg.turns and (calls := tools.calls(talk.last.tokens)):
            talk.environment(calls, tools.reply(calls))
        return found

    patch.setattr(rollout, "after", after)


BUGS = {
    replies_are_trained: {"check_ids", "check_logps"},
    logps_slip_by_one: {"check_logps"},
    replies_begin_late: {"check_ids"},
    replies_are_tokens_again: {"check_sampled_ids_stay", "check_logps"},
    errors_are_results: {"check_errors"},
    only_the_first_call: {"check_ids", "check_errors"},
    one_seed_for_all_turns: {"check_sampling"},
    replies_are_free: {"check_budget", "check_sampling"},
    the_window_is_forgotten: {"check_window"},
    the_last_call_is_answered: {"check_turns"},
}
test_turns, test_bugs_are_caught = bug_tests(BUGS, CHECKS, also=(ValueError, RuntimeError, IndexError))


# The source: metrics, ranks, resuming


class Questions:
    identity = {"prompts": "questions"}

    def prompt(self, g):
        return TOKENIZER.render([question(g)], True, SCHEMAS)[0], {"answer": str(g + 1), "g": g}


def source(world=None, **changes):
    cfg = RolloutConfig(**{"prompts": 4, "samples": 2, "max_tokens": 500, "tools": ("calculator",), "turns": 3, "minibatches": 2} | changes)
    shape, objective = assemble(GRPOConfig(), 1.0, TOKENIZER.vocab_size, None)
    model = small_model()
    reward = Mixture.of([ExactConfig(), ToolConfig(weight=0.5)], TOKENIZER)
    return Rollouts(model, TOKENIZER, Questions(), reward, shape, cfg, seed=1, world=world or World()), objective, model


@pytest.fixture
def scripted(monkeypatch):
    """Question g: right with one call; with a bad call first; without any; wrong."""
    bad = [*TOKENIZER.encode("<tool_call>?</tool_call>"), END]
    kinds = lambda g: [[ids_of(said(call(f"{g} + 1"))), ids_of(said(content=str(g + 1)))], [bad, ids_of(said(call(f"{g} + 1"))), ids_of(said(content=str(g + 1)))],
                       [ids_of(said(content="no"))], [ids_of(said(call("1/0"))), ids_of(said(content="no"))]][g % 4]  # fmt: skip
    monkeypatch.setattr(Scripted, "script", {g: kinds(g) for g in range(64)})
    monkeypatch.setattr(rollout, "Engine", Scripted)


def test_metrics_and_rewards(scripted):
    made, objective, model = source()
    batch = made.collect()[0]
    note = lambda name: float(batch.extra[NOTE + name][0])
    assert note("turns") == (2 + 3 + 1 + 2) / 4 and note("tool_calls") == (1 + 2 + 0 + 1) / 4 and note("tool_errors") == (0 + 1 + 0 + 1) / 4
    assert note("reward") == pytest.approx((1.5 + 1.25 + 0 + 0) / 4) and note("failed") == note("truncated") == 0
    loss = objective(model, batch.rows(slice(0, 4)))
    assert torch.isfinite(loss.total) and {"turns", "tool_calls", "tool_errors"} <= set(loss.metrics)
    ratio = loss.metrics["ratio"]
    assert float(ratio[0] / ratio[1]) == pytest.approx(1, abs=1e-4)


def test_a_run_goes_on_to_the_bit(scripted):
    whole, again = source()[0], source()[0]
    stream = iter(whole)
    next(stream)
    state = json.loads(json.dumps(whole.state_dict()))
    again.load_state_dict(state)
    ours, theirs = iter(whole), iter(again)
    for _ in range(3):
        a, b = next(ours), next(theirs)
        assert a.tokens.equal(b.tokens) and a.labels.equal(b.labels)
        assert all(a.extra[k].equal(b.extra[k]) for k in a.extra if k != NOTE + "rollout_s")


def test_what_a_prompt_draws_does_not_depend_on_its_company(scripted):
    made = source()[0]
    asked = [(g, *Questions().prompt(g)) for g in range(4)]
    together = play(made.model, TOKENIZER, asked, made.cfg, 1, 0)
    apart = [e for one in (asked[:2], asked[2:]) for e in play(made.model, TOKENIZER, one, made.cfg, 1, 0)]
    assert [(e.ids, e.trained, e.calls) for e in together] == [(e.ids, e.trained, e.calls) for e in apart]


@pytest.mark.parametrize("name", [name for name in CONFIGS])
def test_methods_pass_over_what_is_not_the_policys(name):
    """Columns of an environment between the policy's change no method's loss."""
    method = CONFIGS[name].build()
    logp, old, adv, mask = rows(1)
    wide = lambda x, fill: torch.stack((x, torch.full_like(x, fill)), 2).flatten(1)
    spread = [wide(x.detach(), fill) for x, fill in ((logp, -3.0), (old, -1.0), (mask, False))]
    plain = method.surrogate(logp, old, adv, mask, extra(old, adv))
    gaps = method.surrogate(spread[0], spread[1], adv, spread[2], extra(spread[1], adv))
    torch.testing.assert_close(plain.total, gaps.total, **EXACT)
    assert plain.count == gaps.count


def test_returns_and_gae_pass_over_it():
    r, v, mask = torch.randn(2, 5).double(), torch.randn(2, 5).double(), torch.ones(2, 5, dtype=torch.bool)
    wide = lambda x, fill: torch.stack((x, torch.full_like(x, fill)), 2).flatten(1)
    pairs = [(returns(r, mask, 0.9), returns(wide(r, 7.0), wide(mask, False), 0.9)), *zip(gae(r, v, mask), gae(wide(r, 7.0), wide(v, 7.0), wide(mask, False)), strict=True)]
    for plain, gaps in pairs:
        torch.testing.assert_close(gaps, wide(plain, 0.0), **EXACT)


# The rule, and what is refused


def test_the_rule_tool():
    ok, bad = Call("6", False), Call("error: ?", True)
    answer = lambda text, *calls: Answer(text, "stop", 1, {}, (), calls)
    rule, used = ToolConfig().build(), ToolConfig(used=True).build()
    assert rule(answer("6")) == 0 and rule(answer("6", ok)) == 1 and rule(answer("x", bad, ok)) == 0.5 and rule(answer("x", bad)) == 0
    assert used(answer("It is 6.", bad, ok)) == 0.5 and used(answer("It is 7.", ok)) == 0


@pytest.mark.parametrize(
    "data, words",
    [({"tools": ["calculator"]}, "turns = 1"), ({"turns": 2}, "tools = \\[\\]"), ({"tools": ["calculator", "calculator"], "turns": 2}, "once"), ({"turns": 0}, "turns = 0"),
     ({"tools": ["calculator"], "turns": 2, "stop": ["x"]}, "rollout.stop"), ({"tools": ["python"], "turns": 2}, "python"), ({"truncated": "drop"}, "drop")],
)  # fmt: skip
def test_mistakes_are_named(data, words):
    with pytest.raises(ValueError, match=words):
        parse(RolloutConfig, data)


def test_a_template_that_knows_no_tools_is_refused():
    with pytest.raises(ValueError, match="rollout.tools: .*no place for tool_calls.*chatml"):
        Toolbox(with_template(TOKENIZER, "smollm2"), ["calculator"])
    other = Tokenizer(TOKENIZER.library, TOKENIZER.template.replace("<tool_call>", "<call>"), TOKENIZER.roles)
    with pytest.raises(ValueError, match="cannot be read back"):
        Toolbox(other, ["calculator"])


@pytest.mark.parametrize("template", ["qwen2.5", "qwen3", "minimind-v3"])
def test_other_templates_go_on_as_they_would_render(template):
    """What stands behind an answer's end is what the template makes of the whole conversation there."""
    names = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    tokenizer = with_template(TOKENIZER.add_tokens(names, special=True), template)
    box = Toolbox(tokenizer, ["calculator"])
    talk = [question(3), said(call("3 + 1")), tool("4")]
    whole, _ = tokenizer.render(talk, True, SCHEMAS)
    reply = box.reply([Call("4", False)])
    assert whole[-len(reply) :] == reply and whole[-len(reply) - 1] == box.end
    assert Counter(c.result for c in box.calls(whole[: -len(reply)]))["4"] == 1
    assert tools.TOOLS["calculator"].schema("calculator") == SCHEMAS[0]
