"""Where the order of training data could break: borders of files, positions of another packing, small weights, sources that are not what they seem."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from tests.contract.test_data_loader import EOS, LENGTHS, PAD, numbered
from tests.contract.test_data_order import make, mixture  # noqa: F401
from zero2llm.data.loader import Loader
from zero2llm.data.mixture import MixtureRows, Phase
from zero2llm.data.rows import ConversationRows, DocumentRows, FittedRows, StoredRows
from zero2llm.data.shards import Mapped, TokenShards, build_shards
from zero2llm.data.shuffle import Permutation
from zero2llm.data.sources import BadRecords
from zero2llm.data.token_writer import TokenWriter
from zero2llm.lab.corpus import corpus, training_rows
from zero2llm.lab.recipe import make_recipe
from zero2llm.tokenizers.tokenizer import Tokenizer


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17])
def test_small_permutations(n):
    orders = {tuple(Permutation(n, seed, epoch)[np.arange(n)].tolist()) for seed in range(8) for epoch in range(8)}
    assert all(sorted(order) == list(range(n)) for order in orders) and len(orders) >= min(n, 5)


def test_slices_at_the_borders_of_files(tmp_path):
    sizes = [3, 1, 5, 2]
    files, at = [], 0
    for i, n in enumerate(sizes):
        files.append(tmp_path / f"{i}.bin")
        np.arange(at, at + n, dtype=np.uint16).tofile(files[-1])
        at += n
    mapped = Mapped(files, "uint16")
    for a in range(at + 1):
        for b in range(at + 3):
            assert mapped[a:b].tolist() == list(range(at))[a:b] and mapped[a:b].dtype == np.uint16
    assert mapped[:].tolist() == list(range(at)) and len(mapped) == at
    mapped.close()


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7, 100])
def test_files_do_not_depend_on_the_blocks(make, tmp_path, limit):  # noqa: F811
    items = numbered([3, 9, 4, 1, 6, 6, 2])
    one = make(items, limit)
    lengths = np.array([len(ids) for ids, _ in items])
    ids = np.concatenate([ids for ids, _ in items])
    for step in (2, 3, 7):
        folder = tmp_path / f"block{step}"
        folder.mkdir()
        from tests.contract.test_data_loader import Ids

        with TokenWriter(folder, Ids(), limit) as writer:
            writer.add_block(np.empty(0, np.int64), np.empty(0, np.int64))
            for i in range(0, len(items), step):
                first, last = lengths[:i].sum(), lengths[: i + step].sum()
                writer.add_block(ids[first:last], lengths[i : i + step])
        counts = writer.counts()
        assert counts["files"] == one.manifest["files"] and counts["tokens"] == one.manifest["tokens"]
        for path in sorted(folder.glob("*.bin")):
            assert path.read_bytes() == (one.path / path.name).read_bytes()
            if path.name.startswith("tokens-"):
                held = np.fromfile(path, writer.dtype)
                assert 0 < len(held) <= limit or sum(int(x) == EOS for x in held) <= 1


@pytest.mark.parametrize("before", [DocumentRows, StoredRows, FittedRows])
@pytest.mark.parametrize("after", [DocumentRows, StoredRows, FittedRows])
def test_a_position_belongs_to_its_packing(make, before, after):  # noqa: F811
    shards = make([([EOS, *range(2, 10)], None)] * 32)  # as many rows, however they are packed
    old, new = (Loader(kind(shards, 9, PAD, EOS, 1), 2, seed=1) for kind in (before, after))
    next(iter(old))
    if before is after:
        new.load_state_dict(old.state_dict())
        return
    with pytest.raises(ValueError, match="packing"):
        new.load_state_dict(old.state_dict())


def test_a_position_belongs_to_its_borders_and_masks(make):  # noqa: F811
    def resumed(a, b, kind):
        old, new = (Loader(kind(make(items)), 1, seed=1) for items in (a, b))
        with pytest.raises(ValueError, match="data"):
            new.load_state_dict(old.state_dict())

    resumed([([2, 3, 4], None), ([5, 6], None)], [([2, 3], None), ([4, 5, 6], None)], lambda s: DocumentRows(s, 2, PAD, EOS, 1))
    resumed([([2, 3, 4], [0, 1, 1])], [([2, 3, 4], [0, 0, 1])], lambda s: ConversationRows(s, 4, PAD, 1))


def test_a_mixtures_position_is_no_other_position(make):  # noqa: F811
    mixed = mixture(make, [Phase(0, (1, 1))])
    plain = mixed.sources[0]
    a, b = Loader(mixed, 2, seed=1), Loader(plain, 2, seed=1)
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="cannot resume"):
            one.load_state_dict(other.state_dict())
    saved = json.loads(json.dumps(a.state_dict()))
    Loader(mixture(make, [Phase(0, (1, 1))]), 2, seed=1).load_state_dict(saved)


@pytest.mark.parametrize("weights", [(1, 1e-4), (1, float("nan")), (1, float("inf"))])
def test_a_weight_that_would_never_be_drawn_is_refused(make, weights):  # noqa: F811
    with pytest.raises(ValueError, match="weight"):
        mixture(make, [Phase(0, weights)])


def test_stored_rows_shorter_than_a_row(make):  # noqa: F811
    source = StoredRows(make(numbered([3, 4])), 50, PAD, EOS, 3)
    for epoch in range(5):
        batch = source.batch([(epoch, 0)])
        taken = (batch.seq.seg > 0)[0]
        assert int(taken.sum()) == 9 and sorted(batch.tokens[0][taken].tolist()) == sorted(sum((i for i, _ in numbered([3, 4])), []))


# --- from a recipe ---


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 9, "床前明月光疑是地上霜" * 9], 280)


def text_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def training(tmp_path, data, **fit):
    return make_recipe(
        out=str(tmp_path / "run"), model={"preset": "llama-nano"}, tokenizer={}, data=data, fit={"steps": 10} | fit, seq_len=16, batch_tokens=32
    )


def built(tmp_path, tokenizer, data, bad=None):
    recipe = training(tmp_path, data)
    return corpus(recipe, tokenizer, tmp_path / "run", "key", bad or BadRecords())


def numbers(n, word):
    return [{"text": f"{word} {i}"} for i in range(n)]


def test_bad_records_are_counted_once(tmp_path, tokenizer):
    path = text_file(tmp_path / "in" / "a.jsonl", [*numbers(60, "fox"), {"other": 1}])
    bad = BadRecords(skip=True)
    for shards in (lambda pair: [*pair[0], pair[1]])(built(tmp_path, tokenizer, {"train": [path], "valid_fraction": 0.3}, bad)):
        shards.close()
    assert bad.total == 1 and len(bad.found) == 1


def test_documents_held_out_of_the_first_so_many_of_each_source(tmp_path, tokenizer):
    parts = [{"name": w, "train": [text_file(tmp_path / "in" / f"{w}.jsonl", numbers(100, w))]} for w in ("fox", "dog")]
    train, valid = built(tmp_path, tokenizer, {"mixture": parts, "valid_fraction": 0.5, "max_documents": 60, "workers": 1})
    assert sum(map(len, train)) + len(valid) == 120 and all(map(len, train))
    for shards in (*train, valid):
        shards.close()


@pytest.fixture
def folder(tmp_path, tokenizer):
    items = [([tokenizer.eos_id, 5, 6, 7], None)] * 20
    build_shards(items, tmp_path / "tokens" / "train", tokenizer=tokenizer, key="k", kind="clm").close()
    return str(tmp_path / "tokens" / "train")


def test_token_folders_are_refused_where_they_would_be_misread(tmp_path, tokenizer, folder):
    ok = {"train": [folder], "valid": [folder]}
    for shards in (lambda pair: [*pair[0], pair[1]])(built(tmp_path, tokenizer, ok)):
        shards.close()
    text = text_file(tmp_path / "in" / "a.jsonl", numbers(9, "fox"))
    (tmp_path / "c.bin").write_bytes(np.arange(2, 9, dtype=np.uint16).tobytes())
    for data, message in (
        (ok | {"max_documents": 5}, "max_documents"),
        (ok | {"train": [folder, text]}, "data.mixture"),
        (ok | {"train": [folder, folder + "/../train"]}, "data.mixture"),
        (ok | {"train": [text, str(tmp_path / "c.bin")]}, "c.bin"),
        (ok | {"train": [str(tmp_path / "c.bin")], "max_documents": 5}, "max_documents"),
    ):
        with pytest.raises(ValueError, match=message):
            built(tmp_path, tokenizer, data)
    other = Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 9], 270)
    with pytest.raises(ValueError, match="tokenizer.path"):
        built(tmp_path, other, ok)
    build_shards([([1, 2], [0, 1])], tmp_path / "sft", tokenizer=tokenizer, key="k", kind="sft").close()
    with pytest.raises(ValueError, match="'sft'"):
        built(tmp_path, tokenizer, ok | {"train": [str(tmp_path / "sft")]})


def test_the_output_of_a_data_recipe_is_not_read_whole(tmp_path, tokenizer):
    out = tmp_path / "made"
    text_file(out / "train-00000.jsonl", numbers(20, "fox"))
    text_file(out / "valid-00000.jsonl", numbers(9, "dog"))
    (out / "funnel.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train-\*"):
        built(tmp_path, tokenizer, {"train": [str(out)]}, BadRecords(skip=True))
    train, valid = built(tmp_path, tokenizer, {"train": [str(out / "train-*.jsonl")], "valid": [str(out / "valid-*.jsonl")]})
    assert (len(train[0]), len(valid)) == (20, 9)
    for shards in (*train, valid):
        shards.close()


@pytest.mark.parametrize("at", [[0.01], [0.5, 0.52], [0.99]])
def test_turns_that_fall_on_one_step_are_named(tmp_path, tokenizer, folder, at):
    parts = [{"name": name, "train": [folder], "weight": 1} for name in ("a", "b")]
    turns = [{"at": x, "weights": {"a": 1}} for x in at]
    recipe = training(tmp_path, {"mixture": parts, "curriculum": turns, "valid": [folder]})
    shards = [TokenShards.open(folder) for _ in parts]
    with pytest.raises(ValueError, match=r"data\.curriculum.*10 steps"):
        training_rows(recipe, tokenizer, shards)
    for one in shards:
        one.close()


def test_every_row_of_every_epoch_stands_where_the_loader_says(make):  # noqa: F811
    mixed = mixture(make, [Phase(0, (3, 1))])
    assert isinstance(mixed, MixtureRows)
    whole = [b.tokens.tolist() for b in islice(Loader(mixed, 2, seed=1), 3 * len(mixed) // 2)]
    late = Loader(mixed, 2, seed=1)
    late.load_state_dict(late.state_dict() | {"step": len(mixed)})
    assert next(iter(late)).tokens.tolist() == whole[len(mixed)] and LENGTHS
