"""`zero2llm compare`: what may be swapped, equal parameter counts, resuming, and a page that says what was found."""

from __future__ import annotations

import json
import random

import pytest
import torch

from zero2llm.core.batch import IGNORE
from zero2llm.core.config import to_dict
from zero2llm.evals import synthetic
from zero2llm.lab import arena
from zero2llm.lab.arena import compare
from zero2llm.lab.arena_page import grouped, table
from zero2llm.lab.recipe import BUILT_IN, load_recipe
from zero2llm.lab.variants import PARTS, matched, parse_swap, swapped
from zero2llm.model.cost import parameters
from zero2llm.model.lm import LM
from zero2llm.model.presets import preset


def recipe(tmp_path, *more):
    text = tmp_path / "text.jsonl"
    words, draw = "the quick brown fox jumped over a lazy dog while seven wizards mixed big jugs of vodka".split(), random.Random(1)
    lines = [json.dumps({"text": f"{i} " + " ".join(draw.choice(words) for _ in range(60))}) for i in range(60)]
    text.write_text("\n".join(lines), encoding="utf-8")
    small = ["tokenizer.vocab_size=320", "model.vocab_size=320", "model.d_model=32", "seq_len=32", "batch_tokens=128",
             "data.valid_fraction=0.2", "data.valid_rows=4", "fit.steps=2", "eval.every=1", f"data.train=[{text}]"]  # fmt: skip
    return load_recipe(BUILT_IN / "compare.yaml", [f"out={tmp_path / 'out'}", *small, *more])


@pytest.mark.parametrize(("text", "says"), [
    ("mixr=gqa", "did you mean 'mixer'"), ("mixer", "write PART=NAME"), ("mixer=retnt", "did you mean 'retnet'"),
    ("mixer=", "names nothing"), ("norm=zzz", "there are: rms"), ("mixer=mha+retnt", "did you mean 'retnet'"),
])  # fmt: skip
def test_a_swap_that_cannot_be_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_swap(text)


@pytest.mark.parametrize("part", PARTS)
def test_every_name_builds_with_the_same_number_of_parameters(part):
    base = load_recipe(BUILT_IN / "compare.yaml").model
    target = parameters(base)["total"]
    for name in parse_swap(f"{part}=all")[1]:
        cfg = matched(swapped(to_dict(base), part, name), target)
        with torch.device("meta"):
            built = sum(p.numel() for p in LM(cfg).parameters())
        assert built == parameters(cfg)["total"] and abs(built / target - 1) <= 0.03, (name, built, target)
        assert len(cfg.specs()) == len(base.specs())


def test_a_hybrid_fills_the_layers_in_turn():
    base = load_recipe(BUILT_IN / "compare.yaml").model
    cfg = matched(swapped(to_dict(base), "mixer", "retnet+retnet+mha"), parameters(base)["total"])
    assert [spec.mixer.kind for spec in cfg.specs()] == ["retnet", "retnet", "gqa"]


@pytest.mark.parametrize("name", ["rope+learned", "learned+rope", "none+sinusoidal", "learned+learned"])
def test_a_hybrid_with_a_position_that_is_added_is_refused(name):
    base = to_dict(load_recipe(BUILT_IN / "compare.yaml").model)
    with pytest.raises(ValueError, match="added to the embedding, for all layers at once"):
        swapped(base, "position", name)
    assert [b["mixer"]["position"]["kind"] for b in swapped(base, "position", "rope+alibi")["blocks"].values()] == ["rope", "alibi"]


def test_an_added_position_may_come_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: learned\n", encoding="utf-8")
    cfg = swapped(to_dict(load_recipe(BUILT_IN / "compare.yaml").model), "position", str(tmp_path / "mine.yaml"))
    assert cfg["position"] == {"kind": "learned"} and all(b["mixer"]["position"]["kind"] == "none" for b in cfg["blocks"].values())


def test_a_width_left_to_the_published_one_is_scaled():
    base = load_recipe(BUILT_IN / "compare.yaml").model
    model = swapped(to_dict(base), "ffn", "rwkv_channel")
    given = matched(model, parameters(base)["total"])
    for block in model["blocks"].values():
        block["ffn"]["hidden"] = None
    assert matched(model, parameters(base)["total"]) == given


def test_a_mixer_that_leaves_no_room_is_refused():
    base = to_dict(preset("llama-nano"))
    with pytest.raises(ValueError, match="cannot be brought within 3%"):
        matched(swapped(base, "mixer", "retnet"), 100_000)


def test_runs_are_kept_and_only_what_is_missing_is_done(tmp_path, monkeypatch, capsys):
    found = compare(recipe(tmp_path), "mixer=mha", 1, task_steps=1)
    assert [r["variant"] for r in found] == ["mha"] and {"bpb", "bpb_2x", "recall", "copy", "peak_mib"} <= found[0].keys()
    assert [step for step, _ in found[0]["curve"]] == [1, 2] and found[0]["parameters"] > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "mha" in page and "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    assert "| mha |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    started = []
    monkeypatch.setattr(arena, "_run_all", lambda todo, *_: started.extend(todo))
    compare(recipe(tmp_path), "mixer=mha,mqa", 1, task_steps=1)
    assert [job.variant for job in started] == ["mqa"]
    compare(recipe(tmp_path, "fit.steps=3"), "mixer=mha", 1, task_steps=1)
    assert [job.variant for job in started] == ["mqa", "mha"], "another recipe is another run"


def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arena.sys, "executable", "false")
    assert compare(recipe(tmp_path), "mixer=mha", 1, task_steps=0) == []
    assert "mha failed: exit code 1" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no comparison"):
        compare(recipe(tmp_path), "mixer=mha", 1)


def test_recall_and_copying_ask_for_what_they_show():
    batch = synthetic.recall(5, 6, torch.Generator().manual_seed(1))
    assert batch.tokens.shape == (5, 23)
    for row, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        pairs = dict(zip(row[0:12:2], row[1:12:2], strict=True))
        assert len(pairs) == 6
        asked = [(key, answer) for key, answer in zip(row[12::2], labels[12::2], strict=True)]
        assert sorted(k for k, _ in asked) == sorted(pairs) and all(pairs[k] == a for k, a in asked)
        assert [i for i, label in enumerate(labels) if label != IGNORE] == list(range(12, 23, 2))
    batch = synthetic.copying(3, 7, torch.Generator().manual_seed(1))
    for row, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert row[7] == synthetic.MARK and labels[7:] == row[:7] and set(labels[:7]) == {IGNORE}


def test_the_table_sorts_by_loss_and_shows_the_spread():
    run = {"tokens_per_s": 10.0, "peak_mib": 1.0, "state_bytes": {"1024": 2048, "2048": 4096}, "parameters": 5}
    runs = [run | {"variant": "a", "bpb": 3.0}, run | {"variant": "b", "bpb": 2.0}, run | {"variant": "a", "bpb": 3.2}]
    lines = table(grouped(runs)).splitlines()
    assert lines[2].startswith("| b | 2.000 | cannot | not run") and lines[3].startswith("| a | 3.100 ± 0.141 |")
    assert "| 2 | 2 | 5 |" in lines[2]
