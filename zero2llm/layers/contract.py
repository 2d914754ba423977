"""What a layer is to the model: structural protocols (nobody inherits), its place in the stack, and its price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from zero2llm.core.seq import Aux, Seq, State


@dataclass(frozen=True)
class Place:
    """Where in the stack a layer stands: ``layer`` 0 is the first of ``n_layers``. Few mechanisms ask."""

    layer: int = 0
    n_layers: int = 1


ALONE = Place()


@dataclass(frozen=True)
class Cost:
    """One layer of one mechanism. Counts of values, not bytes; a multiply-add is 2 FLOPs.

    params : parameters.  active : those that one token meets (None = all; fewer in a mixture of experts).
    flops : per token, whatever the context.  flops_per_key : per token and token that it sees.
    window : tokens seen and stored at most, None = all.  state : values kept per stored token while decoding.
    fixed_state : values kept per row whatever its length, in fp32 or wider.
    block_state : values kept for every full ``block`` of stored tokens, in fp32 or wider.
    saved : values per token that autograd keeps for backward; None = not modelled.
    """

    params: int
    flops: int = 0
    flops_per_key: int = 0
    window: int | None = None
    state: int = 0
    fixed_state: int = 0
    saved: int | None = None
    active: int | None = None
    block: int = 1
    block_state: int = 0


class Mixer(Protocol):
    """Lets tokens see each other. Its config has ``build(d_model, place) -> Mixer`` and ``cost(d_model) -> Cost``.

    A class attribute ``whole_rows = True`` (of any layer) says that it looks at, or reports on, all tokens of a batch at once.
    """

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> State: ...
    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]: ...


class Ffn(Protocol):
    """Works on each token alone. Its config has ``build(d_model) -> Ffn`` and ``cost(d_model) -> Cost``.

    ``seq`` says which tokens are padding; ``state`` is for the few that look one token back (see `Remembers`).
    """

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]: ...


@runtime_checkable
class Remembers(Protocol):
    """A feed-forward layer that keeps something between calls: RWKV's channel mixing."""

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> State: ...
