"""Distillation as it is used: teachers refused, caches that survive a kill, answers written and sampled, students that learn."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from tests.golden.test_distill import tiny as golden_tiny
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.data.chats import conversation_items
from zero2llm.data.loader import Loader
from zero2llm.data.rows import ConversationRows, DocumentRows, FittedRows
from zero2llm.data.shards import build_shards, document_items
from zero2llm.data.sources import BadRecords
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.model.lm import LM
from zero2llm.model.presets import preset
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import save_checkpoint
from zero2llm.train.distill import cache as caching
from zero2llm.train.distill import sequence
from zero2llm.train.distill.answers import AnswerPrompts, OwnAnswers
from zero2llm.train.distill.cache import CachedRows, write_cache
from zero2llm.train.distill.gkd import GKDConfig
from zero2llm.train.distill.hidden import HiddenConfig, fit_projections, load_projections, save_projections
from zero2llm.train.distill.logits import DistillConfig
from zero2llm.train.distill.minillm import MiniLLMConfig, Mixed
from zero2llm.train.distill.sequence import write_answers
from zero2llm.train.distill.teacher import Teacher, load_teacher, same_vocabulary
from zero2llm.train.evaluate import evaluate
from zero2llm.train.fit import FitConfig, FitState, fit
from zero2llm.train.rl.rollout import RolloutConfig

TEXTS = ["The cat sits on the mat. A dog ran to the cat.", "One two three four five six seven."] * 20
TALKS = [
    [{"role": "user", "content": f"say {n} {word}"}, {"role": "assistant", "content": f"{word} {n}"}]
    for n in range(12)
    for word in ("cat", "dog")
]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS, json.dumps(TALKS)], 300)


def lm(seed: int, width: int = 32, rows: int | None = None) -> LM:
    data = to_dict(preset("qwen3-nano")) | {"d_model": width, "vocab_size": rows or tokenizer().vocab_size, "max_len": 96}
    data["layers"] = {"pattern": ["qwen3"], "repeat": 2}
    data["blocks"]["qwen3"]["mixer"] |= {"n_heads": 2, "n_kv_heads": 2, "head_dim": 16}
    data["blocks"]["qwen3"]["ffn"]["hidden"] = 48
    torch.manual_seed(seed)
    model = LM(parse(ModelConfig, data))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def shards(folder):
    items = conversation_items(TALKS, tokenizer(), 64, BadRecords(skip=False))
    return build_shards(items, folder / "tokens", tokenizer=tokenizer(), key="k", kind="sft")


@pytest.fixture
def rows(tmp_path) -> ConversationRows:
    return ConversationRows(shards(tmp_path), 48, tokenizer().pad_id, 1)


def checkpoint(folder, model: LM) -> str:
    tokenizer().save(folder / "tok")
    state = type("None_", (), {"state_dict": lambda self: {}})()
    return str(save_checkpoint(folder, model, folder / "tok", FitState(), build_optim(model, AdamWConfig()), state, parent=None, metrics={}))


# The teacher


def test_a_checkpoint_becomes_a_teacher(tmp_path):
    model = lm(1, rows=tokenizer().vocab_size + 20)  # a padded table
    teacher, weights = load_teacher(checkpoint(tmp_path, model), tokenizer())
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.vocab_size == tokenizer().vocab_size and len(weights) == 64


def test_another_vocabulary_is_refused_with_the_way_out(tmp_path):
    other = Tokenizer.train(["Something else entirely, quite unlike it, yet another bunch of letters, words and signs."] * 30, 300)
    with pytest.raises(ValueError, match=r"another vocabulary: id \d+ is .* there and .* in the student.*sequence-level"):
        load_teacher(checkpoint(tmp_path, lm(1)), other)
    with pytest.raises(ValueError, match="301 and 300 tokens"):
        same_vocabulary(tokenizer().add_tokens(["<new>"]), tokenizer(), "teacher")
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, the teacher 290"):
        Teacher(lm(1, rows=290), 300)


def test_same_ids_cut_otherwise_are_refused():
    data = json.loads(tokenizer().library.to_str())
    data["model"]["merges"] = data["model"]["merges"][::-1]
    other = Tokenizer(type(tokenizer().library).from_str(json.dumps(data)), tokenizer().template)
    with pytest.raises(ValueError, match="the ids are the same, but text is cut into them in another way"):
        same_vocabulary(other, tokenizer(), "x")


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"temperature": 0.0}, {"beta": -0.1}, {"top_k": 0}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DistillConfig(**bad)


@pytest.mark.parametrize("make", [lambda: GKDConfig(share=2.0), lambda: MiniLLMConfig(mix=1.0), lambda: HiddenConfig(layers=())])
def test_bad_numbers_elsewhere(make):
    with pytest.raises(ValueError):
        make()


# The cache


def written(rows, folder, k=8, temperature=2.0, **more) -> CachedRows:
    return write_cache(Teacher(lm(1), tokenizer().vocab_size), "w", rows, folder, k=k, temperature=temperature, micro_rows=3, **more)


def test_cached_equals_the_running_teacher(rows, tmp_path):
    """Loss and gradient of top-k with the bucket, up to fp16 of the stored log-probabilities."""
    cached, cfg, student = written(rows, tmp_path), DistillConfig(top_k=8, alpha=1.0), lm(2, 16)
    found = []
    for objective in (cfg.build(cached.teacher), cfg.build(Teacher(lm(1), tokenizer().vocab_size))):
        student.zero_grad()
        loss = objective(student.train(), cached.batch([(0, 0), (1, 1), (0, 2)]))
        loss.total.backward()
        found.append((float(loss.metrics["divergence"][0]), torch.cat([p.grad.flatten() for p in student.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 5e-3


def test_the_tail_is_a_lower_bound_and_counted(rows, tmp_path):
    student, losses = lm(2, 16).eval(), []
    for k in (2, 16, 128):
        cached = written(rows, tmp_path, k=k, temperature=1.0)
        made = DistillConfig(top_k=k, temperature=1.0).build(cached.teacher)(student, cached.batch([(0, 0), (0, 1)]))
        losses.append(float(made.metrics["divergence"][0]))
        assert 0 < cached.summary()["tail"] < 1
    full = DistillConfig(temperature=1.0).build(Teacher(lm(1), tokenizer().vocab_size))(student, rows.batch([(0, 0), (0, 1)]))
    assert losses[0] < losses[1] < losses[2] < float(full.metrics["divergence"][0])


def test_a_killed_cache_goes_on(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "ROWS", 4)
    whole = written(rows, tmp_path / "whole")
    right, calls = caching.said, []

    def dies(*args):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(caching, "said", dies)
    with pytest.raises(KeyboardInterrupt):
        written(rows, tmp_path / "cut")
    assert 0 < len(list((tmp_path / "cut").rglob("*.safetensors"))) < len(list((tmp_path / "whole").rglob("*.safetensors")))
    seen = []
    monkeypatch.setattr(caching, "said", lambda *args: seen.append(0) or right(*args))
    again = written(rows, tmp_path / "cut")
    assert 0 < len(seen) < -(-len(rows) // 3)
    for a, b in zip(sorted(whole.folder.iterdir()), sorted(again.folder.iterdir()), strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
    seen.clear()
    written(rows, tmp_path / "cut")
    assert not seen


def test_what_the_cache_is_made_from_names_it(rows, tmp_path):
    first = written(rows, tmp_path)
    folders = {first.folder, written(rows, tmp_path, k=4).folder, written(rows, tmp_path, temperature=1.0).folder}
    folders |= {write_cache(Teacher(lm(3), tokenizer().vocab_size), "v", rows, tmp_path, k=8, temperature=2.0).folder}
    assert len(folders) == 4
    with pytest.raises(ValueError, match=r"holds top_k = 8 at temperature 2.0, the objective asks for None at 2.0"):
        DistillConfig().build(first.teacher)


def test_a_damaged_cache_is_named_and_made_again(rows, tmp_path):
    cached = written(rows, tmp_path)
    file = next(cached.folder.iterdir())
    want = file.read_bytes()
    file.write_bytes(want[: len(want) // 2])
    fresh = CachedRows(rows, cached.folder, cached.key, cached.teacher)
    with pytest.raises(ValueError, match="missing, damaged"):
        fresh.batch([(0, 0)])
    written(rows, tmp_path)
    assert file.read_bytes() == want


def test_rows_that_change_and_k_out_of_range_are_refused(rows, tmp_path):
    documents = build_shards(document_items(TEXTS, tokenizer()), tmp_path / "docs", tokenizer=tokenizer(), key="d", kind="clm")
    ids = (tokenizer().pad_id, tokenizer().eos_id)
    with pytest.raises(ValueError, match="packing best_fit"):
        written(DocumentRows(documents, 32, *ids, 1), tmp_path)
    fitted = FittedRows(documents, 32, *ids, 1)
    cached = written(fitted, tmp_path)
    a, b = (cached.batch([(e, list(fitted.order(e)).index(3))]) for e in (0, 5))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.extra["teacher_ids"], b.extra["teacher_ids"])
    with pytest.raises(ValueError, match="top_k = 300"):
        written(rows, tmp_path, k=300)


def test_training_without_the_cached_rows_is_refused_and_validation_goes_on(rows, tmp_path):
    objective, student = DistillConfig(top_k=8).build(written(rows, tmp_path).teacher), lm(2, 16)
    with pytest.raises(ValueError, match="CachedRows"):
        objective(student.train(), rows.batch([(0, 0)]))
    assert evaluate(student, objective, [rows.batch([(0, 0)])])["loss"] > 0


def test_a_cache_is_part_of_the_place_in_the_data(rows, tmp_path):
    loader = Loader(written(rows, tmp_path), 2, seed=1)
    with pytest.raises(ValueError, match="teacher"):
        loader.load_state_dict(Loader(written(rows, tmp_path, k=4), 2, seed=1).state_dict())


# Students learn


def trained(objective, source, student: LM, steps: int = 12):
    seen = []
    fit(student, objective, source, build_optim(student, AdamWConfig(lr=0.01, weight_decay=0.0)), FitConfig(steps=steps, micro_rows=3), hooks=[lambda s: seen.append(s.metrics)])
    return seen


def test_every_objective_brings_the_student_nearer(rows, tmp_path):
    teacher = Teacher(lm(1), tokenizer().vocab_size)
    known = fit_projections(teacher.model, [rows.batch([(0, n)]) for n in range(len(rows))], [0, 1], 16)
    save_projections(known, tmp_path / "p")
    again = load_projections(tmp_path / "p")
    assert all(torch.equal(known[j].matrix, again[j].matrix) and known[j].kept == again[j].kept for j in known)
    match = HiddenConfig(layers=((0, 0), (1, 1)), logits=DistillConfig(temperature=1.0, alpha=1.0))
    objectives = {
        "distill": (DistillConfig(alpha=1.0, temperature=1.0).build(teacher), "divergence"),
        "gkd": (GKDConfig(beta=0.0).build(teacher), "divergence"),
        "hidden": (match.build(teacher, again), "hidden"),
    }
    for name, (objective, metric) in objectives.items():
        seen = trained(objective, Loader(rows, 6, seed=1), lm(2, 16))
        assert seen[-1][metric] < 0.8 * seen[0][metric], name


@pytest.mark.parametrize(("student", "teacher", "pairs"), [
    (2, 2, [(0, 0), (1, 1)]), (2, 6, [(0, 2), (1, 5)]), (3, 4, [(0, 1), (1, 2), (2, 3)]), (4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]), (1, 5, [(0, 4)]),
])  # fmt: skip
def test_blocks_are_compared_evenly(student, teacher, pairs):
    assert list(HiddenConfig().between(student, teacher).layers) == pairs


def test_a_layer_that_there_is_not():
    teacher, batch = Teacher(lm(1), tokenizer().vocab_size), Batch(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), Seq.rows(1, 4))
    known = fit_projections(teacher.model, [batch], [1], 16)
    with pytest.raises(ValueError, match=r"\[2, 1\]; the student has 2 blocks"):
        HiddenConfig(layers=((2, 1),)).between(2, 2)
    with pytest.raises(ValueError, match="between names them"):
        HiddenConfig().build(teacher, known)
    with pytest.raises(ValueError, match="wider"):
        fit_projections(teacher.model, [batch], [1], 64)


# Its own answers


def own(model, folder, data=None, **more) -> OwnAnswers:
    cfg = RolloutConfig(prompts=4, samples=1, max_tokens=6)
    return OwnAnswers(model, tokenizer(), AnswerPrompts(shards(folder), 1), cfg, **({"seed": 1, "world": World()} | more), data=data)


def test_prompts_end_where_the_last_answer_begins(tmp_path):
    found = AnswerPrompts(shards(tmp_path), None)
    for g in (0, 5, len(found) + 5):
        want, _ = tokenizer().render(TALKS[g % len(TALKS)][:1], add_generation_prompt=True)
        assert found.prompt(g)[0] == want


def test_share_of_own_answers(rows, tmp_path):
    model = lm(2, 16)
    source = own(model, tmp_path, Loader(rows, 4, seed=1), share=0.4)
    stream = iter(source)
    kinds = [float(next(stream).extra["own"][0]) for _ in range(30)]
    assert 0.2 < sum(kinds) / 30 < 0.6 and source.data.step == kinds.count(0.0)
    for share, want in ((0.0, 0.0), (1.0, 1.0)):
        assert float(next(iter(own(model, tmp_path, Loader(rows, 4, seed=1), share=share))).extra["own"][0]) == want
    with pytest.raises(ValueError, match="there must be data"):
        own(model, tmp_path, share=0.5)
    with pytest.raises(ValueError, match="1 and 1"):
        OwnAnswers(model, tokenizer(), AnswerPrompts(shards(tmp_path), 1), RolloutConfig(prompts=4, epochs=2), seed=1, world=World())


def test_own_answers_are_the_same_on_two_ranks(tmp_path):
    model = lm(2, 16)
    whole = own(model, tmp_path).written(3)
    parts = [own(model, tmp_path, world=World(rank, 2)).written(3) for rank in (0, 1)]
    for r in range(4):
        part = parts[r // 2]
        n = int(part.seq.seg[r % 2].sum())
        assert torch.equal(whole.tokens[r, :n], part.tokens[r % 2, :n]) and int(whole.seq.seg[r].sum()) == n


@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_resumed_runs_are_the_same_to_the_bit(rows, tmp_path, kind):
    def run(steps: list[int]):
        student, teacher = lm(2, 16), Teacher(lm(1), tokenizer().vocab_size)
        objective = (GKDConfig() if kind == "gkd" else MiniLLMConfig()).build(teacher)
        sampler = student if kind == "gkd" else MiniLLMConfig().sampler(student, teacher, 1.0)
        optim, state, saved = build_optim(student, AdamWConfig(lr=0.01)), FitState(), None
        for stop in steps:
            source = own(sampler, tmp_path, Loader(rows, 4, seed=1), share=0.5 if kind == "gkd" else 1.0)
            if saved is not None:
                source.load_state_dict(json.loads(json.dumps(saved)))
            fit(student, objective, source, optim, FitConfig(steps=stop, micro_rows=2, schedule=Flat()), state=state)
            saved = source.state_dict()
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.equal(run([6]), run([2, 5, 6]))


class Flat:
    def factor(self, step: int, steps: int) -> float:
        return 1.0


def test_mixed_sampling_knows_its_own_probabilities(tmp_path):
    """What the engine, with both models' caches, notes of each token is log p~ of a whole forward pass; the weights follow."""
    student, teacher = lm(2, 16), Teacher(lm(1, rows=tokenizer().vocab_size + 7), tokenizer().vocab_size)
    mixed = MiniLLMConfig().sampler(student, teacher, 1.0)
    student.train()
    batch = own(mixed, tmp_path).written(0)
    assert student.training and not teacher.model.training
    keep = batch.labels != IGNORE
    q, p = (m.logits(m(batch.tokens, batch.seq)[0])[..., : teacher.vocab_size].softmax(-1) for m in (student.eval(), teacher.model))
    want = (0.2 * p + 0.8 * q).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0].log()[keep]
    torch.testing.assert_close(batch.extra["old"][keep], want.detach(), atol=1e-4, rtol=0)
    loss = MiniLLMConfig().build(teacher)(student, batch)
    assert float(loss.metrics["weight"][0] / loss.metrics["weight"][1]) <= 1 / 0.8
    with pytest.raises(ValueError, match="take 1"):
        MiniLLMConfig().sampler(student, teacher, 0.7)


def test_extreme_ratios_stay_finite(tmp_path):
    student, teacher = lm(2, 16), Teacher(lm(1), tokenizer().vocab_size)
    batch = own(student, tmp_path).written(0)
    for away in (-80.0, 80.0):
        extra = batch.extra | {"old": batch.extra["old"] + away}
        loss = MiniLLMConfig().build(teacher)(student, Batch(batch.tokens, batch.labels, batch.seq, extra))
        loss.total.backward()
        assert torch.isfinite(loss.total) and all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


# Answers on disk


def prompts_file(folder, n: int = 10) -> str:
    lines = [json.dumps({"prompt": talk[0]["content"]}) if i % 2 else json.dumps({"messages": talk}) for i, talk in enumerate(TALKS[:n])]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return str(folder / "prompts.jsonl")


def test_the_teacher_writes_conversations(tmp_path):
    engine, asked = Engine(lm(1), tokenizer()), prompts_file(tmp_path)
    found = write_answers(engine, "w", [asked], tmp_path / "out.jsonl", Sampling(max_tokens=12, temperature=1.0, seed=1), batch=4, quiet=True)
    records = [json.loads(line) for line in open(tmp_path / "out.jsonl", encoding="utf-8")]
    assert sum(found.values()) == 10 and len(records) == found["written"]
    for record in records:
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"] and record["messages"][1]["content"].strip()


def test_what_is_left_out_is_counted(tmp_path):
    engine = Engine(lm(1), tokenizer())
    found = write_answers(engine, "w", [prompts_file(tmp_path)], tmp_path / "out.jsonl", Sampling(max_tokens=1, temperature=1.0, seed=1), quiet=True)
    assert found["written"] == 0 and found.get("cut at max_tokens", 0) + found.get("empty", 0) == 10


def test_a_killed_writer_goes_on_to_the_bit(tmp_path, monkeypatch):
    sampling, asked = Sampling(max_tokens=10, temperature=1.0, seed=1), prompts_file(tmp_path)
    run = lambda name: write_answers(Engine(lm(1), tokenizer()), "w", [asked], tmp_path / name, sampling, batch=3, quiet=True)
    want = run("whole.jsonl")
    right, calls = sequence.answered, []

    def dies(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(sequence, "answered", dies)
    with pytest.raises(KeyboardInterrupt):
        run("cut.jsonl")
    assert not (tmp_path / "cut.jsonl").exists()
    with open(tmp_path / ".cut.jsonl.part", "a", encoding="utf-8") as file:
        file.write('{"messages": [{"role"')  # half a line, as a kill leaves it
    monkeypatch.setattr(sequence, "answered", right)
    assert run("cut.jsonl") == want == run("cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_run_is_not_continued(tmp_path):
    engine, asked = Engine(lm(1), tokenizer()), prompts_file(tmp_path, 3)
    ask = lambda weights, **more: write_answers(engine, weights, [asked], tmp_path / "out.jsonl", Sampling(max_tokens=4, seed=1, **more), quiet=True)
    ask("w")
    for other in (lambda: ask("v"), lambda: ask("w", top_k=3)):
        with pytest.raises(ValueError, match="another teacher, other prompts or another sampling"):
            other()
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="already exists"):
        write_answers(engine, "w", [asked], tmp_path / "mine.jsonl", Sampling(seed=1), quiet=True)


def test_a_prompt_that_does_not_fit_stops_before_any_work(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "cat " * 200}) + "\n")
    with pytest.raises(ValueError, match=r"p.jsonl, line 1.*the teacher reads 96"):
        write_answers(Engine(lm(1), tokenizer()), "w", [str(tmp_path / "p.jsonl")], tmp_path / "out.jsonl", Sampling(seed=1), quiet=True)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


def test_the_mixture_reads_no_further_than_either():
    student = golden_tiny(0)
    assert Mixed(student, Teacher(golden_tiny(1, width=24), 11), 0.2).cfg.max_len == student.cfg.max_len
