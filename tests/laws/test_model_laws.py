"""Laws that every mechanism obeys in every wiring; one line in CASES joins a new one.

causality · packed = separate · streamed = whole · padded = unpadded · gather · save and load · half precision
"""

from __future__ import annotations

import pytest
import torch

from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.experts import ExpertLinear
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig

ROPE, PAIRS = {"kind": "rope"}, {"kind": "rope", "layout": "interleaved"}
GLU, MLP = {"kind": "glu", "hidden": 24}, {"kind": "mlp", "hidden": 32, "act": "relu2"}
RMS, LAYER = {"kind": "rms"}, {"kind": "layer"}

CASES = {  # name -> (mixer, ffn, norm, wiring, added position)
    "mha rope": ({"n_heads": 4, "position": ROPE}, GLU, RMS, "pre", None),
    "gqa interleaved": ({"n_heads": 4, "n_kv_heads": 2, "position": PAIRS}, GLU, RMS, "pre", None),
    "mqa biases": ({"n_heads": 4, "n_kv_heads": 1, "qkv_bias": True, "out_bias": True, "position": ROPE}, MLP, LAYER, "pre", None),
    "window 3": ({"n_heads": 2, "window": 3, "position": ROPE}, GLU, RMS, "pre", None),
    "window 1": ({"n_heads": 2, "window": 1, "position": ROPE}, GLU, RMS, "pre", None),
    "qk-norm wide head": ({"n_heads": 2, "head_dim": 12, "qk_norm": True, "position": ROPE}, GLU, RMS, "pre", None),
    "no position": ({"n_heads": 2}, {"kind": "glu", "hidden": 24, "act": "gelu"}, RMS, "pre", None),
    "learned": ({"n_heads": 2}, MLP, LAYER, "pre", {"kind": "learned"}),
    "sinusoidal": ({"n_heads": 2}, MLP, LAYER, "pre", {"kind": "sinusoidal"}),
    "post": ({"n_heads": 2, "position": ROPE}, GLU, LAYER, "post", None),
    "sandwich": ({"n_heads": 2, "position": ROPE}, GLU, RMS, "sandwich", None),
    "parallel": ({"n_heads": 2, "position": ROPE}, MLP, LAYER, "parallel", None),
    "branch": ({"n_heads": 2, "position": ROPE}, GLU, RMS, "branch", None),
    "deepnorm": ({"n_heads": 2, "position": ROPE}, GLU, LAYER, "deepnorm", None),
    "mixer alone": ({"n_heads": 2, "position": ROPE}, None, RMS, "sandwich", None),
    "alibi": ({"n_heads": 6, "n_kv_heads": 2, "head_dim": 4, "window": 9, "position": {"kind": "alibi"}}, GLU, RMS, "pre", None),
    "rope partial yarn": ({"n_heads": 2, "position": {"kind": "rope", "rotary_dim": 6, "scaling": {"kind": "yarn", "factor": 4.0, "original_max_len": 32}}}, GLU, RMS, "pre", None),
    "mrope text": ({"n_heads": 2, "window": 7, "position": {"kind": "mrope", "sections": [2, 1, 1]}}, GLU, RMS, "pre", None),
    "dyt": ({"n_heads": 2, "position": ROPE}, GLU, {"kind": "dyt", "alpha": 0.7}, "pre", None),
    "batch norm in eval": ({"n_heads": 2, "position": ROPE}, GLU, {"kind": "batch", "momentum": 1.0}, "pre", None),
    "sink": ({"n_heads": 4, "n_kv_heads": 2, "sink": True, "window": 5, "position": ROPE}, GLU, RMS, "pre", None),
    "softcap": ({"n_heads": 4, "n_kv_heads": 2, "softcap": 2.0, "scale": 0.3, "position": ROPE}, GLU, {"kind": "rms", "plus_one": True}, "pre", None),
    "gate": ({"n_heads": 4, "gate": True, "position": ROPE}, GLU, RMS, "pre", None),
    "qk-norm over all": ({"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "qk_norm_span": "all", "qk_norm_plus_one": True, "position": ROPE}, GLU, RMS, "pre", None),
    "mla": ({"kind": "mla", "n_heads": 2, "kv_rank": 6, "q_rank": 5, "nope_dim": 4, "rope_dim": 2, "v_dim": 3}, GLU, RMS, "pre", None),
    "mla without rotation": ({"kind": "mla", "n_heads": 3, "kv_rank": 7, "nope_dim": 3, "rope_dim": 1, "v_dim": 5, "scale": 0.3, "position": {"kind": "none"}}, GLU, LAYER, "pre", None),
    "moba": ({"kind": "moba", "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "block": 3, "top_k": 3, "position": ROPE}, GLU, RMS, "pre", None),
    "moba own block": ({"kind": "moba", "n_heads": 2, "block": 5, "top_k": 1}, GLU, RMS, "pre", None),
    "moba single tokens": ({"kind": "moba", "n_heads": 2, "block": 1, "top_k": 8, "position": PAIRS}, GLU, RMS, "pre", None),
    "nsa": ({"kind": "nsa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "span": 4, "stride": 2, "block": 6, "top_k": 3, "window": 5, "position": ROPE}, GLU, RMS, "pre", None),
    "nsa one size": ({"kind": "nsa", "n_heads": 2, "span": 3, "stride": 3, "block": 3, "top_k": 4, "window": 70, "hidden": 5}, GLU, LAYER, "pre", None),
    "dsa": ({"kind": "dsa", "mla": {"n_heads": 2, "kv_rank": 6, "q_rank": 5, "nope_dim": 4, "rope_dim": 2, "v_dim": 3}, "index_heads": 16, "index_dim": 5, "top_k": 8}, GLU, RMS, "pre", None),
    "dsa tied scores": ({"kind": "dsa", "mla": {"n_heads": 2, "kv_rank": 6, "nope_dim": 4, "rope_dim": 0, "v_dim": 3, "scale": 0.2, "position": {"kind": "none"}}, "index_heads": 1, "index_dim": 3, "top_k": 7}, GLU, RMS, "pre", None),
    "retnet": ({"kind": "retnet", "n_heads": 2, "chunk": 8}, GLU, RMS, "pre", None),
    "retnet odd": ({"kind": "retnet", "n_heads": 3, "head_dim": 4, "value_dim": 5, "chunk": 64, "base": 30.0}, GLU, RMS, "pre", None),
    "linear": ({"kind": "linear", "n_heads": 2, "head_dim": 5, "value_dim": 3, "chunk": 8}, GLU, RMS, "pre", None),
    "linear learned": ({"kind": "linear", "n_heads": 4, "chunk": 1}, MLP, LAYER, "pre", {"kind": "learned"}),
    "lightning": ({"kind": "lightning", "n_heads": 4, "chunk": 7}, GLU, RMS, "pre", None),
    "lightning wide": ({"kind": "lightning", "n_heads": 3, "head_dim": 7}, GLU, RMS, "sandwich", None),
    "gla": ({"kind": "gla", "n_heads": 2, "gate_rank": 3, "chunk": 9}, GLU, RMS, "pre", None),
    "gla wide": ({"kind": "gla", "n_heads": 3, "head_dim": 5, "value_dim": 3, "tau": 1.0}, GLU, RMS, "pre", None),
    "mamba2": ({"kind": "mamba2", "head_dim": 4, "state_dim": 6, "n_groups": 2, "chunk": 8}, None, RMS, "pre", None),
    "mamba2 biases": ({"kind": "mamba2", "n_heads": 3, "head_dim": 5, "state_dim": 3, "conv_width": 2, "conv_bias": False, "proj_bias": True, "dt_limit": [0.05, 1.0]}, GLU, LAYER, "pre", None),
    "moe": ({"n_heads": 2, "position": ROPE}, {"kind": "moe", "n_experts": 5, "top_k": 2, "hidden": 9}, RMS, "pre", None),
    "moe groups": ({"n_heads": 2, "position": ROPE}, {"kind": "moe", "n_experts": 6, "top_k": 3, "hidden": 7, "router": "sigmoid", "n_groups": 3, "top_groups": 2, "routed_scaling": 2.5, "bias_rate": 0.001, "n_shared": 2}, RMS, "pre", None),
    "moe gptoss": ({"n_heads": 2, "position": ROPE}, {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8, "act": "gptoss", "bias": True}, RMS, "parallel", None),
    "moe shared gate": ({"n_heads": 2, "position": ROPE}, {"kind": "moe", "n_experts": 4, "top_k": 1, "hidden": 8, "renormalise": False, "n_shared": 1, "shared_hidden": 11, "shared_gate": True}, LAYER, "sandwich", None),
    "deltanet": ({"kind": "deltanet", "n_heads": 2, "chunk": 8}, GLU, RMS, "pre", None),
    "deltanet odd": ({"kind": "deltanet", "n_heads": 3, "head_dim": 5, "value_dim": 3, "conv_width": 1}, GLU, LAYER, "sandwich", None),
    "gated delta": ({"kind": "gated_delta", "n_v_heads": 4, "n_k_heads": 2, "head_dim": 5, "value_dim": 3, "chunk": 9}, GLU, RMS, "pre", None),
    "gated delta wide filter": ({"kind": "gated_delta", "n_v_heads": 2, "conv_width": 7, "chunk": 64}, MLP, LAYER, "post", None),
    "kda": ({"kind": "kda", "n_heads": 2, "chunk": 8}, GLU, RMS, "pre", None),
    "kda odd": ({"kind": "kda", "n_heads": 3, "head_dim": 5, "rank": 2, "conv_width": 2, "chunk": 1}, GLU, RMS, "pre", None),
    "rwkv7": ({"kind": "rwkv7", "n_heads": 2, "chunk": 8}, {"kind": "rwkv_channel"}, LAYER, "pre", None),
    "rwkv7 ranks": ({"kind": "rwkv7", "n_heads": 4, "decay_rank": 3, "rate_rank": 2, "value_rank": 5, "gate_rank": 1}, {"kind": "rwkv_channel", "hidden": 7}, LAYER, "parallel", None),
    "mamba1": ({"kind": "mamba1", "state_dim": 5, "dt_rank": 3}, None, RMS, "pre", None),
    "mamba1 norms": ({"kind": "mamba1", "state_dim": 3, "expand": 3, "conv_width": 2, "conv_bias": False, "proj_bias": True, "dt_norms": True}, GLU, LAYER, "pre", None),
    "performer": ({"kind": "performer", "n_heads": 2, "n_features": 12, "chunk": 8}, GLU, RMS, "pre", None),
    "performer rope": ({"kind": "performer", "n_heads": 3, "head_dim": 6, "n_features": 7, "chunk": 64, "position": ROPE}, MLP, LAYER, "sandwich", None),
    "gau_flash": ({"kind": "gau_flash", "key_dim": 6, "chunk": 8}, None, RMS, "pre", None),
    "gau_flash odd": ({"kind": "gau_flash", "key_dim": 4, "expand": 3, "chunk": 5, "position": PAIRS}, None, LAYER, "post", None),
    "gau_flash one chunk": ({"kind": "gau_flash", "key_dim": 5, "expand": 1, "chunk": 64}, GLU, RMS, "pre", None),
    "gau_flash chunk 1": ({"kind": "gau_flash", "key_dim": 3, "expand": 1, "chunk": 1}, None, RMS, "pre", None),
    "log_linear": ({"kind": "log_linear", "n_heads": 2, "levels": 7, "chunk": 8}, GLU, RMS, "pre", None),
    "log_linear few levels": ({"kind": "log_linear", "n_heads": 3, "head_dim": 5, "value_dim": 3, "levels": 3, "chunk": 2}, MLP, LAYER, "parallel", None),
    "log_linear one block": ({"kind": "log_linear", "n_heads": 2, "levels": 9, "chunk": 64}, GLU, RMS, "pre", None),
}
MORE = {"sandwich": {"embed_scale": 4.0, "embed_norm": LAYER, "logit_softcap": 3.0}}  # name -> other keys of the model
T = 63


def build(name: str, dtype=torch.float64) -> LM:
    """A two-layer model whose every parameter is far from its initial value: a small or zero one hides errors."""
    mixer, ffn, norm, wiring, position = CASES[name]
    block = {"mixer": {"kind": "gqa", **mixer}, "ffn": ffn, "norm": norm, "wiring": wiring}
    data = {"vocab_size": 29, "d_model": 16, "max_len": 64, "layers": {"pattern": ["b"], "repeat": 2}, "blocks": {"b": block}}
    if name in MORE:
        data |= MORE[name]
    model = LM(parse(ModelConfig, data | {"position": position, "final_norm": norm})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.ndim > 1 else 0.5) + (p.ndim == 1))
        if norm["kind"] == "batch":
            model(tokens(), Seq.rows(2, T))  # one batch in training: the statistics that eval uses
    return model.eval()


def tokens(rows: int = 2, n: int = T) -> torch.Tensor:
    return torch.randint(0, 29, (rows, n))


def packed() -> tuple[torch.Tensor, Seq, list[tuple[int, int, int]]]:
    """Rows of several documents with padding inside and at the end; (row, begin, end) of each document."""
    seg = torch.zeros(2, T, dtype=torch.int32)
    documents = [(0, 0, 7), (0, 7, 8), (0, 8, 40), (0, 40, T), (1, 0, 21), (1, 21, 50)]
    for number, (row, begin, end) in enumerate(documents, 1):
        seg[row, begin:end] = number
    return tokens(), Seq.of_segments(seg), documents


def unchanged(model: LM, a: torch.Tensor, b: torch.Tensor, rounding: float) -> bool:
    """Bit for bit. With experts up to rounding: the number of rows that share a product decides which kernel runs."""
    experts = any(isinstance(m, ExpertLinear) for m in model.modules())
    return torch.allclose(a, b, atol=rounding, rtol=0) if experts else torch.equal(a, b)


@pytest.fixture(params=CASES)
def model(request):
    return build(request.param)


def test_no_token_sees_the_future(model):
    x, seq = tokens(), Seq.rows(2, T)
    full = model(x, seq)[0]
    for t in (1, 7, 40, T - 1):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 29
        other = model(changed, seq)[0]
        assert unchanged(model, full[:, :t], other[:, :t], 1e-12), t
        assert not torch.equal(full[:, t], other[:, t])


def test_no_gradient_from_the_past_to_the_future(model):
    embedded = []
    model.embed.register_forward_hook(lambda m, a, out: embedded.append(out) or out.retain_grad())
    hidden = model(tokens(1), Seq.rows(1, T))[0]
    hidden[:, 30].square().sum().backward()
    grad = embedded[0].grad[0].abs().sum(-1)
    assert (grad[31:] == 0).all() and grad[30] > 0


def test_packed_documents_equal_separate_ones(model):
    x, seq, documents = packed()
    full = model(x, seq)[0]
    for row, begin, end in documents:
        alone = model(x[row : row + 1, begin:end], Seq.rows(1, end - begin))[0]
        torch.testing.assert_close(full[row, begin:end], alone[0], atol=1e-11, rtol=0)
    assert torch.isfinite(full).all(), "padding must stay finite: 0 * NaN is NaN"


@pytest.mark.parametrize("cuts", [(1,) * T, (7, 1, 1, 20, 1, 33), (T - 1, 1)], ids=["steps", "mixed", "prefill"])
def test_streamed_equals_whole(model, cuts):
    x, seq = tokens(), Seq.rows(2, T)
    full, states, at, parts = model(x, seq)[0], model.init_states(2, T), 0, []
    for n in cuts:
        parts.append(model(x[:, at : at + n], seq.window(at, at + n), states)[0])
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-11, rtol=0)


def test_streamed_packed_rows_equal_whole(model):
    x, seq, _ = packed()
    full, states, parts = model(x, seq)[0], model.init_states(2, T), []
    for begin, end in ((0, 5), (5, 6), (6, 30), (30, 31), (31, 45), (45, T)):
        parts.append(model(x[:, begin:end], seq.window(begin, end), states)[0])
    real = seq.seg != 0
    torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], atol=1e-11, rtol=0)


def test_ragged_prefill_then_decode_equals_each_row_alone(model):
    lengths, x = torch.tensor([7, 20, 1]), tokens(3, 30)
    states = model.init_states(3, 30)
    first = model(x[:, :20], Seq.ragged(lengths, 20), states)[0]
    for row, n in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, :n], Seq.rows(1, n))[0]
        torch.testing.assert_close(first[row, :n], alone[0], atol=1e-11, rtol=0)
    decoded = [model(x[:, 20 + i : 21 + i], Seq((lengths + i)[:, None]), states)[0] for i in range(5)]
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((x[row, :n], x[row, 20:25]))[None]
        alone = model(whole, Seq.rows(1, n + 5))[0][:, n:]
        torch.testing.assert_close(torch.cat([d[row] for d in decoded])[None], alone, atol=1e-11, rtol=0)


def test_states_can_be_forked_and_rewound(model):
    x = tokens(2, 20)
    states = model.init_states(2, 32)
    model(x[:, :12], Seq.rows(2, 12), states)
    forked = [s.gather(torch.tensor([1, 1, 0])) for s in states]
    step = model(x[[1, 1, 0], 12:13], Seq.rows(3, 1, 12), forked)[0]
    whole = model(x[:, :13], Seq.rows(2, 13))[0][:, -1:]
    torch.testing.assert_close(step, whole[[1, 1, 0]], atol=1e-11, rtol=0)
    saved = [s.snapshot() for s in states]
    model(tokens(2, 5), Seq.rows(2, 5, 12), states)  # a guess that turns out wrong
    for state, copy in zip(states, saved, strict=True):
        state.restore(copy)
    again = model(x[:, 12:13], Seq.rows(2, 1, 12), states)[0]
    torch.testing.assert_close(again, whole, atol=1e-11, rtol=0)


def test_padding_changes_nothing(model):
    x = tokens(1, 20)
    padded = torch.cat((x, tokens(1, 11)), 1)
    full = model(padded, Seq.ragged(torch.tensor([20]), 31))[0]
    torch.testing.assert_close(full[:, :20], model(x, Seq.rows(1, 20))[0], atol=1e-11, rtol=0)


def test_weights_survive_storage(model, tmp_path):
    from zero2llm.core.files import load_tensors, save_tensors

    save_tensors(model.state_dict(), tmp_path, max_bytes=2000)  # several files and an index
    twin = LM(model.cfg).double().eval()
    twin.load_state_dict(load_tensors(tmp_path))
    x = tokens()
    assert torch.equal(twin(x, Seq.rows(2, T))[0], model(x, Seq.rows(2, T))[0])


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_keeps_the_laws(name):
    model = build(name, torch.bfloat16)
    x, seq = tokens(1, 7), Seq.rows(1, 7)
    full = model(x, seq)[0]
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 29
    assert unchanged(model, full[:, :4], model(changed, seq)[0][:, :4], 0.02) and full.dtype == torch.bfloat16
    states = model.init_states(1, 8)
    steps = torch.cat([model(x[:, i : i + 1], seq.window(i, i + 1), states)[0] for i in range(7)], 1)
    torch.testing.assert_close(steps, full, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_state_has_the_size_that_cost_predicts(name):
    from zero2llm.model.cost import state_bytes

    model = build(name, torch.float32)
    assert sum(s.nbytes() for s in model.init_states(3, 40)) == 3 * state_bytes(model.cfg, 40, 4)


def one_of_each() -> list[str]:
    """The first case of every pair of mixer and feed-forward kinds: compiling takes up to a minute."""
    kinds = {}
    for name, (mixer, ffn, *_) in CASES.items():
        kinds.setdefault((mixer.get("kind", "gqa"), (ffn or {}).get("kind")), name)
    return list(kinds.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each())
def test_compiled_equals_eager(name):
    model = build(name, torch.float32)
    x, seq, _ = packed()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(x, seq)[0], model(x, seq)[0], atol=1e-4, rtol=1e-4)
