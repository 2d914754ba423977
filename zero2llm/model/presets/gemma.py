"""Gemma 1, 2 and 3 (of Gemma 3 from 4B on: the language model, without the eye)."""

from __future__ import annotations

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.interpolation import LinearScalingConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.presets.build import model
from zero2llm.model.spec import LayerSpec, ModelConfig

NORM = RMSNormConfig(plus_one=True)


def gemma(
    vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, head_dim: int = 256
) -> ModelConfig:
    """Gemma: embeddings times sqrt(D), norms that scale by 1 + w, GeGLU, tied."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, position=RoPEConfig())
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=hidden, act="gelu"), norm=NORM)
    return model(vocab, d, max_len, {"gemma": spec}, repeat=layers, tie_embeddings=True, embed_scale=d**0.5)


def gemma2(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, head_dim: int = 256,
           scalar: int | None = None, window: int = 4096) -> ModelConfig:  # fmt: skip
    """Gemma 2: sandwich norms, soft-caps, every other layer sees a window. Scores are divided by sqrt(scalar)."""
    block = lambda seen: LayerSpec(
        mixer=GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, window=seen, position=RoPEConfig(), softcap=50.0,
                        scale=(scalar or head_dim) ** -0.5),
        ffn=GLUConfig(hidden=hidden, act="gelu"), norm=NORM, wiring="sandwich",
    )  # fmt: skip
    return model(
        vocab, d, max_len, {"local": block(window), "global": block(None)}, repeat=layers // 2, tie_embeddings=True,
        embed_scale=d**0.5, logit_softcap=30.0,
    )  # fmt: skip


def gemma3(vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, head_dim: int = 256,
           scalar: int | None = None, window: int = 1024, scaled: float | None = 8.0, every: int = 6) -> ModelConfig:  # fmt: skip
    """Gemma 3: QK-norm instead of soft-caps, five windows to one full layer that turns slower; ``scaled``: by that more."""
    slow = RoPEConfig(base=1e6, scaling=LinearScalingConfig(factor=scaled) if scaled else None)
    block = lambda seen, position: LayerSpec(
        mixer=GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, window=seen, position=position, qk_norm=True,
                        qk_norm_plus_one=True, scale=(scalar or head_dim) ** -0.5),
        ffn=GLUConfig(hidden=hidden, act="gelu"), norm=NORM, wiring="sandwich",
    )  # fmt: skip
    blocks = {"local": block(window, RoPEConfig()), "global": block(None, slow)}
    pattern, repeat = ["local"] * (every - 1) + ["global"], 1
    if layers % every:
        pattern = (pattern * layers)[:layers]
    else:
        repeat = layers // every
    return model(vocab, d, max_len, blocks, pattern, repeat, tie_embeddings=True, embed_scale=d**0.5)


PRESETS = {
    "gemma-nano": lambda: gemma(4096, 128, 4, 4, 1, 512, 512, head_dim=32),
    "gemma-2b": lambda: gemma(256000, 2048, 18, 8, 1, 16384, 8192),
    "gemma-7b": lambda: gemma(256000, 3072, 28, 16, 16, 24576, 8192),
    "gemma2-nano": lambda: gemma2(4096, 128, 4, 4, 2, 512, 512, head_dim=32, window=128),
    "gemma2-2b": lambda: gemma2(256000, 2304, 26, 8, 4, 9216, 8192),
    "gemma2-9b": lambda: gemma2(256000, 3584, 42, 16, 8, 14336, 8192),
    "gemma2-27b": lambda: gemma2(256000, 4608, 46, 32, 16, 36864, 8192, head_dim=128, scalar=144),
    "gemma3-nano": lambda: gemma3(4096, 128, 4, 4, 1, 512, 512, head_dim=32, window=128, scaled=None, every=4),
    "gemma3-270m": lambda: gemma3(262144, 640, 18, 4, 1, 2048, 32768, window=512, scaled=None),
    "gemma3-1b": lambda: gemma3(262144, 1152, 26, 4, 1, 6912, 32768, window=512, scaled=None),
    "gemma3-4b": lambda: gemma3(262208, 2560, 34, 8, 4, 10240, 131072),
    "gemma3-12b": lambda: gemma3(262208, 3840, 48, 16, 8, 15360, 131072),
    "gemma3-27b": lambda: gemma3(262208, 5376, 62, 32, 16, 21504, 131072, head_dim=128, scalar=168),
}
