"""Planted bugs in reading GGUF and in deciding what can be written: each must be caught without llama.cpp.

Bugs that are the same on the way in and out, which only llama.cpp sees, stand in test_gguf_models.py; those of tokenizers
in test_gguf_vocab.py.
"""

from dataclasses import replace

import pytest
import torch

from tests.contract.test_gguf_models_bad import NONE_THERE, changed
from tests.parity.gguf_cases import (
    CASES,
    build,
    read_back,
    tokenizer,  # noqa: F401  a fixture
)
from zero2llm.interop.families.family import differences
from zero2llm.interop.gguf import arches, config, layers, names, write
from zero2llm.interop.gguf.file import open_gguf
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.write import export_gguf
from zero2llm.interop.hf_config import from_hf_config
from zero2llm.model.lm import LM


def there_and_back(folder, tokens, cases=("mixtral", "deepseek-v2", "gemma2-thirds")):  # noqa: F811
    for name in cases:
        model = build(name)
        path = export_gguf(model.state_dict(), model.cfg, tokens, folder / f"{name}.gguf", "f32", model_type=CASES[name][0])
        _, cfg, state = read_back(path)
        assert not differences(model.cfg, cfg), name
        for key, value in model.state_dict().items():
            if not key.endswith("A_log"):
                assert torch.equal(state[key], value), key


def fused_experts(folder, tokens):
    model = build("mixtral")
    path = export_gguf(model.state_dict(), model.cfg, tokens, folder / "m.gguf", "f32", model_type="mixtral")
    pair = [f"blk.1.ffn_{n}_exps.weight" for n in ("gate", "up")]
    both = torch.cat([open_gguf(path).tensors[n].lazy.load() for n in pair], 1)
    fused = changed(path, folder / "fused.gguf", without=pair, **{"blk.1.ffn_gate_up_exps.weight": both})
    assert torch.equal(read_back(fused)[2]["blocks.1.ffn.up_proj.weight"], model.state_dict()["blocks.1.ffn.up_proj.weight"])


def refusals(folder, tokens, cases=("exact GELU in gpt2", "weights renormalised", "another ramp", "another scale")):
    for name in cases:
        kind, keys, message = NONE_THERE[name]
        model = LM(from_hf_config({"model_type": kind} | keys))
        with pytest.raises(ValueError, match=f"no GGUF export.*{message}"):
            export_gguf(model.state_dict(), model.cfg, tokens, folder / "m.gguf", "f32", model_type=kind)


def strange_settings(folder, tokens):
    model = build("llama")
    path = export_gguf(model.state_dict(), model.cfg, tokens, folder / "m.gguf", "f32", model_type="llama")
    with pytest.raises(ValueError, match="attention.scale = 0.5"):
        read_gguf(changed(path, folder / "odd.gguf", {"llama.attention.scale": 0.5}))


def kinds(folder, tokens):
    model = build("mixtral")
    path = export_gguf(model.state_dict(), model.cfg, tokens, folder / "m.gguf", "q8_0", model_type="mixtral")
    stored = open_gguf(path).tensors
    assert {stored["blk.0.attn_norm.weight"].kind, stored["blk.0.ffn_gate_inp.weight"].kind} == {"F32"}
    assert stored["blk.0.ffn_up_exps.weight"].kind == "Q8_0"


def up_before_gate(m):
    def experts(file, theirs, count, *names_, right=names.experts):
        *rest, fused = right(file, theirs, count, *names_) or [None]
        return [] if fused is None else [*rest, replace(fused, ours=fused.ours[count:] + fused.ours[:count])]

    m.setattr(layers, "experts", experts)


def last_result_kept(m):
    """The value of one rule is handed out for the next."""
    kept = []

    def apply(turn, parts, right=names._apply):
        if parts[0].device.type == "meta":
            return right(turn, parts)
        shape = parts[0].shape
        found = next((out for s, out in kept if s == shape), None)
        kept.append((shape, found or right(turn, parts)))
        return kept[-1][1]

    m.setattr(names, "_apply", apply)


def keys_not_turned(m):
    """W_UK as it lies, where rank and width of a head are the same number."""

    def latent(file, theirs, heads, nope, right=names.latent):
        split, *rest = right(file, theirs, heads, nope)
        unpack = lambda parts: [torch.cat((parts[0].reshape(heads, nope, -1), parts[1]), 1).flatten(0, 1)]
        return [replace(split, unpack=unpack), *rest]

    m.setattr(layers, "latent", latent)


# bug -> (how it is planted, the check that sees it)
BUGS = {
    "numbers as fp32 shows them": (lambda m: (m.setattr(config, "shortest", lambda x: x), m.setattr(config, "rounded", lambda x: x)), there_and_back),
    "windows upside down": (lambda m: m.setattr(config, "_full", lambda p, n: [p == 0 or (i + 1) % p != 0 for i in range(n)]), there_and_back),
    "a result kept too long": (last_result_kept, there_and_back),
    "keys of MLA not turned back": (keys_not_turned, there_and_back),
    "up before gate in fused experts": (up_before_gate, fused_experts),
    "losses not looked at": (lambda m: m.setattr(arches, "_lost", lambda *args: []), refusals),
    "the configuration read back is the one written": (lambda m: m.setattr(arches, "differences", lambda a, b: differences(a, a)), refusals),
    "settings of others passed over": (lambda m: m.setattr(arches, "refuse_others", lambda *args: None), strange_settings),
    "routers in blocks": (lambda m: m.setattr(write, "SMALL", ()), kinds),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    plant, check = BUGS[bug]
    plant(monkeypatch)
    (tmp_path / "wrong").mkdir()
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(tmp_path / "wrong", tokenizer)


@pytest.mark.parametrize("check", [there_and_back, fused_experts, refusals, strange_settings, kinds])
def test_what_is_right_passes(check, tokenizer, tmp_path):  # noqa: F811
    check(tmp_path, tokenizer)
