"""A small model of every architecture that has a GGUF, and llama.cpp's answers about files."""

import json
import subprocess
import sys
from math import nan

import pytest
import torch

from zero2llm.core.seq import Seq
from zero2llm.interop.foreign import plan
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.write import export_gguf
from zero2llm.interop.hf_config import from_hf_config
from zero2llm.model.lm import LM
from zero2llm.tokenizers.tokenizer import Tokenizer

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


def read_back(path):
    found = read_gguf(path)
    cfg = from_hf_config(found.config)
    made = plan(found.tensors, cfg, found.config["model_type"], str(path))
    return found, cfg, dict(zip(made.ours(), (t for part in made.parts() for t in part), strict=True))
