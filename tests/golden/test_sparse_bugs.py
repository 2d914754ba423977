"""Planted bugs in latent and sparse attention: each must be caught, and by whom is part of the claim."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch

from tests.golden import test_mla, test_sparse
from tests.golden.planted import caught_by, must_catch
from tests.golden.test_layers import randomised
from tests.golden.test_sparse import DOCUMENTS, DSA, MOBA, NSA, SEG, D, T
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers import dsa, mla, moba, nsa
from zero2llm.layers.norms.layer import LayerNorm
from zero2llm.layers.norms.rms import RMSNorm
from zero2llm.layers.positions.rope import RoPE, RoPEConfig
from zero2llm.ops import sparse_attend
from zero2llm.ops.attend import attend, visible
from zero2llm.ops.sparse_attend import Blocks, attend_one, best, summaries

FAMILIES = {"mla": {name: test_mla.CONFIGS[name] for name in ("query latent", "interleaved")}, "moba": MOBA, "nsa": NSA, "dsa": DSA}


def setup(cfg):
    torch.manual_seed(3)
    return randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# The checks. Each takes a configuration and raises AssertionError.


def worked(cfg, doc):
    return test_mla.mla_by_hand(*doc)[0] if cfg.kind == "mla" else test_sparse.by_hand(*doc)


@cache
def hand_results(cfg):
    """Outputs of the documents (and of row 0 as one) and the indexer's loss; they read parameters, no code under test."""
    module, x = setup(cfg)
    documents = [(0, 0, T), *DOCUMENTS]
    out = [torch.tensor(worked(cfg, (module, cfg, x[row, a:b].tolist())), dtype=x.dtype) for row, a, b in documents]
    loss = [test_sparse.index_loss_by_hand(module, cfg, x[row, a:b].tolist()) for row, a, b in DOCUMENTS] if cfg.kind == "dsa" else []
    return out, [value for document in loss for value in document]


for _family in FAMILIES.values():
    for _cfg in _family.values():
        hand_results(_cfg)  # before any bug is planted


def hand_formula(cfg):
    module, x = setup(cfg)
    (row, *documents), _ = hand_results(cfg)
    same(module(x, Seq.rows(2, T))[0][0], row, 2e-5)
    packed = module(x, Seq.of_segments(SEG))[0]
    for (row, a, b), expected in zip(DOCUMENTS, documents, strict=True):
        same(packed[row, a:b], expected, 2e-5)


def loss_by_hand(cfg):
    if cfg.kind == "dsa":
        module, x = setup(cfg)
        expected = hand_results(cfg)[1]
        same(module(x, Seq.of_segments(SEG))[1]["indexer_loss"].item(), sum(expected) / len(expected), 2e-5)


def gradients_stay_apart(cfg):
    """The indexer learns from its loss alone, and nothing else does."""
    if cfg.kind == "dsa":
        module, x = setup(cfg)
        x.requires_grad_()
        y, aux = module(x, Seq.rows(2, T))
        inside = [x, *module.mla.parameters()]
        found = torch.autograd.grad(aux["indexer_loss"], inside, allow_unused=True, retain_graph=True)
        assert all(g is None for g in found)
        assert all(g is None for g in torch.autograd.grad(y.sum(), list(module.indexer.parameters()), allow_unused=True))


def causality(cfg):
    module, x = setup(cfg)
    full = module(x, Seq.rows(2, T))[0]
    for t in range(1, T, 2):
        changed = x.clone()
        changed[:, t] += 1
        assert torch.equal(full[:, :t], module(changed, Seq.rows(2, T))[0][:, :t])


def packed_equals_separate(cfg):
    module, x = setup(cfg)
    full = module(x, Seq.of_segments(SEG))[0]
    for row, a, b in DOCUMENTS:
        same(full[row, a:b], module(x[row : row + 1, a:b], Seq.rows(1, b - a))[0][0])


def stream(module, x, seq, cuts):
    state, at, parts = module.init_state(2, 17, dtype=x.dtype), 0, []
    for n in cuts:
        parts.append(module(x[:, at : at + n], seq.window(at, at + n), state)[0])
        at += n
    return torch.cat(parts, 1)


CUTS = [(1,) * T, (7, 1, 2, 4)]


def streamed_equals_whole(cfg):
    module, x = setup(cfg)
    for cuts in CUTS:
        same(stream(module, x, Seq.rows(2, T), cuts), module(x, Seq.rows(2, T))[0])


def streamed_packed_equals_whole(cfg):
    module, x = setup(cfg)
    seq, real = Seq.of_segments(SEG), SEG != 0
    for cuts in CUTS:
        same(stream(module, x, seq, cuts)[real], module(x, seq)[0][real])


def ragged_prefill_then_decode(cfg):
    module, x = setup(cfg)
    lengths, state = torch.tensor([7, 5]), module.init_state(2, 16, dtype=x.dtype)
    module(x[:, :7], Seq.ragged(lengths, 7), state)
    steps = torch.cat([module(x[:, 7 + i : 8 + i], Seq((lengths + i)[:, None]), state)[0] for i in range(7)], 1)
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((x[row, :n], x[row, 7:]))[None]
        same(steps[row], module(whole, Seq.rows(1, n + 7))[0][0, n:])


LAWS = [causality, packed_equals_separate, streamed_equals_whole, streamed_packed_equals_whole, ragged_prefill_then_decode]


CHECKS = [*LAWS, hand_formula, loss_by_hand, gradients_stay_apart]
CASES = {family: [(cfg,) for cfg in cfgs.values()] for family, cfgs in FAMILIES.items()}


# Bugs in latent attention


def absorbed_scale_uses_the_rank(patch):
    patch.setattr(mla, "attend_one", lambda q, k, v, kept, most, scale: attend_one(q, k, v, kept, most, k.shape[-1] ** -0.5))


def no_scale(patch):
    patch.setattr(mla, "attend", lambda q, k, v, mask, scale: attend(q, k, v, mask, 1.0))
    patch.setattr(mla, "attend_one", lambda q, k, v, kept, most, scale: attend_one(q, k, v, kept, most, 1.0))


def scale_of_the_unrotated_part_alone(patch):
    patch.setattr(mla.MLAConfig, "score_scale", property(lambda self: self.nope_dim**-0.5))


def shared_key_unrotated(patch):
    right = RoPE.forward
    patch.setattr(RoPE, "forward", lambda self, q, k, seq: (right(self, q, k, seq)[0], k))


def latent_not_normed(patch):
    patch.setattr(RMSNorm, "forward", lambda self, x: x * self.weight)


def values_before_keys_in_the_unpacking(patch):
    def wrong(self, entry):
        latent, k_rope = entry[:, 0].split((self.rank, self.rope), -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.v_dim)).transpose(1, 2)
        v, k_nope = kv.split((self.v_dim, self.nope), -1)
        return torch.cat((k_nope, k_rope[:, None].expand(-1, kv.shape[1], -1, -1)), -1), v

    patch.setattr(mla.MLA, "unpack", wrong)


def phase_restarts_in_cached_decode(patch):
    right = RoPE.forward
    patch.setattr(RoPE, "forward", lambda self, q, k, seq: right(self, q, k, Seq.rows(*seq.pos.shape)))


def no_document_mask(patch):
    for module in (mla, moba, nsa, dsa):
        patch.setattr(module, "visible", lambda seq, *more: visible(Seq(seq.pos), None, True))


def sees_one_token_ahead(patch):
    def wrong(seq, window=None, explicit=True):
        mask = visible(seq, window, True)
        return mask | torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril(1).triu(1)

    for module in (mla, moba, nsa, dsa):
        patch.setattr(module, "visible", wrong)


# Bugs in blocks


def replace_blocks(patch, change):
    """What both block mechanisms are told of blocks, changed."""
    for module in (moba, nsa):
        patch.setattr(module, "summaries", lambda x, seq, size, stride, *more: change(summaries(x, seq, size, stride, *more), seq, size))


def blocks_known_from_their_first_token(patch):
    def change(blocks, seq, size):
        seen = blocks.seen.clone()
        seen[:, : -(size - 1) or None] |= blocks.seen[:, size - 1 :]
        return Blocks(blocks.x, blocks.number - 1, seen)

    replace_blocks(patch, change)


def blocks_of_other_documents(patch):
    def change(blocks, seq, size):
        return blocks._replace(seen=blocks.seen | blocks.seen.any(1, keepdim=True).expand_as(blocks.seen).cumsum(2).bool())

    replace_blocks(patch, change)


def blocks_counted_along_the_row(patch):
    wrong = lambda seq: torch.arange(seq.pos.shape[1]).expand_as(seq.pos)
    for module in (moba, nsa, sparse_attend):
        patch.setattr(module, "places", wrong)


def memory_forgets_the_open_block(patch):
    right = sparse_attend._remember

    def wrong(new, last, long, seq, size, stride, memory):
        out = right(new, last, long, seq, size, stride, memory)
        memory["tail"].zero_()
        return out

    patch.setattr(sparse_attend, "_remember", wrong)


def padding_moves_the_open_block(patch):
    patch.setattr(sparse_attend, "real_tokens", lambda seq: torch.ones_like(seq.pos, dtype=torch.bool))


def a_new_document_sees_old_blocks(patch):
    right = sparse_attend._remember

    def wrong(new, last, long, seq, size, stride, memory):
        out = right(new, last, long, seq, size, stride, memory)
        slots = memory["stored"].shape[1] - 1
        written = (memory["stored"][:, :slots] != 0).any(-1)[:, None]
        return out._replace(seen=torch.cat((out.seen[..., :slots] | written, out.seen[..., slots:]), 2))

    patch.setattr(sparse_attend, "_remember", wrong)


def decoding_gathers_one_key_too_few(patch):
    for module in (sparse_attend, mla):
        patch.setattr(module, "attend_one", lambda q, k, v, kept, most, *more: attend_one(q, k, v, kept, most - 1, *more))


# Bugs in MoBA


def own_block_does_not_count(patch):
    patch.setattr(moba, "best", lambda scores, k, seen: best(scores, k + 1, seen))


def one_choice_for_all_heads(patch):
    patch.setattr(moba, "best", lambda scores, k, seen: best(scores.mean(1, keepdim=True).expand_as(scores), k, seen))


def worst_blocks(patch):
    patch.setattr(moba, "best", lambda scores, k, seen: best(-scores, k, seen))


def heads_read_another_group(patch):
    right = moba.MoBA.choose
    patch.setattr(moba.MoBA, "choose", lambda self, q, *more: right(self, q.flip(1), *more))


def own_block_optional(patch):
    right = moba.MoBA.choose

    def wrong(self, q, means, own, n):
        kept = right(self, q, means, own, n)
        return kept & ~((torch.arange(n) == own[..., None])[:, None] & (kept.sum(-1, keepdim=True) > 1))

    patch.setattr(moba.MoBA, "choose", wrong)


# Bugs in NSA


def importance_of_one_head(patch):
    right = nsa.NSA.compressed

    def wrong(self, q, blocks):
        o, p = right(self, q, blocks)
        group = p.shape[1] // self.n_kv
        return o, p * (torch.arange(p.shape[1]) % group == 0).view(1, -1, 1, 1)

    patch.setattr(nsa.NSA, "compressed", wrong)


def summaries_count_for_their_first_block_alone(patch):
    patch.setattr(nsa, "overlap", lambda number, size, stride, block, n: (number[..., None] * stride // block == torch.arange(n)).long())


def no_forced_blocks(patch):
    def wrong(scores, k, seen):
        own = seen & ~torch.nn.functional.pad(seen[..., 1:], (0, 1))
        return best(scores.masked_fill(scores.isinf() & ~own, 0.0), k, seen)

    patch.setattr(nsa, "best", wrong)


def gates_compete(patch):
    patch.setattr(torch.Tensor, "sigmoid", lambda self: self.unflatten(-1, (-1, 3)).softmax(-1).flatten(-2))


def summary_rotated_as_its_last_token(patch):
    right = nsa.NSA.summarise
    patch.setattr(nsa.NSA, "summarise", lambda self, raw, start: right(self, raw, start + self.span - 1 + (self.span == 1)))


def no_places_inside_a_block(patch):
    right = nsa.Summary.forward
    patch.setattr(nsa.Summary, "forward", lambda self, x: right(self, x - self.places))


def early_tokens_read_summaries_that_do_not_exist(patch):
    def wrong(self, q, blocks):
        k, v = blocks.x.unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4).repeat_interleave(q.shape[1] // self.n_kv, 2)
        p = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~blocks.seen[:, None], -1e300).softmax(-1)
        return p @ v, p

    patch.setattr(nsa.NSA, "compressed", wrong)


def window_one_too_wide(patch):
    right = nsa.NSA.__init__

    def wrong(self, d_model, cfg):
        right(self, d_model, cfg)
        self.window += 1

    patch.setattr(nsa.NSA, "__init__", wrong)


# Bugs in DSA


def chosen_before_the_causal_mask(patch):
    def wrong(scores, k, seen):
        own = torch.eye(*scores.shape[-2:], dtype=torch.bool)
        return best(scores, k, torch.ones_like(seen)) & seen | (own & seen if seen.shape[-2] == seen.shape[-1] else seen)

    patch.setattr(dsa, "best", wrong)


def negative_scores_count(patch):
    patch.setattr(dsa, "index_scores", lambda q, k, w: (w * (q @ k.transpose(-1, -2))).sum(1, keepdim=True))


def heads_of_the_indexer_unweighted(patch):
    patch.setattr(dsa, "index_scores", lambda q, k, w: (q @ k.transpose(-1, -2)).relu().sum(1, keepdim=True))


def index_key_not_centred(patch):
    patch.setattr(LayerNorm, "forward", lambda self, x: torch.rms_norm(x, x.shape[-1:], self.weight, self.eps) + self.bias)


def indexer_rotates_neighbours(patch):
    interleaved = lambda self: RoPEConfig(base=30.0, layout="interleaved", rotary_dim=4) if isinstance(self.mla.position, RoPEConfig) else self.mla.position
    patch.setattr(dsa.DSAConfig, "index_position", property(interleaved))


def indexer_takes_gradients_from_the_model(patch):
    patch.setattr(torch.Tensor, "detach", lambda self: self)


def model_learns_from_the_indexer_s_loss(patch):
    right = dsa.DSA.forward

    def wrong(self, *args):
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(torch, "no_grad", nullcontext)
            return right(self, *args)

    patch.setattr(dsa.DSA, "forward", wrong)


def divergence_the_wrong_way_round(patch):
    right = dsa.index_loss

    def wrong(scores, p, kept, seq):
        q = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        return right(p.clamp(min=1e-30).log(), q, kept, seq)

    patch.setattr(dsa, "index_loss", wrong)


def padding_counts_in_the_loss(patch):
    patch.setattr(dsa, "real_tokens", lambda seq: torch.ones_like(seq.pos, dtype=torch.bool))


def index_keys_are_not_remembered(patch):
    right = dsa.KVState.extend

    def wrong(self, k, v, seq, window):
        seen = right(self, k, v, seq, window)
        return seen._replace(v=torch.cat((0 * seen.v[:, :, : -v.shape[2]], seen.v[:, :, -v.shape[2] :]), 2))

    patch.setattr(dsa.KVState, "extend", wrong)


def selection_behind_the_softmax(patch):
    def wrong(q, k, v, kept, scale):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return ((q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf).softmax(-1) * kept) @ v

    patch.setattr(dsa, "attend", wrong)


BY_HAND = {"hand_formula"}  # alone: the bug passes every law
BUGS = {  # (family, bug) -> checks that must catch it
    ("mla", absorbed_scale_uses_the_rank): {"streamed_equals_whole", "ragged_prefill_then_decode"},
    ("mla", no_scale): BY_HAND,
    ("mla", scale_of_the_unrotated_part_alone): BY_HAND,
    ("mla", shared_key_unrotated): BY_HAND,
    ("mla", latent_not_normed): BY_HAND,
    ("mla", values_before_keys_in_the_unpacking): {"hand_formula", "streamed_equals_whole"},
    ("mla", phase_restarts_in_cached_decode): {"streamed_equals_whole"},
    ("mla", no_document_mask): {"packed_equals_separate"},
    ("mla", sees_one_token_ahead): {"causality"},
    ("moba", no_document_mask): {"packed_equals_separate"},
    ("moba", sees_one_token_ahead): {"causality"},
    ("moba", shared_key_unrotated): BY_HAND,
    ("moba", blocks_of_other_documents): {"packed_equals_separate"},
    ("moba", blocks_counted_along_the_row): {"packed_equals_separate"},
    ("moba", memory_forgets_the_open_block): {"streamed_equals_whole"},
    ("moba", padding_moves_the_open_block): {"ragged_prefill_then_decode"},
    ("moba", decoding_gathers_one_key_too_few): {"streamed_equals_whole"},
    ("moba", own_block_does_not_count): {"hand_formula", "streamed_equals_whole"},
    ("moba", one_choice_for_all_heads): BY_HAND,
    ("moba", worst_blocks): BY_HAND,
    ("moba", heads_read_another_group): BY_HAND,
    ("moba", own_block_optional): {"hand_formula"},
    ("nsa", no_document_mask): {"packed_equals_separate"},
    ("nsa", sees_one_token_ahead): {"causality"},
    ("nsa", blocks_known_from_their_first_token): {"causality"},
    ("nsa", blocks_of_other_documents): {"packed_equals_separate"},
    ("nsa", blocks_counted_along_the_row): {"packed_equals_separate"},
    ("nsa", memory_forgets_the_open_block): {"streamed_equals_whole"},
    ("nsa", padding_moves_the_open_block): {"ragged_prefill_then_decode"},
    ("nsa", a_new_document_sees_old_blocks): {"streamed_packed_equals_whole"},
    ("nsa", importance_of_one_head): BY_HAND,
    ("nsa", summaries_count_for_their_first_block_alone): BY_HAND,
    ("nsa", no_forced_blocks): BY_HAND,
    ("nsa", gates_compete): BY_HAND,
    ("nsa", summary_rotated_as_its_last_token): BY_HAND,
    ("nsa", no_places_inside_a_block): BY_HAND,
    ("nsa", early_tokens_read_summaries_that_do_not_exist): {"hand_formula", "causality"},
    ("nsa", window_one_too_wide): BY_HAND,
    ("dsa", no_document_mask): {"packed_equals_separate"},
    ("dsa", sees_one_token_ahead): {"causality"},
    ("dsa", chosen_before_the_causal_mask): {"causality"},
    ("dsa", negative_scores_count): BY_HAND | {"loss_by_hand"},
    ("dsa", heads_of_the_indexer_unweighted): BY_HAND | {"loss_by_hand"},
    ("dsa", index_key_not_centred): BY_HAND | {"loss_by_hand"},
    ("dsa", indexer_rotates_neighbours): BY_HAND | {"loss_by_hand"},
    ("dsa", indexer_takes_gradients_from_the_model): {"gradients_stay_apart"},
    ("dsa", model_learns_from_the_indexer_s_loss): {"gradients_stay_apart"},
    ("dsa", divergence_the_wrong_way_round): {"loss_by_hand"},
    ("dsa", padding_counts_in_the_loss): {"loss_by_hand"},
    ("dsa", index_keys_are_not_remembered): {"streamed_equals_whole"},
    ("dsa", decoding_gathers_one_key_too_few): {"streamed_equals_whole"},
    ("dsa", selection_behind_the_softmax): {"hand_formula", "streamed_equals_whole"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_bug_every_check_holds(family):
    assert caught_by(CHECKS, CASES[family]) == set()


@pytest.mark.parametrize(("family", "bug"), BUGS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_planted_bug_is_caught(family, bug, monkeypatch):
    bug(monkeypatch)
    must_catch(BUGS[family, bug], CHECKS, CASES[family], alone=BY_HAND)
