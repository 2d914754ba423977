"""Tools that a model may call between the turns of an answer: how a call is read, and what the model reads next.

    answer    ... <tool_call>\\n{"name": "calculator", "arguments": {"expression": "12 * 7"}}\\n</tool_call><|im_end|>
    reply     what the chat template writes behind that turn: the tools' results, and the header of the model's next turn

The reply's ids are those of the template: a placeholder conversation with the same results is rendered, and what stands behind the
placeholder's call is taken. The model's own ids are never made again from text.
A call that cannot be run (no JSON, an unknown tool, arguments that do not fit, an expression with a fault) gets an error as its
result, which the model reads like any other, and counts as an error. Templates that write calls otherwise are refused.
Source: the Hermes / Qwen convention of <tool_call>; OpenAI's function schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl.calculator import calculate

ToolName = Literal["calculator"]
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
SHOWN = 60  # characters of the model's own text in an error, at most


@dataclass(frozen=True)
class Tool:
    """``needs`` : its arguments, all text."""

    about: str
    needs: tuple[str, ...]
    run: Callable[..., str]

    def schema(self, name: str) -> dict[str, Any]:
        """As OpenAI and chat templates write it."""
        parameters = {"type": "object", "properties": {need: {"type": "string"} for need in self.needs}, "required": list(self.needs)}
        return {"type": "function", "function": {"name": name, "description": self.about, "parameters": parameters}}


TOOLS: dict[str, Tool] = {"calculator": Tool("Work out an expression.", ("expression",), calculate)}


@dataclass(frozen=True)
class Call:
    """One call that was answered. failed : the result is an error message."""

    result: str
    failed: bool


def schemas(names: Sequence[ToolName]) -> list[dict[str, Any]]:
    """What a prompt says of these tools."""
    return [TOOLS[name].schema(name) for name in names]


class Toolbox:
    """``names`` as the template of ``tokenizer`` writes their calls. Raises ValueError if such calls cannot be read back."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[ToolName]):
        self.tokenizer, self.tools = tokenizer, {name: TOOLS[name] for name in names}
        self.schemas = schemas(names)
        try:
            ids, end = self.placed([Call("", False)])
        except ValueError as error:
            raise ValueError(f"rollout.tools: {error}; take a template that knows tools (chat_template: chatml, qwen2.5, qwen3 or minimind-v3)") from None
        if [call.result for call in self.calls(ids[:end])[-1:]] != ["0"]:
            raise ValueError("rollout.tools: the chat template writes calls otherwise than <tool_call>{JSON}</tool_call>, so they cannot be read back")
        self.end = ids[end - 1]  # the token by which the template ends a turn

    def calls(self, ids: Sequence[int]) -> list[Call]:
        """The calls in an answer, each with its result."""
        return [self.answered(text) for text in CALL.findall(self.tokenizer.decode(ids))]

    def answered(self, text: str) -> Call:
        try:
            return Call(self.run(text), False)
        except ValueError as error:
            return Call(f"error: {error}", True)

    def run(self, text: str) -> str:
        """Raises ValueError for anything that is no call of one of these tools, and for what the tool refuses."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("the call is not JSON") from None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or set(call) - {"name", "arguments"}:
            raise ValueError("a call is an object with a name and arguments, and nothing else")
        if name not in self.tools:
            raise ValueError(f"there is no tool {name[:SHOWN]!r}; there are: {', '.join(self.tools)}")
        return self.tools[name].run(**_fitting(name, self.tools[name].needs, call.get("arguments")))

    def reply(self, calls: Sequence[Call]) -> list[int]:
        """Ids from behind the end of the model's turn up to where it writes again."""
        ids, end = self.placed(calls)
        return ids[end:]

    def placed(self, calls: Sequence[Call]) -> tuple[list[int], int]:
        """Ids of the placeholder conversation, and where its turn ends. Two that differ in an argument alone are the same behind it,
        and the first token there that ends a turn ends the model's."""
        ids, other = (self.rendered(calls, argument) for argument in "01")
        same = next((n for n, (a, b) in enumerate(zip(reversed(ids), reversed(other), strict=False)) if a != b), len(ids))
        end = next((i for i in range(len(ids) - same, len(ids)) if ids[i] in self.tokenizer.stop_ids), None)
        if end is None or same == len(ids):
            raise ValueError("the chat template does not show a call, or where it ends")
        return ids, end + 1

    def rendered(self, calls: Sequence[Call], argument: str) -> list[int]:
        made = [{"name": name, "arguments": dict.fromkeys(tool.needs, argument)} for name, tool in list(self.tools.items())[:1] for _ in calls]
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": "", "tool_calls": made}]
        return self.tokenizer.render([*turns, *({"role": "tool", "content": call.result} for call in calls)], True, tools=self.schemas)[0]


def _fitting(name: str, needs: Sequence[str], arguments: Any) -> Mapping[str, str]:
    if not isinstance(arguments, dict) or set(arguments) != set(needs) or not all(isinstance(v, str) for v in arguments.values()):
        raise ValueError(f"{name} needs the arguments {', '.join(needs)}, as text")
    return arguments
