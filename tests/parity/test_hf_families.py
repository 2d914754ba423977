"""Every other family against transformers, both ways: logits, cached decoding, tensors, configuration.

Their tiny model has random weights, norms and biases included, since those that start at 0 or 1 hide errors.
"""

import re

import pytest
import torch
import transformers as hf

from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.interop.families.family import differences
from zero2llm.interop.hf import from_hf_config, from_hf_tensors, load_hf, to_hf_config, to_hf_tensors
from zero2llm.interop.hf_config import FAMILIES, family_of
from zero2llm.model.cost import parameters
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig

V, T = 61, 13
SIZES = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=32, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
ROPE = lambda kind, base=500.0, **more: {"rope_type": kind, "rope_theta": base, **more}
LLAMA3 = ROPE("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = ROPE("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.5)
LONG = ROPE("longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[1.5, 2.5, 4.0], original_max_position_embeddings=4)
GEMMA = SIZES | dict(head_dim=10, num_hidden_layers=3)
GEMMA3 = {"full_attention": ROPE("linear", 1e4, factor=8.0), "sliding_attention": ROPE("default", 100.0)}
MOE = SIZES | dict(moe_intermediate_size=12, num_experts=5, num_experts_per_tok=2)
MLA = SIZES | dict(num_hidden_layers=3, first_k_dense_replace=1, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2,
                   kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=5, num_key_value_heads=4)  # fmt: skip
SSM = dict(vocab_size=V, hidden_size=24, num_hidden_layers=2, bos_token_id=None, eos_token_id=None, pad_token_id=None)
DELTA = dict(rms_norm_eps=1e-3, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
             linear_value_head_dim=5)  # fmt: skip
KIMI = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]

# name -> (class of transformers, its configuration)
CASES = {
    "llama3.1": (hf.LlamaForCausalLM, SIZES | dict(rope_parameters=LLAMA3)),
    "llama-linear": (hf.LlamaForCausalLM, SIZES | dict(rope_parameters=ROPE("linear", factor=4.0))),
    "llama-yarn": (hf.LlamaForCausalLM, SIZES | dict(rope_parameters=YARN)),
    "llama-yarn-untruncated": (hf.LlamaForCausalLM, SIZES | dict(head_dim=16, rope_parameters=YARN | dict(truncate=False, attention_factor=0.9))),
    "mistral": (hf.MistralForCausalLM, SIZES | dict(sliding_window=5, head_dim=10)),
    "qwen2": (hf.Qwen2ForCausalLM, SIZES | dict(rope_theta=1e6, tie_word_embeddings=True)),
    "smollm3": (hf.SmolLM3ForCausalLM, SIZES | dict(num_hidden_layers=5, no_rope_layer_interval=2, rope_theta=5e6)),
    "olmo2": (hf.Olmo2ForCausalLM, SIZES | dict(rope_theta=5e5)),
    "phi3": (hf.Phi3ForCausalLM, SIZES | dict(sliding_window=6, original_max_position_embeddings=32)),
    "phi3-partial": (hf.Phi3ForCausalLM, SIZES | dict(partial_rotary_factor=0.34, tie_word_embeddings=True)),
    "phi3-long": (hf.Phi3ForCausalLM, SIZES | dict(rope_parameters=LONG, original_max_position_embeddings=4)),
    "gemma": (hf.GemmaForCausalLM, GEMMA),
    "gemma2": (hf.Gemma2ForCausalLM, GEMMA | dict(sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=2.0,
                                                  final_logit_softcapping=3.0)),
    "gemma3": (hf.Gemma3ForCausalLM, GEMMA | dict(sliding_window=5, sliding_window_pattern=2, query_pre_attn_scalar=7)),
    "gemma3-scaled": (hf.Gemma3ForCausalLM, GEMMA | dict(sliding_window=5, rope_parameters=GEMMA3, num_hidden_layers=4,
                      layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"])),
    "mixtral": (hf.MixtralForCausalLM, MOE | dict(num_local_experts=5)),
    "mixtral-window": (hf.MixtralForCausalLM, MOE | dict(num_local_experts=5, sliding_window=4, rms_norm_eps=1e-6)),
    "qwen2_moe": (hf.Qwen2MoeForCausalLM, MOE | dict(num_hidden_layers=3, decoder_sparse_step=2, mlp_only_layers=[2],
                                                     shared_expert_intermediate_size=20)),
    "qwen2_moe-all": (hf.Qwen2MoeForCausalLM, MOE | dict(norm_topk_prob=True, shared_expert_intermediate_size=20)),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, MOE | dict(norm_topk_prob=True, head_dim=10, mlp_only_layers=[1])),
    "gpt_oss": (hf.GptOssForCausalLM, MOE | dict(num_local_experts=5, head_dim=10, sliding_window=4,
                                                 rope_parameters=YARN | dict(truncate=False, rope_theta=150000.0))),
    "deepseek_v2": (hf.DeepseekV2ForCausalLM, MLA | dict(n_shared_experts=2, n_group=1, topk_group=1, q_lora_rank=None)),
    "deepseek_v2-yarn": (hf.DeepseekV2ForCausalLM, MLA | dict(n_shared_experts=1, n_group=1, topk_group=1, q_lora_rank=9,
                         rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.7))),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, MLA | dict(n_shared_experts=1, n_group=3, topk_group=2, q_lora_rank=9,
                    routed_scaling_factor=2.5, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
    "deepseek_v3-half": (hf.DeepseekV3ForCausalLM, MLA | dict(n_shared_experts=1, n_group=1, topk_group=1,
                         q_lora_rank=None, rope_interleave=False, norm_topk_prob=False)),
    "mamba": (hf.MambaForCausalLM, SSM | dict(state_size=5, expand=2, conv_kernel=3, time_step_rank=3)),
    "mamba-untied": (hf.MambaForCausalLM, SSM | dict(state_size=5, use_bias=True, use_conv_bias=False, tie_word_embeddings=False)),
    "mamba2": (hf.Mamba2ForCausalLM, SSM | dict(state_size=5, n_groups=2, num_heads=6, head_dim=8, chunk_size=4)),
    "mamba2-limit": (hf.Mamba2ForCausalLM, SSM | dict(state_size=5, n_groups=1, num_heads=6, head_dim=8, chunk_size=4, use_bias=True,
                     tie_word_embeddings=True, time_step_limit=(0.2, 0.6))),
    "jamba": (hf.JambaForCausalLM, MOE | dict(num_hidden_layers=4, mamba_d_state=5, attn_layer_period=3, attn_layer_offset=1)),
    "jamba-dense": (hf.JambaForCausalLM, SIZES | dict(num_experts=1, attn_layer_period=2, attn_layer_offset=0, mamba_d_conv=3)),
    "qwen3_next": (hf.Qwen3NextForCausalLM, MOE | dict(num_hidden_layers=4, head_dim=8, shared_expert_intermediate_size=10, **DELTA,
                   partial_rotary_factor=0.5, mlp_only_layers=[1])),
    "kimi_linear": (hf.KimiLinearForCausalLM, MLA | dict(num_hidden_layers=4, num_local_experts=6, n_group=1, topk_group=1,
                    linear_head_dim=6, linear_num_heads=5, linear_conv_kernel_dim=3, layer_types=KIMI, rms_norm_eps=1e-3)),
}  # fmt: skip


@torch.no_grad()
def randomise(model):
    """Matrices of unit gain; vectors 0.3 around 1 (norm scales) or 0 (everything else, buffers of the router too)."""
    torch.manual_seed(0)
    for name, p in list(model.named_parameters()) + [(n, b) for n, b in model.named_buffers() if "correction" in n]:
        if p.ndim > 1:
            p.normal_(0, 1.0 if "embed" in name else p.shape[-1] ** -0.5)
        else:
            p.normal_(0, 0.3).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.eval()


def build(name):
    kind, keys = CASES[name]
    return randomise(kind(kind.config_class(**keys)))


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """(ours, theirs): ours from the folder that theirs was saved to."""
    theirs = build(request.param)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    cfg, state = load_hf(folder)
    ours = LM(cfg)
    ours.load_state_dict(state)
    return ours.eval(), theirs, folder


def kind_of(theirs):
    return theirs.config.model_type


def relative(a, b):
    assert b.std() > 0.1
    return ((a - b).abs().max() / b.std()).item()


def bound(ours):
    """Of the spread of the logits. Delta rules: fp32 itself, ours and theirs alike, is 2e-5 from fp64 in these models."""
    return 5e-5 if any(spec.mixer.kind in ("gated_delta", "kda") for spec in ours.cfg.specs()) else 1e-5


def logits(model, tokens):
    return model.logits(model(tokens, Seq.rows(*tokens.shape))[0])


def rows(seed):
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_agree(both):
    ours, theirs, _ = both
    tokens = rows(1)
    assert relative(logits(ours, tokens), theirs(tokens, use_cache=False).logits) < bound(ours)


@torch.no_grad()
def test_cached_decoding_agrees(both):
    ours, theirs, _ = both
    tokens = rows(2)
    seq, states, parts = Seq.rows(2, T), ours.init_states(2, T), []
    for start, stop in [(0, 6)] + [(i, i + 1) for i in range(6, T)]:
        parts.append(ours.logits(ours(tokens[:, start:stop], seq.window(start, stop), states)[0]))
    assert relative(torch.cat(parts, 1), theirs(tokens, use_cache=False).logits) < bound(ours)


@torch.no_grad()
def test_packed_documents_equal_documents_run_there_alone(both):
    ours, theirs, _ = both
    tokens = rows(4)
    seq = Seq.of_segments(torch.tensor([[1] * 5 + [2] * (T - 5)]).expand(2, -1))
    alone = [theirs(part, use_cache=False).logits for part in (tokens[:, :5], tokens[:, 5:])]
    assert relative(ours.logits(ours(tokens, seq)[0]), torch.cat(alone, 1)) < bound(ours)


@torch.no_grad()
def test_ours_opens_there(both, tmp_path):
    """Other weights, ours alone: written as a folder, opened by their Auto class, the same function and no key to spare."""
    from zero2llm.core.files import save_tensors
    from zero2llm.interop.hf import _write

    ours, theirs, _ = both
    other = randomise(LM(ours.cfg))
    save_tensors(to_hf_tensors(other.state_dict(), ours.cfg, kind_of(theirs)), tmp_path)
    _write(tmp_path / "config.json", to_hf_config(ours.cfg, model_type=kind_of(theirs)))
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = rows(3)
    assert relative(logits(other, tokens), again.eval()(tokens, use_cache=False).logits) < bound(ours)


def test_tensors_come_back_bit_for_bit(both):
    from zero2llm.core.files import load_tensors

    ours, theirs, folder = both
    back = to_hf_tensors(ours.state_dict(), ours.cfg, kind_of(theirs))
    there = FAMILIES[kind_of(theirs)].clean(load_tensors(folder), ours.cfg)
    assert set(there) - set(back) <= {"lm_head.weight"} and set(back) <= set(there)
    assert all(torch.equal(value, there[key]) for key, value in back.items())
    other = LM(ours.cfg).state_dict()
    again = from_hf_tensors(to_hf_tensors(other, ours.cfg, kind_of(theirs)), ours.cfg, kind_of(theirs))
    assert again.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in again.items())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in there.values())
    assert parameters(ours.cfg)["total"] == sum(p.numel() for p in ours.parameters())


def test_config_comes_back_equal(both):
    ours, theirs, _ = both
    data = to_hf_config(ours.cfg, model_type=kind_of(theirs))
    assert data["architectures"] == [type(theirs).__name__]
    for again in (data, type(theirs.config).from_dict(data).to_dict()):
        assert not differences(ours.cfg, from_hf_config(again))


TURNED = ("mistral", "qwen2", "smollm3", "olmo2", "gemma3", "qwen3_moe", "gpt_oss")


@torch.no_grad()
@pytest.mark.parametrize("name", TURNED)
def test_interleaved_pairs_are_reordered(name):
    """The same model with interleaved rotary pairs: other rows of q and k, the same function there."""
    kind, keys = CASES[name]
    data = to_dict(from_hf_config(kind.config_class(**keys).to_dict()))
    for block in data["blocks"].values():
        if block["mixer"]["position"]["kind"] == "rope":
            block["mixer"]["position"]["layout"] = "interleaved"
    ours = randomise(LM(parse(ModelConfig, data)))
    theirs = kind(kind.config_class.from_dict(to_hf_config(ours.cfg, model_type=kind.config_class.model_type))).eval()
    tensors = to_hf_tensors(ours.state_dict(), ours.cfg, kind.config_class.model_type)
    theirs.load_state_dict(merge_experts(tensors), strict=False)
    tokens = rows(5)
    assert relative(logits(ours, tokens), theirs(tokens, use_cache=False).logits) < bound(ours)
    back = from_hf_tensors(tensors, ours.cfg, kind.config_class.model_type)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in back.items())


def merge_experts(tensors):
    """As transformers does when it reads a file: one tensor for all experts, gate above up."""
    out, experts = {}, {}
    for name, tensor in tensors.items():
        found = re.match(r"(.*\.experts)\.\d+\.(\w+)_proj\.weight", name)
        (
            experts.setdefault(found[1], {}).setdefault(found[2], []).append(tensor)
            if found
            else out.update({name: tensor})
        )
    for name, parts in experts.items():
        gate, up, down = (torch.stack(parts[key]) for key in ("gate", "up", "down"))
        out |= {f"{name}.gate_up_proj": torch.cat((gate, up), 1), f"{name}.down_proj": down}
    return out


FULL = dict(sliding_window=None)
PLAIN = {"mistral": FULL, "phi3": FULL, "olmo2": {}, "qwen2": {}, "smollm3": {}, "gemma2": {}, "mixtral": {}}


@pytest.mark.parametrize("name", PLAIN)
def test_the_plainest_family_is_chosen(name):
    """Mistral and Phi-3 without a window are Llama."""
    kind, keys = CASES[name]
    data = kind.config_class(**(keys | PLAIN[name])).to_dict()
    assert family_of(from_hf_config(data)) == ("llama" if PLAIN[name] else name)


def test_every_family_is_tested():
    tested = {kind.config_class.model_type for kind, _ in CASES.values()}
    assert tested | {"gpt2", "llama", "qwen3"} == set(FAMILIES)
