"""How query heads share key heads: the one place that reads ``n_heads``, ``n_kv_heads`` and ``head_dim``."""

from __future__ import annotations


def grouped_heads(d_model: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """(G, K): key heads, None = one for each query head; width of a head, None = d_model / n_heads.

    Raises ValueError for what cannot be built.
    """
    n_kv = n_heads if n_kv_heads is None else n_kv_heads
    if n_heads < 1 or n_kv < 1 or n_heads % n_kv:
        raise ValueError(f"n_heads = {n_heads} must be a multiple of n_kv_heads = {n_kv}, both at least 1")
    if head_dim is None and d_model % n_heads:
        raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {n_heads}, or give head_dim")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim = {head_dim} must be at least 1")
    return n_kv, d_model // n_heads if head_dim is None else head_dim
