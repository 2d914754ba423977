"""Training an adapter: what a checkpoint of it says, how the model gets it, and what joins the loss and the step.

    step-00000120/model/model.safetensors      the adapter's tensors alone, and the score head's where it was trained
                  config.json                  {"model": ..., "adapter": {"config", "base", "base_weights", "quantize", "score"}}

The base stays where it is: a checkpoint of 135M parameters with rank 8 is 10 MB, not 540. Its weights are known by their
hashes, so another model under the same path is refused. A score head (objectives reward and ppo) begins at 0, so nothing
of low rank can stand for it: its D + 1 values learn whole and are kept beside the adapter, as peft's modules_to_save.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.adapters.adalora import AdaLoRAConfig, penalty
from zero2llm.adapters.config import AdapterConfig
from zero2llm.adapters.wrap import adapter_state, disabled, load_adapter_state, wrap
from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.core.device import give_back_memory
from zero2llm.core.seq import Aux, Seq, State
from zero2llm.layers.nf4 import quantize_model
from zero2llm.model.heads import add_score
from zero2llm.train.loss import Loss, Objective

NAME = "default"  # of the adapter that a stage trains
HEAD = "score."


@config
class AdapterRun:
    """config : what is trained.  base : its checkpoint's folder.  base_weights : the hash of the base's weights.
    quantize : how the base is stored while training; nf4 = four bits (QLoRA).  score : the score head learns too."""

    config: AdapterConfig
    base: str
    base_weights: str
    quantize: Literal["nf4"] | None = None
    score: bool = False


def weights_hash(manifest: dict) -> str:
    """One hash for a checkpoint's weights, from those of its files."""
    files = {name: value for name, value in sorted(manifest["sha256"].items()) if name.startswith("model/")}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def dress(model: nn.Module, run: AdapterRun) -> nn.Module:
    """The base, with its weights loaded, as it is trained: packed if asked for, frozen, with a fresh adapter, and a score head
    that learns if asked for."""
    if run.quantize == "nf4":
        quantize_model(model)
    wrap(model, run.config, NAME)
    if run.score:
        if model.score is None:
            add_score(model)
        model.score.requires_grad_(True)
    give_back_memory()  # of the weights as they were
    return model


def learned(model: nn.Module, run: AdapterRun) -> dict[str, Tensor]:
    """What a checkpoint holds, by the names of the model's state dict."""
    return adapter_state(model, NAME) | ({HEAD + key: value for key, value in model.score.state_dict().items()} if run.score else {})


def load_learned(model: nn.Module, run: AdapterRun, tensors: Mapping[str, Tensor]) -> None:
    """The inverse, on a model dressed alike. Raises ValueError listing what is missing, too many or mis-shaped."""
    head = {name: tensors[name] for name in tensors if run.score and name.startswith(HEAD)}
    own = {HEAD + key: value for key, value in model.score.state_dict().items()} if run.score else {}
    if {name: t.shape for name, t in head.items()} != {name: t.shape for name, t in own.items()}:
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in head.items()) or "nothing"
        raise ValueError(f"the adapter's score head does not fit: {', '.join(own)} are needed for d_model = {model.cfg.d_model}, there is {found}")
    load_adapter_state(model, {name: t for name, t in tensors.items() if name not in head}, NAME)
    for name, value in own.items():
        value.copy_(head[name])


@dataclass(frozen=True)
class Penalized:
    """AdaLoRA's penalty joins the loss of any objective, per unit that it counts."""

    objective: Objective

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        loss = self.objective(model, batch)
        if not model.training:
            return loss
        value = penalty(model)
        more = {"orthogonality": (value.detach() * loss.count, loss.count)}
        return Loss(loss.total + value * loss.count, loss.count, loss.metrics | more)


def with_penalty(objective: Objective, cfg: AdapterConfig) -> Objective:
    return Penalized(objective) if isinstance(cfg, AdaLoRAConfig) else objective


class Undressed(nn.Module):
    """The base under the adapter, as a model of its own that shares every weight: DPO's reference, for no memory."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inside = (model,)  # no submodule: freezing the reference must not freeze what is trained

    def forward(self, tokens: Tensor, seq: Seq, states: list[State] | None = None) -> tuple[Tensor, Aux]:
        with disabled(self.inside[0]), torch.no_grad():
            return self.inside[0](tokens, seq, states)

    def init_states(self, batch: int, max_len: int) -> list[State]:
        return self.inside[0].init_states(batch, max_len)

    @property
    def continues(self) -> bool:
        return self.inside[0].continues

    @property
    def head_weight(self) -> Tensor:
        with disabled(self.inside[0]):
            return self.inside[0].head_weight

    @property
    def logit_softcap(self) -> float | None:
        return self.inside[0].logit_softcap
