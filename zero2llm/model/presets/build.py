"""The one step that every preset shares: named blocks in order, and the last norm equal to theirs."""

from __future__ import annotations

from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig


def model(vocab: int, d: int, max_len: int, blocks: dict[str, LayerSpec], pattern: list[str] | None = None, repeat: int = 1,
          **more) -> ModelConfig:  # fmt: skip
    """pattern : names of ``blocks``, repeated; None = the blocks in order. ``more`` are other fields of ModelConfig."""
    norm = next(iter(blocks.values())).norm
    layers = LayerPattern(pattern=pattern or list(blocks), repeat=repeat)
    return ModelConfig(
        vocab_size=vocab, d_model=d, max_len=max_len, layers=layers, blocks=blocks, **{"final_norm": norm} | more
    )
