"""Mistakes that a page could hold, planted one by one: each moves the logits by far more than the parity test allows.

SETTINGS   a key of config.json misread, so that ours has the same tensors and another function
NAMES      tensors taken apart, or put together, in another order
"""

import pytest
import torch

from tests.parity.test_hf_families import bound, build, logits, relative, rows
from zero2llm.core.config import parse, to_dict
from zero2llm.core.files import load_tensors
from zero2llm.interop.families import gemma, gpt_oss, mamba, moe, phi3, qwen3_next
from zero2llm.interop.hf import from_hf_config, from_hf_tensors
from zero2llm.interop.hf_names import joined
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig


def read(theirs, folder, edit=None):
    """Ours from theirs, whose tensors go through a file; the configuration is edited after the names were resolved."""
    theirs.save_pretrained(folder)
    cfg = from_hf_config(theirs.config.to_dict())
    state = from_hf_tensors(load_tensors(folder), cfg, theirs.config.model_type)
    if edit is not None:
        data = to_dict(cfg)
        edit(data)
        cfg = parse(ModelConfig, data)
    model = LM(cfg)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def error(ours, theirs):
    return relative(logits(ours, rows(1)), theirs(rows(1), use_cache=False).logits) / bound(ours)


def each(*path, **to):
    """Set keys at ``path`` of every block that has it, and of the last norm where the path is the norm."""

    def edit(data):
        places = [*data["blocks"].values()] + ([data] if path == ("norm",) else [])
        for place in places:
            for key in path:
                place = place.get("final_norm" if place is data else key) or {}
            if set(to) & set(place) or not path:
                place |= to

    return edit


def rope_everywhere(data):
    rope = next(b["mixer"]["position"] for b in data["blocks"].values() if b["mixer"]["position"]["kind"] == "rope")
    for block in data["blocks"].values():
        block["mixer"]["position"] = rope


SETTINGS = {
    "window one too wide": ("mistral", each("mixer", window=6)),
    "window of the wrong layers": ("gemma2", each("mixer", window=5)),
    "rotary scaling forgotten": ("llama3.1", each("mixer", "position", scaling=None)),
    "ramp's ends rounded": ("llama-yarn-untruncated", each("mixer", "position", "scaling", truncate=True)),
    "whole head turned": ("phi3-partial", each("mixer", "position", rotary_dim=None)),
    "short factors": ("phi3-long", each("mixer", "position", "scaling", max_len=4)),
    "positions in every layer": ("smollm3", rope_everywhere),
    "norms before the branches": ("olmo2", each(wiring="pre")),
    "embeddings not scaled": ("gemma", lambda data: data.update(embed_scale=None)),
    "norms scale by w": ("gemma", each("norm", plus_one=False)),
    "QK-norms scale by w": ("gemma3", each("mixer", qk_norm_plus_one=False)),
    "scores not capped": ("gemma2", each("mixer", softcap=None)),
    "logits not capped": ("gemma2", lambda data: data.update(logit_softcap=None)),
    "scores scaled by the head's width": ("gemma2", each("mixer", scale=None)),
    "weights not renormalised": ("qwen3_moe", each("ffn", renormalise=False)),
    "weights renormalised": ("jamba", each("ffn", renormalise=True)),
    "weights not scaled": ("deepseek_v3", each("ffn", routed_scaling=1.0)),
    "groups forgotten": ("deepseek_v3", each("ffn", n_groups=1, top_groups=1)),
    "mscale forgotten": ("deepseek_v2-yarn", each("mixer", "position", "scaling", mscale_all_dim=None, mscale=None)),
    "pairs of the other layout": ("deepseek_v3-half", each("mixer", "position", layout="interleaved")),
    "an eps of the norms": ("olmo2", each("norm", eps=1e-2)),
    "steps not limited": ("mamba2-limit", each("mixer", dt_limit=None)),
    "one group for the norm": ("mamba2", each("mixer", norm_eps=1e-2)),
}


@pytest.mark.parametrize("bug", SETTINGS)
def test_a_misread_setting_moves_the_logits(bug, tmp_path):
    name, edit = SETTINGS[bug]
    theirs = build(name)
    assert error(read(theirs, tmp_path), theirs) < 1 < 10 < error(read(theirs, tmp_path, edit), theirs)


def halves(whole):
    return [part.contiguous() for part in whole[0].transpose(1, -1).chunk(2, 1)]


def turned_round(theirs, ours, rows, *endings):
    return joined(theirs, ours[::-1], rows[::-1], *endings)


def other_layers(original):
    swap = {"full_attention": "sliding_attention", "sliding_attention": "full_attention", None: None}
    return lambda data, *args, layer_type=None, **more: original(data, *args, layer_type=swap[layer_type], **more)


NAMES = {
    "gate and up not alternating": ("gpt_oss", gpt_oss, "separate", lambda original: halves),
    "q, k, v and gate, up from the end": ("phi3", phi3, "joined", lambda original: turned_round),
    "queries and gate not head by head": (
        "qwen3_next", qwen3_next, "by_head", lambda original: lambda theirs, ours, heads, rows: joined(theirs, ours, rows)),
    "w1 and w3 swapped": ("mixtral", moe, "GLU_NAMES", lambda original: ("up_proj", "gate_proj", "down_proj")),
    "rotary bases swapped": ("gemma3", gemma, "read_rope", other_layers),
    "taps from the end": (
        "mamba", mamba, "filters", lambda original: lambda theirs, ours: original(theirs, ours).__class__(
            (theirs,), (ours,), lambda parts: [parts[0].flip(-1).unsqueeze(1)], lambda parts: [parts[0].squeeze(1).flip(-1)])),
}  # fmt: skip


@pytest.mark.parametrize("bug", NAMES)
def test_a_wrong_name_moves_the_logits(bug, tmp_path, monkeypatch):
    name, page, function, make = NAMES[bug]
    theirs = build(name)
    monkeypatch.setattr(page, function, make(getattr(page, function)))
    try:
        ours = read(theirs, tmp_path)
    except ValueError as refused:  # read and write no longer agree
        assert "mixer.position.base" in str(refused)
    else:
        assert error(ours, theirs) > 10
