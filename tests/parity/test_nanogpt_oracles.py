"""nanoGPT's ckpt.pt against the equations of GPT-2, written out here in float64, on tensors in nanoGPT's layout (out, in)."""

import json
import math

import pytest
import torch

from zero2llm.core.lazy import Lazy
from zero2llm.core.seq import Seq
from zero2llm.interop import nanogpt
from zero2llm.interop.foreign import import_model
from zero2llm.interop.hf import export_hf
from zero2llm.interop.nanogpt import is_nanogpt, read_nanogpt
from zero2llm.interop.torch_files import read_torch
from zero2llm.tokenizers.bytes import to_chars
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

C, HEADS, LAYERS, BLOCK, TOKENS, V = 24, 4, 2, 32, 257, 320
CASES = {"bias": (True, "erf"), "no bias": (False, "erf"), "before 2023-01-27": (None, "tanh"), "tanh given": (True, "tanh")}


def state_dict(bias=True, seed=0):
    """Weights of unit gain, embeddings and biases of 0.3, norms around 1, the head tied."""
    torch.manual_seed(seed)
    out = {"transformer.wte.weight": 0.3 * torch.randn(V, C), "transformer.wpe.weight": 0.3 * torch.randn(BLOCK, C)}

    def norm(name):
        out[name + ".weight"] = 1 + 0.3 * torch.randn(C)
        if bias:
            out[name + ".bias"] = 0.3 * torch.randn(C)

    def linear(name, rows, cols):
        out[name + ".weight"] = torch.randn(rows, cols) * cols**-0.5
        if bias:
            out[name + ".bias"] = 0.3 * torch.randn(rows)

    for i in range(LAYERS):
        at = f"transformer.h.{i}."
        norm(at + "ln_1"), norm(at + "ln_2")
        linear(at + "attn.c_attn", 3 * C, C), linear(at + "attn.c_proj", C, C)
        linear(at + "mlp.c_fc", 4 * C, C), linear(at + "mlp.c_proj", C, 4 * C)
    norm("transformer.ln_f")
    return out | {"lm_head.weight": out["transformer.wte.weight"]}


def checkpoint_of(sd, bias=True, **more):
    """As train.py saves it. bias None: of before that option."""
    args = dict(n_layer=LAYERS, n_head=HEADS, n_embd=C, block_size=BLOCK, bias=bias, vocab_size=V, dropout=0.0) | more
    args = {key: value for key, value in args.items() if (key, value) != ("bias", None)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(V, C)}}, "param_groups": [{"lr": 6e-4, "params": [0]}]}
    return {"model": {"_orig_mod." + name: t for name, t in sd.items()}, "optimizer": optimizer, "model_args": args, "iter_num": 3,
            "best_val_loss": torch.tensor(2.5), "config": {"dataset": "shakespeare", "n_layer": LAYERS, "compile": True}}  # fmt: skip


def gelu(x, form):
    if form == "erf":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@torch.no_grad()
def oracle(sd, row, form):
    sd = {name: t.double() for name, t in sd.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return sd[name + ".weight"] * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + sd.get(name + ".bias", 0)

    linear = lambda x, name: x @ sd[name + ".weight"].T + sd.get(name + ".bias", 0)
    x = sd["transformer.wte.weight"][row] + sd["transformer.wpe.weight"][: len(row)]
    for i in range(LAYERS):
        at, heads = f"transformer.h.{i}.", []
        qkv = linear(norm(x, at + "ln_1"), at + "attn.c_attn")
        for h in range(HEADS):
            k = C // HEADS
            query, key, value = (qkv[:, part * C + h * k : part * C + (h + 1) * k] for part in range(3))
            scores = (query @ key.T / k**0.5).masked_fill(torch.ones(len(row), len(row)).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ value)
        x = x + linear(torch.cat(heads, 1), at + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, at + "ln_2"), at + "mlp.c_fc"), form), at + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ sd["lm_head.weight"].T


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """GPT-2's two files with the 256 bytes and its end token, no merges."""
    folder = tmp_path_factory.mktemp("gpt2_files")
    vocab = {to_chars(bytes([b])): b for b in range(256)} | {"<|endoftext|>": 256}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def imported(data, tokens, folder, form=None):
    torch.save(data, folder / "ckpt.pt")
    found = read_nanogpt(folder / "ckpt.pt", tokens, {"gelu": form} if form else {})
    import_model(found, folder / "out", overwrite=True)
    return found, Checkpoint.open(folder / "out")


@torch.no_grad()
def error(name, tokens, folder):
    """max |ours - equations| over a row of tokens."""
    bias, form = CASES[name]
    sd = state_dict(bias is not False)
    model = imported(checkpoint_of(sd, bias), tokens, folder, form if "given" in name else None)[1].load_model()
    row = torch.randint(V, (1, BLOCK), generator=torch.Generator().manual_seed(1))
    return (model.logits(model(row, Seq.rows(1, BLOCK))[0])[0].double() - oracle(sd, row[0], form)).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_equations(name, tokens, tmp_path):
    assert error(name, tokens, tmp_path) <= 1e-5


def test_transformers_opens_it_with_zero_biases(tokens, tmp_path):
    """The oracle by a third party, and the exact GELU survives the export."""
    from transformers import AutoModelForCausalLM

    sd = state_dict(bias=False)
    checkpoint = imported(checkpoint_of(sd, False), tokens, tmp_path)[1]
    export_hf(checkpoint.load_model().state_dict(), checkpoint.model_config(), checkpoint.tokenizer_dir, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    row = torch.randint(V, (1, BLOCK))
    with torch.no_grad():
        found = theirs(row, use_cache=False).logits[0]
    assert (found - oracle(sd, row[0], "erf")).abs().max() <= 1e-5


# Planted bugs. Each keeps all shapes, or is refused for its shapes.


def keys_first(t):
    """c_attn read as k, q, v."""
    turned = RIGHT["_turned"](t)
    if turned.shape != (C, 3 * C):
        return turned
    return Lazy(turned.shape, t.dtype, lambda: torch.cat([turned.load().chunk(3, 1)[i] for i in (1, 0, 2)], 1))


def ones(tensors):
    return {name: Lazy(t.shape, t.dtype, lambda t=t: t.load() + 1) for name, t in RIGHT["_zero_biases"](tensors).items()}


def half_the_heads(found, path):
    return RIGHT["_sizes"](found, path) | {"n_head": HEADS // 2}


def positions_shifted(path):
    found = RIGHT["read_torch"](path)
    wpe = found.tensors[nanogpt.WPE]
    found.tensors[nanogpt.WPE] = Lazy(wpe.shape, wpe.dtype, lambda: wpe.load().roll(1, 0))
    return found


def biases_lost(path):
    found = RIGHT["read_torch"](path)
    for name in [n for n in found.tensors if n.endswith("bias")]:
        del found.tensors[name]
    found.rest["model_args"]["bias"] = False
    return found


RIGHT = {name: getattr(nanogpt, name) for name in ("_turned", "_zero_biases", "_sizes", "read_torch")}
BUGS = {
    "c_proj not transposed": ("bias", "TURNED", tuple(n for n in nanogpt.TURNED if n != "attn.c_proj.weight")),
    "tanh for erf": ("bias", "GELU", {"erf": "gelu_new", "tanh": "gelu_new"}),
    "erf for tanh": ("before 2023-01-27", "GELU", {"erf": "gelu", "tanh": "gelu"}),
    "q and k swapped": ("no bias", "_turned", keys_first),
    "biases of one": ("no bias", "_zero_biases", ones),
    "half the heads": ("no bias", "_sizes", half_the_heads),
    "positions one off": ("bias", "read_torch", positions_shifted),
    "biases lost": ("bias", "read_torch", biases_lost),
}


@pytest.mark.parametrize("what", BUGS)
def test_planted_bug_is_caught(what, tokens, tmp_path, monkeypatch):
    name, attribute, wrong = BUGS[what]
    monkeypatch.setattr(nanogpt, attribute, wrong)
    assert error(name, tokens, tmp_path) > 1e-4


@pytest.mark.parametrize("part", ["attn.c_attn.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"])
def test_a_missing_transpose_of_an_oblong_matrix_is_refused(part, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(nanogpt, "TURNED", tuple(n for n in nanogpt.TURNED if n != part))
    with pytest.raises(ValueError, match="do not fit"):
        error("bias", tokens, tmp_path)


def test_an_untied_head_is_never_lost(tokens, tmp_path):
    """Before January 2023 the head was another matrix: GPT-2 has no such thing, so it is refused."""
    sd = state_dict() | {"lm_head.weight": torch.randn(V, C)}
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        imported(checkpoint_of(sd), tokens, tmp_path)
    assert not (tmp_path / "out").exists()


# What is said and what is refused.


def test_what_is_said(tokens, tmp_path):
    found, _ = imported(checkpoint_of(state_dict(False), False), tokens, tmp_path)
    said = " | ".join(found.notes)
    for part in ("_orig_mod.", "gelu erf assumed", f"{6 * LAYERS + 1} of zeros were added", f"{V - TOKENS} of {V} rows"):
        assert part in said, part
    found, _ = imported(checkpoint_of(state_dict(), None), tokens, tmp_path)
    assert "gelu tanh assumed" in " | ".join(found.notes)
    found, _ = imported(checkpoint_of(state_dict()), tokens, tmp_path, "erf")
    assert "assumed" not in " | ".join(found.notes) and "zeros" not in " | ".join(found.notes)
    assert is_nanogpt(read_torch(tmp_path / "ckpt.pt"))


def test_masks_of_slow_attention_and_a_vocabulary_of_none(tokens, tmp_path):
    sd = state_dict() | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, BLOCK, BLOCK).tril() for i in range(LAYERS)}
    assert imported(checkpoint_of(sd, vocab_size=None), tokens, tmp_path)[1].model_config().vocab_size == V


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"n_layer": 12}, "model_args say n_layer = 12, its tensors say 2"),
        ({"n_embd": 768}, "n_embd = 768, its tensors say 24"),
        ({"block_size": 1024}, "block_size = 1024, its tensors say 32"),
        ({"vocab_size": 50257}, f"vocab_size = 50257, its tensors say {V}"),
        ({"bias": False}, "bias = False, its tensors say True"),
        ({"n_head": 5}, "n_head = 5, which does not divide n_embd = 24"),
        ({"n_head": None}, "n_head = None"),
    ],
)
def test_model_args_that_the_tensors_contradict(more, says, tokens, tmp_path):
    torch.save(checkpoint_of(state_dict(), **more), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError) as caught:
        read_nanogpt(tmp_path / "ckpt.pt", tokens)
    assert says in str(caught.value)


def test_files_that_are_no_checkpoint_are_refused(tokens, tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(state_dict(), path)
    with pytest.raises(ValueError, match="no nanoGPT checkpoint: it needs model_args"):
        read_nanogpt(path, tokens)
    torch.save(checkpoint_of(state_dict()), path)
    with pytest.raises(ValueError, match="gelu = 'fast': there are erf, tanh"):
        read_nanogpt(path, tokens, {"gelu": "fast"})
    with pytest.raises(ValueError, match="n_heads: .*says its shape itself; only gelu"):
        read_nanogpt(path, tokens, {"n_heads": 4})
    with pytest.raises(ValueError, match="trained on 'shakespeare', holds no tokenizer"):
        read_nanogpt(path, None)


def test_a_pickled_vocabulary_is_refused_and_its_characters_can_come_along(tokens, tmp_path):
    """The recipe in the message is followed here."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    folder = tmp_path / "char"
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(b"\x80\x04.")
    torch.save(checkpoint_of(state_dict()), tmp_path / "ckpt.pt")
    for given in (folder, folder / "meta.pkl"):
        with pytest.raises(ValueError, match="meta.pkl is a pickle, which can run code"):
            read_nanogpt(tmp_path / "ckpt.pt", given)
    characters = sorted(set("\n First Citizen: before we proceed."))
    library = Library(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    library.decoder = decoders.Fuse()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\n"}')
    tokenizer = Tokenizer.load(imported(checkpoint_of(state_dict()), folder, tmp_path)[1].tokenizer_dir)
    text = "First Citizen:\nwe proceed."
    assert tokenizer.encode(text) == [characters.index(c) for c in text] and tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_of_another_model_is_refused(tokens, tmp_path):
    sd = state_dict()
    sd |= {"transformer.wte.weight": sd["transformer.wte.weight"][:65].clone(), "lm_head.weight": sd["lm_head.weight"][:65].clone()}
    with pytest.raises(ValueError, match="257 tokens, the model 65: it is another model's"):
        imported(checkpoint_of(sd, vocab_size=65), tokens, tmp_path)
    assert not (tmp_path / "out").exists()
