"""Published architectures by name, from nano to their real sizes; a name is a promise about the parameter count."""

from __future__ import annotations

import difflib

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig


def gpt2(vocab: int, d: int, layers: int, heads: int, max_len: int) -> ModelConfig:
    """GPT-2: learned positions, LayerNorm, GELU MLP of 4 D, biases everywhere, tied."""
    mixer = GQAConfig(n_heads=heads, qkv_bias=True, out_bias=True)
    spec = LayerSpec(mixer=mixer, ffn=MLPConfig(hidden=4 * d), norm=LayerNormConfig())
    return ModelConfig(
        vocab_size=vocab, d_model=d, max_len=max_len, layers=LayerPattern(pattern=["gpt2"], repeat=layers),
        blocks={"gpt2": spec}, position=LearnedConfig(), final_norm=LayerNormConfig(), tie_embeddings=True,
    )  # fmt: skip


def llama(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, base: float = 1e4,
          eps: float = 1e-5, tied: bool = False) -> ModelConfig:  # fmt: skip
    """Llama 1/2/3 and SmolLM2: RoPE, RMSNorm, SwiGLU, no biases. (Llama 3.1+ adds RoPE scaling beyond 8,192 tokens.)"""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, position=RoPEConfig(base=base))
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(eps=eps))
    return ModelConfig(
        vocab_size=vocab, d_model=d, max_len=max_len, layers=LayerPattern(pattern=["llama"], repeat=layers),
        blocks={"llama": spec}, final_norm=RMSNormConfig(eps=eps), tie_embeddings=tied,
    )  # fmt: skip


def qwen3(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, head_dim: int = 128,
          tied: bool = False) -> ModelConfig:  # fmt: skip
    """Qwen3: Llama with QK-norm and a head width of its own."""
    position = RoPEConfig(base=1e6)
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, qk_norm=True, position=position)
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(eps=1e-6))
    return ModelConfig(
        vocab_size=vocab, d_model=d, max_len=max_len, layers=LayerPattern(pattern=["qwen3"], repeat=layers),
        blocks={"qwen3": spec}, final_norm=RMSNormConfig(eps=1e-6), tie_embeddings=tied,
    )  # fmt: skip


PRESETS = {
    "gpt2-nano": lambda: gpt2(4096, 128, 4, 4, 512),
    "gpt2-mini": lambda: gpt2(4096, 384, 6, 6, 1024),
    "gpt2": lambda: gpt2(50257, 768, 12, 12, 1024),
    "gpt2-medium": lambda: gpt2(50257, 1024, 24, 16, 1024),
    "gpt2-large": lambda: gpt2(50257, 1280, 36, 20, 1024),
    "gpt2-xl": lambda: gpt2(50257, 1600, 48, 25, 1024),
    "llama-nano": lambda: llama(4096, 128, 4, 4, 4, 512, 512, tied=True),
    "llama-mini": lambda: llama(4096, 384, 6, 6, 6, 1024, 1024, tied=True),
    "smollm2-135m": lambda: llama(49152, 576, 30, 9, 3, 1536, 8192, base=1e5, tied=True),
    "smollm2-360m": lambda: llama(49152, 960, 32, 15, 5, 2560, 8192, base=1e5, tied=True),
    "smollm2-1.7b": lambda: llama(49152, 2048, 24, 32, 32, 8192, 8192, base=130_000.0, tied=True),
    "tinyllama-1.1b": lambda: llama(32000, 2048, 22, 32, 4, 5632, 2048),
    "llama-7b": lambda: llama(32000, 4096, 32, 32, 32, 11008, 2048, eps=1e-6),
    "llama2-7b": lambda: llama(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama2-13b": lambda: llama(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama2-70b": lambda: llama(32000, 8192, 80, 64, 8, 28672, 4096),
    "llama3-8b": lambda: llama(128256, 4096, 32, 32, 8, 14336, 8192, base=5e5),
    "llama3-70b": lambda: llama(128256, 8192, 80, 64, 8, 28672, 8192, base=5e5),
    "qwen3-nano": lambda: qwen3(4096, 128, 4, 4, 2, 384, 512, head_dim=32, tied=True),
    "qwen3-mini": lambda: qwen3(4096, 384, 6, 6, 2, 1024, 1024, head_dim=64, tied=True),
    "qwen3-0.6b": lambda: qwen3(151936, 1024, 28, 16, 8, 3072, 40960, tied=True),
    "qwen3-1.7b": lambda: qwen3(151936, 2048, 28, 16, 8, 6144, 40960, tied=True),
    "qwen3-4b": lambda: qwen3(151936, 2560, 36, 32, 8, 9728, 40960, tied=True),
    "qwen3-8b": lambda: qwen3(151936, 4096, 36, 32, 8, 12288, 40960),
    "qwen3-14b": lambda: qwen3(151936, 5120, 40, 40, 8, 17408, 40960),
    "qwen3-32b": lambda: qwen3(151936, 5120, 64, 64, 8, 25600, 40960),
}


def preset(name: str) -> ModelConfig:
    """The configuration of a published (or nano) model. Raises ValueError naming the nearest preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]()
