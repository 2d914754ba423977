"""Mixtures of experts: Mixtral, Qwen-MoE, gpt-oss, DeepSeek."""

from __future__ import annotations

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.interpolation import YaRNConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.presets.build import model
from zero2llm.model.spec import LayerSpec, ModelConfig


def mixtral(
    vocab: int, d: int, layers: int, heads: int, kv: int, hidden: int, max_len: int, *, experts: int = 8
) -> ModelConfig:
    """Mixtral: Mistral whose feed-forward is the best 2 of some experts."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, position=RoPEConfig(base=1e6))
    moe = MoEConfig(n_experts=experts, top_k=2, hidden=hidden)
    spec = LayerSpec(mixer=mixer, ffn=moe, norm=RMSNormConfig(eps=1e-5))
    return model(vocab, d, max_len, {"mixtral": spec}, repeat=layers, tie_embeddings=False)


def qwen2_moe(vocab: int, d: int, layers: int, heads: int, kv: int, moe: MoEConfig, max_len: int) -> ModelConfig:
    """Qwen1.5-MoE and Qwen2-MoE: Qwen2 with narrow experts and a gated one for all tokens."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, qkv_bias=True, position=RoPEConfig(base=1e6))
    return model(vocab, d, max_len, {"qwen2_moe": LayerSpec(mixer=mixer, ffn=moe)}, repeat=layers, tie_embeddings=False)


def qwen3_moe(vocab: int, d: int, layers: int, heads: int, kv: int, moe: MoEConfig, max_len: int, *,
              head_dim: int = 128) -> ModelConfig:  # fmt: skip
    """Qwen3-MoE: Qwen3 with narrow experts."""
    mixer = GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, qk_norm=True, position=RoPEConfig(base=1e6))
    return model(vocab, d, max_len, {"qwen3_moe": LayerSpec(mixer=mixer, ffn=moe)}, repeat=layers, tie_embeddings=False)


def gpt_oss(vocab: int, d: int, layers: int, heads: int, kv: int, experts: int, hidden: int, max_len: int, *, head_dim: int = 64,
            window: int = 128) -> ModelConfig:  # fmt: skip
    """gpt-oss: sinks, windows in every other layer, YaRN, biases everywhere, a clamped gate."""
    position = RoPEConfig(base=150_000.0, scaling=YaRNConfig(factor=32.0, original_max_len=4096, truncate=False))
    block = lambda seen: LayerSpec(
        mixer=GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=head_dim, window=seen, qkv_bias=True, out_bias=True, sink=True,
                        position=position),
        ffn=MoEConfig(n_experts=experts, top_k=min(4, experts), hidden=hidden, act="gptoss", bias=True),
        norm=RMSNormConfig(eps=1e-5),
    )  # fmt: skip
    blocks = {"local": block(window), "global": block(None)}
    return model(vocab, d, max_len, blocks, repeat=layers // 2, tie_embeddings=False)


def deepseek(
    vocab: int, d: int, mixer: MLAConfig, dense: int, n_dense: int, moe: MoEConfig, n_moe: int, max_len: int
) -> ModelConfig:
    """DeepSeek-V2 and V3: latent attention; the first layers dense, then experts."""
    blocks = {"dense": LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=dense)), "moe": LayerSpec(mixer=mixer, ffn=moe)}
    return model(vocab, d, max_len, blocks, ["dense"] * n_dense + ["moe"] * n_moe, tie_embeddings=False)


def latent(heads: int, q_rank: int | None, mscale: float | None, *, kv_rank: int = 512, nope: int = 128, rope: int = 64,
           v: int = 128) -> MLAConfig:  # fmt: skip
    """Latent attention of DeepSeek's sizes; ``mscale`` of its YaRN, None = no scaling."""
    yarn = YaRNConfig(factor=40.0, original_max_len=4096, mscale=mscale, mscale_all_dim=mscale) if mscale else None
    position = RoPEConfig(layout="interleaved", scaling=yarn)
    return MLAConfig(
        n_heads=heads, kv_rank=kv_rank, q_rank=q_rank, nope_dim=nope, rope_dim=rope, v_dim=v, position=position
    )


def v2_moe(experts: int, top_k: int, hidden: int, shared: int, scaling: float = 1.0) -> MoEConfig:
    return MoEConfig(
        n_experts=experts, top_k=top_k, hidden=hidden, renormalise=False, n_shared=shared, routed_scaling=scaling
    )


def v3_moe(experts: int, top_k: int, hidden: int, groups: int, top_groups: int) -> MoEConfig:
    return MoEConfig(n_experts=experts, top_k=top_k, hidden=hidden, router="sigmoid", n_groups=groups, top_groups=top_groups,
                     n_shared=1, routed_scaling=2.5, bias_rate=0.001)  # fmt: skip


def qwen_experts(experts: int, top_k: int, hidden: int, shared: int | None = None) -> MoEConfig:
    """``shared``: width of the expert for all tokens (Qwen2); then the chosen weights are not renormalised."""
    more = {"n_shared": 1, "shared_hidden": shared, "shared_gate": True} if shared else {}
    return MoEConfig(n_experts=experts, top_k=top_k, hidden=hidden, renormalise=not shared, **more)


SMALL = {"kv_rank": 32, "nope": 32, "rope": 16, "v": 32}
PRESETS = {
    "mixtral-nano": lambda: mixtral(4096, 128, 4, 4, 2, 128, 512, experts=4),
    "mixtral-8x7b": lambda: mixtral(32000, 4096, 32, 32, 8, 14336, 32768),
    "mixtral-8x22b": lambda: mixtral(32000, 6144, 56, 48, 8, 16384, 65536),
    "qwen2-moe-nano": lambda: qwen2_moe(4096, 128, 4, 4, 4, qwen_experts(6, 2, 64, 128), 512),
    "qwen1.5-moe-a2.7b": lambda: qwen2_moe(151936, 2048, 24, 16, 16, qwen_experts(60, 4, 1408, 5632), 8192),
    "qwen3-moe-nano": lambda: qwen3_moe(4096, 128, 4, 4, 2, qwen_experts(8, 2, 64), 512, head_dim=32),
    "qwen3-30b-a3b": lambda: qwen3_moe(151936, 2048, 48, 32, 4, qwen_experts(128, 8, 768), 40960),
    "qwen3-235b-a22b": lambda: qwen3_moe(151936, 4096, 94, 64, 4, qwen_experts(128, 8, 1536), 40960),
    "gpt-oss-nano": lambda: gpt_oss(4096, 128, 4, 4, 2, 8, 64, 512, head_dim=32, window=64),
    "gpt-oss-20b": lambda: gpt_oss(201088, 2880, 24, 64, 8, 32, 2880, 131072),
    "gpt-oss-120b": lambda: gpt_oss(201088, 2880, 36, 64, 8, 128, 2880, 131072),
    "deepseek-v2-nano": lambda: deepseek(
        4096, 128, latent(4, None, None, **SMALL), 384, 1, v2_moe(8, 2, 64, 1), 3, 512
    ),
    "deepseek-v2-lite": lambda: deepseek(
        102400, 2048, latent(16, None, 0.707), 10944, 1, v2_moe(64, 6, 1408, 2), 26, 163840
    ),
    # "like": the original chooses its experts from the best 3 of 8 groups, by the best expert of each
    "deepseek-v2-like": lambda: deepseek(
        102400, 5120, latent(128, 1536, 0.707), 12288, 1, v2_moe(160, 6, 1536, 2, 16.0), 59, 163840
    ),
    "deepseek-v3-nano": lambda: deepseek(
        4096, 128, latent(4, 48, None, **SMALL), 384, 1, v3_moe(8, 2, 64, 4, 2), 3, 512
    ),
    "deepseek-v3": lambda: deepseek(
        129280, 7168, latent(128, 1536, 1.0), 18432, 3, v3_moe(256, 8, 2048, 8, 4), 58, 163840
    ),
}
