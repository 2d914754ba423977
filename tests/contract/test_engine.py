"""Generation: cached decoding equals the full forward, requests do not disturb each other, stops are clean."""

from __future__ import annotations

import pytest
import torch

from tests.contract.test_fit import tiny
from zero2llm.core.seq import Seq
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.lab.talk import chat_prompt, stream_answer
from zero2llm.tokenizers.tokenizer import Tokenizer

PROMPTS = ["the cat", "a", "over the dark water and far away", "你好 世界"]
GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    tokenizer = Tokenizer.train(["the cat sat over the dark water and far away 你好 世界 whales swim deeply below ships " * 20], 300)
    torch.manual_seed(0)
    model = tiny(vocab=300, max_len=64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return Engine(model, tokenizer)


def greedy_by_full_forward(engine: Engine, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            x = torch.tensor([ids])
            hidden, _ = engine.model(x, Seq.rows(1, len(ids)))
            ids.append(int(engine.model.logits(hidden)[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_batch_equals_full_forward_row_by_row(engine):
    done = engine.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.tokens == greedy_by_full_forward(engine, engine.tokenizer.encode(prompt), 12)
        assert completion.finish == "length" and completion.text == engine.tokenizer.decode(completion.tokens)


def test_a_seeded_request_does_not_depend_on_its_neighbours(engine):
    one = Sampling(temperature=1.0, top_p=0.9, max_tokens=10, seed=7, ignore_eos=True)
    alone = engine.generate([PROMPTS[1]], one)[0].tokens
    others = [Sampling(temperature=0.5, top_k=3, max_tokens=4), one, GREEDY, Sampling(min_p=0.2, seed=1, max_tokens=9)]
    assert engine.generate(PROMPTS, others)[1].tokens == alone
    assert engine.generate([PROMPTS[1]], one)[0].tokens == alone
    other_seed = Sampling(temperature=1.0, top_p=0.9, max_tokens=10, seed=8, ignore_eos=True)
    assert engine.generate([PROMPTS[1]], other_seed)[0].tokens != alone


def test_more_requests_than_rows(engine):
    small = Engine(engine.model, engine.tokenizer, max_batch=2)
    assert [c.tokens for c in small.generate(PROMPTS, GREEDY)] == [c.tokens for c in engine.generate(PROMPTS, GREEDY)]


def read_by(monkeypatch, engine):
    """Rows of every prefill that follows."""
    rows, forward = [], engine.model.forward
    keep = lambda tokens, seq, states=None: (tokens.shape[1] > 1 and rows.append(len(tokens))) or forward(tokens, seq, states)
    monkeypatch.setattr(engine.model, "forward", keep)
    return rows


def test_a_prompt_that_requests_share_is_read_once(engine, monkeypatch):
    """Between others, sampled and greedy: the same tokens and log-probs as from a request of its own."""
    asked = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[3], PROMPTS[0]]
    warm = [Sampling(temperature=1.0, max_tokens=8, seed=k, ignore_eos=True, logprobs=True) for k in range(4)]
    how = [*warm, Sampling(temperature=0, max_tokens=5, ignore_eos=True, logprobs=True, repetition_penalty=1.4)]
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(asked, how, strict=True)]
    rows = read_by(monkeypatch, engine)
    together = engine.generate(asked, how)
    assert rows == [3]
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens and other.logps == pytest.approx(one.logps, abs=1e-5)
    assert together[0].tokens != together[2].tokens, "each goes its own way"


def test_shared_prompts_with_a_recurrent_memory():
    """What is copied is the whole state of every layer, not keys and values alone."""
    from tests.contract.rl_bandit import Letters
    from zero2llm.core.config import parse
    from zero2llm.model.lm import LM
    from zero2llm.model.spec import ModelConfig

    torch.manual_seed(0)
    mixers = {"r": {"kind": "retnet", "n_heads": 2}, "g": {"kind": "gqa", "n_heads": 2, "window": 3}}
    blocks = {name: {"mixer": mixer, "ffn": {"kind": "glu", "hidden": 16}, "norm": {"kind": "rms"}} for name, mixer in mixers.items()}
    data = {"vocab_size": 4, "d_model": 8, "max_len": 32, "layers": {"pattern": ["r", "g"]}, "blocks": blocks}
    engine = Engine(LM(parse(ModelConfig, data | {"final_norm": {"kind": "rms"}, "tie_embeddings": False})), Letters())
    asked = [[2, 3, 2, 2, 3], [3, 3], [2, 3, 2, 2, 3], [2, 3, 2, 2, 3]]
    how = [Sampling(temperature=1.0, max_tokens=10, seed=k, ignore_eos=True) for k in range(4)]
    alone = [engine.generate([ids], one)[0].tokens for ids, one in zip(asked, how, strict=True)]
    assert [c.tokens for c in engine.generate(asked, how)] == alone


def test_streamed_text_equals_the_whole(engine):
    pieces = list(engine.stream(PROMPTS[3], GREEDY))
    assert "".join(pieces) == engine.generate([PROMPTS[3]], GREEDY)[0].text


def test_stop_string_is_cut_wherever_it_falls(engine):
    whole = engine.generate([PROMPTS[0]], GREEDY)[0].text
    for begin in range(1, min(len(whole) - 2, 8)):
        stop = whole[begin : begin + 3]
        done = engine.generate([PROMPTS[0]], Sampling(temperature=0, max_tokens=12, stop=(stop,), ignore_eos=True))[0]
        assert done.text == whole[: whole.index(stop)] and done.finish == "stop"


def test_end_tokens_stop_and_are_not_shown(engine, monkeypatch):
    first = engine.generate([PROMPTS[0]], GREEDY)[0].tokens
    monkeypatch.setattr(engine.tokenizer, "stop_ids", frozenset({first[3]}))
    done = engine.generate([PROMPTS[0]], Sampling(temperature=0, max_tokens=12))[0]
    end = first.index(first[3])
    assert done.tokens == first[: end + 1] and done.finish == "stop" and done.text == engine.tokenizer.decode(first[:end])


def test_window_of_the_model_is_respected(engine):
    ids = [5] * 60
    assert len(engine.generate([ids], Sampling(max_tokens=100, ignore_eos=True))[0].tokens) == 4
    with pytest.raises(ValueError, match="has 64 tokens, the model reads 64"):
        engine.submit([5] * 64)
    with pytest.raises(ValueError, match="empty"):
        engine.submit("")


def test_repetition_penalty_equals_transformers(engine):
    from transformers import RepetitionPenaltyLogitsProcessor

    from zero2llm.ops.sample import repetition_penalty

    logits, ids = torch.randn(2, 300), torch.randint(0, 300, (2, 9))
    seen = torch.zeros(2, 300, dtype=torch.bool).scatter(1, ids, True)
    ours = repetition_penalty(logits, seen, torch.tensor([1.3, 1.3]))
    torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()))


def test_truncations_equal_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from zero2llm.ops.sample import truncate

    logits = torch.randn(64, 50) * 3
    for ours, theirs in (
        (truncate(logits, top_k=7), TopKLogitsWarper(7)),
        (truncate(logits, top_p=0.83), TopPLogitsWarper(0.83)),
        (truncate(logits, min_p=0.1), MinPLogitsWarper(0.1)),
    ):
        assert torch.equal(ours > -torch.inf, theirs(None, logits.clone()) > -torch.inf)


def test_greedy_equals_transformers_generate(engine, tmp_path):
    from transformers import AutoModelForCausalLM

    from zero2llm.interop.hf import export_hf

    engine.tokenizer.save(tmp_path / "tok")
    export_hf(engine.model.state_dict(), engine.model.cfg, tmp_path / "tok", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    for prompt in PROMPTS:
        ids = engine.tokenizer.encode(prompt)
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=1)
        assert out[0, len(ids) :].tolist() == engine.generate([prompt], GREEDY)[0].tokens


def test_a_conversation_that_outgrows_the_window_forgets_its_oldest_turns(engine):
    turns = [{"role": role, "content": "far away " * 2} for _ in range(6) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "a"}, *turns, {"role": "user", "content": "the cat"}]
    ids = chat_prompt(engine, messages, 16)
    assert len(ids) <= 48
    text = engine.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\na") and text.endswith("the cat<|im_end|>\n<|im_start|>assistant\n")
    assert isinstance("".join(stream_answer(engine, messages, Sampling(max_tokens=4, temperature=0))), str)


def test_another_vocabulary_is_refused(engine):
    with pytest.raises(ValueError, match="has 300 tokens, the model 31"):
        Engine(tiny(), engine.tokenizer)


def test_closing_a_stream_early_frees_the_engine(engine):
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    stream.close()
    assert not engine.running and engine.generate([PROMPTS[0]], GREEDY)[0].finish == "length"
