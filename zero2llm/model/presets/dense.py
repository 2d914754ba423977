"""GPT-2, Llama and the families that change a line of it."""

from __future__ import annotations

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.interpolation import Llama3ScalingConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.presets.build import model
from zero2llm.model.spec import LayerSpec, ModelConfig


def gpt2(vocab: int, d: int, layers: int, heads: int, max_len: int) -> ModelConfig:
    """GPT-2: learned positions, LayerNorm, GELU MLP of 4 D, biases everywhere, tied."""
    mixer = GQAConfig(n_heads=heads, qkv_bias=True, out_bias=True)
    spec = LayerSpec(mixer=mixer, ffn=MLPConfig(hidden=4 * d), norm=LayerNormConfig())
    return model(vocab, d, max_len, {"gpt2": spec}, repeat=layers, position=LearnedConfig(), tie_embeddings=True)


def llama(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, base: float = 1e4,
          eps: float = 1e-5, tied: bool = False, scaled: float | None = None) -> ModelConfig:  # fmt: skip
    """Llama 1 to 3 and SmolLM2: RoPE, RMSNorm, SwiGLU, no biases. ``scaled``: factor of Llama 3.1's rotary scaling."""
    scaling = Llama3ScalingConfig(factor=scaled) if scaled else None
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, position=RoPEConfig(base=base, scaling=scaling))
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(eps=eps))
    return model(vocab, d, max_len, {"llama": spec}, repeat=layers, tie_embeddings=tied)


def mistral(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, window: int | None = None,
            base: float = 1e4) -> ModelConfig:  # fmt: skip
    """Mistral: Llama that sees a window (its first version)."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, window=window, position=RoPEConfig(base=base))
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(eps=1e-5))
    return model(vocab, d, max_len, {"mistral": spec}, repeat=layers, tie_embeddings=False)


def qwen2(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, eps: float = 1e-6,
          tied: bool = False) -> ModelConfig:  # fmt: skip
    """Qwen2 and 2.5: Llama with biases on queries, keys and values."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, qkv_bias=True, position=RoPEConfig(base=1e6))
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(eps=eps))
    return model(vocab, d, max_len, {"qwen2": spec}, repeat=layers, tie_embeddings=tied)


def qwen3(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, head_dim: int = 128,
          tied: bool = False) -> ModelConfig:  # fmt: skip
    """Qwen3: Llama with QK-norm and a head width of its own."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, qk_norm=True, position=RoPEConfig(base=1e6))
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(eps=1e-6))
    return model(vocab, d, max_len, {"qwen3": spec}, repeat=layers, tie_embeddings=tied)


def smollm3(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int) -> ModelConfig:
    """SmolLM3: Llama in which every fourth layer has no positions."""
    block = lambda position: LayerSpec(
        mixer=GQAConfig(n_heads=heads, n_kv_heads=kv, position=position),
        ffn=GLUConfig(hidden=hidden),
        norm=RMSNormConfig(),
    )
    blocks = {"rope": block(RoPEConfig(base=5e6)), "nope": block(NoPositionConfig())}
    pattern = ["rope", "rope", "rope", "nope"]
    return model(vocab, d, max_len, blocks, pattern, layers // 4, tie_embeddings=True)


def olmo2(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int) -> ModelConfig:
    """OLMo 2: norms behind each branch, one QK-norm over all heads."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, qk_norm=True, qk_norm_span="all", position=RoPEConfig(base=5e5))
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden), norm=RMSNormConfig(), wiring="branch")
    return model(vocab, d, max_len, {"olmo2": spec}, repeat=layers, tie_embeddings=False)


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
    "llama-13b": lambda: llama(32000, 5120, 40, 40, 40, 13824, 2048, eps=1e-6),
    "llama-30b": lambda: llama(32000, 6656, 60, 52, 52, 17920, 2048, eps=1e-6),
    "llama-65b": lambda: llama(32000, 8192, 80, 64, 64, 22016, 2048),
    "llama2-7b": lambda: llama(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama2-13b": lambda: llama(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama2-70b": lambda: llama(32000, 8192, 80, 64, 8, 28672, 4096),
    "llama3-8b": lambda: llama(128256, 4096, 32, 32, 8, 14336, 8192, base=5e5),
    "llama3-70b": lambda: llama(128256, 8192, 80, 64, 8, 28672, 8192, base=5e5),
    "llama3.1-8b": lambda: llama(128256, 4096, 32, 32, 8, 14336, 131072, base=5e5, scaled=8.0),
    "llama3.1-70b": lambda: llama(128256, 8192, 80, 64, 8, 28672, 131072, base=5e5, scaled=8.0),
    "llama3.1-405b": lambda: llama(128256, 16384, 126, 128, 8, 53248, 131072, base=5e5, scaled=8.0),
    "llama3.2-1b": lambda: llama(128256, 2048, 16, 32, 8, 8192, 131072, base=5e5, scaled=32.0, tied=True),
    "llama3.2-3b": lambda: llama(128256, 3072, 28, 24, 8, 8192, 131072, base=5e5, scaled=32.0, tied=True),
    "mistral-nano": lambda: mistral(4096, 128, 4, 4, 2, 384, 512, window=128),
    "mistral-7b-v0.1": lambda: mistral(32000, 4096, 32, 32, 8, 14336, 32768, window=4096),
    "mistral-7b-v0.3": lambda: mistral(32768, 4096, 32, 32, 8, 14336, 32768, base=1e6),
    "qwen2-nano": lambda: qwen2(4096, 128, 4, 4, 2, 384, 512, tied=True),
    "qwen2-0.5b": lambda: qwen2(151936, 896, 24, 14, 2, 4864, 131072, tied=True),
    "qwen2-1.5b": lambda: qwen2(151936, 1536, 28, 12, 2, 8960, 131072, tied=True),
    "qwen2-7b": lambda: qwen2(152064, 3584, 28, 28, 4, 18944, 131072),
    "qwen2.5-0.5b": lambda: qwen2(151936, 896, 24, 14, 2, 4864, 32768, tied=True),
    "qwen2.5-1.5b": lambda: qwen2(151936, 1536, 28, 12, 2, 8960, 131072, tied=True),
    "qwen2.5-3b": lambda: qwen2(151936, 2048, 36, 16, 2, 11008, 32768, tied=True),
    "qwen2.5-7b": lambda: qwen2(152064, 3584, 28, 28, 4, 18944, 131072),
    "qwen2.5-14b": lambda: qwen2(152064, 5120, 48, 40, 8, 13824, 131072, eps=1e-5),
    "qwen2.5-32b": lambda: qwen2(152064, 5120, 64, 40, 8, 27648, 131072, eps=1e-5),
    "qwen2.5-72b": lambda: qwen2(152064, 8192, 80, 64, 8, 29568, 131072, eps=1e-5),
    "qwen3-nano": lambda: qwen3(4096, 128, 4, 4, 2, 384, 512, head_dim=32, tied=True),
    "qwen3-mini": lambda: qwen3(4096, 384, 6, 6, 2, 1024, 1024, head_dim=64, tied=True),
    "qwen3-0.6b": lambda: qwen3(151936, 1024, 28, 16, 8, 3072, 40960, tied=True),
    "qwen3-1.7b": lambda: qwen3(151936, 2048, 28, 16, 8, 6144, 40960, tied=True),
    "qwen3-4b": lambda: qwen3(151936, 2560, 36, 32, 8, 9728, 40960, tied=True),
    "qwen3-8b": lambda: qwen3(151936, 4096, 36, 32, 8, 12288, 40960),
    "qwen3-14b": lambda: qwen3(151936, 5120, 40, 40, 8, 17408, 40960),
    "qwen3-32b": lambda: qwen3(151936, 5120, 64, 64, 8, 25600, 40960),
    "smollm3-nano": lambda: smollm3(4096, 128, 4, 4, 2, 384, 512),
    "smollm3-3b": lambda: smollm3(128256, 2048, 36, 16, 4, 11008, 65536),
    "olmo2-nano": lambda: olmo2(4096, 128, 4, 4, 4, 384, 512),
    "olmo2-1b": lambda: olmo2(100352, 2048, 16, 16, 16, 8192, 4096),
    "olmo2-7b": lambda: olmo2(100352, 4096, 32, 32, 32, 11008, 4096),
    "olmo2-13b": lambda: olmo2(100352, 5120, 40, 40, 40, 13824, 4096),
    "olmo2-32b": lambda: olmo2(100352, 5120, 64, 40, 8, 27648, 4096),
    "phi3-nano": lambda: mistral(4096, 128, 4, 4, 4, 384, 512, window=256),
    "phi3-mini-4k": lambda: mistral(32064, 3072, 32, 32, 32, 8192, 4096, window=2047),
}
