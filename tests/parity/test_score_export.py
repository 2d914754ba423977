"""Reward models against transformers' classifiers with one label, both ways: scores on ragged rows, settings, what is refused; peft."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers as hf

from tests.parity.test_hf_families import CASES, SIZES, randomise
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.wrap import unwrap, wrap
from zero2llm.core.seq import Seq
from zero2llm.interop import foreign, hf_config, score
from zero2llm.interop import hf as ours_hf
from zero2llm.interop.foreign import import_model
from zero2llm.interop.gguf.write import plan_gguf
from zero2llm.interop.hf import export_hf, load_hf
from zero2llm.interop.hf_config import FAMILIES, family_of
from zero2llm.interop.peft.read import load_peft
from zero2llm.interop.peft.write import save_peft
from zero2llm.interop.read_hf import read_hf
from zero2llm.interop.score import WITHOUT, as_language_model, padding, score_notes, trunk
from zero2llm.model.heads import add_score, row_scores
from zero2llm.model.lm import LM
from zero2llm.model.presets import gpt2, llama
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint

PLAIN = {
    "gpt2": (hf.GPT2LMHeadModel, dict(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=None, eos_token_id=None)),
    "llama": (hf.LlamaForCausalLM, SIZES),
    "qwen3": (hf.Qwen3ForCausalLM, SIZES),
}
ALL = {name: case for name, case in (PLAIN | CASES).items() if case[0].config_class.model_type not in WITHOUT}
ONE_EACH = {kind.config_class.model_type: name for name, (kind, _) in reversed(ALL.items())}.values()
PAD, LENGTHS = 3, torch.tensor([13, 1, 7, 4])


def classifier(name, labels=1):
    kind, keys = ALL[name]
    return randomise(hf.AutoModelForSequenceClassification.from_config(kind.config_class(**keys | dict(num_labels=labels, pad_token_id=PAD))))


def ragged(vocab=61, pad=PAD):
    """Rows of several lengths, padded on the right; the padding token also stands inside one."""
    tokens = torch.randint(4, vocab, (4, 13), generator=torch.Generator().manual_seed(0))
    tokens[0, 5] = pad
    return torch.where(torch.arange(13) < LENGTHS[:, None], tokens, pad)


@torch.no_grad()
def our_scores(model, tokens):
    seq = Seq.ragged(LENGTHS, 13)
    return row_scores(model.score(model(tokens, seq)[0]), seq)


@torch.no_grad()
def their_scores(model, tokens):
    mask = (torch.arange(13) < LENGTHS[:, None]).long()
    return model(tokens, attention_mask=mask, use_cache=False).logits[:, 0]


def apart(ours, theirs):
    assert theirs.std() > 0.05
    return ((ours - theirs).abs().max() / theirs.std()).item()


def test_every_family_is_one_or_the_other():
    tested = {kind.config_class.model_type for kind, _ in ALL.values()}
    assert tested == set(FAMILIES) - set(WITHOUT)


@pytest.mark.parametrize("name", [name if name in ONE_EACH else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_theirs_is_read_and_written_again(name, tmp_path):
    theirs = classifier(name)
    theirs.save_pretrained(tmp_path)
    cfg, state = load_hf(tmp_path)
    assert cfg.score_head == "reward" and cfg.tie_embeddings
    model = LM(cfg).eval()
    model.load_state_dict(state)
    tokens = ragged()
    assert apart(our_scores(model, tokens), their_scores(theirs, tokens)) < 1e-5
    back = ours_hf.to_hf_tensors(model.state_dict(), cfg, theirs.config.model_type)
    assert back["score.weight"].equal(theirs.score.weight.detach())
    again = hf_config.to_hf_config(cfg, pad=PAD, model_type=theirs.config.model_type)
    assert again["architectures"] == theirs.config.architectures == [type(theirs).__name__]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat; the dog sat on the cat. " * 9], 272)


def reward_model(vocab, make=lambda v: llama(v, 24, 2, 4, 2, 40, 128), tied=True):
    model = randomise(LM(replace(make(vocab), tie_embeddings=tied)))
    add_score(model, "reward")
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def exported(model, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    return export_hf(model.state_dict(), model.cfg, tmp_path / "tokenizer", tmp_path / "out")


def opened(out):
    theirs, info = hf.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return theirs.eval()


@pytest.mark.parametrize("make", [lambda v: llama(v, 24, 2, 4, 2, 40, 128), lambda v: gpt2(v, 24, 2, 4, 128)], ids=["llama", "gpt2"])
def test_ours_opens_there_with_nothing_but_the_folder(tokenizer, tmp_path, make):
    model = reward_model(tokenizer.vocab_size, make)
    out = exported(model, tokenizer, tmp_path)
    theirs, other = opened(out), hf.AutoTokenizer.from_pretrained(out)
    assert theirs.config.num_labels == 1 and theirs.config.problem_type == "regression"
    assert theirs.config.pad_token_id == other.pad_token_id == tokenizer.pad_id and not (out / "generation_config.json").exists()
    tokens = ragged(272, tokenizer.pad_id)
    assert apart(our_scores(model, tokens), their_scores(theirs, tokens)) < 1e-5
    chat = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "a mat"}]
    ids, _ = tokenizer.render(chat)
    assert ids == other.apply_chat_template(chat, tokenize=True, return_dict=False), "what TRL scores is what we score"


def test_what_is_left_out_is_said(tokenizer, tmp_path):
    model = reward_model(tokenizer.vocab_size, tied=False)
    out = exported(model, tokenizer, tmp_path)
    assert score_notes(model.state_dict(), model.cfg, tmp_path / "tokenizer") == ["left out: the vocabulary's head, which a classifier has no place for"]
    torch.nn.init.constant_(model.score.bias, 0.5)
    notes = score_notes(model.state_dict(), model.cfg, tmp_path / "tokenizer")
    assert notes[0].startswith("left out: the bias 0.5 of the score head")
    tokens = ragged(272, tokenizer.pad_id)
    assert apart(our_scores(model, tokens) - 0.5, their_scores(opened(out), tokens)) < 1e-5
    bare = LM.clone(model)
    assert "left out: the score head (25 values)" in as_language_model(bare) and bare.cfg.score_head is False
    assert as_language_model(bare) is None and set(model.state_dict()) - set(bare.state_dict()) == {"score.weight", "score.bias"}


def stopping_pad(tokenizer):
    """One whose padding token also ends texts, as SmolLM2's does."""
    return Tokenizer(tokenizer.library, tokenizer.template, replace(tokenizer.roles, pad=tokenizer.library.id_to_token(tokenizer.eos_id)))


def test_a_padding_token_that_ends_texts_is_changed_and_that_is_said(tokenizer, tmp_path):
    odd = stopping_pad(tokenizer)
    assert padding(tokenizer) == tokenizer.pad_id and padding(odd) not in odd.stop_ids
    model = reward_model(tokenizer.vocab_size)
    out = exported(model, odd, tmp_path)
    other = hf.AutoTokenizer.from_pretrained(out)
    assert other.pad_token_id == opened(out).config.pad_token_id == padding(odd)
    notes = score_notes(model.state_dict(), model.cfg, tmp_path / "tokenizer")
    assert "padding is" in notes[0] and "texts end with that" in notes[0]
    tokens = ragged(272, other.pad_token_id)
    tokens[2, 6] = odd.eos_id  # the last of its text
    assert apart(our_scores(model, tokens), their_scores(opened(out), tokens)) < 1e-5


def test_imported_it_is_a_checkpoint_with_a_score_head(tokenizer, tmp_path):
    model = reward_model(tokenizer.vocab_size, tied=False)
    out = exported(model, tokenizer, tmp_path)
    found = read_hf(out)
    assert "a reward model" in found.notes[0]
    import_model(found, tmp_path / "ours")
    again = Checkpoint.open(tmp_path / "ours").load_model()
    assert again.cfg.score_head == "reward"
    tokens = ragged(272, tokenizer.pad_id)
    torch.testing.assert_close(our_scores(again, tokens), our_scores(model, tokens))


def changed(folder, **tensors):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in state.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_other_classifiers_are_refused_by_name(tmp_path):
    classifier("llama", 2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="2 labels; a reward model has one"):
        load_hf(tmp_path / "two")
    classifier("llama").save_pretrained(tmp_path / "bias")
    with pytest.raises(ValueError, match="score.bias.* not supported"):
        load_hf(changed(tmp_path / "bias", **{"score.bias": torch.zeros(1)}))
    classifier("llama").save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="a classifier without score.weight"):
        load_hf(changed(tmp_path / "none", **{"score.weight": None}))
    file = tmp_path / "none" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["LlamaForTokenClassification"]}))
    with pytest.raises(ValueError, match="unexpected score.weight"):
        load_hf(changed(tmp_path / "none", **{"score.weight": torch.zeros(1, 24), "lm_head.weight": torch.zeros(61, 24)}))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "kimi_linear"])
def test_a_family_without_the_class_is_refused_before_writing(name, tokenizer, tmp_path):
    kind, keys = CASES[name]
    model = LM(hf_config.from_hf_config(kind.config_class(**keys).to_dict() | {"vocab_size": 272}))
    assert family_of(model.cfg) == name
    add_score(model, "reward")
    with pytest.raises(ValueError, match="transformers has no .*ForSequenceClassification"):
        exported(model, tokenizer, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_gguf_and_a_critic_are_refused_in_the_library(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    model = reward_model(tokenizer.vocab_size)
    with pytest.raises(ValueError, match="no GGUF export of a reward model"):
        plan_gguf(model.state_dict(), model.cfg, tmp_path, "f16")
    add_score(model)
    with pytest.raises(ValueError, match="score_head: True"):
        export_hf(model.state_dict(), model.cfg, tmp_path, tmp_path / "out")


def adapted(vocab, base_folder, tokenizer):
    """A reward model that is an adapter: its base exported, the adapter with random factors, a head beside it."""
    base = randomise(LM(llama(vocab, 24, 2, 4, 2, 40, 128)))
    tokenizer.save(base_folder / "tokenizer")
    export_hf(base.state_dict(), base.cfg, base_folder / "tokenizer", base_folder / "hf")
    wrap(base, LoRAConfig(r=4))
    add_score(base, "reward")
    with torch.no_grad():
        for p in base.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
        base.score.bias.zero_()
    return base.eval(), base_folder / "hf"


def test_an_adapter_takes_its_head_to_peft_and_back(tokenizer, tmp_path):
    model, base = adapted(tokenizer.vocab_size, tmp_path, tokenizer)
    save_peft(model, tmp_path / "peft", str(base))
    data = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert data["task_type"] == "SEQ_CLS" and data["modules_to_save"] == ["score"]
    start = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    start.config.pad_token_id = tokenizer.pad_id
    theirs = peft.PeftModel.from_pretrained(start, tmp_path / "peft").eval()
    tokens = ragged(272, tokenizer.pad_id)
    assert apart(our_scores(model, tokens), their_scores(theirs, tokens)) < 1e-5
    theirs.save_pretrained(tmp_path / "again")  # peft adds the name "classifier"
    for folder in ("peft", "again"):
        cfg, state = load_hf(base)
        ours = LM(cfg)
        ours.load_state_dict(state)
        load_peft(ours, tmp_path / folder)
        assert ours.cfg.score_head == "reward"
        torch.testing.assert_close(our_scores(unwrap(ours).eval(), tokens), our_scores(model, tokens), atol=1e-5, rtol=1e-5)


def test_a_head_of_two_labels_and_another_module_are_refused(tokenizer, tmp_path):
    model, base = adapted(tokenizer.vocab_size, tmp_path, tokenizer)
    save_peft(model, tmp_path / "peft", str(base))
    plain = LM(load_hf(base)[0])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | {"base_model.model.score.weight": torch.zeros(2, 24)}, file)
    with pytest.raises(ValueError, match=r"score.weight is \(2, 24\)"):
        load_peft(plain, tmp_path / "peft")
    settings = tmp_path / "peft" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"modules_to_save": ["score", "embed_tokens"]}))
    with pytest.raises(ValueError, match="modules_to_save = .'embed_tokens'.: not supported"):
        load_peft(plain, tmp_path / "peft")
    assert plain.score is None


def unturned(monkeypatch):
    right = score.head_rule()
    rule = replace(right, pack=lambda parts: [parts[0].flip(0)[None].contiguous()], unpack=lambda whole: [whole[0][0].flip(0), whole[0].new_zeros(1)])
    monkeypatch.setattr(hf_config, "head_rule", lambda: rule)


def two_labels(monkeypatch):
    right = score.score_keys
    wrong = lambda *a: {k: v for k, v in right(*a).items() if k not in ("id2label", "label2id")}
    monkeypatch.setattr(hf_config, "score_keys", wrong)


BUGS = {
    "channels reversed, alike on the way back": (unturned, "test_ours"),
    "the number of labels is not told": (two_labels, "test_ours"),
    "servers squash the score": (
        lambda m: m.setattr(hf_config, "score_keys", lambda *a: score_keys_without(*a, "problem_type")), "test_ours",
    ),
    "padded as ever, though texts end so": (lambda m: m.setattr(ours_hf, "padding", lambda tokenizer: tokenizer.pad_id), "test_pad"),
    "not known as a classifier": (lambda m: m.setattr(hf_config, "is_classifier", lambda data: False), "test_import"),
    "the class of the language model": (
        lambda m: m.setattr(hf_config, "score_keys", lambda *a: score_keys_without(*a, "architectures")), "test_import",
    ),
    "any number of labels": (lambda m: m.setattr(foreign, "check_head", lambda *a: None), "test_refused"),
}  # fmt: skip
score_keys_right = score.score_keys


def score_keys_without(*args):
    *args, left_out = args
    return {key: value for key, value in score_keys_right(*args).items() if key != left_out}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(bug, tokenizer, tmp_path, monkeypatch):
    plant, check = BUGS[bug]
    checks = {
        "test_ours": lambda: test_ours_opens_there_with_nothing_but_the_folder(tokenizer, tmp_path, lambda v: llama(v, 24, 2, 4, 2, 40, 128)),
        "test_pad": lambda: test_a_padding_token_that_ends_texts_is_changed_and_that_is_said(tokenizer, tmp_path),
        "test_import": lambda: test_imported_it_is_a_checkpoint_with_a_score_head(tokenizer, tmp_path),
        "test_refused": lambda: test_other_classifiers_are_refused_by_name(tmp_path),
    }
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError, KeyError, pytest.fail.Exception)):
        checks[check]()


def test_a_trunk_has_no_head():
    cfg = replace(llama(61, 24, 2, 4, 2, 40, 128), tie_embeddings=False, score_head="reward")
    assert trunk(cfg).tie_embeddings and trunk(cfg).score_head is False
