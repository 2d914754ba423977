"""An exported folder is opened by transformers' Auto classes with nothing but the folder, and by us."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parity.test_hf import OURS, edit, randomise
from zero2llm.core.files import save_tensors
from zero2llm.interop.hf import export_hf, load_hf, to_hf_config, to_hf_tensors
from zero2llm.interop.verify import verify_hf
from zero2llm.model.lm import LM
from zero2llm.model.presets import gpt2, llama, qwen3
from zero2llm.tokenizers.tokenizer import Tokenizer

CHATS = [[{"role": "user", "content": "the cat?"}], [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"},
         {"role": "assistant", "content": "a mat"}, {"role": "user", "content": "  and\nthen "}]]  # fmt: skip
PROMPTS = ["the cat sat on the mat", " naïve 猫\n\n 12", "x"]
MODELS = {
    "gpt2": lambda v: gpt2(v, 24, 2, 4, 128),
    "llama": lambda v: edit(llama(v, 24, 2, 4, 2, 40, 128), mixer__position={"kind": "rope", "layout": "interleaved"}),
    "qwen3": lambda v: qwen3(v, 24, 2, 4, 2, 40, 128, head_dim=10, tied=True),
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat; the dog sat on the cat. " * 9], 272)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_it_and_agrees(name, tokenizer, folder, tmp_path):
    model = randomise(LM(MODELS[name](tokenizer.vocab_size)))
    out = export_hf(model.state_dict(), model.cfg, folder, tmp_path / "out", {"do_sample": True, "temperature": 0.7})
    found = verify_hf(out, model, tokenizer, PROMPTS, CHATS)
    assert found.logit_diff < 1e-5 * found.logit_std and found.ids_equal and found.chat_equal
    theirs, other = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert set(theirs.generation_config.eos_token_id) == tokenizer.stop_ids and theirs.generation_config.temperature == 0.7
    assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert other.decode(other.encode(PROMPTS[1])) == PROMPTS[1]
    row = torch.tensor([tokenizer.encode(PROMPTS[0])])
    assert theirs.generate(row, max_new_tokens=4, do_sample=False, eos_token_id=None).shape[1] == row.shape[1] + 4


@pytest.mark.parametrize("name", MODELS)
def test_we_open_it(name, tokenizer, folder, tmp_path):
    model = randomise(LM(MODELS[name](tokenizer.vocab_size))).bfloat16()
    cfg, state = load_hf(export_hf(model.state_dict(), model.cfg, folder, tmp_path / "out"))
    twin = LM(cfg).bfloat16()
    twin.load_state_dict(state)
    assert to_hf_config(cfg) == to_hf_config(model.cfg)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs, again = to_hf_tensors(model.state_dict(), model.cfg), to_hf_tensors(twin.state_dict(), cfg)
    assert all(torch.equal(theirs[k], again[k]) and again[k].dtype == torch.bfloat16 for k in theirs)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_folders_that_transformers_wrote_are_read(tmp_path):
    from tests.parity.test_hf import THEIRS, logits, relative

    for name, make in THEIRS.items():
        theirs = randomise(make())
        theirs.save_pretrained(tmp_path / name)
        cfg, state = load_hf(tmp_path / name)
        ours = LM(cfg)
        ours.load_state_dict(state)
        x = torch.randint(61, (1, 9))
        assert relative(logits(ours, x), theirs(x, use_cache=False).logits) < 1e-5, name


def test_shards_with_an_index_open_in_transformers(tokenizer, folder, tmp_path):
    model = randomise(LM(OURS["llama"]()))
    model = randomise(LM(edit(model.cfg, vocab_size=tokenizer.vocab_size)))
    out = export_hf(model.state_dict(), model.cfg, folder, tmp_path / "out")
    (out / "model.safetensors").unlink()
    save_tensors(to_hf_tensors(model.state_dict(), model.cfg), out, max_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert verify_hf(out, model, tokenizer, PROMPTS).logit_diff < 1e-5
    assert load_hf(out)[1].keys() == model.state_dict().keys()


def test_a_target_in_use_and_a_wrong_tokenizer_are_refused_before_writing(tokenizer, folder, tmp_path):
    model = LM(llama(tokenizer.vocab_size, 24, 1, 4, 2, 40, 32))
    state, out = model.state_dict(), tmp_path / "out"
    small = LM(llama(tokenizer.vocab_size - 1, 24, 1, 4, 2, 40, 32))
    with pytest.raises(ValueError, match="the tokenizer has id 271, the model a vocabulary of 271"):
        export_hf(small.state_dict(), small.cfg, folder, out)
    with pytest.raises(ValueError, match="unknown keys .*temprature"):
        export_hf(state, model.cfg, folder, out, {"temprature": 1.0})
    with pytest.raises(ValueError, match="eos_token_id 272 is outside"):
        export_hf(state, model.cfg, folder, out, {"eos_token_id": 272})
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        export_hf(state, model.cfg, tmp_path, out)
    assert not out.exists()
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_hf(state, model.cfg, folder, out)
    assert [p.name for p in out.iterdir()] == ["precious"] and not list(tmp_path.glob(".out*"))
    export_hf(state, model.cfg, folder, out, overwrite=True)
    assert not (out / "precious").exists() and (out / "chat_template.jinja").is_file()
