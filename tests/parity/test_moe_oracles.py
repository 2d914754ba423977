"""Mixtures of experts against the published models' own blocks in transformers, forward and backward."""

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.ffns.routers import balance_loss, z_loss
from zero2llm.ops.route import load_of

D, B, T = 24, 2, 37
CLOSE = dict(atol=2e-6, rtol=1e-5)


def mixtral():
    theirs = MixtralSparseMoeBlock(MixtralConfig(hidden_size=D, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2))
    return MoEConfig(n_experts=6, top_k=2, hidden=20), theirs, {}


def qwen2(renormalise=False):
    theirs = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=10, shared_expert_intermediate_size=28, num_experts=8, num_experts_per_tok=3,
        norm_topk_prob=renormalise,
    ))  # fmt: skip
    ours = MoEConfig(n_experts=8, top_k=3, hidden=10, renormalise=renormalise, n_shared=1, shared_hidden=28, shared_gate=True)
    shared = {f"shared.{p}_proj.weight": f"shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
    return ours, theirs, shared | {"shared_gate.weight": "shared_expert_gate.weight"}


def qwen3(renormalise=True):
    theirs = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=10, num_experts=16, num_experts_per_tok=4, norm_topk_prob=renormalise))
    return MoEConfig(n_experts=16, top_k=4, hidden=10, renormalise=renormalise), theirs, {}


def deepseek(groups=4, top=2, renormalise=True):
    cfg = DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=10, n_routed_experts=12, num_experts_per_tok=3, n_group=groups, topk_group=top,
        n_shared_experts=2, norm_topk_prob=renormalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    ours = MoEConfig(
        n_experts=12, top_k=3, hidden=10, router="sigmoid", n_groups=groups, top_groups=top, routed_scaling=2.5, n_shared=2,
        renormalise=renormalise, bias_rate=0.001,
    )  # fmt: skip
    shared = {f"shared.{p}_proj.weight": f"shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}
    return ours, DeepseekV3MoE(cfg), shared | {"router_bias": "gate.e_score_correction_bias"}


def gptoss():
    cfg = GptOssConfig(hidden_size=D, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2)
    return MoEConfig(n_experts=6, top_k=2, hidden=20, act="gptoss", bias=True), GptOssMLP(cfg), {}


CASES = {
    "mixtral": mixtral,
    "qwen2-moe": qwen2,
    "qwen2-moe renormalised": lambda: qwen2(True),
    "qwen3-moe": qwen3,
    "qwen3-moe as it comes": lambda: qwen3(False),
    "deepseek-v3": deepseek,
    "deepseek-v3 one group": lambda: deepseek(1, 1, False),
    "gpt-oss": gptoss,
}


def tensors(theirs):
    return dict(theirs.named_parameters()) | dict(theirs.named_buffers())


def theirs_as_ours(theirs, pairs):
    """Their tensor for each of ours, in our layout: experts apart into gate, up, down, (E, out, in)."""
    at = tensors(theirs)
    router = "router" if "router.weight" in at else "gate"
    found = {"router.weight": at[f"{router}.weight"]} | {mine: at[name] for mine, name in pairs.items()}
    both, down = at["experts.gate_up_proj"], at["experts.down_proj"]
    if router == "router":  # gpt-oss: (E, in, out), gate and up in turn, biases
        found |= {"router.bias": at["router.bias"], "down_proj.bias": at["experts.down_proj_bias"]}
        bias = at["experts.gate_up_proj_bias"]
        found |= {"gate_proj.bias": bias[:, ::2], "up_proj.bias": bias[:, 1::2]}
        both, down = both.mT, down.mT
        return found | {"gate_proj.weight": both[:, ::2], "up_proj.weight": both[:, 1::2], "down_proj.weight": down}
    gate, up = both.chunk(2, 1)
    return found | {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}


def setup(name):
    cfg, theirs, pairs = CASES[name]()
    with torch.no_grad():  # theirs may be uninitialised memory
        for tensor in tensors(theirs).values():
            tensor.copy_(torch.randn_like(tensor) * (D**-0.5 if tensor.ndim > 1 else 0.3))
    ours = cfg.build(D)
    views = theirs_as_ours(theirs, pairs)
    assert set(views) == {n for n, _ in ours.named_parameters()}
    with torch.no_grad():
        for mine, tensor in views.items():
            ours.get_parameter(mine).copy_(tensor)
    return cfg, ours, theirs, pairs


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", CASES)
@pytest.mark.oracle("ffn:moe", "ffn:moe_shared", of="transformers MoE blocks", way="both")
def test_block_equals_transformers(name):
    cfg, ours, theirs, pairs = setup(name)
    x = torch.randn(B, T, D)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours(a, Seq.rows(B, T))[0], first(theirs(b))
    torch.testing.assert_close(got, want, **CLOSE)
    cotangent = torch.randn_like(want)
    got.backward(cotangent), want.backward(cotangent)
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
    # gradients of their fused tensors, taken apart exactly as the tensors are
    for tensor in tensors(theirs).values():
        tensor.data = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
    for mine, grad in theirs_as_ours(theirs, pairs).items():
        if mine != "router_bias":  # a buffer there, a count here
            torch.testing.assert_close(ours.get_parameter(mine).grad, grad.detach(), atol=2e-5, rtol=1e-5, msg=lambda m, n=mine: f"{n}: {m}")


def test_the_choice_bias_decides_in_these_tests():
    _, ours, _, _ = setup("deepseek-v3")
    x = torch.randn(B, T, D)
    with_bias = ours(x, Seq.rows(B, T))[0]
    with torch.no_grad():
        ours.router_bias.zero_()
    assert not torch.allclose(ours(x, Seq.rows(B, T))[0], with_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32(dtype):
    cfg, ours, theirs, _ = setup("mixtral")
    x = torch.randn(B, T, D).to(dtype)
    full = ours(x.float(), Seq.rows(B, T))[0]
    half = ours.to(dtype)(x, Seq.rows(B, T))[0]
    near = (half.float() - full).abs().amax(-1) < 5e-2
    assert half.dtype == dtype and near.float().mean() > 0.95, "a few tokens may choose otherwise"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_loss_equals_transformers_over_k(k):
    """Theirs sums the share over the k slots, so that even means k; ours means 1."""
    logits, real = torch.randn(B * T, 6) * 2, torch.rand(B * T) < 0.7
    scores = logits.softmax(-1)
    experts = scores.topk(k).indices
    for mask in (None, real):
        want = load_balancing_loss_func((logits,), 6, k, None if mask is None else mask[None].float())
        torch.testing.assert_close(balance_loss(scores, load_of(experts, 6, mask).float(), mask), want / k, **CLOSE)


def test_z_loss_equals_switch():
    logits = 3 * torch.randn(B, T, 6)
    torch.testing.assert_close(z_loss(logits.flatten(0, 1), None), router_z_loss_func(logits), **CLOSE)
