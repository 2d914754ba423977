"""The delta family against fla's naive functions, the blocks of Qwen3-Next and Kimi Linear, and RWKV's own runtime."""

import importlib.metadata
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from transformers import KimiLinearConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.token_shift import RWKVChannelConfig
from zero2llm.layers.mixers.deltanet import DeltaNetConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.rwkv7 import FIRST, RWKV7Config
from zero2llm.ops.delta import delta_chunks, delta_steps, unit
from zero2llm.ops.dplr import dplr_chunks, dplr_steps
from zero2llm.ops.marks import Marks

B, H, T, K, V = 2, 3, 40, 16, 12
STEP, CHUNK = 2e-6, 5e-6  # recurrent against recurrent, and against chunks; in units of the largest value above 1


def close(found, expected, tolerance):
    """Outputs and gradients; each within ``tolerance`` times its largest value, or times 1."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, b.abs().max().item()), rtol=0)


def naive(name, stem):
    """One of fla's plain references, loaded by path: importing the package would ask for triton."""
    path = next(p for p in importlib.metadata.files("fla-core") if str(p).endswith(f"ops/{name}/naive.py")).locate()
    spec = importlib.util.spec_from_file_location(f"naive_{stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, stem)


def with_gradients(f, leaves, seed=5):
    """Outputs, and the gradients of a random linear function of them."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    outs = f(*leaves)
    torch.manual_seed(seed)
    return [*outs, *torch.autograd.grad(sum((o * torch.randn(o.shape)).sum() for o in outs), leaves)]


def leaves(per_channel=False):
    q, k = unit(torch.randn(B, H, T, K)), unit(torch.randn(B, H, T, K))
    g = -2 * torch.rand(B, H, T, *([K] if per_channel else []))
    return [q, k, torch.randn(B, H, T, V), torch.rand(B, H, T), g, torch.randn(B, H, K, V)]


swap = lambda *xs: [x.transpose(1, 2) for x in xs]


def check(steps, chunks, oracle, oracle_chunks, inputs):
    expected = with_gradients(oracle, inputs)
    close(with_gradients(steps, inputs), expected, STEP)
    close(with_gradients(chunks, inputs), expected, CHUNK)
    close(with_gradients(chunks, inputs), with_gradients(oracle_chunks, inputs), CHUNK)


def test_delta_rule_equals_fla():
    q, k, v, beta, _, _ = leaves()
    recurrence, chunkwise = (naive("delta_rule", f"delta_rule_{form}") for form in ("recurrence", "chunkwise"))
    oracle = lambda q, k, v, beta: recurrence(q * K**0.5, k, v, beta)
    oracle_chunks = lambda q, k, v, beta: chunkwise(q * K**0.5, k, v, beta, chunk_size=20)
    ours = lambda form, *more: lambda q, k, v, beta: form(q, k, v, beta, torch.zeros(T), Marks(), None, *more)
    check(ours(delta_steps), ours(delta_chunks, 16), oracle, oracle_chunks, [q, k, v, beta])


def test_gated_delta_rule_equals_fla():
    def from_fla(stem, **more):
        f = naive("gated_delta_rule", stem)

        def call(q, k, v, beta, g, S):
            q, k, v, beta, g = swap(q, k, v, beta, g)
            o, S = f(q=q, k=k, v=v, beta=beta, g=g, scale=1.0, initial_state=S, output_final_state=True, **more)
            return o.transpose(1, 2), S

        return call

    ours = lambda form, *more: lambda q, k, v, beta, g, S: form(q, k, v, beta, g, Marks(), S, *more)
    oracles = from_fla("naive_recurrent_gated_delta_rule"), from_fla("naive_chunk_gated_delta_rule", chunk_size=20)
    check(ours(delta_steps), ours(delta_chunks, 16), *oracles, leaves())


def test_kda_equals_fla():
    def from_fla(stem, **more):
        f = naive("kda", stem)

        def call(q, k, v, beta, g, S):
            o, S = f(*swap(q, k, v, g, beta), scale=1.0, initial_state=S, output_final_state=True, **more)
            return o.transpose(1, 2), S

        return call

    ours = lambda form, *more: lambda q, k, v, beta, g, S: form(q, k, v, beta, g, Marks(), S, *more)
    oracles = from_fla("naive_recurrent_kda"), from_fla("naive_chunk_kda", chunk_size=20)
    check(ours(delta_steps), ours(delta_chunks, 16), *oracles, leaves(per_channel=True))


def test_dplr_equals_fla():
    def from_fla(stem, **more):
        f = naive("generalized_delta_rule/dplr", stem)
        return lambda q, k, v, a, b, g, S: f(q * K**0.5, k, v, a, b, g, initial_state=S, **more)

    kk, rate = unit(torch.randn(B, H, T, K)), torch.rand(B, H, T, K)
    q, k, g = torch.randn(B, H, T, K), torch.randn(B, H, T, K), -0.6 * torch.rand(B, H, T, K)
    inputs = [q, k, torch.randn(B, H, T, V), -kk, kk * rate, g, torch.randn(B, H, K, V)]
    ours = lambda form, *more: lambda *xs: form(*xs[:-1], Marks(), xs[-1], *more)
    oracles = from_fla("dplr_recurrence"), from_fla("dplr_chunkwise", chunk_size=20)
    check(ours(dplr_steps), ours(dplr_chunks, 16), *oracles, inputs)


# Whole layers


def randomise(*modules):
    for module in modules:
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) * (1.0 if p.ndim == 1 else p.shape[-1] ** -0.5))


def compare_layers(ours, theirs, x, tolerance=CHUNK):
    """Both called on x: outputs and the gradients of x, relative to the largest value of each."""
    found, expected = with_gradients(lambda x: [ours(x)], [x]), with_gradients(lambda x: [theirs(x)], [x])
    assert expected[0].std() > 0.1, "too small to see anything"
    close(found, expected, tolerance)


@pytest.mark.oracle("mixer:gated_delta", of="transformers Qwen3-Next", way="both")
def test_gated_delta_equals_qwen3_next():
    D, h_k, h_v, k, v = 24, 2, 6, 8, 5
    cfg = Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=h_k, linear_num_value_heads=h_v, linear_key_head_dim=k,
        linear_value_head_dim=v, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, num_hidden_layers=4,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(cfg, 0)
    ours = GatedDeltaConfig(n_v_heads=h_v, n_k_heads=h_k, head_dim=k, value_dim=v, norm_eps=1e-6, chunk=16).build(D)
    randomise(theirs)
    fused = theirs.in_proj_qkvz.weight.unflatten(0, (h_k, -1)).split([k, k, h_v // h_k * v, h_v // h_k * v], 1)
    ba = theirs.in_proj_ba.weight.unflatten(0, (h_k, 2, -1)).unbind(1)
    pairs = dict(zip(("q_proj", "k_proj", "v_proj", "g_proj"), fused, strict=True)) | {"b_proj": ba[0], "a_proj": ba[1]}
    filters = theirs.conv1d.weight[:, 0].split([h_k * k, h_k * k, h_v * v])
    state = {f"{name}.weight": weight.flatten(0, 1) for name, weight in pairs.items()}
    state |= dict(zip(("q_conv", "k_conv", "v_conv"), filters, strict=True))
    state |= {"A_log": theirs.A_log, "dt_bias": theirs.dt_bias, "norm.weight": theirs.norm.weight}
    ours.load_state_dict(state | {"o_proj.weight": theirs.out_proj.weight})
    compare_layers(lambda x: ours(x, Seq.rows(2, 37))[0], theirs, torch.randn(2, 37, D))


@pytest.mark.oracle("mixer:kda", of="transformers Kimi Linear", way="both")
def test_kda_equals_kimi_linear():
    D, h, k = 24, 3, 8
    cfg = KimiLinearConfig(
        hidden_size=D, linear_num_heads=h, linear_head_dim=k, linear_conv_kernel_dim=4, rms_norm_eps=1e-5,
        num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3,
    )  # fmt: skip
    theirs, ours = KimiLinearDeltaAttention(cfg, 0), KDAConfig(n_heads=h, head_dim=k, norm_eps=1e-5, chunk=16).build(D)
    randomise(theirs)
    with torch.no_grad():
        theirs.forget_gate.A_log.mul_(0.5)
    plain = ("q_proj", "k_proj", "v_proj", "b_proj", "g_a_proj", "g_b_proj", "o_proj")
    state = {f"{name}.weight": theirs.get_submodule(name).weight for name in plain}
    state |= {f"f_{s}_proj.weight": theirs.get_submodule(f"forget_gate.f_{s}_proj").weight for s in "ab"}
    state |= dict(zip(("q_conv", "k_conv", "v_conv"), theirs.conv1d.weight[:, 0].chunk(3), strict=True))
    state |= {"A_log": theirs.forget_gate.A_log.flatten(), "dt_bias": theirs.forget_gate.dt_bias}
    ours.load_state_dict(state | {"norm.weight": theirs.o_norm.weight})
    compare_layers(lambda x: ours(x, Seq.rows(2, 37))[0], theirs, torch.randn(2, 37, D))


@pytest.mark.oracle("mixer:deltanet", of="transformers Qwen3-Next without decay and gate", way="both")
def test_deltanet_equals_qwen3_next_without_decay_and_gate():
    """No block of DeltaNet itself runs on a CPU: Qwen3-Next's, with A = 0 and the gate taken out again."""
    D, h, k = 24, 3, 8
    cfg = Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=h, linear_num_value_heads=h, linear_key_head_dim=k, linear_value_head_dim=k,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-5, num_hidden_layers=4,
    )  # fmt: skip
    theirs, ours = Qwen3NextGatedDeltaNet(cfg, 0), DeltaNetConfig(n_heads=h, norm_eps=1e-5, chunk=16).build(D)
    randomise(theirs)
    q, k_, v, _ = theirs.in_proj_qkvz.weight.unflatten(0, (h, 4, k)).unbind(1)
    state = {f"{name}_proj.weight": w.flatten(0, 1) for name, w in zip("qkv", (q, k_, v), strict=True)}
    state |= {"b_proj.weight": theirs.in_proj_ba.weight[::2], "norm.weight": theirs.norm.weight}
    state |= dict(zip(("q_conv", "k_conv", "v_conv"), theirs.conv1d.weight[:, 0].chunk(3), strict=True))
    ours.load_state_dict(state | {"o_proj.weight": theirs.out_proj.weight})
    with torch.no_grad():
        theirs.A_log.fill_(-torch.inf)
    norm, theirs.norm.forward = theirs.norm, lambda o, z: F.rms_norm(o, (k,), norm.weight, 1e-5)
    compare_layers(lambda x: ours(x, Seq.rows(2, 37))[0], theirs, torch.randn(2, 37, D))


@pytest.fixture(scope="module")
def rwkv():
    """RWKV's runtime in its version-7 mode, under a private name: the mode is chosen while the file is read."""
    path = next(p for p in importlib.metadata.files("rwkv") if str(p) == "rwkv/model.py").locate()
    spec = importlib.util.spec_from_file_location("rwkv_model_of_version_7", path)
    module, autocast = importlib.util.module_from_spec(spec), torch._C._jit_set_autocast_mode(False)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)
        spec.loader.exec_module(module)
    torch._C._jit_set_autocast_mode(autocast)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32
    return module


TIME = "x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 v0 v1 v2 g1 g2 k_k k_a r_k".split()


@pytest.mark.parametrize("first_layer", [True, False])
@pytest.mark.oracle("mixer:rwkv7", of="rwkv runtime", way="both")
def test_rwkv7_equals_its_runtime(rwkv, first_layer):
    """Head width 64, for which the runtime's constant eps of 64e-5 holds. One row after the other, token by token."""
    D, N, steps = 128, 64, 20
    ours = RWKV7Config(n_heads=2, decay_rank=5, rate_rank=6, value_rank=7, gate_rank=8, chunk=8).build(D)
    randomise(ours)
    matrices = [p.weight.t() for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.o_proj)]
    weights = [getattr(ours, name) for name in TIME] + matrices + [ours.norm_weight, ours.norm_bias]

    def theirs(x, firsts):
        rows, layer = [], 0 if first_layer else 1
        for row, first in zip(x, firsts, strict=True):
            before, state, out = torch.zeros(D), torch.zeros(D // N, N, N), []
            for t in range(steps):
                now = row[t], before, first[t], state
                y, before, state, _ = rwkv.RWKV_x070_TMix_one(layer, D // N, N, *now, *weights)
                out.append(y)
            rows.append(torch.stack(out))
        return torch.stack(rows)

    def mine(x, firsts):
        seq = Seq.rows(2, steps)
        if not first_layer:
            seq.memo[FIRST] = firsts
        return ours(x, seq)[0] + (0 * firsts.sum() if first_layer else 0)

    x, firsts, found = *torch.randn(2, 2, steps, D, requires_grad=True), []
    for f in (mine, lambda x, firsts: theirs(x, firsts) + 0 * firsts.sum()):
        named = [p for name, p in ours.named_parameters() if not (first_layer and name in ("v0", "v1", "v2"))]
        torch.manual_seed(5)
        y, way = f(x, firsts), torch.randn(2, steps, D)
        found.append([y, *torch.autograd.grad((y * way).sum(), [x, firsts, *named])])
    assert found[1][0].std() > 0.1
    close(*found, CHUNK)


@pytest.mark.oracle("ffn:rwkv_channel", of="rwkv runtime", way="both")
def test_rwkv_channel_mixing_equals_its_runtime(rwkv):
    D, steps = 24, 20
    ours = RWKVChannelConfig(hidden=30).build(D)
    randomise(ours)

    def theirs(x):
        zero = torch.zeros(D)
        up, down = ours.up_proj.weight.t(), ours.down_proj.weight.t()
        return torch.stack([rwkv.RWKV_x070_CMix_seq(row, zero, ours.x_k, up, down)[0] for row in x])

    compare_layers(lambda x: ours(x, Seq.rows(2, steps))[0], theirs, torch.randn(2, steps, D), STEP)
