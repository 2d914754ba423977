"""A block: mixer and feed-forward around the residual stream, wired in one of six ways.

    pre        x = x + F(N(x))                     GPT-2, Llama: gradients reach the input unchanged
    post       x = N(x + F(x))                     the 2017 Transformer
    sandwich   x = x + N'(F(N(x)))                 Gemma 2/3: the branch's output is normalised too
    branch     x = x + N(F(x))                     OLMo 2: only the branch's output is normalised
    parallel   x = x + mixer(N(x)) + ffn(N(x))     GPT-J, PaLM: both read the same input, one norm
    deepnorm   x = N(a x + F(x)), a = (2 L)^(1/4)  1,000 layers of post-norm; its initialisation is the other half

Source: pre/post 2002.04745; sandwich 2105.13290; branch 2501.00656 section 3.1; parallel 2204.02311 section 2; deepnorm
2203.00555 section 3. A block without a feed-forward is its mixer alone (Mamba). Shapes: (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from torch import Tensor, nn

from zero2llm.core.seq import Aux, Seq, State, merge_aux
from zero2llm.layers.contract import ALONE, Place, Remembers
from zero2llm.layers.memory import Both
from zero2llm.model.spec import LayerSpec


class Block(nn.Module):
    def __init__(self, spec: LayerSpec, d_model: int, place: Place = ALONE):
        super().__init__()
        self.wiring, self.alpha = spec.wiring, (2 * place.n_layers) ** 0.25
        self.mixer = spec.mixer.build(d_model, place)
        self.ffn = spec.ffn.build(d_model) if spec.ffn else None
        self.ffn_remembers = isinstance(self.ffn, Remembers)
        self.mixer_norm = spec.norm.build(d_model)
        if spec.ffn and spec.wiring != "parallel":
            self.ffn_norm = spec.norm.build(d_model)
        if spec.wiring == "sandwich":
            self.mixer_out_norm = spec.norm.build(d_model)
            self.ffn_out_norm = spec.norm.build(d_model) if spec.ffn else None

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> State:
        memory = self.mixer.init_state(batch, max_len, device=device, dtype=dtype)
        if self.ffn_remembers:
            return Both(memory, self.ffn.init_state(batch, max_len, device=device, dtype=dtype))
        return memory

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]:
        memory, ffn_memory = state.parts if self.ffn_remembers and state is not None else (state, None)
        if self.wiring == "parallel" and self.ffn is not None:
            normed = self.mixer_norm(x)
            mixed, aux = self.mixer(normed, seq, memory)
            fed, more = self.ffn(normed, seq, ffn_memory)
            return x + mixed + fed, merge_aux([aux, more])
        x, aux = self.branch("mixer", x, seq, memory)
        if self.ffn is None:
            return x, aux
        x, more = self.branch("ffn", x, seq, ffn_memory)
        return x, merge_aux([aux, more])

    def branch(self, name: str, x: Tensor, seq: Seq, state: State | None) -> tuple[Tensor, Aux]:
        """The residual stream after one of the two branches, "mixer" or "ffn"."""
        inside, norm = getattr(self, name), getattr(self, f"{name}_norm")
        if self.wiring in ("pre", "parallel"):
            y, aux = inside(norm(x), seq, state)
            return x + y, aux
        if self.wiring == "sandwich":
            y, aux = inside(norm(x), seq, state)
            return x + getattr(self, f"{name}_out_norm")(y), aux
        y, aux = inside(x, seq, state)
        if self.wiring == "branch":
            return x + norm(y), aux
        return norm((self.alpha if self.wiring == "deepnorm" else 1.0) * x + y), aux
