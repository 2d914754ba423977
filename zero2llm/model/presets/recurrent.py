"""Models with a memory of fixed size: Mamba, Mamba-2, RWKV-7, and hybrids of such layers with attention.

Models without positions have no longest text of their own; 1,048,576 stands for that.
"""

from __future__ import annotations

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.ffns.token_shift import RWKVChannelConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.mixers.mamba2 import Mamba2Config
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.mixers.rwkv7 import RWKV7Config
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.presets.build import model
from zero2llm.model.spec import LayerSpec, ModelConfig

ENDLESS = 1_048_576


def mamba(vocab: int, d: int, layers: int, max_len: int = ENDLESS) -> ModelConfig:
    """Mamba: the mixer is the whole block."""
    spec = LayerSpec(mixer=Mamba1Config(), norm=RMSNormConfig(eps=1e-5))
    return model(vocab, d, max_len, {"mamba": spec}, repeat=layers, tie_embeddings=True)


def mamba2(vocab: int, d: int, layers: int, max_len: int = ENDLESS, **mixer) -> ModelConfig:
    """Mamba-2: the same with one decay per head and a larger state."""
    spec = LayerSpec(mixer=Mamba2Config(**mixer), norm=RMSNormConfig(eps=1e-5))
    return model(vocab, d, max_len, {"mamba2": spec}, repeat=layers, tie_embeddings=True)


def rwkv7(
    vocab: int, d: int, layers: int, ranks: tuple[int, int, int, int], max_len: int = ENDLESS, *, head: int = 64
) -> ModelConfig:
    """RWKV-7, which transformers has no class for. ranks : of decay, rate, value and gate."""
    decay, rate, value, gate = ranks
    mixer = RWKV7Config(n_heads=d // head, decay_rank=decay, rate_rank=rate, value_rank=value, gate_rank=gate)
    spec = LayerSpec(mixer=mixer, ffn=RWKVChannelConfig(), norm=LayerNormConfig())
    return model(vocab, d, max_len, {"rwkv7": spec}, repeat=layers, tie_embeddings=False, embed_norm=LayerNormConfig())


def qwen3_next(vocab: int, d: int, layers: int, attention: tuple[int, int, int], delta: tuple[int, int, int],
               experts: tuple[int, int, int], max_len: int) -> ModelConfig:  # fmt: skip
    """Qwen3-Next. attention : query heads, key heads, width.  delta : value heads, key heads, width.  experts : number,
    chosen, width (also of the shared one)."""
    (heads, kv, width), (h_v, h_k, k), (e, top_k, hidden) = attention, delta, experts
    moe = MoEConfig(n_experts=e, top_k=top_k, hidden=hidden, n_shared=1, shared_gate=True)
    gated = GQAConfig(n_heads=heads, n_kv_heads=kv, head_dim=width, qk_norm=True, qk_norm_plus_one=True, gate=True,
                      position=RoPEConfig(base=1e7, rotary_dim=width // 4))  # fmt: skip
    linear, norm = GatedDeltaConfig(n_v_heads=h_v, n_k_heads=h_k, head_dim=k), RMSNormConfig(plus_one=True)
    blocks = {
        "delta": LayerSpec(mixer=linear, ffn=moe, norm=norm),
        "attention": LayerSpec(mixer=gated, ffn=moe, norm=norm),
    }
    pattern = ["delta", "delta", "delta", "attention"]
    return model(vocab, d, max_len, blocks, pattern, layers // 4, tie_embeddings=False)


def kimi_linear(
    vocab: int, d: int, kinds: str, mla: MLAConfig, kda: KDAConfig, dense: int, moe: MoEConfig, max_len: int
) -> ModelConfig:
    """Kimi Linear. kinds : a letter for each layer, k(da) or m(la); the first layer is dense."""
    norm = RMSNormConfig(eps=1e-5)
    blocks = {
        "first": LayerSpec(mixer=kda, ffn=GLUConfig(hidden=dense), norm=norm), "kda": LayerSpec(mixer=kda, ffn=moe, norm=norm),
        "mla": LayerSpec(mixer=mla, ffn=moe, norm=norm),
    }  # fmt: skip
    pattern = ["first"] + ["kda" if kind == "k" else "mla" for kind in kinds[1:]]
    return model(vocab, d, max_len, blocks, pattern, tie_embeddings=False)


def jamba(vocab: int, d: int, repeat: int, heads: int, kv: int, hidden: int, experts: int, max_len: int, *, every: int = 8,
          at: int = 4, state: int = 16) -> ModelConfig:  # fmt: skip
    """Jamba: of ``every`` layers number ``at`` attends, the others are Mamba; odd ones have experts."""
    mamba, attention = Mamba1Config(dt_norms=True, state_dim=state), GQAConfig(n_heads=heads, n_kv_heads=kv)
    ffns = {
        "dense": GLUConfig(hidden=hidden),
        "moe": MoEConfig(n_experts=experts, top_k=2, hidden=hidden, renormalise=False),
    }
    names = [f"{'attention' if i == at else 'mamba'}_{('dense', 'moe')[i % 2]}" for i in range(every)]
    mixer = lambda name: attention if name.startswith("attention") else mamba
    blocks = {name: LayerSpec(mixer=mixer(name), ffn=ffns[name.split("_")[1]]) for name in dict.fromkeys(names)}
    return model(vocab, d, max_len, blocks, names, repeat, tie_embeddings=False)


def nope(heads: int, kv_rank: int, width: int, rope: int) -> MLAConfig:
    """Latent attention without rotation."""
    return MLAConfig(
        n_heads=heads, kv_rank=kv_rank, nope_dim=width, rope_dim=rope, v_dim=width, position=NoPositionConfig()
    )


def kimi_experts(experts: int, top_k: int, hidden: int) -> MoEConfig:
    shared = {"router": "sigmoid", "n_shared": 1, "routed_scaling": 2.446, "bias_rate": 0.001}
    return MoEConfig(n_experts=experts, top_k=top_k, hidden=hidden, **shared)


def kda(heads: int, width: int) -> KDAConfig:
    return KDAConfig(n_heads=heads, head_dim=width)


PRESETS = {
    "mamba-nano": lambda: mamba(4096, 128, 6),
    "mamba-130m": lambda: mamba(50280, 768, 24),
    "mamba-370m": lambda: mamba(50280, 1024, 48),
    "mamba-790m": lambda: mamba(50280, 1536, 48),
    "mamba-1.4b": lambda: mamba(50280, 2048, 48),
    "mamba-2.8b": lambda: mamba(50280, 2560, 64),
    "mamba2-nano": lambda: mamba2(4096, 128, 6, head_dim=32, state_dim=32),
    "mamba2-130m": lambda: mamba2(50288, 768, 24),
    "mamba2-370m": lambda: mamba2(50288, 1024, 48),
    "mamba2-780m": lambda: mamba2(50288, 1536, 48),
    "mamba2-1.3b": lambda: mamba2(50288, 2048, 48),
    "mamba2-2.7b": lambda: mamba2(50288, 2560, 64),
    "rwkv7-nano": lambda: rwkv7(4096, 128, 4, (32, 32, 32, 64), head=32),
    # "like": the first layer owns three parameters for mixing in its own values, which change nothing
    "rwkv7-0.1b-like": lambda: rwkv7(65536, 768, 12, (64, 64, 32, 128)),
    "rwkv7-0.4b-like": lambda: rwkv7(65536, 1024, 24, (64, 64, 32, 128)),
    "rwkv7-1.5b-like": lambda: rwkv7(65536, 2048, 24, (96, 96, 64, 256)),
    "rwkv7-2.9b-like": lambda: rwkv7(65536, 2560, 32, (96, 96, 64, 320)),
    "qwen3-next-nano": lambda: qwen3_next(4096, 128, 4, (4, 2, 32), (4, 2, 32), (6, 2, 64), 512),
    "qwen3-next-80b-a3b": lambda: qwen3_next(151936, 2048, 48, (16, 2, 256), (32, 16, 128), (512, 10, 512), 262144),
    "kimi-linear-nano": lambda: kimi_linear(4096, 128, "kkkm", nope(4, 32, 32, 16), kda(4, 32), 384, kimi_experts(6, 2, 64), 512),
    "kimi-linear-48b-a3b": lambda: kimi_linear(163840, 2304, "kkkm" * 6 + "kkm", nope(32, 512, 128, 64), kda(32, 128), 9216,
                                               kimi_experts(256, 8, 1024), ENDLESS),
    "jamba-nano": lambda: jamba(4096, 128, 1, 4, 2, 192, 4, 512, every=4, at=2),
    "jamba-v0.1": lambda: jamba(65536, 4096, 4, 32, 8, 14336, 16, 262144),
}  # fmt: skip
