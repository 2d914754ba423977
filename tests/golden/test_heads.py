"""Heads by hand: which token is whose last, what each depth of multi-token prediction reads and must say, in loops."""

import math

import pytest
import torch

from tests.golden.test_layers import affine, randomised, rms_by_hand
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.lab.recipe import make_recipe
from zero2llm.model.cost import flops_per_token, parameters, train_flops_per_token
from zero2llm.model.heads import document_scores, inside, labels_ahead, row_scores, text_ends
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.train.objectives.clm import CLM

D, VOCAB, T = 8, 13, 10
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 3, 0], [4, 4, 5, 5, 5, 5, 5, 0, 0, 0]], dtype=torch.int32)
SEQS = {"packed": lambda: Seq.of_segments(SEG), "rows": lambda: Seq.rows(2, T), "ragged": lambda: Seq.ragged(torch.tensor([10, 4]), T)}
MIXERS = {
    "gqa": {"kind": "gqa", "n_heads": 2, "position": {"kind": "rope", "base": 50.0}},
    "retnet": {"kind": "retnet", "n_heads": 2, "chunk": 4},
}
EXACT = dict(atol=1e-11, rtol=0)


def language_model(depth=2, mixer="gqa", **more):
    block = {"mixer": MIXERS[mixer], "ffn": {"kind": "glu", "hidden": 12}, "norm": {"kind": "rms", "eps": 0.1}}
    data = {"vocab_size": VOCAB, "d_model": D, "max_len": 32, "layers": {"pattern": ["b"]}, "blocks": {"b": block}}
    return randomised(LM(parse(ModelConfig, data | {"mtp": {"depth": depth}, "final_norm": {"kind": "rms", "eps": 0.1}} | more)))


def documents(seq):
    """(row, columns of one document in order), for every document of the batch."""
    seg = torch.ones_like(seq.pos) if seq.seg is None else seq.seg
    return [(b, [t for t in range(T) if seg[b, t] == n]) for b in range(2) for n in sorted({n for n in seg[b].tolist() if n})]


def batch(seq):
    tokens = torch.randint(0, VOCAB, (2, T))
    return Batch.shifted(tokens, torch.ones_like(tokens), seq)


# Scores


def test_ends_of_texts():
    assert text_ends(SEQS["packed"]()).nonzero().tolist() == [[0, 4], [0, 7], [0, 8], [1, 1], [1, 6]]
    assert text_ends(SEQS["rows"]()).nonzero().tolist() == [[0, 9], [1, 9]]
    assert text_ends(SEQS["ragged"]()).nonzero().tolist() == [[0, 9], [1, 3]]


def check_scores():
    scores = torch.arange(20.0).view(2, T) + 0.5
    for name, by_row, by_document in [
        ("packed", [8.5, 16.5], [[4.5, 7.5, 8.5, 0], [11.5, 16.5, 0, 0]]),
        ("rows", [9.5, 19.5], [[9.5, 0, 0, 0], [19.5, 0, 0, 0]]),
        ("ragged", [9.5, 13.5], [[9.5, 0, 0, 0], [13.5, 0, 0, 0]]),
    ]:
        assert row_scores(scores, SEQS[name]()).tolist() == by_row
        assert document_scores(scores, SEQS[name](), 4).tolist() == by_document
        assert document_scores(scores, SEQS[name](), 1).tolist() == [[row[0]] for row in by_document]
    left = Seq.of_segments(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2], [0] * 10]))
    assert row_scores(scores, left).tolist() == [9.5, 0.0] and document_scores(scores, left, 2).tolist() == [[7.5, 9.5], [0, 0]]


def test_scores_of_rows_and_documents():
    check_scores()


def test_a_score_is_one_product_and_starts_at_zero():
    cfg = language_model(score_head=True).cfg
    model, x = LM(cfg), torch.randint(0, VOCAB, (2, T))
    assert (model.score(model(x, Seq.rows(2, T))[0]) == 0).all()
    model = randomised(model)
    hidden = model(x, Seq.rows(2, T))[0]
    w, b = model.score.weight.tolist(), model.score.bias.item()
    expected = [[math.fsum(u * v for u, v in zip(h, w, strict=True)) + b for h in row] for row in hidden.tolist()]
    torch.testing.assert_close(model.score(hidden), torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert model.score(hidden.bfloat16()).dtype == torch.float32


def test_a_padded_row_scores_as_the_row_alone():
    model = language_model(score_head=True)
    x, seq = torch.randint(0, VOCAB, (2, T)), SEQS["packed"]()
    found = document_scores(model.score(model(x, seq)[0]), seq, 3)
    for b, columns in documents(seq):
        n = [c for _, c in documents(seq) if _ == b].index(columns)
        alone = x[b : b + 1, columns]
        expected = row_scores(model.score(model(alone, Seq.rows(1, len(columns)))[0]), Seq.rows(1, len(columns)))
        torch.testing.assert_close(found[b, n], expected[0], **EXACT)


def test_score_parameters_learn_without_decay():
    model = language_model(score_head=True)
    optim = build_optim(model, AdamWConfig(weight_decay=0.1))
    groups = {optim.names[id(p)]: g["weight_decay"] for g in optim.groups for p in g["params"]}
    assert groups["score.weight"] == groups["score.bias"] == 0.0 and groups["mtp.depths.1.join_proj.weight"] == 0.1


# Multi-token prediction


def check_labels():
    """Which label each position has at each depth, from the documents as lists of tokens."""
    for name in SEQS:
        seq = SEQS[name]()
        made = batch(seq)
        for k in (1, 2, 3):
            expected = torch.full((2, T), IGNORE)
            for b, columns in documents(seq):
                text = made.tokens[b, columns].tolist()
                for i, column in enumerate(columns):
                    if i + k + 1 < len(text):
                        expected[b, column] = text[i + k + 1]
            assert torch.equal(labels_ahead(made.labels, seq, k), expected), (name, k)


def test_labels_of_every_depth():
    check_labels()


def test_labels_that_carry_no_loss_stay_so():
    """Fine-tuning: a prompt's tokens are no target at any depth."""
    tokens, trainable = torch.arange(T).expand(2, T), torch.zeros(2, T, dtype=torch.long)
    trainable[:, 6:] = 1
    made = Batch.shifted(tokens, trainable, Seq.rows(2, T))
    for k in (1, 2):
        expected = [i + k + 1 if 6 <= i + k + 1 < T else IGNORE for i in range(T)]
        assert labels_ahead(made.labels, made.seq, k)[0].tolist() == expected


def states_by_hand(model, tokens):
    """States of each depth for one document (n,) alone: loops up to the block, which reads only tokens that take part."""
    n = len(tokens)
    hidden = model(tokens[None], Seq.rows(1, n))[0][0].tolist()
    found = []
    for k, depth in enumerate(model.mtp.depths, 1):
        if n <= k:
            break
        z = []
        for i in range(n - k):
            a = rms_by_hand(hidden[i], depth.hidden_norm.weight.tolist(), 0.1)
            b = rms_by_hand(model.embed.weight[tokens[i + k]].tolist(), depth.embed_norm.weight.tolist(), 0.1)
            z.append(affine(depth.join_proj, a + b))
        out = depth.block(torch.tensor(z, dtype=torch.float64)[None], Seq.rows(1, n - k))[0][0].tolist()
        hidden = [rms_by_hand(h, depth.final_norm.weight.tolist(), 0.1) for h in out]
        found.append(torch.tensor(hidden, dtype=torch.float64))
    return found


def check_states(mixers=tuple(MIXERS)):
    for mixer in mixers:
        for name in SEQS:
            model, seq, tokens = language_model(3, mixer), SEQS[name](), torch.randint(0, VOCAB, (2, T))
            states, _ = model.ahead(model(tokens, seq)[0], tokens, seq)
            assert all(torch.isfinite(s).all() for s in states), "0 * NaN is NaN"
            for b, columns in documents(seq):
                for k, expected in enumerate(states_by_hand(model, tokens[b, columns]), 1):
                    got = states[k - 1][b, columns[: len(columns) - k]]
                    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)  # rotary angles are fp32


def test_states_of_every_depth():
    check_states()


def check_loss():
    model, seq = language_model(2), SEQS["packed"]()
    made = batch(seq)
    main, further, count = 0.0, 0.0, 0
    for b, columns in documents(seq):
        tokens = made.tokens[b, columns]
        logp = model.logits(model(tokens[None], Seq.rows(1, len(tokens)))[0])[0].log_softmax(-1)
        main -= sum(logp[i, tokens[i + 1]].item() for i in range(len(tokens) - 1))
        for k, hidden in enumerate(states_by_hand(model, tokens), 1):
            ahead = (hidden @ model.embed.weight.T).log_softmax(-1)
            targets = range(len(tokens) - k - 1)
            further -= sum(ahead[i, tokens[i + k + 1]].item() for i in targets)
            count += len(targets)
    loss = CLM(0.4)(model, made)
    assert loss.total.item() == pytest.approx(main + 0.4 / 2 * further, rel=1e-6)
    assert loss.count == (made.labels != IGNORE).sum() and loss.metrics["loss"][0].item() == pytest.approx(main, rel=1e-6)
    assert loss.metrics["mtp"][0].item() == pytest.approx(further, rel=1e-6) and loss.metrics["mtp"][1] == count


def test_the_loss_by_hand():
    check_loss()


def check_no_depth_sees_its_target():
    """States of depth k at i depend on tokens up to i + k, which they read, and on none later: i + k + 1 is the target."""
    for mixer in MIXERS:
        model, tokens = language_model(2, mixer), torch.randint(0, VOCAB, (1, T))
        run = lambda x, m=model: m.ahead(m(x, Seq.rows(1, T))[0], x, Seq.rows(1, T))[0]
        before = run(tokens)
        for t in range(T):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % VOCAB
            for k, (a, b) in enumerate(zip(before, run(other), strict=True), 1):
                moved = (a != b).any(-1)[0, : T - k]
                assert not moved[: max(t - k, 0)].any(), (t, k)
                assert t < k or moved[t - k], (t, k)


def test_no_depth_sees_its_target():
    check_no_depth_sees_its_target()


def test_a_document_too_short_for_a_depth_takes_no_part():
    seq = Seq.of_segments(torch.tensor([[1, 2, 2, 3, 3, 3, 0, 0, 0, 0]]))
    assert [inside(seq, k)[0].nonzero().flatten().tolist() for k in (1, 2, 3)] == [[1, 3, 4], [3], []]
    model = language_model(3)
    made = Batch.shifted(torch.randint(0, VOCAB, (1, T)), torch.ones(1, T, dtype=torch.long), seq)
    CLM(1.0)(model, made).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_every_parameter_of_every_depth_learns_and_the_trunk_learns_from_them():
    model, made = language_model(2), batch(SEQS["rows"]())
    CLM(0.5)(model, made).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    both = model.blocks[0].mixer.q_proj.weight.grad.clone()
    model.zero_grad()
    CLM()(model, made).total.backward()
    assert not torch.allclose(both, model.blocks[0].mixer.q_proj.weight.grad)
    assert all(p.grad is None for p in model.mtp.parameters())


def test_next_token_predictions_are_those_of_the_model_without_depths():
    model = language_model(2)
    plain = LM(parse(ModelConfig, to_dict(model.cfg) | {"mtp": None})).double()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("mtp.")})
    x, seq = torch.randint(0, VOCAB, (2, T)), SEQS["packed"]()
    assert torch.equal(model(x, seq)[0], plain(x, seq)[0])


def test_added_positions_and_scaled_embeddings_reach_the_depths():
    """The embedding of token i + k is the model's own, with the position it stands at."""
    more = {"position": {"kind": "learned"}, "embed_scale": 3.0, "embed_norm": {"kind": "layer"}}
    model, x = language_model(1, **more), torch.randint(0, VOCAB, (1, T))
    read = []
    model.mtp.depths[0].embed_norm.register_forward_hook(lambda m, args, out: read.append(args[0]))
    model.ahead(model(x, Seq.rows(1, T))[0], x, Seq.rows(1, T))
    torch.testing.assert_close(read[0][:, :-1], model.embedded(x, Seq.rows(1, T))[:, 1:], **EXACT)


def test_the_depths_of_a_narrow_base_are_scaled_as_the_model():
    init = {"kind": "mup", "base_width": 4, "base_head_dim": 4}
    model, x = language_model(1, init=init), torch.randint(0, VOCAB, (1, T))
    raw = []
    model.mtp.depths[0].final_norm.register_forward_hook(lambda m, args, out: raw.append(out))
    states, _ = model.ahead(model(x, Seq.rows(1, T))[0], x, Seq.rows(1, T))
    torch.testing.assert_close(states[0], raw[0] / 2, **EXACT)


@pytest.mark.parametrize("mixer", MIXERS)
def test_cost_counts_what_is_built(mixer):
    for more in ({}, {"tie_embeddings": False, "score_head": True}, {"mtp": {"depth": 1, "block": {"mixer": {"kind": "gqa", "n_heads": 4}, "norm": {"kind": "layer"}}}}):
        model = language_model(2, mixer, **more)
        count = parameters(model.cfg)
        assert count["total"] == sum(p.numel() for p in model.parameters()) == sum(count["by_component"].values())
        assert count["by_component"]["mtp"] == sum(p.numel() for p in model.mtp.parameters())
        assert count["active"] == count["total"] - count["by_component"]["mtp"]
    plain, ahead = (language_model(d, mixer).cfg if d else parse(ModelConfig, to_dict(language_model(1, mixer).cfg) | {"mtp": None}) for d in (0, 2))
    assert flops_per_token(plain, 16) == flops_per_token(ahead, 16), "decoding does not run the depths"
    joined = 2 * (4 * D * D + 2 * VOCAB * D)  # two depths; their blocks are as costly as the model's one
    extra = (train_flops_per_token(ahead, 16) - train_flops_per_token(plain, 16)) / 3
    assert extra == 2 * (flops_per_token(plain, 16) - 2 * VOCAB * D) + joined


def test_depths_can_be_trained_by_a_recipe_and_are_refused_where_they_cannot():
    keys = {"out": "x", "data": {"train": ["embedded"]}, "tokenizer": {"path": "x"}, "fit": {"steps": 1}}
    with_depths = {"preset": "llama-nano", "mtp": {"depth": 1}}
    recipe = make_recipe(**keys, model=with_depths, objective={"kind": "clm", "mtp_weight": 0.3})
    assert isinstance(recipe.objective.build(), CLM) and recipe.objective.build().mtp_weight == 0.3
    for model, objective, reason in [
        (with_depths, {"kind": "clm"}, "give the weight, or nothing trains the depths"),
        ({"preset": "llama-nano"}, {"kind": "clm", "mtp_weight": 0.3}, "the model has no depths"),
        (with_depths, {"kind": "clm", "mtp_weight": 0.0}, "mtp_weight = 0.0 must be positive"),
        ({"preset": "llama-nano", "mtp": {"depth": 0}}, {"kind": "clm", "mtp_weight": 0.3}, "mtp.depth = 0"),
    ]:
        with pytest.raises(ValueError, match=reason):
            make_recipe(**keys, model=model, objective=objective)
    with pytest.raises(ValueError, match="built without `mtp`"):
        CLM(0.3)(LM(parse(ModelConfig, to_dict(language_model(1).cfg) | {"mtp": None})), batch(Seq.rows(2, T)))
