"""Initialisation by hand: the standard deviation of every weight, what it does to a signal, and muP's multipliers."""

import math

import pytest
import torch
import torch.nn.functional as F

from zero2llm.core.batch import Batch
from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.lab.recipe import make_recipe
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.optim.muon import MuonConfig
from zero2llm.train.objectives.clm import CLM

D, HIDDEN, VOCAB, L = 48, 80, 97, 3
MUP = {"kind": "mup", "base_width": 12, "base_head_dim": 3, "std": 0.05}  # four times as wide as its base


def model_config(init, *, d=D, wiring="pre", layers=L, tied=False, ffn=None, mixer=None, norm="rms", **more):
    ffn = ffn or {"kind": "glu", "hidden": HIDDEN * d // D}
    mixer = {"kind": "gqa", "n_heads": 4} | (mixer or {})
    if init.get("kind") == "mup" and mixer["kind"] == "gqa" and "scale" not in mixer:
        mixer["scale"] = 3**0.5 / (d // 4)
    block = {"mixer": mixer, "ffn": ffn, "norm": {"kind": norm}, "wiring": wiring}
    data = {"vocab_size": VOCAB, "d_model": d, "max_len": 32, "layers": {"pattern": ["b"], "repeat": layers}, "tie_embeddings": tied}
    return parse(ModelConfig, data | {"blocks": {"b": block}, "init": init} | more)


EXPECTED = {  # kind -> projection -> its standard deviation, from the papers
    "gpt2": dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed", "head"], 0.02)
    | dict.fromkeys(["o_proj", "down_proj"], 0.02 / math.sqrt(6)),
    "xavier": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], math.sqrt(2 / 96))
    | dict.fromkeys(["gate_proj", "up_proj", "down_proj"], math.sqrt(2 / 128))
    | {"embed": 0.02, "head": math.sqrt(2 / (48 + 97))},
    "kaiming": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "head"], math.sqrt(2 / 48))
    | {"embed": 0.02, "down_proj": math.sqrt(2 / 80)},
    "deepnorm": dict.fromkeys(["q_proj", "k_proj"], math.sqrt(2 / 96))
    | dict.fromkeys(["v_proj", "o_proj"], 24**-0.25 * math.sqrt(2 / 96))
    | dict.fromkeys(["gate_proj", "up_proj", "down_proj"], 24**-0.25 * math.sqrt(2 / 128))
    | {"embed": 0.02, "head": math.sqrt(2 / (48 + 97))},
    "mup": dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 0.05 / 2)
    | dict.fromkeys(["o_proj", "down_proj"], 0.05 / 2 / math.sqrt(6))
    | {"embed": 0.05, "head": 0.05},
}


def built(kind, **more):
    init = MUP if kind == "mup" else {"kind": kind}
    return LM(model_config(init, wiring="deepnorm" if kind == "deepnorm" else "pre", **more))


def check_spreads(kind):
    torch.manual_seed(0)
    model = built(kind, mixer={"qkv_bias": True, "out_bias": True})
    seen = set()
    for name, p in model.named_parameters():
        short = name.removesuffix(".weight").split(".")[-1]
        if name.endswith(".bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            seen.add(short)
            assert p.std().item() == pytest.approx(EXPECTED[kind][short], rel=6 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * EXPECTED[kind][short] / math.sqrt(p.numel()), name
    assert seen == set(EXPECTED[kind])


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_weight_has_the_spread_of_the_paper(kind):
    check_spreads(kind)


def test_gpt2_without_scaled_residuals():
    model = LM(model_config({"std": 0.03, "scale_residual": False}))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.03, rel=0.1), name


@pytest.mark.parametrize("kind", ["gpt2", "xavier", "kaiming"])
def test_experts_are_drawn_as_separate_matrices(kind):
    moe = {"kind": "moe", "n_experts": 16, "top_k": 2, "hidden": 40}
    model = LM(model_config({"kind": kind}, ffn=moe))
    found = {n.split(".")[-2]: p for n, p in model.named_parameters() if p.ndim == 3}
    expected = {
        "gpt2": {"up_proj": 0.02, "down_proj": 0.02 / math.sqrt(6)},
        "xavier": {"up_proj": math.sqrt(2 / 88), "down_proj": math.sqrt(2 / 88)},
        "kaiming": {"up_proj": math.sqrt(2 / 48), "down_proj": math.sqrt(2 / 40)},
    }
    for name, spread in expected[kind].items():
        assert found[name].std().item() == pytest.approx(spread, rel=0.03), name


def test_gpt2_keeps_the_stream_s_variance_independent_of_depth():
    """What the branches add to the stream, relative to what comes in: the same at 4 and at 24 layers, and not without the scaling."""

    def added(layers, scaled):
        torch.manual_seed(0)
        model = LM(model_config({"std": 0.1, "scale_residual": scaled}, layers=layers, final_norm=None))
        x = torch.randint(0, VOCAB, (4, 16))
        with torch.no_grad():
            return (model(x, Seq.rows(4, 16))[0] - model.embed(x)).var().item()

    assert 0.6 < added(24, True) / added(4, True) < 1.7
    assert added(24, False) / added(4, False) > 4


def test_kaiming_carries_a_signal_through_relu_and_xavier_lets_it_die():
    def carried(kind):
        torch.manual_seed(0)
        x, cfg = torch.randn(64, 96), model_config({"kind": kind}).init
        start = x.square().mean()
        for _ in range(20):
            w = torch.empty(96, 96)
            x = F.relu(F.linear(x, w.normal_(0, cfg.spread("up_proj", w, L, D))))
        return (x.square().mean() / start).item()

    assert 0.2 < carried("kaiming") < 5
    assert carried("xavier") < 1e-4


def check_deepnorm_gradients(seeds=(0, 1)):
    """Wiring and initialisation together: as much gradient in the first of 64 layers as in the last. Post-norm loses it
    on the way, or the signal before it."""

    def ratio(wiring, kind, seed):
        torch.manual_seed(seed)
        mlp = {"kind": "mlp", "hidden": 32, "act": "relu"}
        model = LM(model_config({"kind": kind}, d=16, layers=64, wiring=wiring, ffn=mlp, norm="layer", final_norm=None))
        x = torch.randint(0, VOCAB, (2, 16))
        loss = CLM()(model, Batch.shifted(x, torch.ones_like(x), Seq.rows(2, 16)))
        (loss.total / loss.count).backward()
        first, last = (model.blocks[i].ffn.up_proj.weight.grad.norm() for i in (0, -1))
        return (first / last).item()

    for seed in seeds:
        assert 0.7 < ratio("deepnorm", "deepnorm", seed) < 1.4
        assert not 0.5 < ratio("post", "xavier", seed) < 2


def test_deepnorm_brings_even_gradients_to_the_first_of_64_layers():
    check_deepnorm_gradients()


# muP


def test_mup_at_its_base_is_gpt2():
    models: list[LM] = []
    for init in ({"kind": "mup", "base_width": 48, "base_head_dim": 12, "std": 0.05}, {"kind": "gpt2", "std": 0.05}):
        torch.manual_seed(0)
        models.append(LM(model_config(init, mixer={"scale": None})))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    x = torch.randint(0, VOCAB, (2, 9))
    assert torch.equal(*(m(x, Seq.rows(2, 9))[0] for m in models)) and models[0].width_ratio == 1


def check_mup_multipliers():
    """Final hidden state times 1 / m; matrices in blocks learn at 1 / m and decay by the same share of a step."""
    model = LM(model_config(MUP))
    with torch.no_grad():
        x = torch.randint(0, VOCAB, (2, 9))
        hidden = model(x, Seq.rows(2, 9))[0]
        rms = hidden.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 1 / 4), atol=1e-3, rtol=0)  # the final norm makes it 1
        torch.testing.assert_close(model.logits(hidden), hidden @ model.head.weight.T)
    optim = build_optim(model, AdamWConfig(lr=0.01, weight_decay=0.1), model.width_ratio)
    for factor in (1.0, 0.5):
        optim.set_lr(factor)
        for group in optim.groups:
            for p in group["params"]:
                name = optim.names[id(p)]
                hidden_matrix = name.startswith("blocks.") and p.ndim == 2
                assert group["lr"] == pytest.approx(factor * (0.0025 if hidden_matrix else 0.01)), name
                assert group["weight_decay"] == pytest.approx(0.4 if hidden_matrix else 0.0), name
    assert len({id(p) for g in optim.groups for p in g["params"]}) == len(list(model.parameters()))


def test_mup_multipliers():
    check_mup_multipliers()


def test_without_mup_nothing_is_scaled():
    model = LM(model_config({"kind": "gpt2"}))
    plain, given = (build_optim(model, AdamWConfig(), *more) for more in ((), (model.width_ratio,)))
    for a, b in zip(plain.groups, given.groups, strict=True):
        assert (a["lr"], a["weight_decay"]) == (b["lr"], b["weight_decay"])


def test_a_configuration_saved_without_a_kind_is_gpt2():
    data = to_dict(model_config({"kind": "gpt2", "std": 0.03}))
    del data["init"]["kind"]
    assert parse(ModelConfig, data).init == model_config({"kind": "gpt2", "std": 0.03}).init
    del data["init"]
    assert parse(ModelConfig, data).init == model_config({}).init


def test_every_kind_survives_being_saved():
    for kind in EXPECTED:
        cfg = built(kind).cfg
        assert parse(ModelConfig, to_dict(cfg)) == cfg


def test_a_preset_takes_another_initialisation():
    keys = {"out": "x", "data": {"train": ["embedded"]}, "tokenizer": {"path": "x"}, "fit": {"steps": 1}}
    recipe = make_recipe(**keys, model={"preset": "llama-nano", "init": {"kind": "xavier"}})
    assert recipe.model.init.kind == "xavier"
    assert make_recipe(**keys, model={"preset": "llama-nano", "init": {"std": 0.01}}).model.init.std == 0.01
    with pytest.raises(ValueError, match="says nothing about muon"):
        make_recipe(**keys, model={"preset": "llama-nano", "init": {"kind": "mup", "base_width": 64, "base_head_dim": 32}}, optim={"kind": "muon"})


REFUSED = [
    ({"std": 0.0}, {}, "std = 0.0 must be positive"),
    ({"kind": "deepnorm"}, {}, "deepnorm goes with wiring deepnorm, not pre"),
    ({"kind": "mup", "base_width": 0, "base_head_dim": 3}, {}, "base_width = 0"),
    (MUP | {"base_head_dim": 0}, {}, "base_head_dim = 0"),
    (MUP, {"mixer": {"scale": None}}, r"head_dim = 12, scale: 0.144338 in the mixer \(it is 0.288675\)"),
    (MUP, {"mixer": {"n_heads": 16}}, "head_dim = 3, scale: 0.57735"),
    (MUP, {"mixer": {"kind": "retnet"}}, "not for retnet with glu"),
    (MUP, {"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8}}, "not for gqa with moe"),
]


@pytest.mark.parametrize(("init", "more", "reason"), REFUSED, ids=[r for _, _, r in REFUSED])
def test_what_does_not_go_together_is_refused(init, more, reason):
    with pytest.raises(ValueError, match=reason):
        model_config(init, **more)


def test_muon_with_mup_is_refused():
    model = LM(model_config(MUP))
    with pytest.raises(ValueError, match="says nothing about muon"):
        build_optim(model, MuonConfig(), model.width_ratio)
