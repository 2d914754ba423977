"""Planted bugs in heads: each must be caught, and by whom is part of the claim."""

import torch

from tests.golden import test_heads as golden
from tests.golden.planted import bug_tests
from zero2llm.core.batch import IGNORE
from zero2llm.core.seq import Seq
from zero2llm.model import heads
from zero2llm.model.heads import MTP, Depth, ScoreHead, inside, only, shifted
from zero2llm.train.objectives import clm, mtp


def scores():
    golden.check_scores()
    golden.test_a_score_is_one_product_and_starts_at_zero()


def labels():
    golden.check_labels()


def states():
    golden.check_states(("gqa",))


def loss():
    golden.check_loss()


def target_unseen():
    golden.check_no_depth_sees_its_target()


def embedded():
    golden.test_added_positions_and_scaled_embeddings_reach_the_depths()


CHECKS = [scores, labels, states, loss, target_unseen, embedded]


def run_with(patch, embedding, chain=True, seq_of=lambda seq, k: only(seq, inside(seq, k))):
    def wrong(self, embed, hidden, tokens, seq):
        found, at = [], hidden
        for k, depth in enumerate(self.depths, 1):
            at, _ = depth(at if chain else hidden, embedding(embed, tokens, seq, k), seq_of(seq, k))
            found.append(at)
        return found, {}

    patch.setattr(MTP, "forward", wrong)


def right_embedding(embed, tokens, seq, k):
    return embed(shifted(tokens, k, 0), Seq(shifted(seq.pos, k, 0)))


def halves_exchanged(patch):
    def wrong(self, hidden, ahead, seq):
        both = torch.cat((self.embed_norm(ahead), self.hidden_norm(hidden)), -1)
        x, aux = self.block(self.join_proj(both), seq)
        return self.final_norm(x), aux

    patch.setattr(Depth, "forward", wrong)


def embedding_not_shifted(patch):
    run_with(patch, lambda embed, tokens, seq, k: embed(tokens, seq))


def embedding_shifted_by_one_at_every_depth(patch):
    run_with(patch, lambda embed, tokens, seq, k: right_embedding(embed, tokens, seq, 1))


def embedding_of_the_target(patch):
    run_with(patch, lambda embed, tokens, seq, k: right_embedding(embed, tokens, seq, k + 1))


def embedding_with_the_position_of_i(patch):
    run_with(patch, lambda embed, tokens, seq, k: embed(shifted(tokens, k, 0), seq))


def every_depth_reads_the_trunk(patch):
    run_with(patch, right_embedding, chain=False)


def documents_forgotten(patch):
    run_with(patch, right_embedding, seq_of=lambda seq, k: Seq.rows(*seq.pos.shape))


def norm_of_the_state_missing(patch):
    def wrong(self, hidden, ahead, seq):
        x, aux = self.block(self.join_proj(torch.cat((hidden, self.embed_norm(ahead)), -1)), seq)
        return self.final_norm(x), aux

    patch.setattr(Depth, "forward", wrong)


def norm_before_the_head_missing(patch):
    right = Depth.__init__

    def wrong(self, *args):
        right(self, *args)
        self.final_norm = torch.nn.Identity()
        self.final_norm.weight = torch.nn.Parameter(torch.ones(8))

    patch.setattr(Depth, "__init__", wrong)


def labels_of_the_depth_before(patch):
    wrong = lambda y, seq, k: torch.where(inside(seq, k), shifted(y, k - 1, IGNORE), IGNORE)
    patch.setattr(golden, "labels_ahead", wrong)
    patch.setattr(mtp, "labels_ahead", wrong)


def labels_across_documents(patch):
    wrong = lambda y, seq, k: shifted(y, k, IGNORE)
    patch.setattr(golden, "labels_ahead", wrong)
    patch.setattr(mtp, "labels_ahead", wrong)


def last_columns_wrap_around(patch):
    patch.setattr(heads, "shifted", lambda x, k, fill: x.roll(-k, 1))


def summed_over_depths_instead_of_averaged(patch):
    right = clm.tokens_ahead

    def wrong(model, hidden, batch):
        total, metrics, aux = right(model, hidden, batch)
        return total * len(model.mtp.depths), metrics, aux

    patch.setattr(clm, "tokens_ahead", wrong)


def weight_forgotten(patch):
    right = clm.CLM.__init__
    patch.setattr(clm.CLM, "__init__", lambda self, weight=None: right(self, weight and 1.0))


def every_document_counts_as_target(patch):
    right = mtp.tokens_ahead

    def wrong(model, hidden, batch):
        total, metrics, aux = right(model, hidden, batch)
        return total, {"mtp": (metrics["mtp"][0], (batch.labels != IGNORE).sum() * len(model.mtp.depths))}, aux

    patch.setattr(clm, "tokens_ahead", wrong)


def score_of_the_last_column(patch):
    patch.setattr(golden, "row_scores", lambda s, seq: s[:, -1])


def padding_ends_a_text(patch):
    patch.setattr(heads, "text_ends", lambda seq: heads.shifted(torch.zeros_like(seq.pos) if seq.seg is None else seq.seg, 1, -1) != (0 if seq.seg is None else seq.seg))


def score_of_the_first_token(patch):
    def wrong(seq):
        first = seq.pos == 0
        return first if seq.seg is None else first & (seq.seg != 0)

    patch.setattr(heads, "text_ends", wrong)


def score_without_bias(patch):
    patch.setattr(ScoreHead, "forward", lambda self, hidden: hidden @ self.weight)


def score_starts_at_one(patch):
    right = ScoreHead.__init__

    def wrong(self, d):
        right(self, d)
        torch.nn.init.ones_(self.weight)

    patch.setattr(ScoreHead, "__init__", wrong)


def later_documents_land_in_the_last_place(patch):
    def wrong(scores, seq, n):
        ends = heads.text_ends(seq)
        column = torch.arange(scores.shape[1]) + 1
        nth = torch.where(ends, ends.cumsum(1).clamp(max=n), 0)
        where = torch.zeros(len(scores), n + 1, dtype=torch.long).scatter_add_(1, nth, column * ends)
        return heads._at(scores, where[:, 1:].clamp(max=scores.shape[1]))

    patch.setattr(golden, "document_scores", wrong)


BUGS = {
    halves_exchanged: {"states", "loss"},
    embedding_not_shifted: {"states", "target_unseen"},  # nothing moves where i + k should
    embedding_shifted_by_one_at_every_depth: {"states"},
    embedding_of_the_target: {"states", "target_unseen"},
    embedding_with_the_position_of_i: {"embedded"},
    every_depth_reads_the_trunk: {"states"},
    documents_forgotten: {"states"},
    norm_of_the_state_missing: {"states"},
    norm_before_the_head_missing: {"states"},
    labels_of_the_depth_before: {"labels", "loss"},
    labels_across_documents: {"labels", "loss"},
    last_columns_wrap_around: {"scores"},
    summed_over_depths_instead_of_averaged: {"loss"},
    weight_forgotten: {"loss"},
    every_document_counts_as_target: {"loss"},
    score_of_the_last_column: {"scores"},
    padding_ends_a_text: {"scores"},
    score_of_the_first_token: {"scores"},
    score_without_bias: {"scores"},
    score_starts_at_one: {"scores"},
    later_documents_land_in_the_last_place: {"scores"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS, also=(RuntimeError,))
