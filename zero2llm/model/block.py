"""A block: mixer and feed-forward around the residual stream, wired in one of four ways.

    pre        x = x + F(N(x))                     GPT-2, Llama: gradients reach the input unchanged
    post       x = N(x + F(x))                     the 2017 Transformer
    sandwich   x = x + N'(F(N(x)))                 Gemma 2/3: the branch's output is normalised too
    parallel   x = x + mixer(N(x)) + ffn(N(x))     GPT-J, PaLM: both read the same input, one norm

Source: pre/post 2002.04745; sandwich 2105.13290; parallel 2204.02311 section 2. Shapes: (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from torch import Tensor, nn

from zero2llm.core.seq import Aux, Seq, State, merge_aux
from zero2llm.model.spec import LayerSpec


class Block(nn.Module):
    def __init__(self, spec: LayerSpec, d_model: int):
        super().__init__()
        self.wiring = spec.wiring
        self.mixer, self.ffn = spec.mixer.build(d_model), spec.ffn.build(d_model)
        self.mixer_norm = spec.norm.build(d_model)
        if spec.wiring != "parallel":
            self.ffn_norm = spec.norm.build(d_model)
        if spec.wiring == "sandwich":
            self.mixer_out_norm, self.ffn_out_norm = spec.norm.build(d_model), spec.norm.build(d_model)

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]:
        if self.wiring == "pre":
            mixed, aux = self.mixer(self.mixer_norm(x), seq, state)
            x = x + mixed
            fed, more = self.ffn(self.ffn_norm(x))
            x = x + fed
        elif self.wiring == "post":
            mixed, aux = self.mixer(x, seq, state)
            x = self.mixer_norm(x + mixed)
            fed, more = self.ffn(x)
            x = self.ffn_norm(x + fed)
        elif self.wiring == "sandwich":
            mixed, aux = self.mixer(self.mixer_norm(x), seq, state)
            x = x + self.mixer_out_norm(mixed)
            fed, more = self.ffn(self.ffn_norm(x))
            x = x + self.ffn_out_norm(fed)
        else:
            normed = self.mixer_norm(x)
            mixed, aux = self.mixer(normed, seq, state)
            fed, more = self.ffn(normed)
            x = x + mixed + fed
        return x, merge_aux([aux, more])
