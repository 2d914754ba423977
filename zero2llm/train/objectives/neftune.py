"""NEFTune: uniform noise on the embeddings while fine-tuning, so that a small set of answers is not learned by heart.

    x_t <- x_t + alpha / sqrt(L d) e_t        e_t uniform in [-1, 1]^d,  L = tokens of t's document in its row,  d = width

so the noise of a whole document has a squared length of alpha^2 / 3 on average, however long it is. Padding gets none,
evaluation none.

Source: 2310.05914, algorithm 1 (alpha 5 to 15). L counts real tokens, as in the authors' code; transformers takes the padded
row's length. Where a model scales its embeddings (Gemma), the noise is added behind the scale, as transformers does.
Why: better answers from the same few conversations; costs one random number for each value of the embeddings, and one graph break when compiled.
Randomness: torch's own generator, whose state checkpoints keep: a resumed run goes on as the uninterrupted one would have.
On a CPU micro-batches draw what the whole batch would; each rank draws its own. Shapes: (B, T, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zero2llm.core.seq import Seq


def magnitude(seq: Seq, width: int, alpha: float) -> Tensor:
    """(B, T, 1) alpha / sqrt(L d) of each token's document; 0 on padding."""
    if seq.seg is None:
        return seq.pos.new_full((*seq.pos.shape, 1), alpha / (seq.pos.shape[1] * width) ** 0.5, dtype=torch.float32)
    seg = seq.seg.long()
    sizes = seg.new_zeros(len(seg), seg.shape[1] + 1).scatter_add(1, seg, torch.ones_like(seg))
    length = sizes.gather(1, seg)  # documents of a row are numbered from 1, so there are at most T
    return torch.where(seg > 0, alpha * (length * width).float().rsqrt(), 0.0)[..., None]


def noise(x: Tensor, seq: Seq, alpha: float) -> Tensor:
    """What is added to the embeddings ``x`` (B, T, D)."""
    drawn = torch.empty(x.shape, device=x.device).uniform_(-1, 1)
    return (drawn * magnitude(seq, x.shape[-1], alpha)).to(x.dtype)


@contextmanager
def noisy(model: nn.Module, seq: Seq, alpha: float | None) -> Iterator[None]:
    """While it lasts, the model reads its tokens through noise: only in training, and never without ``alpha``."""
    if alpha is None or not model.training:
        yield
        return
    alpha = alpha / (model.cfg.embed_scale or 1)  # the scale comes behind the table
    handle = model.embed.register_forward_hook(lambda table, given, x: x + noise(x, seq, alpha))
    try:
        yield
    finally:
        handle.remove()
