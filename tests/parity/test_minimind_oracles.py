"""minimind's files of every generation against their equations, written out here head by head in float64.

A state dict with each generation's names goes through torch.save, the reader and a checkpoint; the logits must be those
of the equations on the same tensors. Planted bugs in the reader must move them.
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Library

from zero2llm.core.lazy import Lazy
from zero2llm.core.seq import Seq
from zero2llm.interop import minimind, minimind_experts
from zero2llm.interop.foreign import import_model
from zero2llm.interop.hf import export_hf
from zero2llm.interop.minimind import read_minimind
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

V, T, D, HIDDEN = 40, 24, 64, 48


@dataclass(frozen=True)
class Case:
    """A model as its generation computes it. names : "meta" or "hf".  experts : routed; shared : "" none, "one", "list"."""

    names: str
    heads: int
    kv: int
    theta: float
    eps: float
    interleaved: bool
    dim: int
    d: int = D
    normed: bool = False
    experts: int = 0
    top_k: int = 2
    shared: str = ""
    tied: bool = True
    shape: tuple = ()


V1 = Case("meta", 16, 8, 1e4, 1e-5, True, 8, d=128)
V2_OLD = Case("meta", 8, 2, 1e6, 1e-5, True, 8)
V2 = Case("hf", 8, 2, 1e6, 1e-5, False, 8)
V3 = Case("hf", 8, 4, 1e6, 1e-6, False, 8, normed=True)
CASES = {
    "v1": V1,
    "v1-moe": replace(V1, experts=4, shared="one"),
    "v2-old": V2_OLD,
    "v2-old-moe": replace(V2_OLD, experts=4, shared="one"),
    "v2-old-given": replace(V2_OLD, heads=4, kv=4, dim=16, theta=500.0, shape=(("n_heads", 4), ("rope_theta", 500), ("max_len", 64))),
    "v2": V2,
    "v2-given": replace(V2, heads=4, kv=1, dim=16, theta=3e3, eps=1e-3, shape=(("n_kv_heads", 1), ("rope_theta", "3e3"), ("norm_eps", 1e-3))),
    "v2-moe": replace(V2, experts=4, shared="list"),
    "v2-moe-top-1": replace(V2, experts=4, top_k=1, shared="list", shape=(("top_k", 1),)),
    "v2-moe-none-shared": replace(V2, experts=3),
    "v3": V3,
    "v3-head-dim": replace(V3, dim=10),
    "v3-untied": replace(V3, tied=False),
    "v3-moe": replace(V3, experts=4, top_k=1),
    "v3-moe-top-2": replace(V3, experts=4, top_k=2, shape=(("top_k", 2),)),
}
NAMES = {
    "meta": {"embed": "tok_embeddings", "norm": "norm", "head": "output", "layer": "layers.{}.", "q": "attention.wq", "k": "attention.wk",
             "v": "attention.wv", "o": "attention.wo", "n1": "attention_norm", "n2": "ffn_norm", "ffn": "feed_forward.", "gate": "w1", "up": "w3", "down": "w2"},
    "hf": {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layer": "model.layers.{}.", "q": "self_attn.q_proj",
           "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "n1": "input_layernorm", "n2": "post_attention_layernorm",
           "ffn": "mlp.", "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "qn": "self_attn.q_norm", "kn": "self_attn.k_norm"},
}  # fmt: skip


def networks(case, layer):
    """Prefixes of the feed-forward networks of a layer, those that every token meets last."""
    ffn = NAMES[case.names]["layer"].format(layer) + NAMES[case.names]["ffn"]
    if not case.experts:
        return [], [ffn]
    always = {"": [], "one": [ffn + "shared_experts."], "list": [f"{ffn}shared_experts.{j}." for j in range(2)]}[case.shared]
    return [f"{ffn}experts.{e}." for e in range(case.experts)], always


def state_dict(case, layers=2, seed=0):
    """Weights of unit gain, a small embedding (so that eps counts), norms around 1."""
    torch.manual_seed(seed)
    n, out = NAMES[case.names], {}
    matrix = lambda rows, cols: torch.randn(rows, cols) * cols**-0.5
    norm = lambda width: 1 + 0.2 * torch.randn(width)
    out[n["embed"] + ".weight"] = 0.1 * torch.randn(V, case.d)
    for i in range(layers):
        at = n["layer"].format(i)
        for key, rows, cols in (("q", case.heads * case.dim, case.d), ("k", case.kv * case.dim, case.d),
                                ("v", case.kv * case.dim, case.d), ("o", case.d, case.heads * case.dim)):  # fmt: skip
            out[f"{at}{n[key]}.weight"] = matrix(rows, cols)
        for key, width in (("n1", case.d), ("n2", case.d), *((("qn", case.dim), ("kn", case.dim)) if case.normed else ())):
            out[f"{at}{n[key]}.weight"] = norm(width)
        routed, always = networks(case, i)
        for prefix in routed + always:
            out[f"{prefix}{n['gate']}.weight"], out[f"{prefix}{n['up']}.weight"] = matrix(HIDDEN, case.d), matrix(HIDDEN, case.d)
            out[f"{prefix}{n['down']}.weight"] = matrix(case.d, HIDDEN)
        if case.experts:
            out[f"{at}{n['ffn']}gate.weight"] = 2 * matrix(case.experts, case.d)
    out[n["norm"] + ".weight"] = norm(case.d)
    out[n["head"] + ".weight"] = out[n["embed"] + ".weight"] if case.tied else 0.1 * torch.randn(V, case.d)
    return out


def rms(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turn(x, case):
    """(T, K) of one head: each pair of channels turned by t theta^(-2m / K)."""
    out, half = x.clone(), case.dim // 2
    for m in range(half):
        a, b = (2 * m, 2 * m + 1) if case.interleaved else (m, m + half)
        angle = torch.arange(len(x), dtype=torch.float64) * case.theta ** (-2 * m / case.dim)
        out[:, a] = x[:, a] * angle.cos() - x[:, b] * angle.sin()
        out[:, b] = x[:, a] * angle.sin() + x[:, b] * angle.cos()
    return out


def attention(x, sd, at, case):
    n = NAMES[case.names]
    of = lambda key, head: (x @ sd[f"{at}{n[key]}.weight"].T)[:, head * case.dim : (head + 1) * case.dim]
    heads = []
    for h in range(case.heads):
        g = h // (case.heads // case.kv)
        q, k, v = of("q", h), of("k", g), of("v", g)
        if case.normed:
            q, k = rms(q, sd[f"{at}{n['qn']}.weight"], case.eps), rms(k, sd[f"{at}{n['kn']}.weight"], case.eps)
        scores = turn(q, case) @ turn(k, case).T / case.dim**0.5
        future = torch.ones(len(x), len(x)).triu(1).bool()
        heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v)
    return torch.cat(heads, 1) @ sd[f"{at}{n['o']}.weight"].T


def feed_forward(x, sd, layer, case):
    n = NAMES[case.names]

    def network(prefix, x):
        gate, up = x @ sd[f"{prefix}{n['gate']}.weight"].T, x @ sd[f"{prefix}{n['up']}.weight"].T
        return (gate * gate.sigmoid() * up) @ sd[f"{prefix}{n['down']}.weight"].T

    routed, always = networks(case, layer)
    y = sum((network(prefix, x) for prefix in always), torch.zeros_like(x))
    for t, token in enumerate(x if routed else ()):
        p = (sd[f"{n['layer'].format(layer)}{n['ffn']}gate.weight"] @ token).softmax(0)
        best = sorted(range(case.experts), key=lambda e: -p[e])[: case.top_k]
        whole = sum(p[e] for e in best) if case.top_k > 1 or case.normed else 1.0  # before v3 a single one is not rescaled
        y[t] = y[t] + sum(p[e] / whole * network(routed[e], token) for e in best)
    return y


@torch.no_grad()
def oracle(sd, row, case, layers=2):
    sd, n = {name: t.double() for name, t in sd.items()}, NAMES[case.names]
    x = sd[n["embed"] + ".weight"][row]
    for i in range(layers):
        at = n["layer"].format(i)
        x = x + attention(rms(x, sd[f"{at}{n['n1']}.weight"], case.eps), sd, at, case)
        x = x + feed_forward(rms(x, sd[f"{at}{n['n2']}.weight"], case.eps), sd, i, case)
    return rms(x, sd[n["norm"] + ".weight"], case.eps) @ sd[n["head"] + ".weight"].T


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A vocabulary of single characters with minimind's first control tokens, and no chat template."""
    folder = tmp_path_factory.mktemp("minimind_tokenizer")
    library = Library(models.BPE(vocab={c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz \n"])}, merges=[]))
    library.decoder = decoders.Fuse()
    library.add_special_tokens([AddedToken(s, special=True) for s in ("<unk>", "<s>", "</s>")])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}))
    return folder


def imported(sd, tokens, folder, shape=()):
    torch.save(sd, folder / "full_sft_64.pth")
    found = read_minimind(folder / "full_sft_64.pth", tokens, dict(shape))
    import_model(found, folder / "out", overwrite=True)
    return found, Checkpoint.open(folder / "out")


@torch.no_grad()
def error(case, tokens, folder):
    """max |ours - equations| over a row of tokens."""
    sd = state_dict(case)
    model = imported(sd, tokens, folder, case.shape)[1].load_model()
    row = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1))
    return (model.logits(model(row, Seq.rows(1, T))[0])[0].double() - oracle(sd, row[0], case)).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_equations(name, tokens, tmp_path):
    assert error(CASES[name], tokens, tmp_path) <= 1e-5


def test_the_equations_are_those_of_transformers(tokens, tmp_path):
    """The oracle itself, by a third party: Qwen3 (v3) and Qwen2-MoE (v2 with shared experts) on the exported tensors."""
    from transformers import AutoModelForCausalLM

    for name in ("v1", "v2-moe", "v2-moe-none-shared", "v3", "v3-moe"):
        case = CASES[name]
        checkpoint = imported(state_dict(case), tokens, tmp_path, case.shape)[1]
        model = checkpoint.load_model()
        export_hf(model.state_dict(), checkpoint.model_config(), checkpoint.tokenizer_dir, tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        row = torch.randint(V, (1, T))
        with torch.no_grad():
            found = theirs(row, use_cache=False).logits[0]
        assert (found - oracle(state_dict(case), row[0], case)).abs().max() <= 1e-5


def test_weights_stay_fp16(tokens, tmp_path):
    for name in ("v1-moe", "v2-moe", "v3"):
        sd = {key: t.half() for key, t in state_dict(CASES[name]).items()}
        found, checkpoint = imported(sd, tokens, tmp_path, CASES[name].shape)
        assert {t.dtype for t in found.tensors.values()} == {torch.float16}
        model, row = checkpoint.load_model(), torch.randint(V, (1, T))
        with torch.no_grad():
            ours = model.logits(model(row, Seq.rows(1, T))[0])[0].double()
        assert (ours - oracle(sd, row[0], CASES[name])).abs().max() <= 1e-5  # doubling down_proj lost nothing


# Planted bugs. Each is a change of the reader that keeps all shapes.


def identity(tensors, dim):
    return tensors


def also_v(tensors, dim):
    turned = {name.replace("v_proj", "q_proj"): t for name, t in tensors.items() if "v_proj" in name}
    back = {name.replace("q_proj", "v_proj"): t for name, t in RIGHT["_half_split"](turned, dim).items()}
    return RIGHT["_half_split"](tensors, dim) | back


def other_head_dim(tensors, dim):
    return RIGHT["_half_split"](tensors, 2 * dim)


def headless(path):
    found = RIGHT["read_torch"](path)
    return replace(found, tensors={name: t for name, t in found.tensors.items() if name != "lm_head.weight"})


def not_doubled(parts, dim):
    whole = RIGHT["joined"](parts, dim)
    return Lazy(whole.shape, whole.dtype, lambda: torch.cat([part.load() for part in parts], dim))


def not_shared(tensors):
    """Shared experts read as silent."""
    out = RIGHT["one_shared"](tensors)
    return {n: Lazy(t.shape, t.dtype, lambda t=t: 0 * t.load()) if "shared_expert.down" in n else t for n, t in out.items()}


RIGHT = {name: getattr(minimind, name) for name in ("_half_split", "read_torch", "one_shared")} | {"joined": minimind_experts.joined}
SWAPPED = minimind.META | {"w1": "up_proj", "w3": "gate_proj"}
BUGS = {  # what is wrong -> (the case that sees it, where, the wrong thing)
    "q and k not permuted": ("v1", minimind, "_half_split", identity),
    "v permuted too": ("v1", minimind, "_half_split", also_v),
    "permuted across two heads": ("v2-old", minimind, "_half_split", other_head_dim),
    "gate and up swapped": ("v2-old", minimind, "META", SWAPPED),
    "v1 with v2's theta": ("v1", minimind, "V1", replace(minimind.V1, rope_theta=1e6)),
    "v2 with v1's theta": ("v2", minimind, "V2", replace(minimind.V2, rope_theta=1e4)),
    "v1 with half the heads": ("v1", minimind, "V1", replace(minimind.V1, n_heads=8)),
    "v3 with v2's eps": ("v3", minimind, "V3", replace(minimind.V3, norm_eps=1e-5)),
    "untied head lost": ("v3-untied", minimind, "read_torch", headless),
    "shared expert halved": ("v2-moe", minimind_experts, "joined", not_doubled),
    "shared expert silent": ("v1-moe", minimind, "one_shared", not_shared),
    "one expert a token": ("v2-moe", minimind, "V2", replace(minimind.V2, top_k=1)),
    "two experts a token": ("v3-moe", minimind, "V3", replace(minimind.V3, top_k=2)),
}


@pytest.mark.parametrize("what", BUGS)
def test_planted_bug_is_caught(what, tokens, tmp_path, monkeypatch):
    case, module, name, wrong = BUGS[what]
    monkeypatch.setattr(module, name, wrong)
    assert error(CASES[case], tokens, tmp_path) > 1e-4


# What is said and what is refused.


def test_assumptions_are_said(tokens, tmp_path):
    found, _ = imported(state_dict(V2), tokens, tmp_path)
    assert any("n_heads 8" in note and "rope_theta 1e+06" in note and "minimind v2's defaults" in note for note in found.notes)
    given = {"n_heads": 8, "rope_theta": 1e6, "max_len": 100, "norm_eps": 1e-5}
    found, checkpoint = imported(state_dict(V2), tokens, tmp_path, given)
    assert not any("assumed" in note for note in found.notes) and checkpoint.model_config().max_len == 100
    found, checkpoint = imported(state_dict(CASES["v1-moe"]), tokens, tmp_path)
    assert any("v1" in note and "top_k 2" in note and "n_heads 16" in note for note in found.notes)
    assert any("down_proj doubled" in note for note in found.notes)


def test_template_of_the_generation_where_the_tokenizer_has_none(tokens, tmp_path):
    found, checkpoint = imported(state_dict(V1), tokens, tmp_path)
    assert any("minimind-v1" in note for note in found.notes)
    text = Tokenizer.load(checkpoint.tokenizer_dir).render_text([{"role": "user", "content": "hi"}], True)
    assert text.endswith("<s>user\nhi</s>\n<s>assistant\n")
    (tmp_path / "own").mkdir()
    for file in tokens.iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    found, checkpoint = imported(state_dict(V1), tmp_path / "own", tmp_path)
    assert (checkpoint.tokenizer_dir / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}!"
    assert not any("template" in note for note in found.notes)


def test_wrappers_resumes_and_masks(tokens, tmp_path):
    """DistributedDataParallel's prefix, a resumable checkpoint with its optimizer, v1's stored masks."""
    sd = {"module." + name: t for name, t in state_dict(V1).items()} | {"module.layers.0.attention.mask": torch.zeros(1, 1, 4, 4)}
    found, _ = imported({"model": sd, "optimizer": {"state": {}}, "epoch": 1}, tokens, tmp_path)
    assert any("module." in note for note in found.notes) and len(found.tensors) == len(sd) - 1


REFUSED = {
    "heads that the tensors contradict": (V3, {"n_heads": 4}, "n_heads = 4, its tensors say 8"),
    "kv heads that the tensors contradict": (V2, {"n_heads": 8, "n_kv_heads": 4}, "n_kv_heads = 4, its tensors say 2"),
    "width that the tensors contradict": (V2, {"d_model": 768}, "d_model = 768, its tensors say 64"),
    "layers that the tensors contradict": (V1, {"n_layers": 8}, "n_layers = 8, its tensors say 2"),
    "heads that do not divide": (V2, {"n_heads": 7}, "do not divide q's 64 rows"),
    "unknown key": (V2, {"heads": 8}, "there is no 'heads'; there are: n_heads"),
    "no number": (V2, {"n_heads": "many"}, "n_heads = 'many'"),
    "half a head": (V2, {"n_heads": 7.5}, "n_heads = 7.5"),
    "below zero": (V2, {"rope_theta": -1}, "rope_theta = -1"),
    "experts of a dense model": (V2, {"top_k": 2}, "top_k = 2"),
    "more chosen than there are": (CASES["v3-moe"], {"top_k": 5}, "top_k = 5, its tensors say 4"),
    "ratio of no generation": (CASES["v2-old-given"], {}, "give shape n_heads, rope_theta, max_len"),
    "one routed, none shared": (replace(V2, experts=3), {"top_k": 1}, "none shared"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, tokens, tmp_path):
    case, shape, says = REFUSED[what]
    torch.save(state_dict(case), tmp_path / "a.pth")
    with pytest.raises(ValueError) as caught:
        read_minimind(tmp_path / "a.pth", tokens, shape)
    assert says in str(caught.value)


def test_files_that_are_no_model_are_refused(tokens, tmp_path):
    path = tmp_path / "lora_identity_512.pth"
    torch.save({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(2, 4)}, path)
    with pytest.raises(ValueError, match="holds a LoRA.*convert_merge_base_lora"):
        read_minimind(path, tokens, {})
    torch.save({"encoder.weight": torch.zeros(2, 4)}, path)
    with pytest.raises(ValueError, match="no minimind model.*encoder.weight"):
        read_minimind(path, tokens, {})
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 4)}, path)
    with pytest.raises(ValueError, match="gate_proj.weight is missing"):
        read_minimind(path, tokens, {})
    torch.save(state_dict(V2), path)
    with pytest.raises(ValueError, match="holds no tokenizer; give the folder.*model/"):
        read_minimind(path, None, {})


@pytest.mark.parametrize("edit", ["missing", "extra", "mis-shaped", "small"])
def test_tensors_that_do_not_fit_are_listed_and_nothing_is_written(edit, tokens, tmp_path):
    sd = state_dict(V2_OLD)
    says = {"missing": "layers.1.post_attention", "extra": "layers.1.extra.weight", "mis-shaped": "mlp.up_proj", "small": "31 tokens, the model 20"}[edit]
    if edit == "missing":
        del sd["layers.1.ffn_norm.weight"]
    elif edit == "extra":
        sd["layers.1.extra.weight"] = torch.zeros(3)
    elif edit == "mis-shaped":
        sd["layers.1.feed_forward.w3.weight"] = torch.zeros(HIDDEN + 1, D)
    else:
        sd |= {name: sd[name][:20].clone() for name in ("tok_embeddings.weight", "output.weight")}
    torch.save(sd, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=says):
        import_model(read_minimind(tmp_path / "a.pth", tokens, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
