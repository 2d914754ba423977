"""What the tests of score heads share: a model to begin from, recipes of a reward model and of PPO, and what their models say."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.core.seq import Seq

OFTEN = {"every_s": 0.0, "keep": 20}
LORA = {"kind": "lora", "r": 4, "alpha": 8}
KINDS = {"lora": LORA, "dora": {"kind": "dora", "r": 4}, "pissa": {"kind": "pissa", "r": 4}, "adalora": {"kind": "adalora", "init_r": 4, "target_r": 2, "final": 1}}
HEAD = {"score.weight", "score.bias"}


def prepared(root: Path) -> Path:
    """Data for both objectives, and a pretrained model to begin from."""
    write_data(root / "data")
    lines = [json.loads(line) for line in (root / "data" / "pairs.jsonl").read_text("utf-8").splitlines()]
    good = [r | {"chosen": r["chosen"] + " 海"} for r in lines]  # a difference that can be learned
    (root / "data" / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good), "utf-8")
    prompts = [json.dumps({"prompt": f"the sea {'and the ship ' * (i % 3)}{i}", "answer": "the"}) for i in range(40)]
    (root / "data" / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain")), quiet=True)
    return root


def made(root: Path, out: Path, kind: str, adapter: dict | None = LORA, **changes) -> dict:
    data = {
        "out": str(out), "init": str(root / "pretrain"), "objective": {"kind": kind}, "optim": {"kind": "adamw", "lr": 0.02},
        "fit": {"steps": 3, "micro_rows": 8}, "seq_len": 64, "device": "cpu", "eval": {"every": 9}, "save": {"every_s": 60.0, "keep": 9},
    } | ({"adapter": adapter} if adapter else {})  # fmt: skip
    if kind == "ppo":
        data |= {
            "data": {"train": [str(root / "data" / "prompts.jsonl")], "valid_fraction": 0.2},
            "rollout": {"prompts": 4, "samples": 4, "max_tokens": 6, "minibatches": 2},
            "reward": [{"kind": "overlong", "limit": 6, "buffer": 6}, {"kind": "regex", "pattern": ".*e.*", "weight": 0.5}],
        }
    else:
        data |= {"data": {"train": [str(root / "data" / "good.jsonl")], "valid_fraction": 0.2}, "batch_tokens": 256}
    return data | changes


def run(*args, resume: bool = False, **changes):
    return zero2llm.run(zero2llm.make_recipe(**made(*args, **changes)), resume=resume, quiet=True)


@torch.no_grad()
def values(model) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = model.eval()(torch.arange(4, 24).view(1, -1), Seq.rows(1, 20))[0]
    return model.score(hidden), model.logits(hidden)


def close(a, b) -> None:
    for x, y in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
