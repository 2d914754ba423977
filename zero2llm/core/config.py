"""Strict configuration: YAML to frozen dataclasses, where an unknown key is an error that names the nearest one.

Configurations are plain dataclasses; pydantic checks what comes from a file, and is imported only when there is one:
building its schemas for every mechanism at import would cost each start of the program a quarter of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, dataclass_transform

if TYPE_CHECKING:
    import yaml

Lines = dict[tuple, str]  # where each key was written: ("train", "steps") -> "recipes/x.yaml, line 12"


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls):
    """A frozen, keyword-only dataclass; read from data, its fields are checked and unknown ones refused."""
    cls.__pydantic_config__ = {"extra": "forbid"}
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class _ByKind:
    def __init__(self, default: str | None = None):
        self.default = default

    def __get_pydantic_core_schema__(self, source, handler):
        from pydantic import Field
        from pydantic_core import core_schema

        schema = handler.generate_schema(Annotated[source, Field(discriminator="kind")])
        if self.default is None:
            return schema
        complete = lambda data: {"kind": self.default, **data} if isinstance(data, dict) else data
        return core_schema.no_info_before_validator_function(complete, schema)


by_kind = _ByKind()  # Annotated[A | B, by_kind]: the key `kind` says which
by_kind_or = _ByKind  # Annotated[A | B, by_kind_or("a")]: and A where there is no such key


def read_yaml(path: str | Path, overrides: typing.Sequence[str] = ()) -> tuple[dict, Lines]:
    """Mapping of a YAML file with ``key.sub=value`` overrides applied, and where each key stands.

    Raises ValueError for a missing file, invalid YAML, a duplicate key or a malformed override.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines: Lines = {}
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    data = {} if node is None else _construct(node, (), lines, path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a mapping of keys was expected, this is a {type(data).__name__}")
    for text in overrides:
        apply_override(data, lines, text)
    return data, lines


def _construct(node: yaml.Node, at: tuple, lines: Lines, path: Path) -> Any:
    import yaml

    lines[at] = f"{path}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*at, i), lines, path) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return yaml.SafeLoader("").construct_object(node)
    out: dict[str, Any] = {}
    for key_node, child in node.value:
        key, where = str(key_node.value), f"{path}, line {key_node.start_mark.line + 1}"
        if key in out:
            raise ValueError(f"{where}: key {key!r} is given twice")
        out[key] = _construct(child, (*at, key), lines, path)
        lines[(*at, key)] = where
    return out


def apply_override(data: dict, lines: Lines, text: str) -> None:
    """Set ``a.b.c=value`` in nested mappings; the value is read as YAML (``[1, 2]``, ``true``, ``3e-4``)."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"override {text!r}: write key.sub=value")
    *parents, last = keys = name.strip().split(".")
    for i, key in enumerate(parents):
        if not isinstance(data.setdefault(key, {}), dict):
            raise ValueError(f"override {text!r}: {'.'.join(keys[: i + 1])} is not a mapping")
        data = data[key]
    data[last] = yaml.safe_load(value)
    for old in [k for k in lines if k[: len(keys)] == tuple(keys)]:
        del lines[old]
    lines[tuple(keys)] = f"command line, {text!r}"


def parse(kind: Any, data: Any, lines: Lines | None = None, source: str = "") -> Any:
    """``data`` as the type ``kind``. Raises ValueError: one line per fault, with file, line, value and fix."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise ValueError("\n".join(dict.fromkeys(_explain(kind, f, lines or {}, source) for f in faults))) from None


def load(kind: Any, path: str | Path, overrides: typing.Sequence[str] = ()) -> Any:
    """A YAML file as the configuration type ``kind``."""
    data, lines = read_yaml(path, overrides)
    return parse(kind, data, lines, str(path))


def _explain(kind: Any, fault: dict, lines: Lines, source: str) -> str:
    here, keys = kind, []
    for part in fault["loc"]:  # pydantic's path also names the chosen member of a union: a key only if data has it
        here, is_key = _step(here, part)
        if is_key:
            keys.append(part)
    if fault["type"] == "union_tag_invalid":
        keys.append("kind")
    where, name = _where(tuple(keys), lines) or source or "configuration", ".".join(map(str, keys))
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(kind, fault["loc"][:-1])
        near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
        hint = (f"did you mean {near[0]!r}? " if near else "") + f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key {name!r}; {hint}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: key {name!r} is required"
    if fault["type"] == "union_tag_not_found":
        return f"{where}: {name} needs a key 'kind'"
    if fault["type"] == "union_tag_invalid":
        return f"{where}: {name} = {fault['ctx']['tag']!r} is not available; there are: {fault['ctx']['expected_tags']}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" or isinstance(fault["input"], dict):
        return f"{where}: {name + ': ' if name else ''}{message}"
    return f"{where}: {name} = {fault['input']!r}: {message}"


def _where(keys: tuple, lines: Lines) -> str | None:
    """Where the value of ``keys`` was written, or what it stands in; and which of its parts the command line changed."""
    spot = next((lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in lines), None)
    changed = [where for at, where in lines.items() if len(at) > len(keys) and at[: len(keys)] == keys and where.startswith("command line")]
    if not changed:
        return spot
    changed = changed[0] if len(changed) == 1 else "command line"
    return changed if keys not in lines else f"{spot}, and {changed}"


def _members(kind: Any) -> list[Any]:
    """A type with Annotated, Optional and unions opened up."""
    if typing.get_origin(kind) is typing.Annotated:
        return _members(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(kind) for m in _members(arg)]
    return [kind]


def _step(kind: Any, part: Any) -> tuple[Any, bool]:
    """Follow one element of pydantic's error path. Returns (type there, whether the element is a key of the data)."""
    for member in (members := _members(kind)):
        if dataclasses.is_dataclass(member):
            hints = typing.get_type_hints(member, include_extras=True)
            if len(members) > 1 and "kind" in hints and part in typing.get_args(hints["kind"]):
                return member, False
            if part in hints:
                return hints[part], True
        elif typing.get_origin(member) is dict:
            return typing.get_args(member)[1], part != "[key]"
        elif typing.get_origin(member) in (list, tuple):
            return typing.get_args(member)[0], True
    if isinstance(part, str) and any(getattr(m, "__name__", "") == part for m in members):
        return next(m for m in members if getattr(m, "__name__", "") == part), False
    return Any, True


def _known_keys(kind: Any, loc: tuple) -> list[str]:
    for part in loc:
        kind, _ = _step(kind, part)
    return [f.name for m in _members(kind) if dataclasses.is_dataclass(m) for f in dataclasses.fields(m)]


def to_dict(value: Any) -> dict:
    """A configuration as plain JSON-able data, fully resolved; `parse` reads it back to an equal value."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(value)).dump_python(value, mode="json")


def json_schema(kind: Any) -> str:
    """JSON schema of a configuration type, for editors that complete and check YAML."""
    from pydantic import TypeAdapter

    return json.dumps(TypeAdapter(kind).json_schema(), indent=2, ensure_ascii=False)
