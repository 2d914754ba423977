"""Tokenizers of others: the same ids as the program that made them, and as transformers after export."""

from __future__ import annotations

import io
import json
import random
import sys
import types
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from zero2llm.data.sources import documents
from zero2llm.tokenizers import charsmap, engines
from zero2llm.tokenizers.bytes import SPLITS, to_chars
from zero2llm.tokenizers.charsmap import Charsmap
from zero2llm.tokenizers.exports import write_ranks
from zero2llm.tokenizers.imports import protobuf, ranks, sentencepiece
from zero2llm.tokenizers.tokenizer import Tokenizer

TEXTS = [
    "Call me Ishmael. It isn't far; we'll see, I'M sure. 1234567 3.14",
    "关关雎鸠，在河之洲。窈窕淑女，君子好逑。\u3000混合 mixed 文字!",
    "👨‍👩‍👧 café naïve e\u0301 é ﬁ ①② ｆｕｌｌ Ⅷ 🇨🇳 가각",
    "def f(x):\n\treturn x ** 2  # ok\r\n\r\n    pass\n",
    "  leading and trailing   \n\n\n", "aaaaaaaaaaaaaaa abababababab", "", " ", "\n", "x", "▁x▁", "\x00\x01\x7f",
]  # fmt: skip
TYPED = ["<s> typed </s>", "<0x41>", "<unk>", "</s>", "a<0x0A>b"]
MIXED = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab the\n ▁ｆ\u0301\u0327①가ㄱ关雎</s>0x41")), max_size=40)
CHAT = [{"role": "user", "content": "hi 你好"}, {"role": "assistant", "content": "yo!"}]


@cache
def corpus() -> tuple[str, ...]:
    texts = list(documents(["embedded:zh_poetry_small"]))[:150] + list(documents(["embedded:en_moby_dick"]))[:12]
    return tuple([*texts, *TEXTS])


def planted(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """The module with one fault."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    twin = types.ModuleType(f"planted_{len(sys.modules)}")
    sys.modules[twin.__name__] = twin
    exec(compile(source.replace(old, new), module.__file__, "exec"), twin.__dict__)
    return twin


# ------------------------------------------------------------------------------------------------- SentencePiece

SP = {
    "unigram, nmt_nfkc": {"model_type": "unigram"},
    "unigram, bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram, own symbols": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                             "add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "▁▁"], "pad_id": 3},
    "bpe, nmt_nfkc": {"model_type": "bpe"},
    "bpe, bytes": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe, own symbols": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                         "add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "▁▁"], "split_digits": True},
    "bpe, own symbols behind a blank": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                                        "remove_extra_whitespaces": False, "user_defined_symbols": ["<sep>"]},
}  # fmt: skip


@cache
def sp_bytes(name: str) -> bytes:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    lines = [line for text in corpus() for line in text.split("\n") if line.strip()][:900]
    trainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=1500, character_coverage=0.98, hard_vocab_limit=False,
                  minloglevel=2, num_threads=1, **SP[name])  # fmt: skip
    return model.getvalue()


@cache
def sp_pair(name: str, folder: str):
    import sentencepiece as spm

    file = Path(folder) / f"{name}.model"
    file.write_bytes(sp_bytes(name))
    return spm.SentencePieceProcessor(model_file=str(file)), Tokenizer.load(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    pytest.importorskip("sentencepiece")
    return str(tmp_path_factory.mktemp("sentencepiece"))


@pytest.mark.parametrize("name", list(SP))
def test_sentencepiece_gives_the_same_ids(name, folder):
    theirs, ours = sp_pair(name, folder)
    rng = random.Random(0)
    mess = ["".join(rng.choice("ab the<sep> ▁\nｆ\u0301\u0327\u0300①가ㄱㅏﬁeé关") for _ in range(rng.randrange(40))) for _ in range(400)]
    for text in (*TEXTS, *TYPED, *mess, "<sep>a<sep>", "x<sep>  y"):
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.encode_batch(TEXTS) == [theirs.encode(t) for t in TEXTS]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("name", list(SP))
def test_sentencepiece_gives_the_same_text(name, folder):
    """The blank that it puts before a text is not part of it, also where it squeezes blanks. Theirs writes unknown pieces otherwise."""
    theirs, ours = sp_pair(name, folder)
    for text in (*corpus()[:60], *TEXTS, " a  b ", "the sea", "关关雎鸠 the"):
        ids = ours.encode(text)
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)
        stream = ours.stream()
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == ours.decode(ids)
        assert ours.nature.form == "text" or ours.decode_bytes(ours.encode_bytes(text.encode())) == text.encode()


@pytest.mark.parametrize("name", list(SP))
def test_sentencepiece_gives_the_same_ids_for_anything(name, folder):
    theirs, ours = sp_pair(name, folder)

    @settings(max_examples=60, deadline=None)
    @given(MIXED)
    def same(text):
        assert ours.encode(text) == theirs.encode(text)

    same()


@pytest.mark.parametrize("name", list(SP))
def test_sentencepiece_goes_to_a_folder_and_back(name, folder, tmp_path):
    _, ours = sp_pair(name, folder)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint() == ours.fingerprint() and again.roles == ours.roles
    assert again.encode_batch([*TEXTS, *TYPED]) == ours.encode_batch([*TEXTS, *TYPED])


@pytest.mark.parametrize("name", [n for n in SP if "nfkc" not in n and "own" not in n])
def test_transformers_opens_an_exported_sentencepiece(name, folder, tmp_path):
    from transformers import AutoTokenizer

    _, ours = sp_pair(name, folder)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert all(theirs.encode(t, add_special_tokens=False) == ours.encode(t) for t in TEXTS)
    assert theirs.eos_token_id == ours.eos_id


def test_a_folder_with_a_model_brings_its_chat_template(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sp_bytes("bpe, bytes"))
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    ours, (theirs, _) = Tokenizer.load(tmp_path), sp_pair("bpe, bytes", folder)
    ids, _ = ours.render(CHAT[:1], add_generation_prompt=True)
    assert ours.render_text(CHAT[:1]) == "<s>[user] hi 你好 </s>" and ids == [1, *theirs.encode("[user] hi 你好 "), 2]
    (tmp_path / "x.tiktoken").write_text("YQ== 0")
    with pytest.raises(ValueError, match="several tokenizers, name one: tokenizer.model, x.tiktoken"):
        Tokenizer.load(tmp_path)


FAULTS = {
    "only one character is matched": ("self.longest = max(map(len, self.table), default=0)", "self.longest = 1"),
    "the shortest match": ("if text[start:end] in self.table), start + 1)", "if text[start:end] in self.table and end < start + 2), start + 1)"),
    "the value is looked for at the key": ("int(units[below]) & 0x7FFFFFFF", "int(units[place]) & 0x7FFFFFFF"),
    "a key that begins another is passed over": ("            if has_leaf[place]:", "            if has_leaf[place] and labels[below ^ 98] != 98:"),
    "values one byte late": ("return values[place :", "return values[place + 1 :"),
    "what stands before a match is dropped": ("out += [text[begin:start], ", "out += ["),
    "a match is searched again in what follows it": ("            begin = end\n", "            begin = start + 1\n"),
}  # fmt: skip


MESS = [range(0x20, 0x7F), range(0xA0, 0x600), range(0x300, 0x370), range(0x1100, 0x1200), range(0x3000, 0xD7FF), range(0xE000, 0x20000)]


def test_the_table_of_normalisation():
    spm = pytest.importorskip("sentencepiece")
    theirs = spm.SentencePieceNormalizer(rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False)
    ours, rng = Charsmap(sentencepiece.parse(sp_bytes("unigram, nmt_nfkc")).table), random.Random(1)
    for text in ["".join(chr(rng.choice(rng.choice(MESS))) for _ in range(20)) for _ in range(400)] + TEXTS:
        assert ours.apply(text) == theirs.normalize(text)


@cache
def small_table(folder: str) -> bytes:
    """A table of a few rules with common beginnings: a, ab, abc and letters of two to four bytes."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    rules, model = {"a": "1", "ab": "22", "abc": "3", "bc": "", "é": "e", "éé": "E", "关": "開", "关关": "x", "😀": ":)", "cc": "关"}, io.BytesIO()
    spelled = "".join(f"{' '.join(f'{ord(c):X}' for c in key)}\t{' '.join(f'{ord(c):X}' for c in value)}\n" for key, value in rules.items())
    (Path(folder) / "rules.tsv").write_text(spelled, encoding="utf-8")
    trainer.train(sentence_iterator=iter(["x y z 1 2 3"] * 9), model_writer=model, vocab_size=40, hard_vocab_limit=False, model_type="char",
                  normalization_rule_tsv=str(Path(folder) / "rules.tsv"), minloglevel=2)  # fmt: skip
    return next(v for tag, v in protobuf.fields(next(v for tag, v in protobuf.fields(model.getvalue()) if tag == 3)) if tag == 2)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_the_table_are_seen(fault, folder):
    spm, rng = pytest.importorskip("sentencepiece"), random.Random(2)
    table = small_table(folder)
    theirs = spm.SentencePieceNormalizer(rule_tsv=f"{folder}/rules.tsv", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False)
    texts = ["".join(rng.choice("abcdé关😀x ") for _ in range(12)) for _ in range(200)]
    try:
        ours = Charsmap(table) if fault is None else planted(charsmap, *FAULTS[fault]).Charsmap(table)
        same = all(ours.apply(t) == theirs.normalize(t) for t in texts)
    except (IndexError, ValueError):
        same = False
    assert same == (fault is None)


@pytest.mark.parametrize(
    "data,match",
    [
        (b"", "no pieces"),
        (b"\x0a\x05abc", "breaks off"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 12, "number breaks off"),
        (b"hello", "cannot be read|wire type|breaks off"),
    ],
)
def test_a_damaged_model_is_named(tmp_path, data, match):
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        Tokenizer.load(tmp_path / "x.model")
    assert "x.model" in str(error.value)


def test_a_model_cut_anywhere_is_refused_or_read(tmp_path):
    pytest.importorskip("sentencepiece")
    data, rng = sp_bytes("bpe, bytes"), random.Random(0)
    for _ in range(60):
        (tmp_path / "x.model").write_bytes(data[: rng.randrange(len(data))])
        try:
            Tokenizer.load(tmp_path / "x.model")
        except ValueError as error:
            assert "x.model" in str(error)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.one_of(st.integers(0, 2**63), st.binary(max_size=30)))))
def test_protobuf_fields_come_back(pairs):
    def number(n):
        out = b""
        while n > 0x7F:
            out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
        return out + bytes([n])

    spell = lambda tag, v: number(tag << 3) + number(v) if isinstance(v, int) else number(tag << 3 | 2) + number(len(v)) + v
    assert list(protobuf.fields(b"".join(spell(*pair) for pair in pairs))) == pairs


# ------------------------------------------------------------------------------------- tokenizer.json of many styles


def trained(split: str = "llama3") -> Tokenizer:
    return Tokenizer.train(corpus(), 700, split=split)


def byte_level(split: str, specials: list[str], every_cut: bool = False, **options) -> Library:
    """Bytes and merges first, control tokens behind, as GPT-2, Qwen and Llama-3 have it."""
    data = json.loads(trained(split).library.to_str())["model"]
    own = {name: i - 4 for name, i in data["vocab"].items() if i >= 4}
    merges = [tuple(pair) for pair in data["merges"]]
    if every_cut:  # as converted from tiktoken
        names = sorted(own, key=own.__getitem__)[256:]
        merges = [(n[:i], n[i:]) for n in names for i in range(1, len(n)) if n[:i] in own and n[i:] in own]
    library = Library(models.BPE(vocab=own, merges=merges, **options))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return library


def cut_as(library: Library, split: str) -> None:
    rule = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama3() -> tuple[Library, dict]:
    library = byte_level("llama3", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], True, ignore_merges=True)
    cut_as(library, "llama3")
    begin = ("<|begin_of_text|>", library.token_to_id("<|begin_of_text|>"))
    library.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[begin])
    template = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
                "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")  # fmt: skip
    return library, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": template}


def qwen2() -> tuple[Library, dict]:
    library = byte_level("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    cut_as(library, "qwen2")
    library.normalizer = normalizers.NFC()
    library.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return library, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}


def gpt2() -> tuple[Library, dict]:
    library = byte_level("gpt2", ["<|endoftext|>"])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def smollm2() -> tuple[Library, dict]:
    library = byte_level("gpt2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return library, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


def llama2() -> tuple[Library, dict]:
    pytest.importorskip("sentencepiece")
    return sentencepiece.library(sentencepiece.parse(sp_bytes("bpe, bytes"))), {"bos_token": "<s>", "eos_token": "</s>"}


def metaspace(scheme: str) -> tuple[Library, dict]:
    library, config = llama2()
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return library, config


def bert() -> tuple[Library, dict]:
    library = Tokenizer.train(corpus(), 2200, kind="wordpiece", engine="library").library
    return library, {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


def unigram() -> tuple[Library, dict]:
    library = Tokenizer.train(corpus(), 2500, kind="unigram", engine="library").library
    return library, {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


STYLES = {"llama3": llama3, "qwen2": qwen2, "gpt2": gpt2, "smollm2": smollm2, "llama2": llama2, "metaspace first": lambda: metaspace("first"),
          "metaspace always": lambda: metaspace("always"), "bert": bert, "unigram": unigram}  # fmt: skip


def written(folder: Path, library: Library, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("style", list(STYLES))
def test_the_same_ids_as_transformers_before_and_after_export(style, tmp_path):
    from transformers import AutoTokenizer

    source = written(tmp_path / "theirs", *STYLES[style]())
    ours, theirs = Tokenizer.load(source), AutoTokenizer.from_pretrained(source)
    ours.save(tmp_path / "ours")
    exported, again = AutoTokenizer.from_pretrained(tmp_path / "ours"), Tokenizer.load(tmp_path / "ours")
    for text in (*TEXTS, *corpus()[:20]):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) == exported.encode(text, add_special_tokens=False) == again.encode(text)
        if not ours.loss:
            assert ours.decode(ids) == text
    assert again.fingerprint() == ours.fingerprint() and again.roles == ours.roles
    assert (ours.eos_id, exported.eos_token_id) == (theirs.eos_token_id,) * 2 and len(theirs) == ours.vocab_size
    stream, ids = ours.stream(), ours.encode(TEXTS[0] + TEXTS[1])
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == ours.decode(ids)


def test_roles_and_rules_are_found(tmp_path):
    found = {style: Tokenizer.load(written(tmp_path / style, *STYLES[style]())) for style in ("llama3", "qwen2", "gpt2", "smollm2", "llama2", "bert")}
    assert {style: t.split for style, t in found.items()} == {
        "llama3": "llama3", "qwen2": "qwen2", "gpt2": "gpt2", "smollm2": None, "llama2": None, "bert": None,
    }  # fmt: skip
    assert {style: t.nature.form for style, t in found.items()} == {
        "llama3": "bytes", "qwen2": "bytes", "gpt2": "bytes", "smollm2": "bytes", "llama2": "blanks", "bert": "text",
    }  # fmt: skip
    llama, qwen, small = found["llama3"], found["qwen2"], found["gpt2"]
    assert llama.stop_ids == {llama.eos_id, llama.library.token_to_id("<|end_of_text|>")} and llama.bos_id != llama.eos_id
    assert qwen.stop_ids == {qwen.eos_id, qwen.pad_id} - {qwen.pad_id} | {qwen.eos_id} and qwen.bos_id == qwen.eos_id
    assert small.eos_id == small.bos_id == small.pad_id
    assert "NFC" in qwen.loss and not llama.loss and not found["smollm2"].loss
    with pytest.raises(ValueError, match="bits per byte is not defined"):
        found["bert"].byte_lengths()
    for text in TEXTS:
        assert sum(llama.byte_lengths()[i] for i in llama.encode(text)) == len(text.encode())


def test_a_chat_template_gets_the_names_of_control_tokens(tmp_path):
    from transformers import AutoTokenizer

    source = written(tmp_path / "llama3", *llama3())
    ours, theirs = Tokenizer.load(source), AutoTokenizer.from_pretrained(source)
    assert ours.render_text(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    asked = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.render(CHAT[:1], add_generation_prompt=True)[0] == asked
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(written(tmp_path / "gpt2", *gpt2())).render(CHAT)


@pytest.mark.parametrize("style", [s for s in STYLES if s != "bert"])
def test_typed_control_strings_stay_text(style, tmp_path):
    ours = Tokenizer.load(written(tmp_path / style.replace(" ", "_"), *STYLES[style]()))
    for name in ours.specials:
        ids = ours.encode(f"a {name} b")
        assert not ours.special_ids & set(ids) and ours.decode(ids) == f"a {name} b"
    assert ours.decode(ours.encode("<0x41>")) == "<0x41>"


def test_an_added_run_of_blanks_comes_back_as_blanks(tmp_path):
    """As in Gemma's tokenizer.json, where U+2581 twice is an added token."""
    library, config = llama2()
    library.add_tokens([AddedToken("▁▁▁", special=False, normalized=False), AddedToken("<|a▁b|>", special=True, normalized=False)])
    ours = Tokenizer.load(written(tmp_path / "x", library, config))
    ids = [*ours.encode("the"), library.token_to_id("▁▁▁"), *ours.encode("sea")]
    assert ours.decode(ids) == library.decode(ids) == "the    sea"
    assert ours.decode([library.token_to_id("<|a▁b|>")]) == "<|a▁b|>"  # a control token keeps its name


def test_no_end_token_is_an_error_that_says_what_to_do(tmp_path):
    library = byte_level("gpt2", ["[MASK]"])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source = written(tmp_path / "x", library, {})
    with pytest.raises(ValueError, match=r"no token is known to end a document; .*--eos.*one of: \[MASK\], !"):
        Tokenizer.load(source)
    (source / "special_tokens_map.json").write_text('{"eos_token": {"content": "[MASK]", "lstrip": false}}')
    assert Tokenizer.load(source).eos_id == library.token_to_id("[MASK]")
    (source / "special_tokens_map.json").unlink()
    assert Tokenizer.load(source, eos="[MASK]").eos_id == library.token_to_id("[MASK]")
    with pytest.raises(ValueError, match="'nothing' is not in the vocabulary"):
        Tokenizer.load(source, eos="nothing")


# ------------------------------------------------------------------------------------------- GPT-2's and tiktoken's files


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files(names, tmp_path):
    library, config = gpt2()
    data = json.loads(library.to_str())["model"]
    vocab = data["vocab"] | {"<|endoftext|>": len(data["vocab"])}
    (tmp_path / names[0]).write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / names[1]).write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in data["merges"]), encoding="utf-8")
    theirs = Tokenizer.load(written(tmp_path / "theirs", library, config))
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        ours = Tokenizer.load(path)
        assert ours.encode_batch(TEXTS) == theirs.encode_batch(TEXTS) and ours.vocab_size == theirs.vocab_size
    (tmp_path / names[1]).write_text("#version: 0.2\ne r\nq xyz\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{names[1]}, line 3: 'xyz' is not in"):
        Tokenizer.load(tmp_path)


def test_gpt2_files_of_a_vocabulary_of_ours(tmp_path):
    data = json.loads(trained("gpt2").library.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(data["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in data["merges"]), encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint() == trained("gpt2").fingerprint()


def test_ranks_go_out_and_come_back(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    source = Tokenizer.load(written(tmp_path / "llama3", *llama3()))
    about = write_ranks(tmp_path / "x.tiktoken", source.library)
    theirs = tiktoken.Encoding("x", mergeable_ranks=ranks.parse((tmp_path / "x.tiktoken").read_bytes()), **about)
    ours = Tokenizer.load(tmp_path / "x.tiktoken", split="llama3")
    for text in (*TEXTS, *corpus()):
        assert ours.encode(text) == theirs.encode_ordinary(text) == source.encode(text)
    with pytest.raises(ValueError, match="give --split"):
        Tokenizer.load(tmp_path / "x.tiktoken")
    with pytest.raises(ValueError, match="ids .* are tokens of the file and control tokens"):
        (tmp_path / "r50k_base.tiktoken").write_bytes((tmp_path / "x.tiktoken").read_bytes() + b"bm9ib2R5 50256\n")
        Tokenizer.load(tmp_path / "r50k_base.tiktoken")


@pytest.mark.parametrize("name", list(ranks.ENCODINGS))
def test_every_encoding_cuts_as_tiktoken_does(name, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    own = trained()
    table = {own.token_bytes(i): i - 4 for i in range(4, own.vocab_size)}
    import base64

    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in table.items())
    (tmp_path / f"{name}.tiktoken").write_text(lines, encoding="utf-8")
    ours = Tokenizer.load(tmp_path / f"{name}.tiktoken")
    theirs = tiktoken.Encoding("x", pat_str=ranks.ENCODINGS[name].rule, mergeable_ranks=table, special_tokens={})
    for text in (*TEXTS, "McDonald's HELLOworld camelCaseText/path\r\n", *corpus()[:30]):
        import unicodedata

        asked = unicodedata.normalize("NFC", text) if ranks.ENCODINGS[name].nfc else text
        assert ours.encode(text) == theirs.encode_ordinary(asked), text


def test_the_o200k_rule_is_what_tiktoken_ships():
    public = pytest.importorskip("tiktoken_ext.openai_public")
    import inspect

    source = inspect.getsource(public)
    assert r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}" in source and "199999" in source and "200018" in source and "100276" in source


@pytest.mark.parametrize("line,match", [("YQ== x", "line 3"), ("!!!! 7", "line 3"), ("YQ==", "line 3")])
def test_a_damaged_rank_is_named(tmp_path, line, match):
    (tmp_path / "qwen.tiktoken").write_text(f"YQ== 0\nYg== 1\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        Tokenizer.load(tmp_path / "qwen.tiktoken")


WRONG = {
    "no limit: any token may be built": ("for i in range(len(token))], ranks[token]", "for i in range(len(token))], 10**9"),
    "the rightmost of equals": ("rank, at = min((ranks.get(a + b, limit), i)", "rank, _, at = min((ranks.get(a + b, limit), -i, i)"),
    "the highest rank first": ("i) for i, (a, b) in enumerate", "i) if ranks.get(a + b, limit) >= limit else (-ranks[a + b], i) for i, (a, b) in enumerate"),
    "an own token counts as a part": ("        if rank >= limit:", "        if rank > limit:"),
    "tokens out of order": ("key=ranks.__getitem__):", "key=len):"),
    "whole pieces are merges too": ("        if len(parts) == 2:", "        if len(parts) >= 2:"),
}


@pytest.mark.parametrize("fault", [None, *WRONG])
def test_merges_from_ranks(fault):
    own = Tokenizer.train([*corpus(), "aaaa aaaaaaa abab babab " * 40], 1200)
    table = {own.token_bytes(i): i for i in range(4, own.vocab_size)}
    wanted = [tuple(pair) for pair in json.loads(own.library.to_str())["model"]["merges"]]
    module = engines if fault is None else planted(engines, *WRONG[fault])
    never = b"qzx"  # a token that its own bytes never reach
    try:
        merges, whole = module.merges_of_ranks(table | {never: own.vocab_size})
        same = [(to_chars(a), to_chars(b)) for a, b in merges] == wanted and whole == [never]
    except (ValueError, IndexError):
        same = False
    assert same == (fault is None)
