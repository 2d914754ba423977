"""A preset's name is a promise: as many parameters as the published configuration has in transformers, and the same settings.

Numbers are those of the published config.json; the second of each pair is the number of parameters of the published
weights, where the model is its own oracle (RWKV-7 has no class there).
"""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from zero2llm.core.seq import Seq
from zero2llm.interop.families.family import differences
from zero2llm.interop.hf import from_hf_config, to_hf_tensors
from zero2llm.interop.hf_config import FAMILIES
from zero2llm.model.cost import parameters
from zero2llm.model.lm import LM
from zero2llm.model.presets import PRESETS, preset

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "max_position_embeddings")  # fmt: skip


def sizes(kind, **family):
    """A maker of configurations from the seven sizes and what else the model sets."""
    return lambda *numbers, **more: kind(**dict(zip(SIZES, numbers, strict=True)) | family | more)


def gpt2(d, layers, heads):
    return hf.GPT2Config(n_embd=d, n_layer=layers, n_head=heads)


llama = sizes(hf.LlamaConfig, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False)
mistral = sizes(hf.MistralConfig, rms_norm_eps=1e-5, tie_word_embeddings=False)
qwen2 = sizes(hf.Qwen2Config, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False)
qwen3 = sizes(hf.Qwen3Config, rope_theta=1e6, rms_norm_eps=1e-6, head_dim=128, tie_word_embeddings=False)
smollm3 = sizes(hf.SmolLM3Config, rope_theta=5e6, rms_norm_eps=1e-6, no_rope_layer_interval=4, tie_word_embeddings=True)
olmo2 = sizes(hf.Olmo2Config, rope_theta=5e5, rms_norm_eps=1e-6, tie_word_embeddings=False)
phi3 = sizes(hf.Phi3Config, rope_theta=1e4, rms_norm_eps=1e-5, sliding_window=2047)
gemma = sizes(hf.GemmaConfig, head_dim=256)
gemma2 = sizes(hf.Gemma2Config, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096)
gemma3 = sizes(hf.Gemma3TextConfig, head_dim=256, query_pre_attn_scalar=256, rope_theta=1e6, rope_local_base_freq=1e4)
mixtral = sizes(hf.MixtralConfig, rope_theta=1e6, rms_norm_eps=1e-5, num_local_experts=8, num_experts_per_tok=2)
qwen2_moe = sizes(hf.Qwen2MoeConfig, rope_theta=1e6, rms_norm_eps=1e-6, norm_topk_prob=False)
qwen3_moe = sizes(hf.Qwen3MoeConfig, rope_theta=1e6, head_dim=128, num_experts=128, num_experts_per_tok=8,
                  norm_topk_prob=True)  # fmt: skip
jamba = sizes(hf.JambaConfig, num_experts=16, num_experts_per_tok=2, mamba_dt_rank=256)
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
scaled = lambda factor: {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": factor}}
SLOW = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}


def gpt_oss(layers, experts):
    return hf.GptOssConfig(num_hidden_layers=layers, num_local_experts=experts, rms_norm_eps=1e-5)


def deepseek(kind, vocab, d, layers, heads, hidden, q_rank, experts, top_k, narrow, shared, dense, mscale, **more):
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": mscale, "mscale_all_dim": mscale}  # fmt: skip
    return kind(
        vocab_size=vocab, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=hidden, q_lora_rank=q_rank, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=narrow, n_shared_experts=shared,
        first_k_dense_replace=dense, rope_theta=1e4, rope_scaling=yarn, max_position_embeddings=163840, **more,
    )  # fmt: skip


def mamba(d, layers):
    return hf.MambaConfig(vocab_size=50280, hidden_size=d, num_hidden_layers=layers)


def mamba2(d, layers):
    return hf.Mamba2Config(vocab_size=50288, hidden_size=d, num_hidden_layers=layers, num_heads=d // 32, n_groups=1,
                           tie_word_embeddings=True)  # fmt: skip


V2, V3 = hf.DeepseekV2Config, hf.DeepseekV3Config
PUBLISHED = {
    "gpt2": (lambda: gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": (lambda: gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": (lambda: gpt2(1280, 36, 20), 774_030_080),
    "gpt2-xl": (lambda: gpt2(1600, 48, 25), 1_557_611_200),
    "smollm2-135m": (lambda: llama(49152, 576, 30, 9, 3, 1536, 8192, rope_theta=1e5, tie_word_embeddings=True), 134_515_008),
    "smollm2-360m": (lambda: llama(49152, 960, 32, 15, 5, 2560, 8192, rope_theta=1e5, tie_word_embeddings=True), 361_821_120),
    "smollm2-1.7b": (lambda: llama(49152, 2048, 24, 32, 32, 8192, 8192, rope_theta=130000.0, tie_word_embeddings=True), 1_711_376_384),
    "tinyllama-1.1b": (lambda: llama(32000, 2048, 22, 32, 4, 5632, 2048), 1_100_048_384),
    "llama-7b": (lambda: llama(32000, 4096, 32, 32, 32, 11008, 2048, rms_norm_eps=1e-6), 6_738_415_616),
    "llama-13b": (lambda: llama(32000, 5120, 40, 40, 40, 13824, 2048, rms_norm_eps=1e-6), 13_015_864_320),
    "llama-30b": (lambda: llama(32000, 6656, 60, 52, 52, 17920, 2048, rms_norm_eps=1e-6), 32_528_943_616),
    "llama-65b": (lambda: llama(32000, 8192, 80, 64, 64, 22016, 2048), 65_285_660_672),
    "llama2-7b": (lambda: llama(32000, 4096, 32, 32, 32, 11008, 4096), 6_738_415_616),
    "llama2-13b": (lambda: llama(32000, 5120, 40, 40, 40, 13824, 4096), 13_015_864_320),
    "llama2-70b": (lambda: llama(32000, 8192, 80, 64, 8, 28672, 4096), 68_976_648_192),
    "llama3-8b": (lambda: llama(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=5e5), 8_030_261_248),
    "llama3-70b": (lambda: llama(128256, 8192, 80, 64, 8, 28672, 8192, rope_theta=5e5), 70_553_706_496),
    "llama3.1-8b": (lambda: llama(128256, 4096, 32, 32, 8, 14336, 131072, **scaled(8.0)), 8_030_261_248),
    "llama3.1-70b": (lambda: llama(128256, 8192, 80, 64, 8, 28672, 131072, **scaled(8.0)), 70_553_706_496),
    "llama3.1-405b": (lambda: llama(128256, 16384, 126, 128, 8, 53248, 131072, **scaled(8.0)), 405_853_388_800),
    "llama3.2-1b": (lambda: llama(128256, 2048, 16, 32, 8, 8192, 131072, tie_word_embeddings=True, **scaled(32.0)), 1_235_814_400),
    "llama3.2-3b": (lambda: llama(128256, 3072, 28, 24, 8, 8192, 131072, tie_word_embeddings=True, **scaled(32.0)), 3_212_749_824),
    "mistral-7b-v0.1": (lambda: mistral(32000, 4096, 32, 32, 8, 14336, 32768, sliding_window=4096, rope_theta=1e4), 7_241_732_096),
    "mistral-7b-v0.3": (lambda: mistral(32768, 4096, 32, 32, 8, 14336, 32768, sliding_window=None, rope_theta=1e6), 7_248_023_552),
    "qwen2-0.5b": (lambda: qwen2(151936, 896, 24, 14, 2, 4864, 131072, tie_word_embeddings=True), 494_032_768),
    "qwen2-1.5b": (lambda: qwen2(151936, 1536, 28, 12, 2, 8960, 131072, tie_word_embeddings=True), 1_543_714_304),
    "qwen2-7b": (lambda: qwen2(152064, 3584, 28, 28, 4, 18944, 131072), 7_615_616_512),
    "qwen2.5-0.5b": (lambda: qwen2(151936, 896, 24, 14, 2, 4864, 32768, tie_word_embeddings=True), 494_032_768),
    "qwen2.5-1.5b": (lambda: qwen2(151936, 1536, 28, 12, 2, 8960, 131072, tie_word_embeddings=True), 1_543_714_304),
    "qwen2.5-3b": (lambda: qwen2(151936, 2048, 36, 16, 2, 11008, 32768, tie_word_embeddings=True), 3_085_938_688),
    "qwen2.5-7b": (lambda: qwen2(152064, 3584, 28, 28, 4, 18944, 131072), 7_615_616_512),
    "qwen2.5-14b": (lambda: qwen2(152064, 5120, 48, 40, 8, 13824, 131072, rms_norm_eps=1e-5), 14_770_033_664),
    "qwen2.5-32b": (lambda: qwen2(152064, 5120, 64, 40, 8, 27648, 131072, rms_norm_eps=1e-5), 32_763_876_352),
    "qwen2.5-72b": (lambda: qwen2(152064, 8192, 80, 64, 8, 29568, 131072, rms_norm_eps=1e-5), 72_706_203_648),
    "qwen3-0.6b": (lambda: qwen3(151936, 1024, 28, 16, 8, 3072, 40960, tie_word_embeddings=True), 596_049_920),
    "qwen3-1.7b": (lambda: qwen3(151936, 2048, 28, 16, 8, 6144, 40960, tie_word_embeddings=True), 1_720_574_976),
    "qwen3-4b": (lambda: qwen3(151936, 2560, 36, 32, 8, 9728, 40960, tie_word_embeddings=True), 4_022_468_096),
    "qwen3-8b": (lambda: qwen3(151936, 4096, 36, 32, 8, 12288, 40960), 8_190_735_360),
    "qwen3-14b": (lambda: qwen3(151936, 5120, 40, 40, 8, 17408, 40960), 14_768_307_200),
    "qwen3-32b": (lambda: qwen3(151936, 5120, 64, 64, 8, 25600, 40960), 32_762_123_264),
    "smollm3-3b": (lambda: smollm3(128256, 2048, 36, 16, 4, 11008, 65536), 3_075_098_624),
    "olmo2-1b": (lambda: olmo2(100352, 2048, 16, 16, 16, 8192, 4096), 1_484_916_736),
    "olmo2-7b": (lambda: olmo2(100352, 4096, 32, 32, 32, 11008, 4096), 7_298_617_344),
    "olmo2-13b": (lambda: olmo2(100352, 5120, 40, 40, 40, 13824, 4096), 13_716_198_400),
    "olmo2-32b": (lambda: olmo2(100352, 5120, 64, 40, 8, 27648, 4096), 32_234_279_936),
    "phi3-mini-4k": (lambda: phi3(32064, 3072, 32, 32, 32, 8192, 4096), 3_821_079_552),
    "gemma-2b": (lambda: gemma(256000, 2048, 18, 8, 1, 16384, 8192), 2_506_172_416),
    "gemma-7b": (lambda: gemma(256000, 3072, 28, 16, 16, 24576, 8192), 8_537_680_896),
    "gemma2-2b": (lambda: gemma2(256000, 2304, 26, 8, 4, 9216, 8192), 2_614_341_888),
    "gemma2-9b": (lambda: gemma2(256000, 3584, 42, 16, 8, 14336, 8192), 9_241_705_984),
    "gemma2-27b": (lambda: gemma2(256000, 4608, 46, 32, 16, 36864, 8192, head_dim=128, query_pre_attn_scalar=144), 27_227_128_320),
    "gemma3-270m": (lambda: gemma3(262144, 640, 18, 4, 1, 2048, 32768, sliding_window=512), 268_098_176),
    "gemma3-1b": (lambda: gemma3(262144, 1152, 26, 4, 1, 6912, 32768, sliding_window=512), 999_885_952),
    "gemma3-4b": (lambda: gemma3(262208, 2560, 34, 8, 4, 10240, 131072, **SLOW), None),
    "gemma3-12b": (lambda: gemma3(262208, 3840, 48, 16, 8, 15360, 131072, **SLOW), None),
    "gemma3-27b": (lambda: gemma3(262208, 5376, 62, 32, 16, 21504, 131072, head_dim=128, query_pre_attn_scalar=168, **SLOW), None),
    "mixtral-8x7b": (lambda: mixtral(32000, 4096, 32, 32, 8, 14336, 32768), 46_702_792_704),
    "mixtral-8x22b": (lambda: mixtral(32000, 6144, 56, 48, 8, 16384, 65536), 140_620_634_112),
    "qwen1.5-moe-a2.7b": (lambda: qwen2_moe(151936, 2048, 24, 16, 16, 5632, 8192, moe_intermediate_size=1408, num_experts=60,
                          num_experts_per_tok=4, shared_expert_intermediate_size=5632), 14_315_784_192),
    "qwen3-30b-a3b": (lambda: qwen3_moe(151936, 2048, 48, 32, 4, 6144, 40960, moe_intermediate_size=768), 30_532_122_624),
    "qwen3-235b-a22b": (lambda: qwen3_moe(151936, 4096, 94, 64, 4, 12288, 40960, moe_intermediate_size=1536), 235_093_634_560),
    "gpt-oss-20b": (lambda: gpt_oss(24, 32), 20_914_757_184),
    "gpt-oss-120b": (lambda: gpt_oss(36, 128), 116_829_156_672),
    "deepseek-v2-lite": (lambda: deepseek(V2, 102400, 2048, 27, 16, 10944, None, 64, 6, 1408, 2, 1, 0.707), 15_706_484_224),
    "deepseek-v2-like": (lambda: deepseek(V2, 102400, 5120, 60, 128, 12288, 1536, 160, 6, 1536, 2, 1, 0.707,
                         routed_scaling_factor=16.0), 235_741_434_880),
    "deepseek-v3": (lambda: deepseek(V3, 129280, 7168, 61, 128, 18432, 1536, 256, 8, 2048, 1, 3, 1.0, n_group=8, topk_group=4,
                    routed_scaling_factor=2.5), 671_026_419_200),
    "mamba-130m": (lambda: mamba(768, 24), 129_135_360),
    "mamba-370m": (lambda: mamba(1024, 48), 371_516_416),
    "mamba-790m": (lambda: mamba(1536, 48), 793_204_224),
    "mamba-1.4b": (lambda: mamba(2048, 48), 1_372_178_432),
    "mamba-2.8b": (lambda: mamba(2560, 64), 2_768_345_600),
    "mamba2-130m": (lambda: mamba2(768, 24), 128_989_632),
    "mamba2-370m": (lambda: mamba2(1024, 48), None),
    "mamba2-780m": (lambda: mamba2(1536, 48), None),
    "mamba2-1.3b": (lambda: mamba2(2048, 48), None),
    "mamba2-2.7b": (lambda: mamba2(2560, 64), None),
    "qwen3-next-80b-a3b": (lambda: hf.Qwen3NextConfig(max_position_embeddings=262144, rope_theta=1e7), 79_674_391_296),
    "kimi-linear-48b-a3b": (lambda: hf.KimiLinearConfig(linear_attn_config={
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "kda_layers": [i for i in range(1, 27) if i % 4], "head_dim": 128,
        "num_heads": 32, "short_conv_kernel_size": 4}), 49_122_681_728),
    "jamba-v0.1": (lambda: jamba(65536, 4096, 32, 32, 8, 14336, 262144), 51_570_323_328),
}  # fmt: skip
RWKV7 = {"rwkv7-0.1b-like": 191_034_624, "rwkv7-0.4b-like": 450_767_872, "rwkv7-1.5b-like": 1_527_404_544, "rwkv7-2.9b-like": 2_947_735_040}  # fmt: skip
OWN = {name for name in PRESETS if name.endswith(("-nano", "-mini"))}


def test_every_preset_is_checked():
    assert set(PUBLISHED) | set(RWKV7) | OWN == set(PRESETS)


def test_every_family_has_a_preset():
    named = {name: set() for name in FAMILIES}
    for name, (make, _) in PUBLISHED.items():
        named[make().model_type].add(name)
    assert all(named.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_equals_the_published_model(name):
    make, published = PUBLISHED[name]
    config, cfg = make(), preset(name)
    with torch.device("meta"):
        theirs, ours = getattr(hf, FAMILIES[config.model_type].architecture)(config), LM(cfg)
    tensors = dict(theirs.named_parameters()) | {n: b for n, b in theirs.named_buffers() if "correction_bias" in n}
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(t.numel() for t in tensors.values()) == parameters(cfg)["total"]
    assert published in (None, count)
    assert not differences(cfg, from_hf_config(config.to_dict()))  # rotary base, eps, windows, routing, length
    if all(spec.ffn is None or spec.ffn.kind != "moe" for spec in cfg.specs()):  # a file has one tensor for each expert
        shapes = {k: v.shape for k, v in to_hf_tensors(ours.state_dict(), cfg, config.model_type).items()}
        assert shapes == {k: v.shape for k, v in theirs.state_dict().items() if k in shapes}


# The same settings as files of transformers 4 spell them, keys absent that had their default
OLD_FILES = {
    "llama3.1-8b": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "mlp_bias": False},
    "phi3-mini-4k": {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
        "sliding_window": 2047},
    "gemma3-1b": {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "head_dim": 256, "query_pre_attn_scalar": 256, "rope_theta": 1000000, "rope_local_base_freq": 10000,
        "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2-2b": {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216, "head_dim": 256, "rope_theta": 10000.0,
        "query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0},
    "smollm3-3b": {"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008, "max_position_embeddings": 65536,
        "rope_theta": 5000000.0, "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "use_sliding_window": False},
    "mixtral-8x7b": {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt-oss-20b": {"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880, "head_dim": 64, "rope_theta": 150000,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0,
        "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}},
    "deepseek-v2-lite": {"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "max_position_embeddings": 163840, "rope_theta": 10000, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40,
        "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"}},
    "mamba-130m": {"model_type": "mamba", "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16,
        "conv_kernel": 4, "expand": 2, "time_step_rank": 48, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5},
    "qwen3-next-80b-a3b": {"model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120, "num_experts": 512,
        "max_position_embeddings": 262144, "rope_theta": 10000000, "rope_scaling": None, "partial_rotary_factor": 0.25,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
        "full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "kimi-linear-48b-a3b": {"model_type": "kimi_linear", "vocab_size": 163840, "hidden_size": 2304, "num_hidden_layers": 27,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 9216, "moe_intermediate_size": 1024,
        "num_experts": 256, "num_experts_per_token": 8, "num_shared_experts": 1, "moe_renormalize": True, "head_dim": 72,
        "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 2.446, "num_expert_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "mla_use_nope": True, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-5, "model_max_length": 1048576,
        "linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
        "kda_layers": [i for i in range(1, 27) if i % 4], "short_conv_kernel_size": 4}},
    "jamba-v0.1": {"model_type": "jamba", "vocab_size": 65536, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 262144,
        "attn_layer_offset": 4, "attn_layer_period": 8, "expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 16,
        "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256,
        "sliding_window": None},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_FILES)
def test_an_old_file_is_read_as_transformers_reads_it(name):
    kind = type(PUBLISHED[name][0]())
    for data in (OLD_FILES[name], kind.from_dict(dict(OLD_FILES[name])).to_dict()):
        assert not differences(preset(name), from_hf_config(data))


@pytest.mark.parametrize("name", RWKV7)
def test_rwkv7_has_the_published_parameters_and_three_spare_ones(name):
    cfg = preset(name)
    with torch.device("meta"):
        model = LM(cfg)
    first = model.blocks[0].mixer
    spare = sum(p.numel() for p in (first.v0, first.v1, first.v2))
    assert sum(p.numel() for p in model.parameters()) - spare == parameters(cfg)["total"] - spare == RWKV7[name]


@pytest.mark.parametrize("name", sorted(OWN))
def test_our_own_presets_build_small(name):
    count = parameters(preset(name))["total"]
    assert (1e6 if name.endswith("-nano") else 5e6) < count < (2.5e6 if name.endswith("-nano") else 20e6)
    with torch.device("meta"):
        assert sum(p.numel() for p in LM(preset(name)).parameters()) == count


@pytest.mark.parametrize("name", sorted(name for name in OWN if name.endswith("-nano")))
def test_a_nano_preset_trains_and_decodes(name):
    torch.manual_seed(0)
    cfg, tokens, seq = preset(name), torch.randint(4096, (2, 12)), Seq.rows(2, 12)
    model = LM(cfg)
    hidden, aux = model(tokens, seq)
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), tokens.roll(-1, 1).flatten())
    (loss + sum(value for key, value in aux.items() if key.endswith("_loss"))).backward()
    learning = [p.grad for p in model.parameters() if p.grad is not None]
    assert (
        7 < loss < 10
        and all(g.isfinite().all() for g in learning)
        and len(learning) > 0.9 * len(list(model.parameters()))
    )
    states = model.init_states(2, 12)
    with torch.no_grad():
        cuts = [(0, 5)] + [(i, i + 1) for i in range(5, 12)]
        parts = [model(tokens[:, a:b], seq.window(a, b), states)[0] for a, b in cuts]
    assert (torch.cat(parts, 1) - hidden).abs().max() < 1e-4 * hidden.std()


def test_every_nano_preset_can_be_exported_or_says_why():
    from zero2llm.interop.hf_config import family_of

    refused = {}
    for name in OWN:
        try:
            family_of(preset(name))
        except ValueError as error:
            refused[name] = str(error)
    assert set(refused) == {"rwkv7-nano"} and "mixer: rwkv7" in refused["rwkv7-nano"]


def test_an_unknown_preset_names_its_neighbour():
    with pytest.raises(ValueError, match="did you mean 'qwen3-0.6b'"):
        preset("qwen3-0.6")
