"""Models as GGUF: every architecture through llama.cpp, there and back.

llama.cpp is the independent reader: it gets our file and a row of token ids, and answers with the probabilities of the
whole vocabulary at the following positions, which must be ours. A crash of its process is a failed test, not ours.

Largest difference of log-probabilities, F32, x86-64, llama.cpp of xllamacpp 2026.10; tensors come back bit-equal (A_log of
recurrences: 5e-7, the logarithm of an exponential):

    llama, mistral, mixtral, qwen2 (+ moe), qwen3 (+ moe), smollm3, olmo2, phi3, gpt-oss     2e-6 to 5e-6
    deepseek v2, v2-lite, v3 (MLA)      3e-5 to 4e-5          mamba, mamba2, jamba, kimi-linear, qwen3-next     5e-6 to 2e-5
    gpt2   6e-4      gemma, 2, 3   3e-3 to 2e-2       GELU is looked up in a table of 16-bit numbers there

Refused with the reason: what the names of test_gguf_models_bad.py and test_gguf_options.py say.
"""
# ruff: noqa: F401, F811  fixtures are imported, and named as arguments

import json
from dataclasses import replace

import pytest
import torch

from tests.parity.gguf_cases import (
    CASES,
    V,
    answers,
    ask_llama_cpp,
    build,
    files,
    forced,
    our_answer,
    read_back,
    tokenizer,
    within,
)
from zero2llm.core.lazy import lazy
from zero2llm.interop.families.family import differences
from zero2llm.interop.foreign import import_model
from zero2llm.interop.gguf import arches, layers, rope
from zero2llm.interop.gguf.file import open_gguf
from zero2llm.interop.gguf.names import CONV1D, Turn
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.write import export_gguf, plan_gguf
from zero2llm.model.lm import LM
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(files, answers, forced, name):
    model, path = files[name]
    theirs, ours = answers[str(path)], our_answer(model, forced)
    assert not isinstance(theirs, str), theirs
    off = (ours - theirs).abs()
    print(f"{name}: largest {off.max():.1e}, mean {off.mean():.1e}, of logits with deviation {ours.std():.2f}")
    assert ours.std() > 0.5
    assert within(model, theirs, ours)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(files, name):
    model, path = files[name]
    found, cfg, state = read_back(path)
    assert found.config["model_type"] == CASES[name][0]
    assert not differences(model.cfg, cfg) and (cfg.max_len, cfg.vocab_size) == (64, V)
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        if key.endswith("A_log"):  # the logarithm of an exponential
            torch.testing.assert_close(state[key], value, rtol=0, atol=5e-7)
        else:
            assert torch.equal(state[key], value), key


def test_every_architecture_is_tested():
    assert {arches.WRITERS[kind] for kind, _ in CASES.values()} == set(arches.ARCHES.values())
    assert {kind for kind, _ in CASES.values()} == set(arches.WRITERS)


def test_an_imported_file_is_a_checkpoint(files, forced, tmp_path):
    """Tokenizer, end tokens and all: the same text gives the same ids and the same logits."""
    model, path = files["qwen3"]
    import_model(read_gguf(path), tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert torch.equal(our_answer(found.load_model(), forced), our_answer(model, forced))
    ours = Tokenizer.load(found.tokenizer_dir)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["pad_token_id"] == ours.pad_id and set(settings["eos_token_id"]) == ours.stop_ids


@pytest.mark.parametrize("kind, number", [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7), ("q4_0", 2)])
def test_kinds(tokenizer, forced, tmp_path, kind, number):
    """Vectors, routers and recurrences' small tensors stay F32, odd rows F16; the gguf package reads the same numbers."""
    from gguf import GGUFReader, dequantize

    model = build("jamba")
    made = plan_gguf(model.state_dict(), model.cfg, tokenizer, kind)
    path = export_gguf(model.state_dict(), model.cfg, tokenizer, tmp_path / "m.gguf", kind, name="tiny")
    file = open_gguf(path)
    stored = {name: t.kind for name, t in file.tensors.items()}
    small = {n for n, t in file.tensors.items() if len(t.shape) == 1 or any(s in n for s in ("ffn_gate_inp", "ssm_conv1d", "ssm_a", "ssm_d"))}
    small -= {n for n in stored if n.endswith("ssm_dt.weight")}
    odd = {n for n, t in file.tensors.items() if t.shape[-1] % 32} - small
    assert odd == {f"blk.{i}.ssm_dt.weight" for i in (0, 2, 3)}
    for name, used in stored.items():
        expected = "F32" if name in small else "F16" if name in odd and kind.startswith("q") else kind.upper()
        assert used == expected, name
    assert file.metadata["general.file_type"] == number and file.metadata["general.name"] == "tiny"
    assert any("no multiple of 32" in note for note in made.notes) == kind.startswith("q")
    for tensor in GGUFReader(path).tensors:
        ours = file.tensors[tensor.name].lazy.load().float()
        assert torch.equal(ours, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(ours.shape)), tensor.name


# llama.cpp rounds what it multiplies 16-bit weights with to 16 bits, blocks to blocks of 8 bits
@pytest.mark.parametrize("kind, bound", [pytest.param("f16", 1e-2, marks=pytest.mark.slow), pytest.param("bf16", 5e-2, marks=pytest.mark.slow),
                                         pytest.param("q8_0", 0.2, marks=pytest.mark.slow), ("q4_0", 0.2)])
def test_what_a_file_of_each_kind_says_is_what_llama_cpp_computes(tokenizer, forced, tmp_path, kind, bound):
    model = build("qwen3")
    path = export_gguf(model.state_dict(), model.cfg, tokenizer, tmp_path / "m.gguf", kind)
    _, cfg, state = read_back(path)
    again = LM(cfg)
    again.load_state_dict(state)
    theirs = ask_llama_cpp([path], forced)[str(path)]
    assert (our_answer(again.eval(), forced) - theirs).abs().max() < bound


def test_the_parameters_of_llama3_are_found_again():
    settings = [(8.0, 1.0, 4.0, 8192, 128), (32.0, 1.0, 4.0, 8192, 64), (8.0, 1.5, 6.0, 4096, 128), (4.0, 1.25, 3.75, 8192, 64)]
    for factor, low, high, length, dim in settings:
        given = dict(rope_type="llama3", rope_theta=5e5, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=length)
        meta, tensors = rope.write_rope(given, dim, 131_072, ("llama3",))
        assert rope.read_rope(meta, {n: lazy(t) for n, t in tensors.items()}, dim, 131_072) == given
    strange = {rope.FREQS: lazy(torch.linspace(1, 3, 16).sqrt())}
    back = rope.read_rope({}, strange, 32, 4096)
    assert back["rope_type"] == "longrope" and back["attention_factor"] == 1.0 and len(back["long_factor"]) == 16


# Six planted bugs, each the same on the way in and out, so that reading our own files back sees none of them.

SAME = Turn(lambda x: x, lambda x: x)
BACKWARDS = lambda file, theirs, count, *names: [
    replace(rule, ours=rule.ours[::-1]) for rule in layers_experts(file, theirs, count, *names)
]
layers_experts = layers.experts
BUGS = {
    "rows of q and k not permuted": ("llama", lambda m: m.setattr(layers, "pairs", lambda head_dim: SAME)),
    "permuted where halves turn": ("qwen3", lambda m: m.setitem(arches.WRITERS, "qwen3", replace(arches.ARCHES["qwen3"], rules=layers.llama))),
    "norms without 1 +": ("gemma", lambda m: m.setattr(layers, "PLUS_ONE", SAME)),
    "A without its sign": ("mamba", lambda m: m.setattr(layers, "DECAY", Turn(lambda a: a.exp(), lambda a: a.log()))),
    "gate and up swapped": ("olmo2", lambda m: m.setattr(layers, "MLP", {
        "mlp.gate_proj": "ffn_up", "mlp.up_proj": "ffn_gate", "mlp.down_proj": "ffn_down"})),
    "experts stacked backwards": ("mixtral", lambda m: m.setattr(layers, "experts", BACKWARDS)),
    "factors of rotation inverted": ("llama3", lambda m: m.setattr(rope, "_divisors", lambda r, d, right=rope._divisors: 1 / right(r, d))),
    "matrices not transposed": ("gpt2", lambda m: m.setattr(layers, "CONV1D", replace(CONV1D, pack=lambda t: t.t().reshape(t.shape).t().contiguous() if t.ndim == 2 else t))),
}  # fmt: skip


@pytest.fixture(scope="module")
def bugged(tokenizer, forced, tmp_path_factory):
    """Name -> (ours, llama.cpp's answer to the file with the bug)."""
    folder, models, paths = tmp_path_factory.mktemp("bugs"), {}, {}
    for i, (bug, (name, plant)) in enumerate(BUGS.items()):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            patch.setattr(arches, "_lost", lambda *args: [])  # the factors alone are noticed before
            models[bug] = build(name)
            paths[bug] = export_gguf(models[bug].state_dict(), models[bug].cfg, tokenizer, folder / f"{i}.gguf", "f32", model_type=CASES[name][0])
    theirs = ask_llama_cpp(paths.values(), forced)
    return {bug: (our_answer(models[bug], forced), theirs[str(paths[bug])]) for bug in BUGS}


@pytest.mark.parametrize("bug", BUGS)
def test_llama_cpp_catches_planted_bugs(bugged, bug):
    ours, theirs = bugged[bug]
    assert isinstance(theirs, str) or not (ours - theirs).abs().max() < 0.1, bug
