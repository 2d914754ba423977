"""A preset's name is a promise: as many parameters as the published configuration has in transformers, shape by shape."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from zero2llm.interop.hf import from_hf_config, to_hf_config, to_hf_tensors
from zero2llm.model.cost import parameters
from zero2llm.model.lm import LM
from zero2llm.model.presets import PRESETS, preset


def _gpt2(d, layers, heads):
    return GPT2LMHeadModel, GPT2Config(n_embd=d, n_layer=layers, n_head=heads)


def _llama(vocab, d, layers, heads, kv, hidden, length, *, base=1e4, eps=1e-5, tied=False):
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=vocab, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=hidden, max_position_embeddings=length, rope_theta=base, rms_norm_eps=eps, tie_word_embeddings=tied,
    )  # fmt: skip


def _qwen3(d, layers, heads, hidden, tied):
    return Qwen3ForCausalLM, Qwen3Config(
        vocab_size=151936, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        intermediate_size=hidden, max_position_embeddings=40960, rope_theta=1e6, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip


# Published config.json values, and the number of parameters of the published weights.
PUBLISHED = {
    "gpt2": (lambda: _gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": (lambda: _gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": (lambda: _gpt2(1280, 36, 20), 774_030_080),
    "gpt2-xl": (lambda: _gpt2(1600, 48, 25), 1_557_611_200),
    "smollm2-135m": (lambda: _llama(49152, 576, 30, 9, 3, 1536, 8192, base=1e5, tied=True), 134_515_008),
    "smollm2-360m": (lambda: _llama(49152, 960, 32, 15, 5, 2560, 8192, base=1e5, tied=True), 361_821_120),
    "smollm2-1.7b": (lambda: _llama(49152, 2048, 24, 32, 32, 8192, 8192, base=130000.0, tied=True), 1_711_376_384),
    "tinyllama-1.1b": (lambda: _llama(32000, 2048, 22, 32, 4, 5632, 2048), 1_100_048_384),
    "llama-7b": (lambda: _llama(32000, 4096, 32, 32, 32, 11008, 2048, eps=1e-6), 6_738_415_616),
    "llama2-7b": (lambda: _llama(32000, 4096, 32, 32, 32, 11008, 4096), 6_738_415_616),
    "llama2-13b": (lambda: _llama(32000, 5120, 40, 40, 40, 13824, 4096), 13_015_864_320),
    "llama2-70b": (lambda: _llama(32000, 8192, 80, 64, 8, 28672, 4096), 68_976_648_192),
    "llama3-8b": (lambda: _llama(128256, 4096, 32, 32, 8, 14336, 8192, base=5e5), 8_030_261_248),
    "llama3-70b": (lambda: _llama(128256, 8192, 80, 64, 8, 28672, 8192, base=5e5), 70_553_706_496),
    "qwen3-0.6b": (lambda: _qwen3(1024, 28, 16, 3072, True), 596_049_920),
    "qwen3-1.7b": (lambda: _qwen3(2048, 28, 16, 6144, True), 1_720_574_976),
    "qwen3-4b": (lambda: _qwen3(2560, 36, 32, 9728, True), 4_022_468_096),
    "qwen3-8b": (lambda: _qwen3(4096, 36, 32, 12288, False), 8_190_735_360),
    "qwen3-14b": (lambda: _qwen3(5120, 40, 40, 17408, False), 14_768_307_200),
    "qwen3-32b": (lambda: _qwen3(5120, 64, 64, 25600, False), 32_762_123_264),
}
OWN = {name for name in PRESETS if name.endswith(("-nano", "-mini"))}


def test_every_preset_is_checked():
    assert set(PUBLISHED) | OWN == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_equals_the_published_model(name):
    make, published = PUBLISHED[name]
    kind, config = make()
    cfg = preset(name)
    with torch.device("meta"):
        theirs, ours = kind(config), LM(cfg)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == published
    assert parameters(cfg)["total"] == published
    shapes = {k: v.shape for k, v in to_hf_tensors(ours.state_dict(), cfg).items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items() if k in shapes}
    assert to_hf_config(from_hf_config(config.to_dict())) == to_hf_config(cfg)  # rotary base, eps, widths, length


@pytest.mark.parametrize("name", sorted(OWN))
def test_our_own_presets_build_small(name):
    count = parameters(preset(name))["total"]
    assert 0.5e6 < count < 20e6 and sum(p.numel() for p in LM(preset(name)).parameters()) == count


def test_an_unknown_preset_names_its_neighbour():
    with pytest.raises(ValueError, match="did you mean 'qwen3-0.6b'"):
        preset("qwen3-0.6")
