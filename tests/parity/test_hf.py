"""GPT-2, Llama and Qwen3 against transformers, in both directions: logits, gradients, cached decoding, tensors."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.interop.hf import from_hf_config, from_hf_tensors, to_hf_config, to_hf_tensors
from zero2llm.interop.hf_config import family_of
from zero2llm.model.lm import LM
from zero2llm.model.presets import gpt2, llama, qwen3
from zero2llm.model.spec import ModelConfig

V, T = 61, 13
SHARED = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=32,
              num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)  # fmt: skip


def hf_gpt2():
    cfg = GPT2Config(vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=32, n_inner=52, resid_pdrop=0.0,
                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)  # fmt: skip
    return GPT2LMHeadModel(cfg)


def hf_llama(tied=False, **more):
    return LlamaForCausalLM(LlamaConfig(**SHARED, rope_theta=500.0, rms_norm_eps=1e-5, tie_word_embeddings=tied, **more))


def hf_qwen3(tied=True):
    return Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=10, rope_theta=1e6, tie_word_embeddings=tied))


THEIRS = {
    "gpt2": hf_gpt2,
    "llama": hf_llama,
    "llama-tied": lambda: hf_llama(True),
    "llama-bias": lambda: hf_llama(attention_bias=True),
    "qwen3": hf_qwen3,
    "qwen3-untied": lambda: hf_qwen3(False),
}


def edit(cfg, **changes):
    """cfg with dotted keys set: mixer.x, ffn.x and norm.x in every block."""
    data = to_dict(cfg)
    for key, value in changes.items():
        *path, last = key.split("__")
        for block in data["blocks"].values() if path or key in ("wiring", "norm", "ffn", "mixer") else [data]:
            for part in path:
                block = block[part]
            block[last] = value
    return parse(ModelConfig, data)


ROPE_PAIRS = dict(mixer__position={"kind": "rope", "base": 300.0, "layout": "interleaved"})
OURS = {
    "gpt2": lambda: gpt2(V, 24, 2, 4, 32),
    "llama": lambda: llama(V, 24, 2, 4, 2, 40, 32),
    "llama-tied-mqa": lambda: llama(V, 24, 2, 4, 1, 40, 32, tied=True),
    "llama-interleaved": lambda: edit(llama(V, 24, 2, 4, 2, 40, 32), **ROPE_PAIRS),
    "llama-interleaved-bias": lambda: edit(llama(V, 24, 2, 4, 2, 40, 32), mixer__qkv_bias=True, mixer__out_bias=True, **ROPE_PAIRS),
    "llama-head-dim": lambda: edit(llama(V, 24, 2, 4, 2, 40, 32), mixer__head_dim=10),
    "qwen3": lambda: qwen3(V, 24, 2, 4, 2, 40, 32, head_dim=10, tied=True),
    "qwen3-interleaved": lambda: edit(qwen3(V, 24, 2, 4, 2, 40, 32, head_dim=10), **ROPE_PAIRS),
}


@torch.no_grad()
def randomise(model, seed=0):
    """Weights of unit gain, norms around 1, biases of 0.3: large enough that an error shows."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.normal_(0, 1.0 if "embed" in name or "wte" in name or "wpe" in name or "table" in name else p.shape[1] ** -0.5)
        else:
            p.normal_(0, 0.3).add_(1.0 if name.endswith("weight") else 0.0)
    return model.eval()


def ours_of(theirs):
    cfg = from_hf_config(theirs.config.to_dict())
    model = LM(cfg)
    model.load_state_dict(from_hf_tensors(theirs.state_dict(), cfg))
    return model.eval()


def theirs_of(model):
    """Their class from our config dictionary and tensors alone."""
    data = to_hf_config(model.cfg)
    kinds = {"gpt2": (GPT2Config, GPT2LMHeadModel), "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config, kind = kinds[data["model_type"]]
    theirs = kind(config.from_dict(data)).eval()
    missing, extra = theirs.load_state_dict(to_hf_tensors(model.state_dict(), model.cfg), strict=False)
    assert not extra and set(missing) <= ({"lm_head.weight"} if model.cfg.tie_embeddings else set())
    theirs.tie_weights()
    return theirs


def logits(model, tokens):
    return model.logits(model(tokens, Seq.rows(*tokens.shape))[0])


def relative(a, b):
    return ((a - b).abs().max() / b.std()).item()


def pair(way, name):
    if way == "theirs to ours":
        theirs = randomise(THEIRS[name]())
        return ours_of(theirs), theirs
    ours = randomise(LM(OURS[name]()))
    return ours, theirs_of(ours)


CASES = [("theirs to ours", name) for name in THEIRS] + [("ours to theirs", name) for name in OURS]


@pytest.mark.parametrize(("way", "name"), CASES)
@pytest.mark.oracle("mixer:mha", "mixer:gqa", "mixer:qk_norm", "ffn:swiglu", "ffn:gelu", "norm:rms", "norm:layer", "position:rope", "position:rope_interleaved", "position:learned", "wiring:pre", of="transformers GPT-2, Llama, Qwen3", way="both")
def test_logits_and_gradients_agree(way, name):
    ours, theirs = pair(way, name)
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    mine, other = logits(ours, tokens), theirs(tokens, use_cache=False).logits
    assert other.std() > 0.3
    torch.testing.assert_close(mine / other.std(), other / other.std(), atol=1e-5, rtol=0)
    labels = tokens.roll(-1, 1).flatten()
    for out in (mine, other):
        F.cross_entropy(out.flatten(0, 1), labels).backward()
    grads = to_hf_tensors({n: p.grad for n, p in ours.named_parameters()}, ours.cfg)
    for key, p in theirs.named_parameters():
        if key in grads:  # relative to the tensor's largest entry
            scale = p.grad.abs().max() + 0.01
            torch.testing.assert_close(grads[key] / scale, p.grad / scale, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize(("way", "name"), CASES)
@torch.no_grad()
def test_cached_decoding_agrees(way, name):
    ours, theirs = pair(way, name)
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))
    states, cache, seq = ours.init_states(2, T), None, Seq.rows(2, T)
    for start, stop in [(0, 6)] + [(i, i + 1) for i in range(6, T)]:
        mine = ours.logits(ours(tokens[:, start:stop], seq.window(start, stop), states)[0])
        where = torch.arange(start, stop).expand(2, -1)
        out = theirs(tokens[:, start:stop], past_key_values=cache, position_ids=where, use_cache=True)
        cache = out.past_key_values
        assert relative(mine, out.logits) < 1e-5


@pytest.mark.parametrize("name", THEIRS)
def test_their_tensors_come_back_bit_for_bit(name):
    theirs = randomise(THEIRS[name]())
    cfg = from_hf_config(theirs.config.to_dict())
    back = to_hf_tensors(from_hf_tensors(theirs.state_dict(), cfg), cfg)
    assert set(theirs.state_dict()) - set(back) <= {"lm_head.weight"} and ("lm_head.weight" in back) != cfg.tie_embeddings
    for key, value in back.items():
        assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.parametrize("name", OURS)
def test_our_tensors_come_back_bit_for_bit(name):
    model = randomise(LM(OURS[name]()))
    back = from_hf_tensors(to_hf_tensors(model.state_dict(), model.cfg), model.cfg)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.items())


@pytest.mark.parametrize("name", [n for n in OURS if "interleaved" not in n])
def test_config_comes_back_equal(name):
    cfg = OURS[name]()
    again = from_hf_config(to_hf_config(cfg, bos=1, eos=[2], pad=0))
    assert [s.ffn for s in again.specs()] == [s.ffn for s in cfg.specs()]
    assert to_hf_config(again) == to_hf_config(cfg) and family_of(again) == family_of(cfg) == name.split("-")[0]


def test_rope_base_reaches_both_generations_of_transformers():
    data = to_hf_config(llama(V, 24, 2, 4, 2, 40, 32, base=777.0))
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 777.0
    assert LlamaConfig.from_dict(data).rope_parameters["rope_theta"] == 777.0
    old = {k: v for k, v in data.items() if k != "rope_parameters"} | {"rope_scaling": None}
    assert from_hf_config(old).specs()[0].mixer.position.base == 777.0


LLAMA, GPT2 = lambda: llama(V, 24, 2, 4, 2, 40, 32), lambda: gpt2(V, 24, 2, 4, 32)
BIASED = dict(mixer__qkv_bias=True, mixer__out_bias=True)
REFUSED = [
    (lambda: edit(LLAMA(), wiring="parallel"), "wiring: parallel"),
    (lambda: edit(LLAMA(), wiring="post"), "wiring: post"),
    (lambda: edit(LLAMA(), mixer__window=8, mixer__qkv_bias=True), r"nearest is qwen2.*mixer.window: 8 \(there None"),
    (lambda: edit(LLAMA(), ffn__act="relu2"), "hidden_act = 'relu2'"),
    (lambda: edit(LLAMA(), mixer__out_bias=True), r"out_bias: True \(there False\)"),
    (lambda: edit(LLAMA(), mixer__sink=True), "mixer.sink: True"),
    (lambda: edit(LLAMA(), mixer__gate=True), "mixer.gate: True"),
    (lambda: edit(LLAMA(), mixer__softcap=30.0), "mixer.softcap: 30.0"),
    (lambda: edit(LLAMA(), mixer__scale=0.1), "mixer.scale: 0.1"),
    (lambda: edit(LLAMA(), embed_scale=2.0), "embed_scale: 2.0"),
    (lambda: edit(LLAMA(), logit_softcap=9.0), "logit_softcap: 9.0"),
    (lambda: edit(LLAMA(), embed_norm={"kind": "rms"}), "embed_norm: rms"),
    (lambda: edit(LLAMA(), mixer__position={"kind": "rope", "rotary_dim": 4}, **BIASED), "rotary_dim: 4"),
    (lambda: edit(LLAMA(), mixer__position={"kind": "rope", "scaling": {"kind": "ntk", "factor": 2.0}}), "scaling: ntk"),
    (lambda: edit(LLAMA(), mixer={"kind": "retnet", "n_heads": 4}), "mixer: retnet .gqa is needed"),
    (lambda: edit(LLAMA(), mixer__position={"kind": "alibi"}), "mixer.position: alibi"),
    (lambda: edit(LLAMA(), norm={"kind": "layer"}), "norm: layer"),
    (lambda: edit(LLAMA(), final_norm={"kind": "rms", "eps": 1e-3}), "final_norm"),
    (lambda: edit(LLAMA(), mixer__qk_norm=True), "mixer.qk_norm: True"),
    (lambda: edit(LLAMA(), position={"kind": "learned"}), "position: learned"),
    (lambda: edit(LLAMA(), mixer__n_heads=10, mixer__head_dim=8, **BIASED), "n_heads: 10 does not divide"),
    (lambda: edit(LLAMA(), init={"kind": "mup", "base_width": 12, "base_head_dim": 6}), "init: mup"),
    (lambda: edit(GPT2(), ffn__act="relu"), "ffn.act: relu"),
    (lambda: edit(GPT2(), mixer__n_kv_heads=2), "n_kv_heads: 2"),
    (lambda: edit(GPT2(), mixer__qkv_bias=False), "mixer.qkv_bias: False"),
    (lambda: edit(GPT2(), tie_embeddings=False), "tie_word_embeddings = False"),
    (lambda: edit(GPT2(), position={"kind": "sinusoidal"}), "position: sinusoidal"),
    (lambda: edit(GPT2(), ffn__bias=False), "ffn.bias: False"),
    (lambda: edit(GPT2(), mixer__head_dim=8), "head_dim: 8"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_what_has_no_counterpart_is_named(make, reason):
    with pytest.raises(ValueError, match=reason):
        family_of(make())


def test_a_hybrid_pattern_is_refused_but_equal_blocks_are_not():
    data = to_dict(LLAMA())
    spec = data["blocks"]["llama"]
    data |= {"blocks": {"a": spec, "b": spec}, "layers": {"pattern": ["a", "b"], "repeat": 1}}
    assert family_of(parse(ModelConfig, data)) == "llama"
    data["blocks"]["b"] = spec | {"mixer": spec["mixer"] | {"window": 4}}
    with pytest.raises(ValueError, match="b.mixer.window: 4"):
        family_of(parse(ModelConfig, data))


SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
UNREADABLE = [
    ("llama", {"rope_scaling": SCALED}, "low_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"model_type": "bloom"}, "model_type 'bloom'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
    ("gpt2", {"activation_function": "relu"}, "activation_function"),
    ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
]


@pytest.mark.parametrize(("name", "change", "reason"), UNREADABLE)
def test_config_json_that_means_another_model_is_refused(name, change, reason):
    with pytest.raises(ValueError, match=reason):
        from_hf_config(to_hf_config(OURS[name]()) | change)


def test_a_config_without_a_needed_key_is_refused():
    data = to_hf_config(LLAMA())
    del data["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        from_hf_config(data)


def test_missing_extra_and_misshaped_tensors_are_listed():
    model = LM(LLAMA())
    good = to_hf_tensors(model.state_dict(), model.cfg)
    for change, reason in [
        ({"model.norm.weight": None}, "missing .*model.norm.weight"),
        ({"model.stray": torch.zeros(1)}, "unexpected .*model.stray"),
        ({"lm_head.weight": torch.zeros(V, 23)}, r"lm_head.weight is \(61, 23\), expected \(61, 24\)"),
    ]:
        with pytest.raises(ValueError, match=reason):
            from_hf_tensors({k: v for k, v in (good | change).items() if v is not None}, model.cfg)
    with pytest.raises(ValueError, match="missing .*embed.weight"):
        to_hf_tensors({k: v for k, v in model.state_dict().items() if k != "embed.weight"}, model.cfg)


def test_old_gpt2_files_are_read():
    """Without the prefix, with mask buffers and with the tied head stored: as the published files are."""
    model = LM(GPT2())
    tensors = to_hf_tensors(model.state_dict(), model.cfg)
    old = {k.removeprefix("transformer."): v for k, v in tensors.items()} | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}
    back = from_hf_tensors(old, model.cfg)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.items())
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match="tied"):
        from_hf_tensors(tensors, model.cfg)
