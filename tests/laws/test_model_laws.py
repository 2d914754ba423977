"""Laws that every mechanism obeys in every wiring; one line in CASES joins a new one.

causality · packed = separate · streamed = whole · padded = unpadded · gather · save and load · half precision
"""

from __future__ import annotations

import pytest
import torch

from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
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
    "sink": ({"n_heads": 4, "n_kv_heads": 2, "sink": True, "window": 5, "position": ROPE}, GLU, RMS, "pre", None),
    "softcap": ({"n_heads": 4, "n_kv_heads": 2, "softcap": 2.0, "scale": 0.3, "position": ROPE}, GLU, {"kind": "rms", "plus_one": True}, "pre", None),
    "gate": ({"n_heads": 4, "gate": True, "position": ROPE}, GLU, RMS, "pre", None),
    "qk-norm over all": ({"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "qk_norm_span": "all", "qk_norm_plus_one": True, "position": ROPE}, GLU, RMS, "pre", None),
    "retnet": ({"kind": "retnet", "n_heads": 2, "chunk": 8}, GLU, RMS, "pre", None),
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
        assert torch.equal(full[:, :t], other[:, :t]), t
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
    twin = LM(model.cfg).double()
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
    assert torch.equal(full[:, :4], model(changed, seq)[0][:, :4]) and full.dtype == torch.bfloat16
    states = model.init_states(1, 8)
    steps = torch.cat([model(x[:, i : i + 1], seq.window(i, i + 1), states)[0] for i in range(7)], 1)
    torch.testing.assert_close(steps, full, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_state_has_the_size_that_cost_predicts(name):
    from zero2llm.model.cost import state_bytes

    model = build(name, torch.float32)
    assert sum(s.nbytes() for s in model.init_states(3, 40)) == 3 * state_bytes(model.cfg, 40, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name):
    model = build(name, torch.float32)
    x, seq, _ = packed()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(x, seq)[0], model(x, seq)[0], atol=1e-4, rtol=1e-4)
