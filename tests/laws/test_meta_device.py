"""Every mechanism runs on the meta device, where tensors have shapes and no values: a model is tried before it is built."""

from __future__ import annotations

import pytest
import torch

from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.lab.variants import FFNS, MIXERS, swapped
from zero2llm.model.lm import LM
from zero2llm.model.presets import llama
from zero2llm.model.spec import ModelConfig
from zero2llm.ops.marks import autocast_dtype, full_precision
from zero2llm.ops.xent import cross_entropy_sum

BASE = to_dict(llama(97, 64, 2, 4, 2, 96, 128, tied=True))


@pytest.mark.parametrize("name", [f"mixer:{name}" for name in MIXERS] + [f"ffn:{name}" for name in FFNS])
@pytest.mark.parametrize("grad", [True, False])
def test_forward(name, grad):
    cfg = parse(ModelConfig, swapped(BASE, *name.split(":")), source="test")
    with torch.device("meta"), torch.set_grad_enabled(grad):
        hidden = LM(cfg)(torch.zeros(2, 40, dtype=torch.long), Seq.rows(2, 40))[0]
    assert hidden.is_meta and hidden.shape[:2] == (2, 40)


def test_the_loss():
    hidden, weight = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(9, 4, device="meta")
    loss = cross_entropy_sum(hidden, weight, torch.zeros(6, dtype=torch.long, device="meta"))
    assert loss.is_meta and loss.shape == ()


def test_full_precision_is_autocast_switched_off():
    x = torch.randn(3, 3)
    assert autocast_dtype(x) is None and autocast_dtype(x.to("meta")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == autocast_dtype(x) == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32 and autocast_dtype(x) is None
