"""Planted bugs in attention: each must be caught, and by whom is part of the claim.

Laws compare a layer with itself; a bug that is wrong everywhere alike passes them, and only the hand formula sees it.
"""

import torch

from tests.golden.planted import bug_tests
from tests.golden.test_layers import gqa_by_hand, randomised
from zero2llm.core.seq import Seq
from zero2llm.layers.kv import KVState
from zero2llm.layers.mixers import gqa
from zero2llm.layers.mixers.gqa import GQA, GQAConfig
from zero2llm.layers.positions.rope import RoPE, RoPEConfig
from zero2llm.ops.attend import attend, visible

D, T = 12, 8
CONFIGS = {
    "full": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm=True, position=RoPEConfig(base=30.0)),
    "window": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, window=3, position=RoPEConfig(base=30.0, layout="interleaved")),
}
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)


def setup(cfg):
    torch.manual_seed(3)
    return randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# The checks. Each takes a configuration and raises AssertionError.


def hand_formula(cfg):
    module, x = setup(cfg)
    for seq in (Seq.rows(2, T), Seq.of_segments(SEG)):
        same(module(x, seq)[0], gqa_by_hand(module, cfg, x, seq), 1e-5)


def causality(cfg):
    module, x = setup(cfg)
    for t in range(1, T):
        changed = x.clone()
        changed[:, t] += 1
        assert torch.equal(module(x, Seq.rows(2, T))[0][:, :t], module(changed, Seq.rows(2, T))[0][:, :t])


def packed_equals_separate(cfg):
    module, x = setup(cfg)
    full = module(x, Seq.of_segments(SEG))[0]
    for row, a, b in [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]:
        same(full[row, a:b], module(x[row : row + 1, a:b], Seq.rows(1, b - a))[0][0])


def stream(module, x, seq, cuts):
    state, at, parts = module.init_state(2, 16, dtype=x.dtype), 0, []
    for n in cuts:
        parts.append(module(x[:, at : at + n], seq.window(at, at + n), state)[0])
        at += n
    return torch.cat(parts, 1)


def streamed_equals_whole(cfg):
    module, x = setup(cfg)
    for cuts in [(1,) * T, (3, 1, 2, 1, 1), (4, 4)]:
        same(stream(module, x, Seq.rows(2, T), cuts), module(x, Seq.rows(2, T))[0])


def streamed_packed_equals_whole(cfg):
    module, x = setup(cfg)
    seq, real = Seq.of_segments(SEG), SEG != 0
    for cuts in [(1,) * T, (3, 3, 2), (4, 1, 3)]:
        same(stream(module, x, seq, cuts)[real], module(x, seq)[0][real])


def ragged_prefill_then_decode(cfg):
    module, x = setup(cfg)
    lengths, state = torch.tensor([5, 2]), module.init_state(2, 16, dtype=x.dtype)
    module(x[:, :5], Seq.ragged(lengths, 5), state)
    steps = torch.cat([module(x[:, 5 + i : 6 + i], Seq((lengths + i)[:, None]), state)[0] for i in range(3)], 1)
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((x[row, :n], x[row, 5:]))[None]
        same(steps[row], module(whole, Seq.rows(1, n + 3))[0][0, n:])


LAWS = [causality, packed_equals_separate, streamed_equals_whole, streamed_packed_equals_whole, ragged_prefill_then_decode]


# The bugs


def no_document_mask(patch):
    patch.setattr(gqa, "visible", lambda seq, window, explicit: visible(Seq(seq.pos), window))


def sees_one_token_ahead(patch):
    def wrong(seq, window, explicit):
        mask = visible(seq, window)
        ahead = torch.ones(seq.pos.shape[1], seq.pos.shape[1], dtype=torch.bool).tril(1).triu(1)
        return ahead.logical_or(torch.ones_like(ahead).tril() if mask is None else mask)

    patch.setattr(gqa, "visible", wrong)


def phase_restarts_in_cached_decode(patch):
    right = RoPE.forward
    patch.setattr(RoPE, "forward", lambda self, q, k, seq: right(self, q, k, Seq.rows(*seq.pos.shape)))


def unrotated_keys(patch):
    right = RoPE.forward
    patch.setattr(RoPE, "forward", lambda self, q, k, seq: (right(self, q, k, seq)[0], k))


def window_one_too_wide(patch):
    right = GQA.__init__

    def wrong(self, d, h, g, k, cfg):
        right(self, d, h, g, k, cfg)
        self.window = cfg.window and cfg.window + 1

    patch.setattr(GQA, "__init__", wrong)


def no_scale(patch):
    patch.setattr(gqa, "attend", lambda q, k, v, mask, *more: attend(q, k, v, mask, scale=1.0))


def tiled_kv_heads(patch):
    wide = lambda x, n: x.repeat(1, n // x.shape[1], 1, 1)
    patch.setattr(gqa, "attend", lambda q, k, v, mask, *more: attend(q, wide(k, q.shape[1]), wide(v, q.shape[1]), mask))


def norm_after_rotation(patch):
    def wrong(self, x, seq):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.position(q, k, seq)
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    patch.setattr(GQA, "project", wrong)


def cache_ring_one_too_small(patch):
    def wrong(self, batch, max_len, *, device=None, dtype=None):
        slots = self.window - 1 if self.window else max_len
        return KVState.empty(batch, self.n_kv, slots, self.head_dim, self.head_dim, bool(self.window), device, dtype)

    patch.setattr(GQA, "init_state", wrong)


def padding_is_written_to_the_cache(patch):
    right = KVState._slot
    patch.setattr(KVState, "_slot", lambda self, pos, keep: right(self, pos, torch.ones_like(keep)))


def a_new_document_sees_the_old_cache(patch):
    patch.setattr(KVState, "_stored_positions", lambda self, last, seq: torch.arange(self.slots).expand(len(last), -1))


BUGS = {  # bug -> checks that must catch it; "hand_formula" alone = it passes every law
    no_document_mask: {"packed_equals_separate"},
    sees_one_token_ahead: {"causality"},
    phase_restarts_in_cached_decode: {"streamed_equals_whole"},
    unrotated_keys: {"hand_formula"},
    window_one_too_wide: {"hand_formula"},
    no_scale: {"hand_formula"},
    tiled_kv_heads: {"hand_formula"},
    norm_after_rotation: {"hand_formula"},
    cache_ring_one_too_small: {"streamed_equals_whole"},
    padding_is_written_to_the_cache: {"ragged_prefill_then_decode"},
    a_new_document_sees_the_old_cache: {"streamed_packed_equals_whole"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, [*LAWS, hand_formula], [(cfg,) for cfg in CONFIGS.values()], alone={"hand_formula"})
