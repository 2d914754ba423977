"""Chat templates in a sandbox: Jinja with the names that transformers gives them, and nothing else.

A template is a program by a stranger. It sees messages as plain values (text, numbers, lists, objects), the functions
below, and no attribute that begins with an underscore; it cannot import, open or change anything.

Source: Hugging Face transformers 5, "Writing a chat template": trim_blocks and lstrip_blocks, raise_exception,
strftime_now, tojson without HTML escapes, loop controls, {% generation %}. Rendered text equals theirs, character by
character; where they record positions of generated text, a private character stands at each border here.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

BEGIN, END, BREAK = "\U0010fff0", "\U0010fff1", "\U0010fff2"  # private use; refused in messages
ESCAPED_BREAK = json.dumps(BREAK)[1:-1]  # what tojson(ensure_ascii=True) makes of it
# What a template may stumble over: a message that lacks what it adds up, a list that is too short.
FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        border = lambda mark: nodes.Output([nodes.TemplateData(mark)], lineno=line)
        # a scope: what is set inside is not seen outside, as in transformers, where the body is a call block
        return nodes.Scope([border(BEGIN), *body, border(END)], lineno=line)


class _Names(Namespace):
    """Jinja's namespace without the names by which Python's internals are reached."""

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"a template may not set {name!r}: it begins with an underscore")
        super().__setitem__(name, value)


def _namespace(*args, **values):
    made = _Names()
    for name, value in dict(*args, **values).items():
        made[name] = value
    return made


def _dict(*args, **values):
    return dict(*args, **values)


def _raise_exception(message: str):
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(ESCAPED_BREAK, BREAK)


@cache
def compiled(template: str) -> Template:
    """Raises jinja2's TemplateError if ``template`` is not Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _namespace,
    }
    return environment.from_string(template)
