"""Chat templates for engines that know only plain Jinja: without the marks of what the assistant generated.

    {%- generation -%} ... {%- endgeneration -%}   ->   {%- if true -%} ... {%- endif -%}

Source: Hugging Face transformers 5, "Chat templates" (the marks); llama.cpp's engine refuses a block that it does not know.
Why a block for a block: the dashes, and the line break that a block swallows, then mean what they meant, so the rendered
text is the same. A mark also hides the names that are set inside it, which `if` does not: such a template is refused.
"""

from __future__ import annotations

import re

MARKS = re.compile(r"({%[-+]?)\s*(end)?generation\s*([-+]?%})")
BODY = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}(.*?){%[-+]?\s*endgeneration\s*[-+]?%}", re.DOTALL)
SET = re.compile(r"{%[-+]?\s*set\s+(\w+)")


def plain(template: str) -> str:
    """The template without marks. Raises ValueError if a name is set between marks and read elsewhere."""
    outside = BODY.sub("", template)
    for body in BODY.findall(template):
        if leaks := [name for name in SET.findall(body) if re.search(rf"\b{name}\b", outside)]:
            raise ValueError(f"the chat template sets {leaks[0]!r} inside {{% generation %}} and reads it outside; choose another name for one of them")
    return MARKS.sub(lambda m: f"{m[1]} {'endif' if m[2] else 'if true'} {m[3]}", template)
