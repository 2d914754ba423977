"""Every mechanism through the stages that it claims: it learns, survives a crash bit for bit, and generates in batches."""

from __future__ import annotations

import pytest
import torch

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.core.config import to_dict
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.lab.variants import FFNS, MIXERS, swapped
from zero2llm.model.presets import llama
from zero2llm.train.hooks import Save

NAMES = [f"mixer:{name}" for name in MIXERS] + [f"ffn:{name}" for name in FFNS if name != "expert_choice"]
HYBRIDS = ["mixer:kda+mla", "mixer:mamba2+window+rwkv7"]


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    write_data(folder / "data")
    return folder


def made(root, name: str, out: str, **more):
    part, _, which = name.partition(":")
    model = swapped(to_dict(llama(300, 32, 2 + which.count("+"), 2, 2, 48, 128, tied=True)), part, which)
    data = {"tokenizer": {"path": str(root / "tokenizer")} if (root / "tokenizer").is_dir() else {"vocab_size": 300}}
    changes = {"model": model, "out": str(root / out), "optim": {"kind": "adamw", "lr": 0.02}} | data | more
    return zero2llm.make_recipe(**(recipe(root, "pretrain") | changes))


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(root):
    zero2llm.run(made(root, "mixer:mha", "first"), quiet=True)
    (root / "first" / "tokenizer").rename(root / "tokenizer")


@pytest.mark.parametrize("name", [*NAMES, *HYBRIDS])
def test_it_learns_survives_a_crash_and_generates(root, name, monkeypatch):
    where = name.replace(":", "-").replace("+", "-")
    whole = zero2llm.run(made(root, name, where), quiet=True)
    first, last = (float(line["loss"]) for line in _losses(root / where))
    assert last < first - 0.05, "training does not lower the loss"

    right = Save.__call__

    def crash(self, state):
        right(self, state)
        if state.step == 5:
            raise Crash

    monkeypatch.setattr(Save, "__call__", crash)
    with pytest.raises(Crash):
        zero2llm.run(made(root, name, where + "-crashed"), quiet=True)
    monkeypatch.setattr(Save, "__call__", right)
    again = zero2llm.run(made(root, name, where + "-crashed"), resume=True, quiet=True)
    for (key, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs after a crash"

    model = whole.model.double()
    engine = Engine(model, whole.tokenizer)
    greedy = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = ["the captain saw", "sea", "over the dark water 海 船"]
    together = [done.tokens for done in engine.generate(prompts, greedy)]
    assert together == [engine.generate([prompt], greedy)[0].tokens for prompt in prompts]


def _losses(run) -> list[dict]:
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["kind"] == "train"]
    return [kept[0], kept[-1]]
