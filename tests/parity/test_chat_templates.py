"""Rendered text and marks equal transformers' apply_chat_template for the same Jinja: our templates, and foreign ones."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zero2llm.tokenizers.bytes import alphabet, to_chars
from zero2llm.tokenizers.chat import Style, render_ids, render_text
from zero2llm.tokenizers.foreign import read_foreign
from zero2llm.tokenizers.shipped import SHIPPED, shipped

CONTROLS = sorted({c for s in SHIPPED.values() for c in s.controls} | {"[INST]", "[/INST]", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<|python_tag|>"})
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@cache
def library() -> Tokenizer:
    """One token a byte, and every control string: ids say exactly which characters a mask covers."""
    vocab = {name: i for i, name in enumerate([*CONTROLS, *(to_chars(b) for b in alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in CONTROLS])
    return made


@cache
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=library(), **NAMES)


def same_text(template, messages, tools=None, style=None):
    for asked in (False, True):
        expected = theirs().apply_chat_template(messages, tools=tools, chat_template=template, add_generation_prompt=asked, tokenize=False, **(style or {}))
        assert render_text(template, messages, tools=tools, add_generation_prompt=asked, style=Style({**NAMES, **(style or {})})) == expected
    return expected


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Wetter <für> \"Städte\" & 城市", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]
SAID = ["hi", "你好，世界", " padded ", "\n\nlead", "tail\n\n", "a {{ 1 + 1 }} b", "<b>&amp;</b> \"q\" 'q'", "def f(x):\n\treturn x", "x" * 50, "{\"a\": [1, 2.5, null]}", "<think>\nso\n</think>\n\nthus"]


def talk(rng: random.Random, kind: tuple[str, ...]):
    """A conversation of everything that a template has a place for, and its tools."""
    say, tools = lambda: rng.choice(SAID), TOOLS if "tools" in kind and rng.random() < 0.6 else None
    messages = [{"role": "system", "content": say()}] if "system" in kind and rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": say()})
        if tools and rng.random() < 0.6:
            call = {"type": "function", "function": {"name": "weather", "arguments": {"city": say(), "n": 2, "deep": [True, None, "é"]}}}
            messages.append({"role": "assistant", "content": rng.choice(["", say()]), "tool_calls": [call] * rng.randint(1, 2)})
            messages += [{"role": "tool", "content": say()} for _ in range(rng.randint(1, 2))]
        thought = {"reasoning_content": say()} if "thinking" in kind and rng.random() < 0.5 else {}
        messages.append({"role": "assistant", "content": say(), **thought})
    return messages, tools


@pytest.mark.parametrize("name", SHIPPED)
def test_our_templates_render_and_mark_the_same(name):
    rng, template = random.Random(name), shipped(name)
    table = {c: library().token_to_id(c) for c in CONTROLS}
    for _ in range(25):
        messages, tools = talk(rng, SHIPPED[name].holds)
        style = rng.choice([{}, {}, {"enable_thinking": False}, {"open_thinking": True}, {"keep_thinking": True}])
        same_text(template, messages, tools, style)
        out = theirs().apply_chat_template(messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **style)
        encode = lambda text: library().encode(text, add_special_tokens=False).ids
        plain = not any("<think>" in str(m["content"]) for m in messages if m["role"] != "assistant")
        ids, mask = render_ids(template, messages, encode, table, tools=tools, style=Style(style))
        if plain:  # they let a user type <think>; with us it stays text
            assert (ids, mask) == (out["input_ids"], out["assistant_masks"])
        assert library().decode(ids, skip_special_tokens=False) == library().decode(out["input_ids"], skip_special_tokens=False)


SENT = st.text(alphabet="ab你é \n<>|/{}\"'%#\\&", max_size=15)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SHIPPED)), st.lists(st.tuples(SENT, SENT), min_size=1, max_size=3), st.booleans())
def test_our_templates_on_any_text(name, pairs, system):
    messages = [{"role": "system", "content": "s"}] * (system and "system" in SHIPPED[name].holds)
    messages += [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    same_text(shipped(name), messages)


FOREIGN = {  # written for this test, each after the manner of a family
    "mistral, alternation and tool ids": """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and tools is not none %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }} [/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}[RESULT] {{ m.content }}[/RESULT]{% endif %}{% endfor %}""",
    "zephyr, roles between bars": "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "deepseek, thoughts dropped, namespace": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, system_prompt='', n=0) %}{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system_prompt = ns.system_prompt + m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for m in messages %}{%- set ns.n = ns.n + 1 %}{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{%- elif m['role'] == 'assistant' and m['content'] %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + c + eos_token }}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}{{ ns.n }}""",
    "llama 3.1, dates and pretty json": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "macros, break and continue, dict": """{%- macro say(m) -%}<|{{ m.role }}|>{{ m.content | replace('\n', ' ') }}<|end|>{%- endmacro -%}
{%- set names = dict(user='U', assistant='A') -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if loop.index0 > 3 -%}{%- break -%}{%- endif -%}
    {{- names.get(m.role, 'X') }}{{ say(m) -}}
{%- endfor -%}
{{ names | tojson(sort_keys=true, ensure_ascii=true) }}{{ messages | length }}{{ messages[-1]['content'][::-1] }}""",
    "gpt-oss, thoughts by another name": "{% for m in messages %}{% if m.thinking %}<|start|>analysis {{ m.thinking }}<|end|>{% endif %}<|start|>{{ m.role }} {{ m.content }}<|end|>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}{{ tools | length if tools else 0 }}",
    "smollm3, header inside the marks": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}/no_think{% endif %}",
    "whitespace control": "  {% for m in messages %}\n    {%+ if m.role == 'user' %}  {{ m.content }}\n    {%- endif %}\n\t{# note #}\n  {% endfor %}\n{{ '' }}\n",
    "escapes and filters": "{{ messages | tojson }}{{ messages | map(attribute='role') | join(',') }}{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content | upper | e }}{% for m in messages if m.role != 'tool' %}{{ loop.index }}{{ m.content | length }}{% else %}none{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("family", FOREIGN)
def test_foreign_templates_render_the_same(family):
    rng, holds = random.Random(family), ("system", *(k for k in ("tools", "thinking") if k in FOREIGN[family]))
    for _ in range(30):
        same_text(FOREIGN[family], *talk(rng, holds), rng.choice([{}, {"enable_thinking": False}, {"date_string": "1 Jan 2026"}]))


def test_messages_are_prepared_as_theirs():
    template = "{{ messages | tojson }}{{ tools }}{{ documents }}{# reasoning tool_calls #}"
    call = {"id": "abc", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why"}]
    same_text(template, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].update({'a': 1}) }}", "{{ 1 / 0 }}", "{{ none + 'x' }}",
        "{{ messages[9].content.x }}", "{% set ns = namespace(a=1) %}{% set ns._a = 2 %}", "{{ namespace(_a=1) }}", "{{ range(10**9) }}", "{% for m in messages %}", "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}", "{{ raise_exception.__globals__.x }}", "{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ dict.mro() }}", "{{ '%s'.format.__self__.x }}", "{% include 'x' %}",
    ],
)  # fmt: skip
def test_both_refuse_the_same(template):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(Exception):  # noqa: B017  (theirs raises many kinds)
        theirs().apply_chat_template(messages, chat_template=template, tokenize=False)
    with pytest.raises(ValueError, match="chat template: "):
        render_text(template, messages)


@pytest.mark.parametrize("form", ["jinja", "json", "config", "named", "named files"])
def test_templates_of_a_folder_are_found_as_transformers_finds_them(tmp_path, form):
    two = {"default": "{{ bos_token }}D{{ messages[0].content }}", "tool_use": "T{{ tools | tojson }}{{ messages[0].content }}{{ eos_token }}"}
    one = form not in ("named", "named files")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library(), **NAMES, chat_template=two["default"] if one else two)
    tokenizer.save_pretrained(tmp_path, save_jinja_files=form in ("jinja", "named files"))
    if form == "json":
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": config.pop("chat_template")}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_foreign(tmp_path)
    assert found.templates == ({"default": two["default"]} if one else two) and NAMES.items() <= found.names.items()
    for tools in (None, TOOLS):
        if one and tools:
            continue
        messages = [{"role": "user", "content": "hi"}]
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert render_text(found.choose(tools=tools is not None), messages, tools=tools, style=Style(found.names)) == expected
    with pytest.raises(ValueError, match="no chat template 'rag'; there are: default"):
        found.choose("rag")


def test_old_forms_and_faults_of_folders(tmp_path):
    assert read_foreign(tmp_path).templates == {}
    with pytest.raises(ValueError, match="'default'; there are: none"):
        read_foreign(tmp_path).choose()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "x"}], "eos_token": None, "pad_token": "<p>"}))
    found = read_foreign(tmp_path)
    assert found.templates == {"default": "x"} and found.names == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"}
    for content, word in (("{", "is not JSON"), ("[]", "an object was expected"), ('{"chat_template": 7}', "neither a text"), ('{"chat_template": "{% for %}"}', "'default' is no Jinja")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=word):
            read_foreign(tmp_path)
