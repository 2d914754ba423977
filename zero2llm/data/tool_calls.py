"""Tools and calls as people store them: JSON strings or objects, flat or the way OpenAI wraps them.

ours: tools  a list of objects, as the record gives them (templates print them as they are)
      calls  a list of {"name", "arguments": object}, and "id" where there was one

Source: OpenAI's chat API (function calling), Hugging Face transformers "Tool use", minimind's SFT files.
"""

from __future__ import annotations

import json
from typing import Any

CALL_KEYS = {"name", "arguments", "id", "type", "function", "index"}


def as_tools(value: Any, where: str) -> list[dict] | None:
    """None where there are none. Raises ValueError if it is no list of described functions."""
    value = _decoded(value, f"{where}: tools")
    if isinstance(value, dict):
        value = [value]
    if not value:
        return None
    for tool in value if isinstance(value, list) else [value]:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f"{where}: tools hold {_short(tool)}; an object with a name was expected")
    return value


def as_calls(value: Any, where: str) -> list[dict]:
    """Raises ValueError for a call without a name, arguments that are no object, or a key that would be dropped."""
    value = _decoded(value, f"{where}: tool_calls")
    calls = [value] if isinstance(value, dict) else value or []
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls is {_short(value)}; a list of calls was expected")
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"{where}: tool_calls hold {_short(call)}; a call needs a name and arguments")
    unknown = (set(call) | set(inner)) - CALL_KEYS
    if unknown or call.get("type") not in (None, "function"):
        raise ValueError(f"{where}: tool_calls hold {_short(call)}; what is no function call would be dropped unseen")
    arguments = _decoded(inner.get("arguments"), f"{where}: the arguments of the call of {inner['name']!r}")
    if not isinstance(arguments or {}, dict):
        raise ValueError(
            f"{where}: the arguments of the call of {inner['name']!r} are {_short(arguments)}, not an object"
        )
    made = {"name": inner["name"], "arguments": arguments or {}}
    return made | {"id": call["id"]} if call.get("id") else made


def same_tools(*found: list[dict] | None) -> list[dict] | None:
    """The one list that stands in several places. Raises ValueError if two differ."""
    lists = [tools for tools in found if tools]
    if any(tools != lists[0] for tools in lists):
        raise ValueError("tools stand in two places and differ; keep one")
    return lists[0] if lists else None


def _decoded(value: Any, what: str) -> Any:
    """A JSON string as what it spells; anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{what} are not JSON ({error}): {_short(value)}") from None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")
